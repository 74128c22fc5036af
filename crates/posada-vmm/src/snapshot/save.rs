//! Saving a running VM.

use super::folder::{MANIFEST, Partial};
use super::image::{Fault, Index};
use super::manifest::{self, Check, Checksum, Manifest, SavedDisk, Shape, State};
use super::{Error, disks};
use crate::boot::{Input, Source};
use crate::control::{Control, Ending, Hold, Life};
use crate::vm::Config;
use posada_devices::virtio::blk::{BlkDisk, DiskIdentity};
use posada_engine::clock::{ClockState, real_time_ns};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;
use xxhash_rust::xxh3::Xxh3;

/// What becomes of the disks that the guest can write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KeepDisks {
    /// They are copied into the snapshot, which is then complete though the VM runs on.
    #[default]
    Copy,
    /// They stay where they are, and must not change until the VM is restored.
    Reference,
}

/// How to save.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// The folder to make, absolute.
    pub place: PathBuf,
    /// Replace a snapshot there.
    pub force: bool,
    /// End the VM, in the state that was saved.
    pub stop: bool,
    /// The writable disks.
    pub disks: KeepDisks,
}

/// What is being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// RAM is written; the VM stands still.
    Memory,
    /// Disks are copied; the VM stands still.
    Disks,
    /// Copies that share the disks' blocks are checksummed.
    Checksums,
    /// All is brought to the host's disk.
    Sync,
}

/// How far a save is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// What is being done.
    pub phase: Phase,
    /// Bytes looked at so far.
    pub done: u64,
    /// Bytes to look at.
    pub total: u64,
}

/// What was saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// How long the VM stood still, in nanoseconds.
    pub paused_ns: u64,
    /// Bytes of RAM that were not zero.
    pub memory: u64,
    /// Bytes of disks in the snapshot that were not zero.
    pub disks: u64,
}

/// The VM that is saved.
#[derive(Debug)]
pub struct Subject {
    pub(crate) config: Config,
    pub(crate) source: Source,
    pub(crate) disks: Vec<BlkDisk>,
}

/// A VM that stands still: no vCPU runs and no device takes work. It goes on when dropped.
struct Still {
    hold: Hold,
    goes_on: bool,
}

impl Still {
    fn new(control: &Arc<Control>) -> Result<Self, Error> {
        let hold = control.hold().ok_or(Error::Ending)?;
        hold.life().machine.quiesce();
        Ok(Self { hold, goes_on: true })
    }

    fn life(&self) -> &Life {
        self.hold.life()
    }

    /// The VM ends as it stands. What devices have not begun they never will: it is in the snapshot.
    fn end(mut self, control: &Control) {
        self.goes_on = false;
        control.end(Ending::Saved);
    }
}

impl Drop for Still {
    fn drop(&mut self) {
        if self.goes_on {
            self.life().machine.resume();
        }
    }
}

/// Who is told of the progress, and answers whether to go on.
pub type Watch<'a> = &'a mut dyn FnMut(Progress) -> ControlFlow<()>;

/// Saves a VM. It runs on after, unless it is to stop or something else holds it.
///
/// # Errors
/// [`Error`]. The VM then runs on in any case, and nothing is left of the snapshot.
pub fn save(control: &Arc<Control>, subject: &Subject, options: &Options, watch: Watch<'_>) -> Result<Saved, Error> {
    let mut saver = Saver {
        subject,
        folder: Partial::new(&options.place, options.force)?,
        keep: options.disks,
        files: Vec::new(),
        watch,
    };
    saver.input("kernel", &subject.source.kernel)?;
    if let Some(initramfs) = &subject.source.initramfs {
        saver.input("initramfs", initramfs)?;
    }

    let begin = Instant::now();
    let still = Still::new(control)?;
    let state = state(still.life(), &subject.config, control.frozen())?;
    let memory = saver.memory(still.life())?;
    let disks = saver.disks()?;
    let still = options.stop.then_some(still);
    let paused_ns = begin.elapsed().as_nanos() as u64;

    saver.bytes("state.json", &serde_json::to_vec(&state)?)?;
    saver.bytes("memory.index", &memory.encode())?;
    let mut saved = Saved {
        paused_ns,
        memory: memory.content(),
        disks: 0,
    };
    let mut list = Vec::new();
    for (number, disk) in disks.into_iter().enumerate() {
        let kept = match disk {
            Kept::Reference(identity) => manifest::Kept::Reference(identity),
            Kept::Copy(index) => {
                let index = match index {
                    Some(index) => index,
                    None => saver.describe(number)?,
                };
                saved.disks += index.content();
                saver.bytes(&disks::index_name(number), &index.encode())?;
                manifest::Kept::Copy
            }
        };
        let disk = &subject.disks[number];
        list.push(SavedDisk {
            path: absolute(&subject.config.disks[number].path),
            size: disk.size(),
            read_only: disk.read_only(),
            kept,
        });
    }
    saver.finish(list)?;
    if let Some(still) = still {
        still.end(control);
    }
    Ok(saved)
}

