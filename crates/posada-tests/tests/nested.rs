//! The test host, and Linux on its KVM.

use posada_tests::{Folder, Launch, PROMPT, Shell, TestHost, debian, image};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// Debian's disks in the test host.
const ROOT: &str = "/dev/vdb";
const DATA: &str = "/dev/vdc,ro";
/// Words that the kernel says when something is wrong.
const TROUBLE: &str = "Oops|BUG:|WARNING:|Call Trace|lockup|stall|blocked for more than|segfault|traps:|I/O error|\
    EXT4-fs error|nobody cared|unexpected IRQ|did not come online";

#[test]
fn on_kvm_a_test_host_runs_commands_and_keeps_what_it_is_given() {
    let Some(host) = TestHost::start() else { return };
    host.run("cat /sys/devices/system/clocksource/clocksource0/current_clocksource")
        .expect("tsc");
    assert_eq!(host.run("exit_with() { return $1; }; exit_with 7").status, 7);

    let folder = Folder::new();
    folder.file("text", b"some text\n");
    let sparse = folder.sparse("sparse", 1 << 30);
    host.put(folder.path(), "/tmp");
    let inside = format!("/tmp/{}", folder.path().file_name().unwrap().to_str().unwrap());
    host.run(&format!(
        "cd {inside} && cat text && stat -c %s sparse && du -k sparse | cut -f1; cd /"
    ))
    .expect("some text\n1073741824\n0");
    host.run(&format!("tr a-z A-Z <{inside}/text >{inside}/capitals"))
        .expect("");
    let back = Folder::new();
    host.get(&inside, back.path());
    let back = back.path().join(folder.path().file_name().unwrap());
    assert_eq!(fs::read(back.join("capitals")).unwrap(), b"SOME TEXT\n");
    assert_eq!(
        fs::metadata(back.join("sparse")).unwrap().len(),
        fs::metadata(&sparse).unwrap().len()
    );

    // More often than there are places for it.
    for number in 0..6 {
        let mut command = Command::new("sh");
        command.args([
            "-c",
            "echo ready; read word; echo got $word; echo oops >&2; exit $0",
            &number.to_string(),
        ]);
        let mut process = host.start_command(&command, Duration::from_secs(60));
        process.expect("ready\n").send("it\n").expect("got it\n");
        let ended = process.end();
        assert_eq!(ended.expect_code(number).errors, "oops\n");
        assert_eq!(ended.output, "ready\ngot it\n");
    }
    for signal in [libc::SIGINT, libc::SIGTERM] {
        let mut process = host.start_command(Command::new("sleep").arg("1000"), Duration::from_secs(60));
        process.signal(signal);
        process.end().expect_code(128 + signal);
    }
    // What is dropped does not run on.
    drop(host.start_command(Command::new("sleep").arg("12345"), Duration::from_secs(60)));
    host.run("ps | grep 1234[5] || true").expect("");
}

fn shell(host: &TestHost, launch: &Launch) -> Shell {
    let mut vm = launch.clone().accel("kvm").start_in(host);
    vm.prompt();
    vm.shell()
}

fn output(shell: &mut Shell, command: &str) -> String {
    shell.run(command).success().output.clone()
}

/// The first word of a command's output.
fn word(text: &str) -> &str {
    text.split_whitespace().next().unwrap_or_default()
}

/// Checks what the kernel has said since its start.
#[track_caller]
fn kernel_is_well(shell: &mut Shell) {
    shell.run("dmesg --level=emerg,alert,crit,err").expect("");
    // QEMU's CPU has another XSAVE layout than any real one, of which Linux warns in every guest there.
    let known = "/WARNING: .*fpu__init_system_xstate/,/---\\[ end trace/d";
    shell
        .run(&format!("dmesg | sed '{known}' | grep -E '{TROUBLE}' || true"))
        .expect("");
}

/// SHA-256 of a file of this machine, by its own `sha256sum`.
fn sum_here(path: &Path) -> String {
    let output = Command::new("sha256sum")
        .arg(path)
        .output()
        .expect("coreutils are there");
    assert!(output.status.success(), "cannot read {}", path.display());
    word(&String::from_utf8_lossy(&output.stdout)).to_string()
}

