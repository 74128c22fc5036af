//! A registry's side of the OCI distribution protocol (distribution-spec 1.1), as far as a pull needs it: manifests, blobs that
//! go on where they were cut off, tokens.

use super::spec::{ACCEPT, Document, LONGEST, unusable};
use super::{Credentials, PullOptions};
use crate::digest::Hasher;
use crate::progress::{Progress, Step, go_on};
use crate::{Digest, Error, Name};
use serde::Deserialize;
use std::fs::{self, File, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use ureq::config::RedirectAuthHeaders;
use ureq::http::{Response, StatusCode, header};
use ureq::tls::{RootCerts, TlsConfig};
use ureq::{Agent, Body};

/// Tries one after the other that bring nothing.
const TRIES: u32 = 5;
/// Before the second try; twice that before each further one.
const PAUSE: Duration = Duration::from_millis(200);
const CONNECT: Duration = Duration::from_secs(20);
const ANSWER: Duration = Duration::from_secs(30);
/// How long one answer may last: what is not there by then is asked for anew, from where it stopped.
const BODY: Duration = Duration::from_secs(60);
/// The same for registries that cannot go on in the middle.
const WHOLE_BODY: Duration = Duration::from_secs(3600);
const BUFFER: usize = 128 << 10;
/// Bytes of a token's JSON.
const LONGEST_TOKEN: u64 = 1 << 20;

/// A repository at a registry.
pub(super) struct Registry<'a> {
    agent: Agent,
    /// `https://host`
    base: String,
    name: &'a Name,
    credentials: Option<&'a Credentials>,
    authorization: Option<String>,
}

/// A blob on this machine, complete and checked, that no other process deletes as long as the value lives.
pub(super) struct Downloaded {
    pub path: PathBuf,
    pub file: File,
}

#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
}

/// Something went wrong: once and for all, or perhaps not the next time.
enum Trouble {
    Final(Error),
    Passing(String),
}

impl Trouble {
    fn connection(error: impl std::fmt::Display) -> Self {
        Self::Passing(format!("the connection failed: {error}"))
    }
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        Self::Final(error)
    }
}

/// Hosts that are this machine need no encryption, as with Docker.
fn is_local(host: &str) -> bool {
    let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
    name == "localhost" || name == "127.0.0.1"
}

impl<'a> Registry<'a> {
    pub fn new(name: &'a Name, options: &'a PullOptions<'_>) -> Self {
        let host = name.registry();
        let plain = options.plain_http || is_local(host);
        let tls = TlsConfig::builder().root_certs(RootCerts::PlatformVerifier).build();
        let config = Agent::config_builder()
            .tls_config(tls)
            .http_status_as_error(false)
            .https_only(!plain)
            .max_redirects(5)
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .timeout_connect(Some(CONNECT))
            .timeout_recv_response(Some(ANSWER))
            .user_agent(concat!("posada/", env!("CARGO_PKG_VERSION")))
            .build();
        Self {
            agent: config.into(),
            base: format!("{}://{host}", if plain { "http" } else { "https" }),
            name,
            credentials: options.credentials.as_ref(),
            authorization: None,
        }
    }

    fn error(&self, why: impl Into<String>) -> Error {
        Error::Registry {
            registry: self.name.registry().into(),
            name: self.name.to_string(),
            why: why.into(),
        }
    }

    /// Asks until there is an answer that is worth one.
    fn retry<T>(
        &mut self,
        progress: &dyn Progress,
        mut ask: impl FnMut(&mut Self) -> Result<T, Trouble>,
    ) -> Result<T, Error> {
        let mut pause = PAUSE;
        let mut last = String::new();
        for attempt in 0..TRIES {
            go_on(progress)?;
            if attempt > 0 {
                std::thread::sleep(pause);
                pause *= 2;
                go_on(progress)?;
            }
            match ask(self) {
                Ok(value) => return Ok(value),
                Err(Trouble::Final(error)) => return Err(error),
                Err(Trouble::Passing(why)) => {
                    tracing::debug!(registry = self.name.registry(), why, "a request failed");
                    last = why;
                }
            }
        }
        Err(self.error(format!("{last} ({TRIES} tries)")))
    }

