//! The real gdb at a running VM: it sees registers and memory, stops and steps the guest, and leaves it running.

use posada_tests::{Folder, Launch, Place, Process, bare_program, small_linux};
use std::ffi::OsString;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// Starts a gdb that attaches and does `commands`.
fn start_gdb(place: &Place, socket: &Path, symbols: Option<&Path>, commands: &[&str]) -> Process {
    let mut command = Command::new("gdb");
    command.args(["-nx", "-batch", "-ex", "set confirm off", "-ex", "set pagination off"]);
    command.args(["-ex", "set architecture i386:x86-64", "-ex"]);
    let mut attach = OsString::from("target remote ");
    attach.push(socket);
    command.arg(attach);
    for text in commands {
        command.args(["-ex", text]);
    }
    command.args(symbols);
    place.start_command(&mut command, Duration::from_secs(120))
}

/// Attaches gdb, has it do `commands`, and gives what it printed.
fn gdb(place: &Place, socket: &Path, symbols: Option<&Path>, commands: &[&str]) -> String {
    let ended = start_gdb(place, socket, symbols, commands).end();
    ended.expect_code(0);
    // gdb says here what it could not do, and goes on.
    for trouble in ["annot", "rror", "imed out", "No symbol", "onnection"] {
        if ended.errors.contains(trouble) {
            ended.fail("wanted gdb to have no trouble");
        }
    }
    ended.output
}

/// What the line `name=` of a gdb command made by [`show`] says.
#[track_caller]
fn value<'a>(output: &'a str, name: &str) -> &'a str {
    let mark = format!("{name}=");
    output
        .lines()
        .find_map(|line| line.strip_prefix(&mark))
        .unwrap_or_else(|| panic!("gdb did not say {name}: {output}"))
}

/// A gdb command that prints such a line.
fn show(name: &str, expression: &str) -> String {
    format!("printf \"{name}=%lx\\n\", (long)({expression})")
}

fn spinning(place: &Place, folder: &Folder, address: impl AsRef<std::ffi::OsStr>) -> Process {
    let launch = Launch::run()
        .folder(folder.path())
        .kernel(bare_program("spin"))
        .memory("64M")
        .cpus(2)
        .arg("--gdb")
        .arg(address);
    let mut vm = place.start(&launch);
    vm.expect("spinning\n");
    vm
}

fn debug_a_bare_program(place: &Place) {
    let folder = place.folder();
    let socket = folder.path().join("gdb");
    let mut vm = spinning(place, &folder, &socket);
    let symbols = bare_program("spin.elf64");
    let (inside, stepped, at_say, memory) = (
        show("inside", "$rip >= (long)&bare_main && $rip < (long)&bare_main + 64"),
        show("stepped", "$rip - (long)&bare_main"),
        show("at_say", "$rip - (long)&say"),
        show("memory", "*(unsigned char *)0x200001"),
    );
    // Once more from the start: a register that is written, a step, and a break point on the way.
    let mut commands = vec!["info threads", "compare-sections .text", &inside];
    commands.extend(["set $rip = (long)&bare_main", "stepi", &stepped]);
    if place.has_breakpoints() {
        commands.extend(["break *say", "continue", &at_say, "delete"]);
    }
    commands.extend(["set {long}0x200000 = 0x1122334455667788", &memory, "detach"]);
    let output = gdb(place, &socket, Some(&symbols), &commands);
    assert!(output.contains("vCPU 0") && output.contains("vCPU 1"), "{output}");
    assert!(
        output.contains("Section .text") && output.contains("matched."),
        "{output}"
    );
    assert_eq!(value(&output, "inside"), "1");
    let stepped = i64::from_str_radix(value(&output, "stepped"), 16).unwrap();
    assert!(
        (1..16).contains(&stepped),
        "one instruction is no {stepped} bytes: {output}"
    );
    if place.has_breakpoints() {
        assert_eq!(value(&output, "at_say"), "0");
    }
    assert_eq!(value(&output, "memory"), "77");
    // The guest runs on where gdb left it.
    vm.expect("spinning\n").signal(libc::SIGTERM);
    vm.end().expect_code(128 + libc::SIGTERM);
    assert_eq!(place.names(folder.path()), "", "the socket was left behind");
}

fn attach_again_and_kill(place: &Place) {
    let folder = place.folder();
    let socket = folder.path().join("gdb");
    let vm = spinning(place, &folder, &socket);
    let rip = value(&gdb(place, &socket, None, &[&show("rip", "$rip"), "detach"]), "rip").to_string();
    // The VM is gone before it can answer `kill`, which gdb may call an error.
    let again = start_gdb(place, &socket, None, &["stepi", "stepi", &show("rip", "$rip"), "kill"])
        .end()
        .output;
    // The program is an endless jump to itself.
    assert_eq!(value(&again, "rip"), rip);
    vm.end().expect_code(0);
}

fn debug_linux(place: &Place) {
    let folder = place.folder();
    let socket = folder.path().join("gdb");
    let mut vm = place.start(&small_linux().cpus(2).arg("--gdb").arg(&socket));
    vm.prompt();
    let mut shell = vm.shell();
    let mut address = |symbol: &str| {
        let answer = shell.run(&format!("awk '$3 == \"{symbol}\" {{ print $1; exit }}' /proc/kallsyms"));
        format!("0x{}", answer.success().output)
    };
    let (banner, sleep) = (address("linux_banner"), address("hrtimer_nanosleep"));
    let version = shell.run("cat /proc/version").success().output.clone();
    shell.run("(while :; do usleep 1000; done) & true").success();
    let (break_there, banner) = (
        format!("hbreak *{sleep}"),
        format!("printf \"banner=%s\", (char *){banner}"),
    );
    let [first, second, level] = [("first", "$rip"), ("second", "$rip"), ("level", "$cs & 3")].map(|(a, b)| show(a, b));
    let stepped = show("stepped", &format!("$rip - {sleep}"));
    let mut commands = vec![banner.as_str()];
    if place.has_breakpoints() {
        commands.extend([&break_there, "continue", &first, &level, "continue", &second]);
    }
    commands.extend(["stepi", &stepped, "detach"]);
    let output = gdb(place, &socket, None, &commands);
    assert_eq!(value(&output, "banner"), version);
    if place.has_breakpoints() {
        for hit in ["first", "second"] {
            assert_eq!(format!("0x{}", value(&output, hit)), sleep);
        }
        assert_eq!(value(&output, "level"), "0");
    }
    assert_ne!(value(&output, "stepped"), "0");
    shell.run("kill $!; nproc").expect("2");
    shell.send("poweroff -f\n");
    shell.end().expect_code(0);
}

#[test]
fn gdb_debugs_a_bare_program() {
    debug_a_bare_program(&Place::Here);
}

#[test]
fn gdb_attaches_again_and_kills_the_vm() {
    attach_again_and_kill(&Place::Here);
}

#[test]
fn gdb_debugs_linux() {
    debug_linux(&Place::Here);
}

#[test]
fn on_kvm_gdb_debugs_a_bare_program_and_linux() {
    let Some(place) = Place::kvm() else { return };
    debug_a_bare_program(&place);
    attach_again_and_kill(&place);
    debug_linux(&place);
}
