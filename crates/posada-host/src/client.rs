//! The other end of the API: a connection for each request, without a runtime.

use crate::api::ErrorBody;
use crate::store::Places;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

/// The most bytes of an answer's head, and of an answer that is kept whole.
const LONGEST_HEAD: u64 = 64 << 10;
const LARGEST: u64 = 64 << 20;

/// Why a request has no good answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody serves.
    #[error("no daemon answers at {}: {source}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The host's reason.
        source: io::Error,
    },
    /// The connection ended before the answer did.
    #[error("the daemon has gone without an answer: {0}")]
    Gone(io::Error),
    /// It speaks otherwise.
    #[error("what answers is not a daemon of this Posada: {0}")]
    Foreign(String),
    /// Its own words.
    #[error("{message}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// For programs.
        code: String,
        /// For people.
        message: String,
    },
}

/// Starts a daemon if there is none; says why it cannot.
pub type Revive = fn() -> Result<(), String>;

/// A client of one daemon.
#[derive(Clone, Debug)]
pub struct Api {
    socket: PathBuf,
    revive: Option<Revive>,
}

/// An answer whose body comes now.
pub struct Answer {
    status: u16,
    stream: BufReader<UnixStream>,
    body: Length,
}

/// How it is known where a body ends.
enum Length {
    Known(u64),
    Chunked { left: u64, over: bool },
    Open,
}

impl Api {
    /// The daemon with this socket.
    pub fn at(socket: &Path) -> Self {
        Self {
            socket: socket.into(),
            revive: None,
        }
    }

    /// This user's, which is started again if it ends meanwhile.
    pub fn of(places: &Places, revive: Revive) -> Self {
        Self {
            revive: Some(revive),
            ..Self::at(&places.socket())
        }
    }

    /// Sends a request and gives what comes, if that is good. When the daemon goes before it has answered, the next one is
    /// asked, where that does no harm: it only reads, nothing was sent yet, or it is known by its `key`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn send(
        &self,
        method: &str,
        path: &str,
        body: Option<&[u8]>,
        key: Option<&str>,
    ) -> Result<Answer, ClientError> {
        let again = match self.try_send(method, path, body, key) {
            Err(error @ ClientError::Connect { .. }) => error,
            Err(error @ ClientError::Gone(_)) if method == "GET" || key.is_some() => error,
            other => return other,
        };
        match self.revive.map(|revive| revive()) {
            Some(Ok(())) => self.try_send(method, path, body, key),
            _ => Err(again),
        }
    }

    fn try_send(
        &self,
        method: &str,
        path: &str,
        body: Option<&[u8]>,
        key: Option<&str>,
    ) -> Result<Answer, ClientError> {
        let stream = self.open(method, path, body, key, "connection: close\r\n")?;
        let answer = Answer::read(stream)?;
        if (200..300).contains(&answer.status) {
            return Ok(answer);
        }
        Err(answer.refusal())
    }

    fn open(
        &self,
        method: &str,
        path: &str,
        body: Option<&[u8]>,
        key: Option<&str>,
        more: &str,
    ) -> Result<UnixStream, ClientError> {
        let connected = UnixStream::connect(&self.socket);
        let mut stream = connected.map_err(|source| ClientError::Connect {
            path: self.socket.clone(),
            source,
        })?;
        let mut head = format!("{method} {path} HTTP/1.1\r\nhost: posada\r\n{more}");
        if let Some(key) = key {
            head += &format!("idempotency-key: {key}\r\n");
        }
        if let Some(body) = body {
            head += &format!("content-type: application/json\r\ncontent-length: {}\r\n", body.len());
        }
        head += "\r\n";
        let mut request = head.into_bytes();
        request.extend_from_slice(body.unwrap_or_default());
        stream.write_all(&request).map_err(ClientError::Gone)?;
        Ok(stream)
    }

    /// Asks for JSON.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.send("GET", path, None, None)?.json()
    }

    /// Sends JSON, and has JSON back.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn call<T: DeserializeOwned>(
        &self,
        method: &str,
        path: &str,
        body: Option<&impl Serialize>,
        key: Option<&str>,
    ) -> Result<T, ClientError> {
        let body = body.map(serde_json::to_vec).transpose();
        let body = body.map_err(|error| ClientError::Foreign(error.to_string()))?;
        self.send(method, path, body.as_deref(), key)?.json()
    }

    /// Makes a connection to a VM of a request: `protocol` is what stands behind `Upgrade`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn upgrade(&self, path: &str, protocol: &str) -> Result<UnixStream, ClientError> {
        let more = format!("connection: upgrade\r\nupgrade: {protocol}\r\n");
        let mut stream = self.open("GET", path, None, None, &more)?;
        // Byte by byte: what follows the head is the VM's.
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).map_err(ClientError::Gone)?;
            head.push(byte[0]);
            if head.len() as u64 > LONGEST_HEAD {
                return Err(ClientError::Foreign("its answer has no end".into()));
            }
        }
        if head.starts_with(b"HTTP/1.1 101") {
            return Ok(stream);
        }
        Err(Answer::with(&head, BufReader::new(stream))?.refusal())
    }
}

