//! How far long work is, and whether it is still wanted.

use crate::Error;

/// What is being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Reading files of the store to see that they are undamaged.
    Check,
    /// Copying a disk.
    Copy,
    /// Fetching from a registry.
    Download,
    /// Merging layers into a root file system.
    Unpack,
    /// Writing that into a disk.
    Format,
}

/// Told of progress. It is called from the working thread, often: be quick.
pub trait Progress: Sync {
    /// `done` of `total` bytes, as far as the total is known.
    fn update(&self, step: Step, done: u64, total: Option<u64>) {
        let _ = (step, done, total);
    }

    /// True ends the work at the next opportunity, with [`Error::Cancelled`].
    fn cancelled(&self) -> bool {
        false
    }
}

/// Nobody looks.
#[derive(Clone, Copy, Debug, Default)]
pub struct Quiet;

impl Progress for Quiet {}

pub(crate) fn go_on(progress: &dyn Progress) -> Result<(), Error> {
    if progress.cancelled() {
        Err(Error::Cancelled)
    } else {
        Ok(())
    }
}
