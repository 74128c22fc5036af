//! What the host can set in the guest: end, time, name, CPUs.

use crate::session::Refusal;
use posada_protocol::{Answer, Ending, Failure};
use rustix::time::{ClockId, Timespec};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The longest host name of Linux.
const LONGEST_NAME: usize = 64;
const CPUS: &str = "/sys/devices/system/cpu";

/// The guest as the agent finds it below some directory: `/`, but in tests.
#[derive(Debug)]
pub struct System {
    root: PathBuf,
}

impl System {
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Where the file with this absolute path really is.
    pub fn path(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    /// Whether what belongs to the kernel, and is no file, may be changed too.
    fn is_real(&self) -> bool {
        self.root == Path::new("/")
    }

    pub fn read(&self, path: &str) -> Result<String, Refusal> {
        fs::read_to_string(self.path(path)).map_err(|error| Refusal::of(format!("cannot read {path}"), &error))
    }

    fn write(&self, path: &str, text: &str) -> Result<(), Refusal> {
        fs::write(self.path(path), text).map_err(|error| Refusal::of(format!("cannot write {path}"), &error))
    }

    /// Has the guest's own program end it.
    pub fn shut_down(&self, how: Ending) -> Result<(), Refusal> {
        let name = match how {
            Ending::PowerOff => "poweroff",
            Ending::Reboot => "reboot",
            Ending::Halt => "halt",
        };
        let places = ["/sbin", "/usr/sbin", "/bin", "/usr/bin"].map(|folder| self.path(folder).join(name));
        let Some(program) = places.iter().find(|path| path.exists()) else {
            let message = format!("the guest has no program {name}");
            return Err(Refusal::new(Failure::NotFound, message));
        };
        match Command::new(program).status() {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(Refusal::new(Failure::Other, format!("{name} has failed: {status}"))),
            Err(error) => Err(Refusal::of(format!("cannot run {name}"), &error)),
        }
    }

    /// Sets the clock to so many nanoseconds since 1970.
    pub fn set_time(&self, nanoseconds: u64) -> Result<(), Refusal> {
        if !self.is_real() {
            return Err(Refusal::new(Failure::Invalid, "a test has no clock of its own"));
        }
        let time = Timespec {
            tv_sec: (nanoseconds / 1_000_000_000) as i64,
            tv_nsec: (nanoseconds % 1_000_000_000) as i64,
        };
        rustix::time::clock_settime(ClockId::Realtime, time)
            .map_err(|error| Refusal::of("cannot set the clock", &error.into()))
    }

    /// Sets the host name, now and for the next boots.
    pub fn set_hostname(&self, name: &str) -> Result<(), Refusal> {
        let fine = |byte: u8| byte.is_ascii_alphanumeric() || b"-.".contains(&byte);
        if name.is_empty() || name.len() > LONGEST_NAME || !name.bytes().all(fine) || name.starts_with(['-', '.']) {
            let message = format!("a host name has 1 to {LONGEST_NAME} letters, digits, dashes and dots");
            return Err(Refusal::new(Failure::Invalid, message));
        }
        if self.is_real() {
            rustix::system::sethostname(name.as_bytes())
                .map_err(|error| Refusal::of("cannot set the host name", &error.into()))?;
        }
        self.write("/etc/hostname", &format!("{name}\n"))
    }

    fn cpus(&self, which: &str) -> Result<Vec<u32>, Refusal> {
        let path = format!("{CPUS}/{which}");
        let text = self.read(&path)?;
        parse_list(&text).ok_or_else(|| Refusal::new(Failure::Other, format!("{path} is strange: {}", text.trim())))
    }

    /// Has the first `online` CPUs work and the others not.
    pub fn set_cpus(&self, online: u32) -> Result<Answer, Refusal> {
        let present = self.cpus("present")?;
        if online == 0 || online as usize > present.len() {
            let message = format!("the guest has {} CPUs; {online} cannot be online", present.len());
            return Err(Refusal::new(Failure::Invalid, message));
        }
        let working = self.cpus("online")?;
        for (at, cpu) in present.iter().enumerate() {
            let wanted = at < online as usize;
            if wanted != working.contains(cpu) {
                self.write(&format!("{CPUS}/cpu{cpu}/online"), if wanted { "1" } else { "0" })?;
            }
        }
        let online = self.cpus("online")?;
        Ok(Answer::Cpus { present, online })
    }
}

/// The numbers of a list as the kernel writes it: `0-2,5`.
fn parse_list(text: &str) -> Option<Vec<u32>> {
    /// More than any kernel's CPUs.
    const MOST: u32 = 1 << 16;
    let mut numbers = Vec::new();
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        if last >= MOST {
            return None;
        }
        numbers.extend(first..=last);
    }
    Some(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_lists_are_read() {
        assert_eq!(parse_list("0\n"), Some(vec![0]));
        assert_eq!(parse_list("0-2,5,7-8\n"), Some(vec![0, 1, 2, 5, 7, 8]));
        for text in ["", "0-", "a", "0-4294967295", "1,,2"] {
            assert_eq!(parse_list(text), None, "{text}");
        }
    }
}
