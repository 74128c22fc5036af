//! The disks of a snapshot: how they are copied while the VM stands still, and compared when it goes on.

use super::image::{Fault, Index};
use posada_devices::virtio::blk::BlkDisk;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;

/// `FICLONE` of `linux/fs.h`: the whole of another file, its blocks shared until one is written.
const CLONE: libc::Ioctl = 0x4004_9409;

/// The copy of disk `number`.
pub(super) fn file_name(number: usize) -> String {
    format!("disk{number}.raw")
}

/// The index of that copy.
pub(super) fn index_name(number: usize) -> String {
    format!("disk{number}.index")
}

/// A handle to read by.
fn file_of(disk: &BlkDisk) -> io::Result<File> {
    Ok(disk.as_fd().try_clone_to_owned()?.into())
}

/// Copies a disk that nobody writes to into the empty file `to`. `None`: the copy shares the disk's blocks, and
/// [`Index::of`] is still to be made, when the VM runs on already.
pub(super) fn copy(disk: &BlkDisk, to: &File, mut watch: impl FnMut(u64) -> bool) -> Result<Option<Index>, Fault> {
    let from = file_of(disk)?;
    // SAFETY: takes two descriptors.
    if unsafe { libc::ioctl(to.as_raw_fd(), CLONE, from.as_raw_fd()) } == 0 {
        // The last sector may reach beyond the disk's file.
        to.set_len(disk.size())?;
        return Ok(None);
    }
    Index::copy(&from, disk.size(), to, &mut watch).map(Some)
}

/// True if both are the same file.
pub(super) fn same_file(disk: &BlkDisk, other: &File) -> io::Result<bool> {
    let (disk, other) = (file_of(disk)?.metadata()?, other.metadata()?);
    Ok((disk.dev(), disk.ino()) == (other.dev(), other.ino()))
}

/// Checks that a disk is what `index` says.
pub(super) fn check(disk: &BlkDisk, index: &Index) -> Result<(), Fault> {
    index.check(&file_of(disk)?, &mut |_| true)
}
