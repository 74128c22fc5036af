use super::*;
use crate::control::{Control, Ending};
use crate::testing::{ENTRY, Step, TempDir, config, run};
use crate::vm::Config;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

/// Runs a VM that loops, counting, while `talk` talks to it; its control socket is gone after.
fn talking<T: Send>(config: &Config, dir: &TempDir, talk: impl FnOnce(&Path, &AtomicU64) -> T + Send) -> T {
    let control = Control::new();
    let steps = Arc::new(AtomicU64::new(0));
    let socket = dir.path("socket");
    let config = Config {
        control: Some(socket.clone()),
        ..config.clone()
    };
    thread::scope(|scope| {
        let counter = steps.clone();
        let vm = scope.spawn(|| {
            run(&config, &control, move |_, _, _| {
                counter.fetch_add(1, Ordering::Relaxed);
                thread::yield_now();
                Step::Jump(ENTRY)
            })
        });
        while steps.load(Ordering::Relaxed) == 0 {
            thread::yield_now();
        }
        let said = talk(&socket, &steps);
        control.end(Ending::Quit);
        assert_eq!(vm.join().unwrap().unwrap().ending, Ending::Quit);
        assert!(!socket.exists());
        said
    })
}

fn ask(client: &mut Client, request: &Request) -> Answer {
    client.ask(request, &mut |_| {}).unwrap()
}

fn condition(client: &mut Client) -> Condition {
    match ask(client, &Request::Status) {
        Answer::Status(status) => status.condition,
        answer => panic!("{answer:?}"),
    }
}

#[test]
fn a_vm_pauses_and_goes_on_however_often_it_is_told() {
    let dir = TempDir::new();
    talking(&config(&dir), &dir, |socket, steps| {
        let mut client = Client::connect(socket).unwrap();
        assert_eq!(condition(&mut client), Condition::Running);
        for _ in 0..2 {
            assert_eq!(ask(&mut client, &Request::Pause), Answer::Done);
            assert_eq!(condition(&mut client), Condition::Paused);
        }
        let before = steps.load(Ordering::Relaxed);
        // A client that goes does not take the pause with it.
        drop(client);
        let mut client = Client::connect(socket).unwrap();
        for _ in 0..100 {
            thread::yield_now();
        }
        assert_eq!(steps.load(Ordering::Relaxed), before);
        for _ in 0..2 {
            assert_eq!(ask(&mut client, &Request::Resume), Answer::Done);
        }
        while steps.load(Ordering::Relaxed) == before {
            thread::yield_now();
        }
        assert_eq!(condition(&mut client), Condition::Running);
    });
}

#[test]
fn a_vm_that_is_paused_while_it_resets_has_a_paused_next_life() {
    let dir = TempDir::new();
    let (socket, control) = (dir.path("socket"), Control::new());
    let config = Config {
        control: Some(socket.clone()),
        paused: true,
        ..config(&dir)
    };
    let steps = Arc::new(AtomicU64::new(0));
    let (seen, ended) = (steps.clone(), control.clone());
    thread::scope(|scope| {
        let vm = scope.spawn(|| {
            run(&config, &control, move |_, _, machine| {
                // The user's pause and the guest's reset meet.
                if seen.fetch_add(1, Ordering::Relaxed) == 0 {
                    machine.port_write(0x602, &[1]);
                }
                thread::yield_now();
                Step::Next
            })
        });
        let mut client = loop {
            match Client::connect(&socket) {
                Ok(client) => break client,
                Err(_) => thread::yield_now(),
            }
        };
        while condition(&mut client) != Condition::Paused {
            thread::yield_now();
        }
        assert_eq!(steps.load(Ordering::Relaxed), 0, "it begins paused");
        for _ in 0..100 {
            ask(&mut client, &Request::Resume);
            assert_eq!(ask(&mut client, &Request::Pause), Answer::Done);
            assert_eq!(condition(&mut client), Condition::Paused);
            let before = steps.load(Ordering::Relaxed);
            thread::yield_now();
            assert_eq!(steps.load(Ordering::Relaxed), before);
        }
        ask(&mut client, &Request::Resume);
        while steps.load(Ordering::Relaxed) < 2 {
            thread::yield_now();
        }
        ended.end(Ending::Quit);
        let report = vm.join().unwrap().unwrap();
        assert_eq!((report.ending, report.reboots), (Ending::Quit, 1));
    });
}

