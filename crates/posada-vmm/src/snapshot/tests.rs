//! Saving and restoring VMs whose vCPUs count.

mod reflink;

use super::*;
use crate::boot::Source;
use crate::control::{Condition, Control, Ending};
use crate::remote::{Answer, Client, Request};
use crate::testing::{ENTRY, Random, Step, TempDir, config, model, run};
use crate::vm::{self, Config, DiskConfig, Report};
use posada_engine::Machine;
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex};
use std::thread;

const RIP_OF_CPU_1: u64 = 0x5_0000;

fn power_off(machine: &dyn Machine) {
    machine.port_write(0x600, &[5 << 2 | 1 << 5]);
}

/// A VM of two vCPUs with a disk, a second read-only one, and a control socket.
fn machine(dir: &TempDir) -> Config {
    let disk = |name: &str, read_only| DiskConfig {
        path: dir.file(name, &[name.len() as u8; 70_000]),
        read_only,
    };
    Config {
        model: model(2),
        disks: vec![disk("data.raw", false), disk("base.raw", true)],
        control: Some(dir.path("socket")),
        initramfs: Some(dir.file("initrd", b"some files")),
        cmdline: "quiet".into(),
        ..config(dir)
    }
}

fn request(dir: &TempDir, stop: bool, disks: KeepDisks) -> Request {
    Request::SnapshotSave {
        place: dir.path("snap"),
        force: false,
        stop,
        disks,
    }
}

/// Runs a VM whose vCPU 0 counts its RIP up and stores it in a register of COM1, until `during` (in a thread of its own)
/// has ended; then it powers off.
fn count<T: Send + 'static>(config: &Config, during: impl FnOnce() -> T + Send + 'static) -> (Report, T, Vec<u64>) {
    count_under(&Control::new(), config, during)
}

fn count_under<T: Send + 'static>(
    control: &Arc<Control>,
    config: &Config,
    during: impl FnOnce() -> T + Send + 'static,
) -> (Report, T, Vec<u64>) {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let (log, (started, begin)) = (seen.clone(), mpsc::channel());
    let started = Mutex::new(Some(started));
    let (over, watch) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let thread = {
        let over = over.clone();
        thread::spawn(move || {
            begin.recv().unwrap();
            let result = during();
            over.store(1, Ordering::Release);
            result
        })
    };
    let report = run(config, control, move |index, rip, machine| {
        if index == 1 {
            return Step::Halt;
        }
        log.lock().unwrap().push(rip);
        if let Some(started) = started.lock().unwrap().take() {
            Sender::send(&started, ()).unwrap();
        }
        if over.load(Ordering::Acquire) == 1 && watch.fetch_add(1, Ordering::Relaxed) > 2 {
            power_off(machine);
        }
        thread::yield_now();
        Step::Next
    });
    let seen = std::mem::take(&mut *seen.lock().unwrap());
    (report.unwrap(), thread.join().unwrap(), seen)
}

/// Saves a machine once.
fn saved(dir: &TempDir, stop: bool, disks: KeepDisks) -> (Report, Saved, Vec<u64>) {
    let config = machine(dir);
    let (socket, request) = (dir.path("socket"), request(dir, stop, disks));
    let (report, answer, seen) = count(&config, move || {
        Client::connect(&socket).unwrap().ask(&request, &mut |_| {}).unwrap()
    });
    let Answer::Saved(saved) = answer else {
        panic!("{answer:?}")
    };
    (report, saved, seen)
}

/// A configuration with what a user says at a restore.
fn own(dir: &TempDir) -> Config {
    Config {
        disks: Vec::new(),
        ..config(dir)
    }
}

fn given(path: &Path) -> DiskConfig {
    DiskConfig {
        path: path.into(),
        read_only: false,
    }
}

/// Makes the copy that a user makes, and restores.
fn restored(dir: &TempDir) -> Result<Config, Error> {
    let copy = dir.path("copy.raw");
    let _ = fs::copy(dir.path("snap").join("disk0.raw"), &copy);
    Snapshot::open(&dir.path("snap"))?.into_config(vec![given(&copy)], own(dir))
}

