//! The agent: runs in a guest as root and does what the host asks, over vsock. `posada-protocol` says what that can be.
//!
//! Each connection has a thread. Only the host is served: programs of the guest that connect by themselves are turned away.

mod copy;
mod exec;
mod freeze;
mod keys;
mod listen;
mod session;
mod statistics;
mod system;
mod user;

use anyhow::{Context, bail};
use listen::Listener;
use std::env;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use system::System;

const USAGE: &str = "\
Usage: posada-agent [--vsock PORT]
       posada-agent --unix PATH --root DIR

Does what the host asks, for as long as it runs, at a vsock port: 700 if nothing else is said.
The second form is for tests: it listens at a Unix socket, and what it would read and write in
/etc, /proc, /sys and home directories it does below DIR.";

/// The most connections at a time.
const MOST: usize = 128;

fn begin() -> anyhow::Result<Option<(Listener, System)>> {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let vsock = |port| Listener::vsock(port).with_context(|| format!("cannot listen at the vsock port {port}"));
    Ok(Some(match words[..] {
        [] => (vsock(posada_protocol::PORT)?, System::new("/")),
        ["--vsock", port] => {
            let port = port.parse().with_context(|| format!("{port} is no port"))?;
            (vsock(port)?, System::new("/"))
        }
        ["--unix", path, "--root", root] => {
            let listener = Listener::unix(path.as_ref()).with_context(|| format!("cannot listen at {path}"))?;
            (listener, System::new(root))
        }
        ["--help" | "-h"] => {
            println!("{USAGE}");
            return Ok(None);
        }
        ["--version" | "-V"] => {
            println!("posada-agent {}", env!("CARGO_PKG_VERSION"));
            return Ok(None);
        }
        _ => bail!("what is {}?\n{USAGE}", words.join(" ")),
    }))
}

/// A connection's place among [`MOST`].
struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn serve(stream: File, system: &Arc<System>, places: &Arc<AtomicUsize>) {
    let system = Arc::clone(system);
    let place = Place(Arc::clone(places));
    if places.fetch_add(1, Ordering::Relaxed) >= MOST {
        return;
    }
    let spawned = thread::Builder::new().name("connection".into()).spawn(move || {
        let _place = place;
        if let Err(error) = session::serve(stream, &system) {
            eprintln!("posada-agent: a connection ended: {error:#}");
        }
    });
    if let Err(error) = spawned {
        eprintln!("posada-agent: no thread for a connection: {error}");
    }
}

fn main() -> anyhow::Result<()> {
    let Some((listener, system)) = begin()? else {
        return Ok(());
    };
    let system = Arc::new(system);
    let places = Arc::new(AtomicUsize::new(0));
    loop {
        match listener.accept() {
            Ok(Some(stream)) => serve(stream, &system, &places),
            // Not the host.
            Ok(None) => {}
            // Too many open files, perhaps: that passes.
            Err(error) => {
                eprintln!("posada-agent: a connection cannot be accepted: {error}");
                thread::sleep(std::time::Duration::from_secs(1));
            }
        }
    }
}