impl Answer {
    fn read(stream: UnixStream) -> Result<Self, ClientError> {
        let mut stream = BufReader::new(stream);
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let line = stream.by_ref().take(LONGEST_HEAD).read_until(b'\n', &mut head);
            if line.map_err(ClientError::Gone)? == 0 {
                return Err(ClientError::Gone(io::ErrorKind::UnexpectedEof.into()));
            }
            if head.len() as u64 > LONGEST_HEAD {
                return Err(ClientError::Foreign("its answer has no end".into()));
            }
        }
        Self::with(&head, stream)
    }

    fn with(head: &[u8], stream: BufReader<UnixStream>) -> Result<Self, ClientError> {
        let text = String::from_utf8_lossy(head);
        let mut lines = text.lines();
        let first = lines.next().unwrap_or_default();
        let status = first
            .strip_prefix("HTTP/1.1 ")
            .and_then(|rest| rest.get(..3)?.parse().ok());
        let status = status.ok_or_else(|| ClientError::Foreign(format!("it says {first:?}")))?;
        let mut body = Length::Open;
        for (name, value) in lines.filter_map(|line| line.split_once(':')) {
            let value = value.trim();
            if name.eq_ignore_ascii_case("content-length") {
                let length = value.parse().map_err(|_| ClientError::Foreign("no length".into()))?;
                body = Length::Known(length);
            } else if name.eq_ignore_ascii_case("transfer-encoding") && value.eq_ignore_ascii_case("chunked") {
                body = Length::Chunked { left: 0, over: false };
            }
        }
        if status == 204 {
            body = Length::Known(0);
        }
        Ok(Self { status, stream, body })
    }

    fn refusal(mut self) -> ClientError {
        let mut text = Vec::new();
        let read = self.by_ref().take(LARGEST).read_to_end(&mut text);
        let said = read.ok().and_then(|_| serde_json::from_slice::<ErrorBody>(&text).ok());
        match said {
            Some(ErrorBody { code, message }) => ClientError::Refused {
                status: self.status,
                code,
                message,
            },
            None => ClientError::Foreign(format!("it answers {} without a reason", self.status)),
        }
    }

    /// HTTP status.
    pub fn status(&self) -> u16 {
        self.status
    }

    /// The whole body as JSON.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn json<T: DeserializeOwned>(mut self) -> Result<T, ClientError> {
        let mut text = Vec::new();
        self.by_ref()
            .take(LARGEST)
            .read_to_end(&mut text)
            .map_err(ClientError::Gone)?;
        // An answer without a body is nothing.
        let text = if text.is_empty() { b"null" } else { &text[..] };
        serde_json::from_slice(text).map_err(|error| ClientError::Foreign(error.to_string()))
    }

    fn next_chunk(&mut self) -> io::Result<u64> {
        let mut line = String::new();
        loop {
            line.clear();
            if self.stream.by_ref().take(100).read_line(&mut line)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            // The end of the chunk of before.
            if !line.trim().is_empty() {
                break;
            }
        }
        u64::from_str_radix(line.trim(), 16).map_err(|_| io::ErrorKind::InvalidData.into())
    }
}

impl Read for Answer {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if let Length::Chunked { left: 0, over: false } = self.body {
            let next = self.next_chunk()?;
            self.body = Length::Chunked {
                left: next,
                over: next == 0,
            };
        }
        let most = match self.body {
            Length::Known(left) | Length::Chunked { left, .. } => left,
            Length::Open => u64::MAX,
        };
        if most == 0 {
            return Ok(0);
        }
        let most = usize::try_from(most).unwrap_or(usize::MAX).min(buffer.len());
        let count = self.stream.read(&mut buffer[..most])?;
        match &mut self.body {
            Length::Known(left) | Length::Chunked { left, .. } => {
                if count == 0 && most > 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                *left -= count as u64;
            }
            Length::Open => {}
        }
        Ok(count)
    }
}
