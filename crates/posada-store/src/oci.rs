//! Images of OCI and Docker, made bootable: their layers become one ext4 disk, and a kernel of the store starts it.
//!
//! They come from a registry ([`Store::pull`]) or an archive ([`Store::import_oci`]). Everything in them is checked by its
//! digest, up to the content of each unpacked layer, and nothing in them is trusted beyond that: the layers are merged in
//! memory, so that no path of theirs is ever one of the host.

mod archive;
mod entries;
mod ext4;
mod registry;
mod spec;
#[cfg(test)]
mod tests;
mod tree;

use crate::decompress::decompress;
use crate::digest::Hasher;
use crate::manifest::{self, Architecture, LARGEST, Manifest, Origin};
use crate::progress::{Progress, Step};
use crate::{Digest, Error, Image, Ingest, Name, Store, blob};
use registry::{Downloaded, Registry};
use spec::{Document, ImageConfig, unusable};
use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};
use tree::Tree;

/// Who asks a registry.
#[derive(Clone)]
pub struct Credentials {
    /// The user's name.
    pub user: String,
    /// The password, or a token in its place.
    pub password: String,
}

impl Credentials {
    /// As HTTP wants them (RFC 7617).
    fn basic(&self) -> String {
        use base64::Engine;
        let text = format!("{}:{}", self.user, self.password);
        format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(text))
    }
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials")
            .field("user", &self.user)
            .finish_non_exhaustive()
    }
}

/// A file to add to the root file system, such as the agent.
#[derive(Clone, Debug)]
pub struct AddedFile {
    /// Where it goes, without a slash in front.
    pub path: String,
    /// Permissions.
    pub mode: u32,
    /// Its content.
    pub from: PathBuf,
}

/// How to make an OCI image bootable.
#[derive(Debug)]
pub struct PullOptions<'a> {
    /// Which of the image's architectures.
    pub architecture: Architecture,
    /// An image of the same store whose kernel and initramfs this one gets.
    pub kernel: &'a Image,
    /// The kernel's command line.
    pub command_line: String,
    /// What to add to the image's files.
    pub added: Vec<AddedFile>,
    /// Bytes to leave free on the disk. They take no space until they are used, and a VM's layer can have more.
    pub room: u64,
    /// Bytes of all layers, unpacked, at most.
    pub largest: u64,
    /// Ask the registry without encryption, as it is always done for one on this machine.
    pub plain_http: bool,
    /// For registries that want to know who asks.
    pub credentials: Option<Credentials>,
}

impl<'a> PullOptions<'a> {
    /// The usual, with this kernel.
    pub fn new(kernel: &'a Image) -> Self {
        Self {
            architecture: Architecture::X86_64,
            kernel,
            command_line: "console=ttyS0 root=/dev/vda rw".into(),
            added: Vec::new(),
            room: 1 << 30,
            largest: 64 << 30,
            plain_http: false,
            credentials: None,
        }
    }
}

/// A layer as it came.
enum Layer {
    Piece(archive::Piece),
    File(Downloaded),
}

/// An image as it came, to be put together.
struct Parts {
    manifest: Digest,
    config: ImageConfig,
    layers: Vec<Layer>,
}

