//! Going on from a snapshot: all of it is checked before the first instruction.

use super::folder::MANIFEST;
use super::image::{Fault, Index};
use super::manifest::{Check, Checksum, Kept, Manifest, SavedDisk, State, Unreadable};
use super::{Error, disks};
use crate::vm::{Config, DiskConfig};
use posada_devices::virtio::blk::{BlkDisk, DiskIdentity};
use posada_engine::cpu::CpuModel;
use posada_memory::GuestRam;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use xxhash_rust::xxh3::Xxh3;

/// The most bytes that a manifest, a state or an index may have: far more than those of the largest VM.
const MOST: u64 = 256 << 20;

/// A snapshot that is whole, but for the content of its images: that is checked as it is read.
#[derive(Debug)]
pub struct Snapshot {
    path: PathBuf,
    manifest: Manifest,
    state: State,
    memory: (File, Index),
    /// Of disks that were copied: their files and indexes.
    copies: Vec<Option<(File, Index)>>,
}

impl Snapshot {
    /// Opens the snapshot in the folder `path`.
    ///
    /// # Errors
    /// [`Error`] names the first thing that is wrong.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let folder = Folder(path);
        if !path.is_dir() || !path.join(MANIFEST).exists() {
            // Says why where there is nothing at all.
            std::fs::metadata(path).map_err(|source| Error::Read {
                path: path.into(),
                source,
            })?;
            return Err(Error::NotOne { path: path.into() });
        }
        let bytes = folder.all(MANIFEST, folder.open(MANIFEST)?)?;
        let manifest = Manifest::decode(&bytes).map_err(|unreadable| match unreadable {
            Unreadable::Newer(format) => Error::Newer {
                path: path.into(),
                format,
            },
            Unreadable::Damaged(why) => folder.damaged(MANIFEST, why),
        })?;
        let vm = &manifest.vm;
        let state = folder.checked(&manifest, "state.json")?;
        let state: State = serde_json::from_slice(&state)
            .map_err(|error| folder.damaged("state.json", format!("cannot be read: {error}")))?;
        if state.cpus.len() != vm.model.cpus as usize {
            return Err(folder.damaged(
                "state.json",
                format!("has {} vCPUs, the machine {}", state.cpus.len(), vm.model.cpus),
            ));
        }
        if state.clock.tsc_khz != vm.model.tsc_khz {
            return Err(folder.damaged("state.json", "has another clock than the machine".into()));
        }
        for name in ["kernel"].into_iter().chain(vm.initramfs.then_some("initramfs")) {
            folder.hash(&manifest, name)?;
        }
        let memory = folder.image(&manifest, "memory", "memory.index", vm.memory)?;
        let copies = vm
            .disks
            .iter()
            .enumerate()
            .map(|(number, disk)| match disk.kept {
                Kept::Reference(_) => Ok(None),
                Kept::Copy => {
                    let (name, index) = (disks::file_name(number), disks::index_name(number));
                    folder.image(&manifest, &name, &index, disk.size).map(Some)
                }
            })
            .collect::<Result<_, _>>()?;
        Ok(Self {
            path: path.into(),
            manifest,
            state,
            memory,
            copies,
        })
    }

    /// What the VM's processors are.
    pub fn model(&self) -> &CpuModel {
        &self.manifest.vm.model
    }

    /// Bytes of RAM.
    pub fn memory(&self) -> u64 {
        self.manifest.vm.memory
    }

    /// The kernel's command line.
    pub fn cmdline(&self) -> &str {
        &self.manifest.vm.cmdline
    }

    /// Whether it has a virtio console.
    pub fn virtio_console(&self) -> bool {
        self.manifest.vm.virtio_console
    }

    /// Its context id, if it has a vsock.
    pub fn vsock(&self) -> Option<u32> {
        self.manifest.vm.vsock
    }

    /// Whether it has the debug-exit port.
    pub fn debug_exit(&self) -> bool {
        self.manifest.vm.debug_exit
    }

    /// Whether its user had paused it.
    pub fn paused(&self) -> bool {
        self.state.paused
    }

    /// Where vCPU 0 goes on.
    #[cfg(test)]
    pub(super) fn first_rip(&self) -> u64 {
        self.state.cpus[0].rip
    }

    /// What went wrong, about the snapshot as a whole.
    pub fn unfit(&self, why: impl Into<String>) -> Error {
        Error::Shape {
            path: self.path.clone(),
            why: why.into(),
        }
    }

    /// Goes on with these disks: as many as the VM has, or those whose copies the snapshot has, or none. What is not given is
    /// where it was. Sets all of `config` that a snapshot decides.
    ///
    /// # Errors
    /// [`Error::NeedsCopies`], or another number of disks than the VM has.
    pub fn into_config(self, given: Vec<DiskConfig>, config: Config) -> Result<Config, Error> {
        let vm = &self.manifest.vm;
        let copied = |disk: &SavedDisk| disk.kept == Kept::Copy;
        let copies = vm.disks.iter().filter(|disk| copied(disk)).count();
        let all = given.len() == vm.disks.len();
        if !all && given.len() != copies {
            if given.is_empty() {
                let numbers = (0..vm.disks.len()).filter(|number| copied(&vm.disks[*number]));
                return Err(Error::NeedsCopies {
                    path: self.path.clone(),
                    numbers: numbers.collect(),
                });
            }
            let most = vm.disks.len();
            return Err(self.unfit(format!(
                "its VM has {most} disks, {copies} of them copied into it, and {} are given; give one --disk for each, or \
                 for each copied one",
                given.len()
            )));
        }
        let mut given = given.into_iter();
        let (mut disks, mut originals) = (Vec::new(), Vec::new());
        for (number, saved) in vm.disks.iter().enumerate() {
            let next = if all || copied(saved) { given.next() } else { None };
            if next.as_ref().is_some_and(|disk| disk.read_only && !saved.read_only) {
                return Err(self.unfit(format!("disk {number} of its VM is writable; give it without ,ro")));
            }
            originals.push(match &saved.kept {
                Kept::Reference(identity) if next.is_none() => Some(*identity),
                _ => None,
            });
            disks.push(DiskConfig {
                path: next.map_or_else(|| saved.path.clone(), |disk| disk.path),
                read_only: saved.read_only,
            });
        }
        Ok(Config {
            kernel: self.path.join("kernel"),
            initramfs: vm.initramfs.then(|| self.path.join("initramfs")),
            cmdline: vm.cmdline.clone(),
            disks,
            model: vm.model.clone(),
            memory: vm.memory,
            virtio_console: vm.virtio_console,
            debug_exit: vm.debug_exit,
            restore: Some(Arc::new(Restore {
                snapshot: self,
                originals,
            })),
            ..config
        })
    }
}

