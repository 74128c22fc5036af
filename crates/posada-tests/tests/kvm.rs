//! The KVM engine's own tests, where KVM is whole: in the test host.

use posada_tests::TestHost;
use serde_json::Value;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(300);

/// Builds the tests that run guests, and tells where they are.
fn programs() -> Vec<PathBuf> {
    let output = Command::new(env!("CARGO"))
        .args([
            "test",
            "-p",
            "posada-kvm",
            "--test",
            "*",
            "--no-run",
            "--message-format=json",
        ])
        .stderr(Stdio::inherit())
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "the tests cannot be built");
    let messages = output.stdout.split(|byte| *byte == b'\n');
    messages
        .filter_map(|line| serde_json::from_slice::<Value>(line).ok())
        .filter_map(|message| message["executable"].as_str().map(PathBuf::from))
        .collect()
}

#[test]
fn on_kvm_the_engines_own_tests_pass() {
    let Some(host) = TestHost::start() else { return };
    let programs = programs();
    assert!(programs.len() >= 2, "{programs:?}");
    for program in &programs {
        host.put(program, "/tmp");
        let inside = PathBuf::from("/tmp").join(program.file_name().unwrap());
        let mut command = Command::new(inside);
        command.current_dir("/tmp").env("POSADA_WHOLE_KVM", "1");
        // QEMU's CPU does not arm the debug registers that it loads with a guest's state.
        command.args(["--test-threads=1", "--skip", "a_debugger_has_four_break_points"]);
        let ended = host.start_command(&command, PATIENCE).end();
        ended.expect_code(0);
        println!("{}", ended.output);
    }
}
