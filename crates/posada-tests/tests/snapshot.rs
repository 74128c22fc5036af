//! Snapshots: a VM that is saved and goes on elsewhere has not noticed, and one that is saved and runs on neither.

use posada_tests::{Ended, Folder, Launch, Process, Shell, TestHost, bare_program, small_linux};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Steps of `steady chain`, and rounds of `steady blocks`: some seconds on the software CPU.
const STEPS: u32 = 1500;
const ROUNDS: u32 = 1000;
/// A busy machine makes minutes of them.
const PATIENCE: Duration = Duration::from_secs(400);

/// An engine, on this machine or in the test host.
#[derive(Clone, Copy)]
struct Site<'a> {
    /// What the launch says, without one.
    accel: Option<&'a str>,
    host: Option<&'a TestHost>,
}

const HERE: Site<'static> = Site {
    accel: None,
    host: None,
};

const INTERPRETER: Site<'static> = Site {
    accel: Some("emulate=interpret"),
    host: None,
};

const TRANSLATOR: Site<'static> = Site {
    accel: Some("emulate=translate"),
    host: None,
};

fn kvm(host: &TestHost) -> Site<'_> {
    Site {
        accel: Some("kvm"),
        host: Some(host),
    }
}

impl Site<'_> {
    fn start(&self, launch: &Launch) -> Process {
        match self.host {
            Some(host) => launch.start_in(host),
            None => launch.start(),
        }
    }

    fn run(&self, launch: Launch) -> Process {
        self.start(&match self.accel {
            Some(accel) => launch.accel(accel),
            None => launch,
        })
    }

    /// Any `posada` command, to its end.
    fn command(&self, arguments: &[&str]) -> Ended {
        self.start(&Launch::command(arguments)).end()
    }

    /// Saves the VM at `socket` in `folder`.
    fn save(&self, folder: &Folder, place: &str, more: &[&str]) {
        self.try_save(folder, place, more).expect_code(0);
    }

    /// The same, and how it went.
    fn try_save(&self, folder: &Folder, place: &str, more: &[&str]) -> Ended {
        let paths = [path(folder, "socket"), path(folder, place)];
        let arguments = [&["snapshot", "save", &paths[0], &paths[1]], more].concat();
        self.command(&arguments)
    }

    /// Has there what is in `folder` here.
    fn put(&self, folder: &Folder) {
        if let Some(host) = self.host {
            let name = folder.path().parent().and_then(Path::to_str);
            host.put(folder.path(), name.expect("tests use plain names"));
        }
    }

    /// Has here what is in `folder` there.
    fn get(&self, folder: &Folder) {
        if let Some(host) = self.host {
            let parent = folder.path().parent().expect("it is in a folder");
            host.get(folder.path().to_str().expect("tests use plain names"), parent);
        }
    }
}

fn path(folder: &Folder, name: &str) -> String {
    let path = folder.path().join(name);
    path.to_str().expect("tests use plain names").into()
}

/// `launch` with a control socket in `folder`.
fn controlled(folder: &Folder, launch: Launch) -> Launch {
    launch.arg("--control").arg(path(folder, "socket"))
}

fn restore(folder: &Folder, place: &str) -> Launch {
    Launch::run()
        .arg("--restore")
        .arg(path(folder, place))
        .folder(folder.path())
        .patience(PATIENCE)
}

/// The copy of disk 0 that a user makes.
fn disk_of(folder: &Folder, place: &str) -> PathBuf {
    let copy = folder.path().join(format!("{place}.raw"));
    let copied = Command::new("cp")
        .args(["--reflink=auto", "--sparse=always"])
        .args([&folder.path().join(place).join("disk0.raw"), &copy])
        .status();
    assert!(copied.is_ok_and(|status| status.success()), "cannot copy the disk");
    copy
}

