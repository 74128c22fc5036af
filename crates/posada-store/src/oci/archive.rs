//! Images in an archive: what `docker save`, `podman save` and `skopeo copy oci-archive:` write. The newer form has blobs by
//! digest and an `index.json`; the older one of Docker has a `manifest.json` with the names of its parts.

use super::spec::{Descriptor, Document, ImageConfig, LONGEST, choose, unusable};
use super::{Layer, Parts};
use crate::decompress::decompress;
use crate::digest::Hasher;
use crate::manifest::Architecture;
use crate::progress::{Progress, Step, go_on};
use crate::{Digest, Error, Name};
use serde::Deserialize;
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Files of an archive, at most.
const MOST: usize = 10_000;
const LONGEST_NAME: usize = 1024;
const BUFFER: usize = 256 << 10;
/// Symbolic links that lead to one file of an archive: old ones share layers so.
const MOST_LINKS: usize = 8;

/// A range of the archive.
#[derive(Clone)]
pub(super) struct Piece {
    file: Arc<File>,
    at: u64,
    left: u64,
}

impl Read for Piece {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let part = bytes.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let count = self.file.read_at(&mut bytes[..part], self.at)?;
        if count == 0 && part > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.at += count as u64;
        self.left -= count as u64;
        Ok(count)
    }
}

/// The archive's files, by name.
struct Archive {
    file: Arc<File>,
    ranges: HashMap<String, (u64, u64)>,
    links: HashMap<String, String>,
    what: String,
}

/// An entry of Docker's `manifest.json`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// What an archive has.
pub(super) struct Found {
    pub parts: Parts,
    pub names: Vec<Name>,
}

/// Finds the image in an archive: the only one, or that of the name `wanted`.
pub(super) fn open(
    path: &Path,
    wanted: Option<&Name>,
    architecture: Architecture,
    tmp: &Path,
    largest: u64,
    progress: &dyn Progress,
) -> Result<Found, Error> {
    let archive = Archive::open(path, tmp, largest, progress)?;
    if archive.ranges.contains_key("index.json") {
        archive.oci(wanted, architecture, progress)
    } else if archive.ranges.contains_key("manifest.json") {
        archive.docker(wanted, architecture)
    } else {
        Err(unusable(
            &archive.what,
            "the archive has neither an index.json nor a manifest.json",
        ))
    }
}

impl Archive {
    /// A compressed archive is unpacked first: its parts are needed in another order.
    fn open(path: &Path, tmp: &Path, largest: u64, progress: &dyn Progress) -> Result<Self, Error> {
        let what = path.display().to_string();
        let wrong = |error: io::Error| unusable(&what, format_args!("the archive cannot be read: {error}"));
        let mut file = File::open(path).map_err(Error::io("open", path))?;
        let mut begin = [0; 4];
        let compressed = file.read_at(&mut begin, 0).is_ok()
            && (begin.starts_with(&[0x1f, 0x8b]) || begin == [0x28, 0xb5, 0x2f, 0xfd]);
        if compressed {
            let mut plain = tempfile::tempfile_in(tmp).map_err(Error::io("write to", tmp))?;
            let mut stream = decompress(file).map_err(wrong)?;
            let mut buffer = vec![0; BUFFER];
            let mut done = 0;
            loop {
                go_on(progress)?;
                let count = stream.read(&mut buffer).map_err(wrong)?;
                if count == 0 {
                    break;
                }
                done += count as u64;
                if done > largest {
                    return Err(unusable(
                        &what,
                        format_args!("it has more than the {largest} bytes that are accepted"),
                    ));
                }
                plain.write_all(&buffer[..count]).map_err(Error::io("write to", tmp))?;
                progress.update(Step::Copy, done, None);
            }
            drop(stream);
            io::Seek::rewind(&mut plain).map_err(Error::io("read in", tmp))?;
            file = plain;
        }
        let (mut ranges, mut links) = (HashMap::new(), HashMap::new());
        let length = file.metadata().map_err(wrong)?.len();
        let mut tar = tar::Archive::new(&file);
        // Raw: no extension takes memory, and names of such archives are short.
        for entry in tar.entries_with_seek().map_err(wrong)?.raw(true) {
            go_on(progress)?;
            let entry = entry.map_err(wrong)?;
            let name = String::from_utf8_lossy(&entry.path_bytes())
                .trim_start_matches("./")
                .to_string();
            if ranges.len() + links.len() >= MOST || name.len() > LONGEST_NAME {
                return Err(unusable(
                    &what,
                    "the archive has too many files, or names that are too long",
                ));
            }
            if entry.header().entry_type().is_file() {
                let (at, size) = (entry.raw_file_position(), entry.size());
                if at.checked_add(size).is_none_or(|end| end > length) {
                    return Err(unusable(&what, "the archive is cut off"));
                }
                ranges.insert(name, (at, size));
            } else if entry.header().entry_type().is_symlink() {
                let target = entry.link_name_bytes().unwrap_or_default();
                let target = String::from_utf8_lossy(&target).into_owned();
                // Of the form ../<layer>/layer.tar, from a folder below the root.
                if let Some(target) = target.strip_prefix("../") {
                    links.insert(name, target.into());
                }
            }
        }
        Ok(Self {
            file: Arc::new(file),
            ranges,
            links,
            what,
        })
    }

    fn piece(&self, name: &str) -> Result<Piece, Error> {
        let mut name = name;
        for _ in 0..MOST_LINKS {
            match self.links.get(name) {
                Some(target) => name = target,
                None => break,
            }
        }
        let (at, left) = *self
            .ranges
            .get(name)
            .ok_or_else(|| unusable(&self.what, format_args!("the archive lacks {name}")))?;
        Ok(Piece {
            file: self.file.clone(),
            at,
            left,
        })
    }

