//! What can go wrong with a store: each error says what was being done, to what, and what helps.

use crate::Digest;
use std::io;
use std::path::{Path, PathBuf};

/// Why a store cannot do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host refused an operation on a file.
    #[error("cannot {doing} {}: {source}{}", path.display(), advice(.source))]
    Io {
        /// What was tried.
        doing: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The host's reason.
        source: io::Error,
    },
    /// The folder belongs to something else.
    #[error("{} is not an image store: it has files but no {}; choose an empty folder", path.display(), crate::layout::FORMAT)]
    NotAStore {
        /// The folder.
        path: PathBuf,
    },
    /// The layout of the folder is of a version that this program does not know.
    #[error("the image store {} has version {version}, and this program knows only {}; use a newer posada, or another folder", path.display(), crate::layout::VERSION)]
    Version {
        /// The store.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
    /// Another process holds a lock that this operation needs.
    #[error("another process is {doing} in the image store {}; try again when it has finished", path.display())]
    Busy {
        /// The store.
        path: PathBuf,
        /// What the other does.
        doing: &'static str,
    },
    /// An image is in use, so it stays.
    #[error("the image {image} is in use by a VM; stop that VM first")]
    InUse {
        /// Name or id.
        image: String,
    },
    /// No such image.
    #[error("there is no image {name}{}", near(.nearest.as_deref()))]
    Unknown {
        /// As it was given.
        name: String,
        /// A name in the store that is like it.
        nearest: Option<String>,
    },
    /// An id's prefix that several images have.
    #[error("{count} images have an id that begins with {prefix}; give more digits of it")]
    Ambiguous {
        /// As it was given.
        prefix: String,
        /// How many.
        count: usize,
    },
    /// A name that cannot be one.
    #[error("{text:?} is not the name of an image: {why}")]
    Name {
        /// As it was given.
        text: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A manifest in the store that cannot be understood.
    #[error("the image manifest {} is damaged: {why}; repair the store, then make or pull that image again", path.display())]
    Manifest {
        /// The manifest.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A manifest that the store does not accept.
    #[error("the image cannot be kept: {0}")]
    Refused(String),
    /// Content that is not what its digest says.
    #[error("{what} is damaged: it should be {expected} and is {actual}; {help}")]
    Digest {
        /// What was read.
        what: String,
        /// As promised.
        expected: Digest,
        /// As found.
        actual: Digest,
        /// What to do.
        help: &'static str,
    },
    /// A blob of an image is gone, or not as long as it was.
    #[error("the image {image} lacks its blob {digest}; make or pull the image again")]
    Missing {
        /// The image's id.
        image: Digest,
        /// The blob.
        digest: Digest,
    },
    /// A VM's layer that cannot be used.
    #[error("the disk layer {} cannot be used: {why}", path.display())]
    Layer {
        /// The layer.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// Another process has the layer.
    #[error("the disk layer {} is in use by another VM; stop that VM first", path.display())]
    LayerInUse {
        /// The layer.
        path: PathBuf,
    },
    /// An OCI image that cannot be used.
    #[error("the OCI image {what} cannot be used: {why}")]
    Oci {
        /// Its name, or the archive's.
        what: String,
        /// What is wrong with it.
        why: String,
    },
    /// A registry that does not give what it was asked for.
    #[error("cannot get {name} from the registry {registry}: {why}")]
    Registry {
        /// Its host.
        registry: String,
        /// The image's name.
        name: String,
        /// What it says, or what happened, and what helps.
        why: String,
    },
    /// A program of the host that is needed failed.
    #[error("{program} failed: {why}")]
    Tool {
        /// The program.
        program: String,
        /// What it says, and what helps.
        why: String,
    },
    /// Whoever asked for it wants it no more.
    #[error("cancelled; what was downloaded so far is kept for the next try")]
    Cancelled,
}

impl Error {
    /// For `map_err`: what was tried on which file.
    pub(crate) fn io(doing: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            doing,
            path: path.as_ref().into(),
            source,
        }
    }
}

fn near(name: Option<&str>) -> String {
    match name {
        Some(name) => format!("; did you mean {name}?"),
        None => "; list the images to see which there are".into(),
    }
}

/// What helps against a refusal of the host.
fn advice(error: &io::Error) -> &'static str {
    use io::ErrorKind as Kind;
    match error.kind() {
        Kind::StorageFull | Kind::QuotaExceeded => {
            "; nothing was changed: free some space, for example by removing images and collecting garbage, and try again"
        }
        Kind::ReadOnlyFilesystem => "; choose a folder on a file system that can be written to",
        Kind::PermissionDenied => "; choose a folder that you may write to, or ask its owner",
        Kind::NotFound => "; check the path",
        _ => "",
    }
}
