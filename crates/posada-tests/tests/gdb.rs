//! The real gdb on a running VM.

use posada_tests::{Folder, Launch, bare_program, small_linux};
use std::path::Path;
use std::process::Command;

/// What gdb prints for these commands on a VM whose `--gdb` is `socket`.
fn gdb(socket: &Path, commands: &[&str]) -> String {
    let mut gdb = Command::new("gdb");
    gdb.args([
        "-nx",
        "-batch",
        "-ex",
        "set confirm off",
        "-ex",
        "set architecture i386:x86-64",
    ]);
    gdb.args(["-ex", &format!("target remote {}", socket.display())]);
    commands.iter().for_each(|command| {
        gdb.args(["-ex", command]);
    });
    let output = gdb.output().expect("gdb is installed");
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

#[track_caller]
fn value(output: &str, name: &str) -> u64 {
    let line = output.lines().find(|line| line.starts_with(name));
    let word = line.and_then(|line| line.split_whitespace().nth(1));
    let digits = word.and_then(|word| word.strip_prefix("0x"));
    digits
        .and_then(|digits| u64::from_str_radix(digits, 16).ok())
        .unwrap_or_else(|| panic!("no value of {name} in:\n{output}"))
}

#[test]
fn registers_memory_and_single_steps() {
    let folder = Folder::new();
    let socket = folder.path().join("gdb");
    let mut vm = Launch::run()
        .kernel(bare_program("spin"))
        .memory("64M")
        .arg("--gdb")
        .arg(&socket)
        .start();
    vm.expect("spinning\n");
    // The multiboot magic is where the kernel was loaded.
    let output = gdb(
        &socket,
        &[
            "info registers rip cs cr0",
            "x/1wx 0x100000",
            "stepi",
            "info registers rip",
            "detach",
        ],
    );
    assert!(output.contains("0x1badb002"), "{output}");
    let rip = value(&output, "rip");
    assert!((0x10_0000..0x20_0000).contains(&rip), "{output}");
    // It went on, and can be attached to again.
    let output = gdb(&socket, &["info registers rip", "detach"]);
    assert!((0x10_0000..0x20_0000).contains(&value(&output, "rip")), "{output}");
    vm.signal(libc::SIGTERM);
    vm.end().expect_code(128 + libc::SIGTERM);
}

#[test]
fn a_break_point_in_a_linux_kernel() {
    let folder = Folder::new();
    let socket = folder.path().join("gdb");
    let mut vm = small_linux()
        .cpus(2)
        .cmdline("console=ttyS0 quiet TERM=dumb nokaslr")
        .arg("--gdb")
        .arg(&socket)
        .start();
    vm.prompt();
    let mut shell = vm.shell();
    let address = shell.run("grep -w do_nanosleep /proc/kallsyms | cut -d' ' -f1");
    address.success();
    let at = format!("0x{}", address.output);
    shell.send("(while :; do sleep 0.05; done) &\n");
    let output = gdb(
        &socket,
        &[
            &format!("break *{at}"),
            "continue",
            "info registers rip",
            "info threads",
            "delete",
            "stepi",
            "detach",
        ],
    );
    assert_eq!(format!("{:#x}", value(&output, "rip")), at, "{output}");
    assert!(output.contains("Thread 2"), "{output}");
    // The guest goes on as if nothing had been.
    shell.run("kill %1; sleep 0.1; echo alive").contains("alive");
    shell.send("poweroff -f\n");
    shell.end().expect_code(0);
}
