//! The store: images by name and id, added whole, used under a lock, removed when nobody uses them.

use crate::blob::{self, BlobWriter};
use crate::layout::{Layout, entries, read_bounded, sync_folder_of, take_lock};
use crate::manifest::{self, Blob, Manifest};
use crate::progress::Progress;
use crate::{Digest, Error, Name};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// Digits that an id's prefix must have, so that a short word is taken for a name.
const PREFIX: usize = 4;

/// A folder with images. Any number of processes and threads may use it at once.
#[derive(Clone, Debug)]
pub struct Store {
    pub(crate) layout: Layout,
}

/// An image that stays as long as this value lives.
#[derive(Debug)]
pub struct Image {
    id: Digest,
    manifest: Manifest,
    blobs: PathBuf,
    /// Shared lock of the manifest.
    _used: File,
}

/// A line of [`Store::list`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// The image's id.
    pub id: Digest,
    /// Its names, in order.
    pub names: Vec<Name>,
    /// What it is made of.
    pub manifest: Manifest,
}

/// The right to add to the store: garbage is not collected meanwhile.
#[derive(Debug)]
pub struct Ingest {
    layout: Layout,
    _lock: File,
}

impl Store {
    /// Opens the store in the folder `root`, and makes it if there is none. A store that can only be read is fine for all
    /// that does not change it.
    ///
    /// # Errors
    /// If the folder has other things, or a newer store, or the host refuses.
    pub fn open(root: &Path) -> Result<Self, Error> {
        Layout::open(root).map(|layout| Self { layout })
    }

    /// The store's folder.
    pub fn root(&self) -> &Path {
        &self.layout.root
    }

    /// Begins to add. Waits while another process collects garbage.
    ///
    /// # Errors
    /// What the host says.
    pub fn ingest(&self) -> Result<Ingest, Error> {
        let lock = self.layout.lock_file("lock")?;
        lock.lock_shared().map_err(Error::io("lock", &self.layout.root))?;
        Ok(Ingest {
            layout: self.layout.clone(),
            _lock: lock,
        })
    }

    /// No other process adds, checks repairs or collects garbage while the result lives.
    pub(crate) fn exclusive(&self) -> Result<File, Error> {
        let lock = self.layout.lock_file("lock")?;
        match take_lock(|| lock.try_lock()).map_err(Error::io("lock", &self.layout.root))? {
            true => Ok(lock),
            false => Err(Error::Busy {
                path: self.layout.root.clone(),
                doing: "adding an image or cleaning up",
            }),
        }
    }

