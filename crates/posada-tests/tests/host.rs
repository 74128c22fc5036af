//! The host's daemon: VMs live on without it, and nothing of them is lost or left behind.

use posada_tests::{
    Ended, Folder, PROMPT, Process, agent_program, bare_program, image, posada, root_disk, software_cpu,
};
use serde_json::Value;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(120);

/// A user with a store of their own. All that they run ends with the value.
struct User {
    folder: Folder,
}

impl User {
    fn new() -> Self {
        Self { folder: Folder::new() }
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(posada());
        command.args(words).current_dir(self.folder.path());
        for (name, folder) in [("XDG_DATA_HOME", "d"), ("XDG_RUNTIME_DIR", "r")] {
            command.env(name, self.folder.path().join(folder));
        }
        command
    }

    fn start(&self, words: &[&str]) -> Process {
        Process::start(&mut self.command(words), PATIENCE)
    }

    fn does(&self, words: &[&str]) -> Ended {
        self.start(words).end()
    }

    #[track_caller]
    fn good(&self, words: &[&str]) -> String {
        let ended = self.does(words);
        ended.expect_code(0);
        ended.output
    }

    #[track_caller]
    fn refused(&self, words: &[&str], expected: &[&str]) {
        let ended = self.does(words);
        ended.expect_code(125);
        for word in expected {
            if !ended.errors.contains(word) {
                ended.fail(&format!("wanted {word:?} in the sentence"));
            }
        }
    }

    /// Makes or runs a VM of a bare program, which hears nobody.
    #[track_caller]
    fn bare(&self, what: &[&str], name: &str, program: &str, more: &[&str]) -> String {
        let kernel = bare_program(program);
        let (kernel, cpu) = (kernel.to_str().expect("a plain path"), software_cpu());
        let vm = [
            "--name",
            name,
            "--no-vsock",
            "--accel",
            &cpu,
            "--memory",
            "16M",
            "--kernel",
            kernel,
        ];
        self.good(&[what, &vm, more].concat())
    }

    fn vm(&self, name: &str) -> Value {
        let all: Value = serde_json::from_str(&self.good(&["inspect", name])).expect("it is JSON");
        all[0].clone()
    }

    fn state(&self, name: &str) -> String {
        self.vm(name)["state"].as_str().expect("a state").to_string()
    }

    fn pid(&self, name: &str) -> i32 {
        self.vm(name)["pid"].as_i64().expect("it has a process") as i32
    }