/// A snapshot, and which of its VM's disks are expected where they were.
#[derive(Debug)]
pub struct Restore {
    snapshot: Snapshot,
    /// What they were then.
    originals: Vec<Option<DiskIdentity>>,
}

impl Restore {
    /// Processors, clock and devices.
    pub(crate) fn state(&self) -> &State {
        &self.snapshot.state
    }

    /// An error about the snapshot.
    pub(crate) fn unfit(&self, why: impl Into<String>) -> Error {
        self.snapshot.unfit(why)
    }

    /// Checks that the disks, which are locked, have the content that the VM has left them with.
    pub(crate) fn check_disks(&self, disks: &[BlkDisk]) -> Result<(), Error> {
        let snapshot = &self.snapshot;
        for (number, disk) in disks.iter().enumerate() {
            let (saved, refuse) = (&snapshot.manifest.vm.disks[number], |why: String| Error::Disk {
                path: disk.path().into(),
                why,
            });
            let read = |source| Error::Read {
                path: disk.path().into(),
                source,
            };
            if let Some(original) = &self.originals[number]
                && disk.identity().map_err(read)? != *original
            {
                return Err(refuse(format!(
                    "has changed since the snapshot {} was saved; if this content is right all the same, give it by --disk",
                    snapshot.path.display()
                )));
            }
            if disk.size() != saved.size {
                return Err(refuse(format!(
                    "has {} bytes, disk {number} of the snapshot {} has {}",
                    disk.size(),
                    snapshot.path.display(),
                    saved.size
                )));
            }
            let Some((file, index)) = &snapshot.copies[number] else {
                continue;
            };
            if disks::same_file(disk, file).map_err(read)? {
                return Err(Error::NeedsCopies {
                    path: snapshot.path.clone(),
                    numbers: vec![number],
                });
            }
            disks::check(disk, index).map_err(|fault| match fault {
                Fault::Io(error) => read(error),
                Fault::Differs(at) => refuse(format!(
                    "is not a copy of {}: they differ at byte {at} or soon after; copy it again",
                    snapshot.path.join(disks::file_name(number)).display()
                )),
                Fault::Cancelled => unreachable!("nobody cancels it"),
            })?;
        }
        Ok(())
    }

