//! The agent in a Debian guest, over a vsock: what a process of this machine cannot show.

use posada_protocol::{Client, Ending, Error, Event, Exec, Failure, Size, Status};
use posada_tests::{Folder, Launch, Shell, agent_program, debian, root_disk};
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// A busy machine makes minutes of seconds.
const PATIENCE: Duration = Duration::from_secs(300);
const MOST: usize = 1 << 20;
/// A program of the guest that speaks with the agent by the guest's own address.
const INTRUDER: &str = "import socket; s = socket.socket(socket.AF_VSOCK); s.connect((1, 700)); print(s.recv(9))";

struct Guest {
    shell: Shell,
    socket: PathBuf,
}

impl Guest {
    /// Debian with two CPUs, in which the agent runs.
    fn start(folder: &Folder) -> Self {
        let mut agent = std::fs::read(agent_program()).unwrap();
        agent.resize(agent.len().next_multiple_of(512), 0);
        let agent = format!("{},ro", folder.file("agent.raw", &agent).display());
        let socket = folder.path().join("vsock");
        let launch = debian(&root_disk(folder)).disk(agent).cpus(2);
        let mut vm = launch.arg("--vsock").arg(&socket).start();
        vm.prompt();
        let mut shell = vm.shell();
        let start =
            "install -m 755 /dev/vdb /run/posada-agent && { /run/posada-agent >/run/agent.log 2>&1 </dev/null & }";
        shell.run(start).success();
        let guest = Self { shell, socket };
        let begin = Instant::now();
        while let Err(error) = Client::connect(&guest.socket, PATIENCE) {
            assert!(matches!(error, Error::NoAgent) && begin.elapsed() < PATIENCE, "{error}");
        }
        guest
    }

    fn client(&self) -> Client {
        Client::connect(&self.socket, PATIENCE).unwrap()
    }

    /// What a command line prints.
    fn run(&self, line: &str) -> String {
        let finished = self.client().run(&sh(line), &[], MOST).unwrap();
        assert_eq!(finished.status, Status::Exited(0), "{line}: {finished:?}");
        String::from_utf8(finished.output).unwrap().trim().to_string()
    }
}

fn sh(line: &str) -> Exec {
    Exec {
        command: ["sh", "-c", line].map(String::from).to_vec(),
        ..Exec::default()
    }
}

fn programs(guest: &Guest) {
    assert_eq!(guest.run("id -u; echo $HOME; pwd"), "0\n/root\n/root");
    let nobody = Exec {
        user: Some("nobody".into()),
        ..sh("id -un; cat /etc/shadow 2>/dev/null || echo closed")
    };
    let finished = guest.client().run(&nobody, &[], MOST).unwrap();
    assert_eq!(finished.output, b"nobody\nclosed\n");
    let input = vec![7; 3_000_000];
    let finished = guest.client().run(&sh("sha256sum"), &input, MOST).unwrap();
    assert!(finished.output.starts_with(b"892f2fe04ec507da"), "{finished:?}");
    let terminal = Exec {
        terminal: Some(Size { columns: 90, rows: 30 }),
        input: true,
        ..sh("stty size; tty; exec cat")
    };
    let (input, mut output) = guest.client().exec(&terminal).unwrap();
    let mut printed = String::new();
    input.write(b"typed\n\x04").unwrap();
    let status = loop {
        match output.next_event().unwrap() {
            Event::Output(bytes) => printed += &String::from_utf8(bytes).unwrap(),
            Event::Errors(_) => unreachable!("a terminal has one output"),
            Event::Ended(status) => break status,
        }
    };
    assert_eq!(status, Status::Exited(0));
    assert!(
        printed.contains("30 90\r\n") && printed.contains("/dev/pts/"),
        "{printed:?}"
    );
    assert!(printed.ends_with("typed\r\n"), "{printed:?}");
}

fn files(guest: &Guest) {
    let mut archive = Vec::new();
    guest.client().get("/etc/init.d", &mut archive).unwrap();
    guest.run("mkdir /run/copy");
    guest.client().put("/run/copy", &mut &archive[..]).unwrap();
    assert_eq!(
        guest.run("diff -r /etc/init.d /run/copy/init.d && stat -c %a /run/copy/init.d"),
        "755"
    );
}

