//! Upkeep of a store: garbage is collected, damage found and taken out of the way.

use crate::blob::hash;
use crate::layout::{entries, sync_folder_of};
use crate::manifest::Manifest;
use crate::progress::Progress;
use crate::store::{Store, lock_names, remove};
use crate::{Digest, Error, Name};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long an interrupted download waits for somebody to go on with it.
pub const PARTIAL_LIFE: Duration = Duration::from_secs(24 * 60 * 60);

/// What a collection of garbage freed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Freed {
    /// Blobs that no image had.
    pub blobs: u64,
    /// Leftovers of interrupted work.
    pub leftovers: u64,
    /// Bytes of the host's disk.
    pub bytes: u64,
}

/// Something wrong in a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Problem {
    /// A blob's content is not what its name says.
    Corrupt {
        /// The blob, by its name.
        digest: Digest,
        /// The images that have it.
        images: Vec<Digest>,
    },
    /// An image lacks a blob, or has it in another length.
    Missing {
        /// The blob.
        digest: Digest,
        /// The image.
        image: Digest,
    },
    /// A manifest cannot be understood, or is not what its name says.
    Manifest {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A name of no image.
    Name {
        /// The file of the name.
        path: PathBuf,
    },
    /// A file whose name means nothing here.
    Strange {
        /// The file.
        path: PathBuf,
    },
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Corrupt { digest, images } if images.is_empty() => {
                write!(f, "the blob {digest} is damaged; no image has it")
            }
            Self::Corrupt { digest, images } => {
                write!(f, "the blob {digest} is damaged; make or pull again: ")?;
                let images: Vec<_> = images.iter().map(Digest::hex).collect();
                f.write_str(&images.join(", "))
            }
            Self::Missing { digest, image } => {
                write!(
                    f,
                    "the image {} lacks its blob {digest}; make or pull it again",
                    image.hex()
                )
            }
            Self::Manifest { path, why } => write!(f, "the image manifest {} is damaged: {why}", path.display()),
            Self::Name { path } => write!(f, "the name in {} is of no image", path.display()),
            Self::Strange { path } => write!(f, "the file {} does not belong to the store", path.display()),
        }
    }
}

impl Store {
    /// Frees what no image needs: blobs, what is left of work that was killed, downloads that nobody went on with for
    /// [`PARTIAL_LIFE`].
    ///
    /// # Errors
    /// [`Error::Busy`] while somebody adds an image; [`Error::Manifest`] if one is damaged, as nobody knows then what it
    /// needs; and what the host says.
    pub fn collect_garbage(&self) -> Result<Freed, Error> {
        let _alone = self.exclusive()?;
        let _changing = lock_names(&self.layout)?;
        let mut needed = BTreeSet::new();
        for id in self.ids()? {
            needed.extend(self.manifest(id)?.blobs().map(|blob| blob.digest.hex()));
        }
        let mut freed = Freed::default();
        let blobs = self.layout.blobs();
        for file in entries(&blobs)? {
            // What is no blob is not ours to delete; a repair moves it away.
            let Some(hex) = file.to_str().filter(|hex| Digest::from_hex(hex).is_some()) else {
                continue;
            };
            if !needed.contains(hex) {
                freed.bytes += discard(&blobs.join(hex))?;
                freed.blobs += 1;
            }
        }
        // With the lock, nothing there has an owner.
        let tmp = self.layout.tmp();
        for file in entries(&tmp)? {
            freed.bytes += discard(&tmp.join(file))?;
            freed.leftovers += 1;
        }
        let partial = self.layout.partial();
        for file in entries(&partial)? {
            let path = partial.join(file);
            let age = fs::metadata(&path)
                .and_then(|metadata| metadata.modified())
                .map_err(Error::io("look at", &path))?
                .elapsed();
            if age.is_ok_and(|age| age > PARTIAL_LIFE) {
                freed.bytes += discard(&path)?;
                freed.leftovers += 1;
            }
        }
        Ok(freed)
    }

