//! The agent as an ordinary process of this machine, at a Unix socket instead of a vsock.

use posada_protocol::{Client, Error, Event, Exec, Failure, Hello, Size, Status, WINDOW, write_message};
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const SOON: Duration = Duration::from_secs(60);
const MOST: usize = 16 << 20;

struct Agent {
    process: Child,
    folder: PathBuf,
}

impl Agent {
    fn start() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("posada-agent-{}-{number}", std::process::id()));
        std::fs::create_dir(&folder).unwrap();
        let process = Command::new(env!("CARGO_BIN_EXE_posada-agent"))
            .arg("--unix")
            .arg(folder.join("socket"))
            .spawn()
            .unwrap();
        Self { process, folder }
    }

    fn stream(&self) -> UnixStream {
        let begin = Instant::now();
        loop {
            match UnixStream::connect(self.folder.join("socket")) {
                Ok(stream) => return stream,
                Err(error) => assert!(begin.elapsed() < SOON, "{error}"),
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    fn client(&self) -> Client {
        Client::over(self.stream(), SOON).unwrap()
    }

    /// Runs a shell's command line.
    fn shell(&self, line: &str) -> String {
        let finished = self.client().run(&sh(line), &[], MOST).unwrap();
        assert_eq!(
            (finished.status, finished.errors),
            (Status::Exited(0), vec![]),
            "{line}"
        );
        String::from_utf8(finished.output).unwrap()
    }

    fn refuses(&self, exec: &Exec, wanted: Failure) {
        match self.client().run(exec, &[], MOST) {
            Err(Error::Failed { why, message }) => assert_eq!(why, wanted, "{message}"),
            other => panic!("{other:?}"),
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn sh(line: &str) -> Exec {
    Exec {
        command: ["/bin/sh", "-c", line].map(String::from).to_vec(),
        user: Some(me()),
        ..Exec::default()
    }
}

/// The user that the tests run as.
fn me() -> String {
    let output = Command::new("id").arg("-u").output().unwrap().stdout;
    String::from_utf8(output).unwrap().trim().into()
}

#[test]
fn a_program_gets_its_arguments_environment_and_directory() {
    let agent = Agent::start();
    let exec = Exec {
        command: [
            "sh",
            "-c",
            "echo \"$0|$1|$A|$HOME|$PWD\"; echo err >&2; exit 7",
            "a b",
            "c*",
        ]
        .map(String::from)
        .to_vec(),
        environment: vec![("A".into(), "x=y".into())],
        directory: Some("/usr".into()),
        user: Some(me()),
        ..Exec::default()
    };
    let finished = agent.client().run(&exec, &[], MOST).unwrap();
    let home = agent.shell("echo $HOME");
    assert_eq!(finished.status, Status::Exited(7));
    assert_eq!(
        String::from_utf8(finished.output).unwrap(),
        format!("a b|c*|x=y|{}|/usr\n", home.trim())
    );
    assert_eq!(finished.errors, b"err\n");
    assert_eq!(agent.shell("wc -c"), "0\n", "no input");
}

#[test]
fn what_cannot_be_run_is_refused_with_its_reason() {
    let agent = Agent::start();
    let exec = |program: &str| Exec {
        command: vec![program.into()],
        user: Some(me()),
        ..Exec::default()
    };
    agent.refuses(&exec("no-such-program"), Failure::NotFound);
    agent.refuses(&exec("/etc/passwd"), Failure::NotPermitted);
    agent.refuses(&Exec::default(), Failure::Invalid);
    let there = exec("true");
    let nobody = Exec {
        user: Some("no-such-user".into()),
        ..there.clone()
    };
    agent.refuses(&nobody, Failure::NotFound);
    let nowhere = Exec {
        directory: Some("/no/such".into()),
        ..there.clone()
    };
    agent.refuses(&nowhere, Failure::Invalid);
    let environment = Exec {
        environment: vec![("A=B".into(), "C".into())],
        ..there
    };
    agent.refuses(&environment, Failure::Invalid);
}

#[test]
fn another_user_has_his_own_rights() {
    if me() != "0" {
        eprintln!("SKIPPED: only root can become somebody else");
        return;
    }
    let agent = Agent::start();
    let exec = Exec {
        user: Some("nobody".into()),
        ..sh("id -u; id -G; echo $USER; cat /etc/shadow 2>/dev/null || echo closed")
    };
    let finished = agent.client().run(&exec, &[], MOST).unwrap();
    assert_eq!(
        String::from_utf8(finished.output).unwrap(),
        "65534\n65534\nnobody\nclosed\n"
    );
}

#[test]
fn megabytes_go_through_a_program_both_ways() {
    let agent = Agent::start();
    let bytes: Vec<u8> = (0..5_000_000_u32).map(|at| (at / 7) as u8).collect();
    let finished = agent.client().run(&sh("cat"), &bytes, MOST).unwrap();
    assert!(finished.output == bytes);
    // One that reads nothing ends all the same.
    let finished = agent.client().run(&sh("exec <&-; echo done"), &bytes, MOST).unwrap();
    assert_eq!(
        (finished.status, &finished.output[..]),
        (Status::Exited(0), &b"done\n"[..])
    );
    // One that closes its outputs too.
    let finished = agent
        .client()
        .run(&sh("exec >&- 2>&-; cat >/dev/null"), &bytes, MOST)
        .unwrap();
    assert_eq!(finished.status, Status::Exited(0));
}

#[test]
fn an_end_is_told_although_others_keep_the_pipes() {
    let agent = Agent::start();
    let begin = Instant::now();
    assert_eq!(agent.shell("sleep 70 & echo last"), "last\n");
    // It ends when nobody reads any more.
    let (_, mut output) = agent.client().exec(&sh("yes & sleep 0.1")).unwrap();
    while !matches!(output.next_event().unwrap(), Event::Ended(Status::Exited(0))) {}
    assert!(begin.elapsed() < SOON);
}

#[test]
fn signals_reach_the_programs_group() {
    let agent = Agent::start();
    let (input, mut output) = agent.client().exec(&sh("echo up; sleep 300; echo never")).unwrap();
    assert_eq!(output.next_event().unwrap(), Event::Output(b"up\n".to_vec()));
    input.signal(15).unwrap();
    assert_eq!(output.next_event().unwrap(), Event::Ended(Status::Killed(15)));
    // What the shell says of its `sleep`'s end does not matter.
    let line = "exec 2>/dev/null; trap 'echo caught; exit 3' USR1; echo up; while :; do sleep 0.05; done";
    let (input, mut output) = agent.client().exec(&sh(line)).unwrap();
    assert_eq!(output.next_event().unwrap(), Event::Output(b"up\n".to_vec()));
    input.signal(10).unwrap();
    assert_eq!(output.next_event().unwrap(), Event::Output(b"caught\n".to_vec()));
    assert_eq!(output.next_event().unwrap(), Event::Ended(Status::Exited(3)));
}

/// Output until it contains `text`.
fn until(output: &mut posada_protocol::Output, text: &str) -> String {
    let mut all = String::new();
    while !all.contains(text) {
        match output.next_event().unwrap() {
            Event::Output(bytes) => all += &String::from_utf8(bytes).unwrap(),
            other => panic!("{other:?} behind {all:?}"),
        }
    }
    all
}

#[test]
fn a_terminal_has_a_size_echoes_and_sends_signals() {
    let agent = Agent::start();
    let exec = Exec {
        terminal: Some(Size { columns: 91, rows: 33 }),
        input: true,
        ..sh("tty; stty size; trap 'stty size; exit 5' WINCH; cat; while :; do sleep 0.05; done")
    };
    let (input, mut output) = agent.client().exec(&exec).unwrap();
    assert!(until(&mut output, "33 91\r\n").contains("/dev/pts/"));
    input.write(b"typed\n").unwrap();
    until(&mut output, "typed\r\ntyped\r\n");
    // Ctrl-D ends `cat`.
    input.write(b"\x04").unwrap();
    input.resize(Size { columns: 50, rows: 20 }).unwrap();
    until(&mut output, "20 50\r\n");
    assert_eq!(output.next_event().unwrap(), Event::Ended(Status::Exited(5)));

    // Ctrl-C goes to what runs on it.
    let exec = Exec {
        terminal: Some(Size { columns: 80, rows: 24 }),
        input: true,
        ..sh("echo up; exec sleep 300")
    };
    let (input, mut output) = agent.client().exec(&exec).unwrap();
    until(&mut output, "up\r\n");
    input.write(b"\x03").unwrap();
    until(&mut output, "^C");
    assert_eq!(output.next_event().unwrap(), Event::Ended(Status::Killed(2)));
}

#[test]
fn a_program_ends_when_its_host_goes() {
    let agent = Agent::start();
    for terminal in [None, Some(Size { columns: 80, rows: 24 })] {
        let exec = Exec {
            terminal,
            ..sh("echo $$; exec sleep 300")
        };
        let (_, mut output) = agent.client().exec(&exec).unwrap();
        let Event::Output(line) = output.next_event().unwrap() else {
            panic!("no output");
        };
        let pid = String::from_utf8(line).unwrap().trim().to_string();
        assert_eq!(pid, output.pid().to_string());
        drop(output);
        let begin = Instant::now();
        while PathBuf::from(format!("/proc/{pid}")).exists() {
            assert!(begin.elapsed() < SOON, "it runs on, or nobody has waited for it");
            thread::sleep(Duration::from_millis(10));
        }
    }
}

#[test]
fn a_host_that_breaks_the_rules_loses_only_its_connection() {
    let agent = Agent::start();
    let ends = |mut stream: UnixStream| {
        stream.set_read_timeout(Some(SOON)).unwrap();
        let _ = stream.read_to_end(&mut Vec::new());
    };
    let mut stream = agent.stream();
    std::io::Write::write_all(&mut stream, &[255; 100]).unwrap();
    ends(stream);
    let mut stream = agent.stream();
    let future = Hello {
        newest: 9,
        oldest: 9,
        ..Hello::ours()
    };
    write_message(&mut stream, &future).unwrap();
    ends(stream);
    let error = {
        let mut stream = agent.stream();
        write_message(&mut stream, &Hello::ours()).unwrap();
        posada_protocol::read_frame(&mut stream).unwrap();
        write_message(&mut stream, &serde_json::json!({"request": "fly"})).unwrap();
        let answer = posada_protocol::read_frame(&mut stream).unwrap().unwrap();
        format!("{:?}", answer.message::<posada_protocol::Answer>().unwrap())
    };
    assert!(error.contains("Invalid") && error.contains("fly"), "{error}");
    // More input than the window.
    let exec = Exec {
        input: true,
        ..sh("sleep 300")
    };
    let mut stream = agent.stream();
    write_message(&mut stream, &Hello::ours()).unwrap();
    write_message(&mut stream, &posada_protocol::Request::Exec(exec)).unwrap();
    for _ in 0..5 {
        let _ = posada_protocol::write_data(&mut stream, posada_protocol::Channel::Input, &[0; WINDOW]);
    }
    ends(stream);
    assert_eq!(agent.shell("echo fine"), "fine\n");
}
