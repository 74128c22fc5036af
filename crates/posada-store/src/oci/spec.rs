//! The JSON of OCI images (image-spec 1.1) and of Docker's of the same make, as far as we read it.

use crate::manifest::{Architecture, Config};
use crate::{Digest, Error};
use serde::Deserialize;
use std::collections::BTreeMap;

/// Bytes of the longest index, manifest or configuration that is read; registries refuse longer ones too.
pub(super) const LONGEST: u64 = 4 << 20;
/// Layers of an image, at most: more than any builder makes.
const MOST_LAYERS: usize = 1000;

/// What to ask a registry for.
pub(super) const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json";

pub(super) fn unusable(what: &str, why: impl std::fmt::Display) -> Error {
    Error::Oci {
        what: what.into(),
        why: why.to_string(),
    }
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Descriptor {
    pub digest: Digest,
    pub size: u64,
    #[serde(default)]
    pub platform: Option<Platform>,
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Platform {
    pub architecture: String,
    pub os: String,
}

/// An index or a manifest: which, its fields tell.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Either {
    schema_version: u32,
    #[serde(default)]
    manifests: Option<Vec<Descriptor>>,
    #[serde(default)]
    config: Option<Descriptor>,
    #[serde(default)]
    layers: Vec<Descriptor>,
}

#[derive(Debug)]
pub(super) enum Document {
    Index(Vec<Descriptor>),
    Manifest(Layers),
}

/// What a manifest names.
#[derive(Debug)]
pub(super) struct Layers {
    pub config: Descriptor,
    pub layers: Vec<Descriptor>,
}

impl Document {
    pub fn parse(what: &str, bytes: &[u8]) -> Result<Self, Error> {
        let either: Either = serde_json::from_slice(bytes).map_err(|error| unusable(what, error))?;
        if either.schema_version != 2 {
            let version = either.schema_version;
            return Err(unusable(
                what,
                format_args!("its schema has version {version}, and only 2 is known"),
            ));
        }
        match (either.manifests, either.config) {
            (Some(manifests), None) => Ok(Self::Index(manifests)),
            (None, Some(config)) if either.layers.len() <= MOST_LAYERS => Ok(Self::Manifest(Layers {
                config,
                layers: either.layers,
            })),
            (None, Some(_)) => Err(unusable(what, "it has too many layers")),
            _ => Err(unusable(what, "it is neither an index nor a manifest")),
        }
    }
}

/// The manifest for an architecture in an index.
pub(super) fn choose<'a>(
    what: &str,
    index: &'a [Descriptor],
    architecture: Architecture,
) -> Result<&'a Descriptor, Error> {
    let wanted = architecture_of_oci(architecture);
    let fits = |platform: &Platform| platform.os == "linux" && platform.architecture == wanted;
    // An index of one may leave out for what it is; its configuration tells.
    let only = (index.len() == 1 && index[0].platform.is_none()).then(|| &index[0]);
    let found = index
        .iter()
        .find(|descriptor| descriptor.platform.as_ref().is_some_and(fits))
        .or(only);
    found.ok_or_else(|| {
        let mut there: Vec<_> = index
            .iter()
            .filter_map(|descriptor| descriptor.platform.as_ref())
            .filter(|platform| platform.os != "unknown")
            .map(|platform| format!("{}/{}", platform.os, platform.architecture))
            .collect();
        there.dedup();
        unusable(
            what,
            format_args!("it is not there for linux/{wanted}, only for: {}", there.join(", ")),
        )
    })
}

pub(super) fn architecture_of_oci(architecture: Architecture) -> &'static str {
    match architecture {
        Architecture::X86_64 => "amd64",
        Architecture::Aarch64 => "arm64",
    }
}

/// An image's configuration.
#[derive(Debug, Deserialize)]
pub(super) struct ImageConfig {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    #[serde(default)]
    config: Option<Program>,
    rootfs: RootFs,
}

#[derive(Debug, Deserialize)]
struct RootFs {
    diff_ids: Vec<Digest>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
struct Program {
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    env: Option<Vec<String>>,
    user: Option<String>,
    working_dir: Option<String>,
}

impl ImageConfig {
    pub fn parse(what: &str, bytes: &[u8], architecture: Architecture) -> Result<Self, Error> {
        let config: Self = serde_json::from_slice(bytes).map_err(|error| unusable(what, error))?;
        let wanted = architecture_of_oci(architecture);
        if config.os != "linux" || config.architecture != wanted {
            let (os, architecture) = (&config.os, &config.architecture);
            return Err(unusable(
                what,
                format_args!("it is for {os}/{architecture} and not for linux/{wanted}"),
            ));
        }
        Ok(config)
    }

    /// Digests of the unpacked layers, the lowest first.
    pub fn layers(&self) -> &[Digest] {
        &self.rootfs.diff_ids
    }

    pub fn program(self) -> Config {
        let program = self.config.unwrap_or_default();
        Config {
            entrypoint: program.entrypoint.unwrap_or_default(),
            cmd: program.cmd.unwrap_or_default(),
            env: program.env.unwrap_or_default(),
            user: program.user.unwrap_or_default(),
            workdir: program.working_dir.unwrap_or_default(),
        }
    }
}
