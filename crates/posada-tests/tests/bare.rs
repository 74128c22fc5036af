//! The bare programs of `guest/bare` in a VM: what user mode cannot reach, and guests that end badly.

use posada_tests::{Ended, Folder, Launch, Place, Process, bare_program};
use std::process::Command;
use std::time::Duration;

fn bare(name: &str, cpus: u32) -> Launch {
    Launch::run()
        .kernel(bare_program(name))
        .cpus(cpus)
        .memory("64M")
        .arg("--debug-exit")
}

/// Runs a program that checks things; all of them must hold.
fn all_ok(name: &str, cpus: u32) {
    all_hold(&bare(name, cpus));
}

fn all_hold(launch: &Launch) {
    let ended = launch.start().end();
    let failures: Vec<&str> = ended.output.lines().filter(|line| line.contains("FAIL")).collect();
    if !failures.is_empty() {
        ended.fail(&format!(
            "{} checks failed:\n{}\nwanted none",
            failures.len(),
            failures.join("\n")
        ));
    }
    ended.expect_code(33);
    // The program counts too: a line that was lost is not one that held.
    let held = ended.output.lines().filter(|line| line.starts_with("ok ")).count();
    if held == 0 || !ended.output.contains(&format!("done: {held} checks, 0 failed")) {
        ended.fail(&format!("wanted the {held} checks that were seen to be all"));
    }
}

macro_rules! all_checks_hold {
    ($($test:ident: $program:literal on $cpus:literal;)*) => {
        $(#[test]
        fn $test() {
            all_ok($program, $cpus);
        })*

        /// All the programs above, and how many processors they are for.
        const CHECKS: &[(&str, u32)] = &[$(($program, $cpus)),*];
    };
}

all_checks_hold! {
    a_program_says_hello: "hello" on 1;
    four_level_paging_is_as_the_manual_says: "paging" on 1;
    paging_of_32_bits_and_pae_is_as_the_manual_says: "paging32" on 1;
    exceptions_are_as_the_manual_says: "exceptions" on 1;
    exceptions_of_32_bits_are_as_the_manual_says: "exceptions32" on 1;
    debug_registers_and_single_step_work: "debug" on 1;
    modes_change_there_and_back: "modes" on 1;
    the_local_apic_is_as_the_manual_says: "apic" on 1;
    the_local_apic_is_the_same_beside_others: "apic" on 2;
    timers_reach_a_cpu_that_computes_in_time: "timer" on 1;
    code_may_change_itself: "selfmod" on 1;
    code_may_be_changed_by_another_cpu: "selfmod" on 2;
    one_cpu_loses_no_wake_up: "smp" on 1;
    two_cpus_agree: "smp" on 2;
    four_cpus_agree: "smp" on 4;
    eight_cpus_agree: "smp" on 8;
    a_hostile_guest_harms_nobody: "hostile" on 1;
    a_hostile_guest_with_two_cpus_harms_nobody: "hostile" on 2;
}

/// More code than the cache of a translator holds, and code that goes wrong in every way, in bounded memory.
#[test]
fn code_may_be_more_than_a_cache_holds() {
    let folder = Folder::new();
    let summary = folder.path().join("summary");
    let launch = bare("churn", 1).arg("--translation-cache").arg("2M");
    let launch = launch.arg("--count-lookups");
    all_hold(&launch.arg("--summary").arg(&summary));
    let text = std::fs::read_to_string(&summary).expect("it was asked for");
    let summary: serde_json::Value = serde_json::from_str(&text).expect("it is JSON");
    let bytes = |name: &str| summary[name].as_u64().expect("a number");
    let own = bytes("peak_resident_bytes") - bytes("touched_guest_bytes");
    assert!(own < 32 << 20, "{own} bytes: {text}");
    if let Some(translation) = summary.get("translation") {
        assert!(translation["evictions"].as_u64() > Some(100), "{text}");
        let rate = translation["tlb_hit_rate"].as_f64().expect("lookups are counted");
        // In check mode each block begins with nothing looked up.
        let least = if translation["judged"] == 0 { 0.5 } else { 0.0 };
        assert!((least..1.0).contains(&rate), "{text}");
    }
}

/// Code that other processors and a disk change while it runs. Not for the test host: what QEMU has translated there may be what
/// was patched meanwhile.
fn running_code_changes(cpus: u32) {
    let folder = Folder::new();
    let sector = |number: u32| {
        // Two NOPs, mov $number, %eax, ret: see guest/bare/patch.c.
        let mut bytes = [&[0x90, 0x90, 0xb8][..], &number.to_le_bytes(), &[0xc3]].concat();
        bytes.resize(512, 0x90);
        bytes
    };
    let disk = folder.file("code.raw", &(0..64).flat_map(sector).collect::<Vec<u8>>());
    all_hold(&bare("patch", cpus).disk(disk));
}

#[test]
fn running_code_may_be_changed_by_a_device() {
    running_code_changes(1);
}

#[test]
fn running_code_may_be_changed_by_a_device_or_another_cpu() {
    running_code_changes(2);
}

#[test]
fn running_code_may_be_changed_on_four_cpus() {
    running_code_changes(4);
}

fn triple_fault(place: &Place) {
    let ended = place.start(&bare("triplefault", 1)).end();
    ended.expect_code(2);
    if !ended.errors.starts_with("posada: the guest crashed") || !ended.errors.to_lowercase().contains("rip") {
        ended.fail("wanted a report with registers");
    }
}

