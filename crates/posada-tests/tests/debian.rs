//! Stock Debian guests: they boot, compute what the host computes, keep what they have written, and end as they are told.

use posada_tests::{Folder, Launch, Process, Shell, debian, image, root_disk, small_linux};
use std::path::Path;
use std::process::Command;

/// Log lines that a kernel writes when something is wrong with its processors.
const ALARMS: &str = "Oops|BUG:|Call Trace|soft lockup|hard LOCKUP|hung_task|rcu.*stall|unhandled|nobody cared|MCE";

fn at_prompt(launch: &Launch) -> Shell {
    let mut vm = launch.start();
    vm.prompt();
    vm.shell()
}

fn power_off(mut shell: Shell) {
    shell.send("systemctl poweroff\n");
    shell.end().expect_code(0);
}

/// Runs a script of the repository on the host.
fn on_the_host(script: &str, arguments: &[&str]) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(script);
    let output = Command::new("bash")
        .arg(path)
        .args(arguments)
        .output()
        .expect("bash runs");
    assert!(output.status.success(), "{script} fails on the host");
    String::from_utf8(output.stdout).expect("text").trim().to_string()
}

/// As a guest's terminal has line ends.
fn lines(text: &str) -> Vec<&str> {
    text.lines().map(str::trim_end).collect()
}

#[test]
fn debian_boots_with_1_2_and_4_processors() {
    for cpus in [1, 2, 4] {
        let folder = Folder::new();
        let mut shell = at_prompt(&debian(&root_disk(&folder)).cpus(cpus));
        shell.run("nproc").expect(&cpus.to_string());
        shell.run(&format!("dmesg | grep -E '{ALARMS}' || true")).expect("");
        shell
            .run("systemctl is-system-running --wait || systemctl --failed --plain --no-legend")
            .contains("running");
        power_off(shell);
    }
}

#[test]
fn programs_of_the_distribution_compute_what_they_compute_on_the_host() {
    let folder = Folder::new();
    let mut shell = at_prompt(&debian(&root_disk(&folder)).cpus(2));
    let guest = shell.run("selfcheck");
    guest.success();
    assert_eq!(lines(&guest.output), lines(&on_the_host("guest/image/selfcheck", &[])));
    power_off(shell);
}

#[test]
fn a_32_bit_program_runs() {
    let program = "guest/programs/sums32.c";
    let folder = Folder::new();
    let binary = folder.path().join("sums32");
    let built = Command::new("make")
        .args(["-s", "-C"])
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../guest/programs"))
        .arg(format!("OUT={}", folder.path().display()))
        .status();
    assert!(built.is_ok_and(|status| status.success()), "{program} does not build");
    let host = Command::new(&binary).output().expect("the host runs 32-bit programs");
    let mut shell = at_prompt(&small_linux());
    let guest = shell.run("sums32");
    guest.success();
    let host = String::from_utf8(host.stdout).expect("text");
    assert_eq!(lines(&guest.output), lines(host.trim()));
    shell.send("poweroff -f\n");
    shell.end().expect_code(0);
}

#[test]
fn what_is_written_survives_a_reboot_and_a_kill() {
    let folder = Folder::new();
    let disk = root_disk(&folder);
    let mut shell = at_prompt(&debian(&disk).cpus(2));
    shell.run("echo kept over a reboot > /root/note; sync").expect("");
    shell.send("systemctl reboot\n");
    shell.process().prompt();
    let mut shell = shell.again();
    shell.run("cat /root/note").expect("kept over a reboot");
    shell.run("echo kept over a kill > /root/note; sync").expect("");
    shell.process().signal(libc::SIGKILL);
    assert_eq!(shell.end().signal, Some(libc::SIGKILL));
    // The lock went with the process.
    let mut shell = at_prompt(&debian(&disk));
    shell.run("cat /root/note").expect("kept over a kill");
    power_off(shell);
}

#[test]
fn a_read_only_disk_refuses_writes() {
    let data = format!("{},ro", image("data.raw").display());
    let mut shell = at_prompt(&small_linux().disk(data));
    shell.run("cat /sys/block/vda/ro").expect("1");
    let refused = shell.run("dd if=/dev/zero of=/dev/vda bs=512 count=1");
    assert_ne!(refused.status, 0, "{}", refused.output);
    shell.send("poweroff -f\n");
    shell.end().expect_code(0);
}

#[test]
fn floods_of_timers_and_wake_ups_lose_none() {
    let folder = Folder::new();
    let mut shell = at_prompt(&debian(&root_disk(&folder)).cpus(4));
    let program = include_str!("../guest/wakeups.py");
    shell
        .run(&format!("cat > /tmp/wakeups.py <<'END'\n{program}\nEND"))
        .expect("");
    shell.run("python3 /tmp/wakeups.py").contains("all parts done");
    shell.run(&format!("dmesg | grep -E '{ALARMS}' || true")).expect("");
    power_off(shell);
}

#[test]
fn two_vms_do_not_share_a_disk() {
    let folder = Folder::new();
    let disk = root_disk(&folder);
    let mut first: Process = small_linux().disk(&disk).start();
    first.prompt();
    let second = small_linux().disk(&disk).start().end();
    second.expect_code(125);
    first.send("poweroff -f\n");
    first.end().expect_code(0);
}
