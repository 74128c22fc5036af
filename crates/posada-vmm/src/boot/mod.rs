//! From a kernel's file to the first instruction: finds out what the file is, puts it and what it wants to know into guest
//! RAM, and says in which state vCPU 0 begins.
//!
//! | file | entry |
//! |---|---|
//! | Linux bzImage whose unpacked payload has a PVH note | PVH, 32-bit |
//! | other Linux bzImage | 64-bit Linux boot protocol |
//! | multiboot 1 header in the first 8 KiB | multiboot, 32-bit |
//! | ELF with a PVH note | PVH, 32-bit |
//!
//! Files are streamed into guest RAM: nothing here holds a whole kernel. Kernels are not trusted: sizes and addresses are
//! checked before use, and unpacking ends where the segments do.

mod elf;
mod entry;
mod input;
mod linux;
mod multiboot;
mod pvh;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
mod unpack;

pub(crate) use entry::protected;
pub use input::Input;

use crate::layout;
use posada_engine::CpuState;
use posada_memory::{GuestRam, HOLE_START, PAGE_SIZE};
use std::io;
use std::path::{Path, PathBuf};
use vm_memory::{Bytes, GuestAddress};

/// Why a kernel cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be opened.
    #[error("cannot open the {what} {}: {source}", path.display())]
    Open {
        /// Kernel or initramfs.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The host's reason.
        source: io::Error,
    },
    /// A directory, a pipe or the like.
    #[error("the {what} {} is not a regular file; give the path of a file", path.display())]
    Kind {
        /// Kernel or initramfs.
        what: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// Nothing in it.
    #[error("the {what} {} is empty; get it again", path.display())]
    Empty {
        /// Kernel or initramfs.
        what: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// Reading failed.
    #[error("cannot read the {what} {}: {source}", path.display())]
    Read {
        /// Kernel or initramfs.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The host's reason.
        source: io::Error,
    },
    /// The file ends before what its headers promise.
    #[error("the kernel {} is truncated; get it again", path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
    },
    /// Not a kernel of a kind we know.
    #[error(
        "{} is not a kernel that can be booted; give a Linux bzImage, an ELF file with a PVH note, or a multiboot kernel",
        path.display()
    )]
    Foreign {
        /// The file.
        path: PathBuf,
    },
    /// A kernel with headers that cannot be right, or that wants what this machine does not have.
    #[error("cannot boot the kernel {}: {why}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The reason, with the way out where there is one.
        why: String,
    },
    /// The kernel reaches beyond RAM.
    #[error("the kernel {} needs {} of memory and the VM has {}; use a larger --memory", path.display(), size(*needed), size(*memory))]
    Memory {
        /// The file.
        path: PathBuf,
        /// Bytes it needs.
        needed: u64,
        /// Bytes of RAM.
        memory: u64,
    },
    /// The initramfs does not fit beside the kernel.
    #[error(
        "the initramfs {} of {} does not fit into {} of memory beside the kernel; use a larger --memory",
        path.display(), size(*length), size(*memory)
    )]
    Initramfs {
        /// The file.
        path: PathBuf,
        /// Its bytes.
        length: u64,
        /// Bytes of RAM.
        memory: u64,
    },
    /// The command line is too long for the kernel or for the place it goes to.
    #[error("the command line of {length} bytes is too long, this kernel takes {most}; shorten --cmdline")]
    Cmdline {
        /// Its bytes.
        length: usize,
        /// The most it can have.
        most: u64,
    },
    /// The command line has a zero byte in it.
    #[error("the command line has a zero byte in it; remove it from --cmdline")]
    CmdlineZero,
}

/// A size for people: the largest unit in which it is at least 1, rounded up.
fn size(bytes: u64) -> String {
    match bytes {
        0..0x400 => format!("{bytes} bytes"),
        0x400..0x10_0000 => format!("{} KiB", bytes.div_ceil(1 << 10)),
        _ => format!("{} MiB", bytes.div_ceil(1 << 20)),
    }
}

/// What a VM boots.
#[derive(Debug)]
pub struct Source {
    /// The kernel.
    pub kernel: Input,
    /// The initial RAM file system, or a multiboot kernel's first module.
    pub initramfs: Option<Input>,
    /// The command line, without zero bytes.
    pub cmdline: String,
}