/// Why a restore is refused; the VM has not run an instruction.
fn refusal(config: Result<Config, Error>) -> String {
    let ran = Arc::new(AtomicU64::new(0));
    let result = config.map_err(vm::Error::from).and_then(|config| {
        let ran = ran.clone();
        run(&config, &Control::new(), move |_, _, machine| {
            ran.fetch_add(1, Ordering::Relaxed);
            power_off(machine);
            Step::Next
        })
    });
    let error = result.expect_err("it is refused").to_string();
    assert_eq!(ran.load(Ordering::Relaxed), 0, "{error}");
    assert!(!error.contains('\n'), "{error}");
    error
}

#[test]
fn a_vm_runs_on_and_its_snapshot_goes_on_from_between_two_instructions() {
    let dir = TempDir::new();
    let (report, saved, seen) = saved(&dir, false, KeepDisks::Copy);
    assert_eq!(report.ending, Ending::PowerOff);
    assert!(
        seen.iter().copied().eq(ENTRY..ENTRY + seen.len() as u64),
        "no step is lost or repeated"
    );
    assert!(saved.memory > 0 && saved.disks == 70_000_u64.next_multiple_of(4096));
    assert!(saved.paused_ns > 0);
    assert!(!dir.path("socket").exists());

    let config = restored(&dir).unwrap();
    assert_eq!(
        (config.memory, config.model.cpus, &*config.cmdline),
        (4 << 20, 2, "quiet")
    );
    assert!(!Snapshot::open(&dir.path("snap")).unwrap().paused());
    let (_, (), after) = count(&config, || ());
    assert!(seen.contains(&after[0]) && after[0] > ENTRY, "{after:x?}");
}

#[test]
fn all_state_comes_back() {
    let dir = TempDir::new();
    let config = machine(&dir);
    let request = request(&dir, true, KeepDisks::Copy);
    let socket = dir.path("socket");
    let ran = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
    let seen = ran.clone();
    let thread = thread::spawn(move || {
        while seen.iter().any(|ran| ran.load(Ordering::Relaxed) < 2) {
            thread::yield_now();
        }
        Client::connect(&socket).unwrap().ask(&request, &mut |_| {}).unwrap()
    });
    let report = run(&config, &Control::new(), move |index, _, machine| {
        let before = ran[index as usize].fetch_add(1, Ordering::Relaxed);
        thread::yield_now();
        if index == 1 {
            return Step::Jump(RIP_OF_CPU_1);
        }
        if before == 0 {
            // COM1's scratch register is a device's state.
            machine.port_write(0x3ff, &[0xa5]);
        }
        Step::Jump(0x1234)
    });
    assert_eq!(report.unwrap().ending, Ending::Saved);
    thread.join().unwrap();
    let seen = Arc::new(Mutex::new([0_u64; 2]));
    let log = seen.clone();
    let report = run(&restored(&dir).unwrap(), &Control::new(), move |index, rip, machine| {
        let mut log = log.lock().unwrap();
        if log[index as usize] == 0 {
            log[index as usize] = rip;
        }
        let mut scratch = [0];
        machine.port_read(0x3ff, &mut scratch);
        assert_eq!(scratch, [0xa5]);
        if log[0] != 0 && log[1] != 0 {
            power_off(machine);
        }
        Step::Next
    });
    assert_eq!(report.unwrap().ending, Ending::PowerOff);
    let seen = *seen.lock().unwrap();
    assert_eq!(seen, [0x1234, RIP_OF_CPU_1]);
}

