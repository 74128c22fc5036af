//! From a [`Tree`] to a disk with ext4, by `mke2fs` and `debugfs` of e2fsprogs: they write owners, devices and attributes into
//! the image without being root, and read names from a script, not from the host's file system.

use super::spec::unusable;
use super::tree::{Kind, Metadata, Number, ROOT, Tree};
use crate::progress::{Progress, Step, go_on};
use crate::{Digest, Error};
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

const BLOCK: u64 = 4096;
/// Bytes of an inode of ext4, as `mke2fs` makes it.
const INODE: u64 = 256;
const MIB: u64 = 1 << 20;
/// Bytes for the journal and the file system's own tables.
const OVERHEAD: u64 = 96 * MIB;
/// Bytes of a line that `debugfs` takes, with reserve.
const LONGEST_LINE: usize = 8000;

/// Writes the tree into the empty file `disk`, a disk without partitions, with `room` bytes free. `seed` names the file system.
pub(super) fn write(
    tree: &Tree,
    disk: &Path,
    work: &Path,
    room: u64,
    seed: Digest,
    what: &str,
    progress: &dyn Progress,
) -> Result<(), Error> {
    let script = work.join("script");
    let used = Script::write(tree, &script, work, what)?;
    let inodes = used.nodes + used.nodes / 4 + room / (64 << 10) + 1024;
    let size = used.bytes + used.bytes / 32 + inodes * INODE + room + OVERHEAD;
    File::options()
        .write(true)
        .open(disk)
        .and_then(|file| file.set_len(size.next_multiple_of(MIB)))
        .map_err(Error::io("write", disk))?;
    let hex = seed.hex();
    let uuid = format!(
        "{}-{}-{}-{}-{}",
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..32]
    );
    let mut format = Command::new("mke2fs");
    format
        .args([
            "-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-L", "root", "-U", &uuid, "-N",
        ])
        .arg(inodes.to_string())
        .args([
            "-E",
            &format!("root_owner=0:0,lazy_itable_init=1,lazy_journal_init=1,nodiscard,hash_seed={uuid}"),
        ])
        .arg(disk);
    run(format, work, progress)?;
    let mut fill = Command::new("debugfs");
    fill.arg("-w").arg("-f").arg(&script).arg(disk).current_dir(work);
    run(fill, work, progress)?;
    progress.update(Step::Format, used.bytes, Some(used.bytes));
    Ok(())
}

/// Runs a program of e2fsprogs; whatever it complains about is an error.
fn run(mut command: Command, work: &Path, progress: &dyn Progress) -> Result<(), Error> {
    let program = command.get_program().to_string_lossy().into_owned();
    let failed = |why: String| Error::Tool {
        program: program.clone(),
        why,
    };
    let complaints = work.join("complaints");
    let stderr = File::create(&complaints).map_err(Error::io("write", &complaints))?;
    // Not everybody has the folders of administrators in the path. With a fixed time, equal images are equal bytes.
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let mut child = command
        .env("PATH", path)
        .env("LC_ALL", "C")
        .env("E2FSPROGS_FAKE_TIME", "1")
        .env("SOURCE_DATE_EPOCH", "1")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(stderr)
        .spawn()
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => failed("it is not installed; install e2fsprogs".into()),
            _ => failed(error.to_string()),
        })?;
    let status = loop {
        if let Some(status) = child.try_wait().map_err(|error| failed(error.to_string()))? {
            break status;
        }
        if let Err(cancelled) = go_on(progress) {
            let _ = child.kill();
            let _ = child.wait();
            return Err(cancelled);
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    let mut said = String::new();
    File::open(&complaints)
        .and_then(|file| file.take(64 << 10).read_to_string(&mut said))
        .map_err(Error::io("read", &complaints))?;
    // The first line is its name and version.
    let complaint = said
        .lines()
        .find(|line| !line.is_empty() && !line.starts_with(&format!("{program} 1.")));
    match complaint {
        // In these words in every version; there is no other way to tell.
        Some(_) if said.contains("No space left on device") => {
            Err(Error::io("write a disk in", work)(io::ErrorKind::StorageFull.into()))
        }
        Some(line) => Err(failed(line.into())),
        None if !status.success() => Err(failed(status.to_string())),
        None => Ok(()),
    }
}

struct Script<'a> {
    tree: &'a Tree,
    out: BufWriter<File>,
    path: PathBuf,
    work: &'a Path,
    what: &'a str,
    /// The first path of each node with content, for its hard links, and how many names it has.
    names: HashMap<Number, (Vec<u8>, u64)>,
    attributes: u64,
    used: Used,
}

/// What the tree takes on a disk.
#[derive(Default)]
struct Used {
    nodes: u64,
    bytes: u64,
}

impl<'a> Script<'a> {
    fn write(tree: &'a Tree, path: &Path, work: &'a Path, what: &'a str) -> Result<Used, Error> {
        let mut script = Self {
            tree,
            out: BufWriter::new(File::create_new(path).map_err(Error::io("write", path))?),
            path: path.into(),
            work,
            what,
            names: HashMap::new(),
            attributes: 0,
            used: Used::default(),
        };
        let empty = work.join("empty");
        File::create_new(&empty).map_err(Error::io("write", &empty))?;
        script.folders()?;
        let mut links: Vec<_> = std::mem::take(&mut script.names)
            .into_values()
            .filter(|(_, count)| *count > 1)
            .collect();
        links.sort();
        for (path, count) in links {
            script.line(&[b"sif ", &quoted(&path), b" links_count ", count.to_string().as_bytes()])?;
        }
        let Self { mut out, used, .. } = script;
        out.flush().map_err(Error::io("write", path))?;
        Ok(used)
    }