    /// New RAM with the VM's content.
    pub(crate) fn load(&self, ram: &GuestRam) -> Result<(), Error> {
        let (file, index) = &self.snapshot.memory;
        let folder = Folder(&self.snapshot.path);
        index.load(file, ram).map_err(|fault| match fault {
            Fault::Io(source) => Error::Read {
                path: self.snapshot.path.join("memory"),
                source,
            },
            Fault::Differs(at) => folder.damaged("memory", format!("is not as it was saved, behind byte {at}")),
            Fault::Cancelled => unreachable!("nobody cancels it"),
        })
    }
}

/// A folder whose files are read.
struct Folder<'a>(&'a Path);

impl Folder<'_> {
    fn damaged(&self, name: &str, why: String) -> Error {
        Error::Damaged {
            path: self.0.into(),
            name: name.into(),
            why,
        }
    }

    fn failed(&self, name: &str) -> impl Fn(io::Error) -> Error + use<> {
        let path = self.0.join(name);
        move |source| Error::Read {
            path: path.clone(),
            source,
        }
    }

    fn open(&self, name: &str) -> Result<File, Error> {
        // A pipe must not make us wait.
        let opened = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(self.0.join(name));
        let file = opened.map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Error::Missing {
                path: self.0.into(),
                name: name.into(),
            },
            _ => self.failed(name)(error),
        })?;
        if !file.metadata().map_err(self.failed(name))?.is_file() {
            return Err(self.damaged(name, "is no regular file".into()));
        }
        Ok(file)
    }

    /// All bytes of a small file.
    fn all(&self, name: &str, file: File) -> Result<Vec<u8>, Error> {
        let mut bytes = Vec::new();
        file.take(MOST + 1).read_to_end(&mut bytes).map_err(self.failed(name))?;
        if bytes.len() as u64 > MOST {
            return Err(self.damaged(name, "is too large".into()));
        }
        Ok(bytes)
    }

    /// A file of the manifest, and what that says of it. It has its length.
    fn listed<'m>(&self, manifest: &'m Manifest, name: &str) -> Result<(File, &'m Check), Error> {
        let Some(check) = manifest.files.get(name) else {
            return Err(self.damaged(MANIFEST, format!("says nothing of {name}")));
        };
        let file = self.open(name)?;
        let length = file.metadata().map_err(self.failed(name))?.len();
        if length != check.length {
            return Err(self.damaged(name, format!("has {length} bytes, not {}", check.length)));
        }
        Ok((file, check))
    }

    fn compare(&self, name: &str, check: &Check, found: Checksum) -> Result<(), Error> {
        match check.xxh3 {
            Some(saved) if saved == found => Ok(()),
            Some(_) => Err(self.damaged(name, "is not as it was saved".into())),
            None => Err(self.damaged(MANIFEST, format!("has no checksum of {name}"))),
        }
    }

    /// All bytes of a small file, checked.
    fn checked(&self, manifest: &Manifest, name: &str) -> Result<Vec<u8>, Error> {
        let (file, check) = self.listed(manifest, name)?;
        let bytes = self.all(name, file)?;
        self.compare(name, check, Checksum::of(&bytes))?;
        Ok(bytes)
    }

    /// Checks a file of any size.
    fn hash(&self, manifest: &Manifest, name: &str) -> Result<(), Error> {
        let (mut file, check) = self.listed(manifest, name)?;
        let (mut hash, mut buffer) = (Xxh3::new(), vec![0; 256 << 10]);
        loop {
            match file.read(&mut buffer) {
                Ok(0) => return self.compare(name, check, Checksum(hash.digest())),
                Ok(length) => hash.update(&buffer[..length]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.failed(name)(error)),
            }
        }
    }

    /// An image of `length` bytes, with its index checked.
    fn image(&self, manifest: &Manifest, name: &str, index_name: &str, length: u64) -> Result<(File, Index), Error> {
        let bytes = self.checked(manifest, index_name)?;
        let index = Index::decode(&bytes).map_err(|why| self.damaged(index_name, why.into()))?;
        let (file, check) = self.listed(manifest, name)?;
        if index.length() != length || check.length != length {
            return Err(self.damaged(index_name, format!("is of {} bytes, not {length}", index.length())));
        }
        Ok((file, index))
    }
}
