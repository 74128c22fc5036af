//! What a user may get wrong: each is told in one sentence that names the thing, with exit code 125, and nothing stays.

use posada_tests::{Folder, Launch, bare_program};
use std::fs;
use std::net::TcpListener;
use std::path::Path;

/// `posada run` in `folder` with a kernel that would run, and more.
fn run(folder: &Folder) -> Launch {
    Launch::run()
        .folder(folder.path())
        .kernel(bare_program("spin"))
        .memory("64M")
}

/// Starts it in vain; the sentence must have all these words.
#[track_caller]
fn refused(folder: &Folder, launch: &Launch, words: &[&str]) {
    let before = folder.names();
    let ended = launch.start().end();
    ended.expect_code(125);
    if !ended.output.is_empty() {
        ended.fail("wanted nothing on standard output");
    }
    if !ended.errors.starts_with("posada: ") || ended.errors.trim_end().lines().count() != 1 {
        ended.fail("wanted one sentence on standard error");
    }
    for word in words {
        if !ended.errors.contains(word) {
            ended.fail(&format!("wanted {word:?} in the sentence"));
        }
    }
    assert_eq!(folder.names(), before, "something was left behind");
}

fn name(path: &Path) -> &str {
    path.to_str().expect("tests use plain names")
}

fn refused_kernel(file: &str, content: &[u8], words: &[&str]) {
    let folder = Folder::new();
    let path = folder.file(file, content);
    let launch = Launch::run().folder(folder.path()).memory("64M").kernel(&path);
    refused(&folder, &launch, &[&[name(&path)], words].concat());
}

// ---- kernels

#[test]
fn a_kernel_that_is_missing() {
    let folder = Folder::new();
    let launch = Launch::run().folder(folder.path()).kernel("no-such-kernel");
    refused(&folder, &launch, &["kernel", "no-such-kernel", "No such file"]);
}

#[test]
fn a_kernel_that_is_a_folder() {
    let folder = Folder::new();
    let launch = Launch::run().folder(folder.path()).kernel(folder.path());
    refused(&folder, &launch, &["kernel", name(folder.path())]);
}

#[test]
fn a_kernel_that_is_empty() {
    refused_kernel("vmlinuz", b"", &["kernel", "empty"]);
}

#[test]
fn a_kernel_that_is_truncated() {
    let whole = fs::read(bare_program("spin")).unwrap();
    for length in [whole.len() / 2, 0x1000, 60] {
        refused_kernel("vmlinuz", &whole[..length], &[]);
    }
}

