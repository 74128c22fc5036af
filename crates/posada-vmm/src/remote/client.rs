//! The other end: a process that wants something of a VM.

use super::{Answer, Error, Hello, PROTOCOL, Request};
use crate::snapshot::Progress;
use serde::de::DeserializeOwned;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

/// A connection to a VM.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Connects to the VM whose control socket is `path`.
    ///
    /// # Errors
    /// [`Error::Connect`] and [`Error::Foreign`].
    pub fn connect(path: &Path) -> Result<Self, Error> {
        let stream = UnixStream::connect(path).map_err(|source| Error::Connect {
            path: path.into(),
            source,
        })?;
        let mut client = Self {
            path: path.into(),
            stream: BufReader::new(stream),
        };
        let hello: Hello = client.read()?;
        if hello.protocol != PROTOCOL {
            return Err(client.foreign(format!(
                "it is Posada {} with protocol {}, not {PROTOCOL}; use its own posada command",
                hello.posada, hello.protocol
            )));
        }
        Ok(client)
    }

    /// Asks and waits for the answer, which is neither a progress nor an error; `watch` is told of progress.
    ///
    /// # Errors
    /// [`Error::Refused`] has what the VM says; [`Error::Gone`], [`Error::Foreign`].
    pub fn ask(&mut self, request: &Request, watch: &mut dyn FnMut(Progress)) -> Result<Answer, Error> {
        let mut line = serde_json::to_vec(request).map_err(|error| self.foreign(error.to_string()))?;
        line.push(b'\n');
        let sent = self.stream.get_mut().write_all(&line);
        sent.map_err(|_| self.gone())?;
        loop {
            match self.read()? {
                Answer::Progress(progress) => watch(progress),
                Answer::Error(text) => return Err(Error::Refused(text)),
                answer => return Ok(answer),
            }
        }
    }

    fn read<T: DeserializeOwned>(&mut self) -> Result<T, Error> {
        let mut line = Vec::new();
        match self.stream.read_until(b'\n', &mut line) {
            Ok(1..) if line.ends_with(b"\n") => {}
            _ => return Err(self.gone()),
        }
        serde_json::from_slice(&line).map_err(|error| self.foreign(error.to_string()))
    }

    fn gone(&self) -> Error {
        Error::Gone {
            path: self.path.clone(),
        }
    }

    fn foreign(&self, why: String) -> Error {
        Error::Foreign {
            path: self.path.clone(),
            why,
        }
    }
}