impl Store {
    /// Pulls an image from its registry and gives it its name; if it is there already, in the same version and with the same
    /// kernel, only the name. Returns its id.
    ///
    /// # Errors
    /// [`Error::Registry`], [`Error::Digest`], [`Error::Oci`], [`Error::Tool`], what the host says, [`Error::Cancelled`]. What
    /// was downloaded stays for the next try, for [`crate::PARTIAL_LIFE`].
    pub fn pull(&self, name: &Name, options: &PullOptions<'_>, progress: &dyn Progress) -> Result<Digest, Error> {
        let ingest = self.ingest()?;
        let what = name.to_string();
        let mut registry = Registry::new(name, options);
        let reference = name
            .digest()
            .map_or_else(|| name.tag().to_string(), |digest| digest.to_string());
        let (mut digest, mut document) = registry.document(&reference, progress)?;
        if let Document::Index(index) = &document {
            let wanted = spec::choose(&what, index, options.architecture)?.digest;
            (digest, document) = registry.document(&wanted.to_string(), progress)?;
        }
        let Document::Manifest(manifest) = document else {
            return Err(unusable(&what, "its indexes are nested too deep"));
        };
        let added = digest_of_added(&options.added, progress)?;
        if let Some(id) = self.same(digest, added, options, &ingest, std::slice::from_ref(name))? {
            return Ok(id);
        }
        let config = registry.small_blob(manifest.config.digest, progress)?;
        let config = ImageConfig::parse(&what, &config, options.architecture)?;
        let total = manifest
            .layers
            .iter()
            .try_fold(0u64, |sum, layer| sum.checked_add(layer.size))
            .filter(|total| *total <= options.largest)
            .ok_or_else(|| {
                unusable(
                    &what,
                    format_args!("its layers have more than {} bytes", options.largest),
                )
            })?;
        // In the order of their digests, so that two pulls with common layers never wait for each other in a circle.
        let mut order: Vec<_> = manifest.layers.iter().map(|layer| (layer.digest, layer.size)).collect();
        order.sort();
        order.dedup();
        let (mut downloaded, mut done) = (Vec::new(), 0);
        let partial = ingest.layout().partial();
        for (digest, size) in order {
            downloaded.push((digest, registry.blob(digest, size, &partial, (done, total), progress)?));
            done += size;
        }
        // Another process may have pulled the same while this one waited for a layer.
        let same = self.same(digest, added, options, &ingest, std::slice::from_ref(name))?;
        let id = match same {
            Some(id) => id,
            None => {
                let mut layers = Vec::new();
                for layer in &manifest.layers {
                    let (_, there) = downloaded
                        .iter()
                        .find(|(digest, _)| *digest == layer.digest)
                        .ok_or_else(|| unusable(&what, "a layer is missing"))?;
                    layers.push(Layer::File(Downloaded {
                        path: there.path.clone(),
                        file: File::open(&there.path).map_err(Error::io("open", &there.path))?,
                    }));
                }
                let parts = Parts {
                    manifest: digest,
                    config,
                    layers,
                };
                make(
                    &ingest,
                    &what,
                    parts,
                    added,
                    options,
                    std::slice::from_ref(name),
                    progress,
                )?
            }
        };
        for (_, layer) in downloaded {
            crate::store::remove(&layer.path)?;
            drop(layer.file);
        }
        Ok(id)
    }

    /// Takes in the image of an archive of OCI or Docker, with the names that it has there. If there are several, `wanted` says
    /// which. Returns its id and names.
    ///
    /// # Errors
    /// As [`Store::pull`].
    pub fn import_oci(
        &self,
        path: &Path,
        wanted: Option<&Name>,
        options: &PullOptions<'_>,
        progress: &dyn Progress,
    ) -> Result<(Digest, Vec<Name>), Error> {
        let ingest = self.ingest()?;
        let tmp = ingest.layout().tmp();
        let found = archive::open(path, wanted, options.architecture, &tmp, options.largest, progress)?;
        let added = digest_of_added(&options.added, progress)?;
        if let Some(id) = self.same(found.parts.manifest, added, options, &ingest, &found.names)? {
            return Ok((id, found.names));
        }
        let what = path.file_name().unwrap_or_default().to_string_lossy();
        let id = make(&ingest, &what, found.parts, added, options, &found.names, progress)?;
        Ok((id, found.names))
    }

    /// The image that was made of the same before, which gets these names.
    fn same(
        &self,
        of: Digest,
        added_files: Option<Digest>,
        options: &PullOptions<'_>,
        ingest: &Ingest,
        names: &[Name],
    ) -> Result<Option<Digest>, Error> {
        let kernel = options.kernel.manifest();
        let found = self.list()?.into_iter().find(|listed| {
            let it = &listed.manifest;
            let same =
                matches!(&it.origin, Origin::Oci { manifest, added, .. } if (*manifest, *added) == (of, added_files));
            same && (it.kernel, it.initramfs) == (kernel.kernel, kernel.initramfs)
                && it.command_line == options.command_line
        });
        match found.map(|listed| ingest.commit(&listed.manifest, names)) {
            // Its blobs are gone: it is made anew.
            Some(Err(Error::Missing { .. })) | None => Ok(None),
            Some(id) => id.map(Some),
        }
    }
}