    fn line(&mut self, parts: &[&[u8]]) -> Result<(), Error> {
        let mut line = parts.concat();
        if line.len() > LONGEST_LINE {
            return Err(unusable(self.what, "a path is too long to be written"));
        }
        line.push(b'\n');
        self.out.write_all(&line).map_err(Error::io("write", &self.path))
    }

    /// All folders from the root on, each after the one that it is in; deep trees take no stack.
    fn folders(&mut self) -> Result<(), Error> {
        let mut left = vec![(Vec::new(), ROOT)];
        while let Some((path, number)) = left.pop() {
            let node = &self.tree.nodes[number];
            let Kind::Folder(children) = &node.kind else { continue };
            let here = if path.is_empty() { b"/".to_vec() } else { path.clone() };
            self.line(&[b"cd ", &quoted(&here)])?;
            self.used.nodes += 1;
            // Names in a folder take 8 bytes and their own, and its last block is rarely full.
            let names: u64 = children.keys().map(|name| 12 + name.len() as u64).sum();
            self.used.bytes += (names + names / 2).next_multiple_of(BLOCK) + BLOCK;
            for (name, child) in children {
                let mut path = path.clone();
                path.push(b'/');
                path.extend(name);
                if let Kind::Folder(_) = self.tree.nodes[child.node].kind {
                    // mke2fs made that one.
                    if path != b"/lost+found" {
                        self.line(&[b"mkdir ", &quoted(name)])?;
                    }
                    left.push((path, child.node));
                } else if path != b"/lost+found" {
                    self.file(name, path, child.node)?;
                }
            }
            self.metadata(b".", &node.metadata, 0o040000)?;
        }
        Ok(())
    }

    fn file(&mut self, name: &[u8], path: Vec<u8>, number: Number) -> Result<(), Error> {
        let node = &self.tree.nodes[number];
        if let Some((first, count)) = self.names.get_mut(&number) {
            *count += 1;
            let first = quoted(first);
            return self.line(&[b"ln ", &first, b" ", &quoted(name)]);
        }
        let name_quoted = quoted(name);
        let device = |kind: &str, major: u32, minor: u32| format!(" {kind} {major} {minor}").into_bytes();
        self.used.nodes += 1;
        let kind = match &node.kind {
            Kind::Folder(_) => return Ok(()),
            Kind::File { content, length } => {
                self.used.bytes += length.next_multiple_of(BLOCK);
                let source = content.map_or("empty".into(), |number| number.to_string());
                self.line(&[b"write ", source.as_bytes(), b" ", &name_quoted])?;
                0o100000
            }
            Kind::Symlink(target) => {
                self.used.bytes += BLOCK;
                self.line(&[b"symlink ", &name_quoted, b" ", &quoted(target)])?;
                0o120000
            }
            Kind::CharDevice(major, minor) => {
                self.line(&[b"mknod ", &name_quoted, &device("c", *major, *minor)])?;
                0o020000
            }
            Kind::BlockDevice(major, minor) => {
                self.line(&[b"mknod ", &name_quoted, &device("b", *major, *minor)])?;
                0o060000
            }
            Kind::Fifo => {
                self.line(&[b"mknod ", &name_quoted, b" p"])?;
                0o010000
            }
        };
        self.names.insert(number, (path, 1));
        // With "./", a name like <2> is a name and not the number of an inode.
        self.metadata(&[b"./", name].concat(), &node.metadata, kind)
    }

    fn metadata(&mut self, name: &[u8], metadata: &Metadata, kind: u32) -> Result<(), Error> {
        let name = quoted(name);
        let time = format!("@{}", metadata.modified.clamp(0, u32::MAX.into()));
        let permissions = if kind == 0o120000 { 0o777 } else { metadata.mode };
        for (field, value) in [
            ("mode", format!("0{:o}", kind | permissions)),
            ("uid", metadata.uid.to_string()),
            ("gid", metadata.gid.to_string()),
            ("mtime", time.clone()),
            ("ctime", time.clone()),
            ("atime", time),
        ] {
            if value != "0" {
                self.line(&[b"sif ", &name, b" ", field.as_bytes(), b" ", value.as_bytes()])?;
            }
        }
        for (key, value) in &metadata.attributes {
            let file = format!("attribute-{}", self.attributes);
            self.attributes += 1;
            self.used.bytes += BLOCK;
            let path = self.work.join(&file);
            std::fs::write(&path, value).map_err(Error::io("write", &path))?;
            self.line(&[b"ea_set -f ", file.as_bytes(), b" ", &name, b" ", key.as_bytes()])?;
        }
        Ok(())
    }
}

/// In quotes, where a quote is written twice: how `debugfs` reads its commands.
fn quoted(name: &[u8]) -> Vec<u8> {
    let mut out = vec![b'"'];
    for byte in name {
        if *byte == b'"' {
            out.push(b'"');
        }
        out.push(*byte);
    }
    out.push(b'"');
    out
}