#[test]
fn a_linux_kernel_that_is_truncated() {
    // The head of a bzImage (Linux x86 boot protocol): its set-up sectors, of which not all are there.
    let mut head = vec![0; 0x600];
    head[0x1f1] = 30;
    head[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    head[0x202..0x206].copy_from_slice(b"HdrS");
    head[0x206..0x208].copy_from_slice(&0x020f_u16.to_le_bytes());
    head[0x211] = 1;
    refused_kernel("vmlinuz", &head, &[]);
}

#[test]
fn a_kernel_that_is_none() {
    refused_kernel(
        "picture.png",
        b"\x89PNG\r\n\x1a\n and so on and on and on and on and on and on and on",
        &["kernel"],
    );
    refused_kernel("notes.txt", &b"All work and no play. ".repeat(1000), &["kernel"]);
    refused_kernel("zeroes", &[0; 100_000], &["kernel"]);
}

#[test]
fn a_kernel_of_another_architecture() {
    let mut elf = fs::read(bare_program("spin")).unwrap();
    // e_machine of an ELF header: AArch64. The multiboot header goes, so that nothing but ELF is left.
    elf[18..20].copy_from_slice(&183_u16.to_le_bytes());
    let magic = 0x1bad_b002_u32.to_le_bytes();
    let at = elf
        .windows(4)
        .position(|bytes| bytes == magic)
        .expect("it is a multiboot kernel");
    elf[at..at + 4].fill(0);
    refused_kernel("aarch64", &elf, &["kernel"]);
}

#[test]
fn a_multiboot_header_with_mad_addresses() {
    let folder = Folder::new();
    let mut header = Vec::new();
    // Flag 16: header, load, load end, bss end and entry addresses follow.
    for word in [
        0x1bad_b002,
        0x1_0000,
        0_u32.wrapping_sub(0x1bad_b002 + 0x1_0000),
        0xffff_0000,
        0xfffe_0000,
        0,
        0,
        0xffff_ffff,
    ] {
        header.extend_from_slice(&u32::to_le_bytes(word));
    }
    header.resize(8192, 0);
    let path = folder.file("flat", &header);
    let launch = Launch::run().folder(folder.path()).memory("64M").kernel(&path);
    refused(&folder, &launch, &["kernel", name(&path)]);
}

// ---- initramfs and disks

#[test]
fn an_initramfs_that_is_missing_or_empty() {
    let folder = Folder::new();
    refused(
        &folder,
        &run(&folder).initramfs("no-such-initrd"),
        &["initramfs", "no-such-initrd"],
    );
    let empty = folder.file("initrd", b"");
    refused(
        &folder,
        &run(&folder).initramfs(&empty),
        &["initramfs", name(&empty), "empty"],
    );
}

#[test]
fn an_initramfs_larger_than_memory() {
    let folder = Folder::new();
    let large = folder.sparse("initrd", 1 << 30);
    refused(
        &folder,
        &run(&folder).initramfs(&large),
        &["initramfs", name(&large), "--memory"],
    );
}

#[test]
fn a_disk_that_is_missing_or_empty_or_a_folder() {
    let folder = Folder::new();
    refused(&folder, &run(&folder).disk("no-such-disk"), &["disk", "no-such-disk"]);
    let empty = folder.file("empty.raw", b"");
    refused(&folder, &run(&folder).disk(&empty), &["disk", name(&empty), "empty"]);
    refused(
        &folder,
        &run(&folder).disk(folder.path()),
        &["disk", name(folder.path())],
    );
}

#[test]
fn a_disk_that_another_vm_has() {
    let folder = Folder::new();
    let disk = folder.sparse("disk.raw", 1 << 20);
    let mut first = run(&folder).disk(&disk).start();
    first.expect("spinning");
    refused(&folder, &run(&folder).disk(&disk), &["disk", name(&disk), "in use"]);
    refused(
        &folder,
        &run(&folder).disk(format!("{},ro", name(&disk))),
        &["disk", name(&disk), "in use"],
    );
    first.signal(libc::SIGTERM);
    first.end().expect_code(128 + libc::SIGTERM);
    assert_eq!(folder.names(), ["disk.raw"]);
}

#[test]
fn a_disk_that_is_read_by_several_vms() {
    let folder = Folder::new();
    let disk = folder.sparse("disk.raw", 1 << 20);
    let reader = run(&folder).disk(format!("{},ro", name(&disk)));
    let (mut first, mut second) = (reader.start(), reader.start());
    first.expect("spinning");
    second.expect("spinning");
    refused(&folder, &run(&folder).disk(&disk), &["disk", name(&disk), "in use"]);
}

#[test]
fn a_killed_vm_leaves_no_lock() {
    let folder = Folder::new();
    let disk = folder.sparse("disk.raw", 1 << 20);
    let mut first = run(&folder).disk(&disk).start();
    first.expect("spinning").signal(libc::SIGKILL);
    assert_eq!(first.end().signal, Some(libc::SIGKILL));
    assert_eq!(folder.names(), ["disk.raw"]);
    run(&folder).disk(&disk).start().expect("spinning");
}

// ---- sizes and numbers

#[test]
fn memory_of_no_use() {
    let folder = Folder::new();
    for size in [
        "0",
        "1M",
        "1MiB",
        "1000000",
        "256T",
        "16777216T",
        "-1",
        "lots",
        "",
        "12Q",
    ] {
        let launch = Launch::run()
            .folder(folder.path())
            .kernel(bare_program("spin"))
            .arg(format!("--memory={size}"));
        refused(&folder, &launch, &["memory"]);
    }
}

#[test]
fn cpus_of_no_use() {
    let folder = Folder::new();
    for count in ["0", "9", "300", "-1", "4294967297", "two"] {
        refused(&folder, &run(&folder).arg(format!("--cpus={count}")), &["cpus"]);
    }
}

// ---- the rest

#[test]
fn a_console_file_that_cannot_be_written() {
    let folder = Folder::new();
    let launch = |console: &str| {
        Launch::command(["run", "--memory", "64M", "--console", console, "--kernel"])
            .arg(bare_program("spin"))
            .folder(folder.path())
    };
    refused(
        &folder,
        &launch("file:no-such-folder/log"),
        &["console", "no-such-folder/log"],
    );
    refused(
        &folder,
        &launch(&format!("file:{}", name(folder.path()))),
        &["console", name(folder.path())],
    );
    refused(&folder, &launch("paper"), &["--console", "paper"]);
}

#[test]
fn an_address_for_gdb_that_is_taken() {
    let folder = Folder::new();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    refused(&folder, &run(&folder).arg("--gdb").arg(&address), &["gdb", &address]);
}

#[test]
fn options_that_there_are_not() {
    let folder = Folder::new();
    refused(&folder, &run(&folder).arg("--turbo"), &["--turbo"]);
    let magic = Launch::command(["run", "--kernel", "vmlinuz", "--accel", "magic"]).folder(folder.path());
    refused(&folder, &magic, &["--accel", "magic"]);
    refused(&folder, &Launch::command(["run"]).folder(folder.path()), &["--kernel"]);
    refused(&folder, &Launch::command(["fly"]).folder(folder.path()), &["fly"]);
}
