//! A root file system in the making: layers are merged here, in memory, and only the contents of files lie on the host's disk,
//! under numbers. No name of an image ever becomes a path on the host, so none can lead out of its root.

use super::entries::{Entry, read_entries};
use super::spec::unusable;
use crate::Error;
use crate::progress::{Progress, Step, go_on};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use tar::EntryType;

/// Files and folders of an image, at most: a bound of memory.
const MOST: usize = 4_000_000;
/// Bytes of a name in a folder, by ext4.
const LONGEST_NAME: usize = 255;
/// Bytes of a path and of a symbolic link, by Linux, with the final zero.
const LONGEST_PATH: usize = 4095;
/// Symbolic links on the way to one file, by Linux.
const MOST_LINKS: u32 = 40;
/// Bytes of an extended attribute that ext4 keeps without a feature of its own.
const LONGEST_ATTRIBUTE: usize = 4000;

pub(super) type Number = usize;
pub(super) const ROOT: Number = 0;

#[derive(Clone, Debug)]
pub(super) struct Metadata {
    /// Permissions with set-user-ID, set-group-ID and sticky bits.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Seconds since 1970.
    pub modified: i64,
    pub attributes: Vec<(String, Vec<u8>)>,
}

impl Metadata {
    fn folder(mode: u32) -> Self {
        Self {
            mode,
            uid: 0,
            gid: 0,
            modified: 0,
            attributes: Vec::new(),
        }
    }
}

#[derive(Clone, Debug)]
pub(super) enum Kind {
    Folder(BTreeMap<Vec<u8>, Child>),
    /// Content under a number in the work folder; `None`: empty.
    File {
        content: Option<u64>,
        length: u64,
    },
    Symlink(Vec<u8>),
    CharDevice(u32, u32),
    BlockDevice(u32, u32),
    Fifo,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Child {
    pub node: Number,
    /// The last layer that had it.
    layer: u32,
}

#[derive(Clone, Debug)]
pub(super) struct Node {
    pub metadata: Metadata,
    pub kind: Kind,
}

/// The tree. Nodes have several names where the image has hard links.
pub(super) struct Tree {
    pub nodes: Vec<Node>,
    /// Where contents lie.
    work: PathBuf,
    contents: u64,
    /// Bytes of all contents so far, those of files that were replaced too.
    written: u64,
    largest: u64,
    layer: u32,
}

/// The parts of a path; `None` if it leads upwards.
fn parts(path: &[u8]) -> Option<Vec<&[u8]>> {
    let parts = path
        .split(|byte| *byte == b'/')
        .filter(|part| !part.is_empty() && *part != b".");
    parts.map(|part| (part != b"..").then_some(part)).collect()
}

fn shown(path: &[u8]) -> String {
    String::from_utf8_lossy(&path[..path.len().min(200)])
        .escape_debug()
        .to_string()
}

impl Tree {
    /// An empty root. Contents go to the folder `work`, up to `largest` bytes.
    pub fn new(work: &Path, largest: u64) -> Self {
        Self {
            nodes: vec![Node {
                metadata: Metadata::folder(0o755),
                kind: Kind::Folder(BTreeMap::new()),
            }],
            work: work.into(),
            contents: 0,
            written: 0,
            largest,
            layer: 0,
        }
    }

    pub fn content(&self, number: u64) -> PathBuf {
        self.work.join(number.to_string())
    }

    /// Lays a layer over those before.
    pub fn apply(&mut self, stream: impl Read, what: &str, progress: &dyn Progress) -> Result<(), Error> {
        self.layer += 1;
        read_entries(stream, what, |entry, content| {
            go_on(progress)?;
            self.add(entry, content, what, progress)
        })
    }

