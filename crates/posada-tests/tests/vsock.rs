//! Programs of the host and of a Debian guest reach each other by --vsock.

use posada_tests::{Folder, Launch, Place, Process, Shell, debian, root_disk, script_disk};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// A busy machine makes minutes of seconds.
const PATIENCE: Duration = Duration::from_secs(300);
/// `guest/vsock.py` on the second disk.
const SCRIPT: &str = "python3 /dev/vdb";
const PEER: &str = env!("CARGO_BIN_EXE_vsock-peer");

/// Where a VM runs, and the programs of its host.
struct Site {
    place: Place,
    folder: Folder,
    peer: PathBuf,
}

impl Site {
    fn new(place: Place) -> Self {
        let folder = place.folder();
        let peer = match &place {
            Place::Here => PEER.into(),
            Place::Kvm(host) => {
                host.put(PEER.as_ref(), "/tmp");
                Path::new("/tmp").join(Path::new(PEER).file_name().unwrap())
            }
        };
        Self { place, folder, peer }
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().into()
    }

    /// Debian with [`SCRIPT`], at a prompt.
    fn debian(&self) -> Shell {
        let script = script_disk(&self.folder, include_str!("../guest/vsock.py"));
        let root = match &self.place {
            Place::Here => root_disk(&self.folder),
            Place::Kvm(host) => {
                let file = script.strip_suffix(",ro").unwrap();
                host.put(file.as_ref(), self.folder.path().to_str().unwrap());
                "/dev/vdb".into()
            }
        };
        let launch = debian(&root).disk(script).arg("--control").arg(self.path("control"));
        let vsock = format!("{},cid=77", self.path("vsock"));
        let mut vm = self.place.start(&launch.arg("--vsock").arg(vsock));
        vm.prompt();
        vm.shell()
    }

    fn start_peer(&self, words: &[&str]) -> Process {
        let mut command = Command::new(&self.peer);
        self.place.start_command(command.args(words), PATIENCE)
    }

    /// Runs a program of the host to its end.
    #[track_caller]
    fn peer(&self, words: &[&str], says: &str) {
        let ended = self.start_peer(words).end();
        assert_eq!(ended.expect_code(0).output.trim(), says);
    }
}

fn power_off(mut shell: Shell) {
    shell.send("systemctl poweroff\n");
    shell.end().expect_code(0);
}

fn reach_each_other(site: &Site) -> Shell {
    let mut shell = site.debian();
    let socket = site.path("vsock");
    site.peer(&["refused", &socket, "1024"], "refused");
    shell
        .run(&format!("{SCRIPT} ask 52 2>&1 | tail -n 1"))
        .contains("ConnectionResetError");

    shell
        .run(&format!("{SCRIPT} serve 1024 >/dev/null 2>&1 </dev/null &"))
        .success();
    for count in ["0", "100", "8000000"] {
        site.peer(&["echo", &socket, "1024", count], &format!("echoed {count}"));
    }

    let mut program = site.start_peer(&["answer", &site.path("vsock_52")]);
    program.expect("listening");
    shell.run(&format!("{SCRIPT} ask 52")).expect("thank you");
    program.end().expect_code(0);
    shell
}

#[test]
fn host_and_guest_reach_each_other_both_ways() {
    let mut shell = reach_each_other(&Site::new(Place::Here));
    shell.kernel_is_well();
    power_off(shell);
}

#[test]
fn host_and_guest_reach_each_other_both_ways_on_kvm() {
    let Some(place) = Place::kvm() else { return };
    // What its kernel says of the test host's processor is not looked at.
    power_off(reach_each_other(&Site::new(place)));
}

#[test]
fn connections_end_with_a_restore_and_new_ones_work() {
    let site = Site::new(Place::Here);
    let mut shell = site.debian();
    let socket = site.path("vsock");
    shell
        .run(&format!("{SCRIPT} serve 1024 >/dev/null 2>&1 </dev/null &"))
        .success();
    let mut program = site.start_peer(&["hold", &site.path("vsock_52")]);
    program.expect("listening");
    shell
        .run(&format!("{SCRIPT} wait 52 >/tmp/waited 2>&1 </dev/null &"))
        .success();
    program.expect("accepted");
    site.peer(&["echo", &socket, "1024", "1000"], "echoed 1000");
    let (control, snapshot) = (site.path("control"), site.path("snapshot"));
    let saved = Launch::command(["snapshot", "save", &control, &snapshot, "--stop"]);
    saved.start().end().expect_code(0);
    shell.end().expect_code(0);
    program.signal(libc::SIGTERM);
    assert_eq!(program.end().signal, Some(libc::SIGTERM));

    let copy = site.path("copy.raw");
    std::fs::copy(Path::new(&snapshot).join("disk0.raw"), &copy).unwrap();
    let launch = Launch::run()
        .arg("--restore")
        .arg(&snapshot)
        .disk(&copy)
        .patience(PATIENCE);
    let refused = launch.clone().start().end();
    refused.expect_code(125);
    assert!(refused.errors.contains("give --vsock"), "{}", refused.errors);
    let vm = launch.arg("--vsock").arg(&socket).start();
    site.peer(&["echo", &socket, "1024", "100000"], "echoed 100000");
    let mut shell = vm.shell();
    shell
        .run("{ wait %2; } >/dev/null 2>&1; cat /tmp/waited")
        .expect("reset");
    shell.kernel_is_well();
    power_off(shell);
}