/// What the guest's work prints where nothing disturbs it: on the host.
fn undisturbed(folder: &Folder) -> String {
    let built = Command::new("make")
        .args(["-s", "-C"])
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../guest/programs"))
        .arg(format!("OUT={}", path(folder, "programs")))
        .status();
    assert!(
        built.is_ok_and(|status| status.success()),
        "the guest's program does not build"
    );
    let disk = folder.sparse("host.raw", 8 << 20);
    let run = |arguments: &[&str]| {
        let output = Command::new(folder.path().join("programs/steady"))
            .args(arguments)
            .output();
        let output = output.expect("it was built");
        assert!(output.status.success());
        String::from_utf8(output.stdout).expect("text")
    };
    let chain = run(&["chain", &STEPS.to_string()]);
    let text = chain + &run(&["blocks", disk.to_str().expect("plain names"), &ROUNDS.to_string()]) + "over\n";
    fs::remove_file(disk).expect("it was made");
    fs::remove_dir_all(folder.path().join("programs")).expect("they were built");
    text
}

/// What a guest's work has printed.
fn work(output: &str) -> &str {
    let begin = output.find("step 50 ").expect("it began");
    let end = output.find("over\n").map_or(output.len(), |at| at + 5);
    &output[begin..end]
}

fn end_of_work(mut vm: Process) -> Ended {
    vm.expect("over\n").expect("posada# ");
    vm.send("poweroff -f\n");
    let ended = vm.end();
    ended.expect_code(0);
    ended
}

/// A VM is saved twice while it computes and writes, and each snapshot goes on at the other site as if nothing had been.
fn two_moments_of_a_busy_vm_go_on(from: Site<'_>, to: Site<'_>) {
    let folder = Folder::new();
    let expected = undisturbed(&folder);
    folder.sparse("disk.raw", 8 << 20);
    from.put(&folder);
    let launch = controlled(&folder, small_linux())
        .cpus(2)
        .arg("--cpu-model")
        .arg("x86-64-v2")
        .disk(path(&folder, "disk.raw"));
    let mut vm = from.run(launch);
    vm.prompt();
    vm.send(&format!(
        "steady blocks /dev/vda {ROUNDS} >/tmp/blocks & steady chain {STEPS}; wait; cat /tmp/blocks; echo over\n"
    ));
    vm.expect("step 100 ");
    from.save(&folder, "first", &[]);
    vm.expect("step 300 ");
    let saved = from.try_save(&folder, "second", &["--stop"]);
    if saved.code != Some(0) {
        // What the VM says may be the reason.
        vm.signal(libc::SIGTERM);
        panic!("{saved:?}, the VM: {:?}", vm.end());
    }
    let ended = vm.end();
    ended.expect_code(0);
    from.get(&folder);
    disk_of(&folder, "first");
    disk_of(&folder, "second");
    to.put(&folder);
    // Its clocks have to make up for a rest.
    thread::sleep(Duration::from_secs(3));
    let second = end_of_work(to.run(restore(&folder, "second").disk(path(&folder, "second.raw"))));
    assert_eq!(work(&format!("{}{}", ended.output, second.output)), expected);
    let first = end_of_work(to.run(restore(&folder, "first").disk(path(&folder, "first.raw"))));
    let after = first
        .output
        .split_inclusive("over\n")
        .next()
        .expect("it was waited for");
    assert!(expected.ends_with(after) && after.lines().count() > 3, "{after}");
}

#[test]
fn a_busy_vm_goes_on_where_it_was_saved() {
    two_moments_of_a_busy_vm_go_on(HERE, HERE);
}

#[test]
fn a_busy_vm_of_the_translator_goes_on_on_the_interpreter() {
    two_moments_of_a_busy_vm_go_on(TRANSLATOR, INTERPRETER);
}

#[test]
fn a_busy_vm_of_the_interpreter_goes_on_on_the_translator() {
    two_moments_of_a_busy_vm_go_on(INTERPRETER, TRANSLATOR);
}

#[test]
fn a_busy_vm_of_the_interpreter_goes_on_on_kvm() {
    let Some(host) = TestHost::start() else { return };
    two_moments_of_a_busy_vm_go_on(INTERPRETER, kvm(&host));
}

#[test]
fn a_busy_vm_of_the_translator_goes_on_on_kvm() {
    let Some(host) = TestHost::start() else { return };
    two_moments_of_a_busy_vm_go_on(TRANSLATOR, kvm(&host));
}

#[test]
fn a_busy_vm_on_kvm_goes_on_on_the_interpreter() {
    let Some(host) = TestHost::start() else { return };
    two_moments_of_a_busy_vm_go_on(kvm(&host), INTERPRETER);
}

#[test]
fn a_busy_vm_on_kvm_goes_on_on_the_translator() {
    let Some(host) = TestHost::start() else { return };
    two_moments_of_a_busy_vm_go_on(kvm(&host), TRANSLATOR);
}

