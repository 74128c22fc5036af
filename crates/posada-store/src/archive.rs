//! An image as one file, to carry elsewhere: a gzipped tar of `posada-image` (which says what it is), `manifest.json`, `names`
//! and `blobs/<hex>`, in this order.

use crate::decompress::decompress;
use crate::disk::{beside, place};
use crate::manifest::{self, Manifest};
use crate::progress::{Progress, Quiet, Step, go_on};
use crate::{Digest, Error, Image, Ingest, Name, blob};
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

const MARK: &str = "posada-image";
const VERSION: &[u8] = b"1\n";
const MANIFEST: &str = "manifest.json";
const NAMES: &str = "names";
const BLOBS: &str = "blobs/";
/// Bytes of the longest list of names.
const LONGEST_NAMES: u64 = 64 << 10;

/// Tells how much went by, and when to stop.
struct Watched<'a, R> {
    inner: R,
    done: u64,
    total: Option<u64>,
    progress: &'a dyn Progress,
}

impl<R: Read> Read for Watched<'_, R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        if self.progress.cancelled() {
            // Not "interrupted": that is tried again.
            return Err(io::Error::other("cancelled"));
        }
        let count = self.inner.read(bytes)?;
        self.done += count as u64;
        self.progress.update(Step::Copy, self.done, self.total);
        Ok(count)
    }
}

impl Image {
    /// Writes the image into a new file, with these names in it.
    ///
    /// # Errors
    /// What the host says, also if there is a file `to` already; [`Error::Cancelled`].
    pub fn export_archive(&self, names: &[Name], to: &Path, progress: &dyn Progress) -> Result<(), Error> {
        let temporary = beside(to)?;
        let wrong = |error| match progress.cancelled() {
            true => Error::Cancelled,
            false => Error::io("write", to)(error),
        };
        // Fast: what gains most by compression are zeroes.
        let gzip = flate2::write::GzEncoder::new(temporary.as_file(), flate2::Compression::fast());
        let mut tar = tar::Builder::new(gzip);
        let manifest = self.manifest().to_bytes().map_err(Error::Refused)?;
        let names: String = names.iter().map(|name| format!("{name}\n")).collect();
        for (name, content) in [(MARK, VERSION), (MANIFEST, &manifest), (NAMES, names.as_bytes())] {
            append(&mut tar, name, content.len() as u64, content).map_err(wrong)?;
        }
        let mut blobs: Vec<_> = self.manifest().blobs().collect();
        blobs.dedup_by_key(|blob| blob.digest);
        let total = blobs.iter().map(|blob| blob.size).sum();
        let mut done = 0;
        for blob in blobs {
            let path = self.blob_path(blob);
            let content = Watched {
                inner: File::open(&path).map_err(Error::io("open", &path))?,
                done,
                total: Some(total),
                progress,
            };
            append(&mut tar, &format!("{BLOBS}{}", blob.digest.hex()), blob.size, content).map_err(wrong)?;
            done += blob.size;
        }
        tar.into_inner().and_then(|gzip| gzip.finish()).map_err(wrong)?;
        place(temporary, to)
    }
}

fn append(tar: &mut tar::Builder<impl io::Write>, name: &str, size: u64, content: impl Read) -> io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_size(size);
    header.set_mode(0o644);
    tar.append_data(&mut header, name, content)
}

/// True if a file is such an archive, and not one of OCI or Docker.
///
/// # Errors
/// What the host says.
pub fn is_image_archive(path: &Path) -> Result<bool, Error> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    let first = || -> io::Result<bool> {
        let mut tar = tar::Archive::new(decompress(file)?);
        let Some(entry) = tar.entries()?.next() else {
            return Ok(false);
        };
        Ok(&*entry?.path_bytes() == MARK.as_bytes())
    };
    // What cannot be read is none.
    Ok(first().unwrap_or(false))
}

impl Ingest {
    /// Takes in an image that [`Image::export_archive`] wrote, with the names that it has there and no others. Every blob is
    /// checked.
    ///
    /// # Errors
    /// [`Error::Refused`] says what is wrong with the archive, [`Error::Digest`] what is damaged in it; what the host says;
    /// [`Error::Cancelled`].
    pub fn import_archive(&self, path: &Path, progress: &dyn Progress) -> Result<(Digest, Vec<Name>), Error> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        let total = file.metadata().ok().map(|metadata| metadata.len());
        let watched = Watched {
            inner: file,
            done: 0,
            total,
            progress,
        };
        let wrong = |error: io::Error| match progress.cancelled() {
            true => Error::Cancelled,
            false => Error::io("read the archive", path)(error),
        };
        let refused = |why: String| Error::Refused(format!("the archive {} {why}", path.display()));
        let mut tar = tar::Archive::new(decompress(watched).map_err(wrong)?);
        let mut manifest: Option<Manifest> = None;
        let mut names = Vec::new();
        let mut first = true;
        for entry in tar.entries().map_err(wrong)? {
            go_on(progress)?;
            let mut entry = entry.map_err(wrong)?;
            let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
            let mut bounded = |most: u64| -> Result<Vec<u8>, Error> {
                let mut bytes = Vec::new();
                (&mut entry).take(most + 1).read_to_end(&mut bytes).map_err(wrong)?;
                if bytes.len() as u64 > most {
                    return Err(refused(format!("has more than {most} bytes in {name}")));
                }
                Ok(bytes)
            };
            match name.as_str() {
                MARK if first => {
                    if bounded(100)? != VERSION {
                        return Err(refused("is of a version that this program does not know".into()));
                    }
                }
                _ if first => return Err(refused("is not one of a posada image".into())),
                MANIFEST => {
                    let parsed = Manifest::parse(&bounded(manifest::LONGEST)?);
                    manifest = Some(parsed.map_err(|why| refused(format!("has a damaged manifest: {why}")))?);
                }
                NAMES => {
                    for line in String::from_utf8_lossy(&bounded(LONGEST_NAMES)?).lines() {
                        names.push(line.parse::<Name>()?);
                    }
                }
                _ => {
                    // Only what the manifest promises, in that size: nothing else fills the disk.
                    let digest = name.strip_prefix(BLOBS).and_then(Digest::from_hex);
                    let promised = manifest.iter().flat_map(Manifest::blobs);
                    let blob = promised.into_iter().find(|blob| Some(blob.digest) == digest);
                    let Some(blob) = blob.filter(|blob| blob.size == entry.size()) else {
                        return Err(refused(format!("has {name:?}, which its manifest does not have")));
                    };
                    let mut writer = self.blob()?;
                    // Progress is of the archive, which is shorter.
                    blob::copy(&mut entry, &mut writer, path, &Quiet).map_err(|error| match progress.cancelled() {
                        true => Error::Cancelled,
                        false => error,
                    })?;
                    writer.finish(Some(blob.digest))?;
                }
            }
            first = false;
        }
        let manifest = manifest.ok_or_else(|| refused("has no image".into()))?;
        Ok((self.commit(&manifest, &names)?, names))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Store;
    use crate::manifest::tests::example;