    /// The image of this name, or whose id is or begins so.
    ///
    /// # Errors
    /// [`Error::Unknown`], with the nearest name; [`Error::Ambiguous`]; and what the host says.
    pub fn resolve(&self, text: &str) -> Result<Digest, Error> {
        let name = text.parse::<Name>();
        if let Ok(name) = &name
            && let Some(id) = self.named(name)?
        {
            return Ok(id);
        }
        let digits = text.strip_prefix("sha256:").unwrap_or(text);
        if digits.len() >= PREFIX && digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            let mut found = self.ids()?;
            found.retain(|id| id.hex().starts_with(&digits.to_lowercase()));
            match found[..] {
                [] => {}
                [id] => return Ok(id),
                _ => {
                    return Err(Error::Ambiguous {
                        prefix: digits.into(),
                        count: found.len(),
                    });
                }
            }
        }
        // Only now: an id may be no name ("sha256:...").
        let shown = match name {
            Ok(name) => name.to_string(),
            Err(_) if digits.len() != text.len() => text.into(),
            Err(error) => return Err(error),
        };
        let names = self.names()?;
        Err(Error::Unknown {
            nearest: nearest(&shown, names.keys()),
            name: shown,
        })
    }

    /// Takes an image into use.
    ///
    /// # Errors
    /// As [`Store::resolve`]; [`Error::Missing`] if one of its blobs is not there in its full length, and
    /// [`Error::Manifest`]. The content of its blobs is not checked: that takes long, and is for [`Store::verify`].
    pub fn image(&self, text: &str) -> Result<Image, Error> {
        let id = self.resolve(text)?;
        let path = self.manifest_path(id);
        let gone = || Error::Unknown {
            name: text.into(),
            nearest: None,
        };
        let file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(gone()),
            file => file.map_err(Error::io("read", &path))?,
        };
        file.lock_shared().map_err(Error::io("lock", &path))?;
        use std::os::unix::fs::MetadataExt;
        // Removed between the opening and the lock.
        if file.metadata().map_err(Error::io("read", &path))?.nlink() == 0 {
            return Err(gone());
        }
        let manifest = self.manifest(id)?;
        let blobs = self.layout.blobs();
        for blob in manifest.blobs() {
            if fs::metadata(blobs.join(blob.digest.hex()))
                .map(|there| there.len())
                .ok()
                != Some(blob.size)
            {
                return Err(Error::Missing {
                    image: id,
                    digest: blob.digest,
                });
            }
        }
        Ok(Image {
            id,
            manifest,
            blobs,
            _used: file,
        })
    }

    /// All images that can be read, in the order of their ids; [`Store::verify`] tells of the others.
    ///
    /// # Errors
    /// What the host says.
    pub fn list(&self) -> Result<Vec<Listed>, Error> {
        let mut names: BTreeMap<Digest, Vec<Name>> = BTreeMap::new();
        for (name, id) in self.names()? {
            names.entry(id).or_default().push(name);
        }
        let mut images = Vec::new();
        for id in self.ids()? {
            match self.manifest(id) {
                Ok(manifest) => images.push(Listed {
                    id,
                    names: names.remove(&id).unwrap_or_default(),
                    manifest,
                }),
                Err(error) => tracing::warn!(%id, %error, "an image is left out"),
            }
        }
        Ok(images)
    }

    /// Gives an image one more name, which another image may have had until then.
    ///
    /// # Errors
    /// As [`Store::resolve`].
    pub fn tag(&self, image: &str, name: &Name) -> Result<(), Error> {
        let _changing = lock_names(&self.layout)?;
        let id = self.resolve(image)?;
        write_name(&self.layout, name, id)
    }

    /// Removes a name, and the image with its last name; or an image with all its names, if it is given by its id. Its blobs
    /// go with the next collection of garbage.
    ///
    /// # Errors
    /// As [`Store::resolve`]; [`Error::InUse`], and then nothing is removed.
    pub fn remove(&self, text: &str) -> Result<(), Error> {
        let _changing = lock_names(&self.layout)?;
        let id = self.resolve(text)?;
        let all = self.names()?;
        let given = text.parse::<Name>().ok().filter(|name| all.contains_key(name));
        let mut names: Vec<Name> = all
            .into_iter()
            .filter(|(_, of)| *of == id)
            .map(|(name, _)| name)
            .collect();
        let whole = given.is_none() || names.len() <= 1;
        if let Some(given) = given {
            names = vec![given];
        }
        let path = self.manifest_path(id);
        let mut used = None;
        if whole {
            let file = File::open(&path).map_err(Error::io("open", &path))?;
            if !take_lock(|| file.try_lock()).map_err(Error::io("lock", &path))? {
                return Err(Error::InUse { image: text.into() });
            }
            used = Some(file);
        }
        // The names first: after a crash in between the image is still there, under its id.
        for name in names {
            remove(&self.layout.names().join(name.file_name()))?;
        }
        if used.is_some() {
            remove(&path)?;
        }
        Ok(())
    }

    /// Ids of all manifests, damaged ones too.
    pub(crate) fn ids(&self) -> Result<Vec<Digest>, Error> {
        let files = entries(&self.layout.images())?;
        Ok(files
            .iter()
            .filter_map(|file| Digest::from_hex(file.to_str()?.strip_suffix(".json")?))
            .collect())
    }

    pub(crate) fn manifest_path(&self, id: Digest) -> PathBuf {
        self.layout.images().join(format!("{}.json", id.hex()))
    }

    /// An image's manifest, if it is undamaged.
    pub(crate) fn manifest(&self, id: Digest) -> Result<Manifest, Error> {
        let path = self.manifest_path(id);
        let bytes = match read_bounded(&path, manifest::LONGEST) {
            Err(error) if error.kind() == io::ErrorKind::InvalidData => Err(error.to_string()),
            bytes => Ok(bytes.map_err(Error::io("read", &path))?),
        };
        bytes
            .and_then(|bytes| {
                let actual = Digest::of(&bytes);
                if actual != id {
                    return Err(format!("its content has the digest {actual}"));
                }
                Manifest::parse(&bytes)
            })
            .map_err(|why| Error::Manifest { path, why })
    }

    /// All names and what they stand for. A file whose content is no id stands for nothing.
    pub(crate) fn names(&self) -> Result<BTreeMap<Name, Digest>, Error> {
        let mut names = BTreeMap::new();
        for file in entries(&self.layout.names())? {
            if let Some(name) = file.to_str().and_then(Name::from_file_name)
                && let Some(id) = self.named(&name)?
            {
                names.insert(name, id);
            }
        }
        Ok(names)
    }

    fn named(&self, name: &Name) -> Result<Option<Digest>, Error> {
        let path = self.layout.names().join(name.file_name());
        match read_bounded(&path, 100) {
            Ok(bytes) => Ok(std::str::from_utf8(&bytes)
                .ok()
                .and_then(|text| text.trim_end().parse().ok())),
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidData) => Ok(None),
            Err(error) => Err(Error::io("read", path)(error)),
        }
    }
}

