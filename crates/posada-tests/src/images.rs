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
    let path = folder.path().join("root.raw");
    let copied = Command::new("cp")
        .args(["--sparse=always", "--reflink=auto"])
        .args([&image("root.raw"), &path])
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
    Launch::run()
        .kernel(image("vmlinuz"))
        .initramfs(image("initramfs.cpio"))
        .cmdline(&format!("{CONSOLE} root=/dev/vda rw"))
        .memory("512M")
        .disk(disk)
        .patience(PATIENCE)
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
