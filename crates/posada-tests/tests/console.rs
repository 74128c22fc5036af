//! The console on a terminal: keys go to the guest, Ctrl-A leads out, and the terminal comes back as it was.

use posada_tests::{Ended, Launch, Process, Settings, bare_program, small_linux};

const CTRL_A: &str = "\x01";
const CTRL_C: &str = "\x03";

fn spinning() -> (Process, Settings) {
    let launch = Launch::run().kernel(bare_program("spin")).memory("64M");
    let (mut vm, before) = launch.start_on_terminal();
    vm.expect("spinning\n");
    assert!(!before.is_raw());
    assert!(
        vm.terminal_settings().is_raw(),
        "the guest runs on a terminal that is not raw"
    );
    (vm, before)
}

#[track_caller]
fn is_restored(ended: &Ended, before: Settings) {
    assert_eq!(ended.terminal, Some(before), "the terminal was left changed");
}

#[test]
fn ctrl_a_x_ends_the_vm() {
    let (mut vm, before) = spinning();
    vm.send(CTRL_A).send("x");
    let ended = vm.end();
    is_restored(ended.expect_code(0), before);
}

#[test]
fn ctrl_a_h_lists_what_there_is() {
    let (mut vm, before) = spinning();
    vm.send(CTRL_A)
        .send("h")
        .expect("Ctrl-A x")
        .expect("end the VM")
        .expect("Ctrl-A Ctrl-A");
    assert!(vm.terminal_settings().is_raw());
    // Neither is a command of the console.
    vm.send("x")
        .send(CTRL_A)
        .send("q")
        .send(CTRL_A)
        .send("h")
        .expect("Ctrl-A x");
    vm.send(CTRL_A).send("x");
    let ended = vm.end();
    is_restored(ended.expect_code(0), before);
}

#[test]
fn a_signal_gives_the_terminal_back() {
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
        let (mut vm, before) = spinning();
        vm.signal(signal);
        let ended = vm.end();
        is_restored(ended.expect_code(128 + signal), before);
    }
}

#[test]
fn a_signal_that_kills_gives_the_terminal_back() {
    for signal in [libc::SIGQUIT, libc::SIGABRT, libc::SIGSEGV] {
        let (mut vm, before) = spinning();
        vm.signal(signal);
        let ended = vm.end();
        assert_eq!(ended.signal, Some(signal));
        is_restored(&ended, before);
    }
}

#[test]
fn a_guest_that_crashes_gives_the_terminal_back() {
    let launch = Launch::run().kernel(bare_program("triplefault")).memory("64M");
    let (vm, before) = launch.start_on_terminal();
    let ended = vm.end();
    is_restored(ended.expect_code(2), before);
}

#[test]
fn a_vm_that_cannot_start_leaves_the_terminal_alone() {
    let (vm, before) = Launch::run().kernel("no-such-kernel").start_on_terminal();
    let ended = vm.end();
    is_restored(ended.expect_code(125), before);
}

#[test]
fn keys_go_to_the_guest_until_it_powers_off() {
    let (mut vm, before) = small_linux().start_on_terminal();
    vm.prompt();
    assert!(vm.terminal_settings().is_raw());
    // Ctrl-C is the guest's, and ends what runs there.
    vm.send("cat\n").send("a line for cat\n").expect("a line for cat\n");
    vm.send(CTRL_C).prompt();
    vm.send("echo status $?\n").expect("status 130\n").prompt();
    // Ctrl-A twice is Ctrl-A for the guest.
    vm.send("stty raw; echo ready; head -c 3 | od -An -tx1; stty sane -echo\n")
        .expect("ready\n");
    vm.send("b")
        .send(CTRL_A)
        .send(CTRL_A)
        .send("c")
        .expect("62 01 63")
        .prompt();
    vm.send("poweroff -f\n");
    let ended = vm.end();
    is_restored(ended.expect_code(0), before);
}
