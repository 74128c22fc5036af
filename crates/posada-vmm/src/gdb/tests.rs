use super::{Address, Listener};
use crate::control::{Control, Ending};
use crate::testing::{ENTRY, Step, TempDir, config, model, run};
use crate::vm::Config;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

/// The other end of the protocol.
struct Gdb(UnixStream);

impl Gdb {
    /// Waits until the VM is there.
    fn attach(path: &Path) -> Self {
        loop {
            match UnixStream::connect(path) {
                Ok(stream) => return Self(stream),
                Err(_) => thread::yield_now(),
            }
        }
    }

    fn byte(&mut self) -> u8 {
        let mut byte = [0];
        self.0.read_exact(&mut byte).unwrap();
        byte[0]
    }

    fn send(&mut self, command: &str) {
        let sum = command.bytes().fold(0_u8, u8::wrapping_add);
        self.0.write_all(format!("${command}#{sum:02x}").as_bytes()).unwrap();
    }

    fn reply(&mut self) -> String {
        while self.byte() != b'$' {}
        let mut reply = String::new();
        loop {
            match self.byte() {
                b'#' => break,
                // Run-length encoding: the last character again.
                b'*' => {
                    let last = reply.chars().last().unwrap();
                    (29..self.byte()).for_each(|_| reply.push(last));
                }
                byte => reply.push(byte.into()),
            }
        }
        let _sum = (self.byte(), self.byte());
        // The last reply of a session may have nobody waiting for this.
        let _ = self.0.write_all(b"+");
        reply
    }

    fn ask(&mut self, command: &str) -> String {
        self.send(command);
        self.reply()
    }

    /// RIP of the thread chosen.
    fn rip(&mut self) -> u64 {
        let registers = self.ask("g");
        let bytes: Vec<u8> = (0..8)
            .map(|at| u8::from_str_radix(&registers[0x100 + 2 * at..0x102 + 2 * at], 16).unwrap())
            .collect();
        u64::from_le_bytes(bytes.try_into().unwrap())
    }
}

/// vCPU 0 goes round 16 instructions, all others sleep.
fn round(index: u32, rip: u64, _: &dyn posada_engine::Machine) -> Step {
    match index {
        0 if rip == ENTRY + 15 => Step::Jump(ENTRY),
        0 => Step::Next,
        _ => Step::Halt,
    }
}

/// A test that fails must not leave its VM running.
struct EndAfter<'a>(&'a Control);

impl Drop for EndAfter<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.end(Ending::Failed);
        }
    }
}

fn with_gdb(test: impl FnOnce(&Path, &Control) + Send) -> Ending {
    let (dir, control) = (TempDir::new(), Control::new());
    let path = dir.path("gdb");
    let config = Config {
        model: model(2),
        gdb: Some(Address::Unix(path.clone())),
        ..config(&dir)
    };
    let report = thread::scope(|scope| {
        scope.spawn(|| {
            let _end = EndAfter(&control);
            test(&path, &control);
        });
        run(&config, &control, round)
    });
    assert!(!path.exists());
    report.unwrap().ending
}