    fn exported() -> (tempfile::TempDir, std::path::PathBuf, Digest) {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("one")).unwrap();
        let ingest = store.ingest().unwrap();
        let kernel = ingest.add(&mut &b"kernel"[..], Path::new("x"), &Quiet).unwrap();
        let mut disk = ingest.blob().unwrap();
        disk.zeroes(20 << 20);
        io::Write::write_all(&mut disk, b"end").unwrap();
        let disk = disk.finish(None).unwrap();
        let id = ingest
            .commit(&example(Some(kernel), Some(disk)), &["a:1".parse().unwrap()])
            .unwrap();
        let to = folder.path().join("image.tar.gz");
        let names = ["a:1".parse().unwrap(), "b".parse().unwrap()];
        store.image("a:1").unwrap().export_archive(&names, &to, &Quiet).unwrap();
        (folder, to, id)
    }

    #[test]
    fn an_image_goes_from_one_store_to_another() {
        let (folder, archive, id) = exported();
        assert!(is_image_archive(&archive).unwrap());
        assert!(std::fs::metadata(&archive).unwrap().len() < 1 << 20);
        let store = Store::open(&folder.path().join("two")).unwrap();
        let (there, names) = store.ingest().unwrap().import_archive(&archive, &Quiet).unwrap();
        assert_eq!((there, names.len()), (id, 2));
        assert_eq!(store.image("b").unwrap().id(), id);
        assert_eq!(store.verify(true, &Quiet).unwrap(), []);
        use std::os::unix::fs::MetadataExt;
        let disk = store.image("b").unwrap().disk().unwrap();
        assert!(std::fs::metadata(disk).unwrap().blocks() <= 16);
    }

    #[test]
    fn cancelling_ends_both_ways() {
        /// Cancels when a little is done.
        struct Soon(std::sync::atomic::AtomicU32);
        impl Progress for Soon {
            fn cancelled(&self) -> bool {
                self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed) > 3
            }
        }
        let (folder, archive, _) = exported();
        let store = Store::open(&folder.path().join("one")).unwrap();
        let to = folder.path().join("other.tar.gz");
        let error = store
            .image("a:1")
            .unwrap()
            .export_archive(&[], &to, &Soon(0.into()))
            .unwrap_err();
        assert!(matches!(error, Error::Cancelled) && !to.exists(), "{error}");
        let store = Store::open(&folder.path().join("two")).unwrap();
        let error = store
            .ingest()
            .unwrap()
            .import_archive(&archive, &Soon(0.into()))
            .unwrap_err();
        assert!(matches!(error, Error::Cancelled), "{error}");
    }

    #[test]
    fn damaged_archives_are_refused_and_leave_no_image() {
        let (folder, archive, _) = exported();
        let mut plain = Vec::new();
        decompress(File::open(&archive).unwrap())
            .unwrap()
            .read_to_end(&mut plain)
            .unwrap();
        let store = Store::open(&folder.path().join("two")).unwrap();
        let bad = folder.path().join("bad.tar");
        let refused = |content: &[u8]| {
            std::fs::write(&bad, content).unwrap();
            let error = store.ingest().unwrap().import_archive(&bad, &Quiet).unwrap_err();
            assert_eq!(store.list().unwrap(), []);
            error.to_string()
        };
        let mut flipped = plain.clone();
        let at = plain.windows(6).rposition(|window| window == b"kernel").unwrap();
        flipped[at] ^= 1;
        assert!(refused(&flipped).contains("is damaged: it should be sha256:"));
        refused(&plain[..plain.len() / 2]);
        let gzip = std::fs::read(&archive).unwrap();
        refused(&gzip[..gzip.len() / 2]);
        assert!(refused(&plain[1024..]).contains("not one of a posada image"));
        refused(b"no archive at all");
        assert!(refused(b"").contains("no image"));
        assert!(!is_image_archive(&bad).unwrap());
        // What came whole before the damage is garbage.
        store.collect_garbage().unwrap();
        assert_eq!(std::fs::read_dir(store.root().join("blobs/sha256")).unwrap().count(), 0);
    }
}