// ---- AVX-512

/// Runs of `guest/wide.c` on as many threads.
const RUNS: usize = 5;
const THREADS: &str = "4";

/// A disk that holds `guest/wide.c` as a program, and what it prints here; `None`, with the reason, where the processor cannot
/// run it.
fn wide(folder: &Folder) -> Option<(String, String)> {
    if !std::arch::is_x86_feature_detected!("avx512vl") {
        println!("skipped: the host's processor has no AVX-512");
        return None;
    }
    let program = path(folder, "wide");
    let flags = "-O3 -g0 -Wall -Wextra -Werror -std=gnu11 -march=skylake-avx512 -mprefer-vector-width=512 -fno-builtin \
                 -ffp-contract=off -pthread -static -s -o";
    let built = Command::new("gcc")
        .args(flags.split_whitespace())
        .args([&program, concat!(env!("CARGO_MANIFEST_DIR"), "/guest/wide.c")])
        .status();
    assert!(
        built.is_ok_and(|status| status.success()),
        "guest/wide.c does not build"
    );
    let output = Command::new(&program).arg(THREADS).output().expect("it was built");
    assert!(output.status.success());
    let mut content = fs::read(&program).expect("it was built");
    content.resize(content.len().next_multiple_of(512), 0);
    let disk = format!("{},ro", folder.file("wide.raw", &content).display());
    Some((disk, String::from_utf8(output.stdout).expect("text")))
}

/// Programs that use AVX-512 give the host's results, and a VM that is saved meanwhile goes on.
fn avx512_goes_on(from: Site<'_>, to: Site<'_>) {
    let folder = Folder::new();
    let Some((disk, result)) = wide(&folder) else { return };
    let mut vm = from.run(controlled(&folder, small_linux()).cpus(2).disk(&disk));
    vm.prompt();
    let command = format!("for run in $(seq {RUNS}); do /tmp/wide {THREADS} & /tmp/wide {THREADS}; wait; done");
    vm.send(&format!(
        "cat /dev/vda >/tmp/wide; chmod +x /tmp/wide; echo be''gin; {command}; echo ov''er\n"
    ));
    vm.expect(&result);
    from.save(&folder, "snap", &["--stop"]);
    let before = vm.end();
    before.expect_code(0);
    let after = end_of_work(to.run(restore(&folder, "snap").disk(&disk)));
    let output = format!("{}{}", before.output, after.output);
    let (_, output) = output.split_once("begin\n").expect("it began");
    let (output, _) = output.split_once("over\n").expect("it was waited for");
    assert_eq!(output, result.repeat(2 * RUNS));
}

#[test]
fn programs_with_avx512_on_the_translator_go_on_on_the_interpreter() {
    avx512_goes_on(TRANSLATOR, INTERPRETER);
}

#[test]
fn programs_with_avx512_on_the_interpreter_go_on_on_the_translator() {
    avx512_goes_on(INTERPRETER, TRANSLATOR);
}

// ---- a VM that runs on

#[test]
fn a_vm_that_is_saved_runs_on_undisturbed() {
    let folder = Folder::new();
    let expected = undisturbed(&folder);
    let disk = folder.sparse("disk.raw", 8 << 20);
    let mut vm = HERE.run(controlled(&folder, small_linux()).disk(disk));
    vm.prompt();
    vm.send(&format!(
        "steady blocks /dev/vda {ROUNDS} >/tmp/blocks & steady chain {STEPS}; wait; cat /tmp/blocks; echo over\n"
    ));
    for (step, disks) in [(100, "copy"), (200, "reference"), (300, "copy"), (400, "copy")] {
        vm.expect(&format!("step {step} "));
        HERE.save(&folder, "snap", &["--force", "--disks", disks]);
    }
    assert_eq!(work(&end_of_work(vm).output), expected);
    assert_eq!(folder.names(), ["disk.raw", "snap"]);
}

// ---- an idle VM

/// An idle Linux with a disk, saved with `more` to `snap`.
fn saved(folder: &Folder, more: &[&str]) -> Shell {
    let disk = folder.sparse("disk.raw", 8 << 20);
    let mut vm = HERE.run(controlled(folder, small_linux()).disk(disk));
    vm.prompt();
    let mut shell = vm.shell();
    shell.run("echo kept > /tmp/note").expect("");
    HERE.save(folder, "snap", more);
    shell
}