#[test]
fn a_snapshot_knows_whether_its_vm_was_paused_and_a_paused_one_goes_on_when_told() {
    let dir = TempDir::new();
    let (socket, save) = (dir.path("socket"), request(&dir, false, KeepDisks::Copy));
    let requests = [Request::Pause, save, Request::Resume];
    let (_, (), seen) = count(&machine(&dir), move || {
        let mut client = Client::connect(&socket).unwrap();
        for request in &requests {
            client.ask(request, &mut |_| {}).unwrap();
        }
    });
    let snapshot = || Snapshot::open(&dir.path("snap")).unwrap();
    assert!(snapshot().paused());

    let config = Config {
        paused: true,
        control: Some(dir.path("socket")),
        ..restored(&dir).unwrap()
    };
    let ran = Arc::new(Mutex::new(Vec::new()));
    let (log, socket) = (ran.clone(), dir.path("socket"));
    let vm = thread::spawn(move || {
        run(&config, &Control::new(), move |index, rip, machine| {
            log.lock().unwrap().push((index, rip));
            if index == 0 {
                power_off(machine);
            }
            Step::Halt
        })
    });
    let mut client = loop {
        match Client::connect(&socket) {
            Ok(client) => break client,
            Err(_) => thread::yield_now(),
        }
    };
    let mut ask = |request: &Request| client.ask(request, &mut |_| {}).unwrap();
    // It is saved as it was, however often.
    let again = Request::SnapshotSave {
        place: dir.path("snap"),
        force: true,
        stop: false,
        disks: KeepDisks::Copy,
    };
    assert!(matches!(ask(&again), Answer::Saved(_)));
    assert!(snapshot().paused() && seen.contains(&snapshot().first_rip()));
    assert!(matches!(ask(&Request::Status), Answer::Status(status) if status.condition == Condition::Paused));
    assert_eq!(*ran.lock().unwrap(), []);
    assert_eq!(ask(&Request::Resume), Answer::Done);
    assert_eq!(vm.join().unwrap().unwrap().ending, Ending::PowerOff);
    let (_, first) = ran
        .lock()
        .unwrap()
        .iter()
        .copied()
        .find(|(index, _)| *index == 0)
        .unwrap();
    assert_eq!(first, snapshot().first_rip());
}

#[test]
fn a_reset_after_a_restore_boots_the_kernel_of_the_snapshot() {
    let dir = TempDir::new();
    saved(&dir, true, KeepDisks::Copy);
    fs::remove_file(dir.path("kernel")).unwrap();
    let config = restored(&dir);
    dir.file("kernel", b"another");
    let lives = AtomicU64::new(0);
    let report = run(&config.unwrap(), &Control::new(), move |index, rip, machine| {
        if index == 1 {
            return Step::Halt;
        }
        match lives.fetch_add(1, Ordering::Relaxed) {
            0 => {
                assert!(rip > ENTRY);
                machine.port_write(0x602, &[1]);
            }
            _ => {
                assert_eq!(rip, ENTRY);
                power_off(machine);
            }
        }
        Step::Next
    });
    let report = report.unwrap();
    assert_eq!((report.ending, report.reboots), (Ending::PowerOff, 1));
}

#[test]
fn two_saves_one_after_the_other_are_two_moments() {
    let dir = TempDir::new();
    let config = machine(&dir);
    let (socket, [a, b]) = (dir.path("socket"), ["a", "b"].map(|name| dir.path(name)));
    count(&config, move || {
        let mut client = Client::connect(&socket).unwrap();
        for place in [a, b] {
            let request = Request::SnapshotSave {
                place,
                force: false,
                stop: false,
                disks: KeepDisks::Copy,
            };
            client.ask(&request, &mut |_| {}).unwrap();
        }
    });
    let rip = |name: &str| Snapshot::open(&dir.path(name)).unwrap().first_rip();
    assert!(rip("a") <= rip("b") && rip("a") > ENTRY);
}