fn power_off(place: &Place) {
    let ended = place.start(&bare("poweroff", 2)).end();
    ended.expect_code(0);
    if !ended.output.contains("powering off") || !ended.errors.is_empty() {
        ended.fail("wanted a quiet end");
    }
}

fn stop_spinning(place: &Place, cpus: u32, signal: i32) -> Ended {
    let mut vm = place.start(&bare("spin", cpus));
    vm.expect("spinning").signal(signal);
    vm.end()
}

#[test]
fn a_guest_that_takes_no_interrupts_stops_on_sigterm() {
    stop_spinning(&Place::Here, 1, libc::SIGTERM).expect_code(128 + libc::SIGTERM);
    stop_spinning(&Place::Here, 2, libc::SIGTERM).expect_code(128 + libc::SIGTERM);
}

#[test]
fn a_guest_that_takes_no_interrupts_stops_on_ctrl_c() {
    stop_spinning(&Place::Here, 1, libc::SIGINT).expect_code(128 + libc::SIGINT);
}

fn reset(place: &Place) {
    for way in ["acpi", "keyboard", "cf9"] {
        let mut vm = place.start(&bare("reset", 2).cmdline(way));
        vm.expect("up\n").expect("up\n").expect("up\n").signal(libc::SIGTERM);
        vm.end().expect_code(128 + libc::SIGTERM);
    }
}

fn reset_without_reboot(place: &Place) {
    for way in ["acpi", "keyboard", "cf9"] {
        let ended = place.start(&bare("reset", 1).cmdline(way).arg("--no-reboot")).end();
        ended.expect_code(0);
        assert_eq!(ended.output, "up\n");
    }
}

#[test]
fn a_triple_fault_ends_the_vm_with_a_report() {
    triple_fault(&Place::Here);
}

#[test]
fn power_off_ends_the_vm_with_0() {
    power_off(&Place::Here);
}

#[test]
fn a_reset_starts_the_guest_again() {
    reset(&Place::Here);
}

#[test]
fn a_reset_ends_the_vm_where_no_reboot_is_wanted() {
    reset_without_reboot(&Place::Here);
}

/// Checks that KVM itself fails, on a CPU that does not, or that QEMU's CPU fails below KVM only: each is explained in
/// `docs/engines.md`.
const OF_KVM: [(&str, &str); 8] = [
    ("exceptions", "the interrupt comes one instruction behind STI"),
    ("exceptions", "#GP whose gate is not present"),
    ("debug", "an I/O break point"),
    ("apic", "nor when unmasked afterwards"),
    ("apic", "once"),
    ("apic", "EOI takes only 0"),
    ("apic", "reserved bits of the TPR"),
    ("smp", "no interrupt between STI and HLT"),
];

/// The checks that a program made, and whether they held.
fn checks(output: &str) -> Vec<(&str, bool)> {
    let check = |line| match str::strip_prefix(line, "FAIL ") {
        Some(failed) => Some((failed.split(": want ").next()?, false)),
        None => Some((str::strip_prefix(line, "ok ")?, true)),
    };
    output.lines().filter_map(check).collect()
}

fn names<'a>(checks: &[(&'a str, bool)]) -> Vec<&'a str> {
    checks.iter().map(|(name, _)| *name).collect()
}

/// Runs a program on the CPU that a test host has, without KVM: it is QEMU's, and not always as the manual says.
fn on_the_cpu_below(name: &str, cpus: u32) -> Ended {
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-accel", "tcg", "-cpu", "max", "-m", "64M", "-smp", &cpus.to_string()])
        .args(["-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio"])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-kernel"])
        .arg(bare_program(name));
    Process::start(&mut command, Duration::from_secs(120)).end()
}

/// On KVM a program makes the checks that it makes on the software CPU, or on the CPU below where that has less. They
/// hold, but for those that the CPU below or KVM itself is known to fail.
#[test]
fn on_kvm_the_programs_say_what_they_say_on_the_software_cpu() {
    let Some(place) = Place::kvm() else { return };
    let explanations = include_str!("../../../docs/engines.md");
    for (program, cpus) in CHECKS {
        let (here, below) = (bare(program, *cpus).start().end(), on_the_cpu_below(program, *cpus));
        let there = place.start(&bare(program, *cpus).cmdline("tcg")).end();
        let (here, below, checked) = (checks(&here.output), checks(&below.output), checks(&there.output));
        let fails_below = |name: &str| below.contains(&(name, false));
        for (name, held) in &checked {
            let known = OF_KVM.contains(&(*program, *name));
            if !held && !known && !fails_below(name) {
                there.fail(&format!("{program} with {cpus} vCPUs: wanted {name:?} to hold"));
            }
            assert!(
                !known || explanations.contains(name),
                "docs/engines.md does not explain {name:?}"
            );
        }
        let made = names(&checked);
        match there.code {
            Some(33 | 35) if made == names(&here) || made == names(&below) => (),
            _ => there.fail(&format!(
                "{program} with {cpus} vCPUs: wanted the checks of the software CPU"
            )),
        }
    }
}

#[test]
fn on_kvm_guests_end_as_they_do_on_the_software_cpu() {
    let Some(place) = Place::kvm() else { return };
    triple_fault(&place);
    power_off(&place);
    reset(&place);
    reset_without_reboot(&place);
    for (cpus, signal) in [(1, libc::SIGTERM), (2, libc::SIGTERM), (1, libc::SIGINT)] {
        stop_spinning(&place, cpus, signal).expect_code(128 + signal);
    }
}