pub(crate) fn lock_names(layout: &Layout) -> Result<File, Error> {
    let lock = layout.lock_file("names.lock")?;
    lock.lock().map_err(Error::io("lock", &layout.root))?;
    Ok(lock)
}

/// Removes a file that may be gone already.
pub(crate) fn remove(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::io("remove", path)(error)),
        Ok(()) => sync_folder_of(path),
    }
}

fn write_name(layout: &Layout, name: &Name, id: Digest) -> Result<(), Error> {
    layout.write_atomically(&layout.names().join(name.file_name()), format!("{id}\n").as_bytes())
}

/// The name that somebody may have meant.
fn nearest<'a>(text: &str, names: impl Iterator<Item = &'a Name>) -> Option<String> {
    /// Of 1: below, names have little in common.
    const ALIKE: f64 = 0.6;
    names
        .map(|name| {
            let shown = name.to_string();
            // Without the tag too: who writes debain means debian:12 if there is no debian:latest.
            let bare = text.strip_suffix(":latest").unwrap_or(text);
            let alike = strsim::normalized_damerau_levenshtein(text, &shown)
                .max(strsim::normalized_damerau_levenshtein(bare, name.repository()));
            (alike, shown)
        })
        .filter(|(alike, _)| *alike >= ALIKE)
        .max_by(|(one, _), (other, _)| one.total_cmp(other))
        .map(|(_, shown)| shown)
}

impl Ingest {
    /// A new blob, to be written.
    ///
    /// # Errors
    /// What the host says.
    pub fn blob(&self) -> Result<BlobWriter, Error> {
        BlobWriter::new(&self.layout)
    }

    /// Takes in a whole stream; `what` is what errors call it.
    ///
    /// # Errors
    /// What the host says; [`Error::Cancelled`].
    pub fn add(&self, from: &mut dyn Read, what: &Path, progress: &dyn Progress) -> Result<Blob, Error> {
        let mut writer = self.blob()?;
        blob::copy(from, &mut writer, what, progress)?;
        writer.finish(None)
    }

    /// Takes in a file.
    ///
    /// # Errors
    /// What the host says; [`Error::Cancelled`].
    pub fn add_file(&self, path: &Path, progress: &dyn Progress) -> Result<Blob, Error> {
        let mut file = File::open(path).map_err(Error::io("open", path))?;
        self.add(&mut file, path, progress)
    }

    pub(crate) fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Makes an image of blobs that are in the store, and gives it these names. Returns its id.
    ///
    /// # Errors
    /// [`Error::Refused`] if the manifest is none, [`Error::Missing`] if a blob is not there, and what the host says.
    pub fn commit(&self, manifest: &Manifest, names: &[Name]) -> Result<Digest, Error> {
        let bytes = manifest.to_bytes().map_err(Error::Refused)?;
        let id = Digest::of(&bytes);
        for blob in manifest.blobs() {
            let path = self.layout.blobs().join(blob.digest.hex());
            if fs::metadata(path).map(|there| there.len()).ok() != Some(blob.size) {
                return Err(Error::Missing {
                    image: id,
                    digest: blob.digest,
                });
            }
        }
        let _changing = lock_names(&self.layout)?;
        let path = self.layout.images().join(format!("{}.json", id.hex()));
        // The same file, and perhaps in use under a lock of its own: left as it is, unless it is damaged.
        if fs::read(&path).ok().as_deref() != Some(&bytes) {
            self.layout.write_atomically(&path, &bytes)?;
        }
        for name in names {
            write_name(&self.layout, name, id)?;
        }
        Ok(id)
    }
}

impl Image {
    /// Its id.
    pub fn id(&self) -> Digest {
        self.id
    }

    /// What it is made of.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    pub(crate) fn blob_path(&self, blob: Blob) -> PathBuf {
        self.blobs.join(blob.digest.hex())
    }

    /// The kernel's file, for reading only.
    pub fn kernel(&self) -> Option<PathBuf> {
        self.manifest.kernel.map(|blob| self.blob_path(blob))
    }

    /// The initramfs's file, for reading only.
    pub fn initramfs(&self) -> Option<PathBuf> {
        self.manifest.initramfs.map(|blob| self.blob_path(blob))
    }

    /// The root disk's file, for reading only.
    pub fn disk(&self) -> Option<PathBuf> {
        self.manifest.disk.map(|blob| self.blob_path(blob))
    }
}