/// Processors, clock and devices of a VM that stands still.
fn state(life: &Life, config: &Config, paused: bool) -> Result<State, Error> {
    let stopped = life.engine.clock()?;
    let cpus = life
        .cpus
        .iter()
        .map(|cpu| cpu.lock().expect("a vCPU that panics ends the VM").state())
        .collect::<Result<_, _>>()?;
    Ok(State {
        cpus,
        clock: ClockState {
            stopped,
            tsc_khz: config.model.tsc_khz,
        },
        machine: life.machine.save(),
        paused,
    })
}

/// For the manifest: a path that leads there from anywhere.
fn absolute(path: &Path) -> PathBuf {
    let path = path.canonicalize().unwrap_or_else(|_| path.into());
    path.to_string_lossy().into_owned().into()
}

/// Where a disk's content is.
enum Kept {
    /// In the snapshot. No index: the copy shares the disk's blocks and is still to be described.
    Copy(Option<Index>),
    Reference(DiskIdentity),
}

/// A snapshot in the making.
struct Saver<'a> {
    subject: &'a Subject,
    folder: Partial,
    keep: KeepDisks,
    /// What has been written, perhaps not yet to the disk.
    files: Vec<(String, File, Check)>,
    watch: Watch<'a>,
}

impl Saver<'_> {
    fn tell(&mut self, phase: Phase, done: u64, total: u64) -> Result<(), Error> {
        match (self.watch)(Progress { phase, done, total }) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(Error::Cancelled),
        }
    }

    /// A file with these bytes.
    fn bytes(&mut self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        let file = self.folder.file(name)?;
        file.write_all_at(bytes, 0).map_err(self.folder.writing(name))?;
        self.add(name, file, bytes.len() as u64, Some(Checksum::of(bytes)));
        Ok(())
    }

    /// A file has been written.
    fn add(&mut self, name: &str, file: File, length: u64, xxh3: Option<Checksum>) {
        self.files.push((name.into(), file, Check { length, xxh3 }));
    }

    /// A copy of what the VM has booted, for its next boot.
    fn input(&mut self, name: &str, input: &Input) -> Result<(), Error> {
        let file = self.folder.file(name)?;
        let (mut hash, mut at) = (Xxh3::new(), 0);
        let mut buffer = vec![0; 256 << 10];
        while at < input.size() {
            let part = buffer.len().min((input.size() - at) as usize);
            let part = &mut buffer[..part];
            let read = input.read_at(part, at).map_err(Error::Input)?;
            if read < part.len() {
                return Err(Error::Input(input.truncated()));
            }
            hash.update(part);
            file.write_all_at(part, at).map_err(self.folder.writing(name))?;
            at += read as u64;
        }
        self.add(name, file, at, Some(Checksum(hash.digest())));
        Ok(())
    }

    fn memory(&mut self, life: &Life) -> Result<Index, Error> {
        let total = life.ram.size();
        let file = self.folder.file("memory")?;
        let watch = &mut *self.watch;
        let index = Index::of_ram(&life.ram, &file, &mut watcher(watch, Phase::Memory, 0, total));
        let index = index.map_err(|fault| refuse(fault, self.folder.writing("memory")))?;
        self.add("memory", file, total, None);
        Ok(index)
    }

    fn disks(&mut self) -> Result<Vec<Kept>, Error> {
        let subject = self.subject;
        let copied = |disk: &&BlkDisk| !disk.read_only() && self.keep == KeepDisks::Copy;
        let total = subject.disks.iter().filter(copied).map(BlkDisk::size).sum();
        let mut before = 0;
        let mut list = Vec::new();
        for (number, disk) in subject.disks.iter().enumerate() {
            let path = &subject.config.disks[number].path;
            let failed = |source| Error::SaveDisk {
                path: path.clone(),
                source,
            };
            if disk.read_only() || self.keep == KeepDisks::Reference {
                list.push(Kept::Reference(disk.identity().map_err(failed)?));
                continue;
            }
            let name = disks::file_name(number);
            let file = self.folder.file(&name)?;
            let watch = watcher(&mut *self.watch, Phase::Disks, before, total);
            let index = disks::copy(disk, &file, watch).map_err(|fault| refuse(fault, failed))?;
            self.add(&name, file, disk.size(), None);
            list.push(Kept::Copy(index));
            before += disk.size();
        }
        Ok(list)
    }

    /// The index of a disk's copy that has none yet.
    fn describe(&mut self, number: usize) -> Result<Index, Error> {
        let name = disks::file_name(number);
        let (_, file, check) = self
            .files
            .iter()
            .find(|(other, ..)| *other == name)
            .expect("it was copied");
        let mut watch = watcher(&mut *self.watch, Phase::Checksums, 0, check.length);
        Index::of(file, check.length, &mut watch).map_err(|fault| refuse(fault, self.folder.writing(&name)))
    }

    /// Brings all to the disk, the manifest last, and gives the folder its place.
    fn finish(mut self, disks: Vec<SavedDisk>) -> Result<(), Error> {
        let config = &self.subject.config;
        for (disk, saved) in self.subject.disks.iter().zip(&disks) {
            if !saved.read_only && saved.kept != manifest::Kept::Copy {
                disk.flush().map_err(|source| Error::SaveDisk {
                    path: saved.path.clone(),
                    source,
                })?;
            }
        }
        let files = std::mem::take(&mut self.files);
        let total = files.iter().map(|(_, _, check)| check.length).sum();
        let mut done = 0;
        for (name, file, check) in &files {
            self.tell(Phase::Sync, done, total)?;
            file.sync_all().map_err(self.folder.writing(name))?;
            done += check.length;
        }
        let manifest = Manifest {
            posada: env!("CARGO_PKG_VERSION").into(),
            created: real_time_ns() / 1_000_000_000,
            vm: Shape {
                memory: config.memory,
                model: config.model.clone(),
                cmdline: config.cmdline.clone(),
                initramfs: self.subject.source.initramfs.is_some(),
                virtio_console: config.virtio_console,
                vsock: config.vsock.as_ref().map(|vsock| vsock.cid),
                debug_exit: config.debug_exit,
                disks,
            },
            files: files.into_iter().map(|(name, _, check)| (name, check)).collect(),
        };
        let file = self.folder.file(MANIFEST)?;
        let written = file.write_all_at(&manifest.encode()?, 0).and_then(|()| file.sync_all());
        written.map_err(self.folder.writing(MANIFEST))?;
        self.tell(Phase::Sync, total, total)?;
        self.folder.commit()
    }
}

/// Tells of the bytes of one image among others.
fn watcher<'a>(watch: Watch<'a>, phase: Phase, before: u64, total: u64) -> impl FnMut(u64) -> bool + use<'a> {
    move |done| {
        let done = before + done;
        watch(Progress { phase, done, total }).is_continue()
    }
}

fn refuse(fault: Fault, failed: impl FnOnce(io::Error) -> Error) -> Error {
    match fault {
        Fault::Io(error) => failed(error),
        Fault::Cancelled => Error::Cancelled,
        Fault::Differs(_) => failed(io::Error::other("it changes while it is copied")),
    }
}