    fn add(&mut self, entry: Entry, content: &mut dyn Read, what: &str, progress: &dyn Progress) -> Result<(), Error> {
        let wrong = |why: &str| unusable(what, format_args!("{why}: {}", shown(&entry.path)));
        if entry.path.len() > LONGEST_PATH || entry.link.len() > LONGEST_PATH {
            return Err(wrong("a path is too long"));
        }
        let Some(path) = parts(&entry.path) else {
            return Err(wrong("a file would lie outside of its root"));
        };
        if path.iter().any(|name| name.len() > LONGEST_NAME) {
            return Err(wrong("a name is too long"));
        }
        if path.iter().any(|name| name.contains(&b'\n') || name.contains(&0)) {
            return Err(wrong("a name has a line break"));
        }
        let metadata = Metadata {
            mode: entry.mode,
            uid: entry.uid,
            gid: entry.gid,
            modified: entry.modified,
            attributes: kept_attributes(entry.attributes.clone()),
        };
        let Some((name, parents)) = path.split_last() else {
            if entry.kind == EntryType::Directory {
                self.nodes[ROOT].metadata = metadata;
            }
            return Ok(());
        };
        if let Some(hidden) = name.strip_prefix(b".wh.") {
            return self
                .whiteout(parents, hidden)
                .ok_or_else(|| wrong("a whiteout makes no sense"));
        }
        let folder = self
            .folder(parents)
            .ok_or_else(|| wrong("a file would lie in something that is no folder"))?;
        let kind = match entry.kind {
            EntryType::Directory => Kind::Folder(BTreeMap::new()),
            EntryType::Regular | EntryType::Continuous => self.take_content(content, what, progress)?,
            EntryType::Symlink if entry.link.is_empty() || entry.link.contains(&b'\n') => {
                return Err(wrong("a symbolic link leads nowhere, or has a line break"));
            }
            EntryType::Symlink => Kind::Symlink(entry.link),
            EntryType::Char => Kind::CharDevice(entry.device.0, entry.device.1),
            EntryType::Block => Kind::BlockDevice(entry.device.0, entry.device.1),
            EntryType::Fifo => Kind::Fifo,
            EntryType::Link => {
                let target = parts(&entry.link)
                    .and_then(|path| self.find(&path))
                    .filter(|node| !matches!(self.nodes[*node].kind, Kind::Folder(_)));
                let node = target.ok_or_else(|| wrong("a hard link leads to no file of its root"))?;
                self.put(folder, name, node);
                return Ok(());
            }
            _ => return Err(wrong("it has a kind of file that is not known")),
        };
        // A folder that is there already keeps what is in it.
        if let (Kind::Folder(_), Some(there)) = (&kind, self.child(folder, name))
            && matches!(self.nodes[there].kind, Kind::Folder(_))
        {
            self.nodes[there].metadata = metadata;
            self.put(folder, name, there);
            return Ok(());
        }
        if self.nodes.len() >= MOST {
            return Err(unusable(what, format_args!("it has more than {MOST} files")));
        }
        self.nodes.push(Node { metadata, kind });
        self.put(folder, name, self.nodes.len() - 1);
        Ok(())
    }

    fn take_content(&mut self, content: &mut dyn Read, what: &str, progress: &dyn Progress) -> Result<Kind, Error> {
        let mut buffer = [0; 64 << 10];
        let mut file: Option<File> = None;
        let (number, mut length) = (self.contents, 0);
        let path = self.content(number);
        loop {
            go_on(progress)?;
            let count = match content.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(unusable(what, format_args!("a layer cannot be read: {error}"))),
            };
            self.written += count as u64;
            if self.written > self.largest {
                let most = self.largest;
                return Err(unusable(
                    what,
                    format_args!("its files have more than the {most} bytes that are accepted"),
                ));
            }
            length += count as u64;
            if file.is_none() {
                file = Some(File::create_new(&path).map_err(Error::io("write", &path))?);
                self.contents += 1;
            }
            let file = file.as_mut().expect("just opened");
            file.write_all(&buffer[..count]).map_err(Error::io("write", &path))?;
            progress.update(Step::Unpack, self.written, None);
        }
        Ok(Kind::File {
            content: file.map(|_| number),
            length,
        })
    }

    fn children(&mut self, folder: Number) -> Option<&mut BTreeMap<Vec<u8>, Child>> {
        match &mut self.nodes[folder].kind {
            Kind::Folder(children) => Some(children),
            _ => None,
        }
    }

    fn child(&self, folder: Number, name: &[u8]) -> Option<Number> {
        match &self.nodes[folder].kind {
            Kind::Folder(children) => children.get(name).map(|child| child.node),
            _ => None,
        }
    }

    fn put(&mut self, folder: Number, name: &[u8], node: Number) {
        let layer = self.layer;
        if let Some(children) = self.children(folder) {
            children.insert(name.into(), Child { node, layer });
        }
    }

    /// The node at a path, where symbolic links on the way lead within the root; not the last part, if it is one.
    fn find(&self, path: &[&[u8]]) -> Option<Number> {
        let (name, parents) = path.split_last()?;
        let folder = self.walk(parents)?;
        self.child(*folder.last()?, name)
    }