    fn get(&mut self, path: &str, accept: &str, from: u64, body: Duration) -> Result<Response<Body>, Trouble> {
        let url = format!("{}/v2/{}/{path}", self.base, self.name.path());
        let mut authenticated = false;
        loop {
            let mut request = self
                .agent
                .get(&url)
                .config()
                .timeout_recv_body(Some(body))
                .build()
                .header(header::ACCEPT, accept);
            if from > 0 {
                request = request.header(header::RANGE, format!("bytes={from}-"));
            }
            if let Some(authorization) = &self.authorization {
                request = request.header(header::AUTHORIZATION, authorization);
            }
            let response = request.call().map_err(Trouble::connection)?;
            let status = response.status();
            match status {
                StatusCode::UNAUTHORIZED if !authenticated => {
                    authenticated = true;
                    let challenge = response.headers().get(header::WWW_AUTHENTICATE);
                    let challenge = challenge
                        .and_then(|value| value.to_str().ok())
                        .unwrap_or_default()
                        .to_string();
                    self.authorization = Some(self.authorize(&challenge)?);
                }
                StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                    let advice = match self.credentials {
                        None => "it is not there, or not for everybody: check the name, or give a user and password",
                        Some(_) => "it is not there, or not for this user: check the name, user and password",
                    };
                    return Err(self.error(advice).into());
                }
                StatusCode::NOT_FOUND => return Err(self.error("it is not there; check the name and the tag").into()),
                StatusCode::TOO_MANY_REQUESTS => {
                    return Err(Trouble::Passing(
                        "the registry allows no more requests for now; try again later".into(),
                    ));
                }
                _ if status.is_server_error() => return Err(Trouble::Passing(format!("the registry says {status}"))),
                _ if !status.is_success() && status != StatusCode::RANGE_NOT_SATISFIABLE => {
                    return Err(self.error(format!("the registry says {status}")).into());
                }
                _ => return Ok(response),
            }
        }
    }

    /// What to send after a challenge (RFC 7235): the user's password, or a token for it.
    fn authorize(&self, challenge: &str) -> Result<String, Trouble> {
        let (scheme, parameters) = challenge.split_once(' ').unwrap_or((challenge, ""));
        let basic = self.credentials.map(Credentials::basic);
        if scheme.eq_ignore_ascii_case("basic") {
            return basic.ok_or_else(|| self.error("it wants a user and a password").into());
        }
        if !scheme.eq_ignore_ascii_case("bearer") {
            return Err(self.error("it wants a kind of authentication that is not known").into());
        }
        let parameter = |key: &str| challenge_parameter(parameters, key);
        let realm = parameter("realm").ok_or_else(|| self.error("its request for a token names no server"))?;
        // A password must not go over a line where others read it.
        if !realm.starts_with("https://") && !self.base.starts_with("http://") {
            return Err(self.error("it sends for a token to a server without encryption").into());
        }
        let scope = parameter("scope").unwrap_or_else(|| format!("repository:{}:pull", self.name.path()));
        let mut request = self.agent.get(&realm).query("scope", scope);
        if let Some(service) = parameter("service") {
            request = request.query("service", service);
        }
        if let Some(basic) = basic {
            request = request.header(header::AUTHORIZATION, basic);
        }
        let mut response = request
            .config()
            .timeout_recv_body(Some(ANSWER))
            .build()
            .call()
            .map_err(Trouble::connection)?;
        if response.status().is_server_error() {
            return Err(Trouble::Passing(format!(
                "the server of tokens says {}",
                response.status()
            )));
        }
        if !response.status().is_success() {
            let status = response.status();
            return Err(self
                .error(format!("no token for it ({status}); check user and password"))
                .into());
        }
        let body = response.body_mut().with_config().limit(LONGEST_TOKEN).read_to_vec();
        let body = body.map_err(Trouble::connection)?;
        let token: Option<Token> = serde_json::from_slice(&body).ok();
        let token = token.and_then(|token| token.token.or(token.access_token));
        let usable = |token: &String| token.bytes().all(|byte| byte.is_ascii_graphic());
        let token = token
            .filter(usable)
            .ok_or_else(|| self.error("its server of tokens gave none"))?;
        Ok(format!("Bearer {token}"))
    }

    /// A manifest or index, by tag or digest, and its digest.
    pub fn document(&mut self, reference: &str, progress: &dyn Progress) -> Result<(Digest, Document), Error> {
        let expected = reference.parse::<Digest>().ok();
        let path = format!("manifests/{reference}");
        let (bytes, promised) = self.retry(progress, |registry| {
            let mut response = registry.get(&path, ACCEPT, 0, ANSWER)?;
            let promised = response.headers().get("docker-content-digest");
            let promised = promised.and_then(|value| value.to_str().ok()?.parse::<Digest>().ok());
            let body = response.body_mut().with_config().limit(LONGEST).read_to_vec();
            Ok((body.map_err(Trouble::connection)?, promised))
        })?;
        let digest = Digest::of(&bytes);
        self.check(expected.or(promised).unwrap_or(digest), digest)?;
        Ok((digest, Document::parse(&self.name.to_string(), &bytes)?))
    }

    fn check(&self, expected: Digest, actual: Digest) -> Result<(), Error> {
        if expected == actual {
            return Ok(());
        }
        Err(Error::Digest {
            what: format!("what the registry {} serves for {}", self.name.registry(), self.name),
            expected,
            actual,
            help: "try again; if that does not help, tell the registry's owner",
        })
    }

    /// A small blob.
    pub fn small_blob(&mut self, digest: Digest, progress: &dyn Progress) -> Result<Vec<u8>, Error> {
        let path = format!("blobs/{digest}");
        let bytes = self.retry(progress, |registry| {
            let mut response = registry.get(&path, "*/*", 0, ANSWER)?;
            let body = response.body_mut().with_config().limit(LONGEST).read_to_vec();
            body.map_err(Trouble::connection)
        })?;
        self.check(digest, Digest::of(&bytes))?;
        Ok(bytes)
    }

    /// Has a blob in the folder `partial`, where an interrupted download goes on. While another process has it in work, this
    /// one waits. `done` is what was downloaded before of the `total`.
    pub fn blob(
        &mut self,
        digest: Digest,
        size: u64,
        partial: &Path,
        (done, total): (u64, u64),
        progress: &dyn Progress,
    ) -> Result<Downloaded, Error> {
        let path = partial.join(digest.hex());
        let mut file = lock(&path, progress)?;
        let mut there = file.metadata().map_err(Error::io("look at", &path))?.len();
        if there > size {
            file.set_len(0).map_err(Error::io("write", &path))?;
            there = 0;
        }
        let url = format!("blobs/{digest}");
        let mut body = BODY;
        while there < size {
            let before = there;
            let what = self.name.to_string();
            // Each retry that brings something is followed by a fresh count of tries.
            there = self.retry(progress, |registry| {
                let response = registry.get(&url, "*/*", there, body)?;
                let mut at = there;
                if response.status() != StatusCode::PARTIAL_CONTENT {
                    // It cannot go on in the middle.
                    if there > 0 {
                        body = WHOLE_BODY;
                    }
                    at = 0;
                    file.set_len(0).map_err(Error::io("write", &path))?;
                } else if !begins_at(&response, there) {
                    return Err(registry
                        .error("it serves another part of a blob than it was asked for")
                        .into());
                }
                file.seek(SeekFrom::Start(at)).map_err(Error::io("write", &path))?;
                let mut reader = response.into_body().into_reader();
                let mut buffer = vec![0; BUFFER];
                loop {
                    go_on(progress)?;
                    let count = match reader.read(&mut buffer) {
                        Ok(0) => break,
                        Ok(count) => count as u64,
                        Err(error) if at > there => {
                            tracing::debug!(%error, at, "a download was cut off");
                            break;
                        }
                        Err(error) => return Err(Trouble::connection(error)),
                    };
                    if at + count > size {
                        return Err(
                            unusable(&what, format_args!("a layer is longer than the {size} bytes promised")).into(),
                        );
                    }
                    file.write_all(&buffer[..count as usize])
                        .map_err(Error::io("write", &path))?;
                    at += count;
                    progress.update(Step::Download, done + at, Some(total));
                }
                // Nothing new, and the end of the answer: it was cut off, or is too short.
                if at <= there {
                    return Err(Trouble::connection("it was cut off"));
                }
                Ok(at)
            })?;
            debug_assert!(there > before);
        }
        let mut hasher = Hasher::default();
        file.rewind().map_err(Error::io("read", &path))?;
        let mut buffer = vec![0; BUFFER];
        loop {
            go_on(progress)?;
            match file.read(&mut buffer).map_err(Error::io("read", &path))? {
                0 => break,
                count => hasher.update(&buffer[..count]),
            }
        }
        if let Err(error) = self.check(digest, hasher.finish()) {
            // The next try begins anew.
            fs::remove_file(&path).map_err(Error::io("remove", &path))?;
            return Err(error);
        }
        Ok(Downloaded { path, file })
    }
}

