use super::*;
use crate::testing::{ENTRY, Step, TempDir, config, model, run};
use std::sync::atomic::{AtomicU64, Ordering};

fn power_off(machine: &dyn posada_engine::Machine) {
    machine.port_write(0x600, &[5 << 2 | 1 << 5]);
}

#[test]
fn power_off_ends_the_vm_and_halted_vcpus_with_it() {
    let dir = TempDir::new();
    let config = Config {
        model: model(3),
        ..config(&dir)
    };
    let report = run(&config, &Control::new(), |index, rip, machine| {
        match (index, rip.wrapping_sub(ENTRY)) {
            (0, 9) => {
                power_off(machine);
                Step::Next
            }
            (0, _) => Step::Next,
            _ => Step::Halt,
        }
    });
    let report = report.unwrap();
    assert_eq!(report.ending, Ending::PowerOff);
    assert_eq!(
        report.counters.instructions, 10,
        "a vCPU does not run on behind its power-off"
    );
    assert_eq!(report.reboots, 0);
}

#[test]
fn a_reset_builds_everything_anew_and_keeps_the_disks_lock_and_the_console() {
    let dir = TempDir::new();
    let path = dir.file("disk", &[0; 4096]);
    let config = Config {
        disks: vec![DiskConfig {
            path: path.clone(),
            read_only: false,
        }],
        console: ConsoleConfig::File(dir.path("log")),
        ..config(&dir)
    };
    let lives = AtomicU64::new(0);
    let report = run(&config, &Control::new(), move |_, rip, machine| {
        assert_eq!(rip, ENTRY);
        assert!(matches!(open_disk(&path, true), Err(DiskError::Locked { .. })));
        // COM1's scratch register has been reset.
        let mut scratch = [0];
        machine.port_read(0x3ff, &mut scratch);
        assert_eq!(scratch, [0]);
        machine.port_write(0x3ff, &[7]);
        let life = lives.fetch_add(1, Ordering::Relaxed);
        machine.port_write(0x3f8, &[b'0' + life as u8]);
        match life {
            0 => machine.port_write(0x602, &[1]),
            1 => machine.port_write(0xcf9, &[6]),
            2 => machine.port_write(0x64, &[0xfe]),
            _ => power_off(machine),
        }
        Step::Next
    });
    let report = report.unwrap();
    assert_eq!(
        (report.ending, report.reboots, report.counters.instructions),
        (Ending::PowerOff, 3, 4)
    );
    assert_eq!(std::fs::read(dir.path("log")).unwrap(), b"0123");
    assert!(report.touched > 0);
}

#[test]
fn a_vsock_stays_through_a_reset_and_goes_at_the_end() {
    let dir = TempDir::new();
    let vsock = VsockConfig {
        path: dir.path("vsock"),
        cid: 9,
    };
    let config = Config {
        vsock: Some(vsock.clone()),
        ..config(&dir)
    };
    let (lives, early) = (AtomicU64::new(0), Mutex::new(None));
    let report = run(&config, &Control::new(), move |_, _, machine| {
        // Behind the random numbers: its context id, where the device configuration is.
        let mut cid = [0; 8];
        machine.mmio_read(crate::layout::PCI_WINDOW.start + 0x8000 + 0x2000, &mut cid);
        assert_eq!(cid, 9_u64.to_le_bytes());
        let mut early = early.lock().unwrap();
        match lives.fetch_add(1, Ordering::Relaxed) {
            0 => {
                *early = Some(std::os::unix::net::UnixStream::connect(&vsock.path).unwrap());
                machine.port_write(0xcf9, &[6]);
            }
            _ => {
                assert!(early.take().unwrap().take_error().unwrap().is_none());
                power_off(machine);
            }
        }
        Step::Next
    });
    assert_eq!(report.unwrap().reboots, 1);
    assert_eq!(dir.names(), ["kernel"]);
}

#[test]
fn with_no_reboot_a_reset_ends_the_vm() {
    let dir = TempDir::new();
    let config = Config {
        no_reboot: true,
        ..config(&dir)
    };
    let report = run(&config, &Control::new(), |_, _, machine| {
        machine.port_write(0x602, &[1]);
        Step::Next
    });
    assert_eq!(report.unwrap().ending, Ending::Reset);
}

#[test]
fn the_debug_exit_port_is_there_only_on_request() {
    let dir = TempDir::new();
    let mut config = config(&dir);
    let program = |_: u32, _: u64, machine: &dyn posada_engine::Machine| {
        machine.port_write(0xf4, &[0x10]);
        power_off(machine);
        Step::Next
    };
    assert_eq!(
        run(&config, &Control::new(), program).unwrap().ending,
        Ending::DebugExit(0x21)
    );
    config.debug_exit = false;
    assert_eq!(run(&config, &Control::new(), program).unwrap().ending, Ending::PowerOff);
}

