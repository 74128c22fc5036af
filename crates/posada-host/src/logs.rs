//! Logs, which grow and turn: `console.log` becomes `console.log.1` when it is large, and a new one begins.

use crate::policy::State;
use crate::process::watched;
use crate::vm::{Vm, blocking};
use axum::body::Bytes;
use rustix::fs::inotify;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::sync::mpsc;

/// Bytes that are read at a time.
const PART: usize = 32 << 10;

/// What of a log.
#[derive(Clone, Copy, Debug)]
pub struct Tail {
    /// So many lines of its end; else all.
    pub lines: Option<usize>,
    /// Go on until the VM has ended.
    pub follow: bool,
}

/// An open log, read up to `at`.
struct Reader {
    file: Arc<File>,
    at: u64,
}

/// The log of before, beside the one that grows.
pub fn older(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    name.into()
}

fn open(path: &Path) -> io::Result<Option<File>> {
    match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The older log and the log, each from where its part of the last `lines` begins.
fn tails(path: &Path, lines: Option<usize>) -> io::Result<Vec<Reader>> {
    let mut left = lines;
    let mut readers = Vec::new();
    for path in [path.to_path_buf(), older(path)] {
        let Some(file) = open(&path)? else { continue };
        let at = match &mut left {
            None => 0,
            Some(0) => file.metadata()?.len(),
            Some(left) => tail(&file, left, readers.is_empty())?,
        };
        readers.insert(
            0,
            Reader {
                file: Arc::new(file),
                at,
            },
        );
    }
    Ok(readers)
}

/// Where the last lines begin; takes those that are there from `left`. `end`: nothing follows, so a newline at the very end
/// begins no line.
fn tail(file: &File, left: &mut usize, end: bool) -> io::Result<u64> {
    let size = file.metadata()?.len();
    let mut part = vec![0; PART];
    let mut to = size;
    while to > 0 {
        let from = to.saturating_sub(PART as u64);
        let bytes = &mut part[..(to - from) as usize];
        file.read_exact_at(bytes, from)?;
        for (index, byte) in bytes.iter().enumerate().rev() {
            let at = from + index as u64 + 1;
            if *byte == b'\n' && !(end && at == size) {
                *left -= 1;
                if *left == 0 {
                    return Ok(at);
                }
            }
        }
        to = from;
    }
    Ok(0)
}

/// Sends a VM's log until it, or the client, has ended.
///
/// # Errors
/// The host's reason why it cannot be read.
pub async fn send(vm: &Arc<Vm>, path: PathBuf, tail: Tail, sender: &mpsc::Sender<Bytes>) -> io::Result<()> {
    // Watched before it is read: no change is missed.
    let changes = match tail.follow {
        true => Some(watched(watch(&vm.folder().0)?)?),
        false => None,
    };
    let mut life = vm.watch();
    let first = path.clone();
    let mut readers = blocking(move || tails(&first, tail.lines)).await?.into_iter();
    let mut last = None;
    for mut reader in readers.by_ref() {
        if !drain(&mut reader, sender).await? {
            return Ok(());
        }
        last = Some(reader);
    }
    let Some(changes) = changes else { return Ok(()) };
    loop {
        let goes_on = {
            let view = life.borrow_and_update();
            !view.removed && !view.state.is_over() && view.state != State::Created
        };
        if let Some(reader) = &mut last
            && !drain(reader, sender).await?
        {
            return Ok(());
        }
        // Another file has its name now.
        if let Some(now) = open(&path)? {
            let turned = match &last {
                Some(reader) => reader.file.metadata()?.ino() != now.metadata()?.ino(),
                None => true,
            };
            if turned {
                last = Some(Reader {
                    file: Arc::new(now),
                    at: 0,
                });
                continue;
            }
        }
        if !goes_on {
            return Ok(());
        }
        tokio::select! {
            ready = changes.readable() => {
                let mut events = [0; 4096];
                let _ = ready?.try_io(|fd| Ok(rustix::io::read(fd, &mut events)?));
            }
            _ = life.changed() => {}
            () = sender.closed() => return Ok(()),
        }
    }
}

fn watch(folder: &Path) -> io::Result<std::os::fd::OwnedFd> {
    let fd = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
    inotify::add_watch(&fd, folder, inotify::WatchFlags::MODIFY | inotify::WatchFlags::CREATE)?;
    Ok(fd)
}

/// Sends what is there; false: the client has gone.
async fn drain(reader: &mut Reader, sender: &mpsc::Sender<Bytes>) -> io::Result<bool> {
    loop {
        let (file, at) = (reader.file.clone(), reader.at);
        let part = blocking(move || {
            let mut part = vec![0; PART];
            file.read_at(&mut part, at).map(|count| {
                part.truncate(count);
                part
            })
        });
        let part = part.await?;
        if part.is_empty() {
            return Ok(!sender.is_closed());
        }
        reader.at += part.len() as u64;
        if sender.send(part.into()).await.is_err() {
            return Ok(false);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn of(old: &str, new: &str, lines: usize) -> String {
        let folder = std::env::temp_dir().join(format!("posada-logs-{}-{lines}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let path = folder.join("console.log");
        fs::write(&path, new).unwrap();
        fs::write(older(&path), old).unwrap();
        let mut text = String::new();
        for reader in tails(&path, Some(lines)).unwrap() {
            let mut bytes = vec![0; 1 << 20];
            let count = reader.file.read_at(&mut bytes, reader.at).unwrap();
            text += str::from_utf8(&bytes[..count]).unwrap();
        }
        fs::remove_dir_all(&folder).unwrap();
        text
    }

    #[test]
    fn the_last_lines_may_begin_in_the_older_log() {
        let (old, new) = ("a\nb\nc\n", "d\ne\n");
        for (lines, expected) in [
            (0, ""),
            (1, "e\n"),
            (2, "d\ne\n"),
            (3, "c\nd\ne\n"),
            (9, "a\nb\nc\nd\ne\n"),
        ] {
            assert_eq!(of(old, new, lines), expected, "{lines}");
        }
        assert_eq!(of("a\nbc", "d\ne", 2), "bcd\ne", "a log turns anywhere");
        assert_eq!(of("", &"x\n".repeat(PART), 12345), "x\n".repeat(12345));
    }
}
