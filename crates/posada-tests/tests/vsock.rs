//! Programs of the host and of a Debian guest reach each other by --vsock.

use posada_tests::{Folder, Launch, Process, Shell, debian, root_disk, script_disk};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// A busy machine makes minutes of seconds.
const PATIENCE: Duration = Duration::from_secs(300);
const SCRIPT: &str = "python3 /dev/vdb";

fn vm(folder: &Folder) -> (Process, PathBuf) {
    let (disk, script) = (
        root_disk(folder),
        script_disk(folder, include_str!("../guest/vsock.py")),
    );
    let (socket, control) = (folder.path().join("vsock"), folder.path().join("control"));
    let launch = debian(&disk).disk(script).arg("--control").arg(&control);
    let mut vm = launch
        .arg("--vsock")
        .arg(format!("{},cid=77", socket.display()))
        .start();
    vm.prompt();
    (vm, socket)
}

/// Connects to a port of a guest that may not listen yet.
fn connect(socket: &Path, port: u32) -> BufReader<UnixStream> {
    let begin = Instant::now();
    loop {
        let mut line = String::new();
        if let Ok(stream) = UnixStream::connect(socket) {
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            (&stream).write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
            let mut stream = BufReader::new(stream);
            stream.read_line(&mut line).unwrap();
            if line.starts_with("OK ") {
                return stream;
            }
        }
        assert_eq!(line, "", "an answer");
        assert!(begin.elapsed() < PATIENCE, "nobody listens");
        thread::sleep(Duration::from_millis(100));
    }
}

/// Sends `bytes` to a guest that gives everything back, and checks that it does.
#[track_caller]
fn is_echoed(mut stream: BufReader<UnixStream>, bytes: &[u8]) {
    let mut writer = stream.get_ref().try_clone().unwrap();
    let sent = bytes.to_vec();
    let writer = thread::spawn(move || {
        writer.write_all(&sent).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let mut got = Vec::new();
    stream.read_to_end(&mut got).unwrap();
    writer.join().unwrap();
    let tail = got.split_off(bytes.len().min(got.len()));
    assert!(got == bytes, "{} bytes came back of {}", got.len(), bytes.len());
    let tail = String::from_utf8(tail).unwrap();
    assert!(tail.starts_with(&format!("{} ", bytes.len())), "{tail:?}");
}

fn bytes(count: u32) -> Vec<u8> {
    (0..count)
        .map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect()
}

fn power_off(mut shell: Shell) {
    shell.kernel_is_well();
    shell.send("systemctl poweroff\n");
    shell.end().expect_code(0);
}

#[test]
fn host_and_guest_reach_each_other_both_ways() {
    let folder = Folder::new();
    let (vm, socket) = vm(&folder);
    let mut shell = vm.shell();
    // Nobody listens.
    let mut refused = UnixStream::connect(&socket).unwrap();
    refused.set_read_timeout(Some(PATIENCE)).unwrap();
    refused.write_all(b"CONNECT 1024\n").unwrap();
    assert_eq!(refused.read(&mut [0]).unwrap(), 0);
    shell
        .run(&format!("{SCRIPT} ask 52 2>&1 | tail -n 1"))
        .contains("ConnectionResetError");

    shell
        .run(&format!("{SCRIPT} serve 1024 >/dev/null 2>&1 </dev/null &"))
        .success();
    is_echoed(connect(&socket, 1024), b"");
    is_echoed(connect(&socket, 1024), &bytes(100));
    is_echoed(connect(&socket, 1024), &bytes(8 << 20));

    let listener = UnixListener::bind(folder.path().join("vsock_52")).unwrap();
    let program = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        assert!(all == b"0123456789abcdef".repeat(65536));
        stream.write_all(b"thank you").unwrap();
    });
    shell.run(&format!("{SCRIPT} ask 52")).expect("thank you");
    program.join().unwrap();
    power_off(shell);
}

#[test]
fn connections_end_with_a_restore_and_new_ones_work() {
    let folder = Folder::new();
    let (vm, socket) = vm(&folder);
    let mut shell = vm.shell();
    shell
        .run(&format!("{SCRIPT} serve 1024 >/dev/null 2>&1 </dev/null &"))
        .success();
    let listener = UnixListener::bind(folder.path().join("vsock_52")).unwrap();
    shell
        .run(&format!("{SCRIPT} wait 52 >/tmp/waited 2>&1 </dev/null &"))
        .success();
    let (held, _) = listener.accept().unwrap();
    is_echoed(connect(&socket, 1024), &bytes(1000));
    let (control, snapshot) = (folder.path().join("control"), folder.path().join("snapshot"));
    let save = ["snapshot", "save"].map(Path::new);
    let saved = Launch::command(save.into_iter().chain([&*control, &*snapshot, Path::new("--stop")]));
    saved.start().end().expect_code(0);
    shell.end().expect_code(0);
    drop(held);

    let copy = folder.path().join("copy.raw");
    std::fs::copy(snapshot.join("disk0.raw"), &copy).unwrap();
    let launch = Launch::run()
        .arg("--restore")
        .arg(&snapshot)
        .disk(&copy)
        .patience(PATIENCE);
    let refused = launch.clone().start().end();
    refused.expect_code(125);
    assert!(refused.errors.contains("give --vsock"), "{}", refused.errors);
    let vm = launch.arg("--vsock").arg(&socket).start();
    is_echoed(connect(&socket, 1024), &bytes(100_000));
    let mut shell = vm.shell();
    shell
        .run("{ wait %2; } >/dev/null 2>&1; cat /tmp/waited")
        .expect("reset");
    power_off(shell);
}