#[test]
fn disks_that_stay_where_they_are_must_not_change() {
    let dir = TempDir::new();
    saved(&dir, true, KeepDisks::Reference);
    let restore = || Snapshot::open(&dir.path("snap"))?.into_config(Vec::new(), own(&dir));
    let (report, (), _) = count(&restore().unwrap(), || ());
    assert_eq!(report.ending, Ending::PowerOff);
    for name in ["base.raw", "data.raw"] {
        let old = fs::metadata(dir.path(name)).unwrap().modified().unwrap();
        dir.file(name, &[0; 70_000]);
        let text = refusal(restore());
        assert!(text.contains(name) && text.contains("has changed"), "{text}");
        // Not only the time counts: another file with the same one is another file.
        fs::copy(dir.path(name), dir.path("other")).unwrap();
        fs::File::open(dir.path("other")).unwrap().set_modified(old).unwrap();
        fs::rename(dir.path("other"), dir.path(name)).unwrap();
        assert!(refusal(restore()).contains("has changed"));
        fs::remove_file(dir.path(name)).unwrap();
        let text = refusal(restore());
        assert!(text.contains(name), "{text}");
        dir.file(name, &[0; 70_000]);
        // Whoever names it takes it as it is.
        if name == "base.raw" {
            let both = vec![given(&dir.path("data.raw")), given(&dir.path("base.raw"))];
            let config = Snapshot::open(&dir.path("snap")).unwrap().into_config(both, own(&dir));
            count(&config.unwrap(), || ());
            // Back to what it was is not possible, so the next disk is looked at alone.
            fs::remove_dir_all(dir.path("snap")).unwrap();
            dir.file("data.raw", &[8; 70_000]);
            saved(&dir, true, KeepDisks::Reference);
        }
    }
}

#[test]
fn a_copied_disk_is_never_written_and_its_copy_is_checked() {
    let dir = TempDir::new();
    saved(&dir, true, KeepDisks::Copy);
    let inside = dir.path("snap").join("disk0.raw");
    let restore = |disks| Snapshot::open(&dir.path("snap"))?.into_config(disks, own(&dir));
    let text = refusal(restore(Vec::new()));
    assert!(
        text.contains(&format!("cp --reflink=auto --sparse=always {}", inside.display())),
        "{text}"
    );
    assert!(text.contains("--disk NEW0") && !text.contains("NEW1"), "{text}");
    let text = refusal(restore(vec![given(&inside)]));
    assert!(text.contains("cp --reflink=auto"), "{text}");
    let link = dir.path("link.raw");
    fs::hard_link(&inside, &link).unwrap();
    assert!(refusal(restore(vec![given(&link)])).contains("cp --reflink=auto"));
    let copy = dir.path("copy.raw");
    fs::copy(&inside, &copy).unwrap();
    let mut bytes = fs::read(&copy).unwrap();
    bytes[66_000] ^= 1;
    fs::write(&copy, &bytes).unwrap();
    let text = refusal(restore(vec![given(&copy)]));
    assert!(text.contains("copy.raw is not a copy of"), "{text}");
    bytes.truncate(66_000);
    fs::write(&copy, &bytes).unwrap();
    let text = refusal(restore(vec![given(&copy)]));
    assert!(text.contains("bytes"), "{text}");
    let three = vec![given(&copy), given(&copy), given(&copy)];
    assert!(refusal(restore(three)).contains("2 disks"));
    let read_only = DiskConfig {
        read_only: true,
        ..given(&copy)
    };
    assert!(refusal(restore(vec![read_only])).contains("without ,ro"));
}

#[test]
fn a_missing_file_is_named() {
    let dir = TempDir::new();
    saved(&dir, true, KeepDisks::Copy);
    for entry in fs::read_dir(dir.path("snap")).unwrap() {
        let path = entry.unwrap().path();
        let (name, away) = (
            path.file_name().unwrap().to_str().unwrap().to_string(),
            dir.path("away"),
        );
        fs::rename(&path, &away).unwrap();
        let text = refusal(restored(&dir));
        assert!(text.contains(&name), "{name}: {text}");
        fs::rename(&away, &path).unwrap();
    }
    assert!(refusal(Snapshot::open(&dir.path("nothing")).map(|_| own(&dir))).contains("nothing"));
    assert!(refusal(Snapshot::open(&dir.path("kernel")).map(|_| own(&dir))).contains("not a snapshot"));
}

