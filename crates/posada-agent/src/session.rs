//! A connection: the greeting, one request, and its work.

use crate::system::System;
use crate::{copy, exec, freeze, keys, statistics};
use anyhow::{Context, bail};
use posada_protocol::{Answer, Failure, Hello, Request, read_frame, write_message};
use std::fs::File;
use std::io;

/// Why a request is not done: what [`Answer::Failed`] says.
#[derive(Debug)]
pub struct Refusal {
    pub why: Failure,
    pub message: String,
}

impl Refusal {
    pub fn new(why: Failure, message: impl Into<String>) -> Self {
        let message = message.into();
        Self { why, message }
    }

    /// `what` could not be done because of `error`.
    pub fn of(what: impl std::fmt::Display, error: &io::Error) -> Self {
        let why = match error.kind() {
            io::ErrorKind::NotFound => Failure::NotFound,
            io::ErrorKind::PermissionDenied => Failure::NotPermitted,
            _ => Failure::Other,
        };
        Self::new(why, format!("{what}: {error}"))
    }

    pub fn answer(self) -> Answer {
        Answer::Failed {
            why: self.why,
            message: self.message,
        }
    }
}

/// Serves a connection to its end.
pub fn serve(mut stream: File, system: &System) -> anyhow::Result<()> {
    let ours = Hello::ours();
    let Some(first) = read_frame(&mut stream)? else {
        return Ok(());
    };
    let theirs: Hello = first.message().context("no greeting")?;
    write_message(&mut stream, &ours)?;
    if ours.agree(&theirs).is_none() {
        bail!(
            "the host speaks only the versions {} to {}",
            theirs.oldest,
            theirs.newest
        );
    }
    let Some(second) = read_frame(&mut stream)? else {
        return Ok(());
    };
    let request = match second.message() {
        Ok(request) => request,
        Err(error) => {
            let refusal = Refusal::new(
                Failure::Invalid,
                format!("this agent does not know the request: {error}"),
            );
            return Ok(write_message(&mut stream, &refusal.answer())?);
        }
    };
    let done = match request {
        Request::Exec(exec) => match exec::run(&mut stream, system, &exec)? {
            Ok(()) => return Ok(()),
            Err(refusal) => Err(refusal),
        },
        Request::Shutdown { how } => system.shut_down(how).map(|()| Answer::Done),
        Request::SetTime { nanoseconds } => system.set_time(nanoseconds).map(|()| Answer::Done),
        Request::SetHostname { name } => system.set_hostname(&name).map(|()| Answer::Done),
        Request::AuthorizeKeys { user, keys } => keys::authorize(system, &user, &keys).map(|()| Answer::Done),
        Request::Get { path } => copy::get(&mut stream, &path)?,
        Request::Put { directory } => copy::put(&mut stream, &directory)?,
        Request::Statistics { processes } => statistics::take(system, processes),
        Request::Freeze { seconds } => freeze::freeze(&mut stream, system, seconds)?,
        Request::SetCpus { online } => system.set_cpus(online),
    };
    Ok(write_message(&mut stream, &done.unwrap_or_else(Refusal::answer))?)
}