#[test]
fn a_triple_fault_is_a_crash_with_its_report() {
    let dir = TempDir::new();
    let report = run(&config(&dir), &Control::new(), |_, _, _| {
        Step::Exit(Exit::TripleFault("registers".into()))
    });
    let report_text = "registers".to_string();
    let expected = Ending::Crash {
        cpu: 0,
        report: report_text,
    };
    assert_eq!(report.unwrap().ending, expected);
}

#[test]
fn a_stop_from_outside_ends_a_vm_that_loops_or_sleeps_or_resets() {
    for program in [
        (|_, _, _: &dyn posada_engine::Machine| Step::Jump(ENTRY)) as fn(u32, u64, &dyn posada_engine::Machine) -> Step,
        |_, _, _| Step::Halt,
        |_, _, machine| {
            machine.port_write(0x602, &[1]);
            Step::Next
        },
    ] {
        let dir = TempDir::new();
        let (config, control) = (config(&dir), Control::new());
        let ran = Arc::new(AtomicU64::new(0));
        let (seen, stopper) = (ran.clone(), control.clone());
        let report = run(&config, &control, move |index, rip, machine| {
            if seen.fetch_add(1, Ordering::Relaxed) == 0 {
                let stopper = stopper.clone();
                thread::spawn(move || stopper.end(Ending::Signal(libc::SIGTERM)));
            }
            program(index, rip, machine)
        });
        assert_eq!(report.unwrap().ending, Ending::Signal(libc::SIGTERM));
        assert!(ran.load(Ordering::Relaxed) > 0);
    }
}

#[test]
fn a_stop_before_the_start_is_not_lost() {
    let (dir, control) = (TempDir::new(), Control::new());
    control.end(Ending::Quit);
    let report = run(&config(&dir), &control, |_, _, _| Step::Halt);
    assert_eq!(report.unwrap().ending, Ending::Quit);
}

#[test]
fn bad_input_is_one_sentence_and_leaves_nothing_behind() {
    let dir = TempDir::new();
    let good = Config {
        console: ConsoleConfig::File(dir.path("log")),
        gdb: Some(gdb::Address::Unix(dir.path("gdb"))),
        ..config(&dir)
    };
    let foreign = dir.file("foreign", b"no kernel at all");
    let disk = |path| vec![DiskConfig { path, read_only: false }];
    let cases = [
        Config {
            model: model(0),
            ..good.clone()
        },
        Config {
            model: model(300),
            ..good.clone()
        },
        Config {
            memory: 0,
            ..good.clone()
        },
        Config {
            memory: 4097,
            ..good.clone()
        },
        Config {
            memory: 1 << 20,
            ..good.clone()
        },
        Config {
            memory: 1 << 52,
            ..good.clone()
        },
        Config {
            memory: u64::MAX - 4095,
            ..good.clone()
        },
        Config {
            kernel: dir.path("missing"),
            ..good.clone()
        },
        Config {
            kernel: foreign.clone(),
            ..good.clone()
        },
        Config {
            initramfs: Some(dir.path("missing")),
            ..good.clone()
        },
        Config {
            disks: disk(dir.path("missing")),
            ..good.clone()
        },
        Config {
            console: ConsoleConfig::File(dir.path("no/log")),
            ..good.clone()
        },
        Config {
            gdb: Some(gdb::Address::Unix(dir.path("no/gdb"))),
            ..good.clone()
        },
    ];
    for config in cases {
        let error = run(&config, &Control::new(), |_, _, _| Step::Halt)
            .unwrap_err()
            .to_string();
        assert!(!error.contains('\n') && error.len() > 20, "{error}");
        assert_eq!(dir.names(), ["foreign", "kernel"], "{error}");
    }
}

#[test]
fn random_accesses_to_ports_and_the_mmio_hole_never_panic() {
    let dir = TempDir::new();
    let path = dir.file("disk", &[0; 4096]);
    let config = Config {
        disks: vec![DiskConfig { path, read_only: false }],
        virtio_console: true,
        no_reboot: true,
        ..config(&dir)
    };
    let random = Mutex::new(crate::testing::Random(3));
    let report = run(&config, &Control::new(), move |_, _, machine| {
        let mut random = random.lock().unwrap();
        for _ in 0..200_000 {
            let mut data = vec![random.below(256) as u8; 1 << random.below(3)];
            let port = random.below(0x1_0000) as u16;
            machine.port_read(port, &mut data);
            // Where a guest can end its machine, it would.
            if !matches!(port, 0x61..=0x64 | 0xf1..=0xf7 | 0x5fd..=0x603 | 0xcf6..=0xcf9) {
                machine.port_write(port, &data);
            }
            let mut data = vec![random.below(256) as u8; 1 << random.below(7)];
            let base = [0xc000_0000, 0xe000_0000, 0xfec0_0000][random.below(3) as usize];
            let reach = [0x1_0000, 0x1000_0000][random.below(2) as usize];
            let gpa = base + random.below(reach);
            machine.mmio_read(gpa, &mut data);
            machine.mmio_write(gpa, &data);
        }
        power_off(machine);
        Step::Next
    });
    assert_eq!(report.unwrap().ending, Ending::PowerOff);
}