#[test]
fn a_newer_format_is_refused() {
    let dir = TempDir::new();
    saved(&dir, true, KeepDisks::Copy);
    let manifest = dir.path("snap").join("manifest.json");
    let text = fs::read_to_string(&manifest).unwrap();
    fs::write(&manifest, text.replacen("\"format\": 1", "\"format\": 2", 1)).unwrap();
    let text = refusal(restored(&dir));
    assert!(text.contains("format 2") && text.contains("newer"), "{text}");
}

#[test]
fn flipped_bits_anywhere_are_refused_or_harmless() {
    let dir = TempDir::new();
    saved(&dir, true, KeepDisks::Copy);
    let mut random = Random(21);
    let mut files: Vec<_> = fs::read_dir(dir.path("snap"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    assert_eq!(files.len(), 8);
    let (_, (), whole) = count(&restored(&dir).unwrap(), || ());
    let (mut refused, mut harmless) = (0, 0);
    for round in 0..160 {
        let path = &files[round % files.len()];
        let bytes = fs::read(path).unwrap();
        let mut flipped = bytes.clone();
        let at = random.below(bytes.len() as u64) as usize;
        flipped[at] ^= 1 << random.below(8);
        fs::write(path, &flipped).unwrap();
        match restored(&dir) {
            Err(error) => {
                assert!(!error.to_string().is_empty());
                refused += 1;
            }
            Ok(config) => {
                let loaded = Mutex::new(None);
                let checked = vm::run(
                    &config,
                    &|ram, _| {
                        *loaded.lock().unwrap() = Some(ram);
                        Err(posada_engine::Error::Host("that is enough".into()))
                    },
                    &Control::new(),
                );
                match checked {
                    Err(vm::Error::Engine(_)) => harmless += 1,
                    Err(_) => {
                        assert!(loaded.lock().unwrap().is_none());
                        refused += 1;
                    }
                    Ok(_) => unreachable!("there is no engine"),
                }
            }
        }
        fs::write(path, &bytes).unwrap();
    }
    // The manifest has some white space, and RAM and the disk have holes that nobody reads.
    assert!(refused > 100 && harmless > 0, "{refused} refused, {harmless} harmless");
    let (_, (), after) = count(&restored(&dir).unwrap(), || ());
    assert_eq!(whole[0], after[0]);
}

#[test]
fn a_machine_of_another_shape_is_refused() {
    let dir = TempDir::new();
    saved(&dir, true, KeepDisks::Copy);
    let mut config = restored(&dir).unwrap();
    config.virtio_console = true;
    let text = refusal(Ok(config));
    assert!(text.contains("does not fit") && text.contains("console"), "{text}");
}

#[test]
fn a_save_that_is_given_up_leaves_nothing_and_the_vm_running() {
    let dir = TempDir::new();
    let config = config(&dir);
    for stop in [false, true] {
        for phase in [Phase::Memory, Phase::Sync] {
            let control = Control::new();
            let subject = Subject {
                source: Source::open(&config.kernel, None, "").unwrap(),
                config: config.clone(),
                disks: Vec::new(),
            };
            let options = Options {
                place: dir.path("snap"),
                force: false,
                stop,
                disks: KeepDisks::Copy,
            };
            let saver = control.clone();
            let (report, result, seen) = count_under(&control, &config, move || {
                let mut watch = |progress: Progress| match progress.phase == phase {
                    true => ControlFlow::Break(()),
                    false => ControlFlow::Continue(()),
                };
                save(&saver, &subject, &options, &mut watch)
            });
            assert!(matches!(result, Err(Error::Cancelled)), "{result:?}");
            assert_eq!(report.ending, Ending::PowerOff);
            assert!(seen.iter().copied().eq(ENTRY..ENTRY + seen.len() as u64));
            assert_eq!(dir.names(), ["kernel"]);
        }
    }
}