    fn small(&self, name: &str) -> Result<Vec<u8>, Error> {
        let mut piece = self.piece(name)?;
        if piece.left > LONGEST {
            return Err(unusable(&self.what, format_args!("its {name} is too long")));
        }
        let mut bytes = Vec::new();
        piece
            .read_to_end(&mut bytes)
            .map_err(|error| unusable(&self.what, format_args!("the archive cannot be read: {error}")))?;
        Ok(bytes)
    }

    fn blob_name(digest: Digest) -> String {
        format!("blobs/sha256/{}", digest.hex())
    }

    fn small_blob(&self, descriptor: &Descriptor) -> Result<Vec<u8>, Error> {
        let bytes = self.small(&Self::blob_name(descriptor.digest))?;
        check(&self.what, descriptor.digest, Digest::of(&bytes))?;
        Ok(bytes)
    }

    fn oci(&self, wanted: Option<&Name>, architecture: Architecture, progress: &dyn Progress) -> Result<Found, Error> {
        let Document::Index(mut index) = Document::parse(&self.what, &self.small("index.json")?)? else {
            return Err(unusable(&self.what, "its index.json is no index"));
        };
        let names = |descriptor: &Descriptor| -> Vec<Name> {
            // Whole names, as Docker and Podman write them; a bare tag, as others do, is none.
            let keys = ["io.containerd.image.name", "org.opencontainers.image.ref.name"];
            let mut names: Vec<Name> = keys
                .iter()
                .filter_map(|key| descriptor.annotations.get(*key))
                .filter(|text| text.contains(['/', ':']))
                .filter_map(|text| text.parse().ok())
                .collect();
            names.dedup();
            names
        };
        if let Some(wanted) = wanted {
            index.retain(|descriptor| names(descriptor).contains(wanted));
        }
        index.dedup_by_key(|descriptor| descriptor.digest);
        let mut descriptor = match &index[..] {
            [] => return Err(unusable(&self.what, "the archive has no such image")),
            [only] => only.clone(),
            several if several.iter().all(|one| one.platform.is_some()) => {
                choose(&self.what, several, architecture)?.clone()
            }
            _ => {
                return Err(unusable(
                    &self.what,
                    "the archive has several images; name the one that you want",
                ));
            }
        };
        let found = names(&descriptor);
        // An index of several architectures may be nested once.
        let mut document = Document::parse(&self.what, &self.small_blob(&descriptor)?)?;
        if let Document::Index(inner) = &document {
            descriptor = choose(&self.what, inner, architecture)?.clone();
            document = Document::parse(&self.what, &self.small_blob(&descriptor)?)?;
        }
        let Document::Manifest(manifest) = document else {
            return Err(unusable(&self.what, "its indexes are nested too deep"));
        };
        let config = ImageConfig::parse(&self.what, &self.small_blob(&manifest.config)?, architecture)?;
        let mut layers = Vec::new();
        for descriptor in &manifest.layers {
            let piece = self.piece(&Self::blob_name(descriptor.digest))?;
            check(
                &self.what,
                descriptor.digest,
                hash(piece.clone(), &self.what, progress)?,
            )?;
            layers.push(Layer::Piece(piece));
        }
        Ok(Found {
            parts: Parts {
                manifest: descriptor.digest,
                config,
                layers,
            },
            names: found,
        })
    }

    fn docker(&self, wanted: Option<&Name>, architecture: Architecture) -> Result<Found, Error> {
        let saved: Vec<Saved> =
            serde_json::from_slice(&self.small("manifest.json")?).map_err(|error| unusable(&self.what, error))?;
        let names = |saved: &Saved| -> Vec<Name> {
            let tags = saved.repo_tags.iter().flatten();
            tags.filter_map(|tag| tag.parse().ok()).collect()
        };
        let fits = |saved: &&Saved| wanted.is_none_or(|wanted| names(saved).contains(wanted));
        let saved: Vec<&Saved> = saved.iter().filter(fits).collect();
        let saved = match saved[..] {
            [] => return Err(unusable(&self.what, "the archive has no such image")),
            [only] => only,
            _ => {
                return Err(unusable(
                    &self.what,
                    "the archive has several images; name the one that you want",
                ));
            }
        };
        let bytes = self.small(&saved.config)?;
        let digest = Digest::of(&bytes);
        // The configuration is named by its digest, and has those of the layers.
        let stem = PathBuf::from(&saved.config);
        let stem = stem.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        match Digest::from_hex(stem.trim_end_matches(".json")) {
            Some(expected) => check(&self.what, expected, digest)?,
            None => return Err(unusable(&self.what, "its configuration is not named by a digest")),
        }
        let config = ImageConfig::parse(&self.what, &bytes, architecture)?;
        let layers = saved.layers.iter().map(|name| self.piece(name).map(Layer::Piece));
        Ok(Found {
            parts: Parts {
                manifest: digest,
                config,
                layers: layers.collect::<Result<_, _>>()?,
            },
            names: names(saved),
        })
    }
}

fn check(what: &str, expected: Digest, actual: Digest) -> Result<(), Error> {
    if expected == actual {
        return Ok(());
    }
    Err(Error::Digest {
        what: what.into(),
        expected,
        actual,
        help: "get it anew",
    })
}

fn hash(mut stream: impl Read, what: &str, progress: &dyn Progress) -> Result<Digest, Error> {
    let mut hasher = Hasher::default();
    let mut buffer = vec![0; BUFFER];
    loop {
        go_on(progress)?;
        match stream.read(&mut buffer) {
            Ok(0) => return Ok(hasher.finish()),
            Ok(count) => hasher.update(&buffer[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(unusable(what, format_args!("the archive cannot be read: {error}"))),
        }
    }
}