/// One digest for all that is added and where; `None` if nothing is.
fn digest_of_added(added: &[AddedFile], progress: &dyn Progress) -> Result<Option<Digest>, Error> {
    if added.is_empty() {
        return Ok(None);
    }
    let mut text = String::new();
    for file in added {
        let from = File::open(&file.from).map_err(Error::io("open", &file.from))?;
        let (digest, _) = blob::hash(&from, &file.from, progress)?;
        text += &format!("{digest} {:o} {:?}\n", file.mode, file.path);
    }
    Ok(Some(Digest::of(text.as_bytes())))
}

/// Hashes what goes by.
struct Hashed<R> {
    inner: R,
    hasher: Hasher,
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(bytes)?;
        self.hasher.update(&bytes[..count]);
        Ok(count)
    }
}

/// Puts an image together.
fn make(
    ingest: &Ingest,
    what: &str,
    parts: Parts,
    added: Option<Digest>,
    options: &PullOptions<'_>,
    names: &[Name],
    progress: &dyn Progress,
) -> Result<Digest, Error> {
    if options.kernel.manifest().kernel.is_none() {
        return Err(Error::Refused(format!(
            "the image {} has no kernel to boot with",
            options.kernel.id()
        )));
    }
    if parts.layers.len() != parts.config.layers().len() {
        return Err(unusable(
            what,
            "its manifest and its configuration have not the same layers",
        ));
    }
    let tmp = ingest.layout().tmp();
    let work = tempfile::TempDir::new_in(&tmp).map_err(Error::io("make a folder in", &tmp))?;
    let mut tree = Tree::new(work.path(), options.largest.min(LARGEST));
    for (layer, expected) in parts.layers.into_iter().zip(parts.config.layers()) {
        let stream: Box<dyn Read> = match layer {
            Layer::Piece(piece) => Box::new(piece),
            Layer::File(mut downloaded) => {
                downloaded.file.rewind().map_err(Error::io("read", &downloaded.path))?;
                Box::new(downloaded.file)
            }
        };
        let wrong = |error: io::Error| unusable(what, format_args!("a layer cannot be read: {error}"));
        let mut hashed = Hashed {
            inner: decompress(stream).map_err(wrong)?,
            hasher: Hasher::default(),
        };
        tree.apply(&mut hashed, what, progress)?;
        // What lies behind the tar's end counts too; padding, of which there is little.
        let rest = io::copy(&mut (&mut hashed).take(options.largest), &mut io::sink()).map_err(wrong)?;
        tracing::trace!(rest, "bytes behind a layer's end");
        let actual = hashed.hasher.finish();
        if actual != *expected {
            return Err(Error::Digest {
                what: format!("an unpacked layer of {what}"),
                expected: *expected,
                actual,
                help: "whoever built the image must build it anew",
            });
        }
    }
    for file in &options.added {
        let mut content = File::open(&file.from).map_err(Error::io("open", &file.from))?;
        tree.add_file(&file.path, file.mode, &mut content, progress)?;
    }
    // What a booting system mounts on, which images without an own init may lack.
    for (folder, mode) in [
        ("dev", 0o755),
        ("proc", 0o555),
        ("sys", 0o555),
        ("run", 0o755),
        ("tmp", 0o1777),
    ] {
        tree.ensure_folder(folder, mode);
    }
    let disk = ingest.layout().temporary()?;
    progress.update(Step::Format, 0, None);
    ext4::write(
        &tree,
        disk.path(),
        work.path(),
        options.room,
        parts.manifest,
        what,
        progress,
    )?;
    let disk = blob::adopt(ingest.layout(), disk, progress)?;
    let kernel = options.kernel.manifest();
    let manifest = Manifest {
        version: manifest::VERSION,
        architecture: options.architecture,
        origin: Origin::Oci {
            reference: what.into(),
            manifest: parts.manifest,
            added,
        },
        created: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs()),
        kernel: kernel.kernel,
        initramfs: kernel.initramfs,
        disk: Some(disk),
        command_line: options.command_line.clone(),
        config: parts.config.program(),
    };
    ingest.commit(&manifest, names)
}