    /// Waits until a VM is so.
    #[track_caller]
    fn until(&self, name: &str, good: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let vm = self.vm(name);
            if good(&vm) {
                return vm;
            }
            assert!(Instant::now() < deadline, "it stays so: {vm}");
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn store(&self) -> PathBuf {
        self.folder.path().join("d/posada")
    }

    fn daemon(&self) -> i32 {
        let text = fs::read_to_string(self.store().join("lock")).expect("there was a daemon");
        text.trim().parse().expect("a process id")
    }

    fn kill_daemon(&self) {
        let daemon = self.daemon();
        signal(daemon, libc::SIGKILL);
        gone(daemon);
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("r/posada/api.sock")
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.socket()).expect("the daemon listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        stream
    }
}

impl Drop for User {
    fn drop(&mut self) {
        let names = self.does(&["ls", "-q"]).output;
        for name in names.lines() {
            let _ = self.does(&["rm", "-f", name]);
        }
        if let Ok(text) = fs::read_to_string(self.store().join("lock"))
            && let Ok(daemon) = text.trim().parse()
        {
            signal(daemon, libc::SIGTERM);
        }
    }
}

fn signal(pid: i32, signal: i32) {
    // SAFETY: takes numbers; the process is one of this test's.
    unsafe { libc::kill(pid, signal) };
}

/// State letter of a process; one that has been waited for has none.
fn letter(pid: i32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

/// Waits until a process has ended; one whose parent has gone is waited for by another, in its own time.
#[track_caller]
fn gone(pid: i32) {
    let deadline = Instant::now() + PATIENCE;
    while letter(pid).is_some_and(|letter| letter != 'Z') {
        assert!(Instant::now() < deadline, "process {pid} has not ended");
        thread::sleep(Duration::from_millis(5));
    }
}

fn get(stream: &mut UnixStream, path: &str) -> String {
    let request = format!("GET {path} HTTP/1.1\r\nhost: posada\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).expect("it takes a request");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("it answers");
    answer
}

#[test]
fn a_vm_is_run_in_the_foreground_of_a_daemon() {
    let user = User::new();
    let (kernel, cpu) = (bare_program("hello"), software_cpu());
    let words = [
        "run",
        "--name",
        "hello",
        "--rm",
        "--accel",
        &cpu,
        "--memory",
        "16M",
        "--debug-exit",
        "--kernel",
    ];
    let ended = user.does(&[&words[..], &[kernel.to_str().unwrap()]].concat());
    // What the program writes to its debug-exit port when all is well.
    ended.expect_code(33);
    let output = ended.output;
    assert!(
        output.contains("hello from a bare processor") && output.contains("0 failed"),
        "{output}"
    );
    assert_eq!(user.good(&["ls", "-q"]), "", "it was forgotten");
    assert_eq!(fs::read_dir(user.store().join("vms")).unwrap().count(), 0);
}

#[test]
fn a_life_goes_its_way() {
    let user = User::new();
    user.bare(&["create"], "spin", "spin", &["--label", "a=b"]);
    assert_eq!(user.state("spin"), "created");
    user.good(&["start", "spin"]);
    assert_eq!(user.state("spin"), "running");
    let pid = user.pid("spin");
    let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap();
    assert_eq!(command, b"posada\0vm\0spin\0");
    user.good(&["pause", "spin"]);
    assert_eq!(user.state("spin"), "paused");
    user.good(&["resume", "spin"]);
    user.good(&["rename", "spin", "top"]);
    assert_eq!(
        user.good(&["ls", "--label", "a=b", "--format", "{name} {state}"]),
        "top running\n"
    );
    user.refused(&["rm", "top"], &["running", "force"]);
    user.good(&["restart", "-t", "0", "top"]);
    assert_ne!(user.pid("top"), pid);
    assert_eq!(letter(pid), None, "the daemon leaves no zombie");
    let stats = user.good(&["stats", "--json"]);
    assert!(stats.contains("\"touched\""), "{stats}");
    user.good(&["stop", "-t", "0", "top"]);
    assert_eq!(user.state("top"), "stopped");
    assert_eq!(user.good(&["wait", "top"]), "143\n");
    assert_eq!(
        user.vm("top")["exit"]["reason"],
        "signal",
        "the VM ended in order, not only its process"
    );
    user.good(&["rm", "top"]);
    let events = user.good(&["events", "--past"]);
    let told: Vec<String> = events
        .lines()
        .map(|line| {
            serde_json::from_str::<Value>(line).unwrap()["event"]
                .as_str()
                .unwrap()
                .to_string()
        })
        .collect();
    let expected =
        "created starting running paused running renamed restarting starting running stopping stopped removed";
    assert_eq!(told.join(" "), expected);
}

#[test]
fn a_daemon_that_is_killed_in_any_state_loses_no_vm() {
    let user = User::new();
    user.bare(&["create"], "created", "spin", &[]);
    user.bare(&["run", "-d"], "running", "spin", &[]);
    user.bare(&["run", "-d"], "paused", "spin", &[]);
    user.good(&["pause", "paused"]);
    user.bare(&["run", "-d"], "stopped", "spin", &[]);
    user.good(&["stop", "-t", "0", "stopped"]);
    user.bare(
        &["create"],
        "restarting",
        "hello",
        &["--restart", "always", "--debug-exit"],
    );
    let _ = user.does(&["start", "restarting"]);
    user.until("restarting", |vm| vm["restarts"].as_u64() > Some(0));
    let (running, paused) = (user.pid("running"), user.pid("paused"));

    for _ in 0..3 {
        user.kill_daemon();
        assert_eq!(letter(running).map(|letter| letter == 'Z'), Some(false), "it runs on");
        assert_eq!(
            (user.pid("running"), user.pid("paused")),
            (running, paused),
            "they are adopted"
        );
        for state in ["created", "running", "paused", "stopped"] {
            assert_eq!(user.state(state), state);
        }
    }
    // The new daemon is as good as the first.
    user.good(&["resume", "paused"]);
    let before = user.vm("restarting")["restarts"].as_u64();
    user.until("restarting", |vm| vm["restarts"].as_u64() > before);
    user.good(&["kill", "running"]);
    gone(running);
    user.good(&["start", "running", "created", "stopped"]);
    let all = ["created", "running", "paused", "stopped", "restarting"];
    user.good(&[&["rm", "-f"], &all[..]].concat());
    assert_eq!(fs::read_dir(user.store().join("vms")).unwrap().count(), 0);
    gone(paused);
}

#[test]
fn a_daemon_that_is_killed_while_it_stops_a_vm_has_it_stopped_by_the_next() {
    let user = User::new();
    user.bare(&["run", "-d"], "spin", "spin", &[]);
    let pid = user.pid("spin");
    // A process that stands still takes no notice of SIGTERM.
    signal(pid, libc::SIGSTOP);
    let stopping = user.start(&["stop", "-t", "0", "spin"]);
    user.until("spin", |vm| vm["state"] == "stopping");
    user.kill_daemon();
    user.until("spin", |vm| vm["state"] == "stopped");
    gone(pid);
    drop(stopping);
}

#[test]
fn a_vm_that_dies_is_reported_and_restarted_as_its_policy_says() {
    let user = User::new();
    user.bare(&["run", "-d"], "once", "spin", &[]);
    user.bare(&["run", "-d"], "again", "spin", &["--restart", "on-failure"]);
    let (once, again) = (user.pid("once"), user.pid("again"));
    signal(once, libc::SIGKILL);
    signal(again, libc::SIGKILL);
    let vm = user.until("once", |vm| vm["state"] == "failed");
    assert!(vm["message"].as_str().unwrap().contains("signal 9"), "{vm}");
    let vm = user.until("again", |vm| vm["state"] == "running" && vm["pid"] != again);
    assert_eq!(vm["restarts"], 1);
    // The same while nobody looks.
    let again = user.pid("again");
    user.good(&["start", "once"]);
    let once = user.pid("once");
    user.kill_daemon();
    for pid in [once, again] {
        signal(pid, libc::SIGKILL);
        gone(pid);
    }
    let vm = user.until("once", |vm| vm["state"] == "failed");
    assert!(vm["message"].as_str().unwrap().contains("no daemon looked"), "{vm}");
    user.until("again", |vm| vm["state"] == "running" && vm["pid"] != again);
    // A crash has its report.
    user.bare(&["create"], "crash", "triplefault", &["--no-reboot"]);
    let _ = user.does(&["start", "crash"]);
    let vm = user.until("crash", |vm| vm["state"] == "failed");
    assert!(vm["message"].as_str().unwrap().contains("the guest crashed"), "{vm}");
}

#[test]
fn what_is_wrong_is_told_with_the_way_out() {
    let user = User::new();
    user.bare(&["create"], "database", "spin", &[]);
    user.refused(&["start", "databse"], &["did you mean \"database\"?"]);
    user.refused(&["ls", "--state", "runing"], &["did you mean \"running\"?"]);
    user.refused(&["ls", "--format", "{nam}"], &["did you mean {name}?"]);
    let kernel = bare_program("spin");
    let kernel = kernel.to_str().unwrap();
    user.refused(
        &["create", "--name", "database", "--kernel", kernel],
        &["already", "database"],
    );
    user.refused(&["create", "--name", "a/b", "--kernel", kernel], &["no name"]);
    user.refused(
        &["run", "-d", "--kernel", kernel, "--cpus", "5000"],
        &["this host has", "CPUs"],
    );
    user.refused(
        &["run", "-d", "--name", "x", "--kernel", "/no/kernel"],
        &["cannot start x", "/no/kernel"],
    );
    user.refused(
        &["run", "-d", "--kernel", kernel, "--gdb", "1"],
        &["--gdb", "--foreground"],
    );
    user.refused(&["daemon"], &["another daemon", &user.daemon().to_string()]);
    user.refused(&["stats", "database"], &["not running", "posada start"]);
}

#[test]
fn a_damaged_file_breaks_one_vm_only() {
    let user = User::new();
    user.bare(&["create"], "good", "spin", &[]);
    user.bare(&["create"], "bad", "spin", &[]);
    let id = user.vm("bad")["id"].as_str().unwrap().to_string();
    user.kill_daemon();
    fs::write(user.store().join("vms").join(&id).join("spec.json"), "{\"name\":").unwrap();
    let list = user.good(&["ls", "--format", "{name} {state}"]);
    assert!(
        list.contains("good created") && list.contains(&format!("{id} broken")),
        "{list}"
    );
    user.refused(&["start", &id], &["spec.json is damaged", "posada rm"]);
    user.good(&["start", "good"]);
    user.good(&["rm", &id]);
    assert_eq!(user.good(&["ls", "-q"]), "good\n");
}

#[test]
fn a_thousand_requests_at_a_time_are_answered() {
    let user = User::new();
    user.bare(&["create"], "one", "spin", &[]);
    let path = user.socket();
    let clients: Vec<_> = (0..1000)
        .map(|number| {
            let path = path.clone();
            let client = move || {
                let mut stream = UnixStream::connect(path).expect("the daemon listens");
                stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
                // Some go in the middle.
                if number % 10 == 0 {
                    let _ = stream.write_all(b"POST /v1/vms HTTP/1.1\r\nhost: posada\r\ncontent-length: 1000\r\n\r\n{");
                    return;
                }
                let answer = get(&mut stream, "/v1/vms");
                assert!(
                    answer.starts_with("HTTP/1.1 200") && answer.contains("\"one\""),
                    "{answer}"
                );
            };
            thread::Builder::new()
                .stack_size(128 << 10)
                .spawn(client)
                .expect("a thread")
        })
        .collect();
    for client in clients {
        client.join().expect("a client");
    }
    let metrics = get(&mut user.connect(), "/metrics");
    assert!(metrics.contains("posada_vms{state=\"created\"} 1"), "{metrics}");
    assert_eq!(user.good(&["ls", "-q"]), "one\n");
}

#[test]
fn a_request_that_is_sent_again_makes_one_vm() {
    let user = User::new();
    user.good(&["ls", "--state", "running"]);
    let body = r#"{"spec":{"boot":{"from":"kernel","kernel":"/k"}}}"#;
    let request = format!(
        "POST /v1/vms HTTP/1.1\r\nhost: posada\r\nconnection: close\r\nidempotency-key: k\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let send = || {
        let mut stream = user.connect();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 201"), "{answer}");
    };
    send();
    send();
    user.kill_daemon();
    let names = user.good(&["ls", "-q"]);
    assert_eq!(names.lines().count(), 1, "{names}");
    send();
    assert_eq!(user.good(&["ls", "-q"]), names, "the next daemon knows it, too");
}

#[test]
fn a_log_is_followed_to_the_end() {
    let user = User::new();
    user.bare(&["create"], "hello", "hello", &["--debug-exit"]);
    let _ = user.does(&["start", "hello"]);
    user.until("hello", |vm| vm["state"] == "failed");
    let log = user.good(&["logs", "--follow", "hello"]);
    assert!(
        log.starts_with("hello from a bare processor") && log.ends_with("0 failed\n"),
        "{log}"
    );
    let tail = user.good(&["logs", "-n", "1", "hello"]);
    assert_eq!(tail.lines().count(), 1, "{tail}");
}

#[test]
fn completions_and_manual_pages_know_all_commands() {
    let user = User::new();
    for shell in ["bash", "zsh", "fish"] {
        let text = user.good(&["completions", shell]);
        for word in ["create", "restart", "inspect", "on-failure"] {
            assert!(text.contains(word), "{shell} does not know {word}");
        }
    }
    user.good(&["man", "pages"]);
    let page = fs::read_to_string(user.folder.path().join("pages/posada-run.1")).unwrap();
    assert!(page.contains("restart") && page.contains("kernel"), "{page}");
    assert!(!user.store().exists(), "no daemon is needed for this");
}

#[test]
fn debian_takes_programs_and_files_by_its_name_and_powers_off_when_it_is_stopped() {
    let user = User::new();
    let mut agent = fs::read(agent_program()).unwrap();
    agent.resize(agent.len().next_multiple_of(512), 0);
    let agent = format!("{},ro", user.folder.file("agent.raw", &agent).display());
    let root = root_disk(&user.folder);
    let (kernel, initramfs, cpu) = (image("vmlinuz"), image("initramfs.cpio"), software_cpu());
    let cmdline = "console=ttyS0 quiet TERM=dumb root=/dev/vda rw";
    let kernel = [
        "--kernel",
        kernel.to_str().unwrap(),
        "--initramfs",
        initramfs.to_str().unwrap(),
        "--cmdline",
        cmdline,
    ];
    let disks = ["--disk", root.to_str().unwrap(), "--disk", &agent];
    let care = [
        "--name",
        "deb",
        "-e",
        "WHAT=word",
        "-w",
        "/tmp",
        "--accel",
        &cpu,
        "--memory",
        "512M",
    ];
    user.good(&[&["run", "-d"], &care[..], &kernel[..], &disks[..]].concat());
    let mut console = user.start(&["attach", "deb"]);
    let deadline = Instant::now() + 4 * PATIENCE;
    while !user.good(&["logs", "deb"]).contains(PROMPT) {
        assert!(Instant::now() < deadline, "no prompt");
        thread::sleep(Duration::from_millis(200));
    }
    console.send(
        "install -m 755 /dev/vdb /run/agent && { /run/agent >/dev/null 2>&1 </dev/null & } && echo agent $((40+2))\n",
    );
    console.expect("agent 42");
    while user.does(&["exec", "deb", "true"]).code != Some(0) {
        assert!(Instant::now() < deadline, "no agent");
    }
    let ended = user.does(&["exec", "deb", "sh", "-c", "echo $WHAT; pwd; echo oops >&2; exit 3"]);
    ended.expect_code(3);
    assert_eq!(
        (ended.output.as_str(), ended.errors.as_str()),
        ("word\n/tmp\n", "oops\n")
    );
    user.folder.file("file", b"content\n");
    user.good(&["cp", "file", "deb:/srv"]);
    user.good(&["cp", "deb:/srv/file", "copy"]);
    assert_eq!(fs::read(user.folder.path().join("copy")).unwrap(), b"content\n");
    assert!(user.good(&["top", "deb"]).contains("systemd"));
    // The next daemon reaches it as well.
    user.kill_daemon();
    assert_eq!(user.good(&["exec", "deb", "echo", "again"]), "again\n");
    user.good(&["stop", "-t", "60", "deb"]);
    assert_eq!(user.vm("deb")["exit"]["reason"], "power-off");
}