    /// The folders from the root to a path, all symbolic links followed within the root.
    fn walk(&self, path: &[&[u8]]) -> Option<Vec<Number>> {
        let mut left: Vec<&[u8]> = path.iter().rev().copied().collect();
        let (mut way, mut links) = (vec![ROOT], 0);
        while let Some(name) = left.pop() {
            if name == b".." {
                // Above the root is the root.
                if way.len() > 1 {
                    way.pop();
                }
                continue;
            }
            let node = self.child(*way.last()?, name)?;
            match &self.nodes[node].kind {
                Kind::Folder(_) => way.push(node),
                Kind::Symlink(target) => {
                    links += 1;
                    if links > MOST_LINKS {
                        return None;
                    }
                    if target.starts_with(b"/") {
                        way.truncate(1);
                    }
                    let steps = target.split(|byte| *byte == b'/').rev();
                    left.extend(steps.filter(|step| !step.is_empty() && *step != b"."));
                }
                _ => return None,
            }
        }
        Some(way)
    }

    /// The folder at a path, made if it is not there; `None` if something else is.
    fn folder(&mut self, path: &[&[u8]]) -> Option<Number> {
        let mut folder = ROOT;
        for end in 1..=path.len() {
            folder = match self.walk(&path[..end]) {
                Some(way) => *way.last()?,
                None if self.child(folder, path[end - 1]).is_none() => {
                    self.nodes.push(Node {
                        metadata: Metadata::folder(0o755),
                        kind: Kind::Folder(BTreeMap::new()),
                    });
                    let node = self.nodes.len() - 1;
                    self.put(folder, path[end - 1], node);
                    node
                }
                None => return None,
            };
        }
        // All on the way belong to this layer now: a whiteout in it does not hide them.
        let way = self.walk(path)?;
        let layer = self.layer;
        for pair in way.windows(2) {
            for child in self.children(pair[0])?.values_mut() {
                if child.node == pair[1] {
                    child.layer = layer;
                }
            }
        }
        Some(folder)
    }

    /// Hides a file of lower layers; `.wh..opq` hides all that lower layers have in the folder.
    fn whiteout(&mut self, parents: &[&[u8]], hidden: &[u8]) -> Option<()> {
        if matches!(hidden, b"" | b"." | b"..") {
            return None;
        }
        // A folder that is not there has nothing to hide.
        let Some(folder) = self.walk(parents).and_then(|way| way.last().copied()) else {
            return Some(());
        };
        match hidden {
            b".wh..opq" => self.hide_all(folder),
            // Marks of aufs, which is long gone.
            _ if hidden.starts_with(b".wh.") => {}
            _ => {
                let layer = self.layer;
                let child = self.children(folder)?.get(hidden).copied();
                match child {
                    Some(child) if child.layer < layer => drop(self.children(folder)?.remove(hidden)),
                    Some(child) => self.hide_all(child.node),
                    None => {}
                }
            }
        }
        Some(())
    }

    fn hide_all(&mut self, folder: Number) {
        let layer = self.layer;
        let mut left = vec![folder];
        while let Some(folder) = left.pop() {
            if let Some(children) = self.children(folder) {
                children.retain(|_, child| child.layer == layer);
                left.extend(children.values().map(|child| child.node));
            }
        }
    }

    /// Makes a folder, unless something is there.
    pub fn ensure_folder(&mut self, name: &str, mode: u32) {
        if self.child(ROOT, name.as_bytes()).is_none()
            && let Some(node) = self.folder(&[name.as_bytes()])
        {
            self.nodes[node].metadata.mode = mode;
        }
    }

    /// Adds a file of root's.
    pub fn add_file(
        &mut self,
        path: &str,
        mode: u32,
        content: &mut dyn Read,
        progress: &dyn Progress,
    ) -> Result<(), Error> {
        self.layer += 1;
        let entry = Entry {
            path: path.into(),
            link: Vec::new(),
            kind: EntryType::Regular,
            mode,
            uid: 0,
            gid: 0,
            modified: 0,
            device: (0, 0),
            attributes: Vec::new(),
        };
        self.add(entry, content, "to add to", progress)
    }
}

/// Those that mean something in a guest.
fn kept_attributes(attributes: Vec<(String, Vec<u8>)>) -> Vec<(String, Vec<u8>)> {
    let kept = |name: &str, value: &[u8]| {
        let known = ["user.", "security.", "trusted.", "system.posix_acl_"];
        known.iter().any(|prefix| name.starts_with(prefix))
            && !name.starts_with("trusted.overlay.")
            && name.len() <= LONGEST_NAME
            && name.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'"')
            && !value.is_empty()
            && value.len() <= LONGEST_ATTRIBUTE
    };
    let (kept, left): (Vec<_>, Vec<_>) = attributes.into_iter().partition(|(name, value)| kept(name, value));
    for (name, _) in left {
        tracing::debug!(name, "an extended attribute is left out");
    }
    kept
}