#[test]
fn a_paused_vm_is_saved_and_stays_paused_and_ends_all_the_same() {
    let dir = TempDir::new();
    talking(&config(&dir), &dir, |socket, _| {
        let mut client = Client::connect(socket).unwrap();
        ask(&mut client, &Request::Pause);
        let save = Request::SnapshotSave {
            place: dir.path("snap"),
            force: false,
            stop: false,
            disks: KeepDisks::Copy,
        };
        assert!(matches!(ask(&mut client, &save), Answer::Saved(_)));
        assert_eq!(condition(&mut client), Condition::Paused);
        let again = client.ask(&save, &mut |_| {}).unwrap_err().to_string();
        assert!(again.contains("--force"), "{again}");
    });
}

#[test]
fn many_clients_are_served_at_once() {
    let dir = TempDir::new();
    talking(&config(&dir), &dir, |socket, _| {
        let mut clients: Vec<_> = (0..8).map(|_| Client::connect(socket).unwrap()).collect();
        clients
            .iter_mut()
            .for_each(|client| assert_eq!(condition(client), Condition::Running));
    });
}

#[test]
fn nonsense_gets_an_error_and_harms_nobody() {
    let dir = TempDir::new();
    talking(&config(&dir), &dir, |socket, _| {
        let lines: [&[u8]; 6] = [
            b"hello\n",
            b"{\"request\":\"fly\"}\n",
            b"{\"request\":\"snapshot-save\",\"place\":\"/x\",\"force\":false,\"stop\":false,\"disks\":\"copy\",\"new\":1}\n",
            b"{\"request\":\"snapshot-save\",\"place\":\"x\",\"force\":false,\"stop\":false,\"disks\":\"copy\"}\n",
            b"\xff\0\n",
            b"{}\n",
        ];
        let mut stream = UnixStream::connect(socket).unwrap();
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        assert_eq!(serde_json::from_str::<Hello>(&line).unwrap().protocol, PROTOCOL);
        for sent in lines {
            stream.write_all(sent).unwrap();
            line.clear();
            reader.read_line(&mut line).unwrap();
            assert!(matches!(serde_json::from_str(&line), Ok(Answer::Error(_))), "{line}");
        }
        // A line without an end is not waited for for ever.
        let long = vec![b'['; 2 * LONGEST_REQUEST as usize];
        let _ = stream.write_all(&long);
        let mut rest = Vec::new();
        let _ = reader.read_to_end(&mut rest);
        assert!(rest.starts_with(b"{\"error\""));
        // Half a request, and gone.
        UnixStream::connect(socket).unwrap().write_all(b"{\"requ").unwrap();
        assert_eq!(condition(&mut Client::connect(socket).unwrap()), Condition::Running);
    });
}

#[test]
fn the_socket_of_a_live_vm_is_refused() {
    let dir = TempDir::new();
    let config = config(&dir);
    talking(&config, &dir, |socket, _| {
        let second = Config {
            control: Some(socket.into()),
            ..config.clone()
        };
        let error = run(&second, &Control::new(), |_, _, _| Step::Halt)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("another VM has it") && error.contains("--control"),
            "{error}"
        );
    });
    let error = Client::connect(&dir.path("socket")).unwrap_err().to_string();
    assert!(error.contains("no VM answers"), "{error}");
}

#[test]
fn who_talks_to_a_vm_learns_that_it_ends() {
    let dir = TempDir::new();
    let mut client = talking(&config(&dir), &dir, |socket, _| Client::connect(socket).unwrap());
    let error = client.ask(&Request::Status, &mut |_| {}).unwrap_err();
    assert!(matches!(error, Error::Gone { .. }), "{error}");
}
