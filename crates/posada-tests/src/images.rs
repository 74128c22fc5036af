//! Linux and Debian, as `scripts/image` makes them.

use crate::folder::Folder;
use crate::launch::Launch;
use crate::process::Process;
use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// What a guest's shell prints when it wants a command.
pub const PROMPT: &str = "posada# ";
/// Debian starts in a few seconds; a busy machine makes that minutes.
const PATIENCE: Duration = Duration::from_secs(400);
/// Words of the kernel's command line for a console that programs can read.
const CONSOLE: &str = "console=ttyS0 quiet TERM=dumb";

/// A file of the folder that `scripts/image` fills.
///
/// # Panics
/// When it is not there.
pub fn image(name: &str) -> PathBuf {
    let cache = match env::var_os("XDG_CACHE_HOME") {
        Some(path) => path.into(),
        None => Path::new(&env::var_os("HOME").expect("a user has a home")).join(".cache"),
    };
    let path = cache.join("posada").join(name);
    assert!(path.is_file(), "{} is missing; run `scripts/image`", path.display());
    path
}

/// A root disk of its own for a test that writes to it.
///
/// # Panics
/// When it cannot be copied.
pub fn root_disk(folder: &Folder) -> PathBuf {
    disk_like(folder, "root.raw")
}

/// A root disk with what `scripts/image heavy.raw` adds.
///
/// # Panics
/// When it cannot be copied.
pub fn heavy_disk(folder: &Folder) -> PathBuf {
    disk_like(folder, "heavy.raw")
}

fn disk_like(folder: &Folder, name: &str) -> PathBuf {
    let path = folder.path().join("root.raw");
    let copied = Command::new("cp")
        .args(["--sparse=always", "--reflink=auto"])
        .args([&image(name), &path])
        .status();
    assert!(copied.is_ok_and(|status| status.success()), "cannot copy the root disk");
    path
}

/// Linux with a shell in its initramfs, which is there in a few seconds.
pub fn small_linux() -> Launch {
    Launch::run()
        .kernel(image("vmlinuz"))
        .initramfs(image("initramfs.cpio"))
        .cmdline(CONSOLE)
        .memory("256M")
        .patience(PATIENCE)
}

/// Debian on `disk`, as /dev/vda.
pub fn debian(disk: &Path) -> Launch {
    debian_in("512M", disk)
}

/// The same in `memory`.
pub fn debian_in(memory: &str, disk: &Path) -> Launch {
    Launch::run()
        .kernel(image("vmlinuz"))
        .initramfs(image("initramfs.cpio"))
        .cmdline(&format!("{CONSOLE} root=/dev/vda rw"))
        .memory(memory)
        .disk(disk)
        .patience(PATIENCE)
}

/// A disk with a script on it, for `python3 /dev/vdX`: the space behind it is empty lines.
pub fn script_disk(folder: &Folder, script: &str) -> String {
    let mut content = script.as_bytes().to_vec();
    content.resize(content.len().next_multiple_of(512), b'\n');
    format!("{},ro", folder.file("script.raw", &content).display())
}

/// What follows is asked of a guest's shell.
impl Process {
    /// Waits for the guest's prompt.
    ///
    /// # Panics
    /// When it does not come.
    pub fn prompt(&mut self) -> &mut Self {
        self.expect(PROMPT)
    }
}