fn begins_at(response: &Response<Body>, offset: u64) -> bool {
    let range = response.headers().get(header::CONTENT_RANGE);
    let range = range.and_then(|value| value.to_str().ok()?.strip_prefix("bytes ")?.split_once('-'));
    range.is_some_and(|(begin, _)| begin.parse() == Ok(offset))
}

/// Opens a partial download for this process alone.
fn lock(path: &Path, progress: &dyn Progress) -> Result<File, Error> {
    loop {
        go_on(progress)?;
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(Error::io("write", path))?;
        match file.try_lock() {
            // One that was finished and deleted meanwhile is not the one at the path.
            Ok(()) if file.metadata().is_ok_and(|metadata| metadata.nlink() > 0) => return Ok(file),
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(50)),
            Err(TryLockError::Error(error)) => return Err(Error::io("lock", path)(error)),
        }
    }
}

/// A parameter of a challenge, with or without quotes.
fn challenge_parameter(parameters: &str, key: &str) -> Option<String> {
    let mut rest = parameters;
    while !rest.is_empty() {
        let (name, tail) = rest.split_once('=')?;
        let (value, tail) = match tail.strip_prefix('"') {
            Some(tail) => tail.split_once('"')?,
            None => tail.split_at(tail.find(',').unwrap_or(tail.len())),
        };
        if name.trim().eq_ignore_ascii_case(key) {
            return Some(value.into());
        }
        rest = tail.trim_start_matches([',', ' ']);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_are_taken_apart() {
        let text =
            r#"realm="https://auth.example/token?a=b",service=registry.example, scope="repository:a/b:pull,push""#;
        for (key, value) in [
            ("realm", Some("https://auth.example/token?a=b")),
            ("SERVICE", Some("registry.example")),
            ("scope", Some("repository:a/b:pull,push")),
            ("error", None),
        ] {
            assert_eq!(challenge_parameter(text, key).as_deref(), value);
        }
        for wrong in ["", "realm", "realm=\"open", ",,,=", "="] {
            assert_eq!(challenge_parameter(wrong, "realm"), None);
        }
    }
}
