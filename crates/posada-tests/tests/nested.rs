//! The test host and what runs in it.

use posada_tests::{Folder, TestHost};
use std::fs;
use std::process::Command;
use std::time::Duration;

#[test]
fn a_test_host_runs_commands_and_keeps_what_it_is_given() {
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
