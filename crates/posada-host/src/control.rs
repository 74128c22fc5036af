//! The control socket of a VM's process, from a daemon that must not wait for ever.

use posada_vmm::control::Condition;
use posada_vmm::remote::{Answer, Hello, PROTOCOL, Request, Status};
use serde::de::DeserializeOwned;
use std::io;
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

/// How long a VM may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// The most bytes of an answer.
const LONGEST: u64 = 1 << 20;

/// Why a VM does not do it.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// It is not reached.
    #[error("its process does not answer: {0}")]
    Host(#[from] io::Error),
    /// Nor in time.
    #[error("its process has not answered within {} seconds", PATIENCE.as_secs())]
    Late,
    /// It says something else.
    #[error("its process is of another Posada and is not understood: {0}")]
    Foreign(String),
    /// Its own words.
    #[error("{0}")]
    Refused(String),
}

/// Asks the VM whose sockets are in this folder.
///
/// # Errors
/// [`ControlError`].
pub async fn ask(sockets: &Path, request: &Request) -> Result<Answer, ControlError> {
    let asked = tokio::time::timeout(PATIENCE, converse(sockets, request));
    asked.await.unwrap_or(Err(ControlError::Late))
}

async fn converse(sockets: &Path, request: &Request) -> Result<Answer, ControlError> {
    let mut stream = BufReader::new(UnixStream::connect(sockets.join("control")).await?);
    let hello: Hello = line(&mut stream).await?;
    if hello.protocol != PROTOCOL {
        return Err(ControlError::Foreign(format!("it speaks protocol {}", hello.protocol)));
    }
    let mut text = serde_json::to_vec(request).map_err(io::Error::from)?;
    text.push(b'\n');
    stream.get_mut().write_all(&text).await?;
    loop {
        match line(&mut stream).await? {
            Answer::Progress(_) => {}
            Answer::Error(text) => return Err(ControlError::Refused(text)),
            answer => return Ok(answer),
        }
    }
}

async fn line<T: DeserializeOwned>(stream: &mut BufReader<UnixStream>) -> Result<T, ControlError> {
    let mut text = Vec::new();
    stream.take(LONGEST).read_until(b'\n', &mut text).await?;
    if text.is_empty() {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    serde_json::from_slice(&text).map_err(|error| ControlError::Foreign(error.to_string()))
}

/// How a VM is.
///
/// # Errors
/// [`ControlError`].
pub async fn status(sockets: &Path) -> Result<Status, ControlError> {
    match ask(sockets, &Request::Status).await? {
        Answer::Status(status) => Ok(status),
        other => Err(ControlError::Foreign(format!("{other:?}"))),
    }
}

/// Whether its vCPUs stand still for its user.
///
/// # Errors
/// [`ControlError`].
pub async fn is_paused(sockets: &Path) -> Result<bool, ControlError> {
    Ok(status(sockets).await?.condition == Condition::Paused)
}
