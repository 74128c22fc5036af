//! What an image is made of: the file `images/<id>.json`, whose SHA-256 is the image's id.

use crate::Digest;
use serde::{Deserialize, Serialize};

/// Bytes of the longest manifest.
pub const LONGEST: u64 = 1 << 20;
/// Version of the manifest's form.
pub const VERSION: u32 = 1;
/// Bytes of the longest kernel command line that x86-64 Linux takes (`COMMAND_LINE_SIZE` with its final zero).
const COMMAND_LINE: usize = 2047;
/// Bytes of the largest disk; below what ext4 keeps in one file.
pub(crate) const LARGEST: u64 = 8 << 40;

/// The processors an image is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Architecture {
    /// `amd64` in Debian and OCI.
    #[serde(rename = "x86_64")]
    X86_64,
    /// `arm64` in Debian and OCI.
    #[serde(rename = "aarch64")]
    Aarch64,
}

/// A file in the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blob {
    /// SHA-256 of its content.
    pub digest: Digest,
    /// Bytes, holes included.
    pub size: u64,
}

/// Where an image comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Origin {
    /// Built from the packages of a distribution.
    Built {
        /// Its name and release.
        distribution: String,
    },
    /// Pulled from a registry, or read from an archive of an OCI image.
    Oci {
        /// As it was asked for.
        reference: String,
        /// Digest of the OCI manifest; in an old archive of Docker, which has none, of the configuration.
        manifest: Digest,
        /// Digest of what was added to its files, if anything was.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        added: Option<Digest>,
    },
    /// A disk of the user.
    Imported {
        /// The file's name, without its folder.
        file: String,
    },
}

/// What an OCI image says about the program to start in it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// Begins the program's arguments.
    pub entrypoint: Vec<String>,
    /// Follows, unless the user gives other arguments.
    pub cmd: Vec<String>,
    /// `NAME=value`.
    pub env: Vec<String>,
    /// Name or number, and perhaps a group behind a colon; empty: root.
    pub user: String,
    /// The folder to start in; empty: `/`.
    pub workdir: String,
}

/// An image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`VERSION`].
    pub version: u32,
    /// The processors it is for.
    pub architecture: Architecture,
    /// Where it comes from.
    pub origin: Origin,
    /// When it was made, seconds since 1970.
    pub created: u64,
    /// The kernel. An imported disk has none until one is named for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<Blob>,
    /// The initial RAM file system.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initramfs: Option<Blob>,
    /// The root disk, raw. An image that is there for its kernel has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk: Option<Blob>,
    /// The kernel's command line unless the user gives another.
    #[serde(default)]
    pub command_line: String,
    /// The program to start.
    #[serde(default)]
    pub config: Config,
}

#[derive(Deserialize)]
struct VersionOnly {
    version: u32,
}

impl Manifest {
    /// Reads a manifest, which may be any bytes.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        if bytes.len() as u64 > LONGEST {
            return Err(format!("it is longer than {LONGEST} bytes"));
        }
        // The version first: a later form need not have the fields of this one.
        let VersionOnly { version } = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        if version != VERSION {
            return Err(format!(
                "it has version {version}, and this program knows only {VERSION}"
            ));
        }
        let manifest: Self = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        manifest.check()?;
        Ok(manifest)
    }

    /// The bytes to keep, of which the image's id is the digest.
    ///
    /// # Errors
    /// Why it cannot be kept: [`Manifest::parse`] would refuse it.
    pub fn to_bytes(&self) -> Result<Vec<u8>, String> {
        self.check()?;
        let mut bytes = serde_json::to_vec_pretty(self).map_err(|error| error.to_string())?;
        bytes.push(b'\n');
        if bytes.len() as u64 > LONGEST {
            return Err(format!("its manifest would be longer than {LONGEST} bytes"));
        }
        Ok(bytes)
    }

    /// Its blobs.
    pub fn blobs(&self) -> impl Iterator<Item = Blob> + use<> {
        [self.kernel, self.initramfs, self.disk].into_iter().flatten()
    }

    fn check(&self) -> Result<(), String> {
        if self.version != VERSION {
            return Err(format!("it has version {} and not {VERSION}", self.version));
        }
        if self.blobs().next().is_none() {
            return Err("it has neither a kernel nor a disk".into());
        }
        if let Some(blob) = self.blobs().find(|blob| blob.size == 0 || blob.size > LARGEST) {
            return Err(format!("its blob {} has a size of {} bytes", blob.digest, blob.size));
        }
        if self.command_line.len() > COMMAND_LINE || self.command_line.chars().any(char::is_control) {
            return Err(format!(
                "its command line has control characters, or more than {COMMAND_LINE} bytes"
            ));
        }
        let config = &self.config;
        let words = config.entrypoint.iter().chain(&config.cmd).chain(&config.env);
        if words
            .chain([&config.user, &config.workdir])
            .any(|word| word.contains('\0'))
        {
            return Err("a word of its program has a zero byte".into());
        }
        if let Some(word) = config.env.iter().find(|word| word.find('=').is_none_or(|at| at == 0)) {
            return Err(format!("its environment has {word:?}, which is no NAME=value"));
        }
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// An image of a kernel and a disk with these digests.
    pub(crate) fn example(kernel: Option<Blob>, disk: Option<Blob>) -> Manifest {
        Manifest {
            version: VERSION,
            architecture: Architecture::X86_64,
            origin: Origin::Built {
                distribution: "debian 12".into(),
            },
            created: 1_700_000_000,
            kernel,
            initramfs: None,
            disk,
            command_line: "console=ttyS0 root=/dev/vda".into(),
            config: Config {
                cmd: vec!["bash".into()],
                env: vec!["PATH=/bin".into()],
                ..Config::default()
            },
        }
    }

    fn blob(size: u64) -> Option<Blob> {
        Some(Blob {
            digest: Digest::of(b"x"),
            size,
        })
    }

    #[test]
    fn a_manifest_is_read_as_written() {
        let manifest = example(blob(1), None);
        assert_eq!(Manifest::parse(&manifest.to_bytes().unwrap()), Ok(manifest));
    }

    #[test]
    fn what_cannot_be_an_image_is_refused() {
        let mut zero = example(blob(1), None);
        zero.config.cmd = vec!["a\0b".into()];
        let mut env = example(blob(1), None);
        env.config.env = vec!["=x".into()];
        let mut long = example(blob(1), None);
        long.command_line = "x".repeat(COMMAND_LINE + 1);
        for (manifest, why) in [
            (example(None, None), "neither"),
            (example(blob(0), None), "size"),
            (example(None, blob(u64::MAX)), "size"),
            (zero, "zero byte"),
            (env, "NAME=value"),
            (long, "command line"),
        ] {
            let error = manifest.to_bytes().unwrap_err();
            assert!(error.contains(why), "{error}");
            let raw = serde_json::to_vec(&manifest).unwrap();
            assert_eq!(Manifest::parse(&raw), Err(error));
        }
        for raw in [
            &b"{\"version\": 2, \"new\": 1}"[..],
            b"",
            b"[]",
            b"{\"version\":1}",
            &[b'['; 4096],
        ] {
            assert!(Manifest::parse(raw).is_err());
        }
    }
}
