//! Debian, as the distribution made it, in a VM: it starts, its programs give the results that they give elsewhere, wake-ups
//! and writes are not lost, and it powers off.

use posada_tests::{Folder, Launch, Shell, debian, image, root_disk, script_disk, small_linux};
use std::path::Path;
use std::process::Command;

/// Waits for the prompt that follows the start.
fn shell(launch: &Launch) -> Shell {
    let mut vm = launch.start();
    vm.prompt();
    vm.shell()
}

/// `systemctl poweroff`; the file system on `disk` must be clean then.
#[track_caller]
fn power_off(mut shell: Shell, disk: &Path) {
    shell.send("systemctl poweroff\n");
    let ended = shell.end();
    ended.expect_code(0);
    if !ended.errors.is_empty() {
        ended.fail("wanted nothing on standard error");
    }
    // Exit code 0: no errors, not even ones that were corrected.
    let check = Command::new("/sbin/e2fsck").args(["-fn"]).arg(disk).output().unwrap();
    let text = String::from_utf8_lossy(&check.stdout).into_owned();
    assert!(check.status.success(), "the file system is not well: {text}");
}

/// What `command` prints on the host.
fn host(command: &Path) -> String {
    let output = Command::new(command)
        .output()
        .unwrap_or_else(|error| panic!("cannot run {} on the host: {error}", command.display()));
    assert!(output.status.success(), "{} fails on the host", command.display());
    String::from_utf8(output.stdout).unwrap().trim().to_string()
}

fn source(path: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(path)
}

/// Runs `guest/wakeups.py`; no delay may be one that only a lucky event has ended.
#[track_caller]
fn no_wake_up_is_lost(shell: &mut Shell) {
    const WORST_MILLISECONDS: f64 = 5000.0;
    let answer = shell.run("python3 /dev/vdb");
    let (parts, last) = answer.success().output.rsplit_once('\n').unwrap();
    assert_eq!(last, "all parts done");
    for line in parts.lines() {
        let worst: f64 = line.rsplit(' ').next().and_then(|word| word.parse().ok()).expect(line);
        assert!(worst < WORST_MILLISECONDS, "{line}: that long is no wake-up");
    }
    assert_eq!(parts.lines().count(), 6, "{parts}");
}

#[test]
fn programs_give_the_results_that_they_give_on_the_host() {
    let folder = Folder::new();
    let disk = root_disk(&folder);
    let mut shell = shell(&debian(&disk));
    shell.run("nproc").expect("1");
    shell
        .run("systemd-detect-virt; systemctl is-system-running --wait")
        .contains("running");
    let sums = folder.path().join("programs");
    let made = Command::new("make")
        .args(["-s", "-C"])
        .arg(source("guest/programs"))
        .arg(format!("OUT={}", sums.display()))
        .status();
    assert!(made.is_ok_and(|status| status.success()), "cannot make the programs");
    shell.run("sums32").expect(&host(&sums.join("sums32")));
    shell.run("selfcheck").expect(&host(&source("guest/image/selfcheck")));
    shell.kernel_is_well();
    power_off(shell, &disk);
}

fn cpus_work_together(cpus: u32) {
    let folder = Folder::new();
    let disk = root_disk(&folder);
    let script = script_disk(&folder, include_str!("../guest/wakeups.py"));
    let mut shell = shell(&debian(&disk).disk(script).cpus(cpus));
    shell.run("nproc").expect(&cpus.to_string());
    no_wake_up_is_lost(&mut shell);
    shell.kernel_is_well();
    power_off(shell, &disk);
}

#[test]
fn two_cpus_lose_no_wake_up() {
    cpus_work_together(2);
}

#[test]
fn four_cpus_lose_no_wake_up() {
    cpus_work_together(4);
}

#[test]
fn what_is_written_outlives_a_reboot_and_a_killed_vm() {
    let folder = Folder::new();
    let disk = root_disk(&folder);
    let write = |shell: &mut Shell, name: &str| {
        let command = format!("seq 200000 >/root/{name} && cat /proc/sys/kernel/random/boot_id >>/root/{name}");
        shell
            .run(&format!("{command} && sync && sha256sum /root/{name}"))
            .success()
            .output
            .clone()
    };
    let mut first = shell(&debian(&disk).cpus(2));
    let boot = first
        .run("cat /proc/sys/kernel/random/boot_id")
        .success()
        .output
        .clone();
    let before = write(&mut first, "before");
    // The same process starts the guest again.
    first.send("systemctl reboot\n").process().prompt();
    let mut second = first.again();
    assert_ne!(second.run("cat /proc/sys/kernel/random/boot_id").success().output, boot);
    second.run("sha256sum /root/before").expect(&before);
    second.run("nproc").expect("2");
    second.kernel_is_well();
    // While it runs the disk is its own.
    let refused = debian(&disk).start().end();
    refused.expect_code(125);
    assert!(refused.errors.contains("in use"), "{}", refused.errors);
    let after = write(&mut second, "after");
    second.process().signal(libc::SIGKILL);
    assert_eq!(second.end().signal, Some(libc::SIGKILL));

    let mut third = shell(&small_linux().disk(&disk));
    third
        .run("mount /dev/vda /mnt && chroot /mnt sha256sum /root/before /root/after")
        .expect(&format!("{before}\n{after}"));
    third.run("umount /mnt").expect("");
    third.send("poweroff -f\n");
    third.end().expect_code(0);
}

#[test]
fn a_disk_that_is_read_only_takes_no_writes() {
    let content = std::fs::read(image("data.raw")).unwrap();
    let folder = Folder::new();
    let disk = folder.file("data.raw", &content);
    let mut shell = shell(&small_linux().disk(format!("{},ro", disk.display())));
    shell.run("cat /sys/block/vda/ro").expect("1");
    assert_ne!(
        shell
            .run("dd if=/dev/zero of=/dev/vda bs=4096 count=1 conv=fsync")
            .status,
        0
    );
    assert_ne!(shell.run("mount -o rw /dev/vda /mnt && echo x >/mnt/x").status, 0);
    shell
        .run("umount /mnt; mount -o ro,noload /dev/vda /mnt && cmp -n 100 /mnt/data.txt /mnt/data.txt")
        .success();
    shell.send("poweroff -f\n");
    shell.end().expect_code(0);
    assert!(std::fs::read(&disk).unwrap() == content, "the disk has changed");
}