fn seconds() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .expect("it is later")
        .as_secs()
}

#[test]
fn the_time_of_day_is_right_after_a_rest_and_uptime_goes_on() {
    let folder = Folder::new();
    let mut before = saved(&folder, &[]);
    let uptime = |shell: &mut Shell| -> f64 {
        let answer = shell.run("cut -d' ' -f1 /proc/uptime");
        answer.output.parse().expect("a number")
    };
    let was = uptime(&mut before);
    before.send("poweroff -f\n");
    before.end().expect_code(0);
    for rest in [0, 4] {
        thread::sleep(Duration::from_secs(rest));
        let copy = disk_of(&folder, "snap");
        let mut after = HERE.run(restore(&folder, "snap").disk(copy)).shell();
        let early = seconds();
        let guest: u64 = after.run("date +%s").output.parse().expect("a number");
        assert!((early - 1..=seconds() + 1).contains(&guest), "{guest} at {early}");
        assert!(uptime(&mut after) > was);
        after.run("cat /tmp/note").expect("kept");
        after.run("sleep 1; echo woken").expect("woken");
        after
            .run("dmesg | grep -ciE 'clocksource.*unstable|lockup|stall' || true")
            .expect("0");
    }
}

#[test]
fn a_restored_vm_reboots_into_the_kernel_it_had() {
    let folder = Folder::new();
    saved(&folder, &["--stop"]).end().expect_code(0);
    let copy = disk_of(&folder, "snap");
    let mut vm = HERE.run(restore(&folder, "snap").disk(copy)).shell();
    vm.run("cat /tmp/note").expect("kept");
    vm.send("reboot -f\n");
    vm.process().prompt();
    let mut vm = vm.again();
    vm.run("ls /tmp").expect("");
    vm.send("poweroff -f\n");
    vm.end().expect_code(0);
}

#[test]
fn a_restored_vm_can_be_saved_again() {
    let folder = Folder::new();
    saved(&folder, &["--stop"]).end().expect_code(0);
    let copy = disk_of(&folder, "snap");
    let vm = HERE.run(controlled(&folder, restore(&folder, "snap").disk(copy)));
    let mut vm = vm.shell();
    vm.run("echo again >> /tmp/note").expect("");
    HERE.save(&folder, "later", &["--stop"]);
    vm.end().expect_code(0);
    let copy = disk_of(&folder, "later");
    let mut vm = HERE.run(restore(&folder, "later").disk(copy)).shell();
    vm.run("cat /tmp/note").expect("kept\nagain");
}

// ---- what interrupts a save

/// A spinning VM with a disk that takes a while to save, and a client that saves it and is in the middle.
fn in_the_middle(folder: &Folder) -> (Process, Process) {
    let disk = folder.file("disk.raw", &vec![0x5a; 192 << 20]);
    let vm = HERE.run(spin(folder).disk(disk));
    let mut vm = vm;
    vm.expect("spinning");
    let arguments = ["snapshot", "save", &path(folder, "socket"), &path(folder, "snap")];
    let client = Launch::command(arguments).start();
    let partial = folder.path().join(".snap.partial");
    while !partial.join("disk0.raw").exists() {
        thread::sleep(Duration::from_millis(1));
    }
    (vm, client)
}

/// A bare program that does nothing but that.
fn spin(folder: &Folder) -> Launch {
    let launch = Launch::run()
        .folder(folder.path())
        .kernel(bare_program("spin"))
        .memory("64M");
    controlled(folder, launch)
}

#[test]
fn a_kill_during_a_save_leaves_no_snapshot_and_what_it_left_goes_with_the_next() {
    let folder = Folder::new();
    let (mut vm, client) = in_the_middle(&folder);
    vm.signal(libc::SIGKILL);
    assert_eq!(vm.end().signal, Some(libc::SIGKILL));
    let ended = client.end();
    ended.expect_code(125);
    assert!(ended.errors.contains("has gone"), "{}", ended.errors);
    assert_eq!(folder.names(), [".snap.partial", "disk.raw", "socket"]);
    // The socket of the dead is taken over, too.
    let mut vm = HERE.run(spin(&folder).disk(folder.path().join("disk.raw")));
    vm.expect("spinning");
    HERE.save(&folder, "snap", &["--stop"]);
    vm.end().expect_code(0);
    assert_eq!(folder.names(), ["disk.raw", "snap"]);
}

