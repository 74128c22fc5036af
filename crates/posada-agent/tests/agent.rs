//! The agent as an ordinary process of this machine, at a Unix socket instead of a vsock.

use posada_protocol::{Client, Ending, Error, Event, Exec, Failure, Hello, Size, Status, WINDOW, write_message};
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
        let root = folder.join("root");
        for below in ["etc", "home/ann", "sbin", "sys/devices/system/cpu"] {
            std::fs::create_dir_all(root.join(below)).unwrap();
        }
        let ann = format!("ann:x:{0}:{0}::/home/ann:/bin/sh\n", me());
        let users = std::fs::read_to_string("/etc/passwd").unwrap();
        std::fs::write(root.join("etc/passwd"), users + &ann).unwrap();
        std::fs::copy("/etc/group", root.join("etc/group")).unwrap();
        let process = Command::new(env!("CARGO_BIN_EXE_posada-agent"))
            .arg("--unix")
            .arg(folder.join("socket"))
            .arg("--root")
            .arg(&root)
            .spawn()
            .unwrap();
        Self { process, folder }
    }

    /// A file below the agent's root.
    fn path(&self, path: &str) -> PathBuf {
        self.folder.join("root").join(path)
    }

    fn write(&self, path: &str, text: &str) {
        std::fs::write(self.path(path), text).unwrap();
    }

    fn read(&self, path: &str) -> String {
        std::fs::read_to_string(self.path(path)).unwrap()
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

/// The agent's reason.
fn failure<T: std::fmt::Debug>(result: Result<T, Error>) -> Failure {
    match result {
        Err(Error::Failed { why, .. }) => why,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_guests_own_program_ends_it() {
    let agent = Agent::start();
    assert_eq!(failure(agent.client().shut_down(Ending::PowerOff)), Failure::NotFound);
    for (name, code) in [("poweroff", 0), ("reboot", 1)] {
        let marker = agent.path(name);
        agent.write(
            &format!("sbin/{name}"),
            &format!("#!/bin/sh\n: >{}\nexit {code}\n", marker.display()),
        );
        let program = agent.path("sbin").join(name);
        std::fs::set_permissions(program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    }
    agent.client().shut_down(Ending::PowerOff).unwrap();
    assert!(agent.path("poweroff").exists() && !agent.path("reboot").exists());
    assert_eq!(failure(agent.client().shut_down(Ending::Reboot)), Failure::Other);
    assert!(agent.path("reboot").exists());
}

#[test]
fn a_host_name_is_kept_for_the_next_boot() {
    let agent = Agent::start();
    agent.client().set_hostname("web-1.example").unwrap();
    assert_eq!(agent.read("etc/hostname"), "web-1.example\n");
    for name in ["", "-a", "a b", "a\nb", &"a".repeat(65)] {
        assert_eq!(failure(agent.client().set_hostname(name)), Failure::Invalid, "{name}");
    }
    assert_eq!(
        failure(agent.client().set_time(std::time::SystemTime::now())),
        Failure::Invalid
    );
}

#[test]
fn the_first_cpus_are_brought_online() {
    let agent = Agent::start();
    let cpus = "sys/devices/system/cpu";
    agent.write(&format!("{cpus}/present"), "0-3\n");
    agent.write(&format!("{cpus}/online"), "0,3\n");
    for cpu in 1..4 {
        std::fs::create_dir(agent.path(&format!("{cpus}/cpu{cpu}"))).unwrap();
    }
    let (present, _) = agent.client().set_cpus(2).unwrap();
    assert_eq!(present, [0, 1, 2, 3]);
    let written = |cpu| std::fs::read_to_string(agent.path(&format!("{cpus}/cpu{cpu}/online"))).ok();
    assert_eq!(
        (written(1), written(2), written(3)),
        (Some("1".into()), None, Some("0".into()))
    );
    for count in [0, 5] {
        assert_eq!(failure(agent.client().set_cpus(count)), Failure::Invalid);
    }
}

#[test]
fn keys_are_added_once_and_nowhere_else() {
    let agent = Agent::start();
    let add = |user: &str, keys: &[&str]| {
        let keys: Vec<_> = keys.iter().map(|key| key.to_string()).collect();
        agent.client().authorize_keys(user, &keys)
    };
    add("ann", &["ssh-ed25519 AAAA one", "ssh-ed25519 BBBB two"]).unwrap();
    add("ann", &["ssh-ed25519 BBBB two", "ssh-ed25519 CCCC three"]).unwrap();
    let file = "home/ann/.ssh/authorized_keys";
    assert_eq!(
        agent.read(file),
        "ssh-ed25519 AAAA one\nssh-ed25519 BBBB two\nssh-ed25519 CCCC three\n"
    );
    let mode =
        |path: &str| std::os::unix::fs::PermissionsExt::mode(&agent.path(path).metadata().unwrap().permissions());
    assert_eq!((mode(file) & 0o777, mode("home/ann/.ssh") & 0o777), (0o600, 0o700));
    agent.write(file, "no end");
    add("ann", &["ssh-ed25519 AAAA one"]).unwrap();
    assert_eq!(agent.read(file), "no end\nssh-ed25519 AAAA one\n");
    assert_eq!(failure(add("ann", &["two\nlines"])), Failure::Invalid);
    assert_eq!(failure(add("no-such-user", &["x"])), Failure::NotFound);
    // What the user has put in the way is not followed.
    agent.write("precious", "as it was");
    for folder in [false, true] {
        std::fs::remove_dir_all(agent.path("home/ann/.ssh")).unwrap();
        if folder {
            std::os::unix::fs::symlink(agent.path("etc"), agent.path("home/ann/.ssh")).unwrap();
            assert!(add("ann", &["x"]).is_err());
            assert!(!agent.path("etc/authorized_keys").exists());
        } else {
            std::fs::create_dir(agent.path("home/ann/.ssh")).unwrap();
            std::os::unix::fs::symlink(agent.path("precious"), agent.path(file)).unwrap();
            assert!(add("ann", &["x"]).is_err());
            std::fs::remove_file(agent.path(file)).unwrap();
            std::fs::hard_link(agent.path("precious"), agent.path(file)).unwrap();
            assert!(add("ann", &["x"]).is_err());
            assert_eq!(agent.read("precious"), "as it was");
        }
    }
}

/// What `tar` of this machine does.
fn tar(arguments: &[&str]) {
    assert!(Command::new("tar").args(arguments).status().unwrap().success());
}

#[test]
fn a_folder_comes_back_as_it_went() {
    let agent = Agent::start();
    let (from, to, archive) = (agent.path("from/folder"), agent.path("to"), agent.path("archive"));
    let path = |path: &PathBuf| path.to_str().unwrap().to_string();
    std::fs::create_dir_all(from.join("empty")).unwrap();
    std::fs::create_dir(&to).unwrap();
    let big: Vec<u8> = (0..3_000_001_u32).map(|at| (at / 11) as u8).collect();
    std::fs::write(from.join("big"), &big).unwrap();
    std::fs::write(from.join("n".repeat(150)), "long name").unwrap();
    std::fs::write(from.join("script"), "#!/bin/sh\n").unwrap();
    std::fs::set_permissions(
        from.join("script"),
        std::os::unix::fs::PermissionsExt::from_mode(0o4751),
    )
    .unwrap();
    std::os::unix::fs::symlink("/nowhere/at/all", from.join("link")).unwrap();
    let socket = std::os::unix::net::UnixListener::bind(from.join("socket")).unwrap();

    let mut bytes = Vec::new();
    agent.client().get(&path(&from), &mut bytes).unwrap();
    drop(socket);
    std::fs::write(&archive, &bytes).unwrap();
    tar(&["-C", &path(&to), "-xpf", &path(&archive)]);
    let same = |one: &PathBuf, other: &PathBuf| {
        let find = "find . ! -type s ! -type d -printf '%P %y %m %l %T@\\n' -o -type d -printf '%P %y %m .\\n' | sort; find . -type f | sort | xargs sha256sum";
        let list = |folder: &PathBuf| {
            Command::new("sh")
                .args(["-c", find])
                .current_dir(folder)
                .output()
                .unwrap()
                .stdout
        };
        let cut = |bytes: Vec<u8>| {
            // Of times tar keeps the seconds; folders get the time of their copy.
            let text = String::from_utf8(bytes).unwrap();
            let line = |line: &str| {
                line.rsplit_once('.')
                    .filter(|_| line.contains(' '))
                    .map_or(line, |(line, _)| line)
                    .to_string()
            };
            text.lines().map(line).collect::<Vec<_>>()
        };
        assert_eq!(cut(list(one)), cut(list(other)));
    };
    same(&from, &to.join("folder"));

    // And by no archive that one sees.
    let other = agent.path("other");
    std::fs::create_dir(&other).unwrap();
    agent.client().copy_out(&path(&from), &other, 1 << 30).unwrap();
    // Not the right to be somebody else.
    std::fs::set_permissions(
        other.join("folder/script"),
        std::os::unix::fs::PermissionsExt::from_mode(0o4751),
    )
    .unwrap();
    same(&from, &other.join("folder"));
    let most = agent.client().copy_out(&path(&from), &other, 1 << 20).unwrap_err();
    assert!(
        matches!(&most, Error::Local(error) if error.to_string().contains("1048576 bytes")),
        "{most}"
    );
    let in_guest = agent.path("in");
    std::fs::create_dir(&in_guest).unwrap();
    agent.client().copy_in(&from, &path(&in_guest)).unwrap();
    same(&from, &in_guest.join("folder"));

    // And back, by another program's archive.
    let again = agent.path("again");
    std::fs::create_dir(&again).unwrap();
    tar(&[
        "-C",
        &path(&agent.path("from")),
        "--exclude=socket",
        "-cf",
        &path(&archive),
        "folder",
    ]);
    let mut file = std::fs::File::open(&archive).unwrap();
    agent.client().put(&path(&again), &mut file).unwrap();
    same(&from, &again.join("folder"));
    assert_eq!(std::fs::read(again.join("folder/big")).unwrap(), big);
}

#[test]
fn archives_do_not_leave_their_directory() {
    let agent = Agent::start();
    let to = agent.path("to");
    std::fs::create_dir(&to).unwrap();
    let to = to.to_str().unwrap().to_string();
    let make = agent.path("make");
    std::fs::create_dir(&make).unwrap();
    std::fs::write(agent.path("outside"), "as it was").unwrap();
    std::fs::write(make.join("inside"), "changed").unwrap();
    let archive = agent.path("archive").to_str().unwrap().to_string();
    // ../outside, which is not unpacked.
    let make = make.to_str().unwrap().to_string();
    tar(&[
        "-C",
        &make,
        "-P",
        "--transform=s,inside,../outside,",
        "-cf",
        &archive,
        "inside",
    ]);
    let _ = agent.client().put(&to, &mut std::fs::File::open(&archive).unwrap());
    assert_eq!(agent.read("outside"), "as it was");
}

#[test]
fn what_cannot_be_copied_is_told_and_nobody_waits() {
    let agent = Agent::start();
    let missing = agent.path("missing").to_str().unwrap().to_string();
    assert_eq!(
        failure(agent.client().get(&missing, &mut Vec::new())),
        Failure::NotFound
    );
    assert_eq!(
        failure(agent.client().get("relative", &mut Vec::new())),
        Failure::Invalid
    );
    // It is refused long before the end.
    let endless = &mut std::io::repeat(7);
    assert_eq!(failure(agent.client().put(&missing, endless)), Failure::NotFound);
    let there = agent.path("etc").to_str().unwrap().to_string();
    assert!(matches!(agent.client().put(&there, endless), Err(Error::Failed { .. })));
    let nothing = agent.client().copy_in(&agent.path("missing"), &there).unwrap_err();
    assert!(matches!(nothing, Error::Local(_)), "{nothing}");
    // An archive that breaks off here is no archive there.
    let broken = &mut std::io::Read::chain(std::io::repeat(0).take(100), Broken);
    assert!(matches!(agent.client().put(&there, broken), Err(Error::Local(_))));
}

/// A file whose disk is broken.
struct Broken;

impl Read for Broken {
    fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
        Err(std::io::Error::other("broken"))
    }
}

#[test]
fn statistics_are_those_of_the_kernel() {
    let agent = Agent::start();
    std::fs::remove_dir_all(agent.path("proc")).ok();
    std::os::unix::fs::symlink("/proc", agent.path("proc")).unwrap();
    let statistics = agent.client().statistics(10_000).unwrap();
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap();
    let total = format!("{} kB", statistics.memory.total >> 10);
    assert!(meminfo.lines().next().unwrap().ends_with(&total));
    assert!(statistics.memory.available <= statistics.memory.total && statistics.uptime_ms > 0);
    assert!(!statistics.cpus.is_empty() && statistics.cpus.iter().any(|cpu| cpu.idle_ms > 0));
    let ours = statistics
        .processes
        .iter()
        .find(|process| process.pid == std::process::id());
    assert!(ours.is_some_and(|ours| ours.resident > 1 << 20 && ours.threads > 0));
    assert!(agent.client().statistics(1).unwrap().processes.len() <= 2);
}

#[test]
fn frozen_file_systems_go_on_by_word_or_by_themselves() {
    let agent = Agent::start();
    std::fs::create_dir_all(agent.path("proc/self")).unwrap();
    // None of them is on a disk.
    agent.write("proc/self/mountinfo", "22 1 0:5 / / rw - tmpfs none rw\n");
    for seconds in [0, 601] {
        assert_eq!(failure(agent.client().freeze(seconds)), Failure::Invalid);
    }
    agent.client().freeze(60).unwrap().thaw().unwrap();
    let frozen = agent.client().freeze(1).unwrap();
    thread::sleep(Duration::from_millis(1500));
    assert_eq!(failure(frozen.thaw()), Failure::Other);
    agent.write("proc/self/mountinfo", "22 1 8:2 / /no/such rw - ext4 /dev/y rw\n");
    assert_eq!(failure(agent.client().freeze(60)), Failure::NotFound);
}