fn settings(guest: &Guest) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let later = now + Duration::from_secs(3600);
    guest.client().set_time(UNIX_EPOCH + later).unwrap();
    let seen: u64 = guest.run("date +%s").parse().unwrap();
    assert!((later.as_secs()..later.as_secs() + 60).contains(&seen), "{seen}");
    guest.client().set_hostname("other-name").unwrap();
    assert_eq!(guest.run("uname -n; cat /etc/hostname"), "other-name\nother-name");
    guest
        .client()
        .authorize_keys("root", &["ssh-ed25519 AAAA me".into()])
        .unwrap();
    assert_eq!(
        guest.run("cat .ssh/authorized_keys; stat -c %a .ssh .ssh/authorized_keys"),
        "ssh-ed25519 AAAA me\n700\n600"
    );
    assert_eq!(guest.client().set_cpus(1).unwrap(), (vec![0, 1], vec![0]));
    assert_eq!(guest.run("nproc"), "1");
    assert_eq!(guest.client().set_cpus(2).unwrap().1, [0, 1]);
    assert_eq!(guest.run("nproc"), "2");
}

fn standstill(guest: &Guest) {
    let frozen = guest.client().freeze(300).unwrap();
    let (_, mut touch) = guest.client().exec(&sh("echo up; exec touch /root/touched")).unwrap();
    assert_eq!(touch.next_event().unwrap(), Event::Output(b"up\n".to_vec()));
    let begin = Instant::now();
    let waits = || {
        let statistics = guest.client().statistics(1000).unwrap();
        let process = statistics
            .processes
            .into_iter()
            .find(|process| process.pid == touch.pid());
        process.is_some_and(|process| process.name == "touch" && process.state == 'D')
    };
    while !waits() {
        assert!(begin.elapsed() < PATIENCE, "it writes to a frozen file system");
    }
    frozen.thaw().unwrap();
    assert_eq!(touch.next_event().unwrap(), Event::Ended(Status::Exited(0)));
    // Without a word they go on when the host has gone.
    drop(guest.client().freeze(300).unwrap());
    assert_eq!(guest.run("touch /root/again; echo written"), "written");
}

fn exec_command(guest: &Guest) {
    let launch = |options: &[&str], command: &[&str]| {
        let words = [&["exec"], options, &[guest.socket.to_str().unwrap()], command].concat();
        Launch::command(words).patience(PATIENCE)
    };
    let ended = launch(
        &["-u", "nobody", "-w", "/usr", "-e", "A=b"],
        &["sh", "-c", "id -un; pwd; echo $A >&2; exit 7"],
    )
    .start()
    .end();
    assert_eq!(ended.expect_code(7).output, "nobody\n/usr\n");
    assert_eq!(ended.errors, "b\n");
    for (program, code) in [("/no/such", 127), ("/etc/passwd", 126)] {
        let ended = launch(&[], &[program]).start().end();
        assert!(ended.expect_code(code).errors.contains(program), "{}", ended.errors);
    }
    let mut sleep = launch(&[], &["sh", "-c", "echo up; exec sleep 300"]).start();
    sleep.expect("up");
    sleep.signal(libc::SIGTERM);
    sleep.end().expect_code(128 + libc::SIGTERM);
    let mut cat = launch(&["-i"], &["cat"]).start();
    cat.send("to and fro\n").expect("to and fro\n");
    cat.signal(libc::SIGINT);
    cat.end().expect_code(128 + libc::SIGINT);
    let (mut shell, before) = launch(&["-it"], &["bash", "--norc"]).start_on_terminal();
    // Ctrl-C is the guest's; the mark is typed in two halves, so that its echo is not taken for it.
    shell.send("sleep 300; echo sle''pt\n").expect("sleep 300");
    let begin = Instant::now();
    while guest.run("pgrep -x sleep || true").is_empty() {
        assert!(begin.elapsed() < PATIENCE, "nothing sleeps");
    }
    assert!(shell.terminal_settings().is_raw());
    shell
        .send("\x03")
        .send("echo o''n; tty; exit 4\n")
        .expect("on\n")
        .expect("/dev/pts/");
    let ended = shell.end();
    ended.expect_code(4);
    assert_eq!(ended.terminal, Some(before), "the terminal was left changed");
}

#[test]
fn a_guest_does_what_its_host_asks() {
    let folder = Folder::new();
    let mut guest = Guest::start(&folder);
    programs(&guest);
    exec_command(&guest);
    files(&guest);
    settings(&guest);
    standstill(&guest);
    let statistics = guest.client().statistics(10).unwrap();
    assert_eq!(statistics.cpus.len(), 2);
    assert!(
        statistics.memory.total > 400 << 20 && statistics.pressure.is_some(),
        "{statistics:?}"
    );
    // The host only: the agent hangs up at once.
    guest.shell.run("modprobe vsock_loopback").success();
    guest.shell.run(&format!("python3 -c '{INTRUDER}'")).expect("b''");
    let Err(Error::Failed { why, .. }) = guest.client().get("/no/such", &mut Vec::new()) else {
        panic!("there is nothing")
    };
    assert_eq!(why, Failure::NotFound);
    guest.shell.kernel_is_well();
    guest.client().shut_down(Ending::PowerOff).unwrap();
    guest.shell.end().expect_code(0);
}
