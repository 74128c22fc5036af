//! Doorbells: writes by which a guest wakes a device's thread without leaving the processor for long, where the engine can
//! do that.

use posada_engine::{Doorbell, Error};
use std::os::fd::BorrowedFd;

/// Who can have a guest's write signal an eventfd, as [`posada_engine::Engine`] does.
pub trait Doorbells: Send + Sync {
    /// From now on the write signals `event` and does not reach the device; false: it reaches the device as ever.
    ///
    /// # Errors
    /// When the host refuses; the write then reaches the device as ever.
    fn attach(&self, bell: Doorbell, event: BorrowedFd<'_>) -> Result<bool, Error>;
    /// Undoes that.
    fn detach(&self, bell: Doorbell, event: BorrowedFd<'_>);
}

/// For machines without: all writes reach the devices.
pub struct NoDoorbells;

impl Doorbells for NoDoorbells {
    fn attach(&self, _: Doorbell, _: BorrowedFd<'_>) -> Result<bool, Error> {
        Ok(false)
    }

    fn detach(&self, _: Doorbell, _: BorrowedFd<'_>) {}
}
