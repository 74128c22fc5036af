//! `--accel`: what `auto` chooses here and in the test host, how the choice is told and kept, and what a user without KVM
//! is told.

use posada_tests::{Ended, Folder, Launch, Process, TestHost, bare_program, posada};
use serde_json::Value;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(120);

/// A machine that runs `posada`: this one or a test host.
struct Host<'a> {
    nested: Option<&'a TestHost>,
    /// Its folder for caches.
    cache: &'a str,
}

impl Host<'_> {
    fn start(&self, command: &mut Command) -> Process {
        command.env("XDG_CACHE_HOME", self.cache);
        match self.nested {
            Some(host) => host.start_command(command, PATIENCE),
            None => Process::start(command, PATIENCE),
        }
    }

    /// `posada doctor` on the engine.
    fn doctor(&self, arguments: &[&str]) -> Value {
        let ended = self
            .start(Command::new(posada()).args(["doctor", "--json"]).args(arguments))
            .end();
        let checks: Value = serde_json::from_str(&ended.expect_code(0).output).expect("it prints JSON");
        let engine = checks
            .as_array()
            .and_then(|checks| checks.iter().find(|check| check["name"] == "engine"));
        engine
            .cloned()
            .unwrap_or_else(|| ended.fail("wanted a check \"engine\""))
    }

    /// The program `hello`, with what is logged about the engine.
    fn hello(&self, accel: &[&str]) -> Ended {
        let mut command = Command::new(posada());
        command
            .args(["run", "--memory", "64M", "--debug-exit", "--kernel"])
            .arg(bare_program("hello"))
            .args(accel)
            .env("POSADA_LOG", "posada=info");
        let ended = self.start(&mut command).end();
        ended.expect_code(33);
        ended
    }
}

/// The line that is logged on the choice of an engine.
fn logged(ended: &Ended) -> &str {
    let line = ended.errors.lines().find(|line| line.contains("engine chosen"));
    line.unwrap_or_else(|| ended.fail("wanted the engine logged"))
}

/// The lines that are for the user.
fn notices(ended: &Ended) -> Vec<&str> {
    ended
        .errors
        .lines()
        .filter(|line| line.starts_with("posada: "))
        .collect()
}

/// `auto` on a machine where it must choose `engine`, having measured.
fn chooses(host: &Host<'_>, engine: &str) {
    let first = host.doctor(&["--probe"]);
    let found = first["found"].as_str().expect("a text");
    assert!(found.starts_with(engine) && found.contains("measured now"), "{found}");
    let figures = &first["figures"];
    assert!(figures["boot_seconds"]["emulator"].as_f64() > Some(0.0), "{figures}");

    // The choice is kept, with its figures.
    let second = host.doctor(&[]);
    assert_eq!(second["figures"]["cached"], true);
    assert_eq!(second["figures"]["costs"], figures["costs"]);
    assert_eq!(
        second["found"],
        found.replace("measured now", "measured before, in this boot")
    );

    // A VM runs on it, says so in the log, and tells the user if it is the software CPU.
    for accel in [&["--accel", "auto"][..], &[]] {
        let ended = host.hello(accel);
        let line = logged(&ended);
        assert!(line.contains(engine) && line.contains("cached=true"), "{line}");
        let notices = notices(&ended);
        if engine == "KVM" {
            assert_eq!(notices, [""; 0]);
        } else {
            assert!(
                notices.len() == 1 && notices[0].contains("KVM") && notices[0].contains("--accel emulate"),
                "{notices:?}"
            );
        }
    }
    // And it can be overridden.
    let ended = host.hello(&["--accel", "emulate"]);
    assert!(
        logged(&ended).contains("the software CPU") && notices(&ended).is_empty(),
        "{}",
        ended.errors
    );
}

/// True where KVM is known to be there only by name: the host's own hypervisor has taken the processor's virtualisation, and
/// what KVM has left (module kvm_pvm) emulates the guest's kernel.
fn kvm_only_by_name() -> bool {
    Path::new("/sys/module/kvm_pvm").exists()
}

#[test]
fn auto_chooses_here_what_this_machine_bears() {
    let cache = Folder::new();
    let host = Host {
        nested: None,
        cache: cache.path().to_str().expect("tests use plain names"),
    };
    let engine = host.doctor(&["--probe"]);
    let boots = &engine["figures"]["boot_seconds"];
    let faster = boots["kvm"]
        .as_f64()
        .is_some_and(|kvm| boots["emulator"].as_f64().is_some_and(|emulator| kvm < emulator));
    if engine["figures"].is_null() {
        // There is nothing to measure.
        let ended = host.hello(&["--accel", "auto"]);
        assert!(logged(&ended).contains("the software CPU"), "{}", ended.errors);
        assert!(notices(&ended)[0].contains("/dev/kvm"), "{}", ended.errors);
    } else if kvm_only_by_name() || !faster {
        chooses(&host, "the software CPU");
    } else {
        chooses(&host, "KVM");
    }
}

#[test]
fn on_kvm_auto_chooses_it_and_does_without_where_there_is_none() {
    let Some(nested) = TestHost::start() else { return };
    let host = Host {
        nested: Some(&nested),
        cache: "/tmp/cache",
    };
    chooses(&host, "KVM");
    // Each time: the probe's timer must not be able to slip in before its processor sleeps.
    for _ in 0..10 {
        let engine = host.doctor(&["--probe"]);
        assert!(
            engine["found"].as_str().is_some_and(|found| found.starts_with("KVM")),
            "{engine}"
        );
    }
    assert!(logged(&host.hello(&["--accel", "kvm"])).contains("KVM"));
    // Another cache, another program or a damaged file: it is measured again, and comes out the same.
    nested.run("echo '{' >/tmp/cache/posada/accel.json").success();
    let line = host.hello(&[]);
    assert!(
        logged(&line).contains("engine=KVM") && logged(&line).contains("cached=false"),
        "{}",
        line.errors
    );

    // A user who is in no group.
    nested
        .run(
            "mkdir -p /etc && echo kvm:x:108: >>/etc/group && echo nobody:x:65534:65534::/tmp:/bin/sh >>/etc/passwd && \
             chown 0:108 /dev/kvm && chmod 660 /dev/kvm",
        )
        .success();
    let run = |accel: &str| {
        let program = bare_program("hello");
        nested.run(&format!(
            "su nobody -c '{} run --memory 64M --debug-exit --kernel {} --accel {accel}' </dev/null 2>&1",
            posada().display(),
            program.display()
        ))
    };
    let told = "belongs to the group kvm; have yourself added (sudo usermod -aG kvm";
    let answer = run("kvm");
    assert!(
        answer.status == 125 && answer.output.contains(told),
        "{}",
        answer.output
    );
    let answer = run("auto");
    assert!(answer.status == 33 && answer.output.contains(told), "{}", answer.output);

    // No device.
    nested.run("rm /dev/kvm").success();
    let told = "there is no /dev/kvm: load the kernel's module (modprobe kvm_amd)";
    let refused = Launch::command(["run", "--accel", "kvm", "--kernel"])
        .arg(bare_program("hello"))
        .start_in(&nested)
        .end();
    refused.expect_code(125);
    assert!(
        refused.errors.contains(told) && refused.errors.trim_end().lines().count() == 1,
        "{}",
        refused.errors
    );
    let ended = host.hello(&[]);
    assert!(logged(&ended).contains("the software CPU"), "{}", ended.errors);
    let notices = notices(&ended);
    assert!(notices.len() == 1 && notices[0].contains(told), "{notices:?}");
}