/// Debian starts, reads what is on its disks, keeps what it writes over a reboot, and powers off.
fn debian_lives(cpus: u32) {
    let Some(host) = TestHost::start() else { return };
    let mut first = shell(&host, &debian(Path::new(ROOT)).disk(DATA).cpus(cpus));
    first.run("nproc").expect(&cpus.to_string());
    first.run("systemd-detect-virt --vm").expect("kvm");
    first
        .run("systemctl is-system-running --wait || systemctl --failed --plain")
        .expect("running");
    // Past the guest's page cache, and once more from it.
    for _ in 0..2 {
        let sum = output(
            &mut first,
            "mount -o ro,noload /dev/vdb /mnt && sha256sum /mnt/data.txt; umount /mnt",
        );
        assert_eq!(word(&sum), sum_here(&image("data.txt")));
    }
    let whole = output(&mut first, "dd if=/dev/vdb iflag=direct bs=64k status=none | sha256sum");
    assert_eq!(word(&whole), sum_here(&image("data.raw")));
    let refused = first.run("dd if=/dev/zero of=/dev/vdb bs=4096 count=1 conv=fsync status=none");
    assert_ne!(refused.status, 0, "{}", refused.output);
    let (seed, boot) = ("seq 300000 | sha512sum", "cat /proc/sys/kernel/random/boot_id");
    let before = output(&mut first, boot);
    let written = output(
        &mut first,
        "seq 300000 >/root/note && dd if=/root/note of=/root/direct bs=4k oflag=direct status=none && sync && \
         sha512sum </root/direct",
    );
    assert_eq!(written, output(&mut first, seed));
    kernel_is_well(&mut first);

    // The same process starts the guest again.
    first.send("systemctl reboot\n").process().prompt();
    let mut second = first.again();
    assert_ne!(output(&mut second, boot), before);
    second.run("nproc").expect(&cpus.to_string());
    second.run("sha512sum </root/note").expect(&written);
    second.run("sha512sum </root/direct").expect(&written);
    kernel_is_well(&mut second);
    second.send("systemctl poweroff\n");
    let ended = second.end();
    ended.expect_code(0);
    if !ended.errors.is_empty() {
        ended.fail("wanted nothing on standard error");
    }
    assert_eq!(ended.output.matches(PROMPT).count(), 2, "{}", ended.output);
    // The test host reads what the guest has left.
    let left = host.run(&format!(
        "mount -o ro {ROOT} /mnt && sha512sum </mnt/root/note; umount /mnt"
    ));
    left.expect(&written);
}

#[test]
fn on_kvm_debian_lives_with_one_cpu() {
    debian_lives(1);
}

#[test]
fn on_kvm_debian_lives_with_two_cpus() {
    debian_lives(2);
}

/// Sleeps by three kinds of timers and prints for each the least and the middle time that one took, in microseconds.
const SLEEPS: &str = r#"
import ctypes, os, select, signal, struct, time
libc = ctypes.CDLL(None, use_errno=True)
PERIOD = 0.005
def sleep():
    time.sleep(PERIOD)
def timerfd():
    fd = libc.timerfd_create(time.CLOCK_MONOTONIC, 0)
    nanoseconds = int(PERIOD * 1e9)
    assert fd >= 0 and libc.timerfd_settime(fd, 0, struct.pack("4q", 0, 0, 0, nanoseconds), None) == 0
    assert struct.unpack("Q", os.read(fd, 8)) == (1,)
    os.close(fd)
def poll():
    select.select([], [], [], PERIOD)
for way in sleep, timerfd, poll:
    times = []
    for _ in range(100):
        begin = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        way()
        times.append((time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW) - begin) // 1000)
    times.sort()
    print(way.__name__, times[0], times[50])
"#;

#[test]
fn on_kvm_time_passes_as_on_the_host() {
    let Some(host) = TestHost::start() else { return };
    let mut shell = shell(&host, &debian(Path::new(ROOT)).cpus(2));
    let source = output(
        &mut shell,
        "cat /sys/devices/system/clocksource/clocksource0/current_clocksource",
    );
    assert!(
        ["kvm-clock", "tsc"].contains(&source.as_str()),
        "the guest keeps time by {source}"
    );

    // The wall clock is the host's; both answers come within the second that a busy machine may need.
    let now = |text: &str| text.parse::<f64>().expect("a number of seconds");
    let (guest, outer) = (
        output(&mut shell, "date +%s.%N"),
        host.run("date +%s").success().output.clone(),
    );
    assert!(
        (now(&guest) - now(&outer)).abs() < 3.0,
        "it is {guest} in the guest and {outer} outside"
    );

    // Time is measured on both sides of a wait in the guest.
    let begin = Instant::now();
    let uptime = |shell: &mut Shell| now(word(&output(shell, "cat /proc/uptime")));
    let first = uptime(&mut shell);
    let between = Instant::now();
    shell.run("sleep 10").expect("");
    let waited = between.elapsed().as_secs_f64();
    let passed = uptime(&mut shell) - first;
    let whole = begin.elapsed().as_secs_f64();
    assert!(waited >= 9.95, "ten seconds in the guest are {waited}");
    // /proc/uptime has hundredths of a second.
    assert!(
        passed >= 9.95 && passed >= waited - 0.1 && passed <= whole + 0.1,
        "{passed} s have passed in the guest, {waited} to {whole} outside"
    );

    let answer = output(&mut shell, &format!("python3 - <<'END'\n{SLEEPS}\nEND"));
    assert_eq!(answer.lines().count(), 3, "{answer}");
    for line in answer.lines() {
        let figures: Vec<f64> = line.split(' ').skip(1).map(now).collect();
        // MONOTONIC may run a little faster than RAW. The emulated CPUs below need some milliseconds to wake up.
        assert!(figures[0] >= 4900.0, "too short: {line}");
        assert!(figures[1] < 30_000.0, "far too long: {line}");
    }
    // No interrupt of a timer was lost on either CPU while they were pinned to it.
    shell
        .run("for cpu in 0 1; do taskset -c $cpu sleep 0.5 || exit 1; done")
        .expect("");
    kernel_is_well(&mut shell);
    shell.send("systemctl poweroff\n");
    shell.end().expect_code(0);
}