    /// Looks for damage. Reads every blob, unless it is only to look at what takes no time.
    ///
    /// # Errors
    /// What the host says; [`Error::Cancelled`].
    pub fn verify(&self, read_blobs: bool, progress: &dyn Progress) -> Result<Vec<Problem>, Error> {
        let mut problems = Vec::new();
        let mut images: BTreeMap<Digest, Manifest> = BTreeMap::new();
        let folder = self.layout.images();
        for file in entries(&folder)? {
            let id = file
                .to_str()
                .and_then(|name| Digest::from_hex(name.strip_suffix(".json")?));
            let path = folder.join(file);
            match id.map(|id| (id, self.manifest(id))) {
                None => problems.push(Problem::Strange { path }),
                Some((id, Ok(manifest))) => drop(images.insert(id, manifest)),
                Some((_, Err(Error::Manifest { why, .. }))) => problems.push(Problem::Manifest { path, why }),
                // Removed meanwhile.
                Some((_, Err(_))) if !path.exists() => {}
                Some((_, Err(error))) => return Err(error),
            }
        }
        let known = self.names()?;
        let folder = self.layout.names();
        for file in entries(&folder)? {
            let name = file.to_str().and_then(Name::from_file_name);
            let id = name.and_then(|name| known.get(&name));
            let path = folder.join(file);
            if !id.is_some_and(|id| self.manifest_path(*id).exists()) && path.exists() {
                problems.push(Problem::Name { path });
            }
        }
        let blobs = self.layout.blobs();
        for (id, manifest) in &images {
            for blob in manifest.blobs() {
                let there = fs::metadata(blobs.join(blob.digest.hex()))
                    .map(|there| there.len())
                    .ok();
                if there != Some(blob.size) && self.manifest_path(*id).exists() {
                    problems.push(Problem::Missing {
                        digest: blob.digest,
                        image: *id,
                    });
                }
            }
        }
        for file in entries(&blobs)? {
            let path = blobs.join(&file);
            let Some(digest) = file.to_str().and_then(Digest::from_hex) else {
                problems.push(Problem::Strange { path });
                continue;
            };
            if read_blobs && !self.sound(digest, progress)? {
                let of = |manifest: &Manifest| manifest.blobs().any(|blob| blob.digest == digest);
                problems.push(Problem::Corrupt {
                    digest,
                    images: images.iter().filter(|(_, it)| of(it)).map(|(id, _)| *id).collect(),
                });
            }
        }
        Ok(problems)
    }

    /// True if a blob is what its name says, or is not there.
    fn sound(&self, digest: Digest, progress: &dyn Progress) -> Result<bool, Error> {
        let path = self.layout.blobs().join(digest.hex());
        match File::open(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(true),
            file => Ok(hash(&file.map_err(Error::io("read", &path))?, &path, progress)?.0 == digest),
        }
    }

    /// Takes damaged files out of the way, into the folder `quarantine` of the store: what was damaged can be made or pulled
    /// again then. Nothing is deleted, but names of no image. Returns where the files are now.
    ///
    /// # Errors
    /// [`Error::Busy`] while somebody adds an image; what the host says; [`Error::Cancelled`].
    pub fn repair(&self, problems: &[Problem], progress: &dyn Progress) -> Result<Vec<PathBuf>, Error> {
        let _alone = self.exclusive()?;
        let _changing = lock_names(&self.layout)?;
        let blobs = self.layout.blobs();
        let mut moved = Vec::new();
        // Others may have repaired since the problems were found: each is looked at again.
        for problem in problems {
            let damaged = match problem {
                Problem::Corrupt { digest, .. } if !self.sound(*digest, progress)? => blobs.join(digest.hex()),
                Problem::Missing { digest, image } => {
                    let size = |image| Some(self.manifest(image).ok()?.blobs().find(|b| b.digest == *digest)?.size);
                    let path = blobs.join(digest.hex());
                    match (fs::metadata(&path).map(|there| there.len()), size(*image)) {
                        (Ok(there), Some(size)) if there != size => path,
                        _ => continue,
                    }
                }
                Problem::Manifest { path, .. } => {
                    let hex = path.file_stem().and_then(|stem| Digest::from_hex(stem.to_str()?));
                    match hex.map(|id| self.manifest(id)) {
                        Some(Err(Error::Manifest { .. })) => path.clone(),
                        _ => continue,
                    }
                }
                Problem::Name { path } => {
                    let name = path.file_name().and_then(|name| Name::from_file_name(name.to_str()?));
                    let id = name.and_then(|name| self.names().ok()?.get(&name).copied());
                    if !id.is_some_and(|id| self.manifest_path(id).exists()) {
                        remove(path)?;
                    }
                    continue;
                }
                Problem::Strange { path } => path.clone(),
                Problem::Corrupt { .. } => continue,
            };
            moved.extend(self.quarantine(&damaged)?);
        }
        Ok(moved)
    }

    /// Moves a file away, if it is there. One that was moved before keeps its place.
    fn quarantine(&self, path: &Path) -> Result<Option<PathBuf>, Error> {
        let Some(name) = path.file_name() else { return Ok(None) };
        if !path.exists() {
            return Ok(None);
        }
        let folder = self.layout.quarantine();
        let to = (0u32..)
            .map(|number| {
                let mut name = name.to_owned();
                name.push(format!(".{number}"));
                folder.join(name)
            })
            .find(|to| !to.exists())
            .expect("fewer than 2^32 files");
        fs::rename(path, &to).map_err(Error::io("move away", path))?;
        sync_folder_of(path)?;
        sync_folder_of(&to)?;
        Ok(Some(to))
    }
}

/// Deletes a file or folder that nothing needs; returns the space that frees.
fn discard(path: &Path) -> Result<u64, Error> {
    let metadata = fs::symlink_metadata(path).map_err(Error::io("look at", path))?;
    if metadata.is_dir() {
        fs::remove_dir_all(path).map_err(Error::io("remove", path))?;
        return Ok(0);
    }
    remove(path)?;
    Ok(metadata.blocks() * 512)
}