#[test]
fn a_client_that_is_interrupted_leaves_no_snapshot_and_the_vm_running() {
    let folder = Folder::new();
    let (mut vm, mut client) = in_the_middle(&folder);
    client.signal(libc::SIGINT);
    assert_eq!(client.end().signal, Some(libc::SIGINT));
    while folder.path().join(".snap.partial").exists() {
        thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(folder.names(), ["disk.raw", "socket"]);
    let status = HERE.command(&["status", &path(&folder, "socket")]);
    assert!(status.expect_code(0).output.starts_with("state    running"));
    vm.signal(libc::SIGTERM);
    vm.end().expect_code(128 + libc::SIGTERM);
    assert_eq!(folder.names(), ["disk.raw"]);
}

#[test]
fn a_vm_that_ends_during_a_save_leaves_no_snapshot() {
    let folder = Folder::new();
    let (mut vm, client) = in_the_middle(&folder);
    vm.signal(libc::SIGTERM);
    vm.end().expect_code(128 + libc::SIGTERM);
    client.end().expect_code(125);
    assert_eq!(folder.names(), ["disk.raw"]);
}

// ---- the other commands

#[test]
fn a_vm_pauses_and_resumes() {
    let folder = Folder::new();
    let socket = path(&folder, "socket");
    let mut vm = HERE.run(spin(&folder));
    vm.expect("spinning");
    let state = || {
        HERE.command(&["status", "--json", &socket])
            .expect_code(0)
            .output
            .clone()
    };
    for (command, condition) in [("pause", "paused"), ("resume", "running")] {
        HERE.command(&[command, &socket]).expect_code(0);
        assert!(
            state().contains(&format!("\"condition\": \"{condition}\"")),
            "{}",
            state()
        );
    }
    let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&socket).expect("it is there").permissions());
    assert_eq!(mode & 0o777, 0o600);
}