#[test]
fn gdb_sees_registers_and_memory_and_stops_at_break_points_and_steps() {
    let ending = with_gdb(|path, control| {
        let mut gdb = Gdb::attach(path);
        assert!(
            gdb.ask("qSupported:swbreak+;hwbreak+;vContSupported+")
                .contains("PacketSize")
        );
        assert!(gdb.ask("?").starts_with(['S', 'T']));
        assert!((ENTRY..ENTRY + 16).contains(&gdb.rip()), "the VM stands");
        assert_eq!(gdb.rip(), gdb.rip());

        assert_eq!(gdb.ask(&format!("Z0,{:x},1", ENTRY + 5)), "OK");
        assert!(gdb.ask("vCont;c").contains("swbreak"));
        assert_eq!(gdb.rip(), ENTRY + 5);
        assert!(gdb.ask("vCont;s:1;c").starts_with("T05"));
        assert_eq!(gdb.rip(), ENTRY + 6);
        assert!(gdb.ask("vCont;c").contains("swbreak"));
        assert_eq!(gdb.rip(), ENTRY + 5);
        assert_eq!(gdb.ask(&format!("z0,{:x},1", ENTRY + 5)), "OK");
        assert_eq!(gdb.ask(&format!("Z1,{:x},1", ENTRY + 9)), "OK");
        assert!(gdb.ask("vCont;c").contains("hwbreak"));
        assert_eq!(gdb.rip(), ENTRY + 9);
        assert_eq!(gdb.ask(&format!("z1,{:x},1", ENTRY + 9)), "OK");

        // As many of both kinds as the engine has.
        for (kind, at) in [(0, 20), (1, 21), (0, 22), (1, 23)] {
            assert_eq!(gdb.ask(&format!("Z{kind},{:x},1", ENTRY + at)), "OK");
        }
        for kind in [0, 1] {
            assert!(gdb.ask(&format!("Z{kind},{:x},1", ENTRY + 24)).starts_with('E'));
        }
        for (kind, at) in [(0, 20), (1, 21), (0, 22), (1, 23)] {
            assert_eq!(gdb.ask(&format!("z{kind},{:x},1", ENTRY + at)), "OK");
        }

        assert_eq!(gdb.ask("m100000,6"), "6b65726e656c");
        assert_eq!(gdb.ask("m8000000000100000,2"), "6b65");
        assert_eq!(gdb.ask("M100000,2:4142"), "OK");
        assert_eq!(gdb.ask("m100000,3"), "414272");
        assert!(gdb.ask("m5000,4").starts_with('E'), "the page is not mapped");
        assert_eq!(gdb.ask("m4ffe,8").len(), 4, "as far as it is mapped");
        assert!(gdb.ask("mc0000000,4").starts_with('E'), "no RAM there");

        gdb.send("vCont;c");
        gdb.0.write_all(b"\x03").unwrap();
        assert!(gdb.reply().contains("02"), "SIGINT");
        gdb.ask("Hg2");
        assert_eq!(gdb.rip(), 0xfff0, "vCPU 1 is thread 2");
        assert_eq!(gdb.ask("D"), "OK");
        drop(gdb);

        // A second one can attach, and the VM ends under it.
        let mut gdb = Gdb::attach(path);
        gdb.ask("?");
        control.end(Ending::PowerOff);
        let mut rest = Vec::new();
        let _ = gdb.0.read_to_end(&mut rest);
    });
    assert_eq!(ending, Ending::PowerOff);
}

#[test]
fn gdb_is_told_when_the_guest_powers_off() {
    let (dir, control) = (TempDir::new(), Control::new());
    let path = dir.path("gdb");
    let config = Config {
        gdb: Some(Address::Unix(path.clone())),
        ..config(&dir)
    };
    let attached = Arc::new(AtomicBool::new(false));
    let seen = attached.clone();
    let report = thread::scope(|scope| {
        scope.spawn(|| {
            let _end = EndAfter(&control);
            let mut gdb = Gdb::attach(&path);
            gdb.ask("?");
            attached.store(true, Ordering::Relaxed);
            assert!(gdb.ask("vCont;c").starts_with('W'));
        });
        run(&config, &control, move |index, rip, machine| {
            if seen.load(Ordering::Relaxed) {
                machine.port_write(0x600, &[5 << 2 | 1 << 5]);
            }
            round(index, rip, machine)
        })
    });
    assert_eq!(report.unwrap().ending, Ending::PowerOff);
}

#[test]
fn a_session_that_is_cut_off_lets_the_vm_run_on() {
    let ending = with_gdb(|path, control| {
        let mut gdb = Gdb::attach(path);
        gdb.ask("?");
        let stood = gdb.rip();
        drop(gdb);
        // It runs again if it stands elsewhere at some time.
        loop {
            let mut gdb = Gdb::attach(path);
            gdb.ask("?");
            if gdb.rip() != stood {
                break;
            }
        }
        control.end(Ending::Quit);
    });
    assert_eq!(ending, Ending::Quit);
}

#[test]
fn a_socket_that_a_killed_process_has_left_is_taken_over_and_a_live_one_is_not() {
    let dir = TempDir::new();
    let path = dir.path("gdb");
    // std does not remove the path when the listener is dropped.
    drop(UnixListener::bind(&path).unwrap());
    let address = Address::Unix(path.clone());
    let listener = Listener::bind(&address).unwrap();
    let error = Listener::bind(&address).err().unwrap().to_string();
    assert!(error.contains("--gdb"), "{error}");
    drop(listener);
    let file = dir.file("file", b"mine");
    assert!(Listener::bind(&Address::Unix(file.clone())).is_err());
    assert!(file.exists());
}

#[test]
fn addresses_are_ports_hosts_with_ports_or_paths() {
    let tcp = |text: &str| Ok(Address::Tcp(text.into()));
    assert_eq!("1234".parse(), tcp("127.0.0.1:1234"));
    assert_eq!(":1234".parse(), tcp("127.0.0.1:1234"));
    assert_eq!("[::1]:1234".parse(), tcp("[::1]:1234"));
    assert_eq!("./gdb".parse(), Ok(Address::Unix("./gdb".into())));
    for text in ["", "gdb", "host:", "host:x", "1:70000"] {
        assert!(text.parse::<Address>().is_err(), "{text}");
    }
}