impl Source {
    /// Opens the files.
    ///
    /// # Errors
    /// [`Error::Open`], [`Error::Kind`], [`Error::Empty`] and [`Error::CmdlineZero`].
    pub fn open(kernel: &Path, initramfs: Option<&Path>, cmdline: &str) -> Result<Self, Error> {
        if cmdline.contains('\0') {
            return Err(Error::CmdlineZero);
        }
        Ok(Self {
            kernel: Input::open("kernel", kernel)?,
            initramfs: initramfs.map(|path| Input::open("initramfs", path)).transpose()?,
            cmdline: cmdline.into(),
        })
    }

    /// Fills zeroed `ram` and returns the state in which vCPU 0 begins.
    ///
    /// # Errors
    /// All of [`Error`]; RAM is then half filled.
    pub fn load(&self, ram: &GuestRam) -> Result<CpuState, Error> {
        if ram.size() <= layout::KERNEL {
            return Err(Error::Memory {
                path: self.kernel.path().into(),
                needed: layout::KERNEL + self.kernel.size(),
                memory: ram.size(),
            });
        }
        let mut head = vec![0; multiboot::SEARCH];
        let length = self.kernel.read_at(&mut head, 0)?;
        head.truncate(length);
        if let Some(header) = linux::Header::find(&self.kernel, &head)? {
            return linux::load(self, ram, &header);
        }
        if let Some(header) = multiboot::Header::find(&head) {
            return multiboot::load(self, ram, &header);
        }
        if !head.starts_with(elf::MAGIC) {
            return Err(Error::Foreign {
                path: self.kernel.path().into(),
            });
        }
        let image = elf::load(self.kernel.reader(0..self.kernel.size()), ram, &self.kernel)?;
        let Some(entry) = image.pvh_entry else {
            return Err(Error::Foreign {
                path: self.kernel.path().into(),
            });
        };
        pvh::start(self, ram, image.end, entry)
    }

    /// Puts the initramfs as high as possible below `limit`, above `kernel_end`. Returns its address and size.
    fn place_initramfs(&self, ram: &GuestRam, kernel_end: u64, limit: u64) -> Result<Option<(u64, u64)>, Error> {
        let Some(initramfs) = &self.initramfs else {
            return Ok(None);
        };
        let length = initramfs.size();
        let end = ram.size().min(HOLE_START).min(limit);
        let start = end.checked_sub(length).map(|start| start / PAGE_SIZE * PAGE_SIZE);
        match start {
            Some(start) if start >= kernel_end => {
                initramfs.copy_to(ram, 0, start, length)?;
                Ok(Some((start, length)))
            }
            _ => Err(self.no_room_for_initramfs(ram)),
        }
    }

    fn no_room_for_initramfs(&self, ram: &GuestRam) -> Error {
        let initramfs = self.initramfs.as_ref().unwrap_or(&self.kernel);
        Error::Initramfs {
            path: initramfs.path().into(),
            length: initramfs.size(),
            memory: ram.size(),
        }
    }

    fn malformed(&self, why: impl Into<String>) -> Error {
        Error::Malformed {
            path: self.kernel.path().into(),
            why: why.into(),
        }
    }
}

/// Writes bytes to a place that the layout keeps inside RAM.
fn put(ram: &GuestRam, at: u64, bytes: &[u8]) {
    ram.memory()
        .write_slice(bytes, GuestAddress(at))
        .expect("the layout's addresses lie in the first MiB, and RAM is larger");
}

/// Puts the command line with its final zero to its place.
fn put_cmdline(ram: &GuestRam, text: &[u8], most: u64) -> Result<(), Error> {
    let most = most.min(layout::CMDLINE_SIZE - 1);
    if text.len() as u64 > most {
        return Err(Error::Cmdline {
            length: text.len(),
            most,
        });
    }
    put(ram, layout::CMDLINE, text);
    put(ram, layout::CMDLINE + text.len() as u64, &[0]);
    Ok(())
}

/// The `N`-byte little-endian field at `at`, if the bytes reach that far.
fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    field(bytes, at).map(u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    field(bytes, at).map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    field(bytes, at).map(u64::from_le_bytes)
}
