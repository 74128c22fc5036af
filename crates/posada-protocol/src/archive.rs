//! Files and folders as tar archives. Nothing is ever whole in memory or on a disk in between.

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::fs::{self, File, Metadata};
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use tar::{Archive, Builder, EntryType, Header, HeaderMode};

/// Bytes that are written at a time.
const BUFFER: usize = 64 << 10;
/// Bytes that an entry costs, whatever is in it: its header, and an inode.
const ENTRY: u64 = 512;
/// The most folders, whose rights must wait in memory for the end.
const FOLDERS: usize = 1 << 18;

/// How much an archive is believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trust {
    /// Like its receiver: owners and all rights are taken over, if the receiver is root.
    Full,
    /// Not at all: its files are the receiver's, have no rights beyond the ordinary ones, and together so many bytes at most.
    None {
        /// Bytes, with 512 for each entry.
        most: u64,
    },
}

/// Writes what lies at `path` to `to`, under its own name. Sockets are left out. A file that is written to meanwhile has the
/// length that it had.
///
/// # Errors
/// The reader's or writer's.
pub fn pack(path: &Path, to: &mut impl Write) -> io::Result<()> {
    let metadata = fs::symlink_metadata(path)?;
    let mut builder = Builder::new(BufWriter::with_capacity(BUFFER, to));
    // Of `/` and of what ends in `..` there is only the content.
    let name = path.file_name().map(PathBuf::from).unwrap_or_default();
    let mut left = vec![(path.to_path_buf(), name, metadata)];
    while let Some((path, name, metadata)) = left.pop() {
        if !name.as_os_str().is_empty() {
            append(&mut builder, &path, &name, &metadata)?;
        }
        if !metadata.is_dir() {
            continue;
        }
        for entry in fs::read_dir(&path)? {
            let entry = entry?;
            match entry.metadata() {
                Ok(metadata) => left.push((entry.path(), name.join(entry.file_name()), metadata)),
                // It was removed meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
    }
    builder.into_inner()?.flush()
}

fn append(builder: &mut Builder<impl Write>, path: &Path, name: &Path, metadata: &Metadata) -> io::Result<()> {
    let mut header = Header::new_gnu();
    header.set_metadata_in_mode(metadata, HeaderMode::Complete);
    let kind = metadata.file_type();
    if kind.is_symlink() {
        header.set_size(0);
        return builder.append_link(&mut header, name, fs::read_link(path)?);
    }
    if kind.is_file() {
        // It may have become something else meanwhile, which is neither followed nor waited for.
        let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = match rustix::fs::open(path, flags, Mode::empty()) {
            Err(Errno::NOENT | Errno::LOOP | Errno::NXIO) => return Ok(()),
            file => File::from(file?),
        };
        if !file.metadata()?.is_file() {
            return Ok(());
        }
        // As many bytes as the header says.
        let bytes = file.chain(io::repeat(0)).take(metadata.len());
        return builder.append_data(&mut header, name, bytes);
    }
    header.set_size(0);
    header.set_entry_type(match () {
        () if kind.is_dir() => EntryType::Directory,
        () if kind.is_fifo() => EntryType::Fifo,
        () if kind.is_char_device() => EntryType::Char,
        () if kind.is_block_device() => EntryType::Block,
        // A socket is of no use to another program.
        () => return Ok(()),
    });
    if kind.is_char_device() || kind.is_block_device() {
        header.set_device_major(rustix::fs::major(metadata.rdev()))?;
        header.set_device_minor(rustix::fs::minor(metadata.rdev()))?;
    }
    builder.append_data(&mut header, name, io::empty())
}

/// Unpacks the archive `from` in the directory `into`, which is there. Only files, folders and links are made; what would lie
/// elsewhere, by its path or through a link, is left out or an error.
///
/// # Errors
/// The reader's or the file system's, or that the archive is larger than [`Trust::None`] allows. What came before is there.
pub fn unpack(from: &mut impl Read, into: &Path, trust: Trust) -> io::Result<()> {
    let into = into.canonicalize()?;
    let mut archive = Archive::new(&mut *from);
    archive.set_preserve_permissions(trust == Trust::Full);
    archive.set_preserve_ownerships(trust == Trust::Full && rustix::process::geteuid().is_root());
    let (mut total, mut folders) = (0_u64, Vec::new());
    for entry in archive.entries()? {
        let mut entry = entry?;
        if let Trust::None { most } = trust {
            // The size is that of the file, with its holes.
            total = total.saturating_add(ENTRY).saturating_add(entry.size());
            if total > most {
                return Err(io::Error::other(format!("the archive has more than {most} bytes")));
            }
        }
        match entry.header().entry_type() {
            // Their rights come last: some forbid to make files in them.
            EntryType::Directory if folders.len() >= FOLDERS => {
                return Err(io::Error::other("the archive has too many folders"));
            }
            EntryType::Directory => folders.push(entry),
            EntryType::Regular
            | EntryType::Continuous
            | EntryType::GNUSparse
            | EntryType::Link
            | EntryType::Symlink => drop(entry.unpack_in(&into)?),
            _ => {}
        }
    }
    // Those inside first.
    folders.sort_by(|one, other| other.path_bytes().cmp(&one.path_bytes()));
    for mut folder in folders {
        folder.unpack_in(&into)?;
    }
    // What follows an archive's end is filling.
    io::copy(from, &mut io::sink()).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("posada-archive-{name}-{}", std::process::id()));
            fs::create_dir_all(path.join("into")).unwrap();
            Self(path)
        }

        fn target(&self) -> PathBuf {
            self.0.join("into")
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    const SOME: Trust = Trust::None { most: 100_000 };

    /// An entry with a name that no good program writes.
    fn entry(builder: &mut Builder<Vec<u8>>, kind: EntryType, name: &str, link: &str, mode: u32, bytes: &[u8]) {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(bytes.len() as u64);
        for (field, text) in [(0..100, name), (157..257, link)] {
            header.as_mut_bytes()[field][..text.len()].copy_from_slice(text.as_bytes());
        }
        header.set_cksum();
        builder.append(&header, bytes).unwrap();
    }

    fn made(fill: impl FnOnce(&mut Builder<Vec<u8>>)) -> Vec<u8> {
        let mut builder = Builder::new(Vec::new());
        fill(&mut builder);
        builder.into_inner().unwrap()
    }

    #[test]
    fn nothing_gets_outside() {
        let folder = Folder::new("outside");
        let outside = folder.0.join("outside");
        fs::write(&outside, "as it was").unwrap();
        let at = folder.0.to_str().unwrap();
        let file = EntryType::Regular;
        type Attempt<'a> = &'a dyn Fn(&mut Builder<Vec<u8>>);
        let attempts: [Attempt<'_>; 5] = [
            &|builder| entry(builder, file, "../outside", "", 0o644, b"bad"),
            &|builder| entry(builder, file, &format!("{at}/outside"), "", 0o644, b"bad"),
            &|builder| {
                entry(builder, EntryType::Symlink, "up", "..", 0o777, b"");
                entry(builder, file, "up/outside", "", 0o644, b"bad");
            },
            &|builder| {
                entry(builder, EntryType::Link, "same", "../outside", 0o644, b"");
                entry(builder, file, "same", "", 0o644, b"bad");
            },
            &|builder| {
                entry(
                    builder,
                    EntryType::Symlink,
                    "link",
                    &format!("{at}/outside"),
                    0o777,
                    b"",
                );
                entry(builder, file, "link", "", 0o644, b"bad");
            },
        ];
        for (number, attempt) in attempts.into_iter().enumerate() {
            for trust in [SOME, Trust::Full] {
                let _ = fs::remove_dir_all(folder.target());
                fs::create_dir(folder.target()).unwrap();
                let _ = unpack(&mut &made(attempt)[..], &folder.target(), trust);
                assert_eq!(fs::read_to_string(&outside).unwrap(), "as it was", "attempt {number}");
            }
        }
        let names: Vec<_> = fs::read_dir(&folder.0)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(names.len(), 2, "{names:?}");
    }

    #[test]
    fn an_archive_that_is_not_believed_is_small_and_ordinary() {
        let folder = Folder::new("small");
        let archive = made(|builder| {
            entry(builder, EntryType::Directory, "closed/", "", 0o500, b"");
            entry(builder, EntryType::Regular, "closed/set-uid", "", 0o4755, b"#!");
            entry(builder, EntryType::Fifo, "fifo", "", 0o644, b"");
            entry(builder, EntryType::Char, "device", "", 0o666, b"");
        });
        unpack(&mut &archive[..], &folder.target(), SOME).unwrap();
        let mode = |path: &str| fs::metadata(folder.target().join(path)).unwrap().permissions().mode() & 0o7777;
        assert_eq!((mode("closed") & 0o700, mode("closed/set-uid")), (0o500, 0o755));
        assert!(!folder.target().join("fifo").exists() && !folder.target().join("device").exists());
        let archive = made(|builder| entry(builder, EntryType::Regular, "big", "", 0o644, &[7; 100_000]));
        assert!(unpack(&mut &archive[..], &folder.target(), SOME).is_err());
        assert!(!folder.target().join("big").exists());
        let archive = made(|builder| {
            (0..300).for_each(|number| entry(builder, EntryType::Regular, &number.to_string(), "", 0o644, b""));
        });
        let error = unpack(&mut &archive[..], &folder.target(), SOME)
            .unwrap_err()
            .to_string();
        assert!(error.contains("100000 bytes"), "{error}");
        // A file that is nearly all hole is as large as it says.
        let hole = folder.0.join("hole");
        File::create(&hole).unwrap().set_len(1 << 40).unwrap();
        let archive = std::process::Command::new("tar")
            .args(["-S", "--format=gnu", "-cf", "-", "-C"])
            .arg(&folder.0)
            .arg("hole")
            .output()
            .unwrap()
            .stdout;
        assert!(archive.len() < 100_000);
        assert!(unpack(&mut &archive[..], &folder.target(), SOME).is_err());
    }

    #[test]
    fn a_file_that_grows_or_shrinks_spoils_nothing() {
        let folder = Folder::new("changes");
        let path = folder.0.join("file");
        fs::write(&path, b"0123456789").unwrap();
        let metadata = fs::metadata(&path).unwrap();
        for (now, expected) in [
            (&b"0123456789abc"[..], &b"0123456789"[..]),
            (b"0123", b"0123\0\0\0\0\0\0"),
        ] {
            fs::write(&path, now).unwrap();
            let archive = made(|builder| append(builder, &path, Path::new("file"), &metadata).unwrap());
            unpack(&mut &archive[..], &folder.target(), SOME).unwrap();
            assert_eq!(fs::read(folder.target().join("file")).unwrap(), expected);
        }
        // One that is another thing by now is left out.
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", &path).unwrap();
        let left_out = made(|builder| append(builder, &path, Path::new("file"), &metadata).unwrap());
        assert_eq!(left_out, made(|_| {}));
    }
}
