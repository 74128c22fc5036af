//! The image store: what VMs boot from, kept once for all of them, found by name.
//!
//! An image is a kernel, perhaps an initramfs, a raw root disk, and what its maker says about the program to start. All three
//! are [blobs](manifest::Blob): files named by their SHA-256, which never change, so any number of VMs share them. The
//! [`Store`] has them in one folder, with [`Name`]s as Docker writes them. How the folder is laid out, and which locks make it
//! safe for several processes, is told in `layout.rs`.
#![forbid(unsafe_code)]

mod archive;
mod blob;
mod decompress;
mod digest;
mod disk;
mod error;
pub mod layer;
mod layout;
pub mod manifest;
mod name;
pub mod oci;
mod progress;
mod store;
#[cfg(test)]
mod tests;
mod upkeep;

pub use archive::is_image_archive;
pub use blob::BlobWriter;
pub use digest::{Digest, NotADigest};
pub use disk::{DiskFormat, ImportOptions};
pub use error::Error;
pub use layer::Layer;
pub use manifest::Manifest;
pub use name::Name;
pub use progress::{Progress, Quiet, Step};
pub use store::{Image, Ingest, Listed, Store};
pub use upkeep::{Freed, PARTIAL_LIFE, Problem};