/// Waits until the VM at the socket is in this condition.
fn reaches(folder: &Folder, condition: &str) {
    let wanted = format!("state    {condition}\n");
    loop {
        let status = HERE.command(&["status", &path(folder, "socket")]);
        if status.output.starts_with(&wanted) {
            return;
        }
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_vm_that_begins_paused_runs_when_it_is_told_to() {
    let folder = Folder::new();
    let socket = path(&folder, "socket");
    let told = |vm: &mut Process| {
        reaches(&folder, "paused");
        HERE.command(&["resume", &socket]).expect_code(0);
        reaches(&folder, "running");
        vm.signal(libc::SIGTERM);
    };
    let mut vm = HERE.run(spin(&folder).arg("--start").arg("paused"));
    reaches(&folder, "paused");
    HERE.save(&folder, "snap", &["--stop"]);
    let ended = vm.end();
    ended.expect_code(0);
    assert_eq!(ended.output, "", "it has not run");
    assert!(
        ended
            .errors
            .contains(&format!("paused; posada resume {socket} lets it run")),
        "{}",
        ended.errors
    );

    // The snapshot is of its first instruction, and of a paused VM.
    let again = || restore(&folder, "snap");
    refused(&folder, &again(), &["paused", "--control", "--start running"]);
    refused(
        &folder,
        &again().arg("--start").arg("paused"),
        &["--start paused", "--control"],
    );
    vm = HERE.run(controlled(&folder, again()));
    told(&mut vm);
    let ended = vm.end();
    ended.expect_code(128 + libc::SIGTERM);
    assert!(ended.errors.contains("posada resume"), "{}", ended.errors);
    vm = HERE.run(again().arg("--start").arg("running"));
    vm.expect("spinning").signal(libc::SIGTERM);
    vm.end().expect_code(128 + libc::SIGTERM);
}

// ---- bad input

#[track_caller]
fn refused(folder: &Folder, launch: &Launch, words: &[&str]) {
    let before = folder.names();
    let ended = launch.start().end();
    ended.expect_code(125);
    if !ended.output.is_empty() || !ended.errors.starts_with("posada: ") || ended.errors.trim_end().lines().count() != 1
    {
        ended.fail("wanted one sentence on standard error");
    }
    for word in words {
        if !ended.errors.contains(word) {
            ended.fail(&format!("wanted {word:?} in the sentence"));
        }
    }
    assert_eq!(folder.names(), before, "something was left behind");
}

#[test]
fn what_cannot_be_saved_is_told() {
    let folder = Folder::new();
    let save = |socket: &str, place: &str| {
        Launch::command(["snapshot", "save", &path(&folder, socket), place]).folder(folder.path())
    };
    refused(&folder, &save("socket", "snap"), &["no VM answers", "--control"]);
    let mut vm = HERE.run(spin(&folder));
    vm.expect("spinning");
    folder.file("thesis", b"precious");
    refused(&folder, &save("socket", "thesis"), &["thesis", "--force"]);
    refused(
        &folder,
        &save("socket", "thesis").arg("--force"),
        &["thesis", "not a snapshot"],
    );
    refused(&folder, &save("socket", "no/where"), &["no/where"]);
    refused(&folder, &save("thesis", "snap"), &["no VM answers"]);
    refused(&folder, &spin(&folder), &["control socket", "another VM has it"]);
}

#[test]
fn what_cannot_be_restored_is_told() {
    let folder = Folder::new();
    let disk = folder.file("disk.raw", &[7; 1 << 20]);
    let mut vm = HERE.run(spin(&folder).disk(&disk));
    vm.expect("spinning");
    HERE.save(&folder, "snap", &["--disks", "reference", "--stop"]);
    vm.end().expect_code(0);
    let again = || restore(&folder, "snap");
    let more = |argument: &str, value: &str| again().arg(argument).arg(value);
    refused(&folder, &more("--kernel", "vmlinuz"), &["--kernel", "--restore"]);
    refused(&folder, &more("--cmdline", "quiet"), &["--cmdline", "--restore"]);
    refused(&folder, &more("--cpus", "2"), &["1 CPUs, not 2"]);
    refused(&folder, &more("--memory", "128M"), &["64.0 MiB", "128.0 MiB"]);
    refused(&folder, &again().arg("--virtio-console"), &["--virtio-console"]);
    refused(&folder, &restore(&folder, "nothing"), &["nothing", "No such file"]);
    refused(&folder, &restore(&folder, "disk.raw"), &["disk.raw", "not a snapshot"]);
    refused(&folder, &again().disk(&disk).disk(&disk), &["1 disks"]);
    // With what fits it goes on.
    let mut vm = controlled(&folder, more("--memory", "64M").arg("--cpus").arg("1")).start();
    while !folder.path().join("socket").exists() {
        thread::sleep(Duration::from_millis(1));
    }
    HERE.command(&["status", &path(&folder, "socket")]).expect_code(0);
    vm.signal(libc::SIGTERM);
    vm.end().expect_code(128 + libc::SIGTERM);

    let file = |name: &str| folder.path().join("snap").join(name);
    let memory = fs::read(file("memory")).expect("it is there");
    let content = memory.iter().rposition(|byte| *byte != 0).expect("there is a program");
    let mut flipped = memory.clone();
    flipped[content] ^= 0x10;
    fs::write(file("memory"), &flipped).expect("it can be written");
    refused(&folder, &again(), &["damaged", "memory"]);
    fs::write(file("memory"), &memory[..memory.len() - 4096]).expect("it can be written");
    refused(&folder, &again(), &["damaged", "memory"]);
    fs::remove_file(file("memory")).expect("it is there");
    refused(&folder, &again(), &["memory is missing"]);
    fs::write(file("memory"), &memory).expect("it can be written");
    let manifest = fs::read_to_string(file("manifest.json")).expect("it is there");
    fs::write(
        file("manifest.json"),
        manifest.replace("\"format\": 1", "\"format\": 7"),
    )
    .expect("it can be written");
    refused(&folder, &again(), &["format 7"]);
    fs::write(
        file("manifest.json"),
        manifest.replace("debug_exit\": false", "debug_exit\": true"),
    )
    .expect("it can be written");
    refused(&folder, &again(), &["manifest.json"]);
    fs::write(file("manifest.json"), manifest).expect("it can be written");
    fs::write(&disk, vec![8; 1 << 20]).expect("it can be written");
    refused(&folder, &again(), &["disk.raw", "has changed"]);
}
