//! The host's end of the vsock tests, as a program so that it can run in a test host too.
//!
//! ```text
//! vsock-peer refused SOCKET PORT        nobody listens at that port of the guest
//! vsock-peer echo SOCKET PORT BYTES     waits until somebody does, sends so many bytes and gets them back
//! vsock-peer answer SOCKET              listens for the guest, takes a megabyte and thanks for it
//! vsock-peer hold SOCKET                listens for the guest and keeps its connection
//! ```

use std::env;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;
use std::time::{Duration, Instant};

/// A busy machine makes minutes of seconds, and a test host makes more of them.
const PATIENCE: Duration = Duration::from_secs(900);

/// Connects to a port of a guest; `None` if it refuses.
fn connect(socket: &str, port: u32) -> Option<BufReader<UnixStream>> {
    let stream = UnixStream::connect(socket).ok()?;
    stream
        .set_read_timeout(Some(PATIENCE))
        .expect("a time that is not zero");
    writeln!(&stream, "CONNECT {port}").expect("the device reads it");
    let (mut stream, mut line) = (BufReader::new(stream), String::new());
    stream.read_line(&mut line).expect("an answer in time");
    if line.is_empty() {
        return None;
    }
    assert!(line.starts_with("OK "), "{line:?}");
    Some(stream)
}

/// The same, as soon as the guest listens.
fn wait_for(socket: &str, port: u32) -> BufReader<UnixStream> {
    let begin = Instant::now();
    loop {
        if let Some(stream) = connect(socket, port) {
            return stream;
        }
        assert!(begin.elapsed() < PATIENCE, "nobody listens");
        thread::sleep(Duration::from_millis(100));
    }
}

/// Sends bytes to a guest that gives all back, and then their number.
fn echo(mut stream: BufReader<UnixStream>, count: u32) {
    let bytes: Vec<u8> = (0..count)
        .map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let mut writer = stream.get_ref().try_clone().expect("a descriptor");
    let sent = bytes.clone();
    let writer = thread::spawn(move || {
        writer.write_all(&sent).expect("the guest reads");
        writer.shutdown(Shutdown::Write).expect("it is open");
    });
    let mut got = Vec::new();
    stream.read_to_end(&mut got).expect("an end in time");
    writer.join().expect("it has told why");
    let tail = got.split_off(bytes.len().min(got.len()));
    assert!(got == bytes, "{} bytes of {count} came back, or others", got.len());
    let tail = String::from_utf8(tail).expect("a text");
    assert!(tail.starts_with(&format!("{count} ")), "{tail:?}");
    println!("echoed {count}");
}

/// The guest's connection to the host.
fn accept(socket: &str) -> UnixStream {
    let listener = UnixListener::bind(socket).expect("a path for a socket");
    println!("listening");
    let (stream, _) = listener.accept().expect("a connection");
    stream
        .set_read_timeout(Some(PATIENCE))
        .expect("a time that is not zero");
    println!("accepted");
    stream
}

fn main() {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let number = |word: &str| word.parse().expect("a number");
    match words[..] {
        ["refused", socket, port] => {
            assert!(connect(socket, number(port)).is_none());
            println!("refused");
        }
        ["echo", socket, port, count] => echo(wait_for(socket, number(port)), number(count)),
        ["answer", socket] => {
            let (mut stream, mut all) = (accept(socket), Vec::new());
            stream.read_to_end(&mut all).expect("an end in time");
            assert!(all == b"0123456789abcdef".repeat(65536), "{} bytes", all.len());
            stream.write_all(b"thank you").expect("the guest reads");
        }
        ["hold", socket] => {
            let _stream = accept(socket);
            // Until a signal.
            loop {
                thread::park();
            }
        }
        _ => panic!("what is {words:?}?"),
    }
}
