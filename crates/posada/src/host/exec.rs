//! Consoles and shells of VMs: `posada attach`, `posada shell`, and the way to a VM's agent.

use super::connect::{api, part};
use super::make::look;
use super::manage::operate;
use crate::exec::{Guest, PATIENCE, UNKNOWN, perform, size};
use anyhow::Context;
use clap::Args;
use posada_host::client::Api;
use posada_host::policy::State;
use posada_host::vm::View;
use posada_protocol::{Client, Exec};
use posada_vmm::console::RawMode;
use std::io::{self, IsTerminal, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::mpsc;
use std::thread;

/// Begins a command of the console: Ctrl-A.
const ESCAPE: u8 = 1;

/// Connect to a VM's console
#[derive(Args)]
#[command(after_help = "On a terminal Ctrl-A d leaves the console and the VM runs on; Ctrl-A Ctrl-A sends Ctrl-A.")]
pub struct AttachArguments {
    /// The VM
    vm: String,
}

/// Have a shell in a VM, by its agent
#[derive(Args)]
pub struct ShellArguments {
    /// As whom [default: root]
    #[arg(short, long, value_name = "NAME")]
    user: Option<String>,

    /// The VM
    vm: String,
}

/// Runs `posada attach`.
pub fn attach(arguments: &AttachArguments) -> anyhow::Result<ExitCode> {
    let api = api()?;
    let view = look(&api, &arguments.vm)?;
    match console(&api, &view.id)? {
        true => Ok(ExitCode::SUCCESS),
        false => exit_code(&wait_for(&api, &view.id)?),
    }
}

/// What one of the threads of a console has seen.
enum Seen {
    /// The user wants out.
    Left,
    /// There is no more output.
    Over,
}

/// Starts a new VM and shows its console until it has ended, with its exit code. What it prints is taken from its log, so that
/// nothing is missed of one that is quick.
pub fn start_attached(api: &Api, view: &View) -> anyhow::Result<ExitCode> {
    operate(api, &view.id, "start", "").with_context(|| format!("cannot start {}", view.name))?;
    let terminal = io::stdin().is_terminal();
    let raw = terminal.then(RawMode::enter).transpose().context("the terminal")?;
    let (tell, seen) = mpsc::channel();
    let (left, over) = (tell.clone(), tell);
    // One that has ended takes no input.
    if let Ok(stream) = api.upgrade(&format!("/v1/vms/{}/console", view.id), "posada-console") {
        thread::spawn(move || {
            if type_into(&stream, terminal) {
                let _ = left.send(Seen::Left);
            }
        });
    }
    let (source, id) = (api.clone(), view.id.clone());
    thread::spawn(move || {
        // One that was forgotten at its end has no log any more.
        if let Ok(mut log) = source.send("GET", &format!("/v1/vms/{id}/logs?follow=true"), None, None) {
            let _ = io::copy(&mut log, &mut Stdout);
        }
        let _ = over.send(Seen::Over);
    });
    let seen = seen.recv().unwrap_or(Seen::Over);
    drop(raw);
    match seen {
        Seen::Left => Ok(ExitCode::SUCCESS),
        Seen::Over => exit_code(&wait_for(api, &view.id)?),
    }
}

/// Waits until a VM has ended.
pub fn wait_for(api: &Api, vm: &str) -> anyhow::Result<View> {
    Ok(api.get(&format!("/v1/vms/{}/wait", part(vm)))?)
}

/// What a VM's end means for who has waited for it.
pub fn exit_code(view: &View) -> anyhow::Result<ExitCode> {
    if let (State::Failed, Some(message)) = (view.state, &view.message) {
        eprintln!("posada: {}: {message}", view.name);
    }
    let code = view.exit.as_ref().map_or(0, |exit| exit.code);
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX)))
}

/// Connects standard input and output with a VM's console; true: the user has left it.
fn console(api: &Api, id: &str) -> anyhow::Result<bool> {
    let mut stream = api.upgrade(&format!("/v1/vms/{}/console", part(id)), "posada-console")?;
    let terminal = io::stdin().is_terminal();
    let _raw = terminal.then(RawMode::enter).transpose().context("the terminal")?;
    let writer = stream.try_clone()?;
    let typing = thread::spawn(move || type_into(&writer, terminal));
    let copied = io::copy(&mut stream, &mut Stdout);
    let left = typing.is_finished() && typing.join().unwrap_or(false);
    copied.context("the connection to the console")?;
    Ok(left)
}

/// Standard output without a buffer: a prompt has no newline.
pub struct Stdout;

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut out = io::stdout();
        let count = out.write(bytes)?;
        out.flush()?;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stdout().flush()
    }
}

/// What is typed goes to the guest, until the user leaves (then true).
fn type_into(mut stream: &UnixStream, terminal: bool) -> bool {
    let mut bytes = [0; 1024];
    let mut escaped = false;
    while let Ok(count @ 1..) = io::stdin().read(&mut bytes) {
        let mut pass = Vec::with_capacity(count);
        for byte in &bytes[..count] {
            match (terminal, escaped, *byte) {
                (true, false, ESCAPE) => escaped = true,
                (true, true, b'd') => {
                    let _ = stream.shutdown(Shutdown::Both);
                    return true;
                }
                (true, true, byte) => {
                    escaped = false;
                    if byte == ESCAPE {
                        pass.push(byte);
                    }
                }
                (_, _, byte) => pass.push(byte),
            }
        }
        if stream.write_all(&pass).is_err() {
            return false;
        }
    }
    // The end of input does not end the VM, nor what it prints.
    false
}

/// The agent of a VM.
pub fn agent(api: &Api, vm: &str) -> anyhow::Result<Client> {
    let stream = api.upgrade(&format!("/v1/vms/{}/vsock", part(vm)), "posada-vsock")?;
    Client::through(stream, PATIENCE).with_context(|| format!("cannot reach the agent of {vm}"))
}

/// The agent of a VM of the daemon, and what its user has said of programs.
pub fn guest(vm: &str) -> anyhow::Result<Guest> {
    let api = api()?;
    let spec = look(&api, vm)?.spec;
    let pairs = spec
        .iter()
        .flat_map(|spec| &spec.environment)
        .filter_map(|text| text.split_once('='));
    Ok(Guest {
        client: agent(&api, vm)?,
        environment: pairs.map(|(name, value)| (name.into(), value.into())).collect(),
        directory: spec.as_ref().and_then(|spec| spec.directory.clone()),
    })
}

/// Runs `posada shell`.
pub fn shell(arguments: &ShellArguments) -> anyhow::Result<ExitCode> {
    let Guest {
        client,
        mut environment,
        directory,
    } = guest(&arguments.vm)?;
    if let Ok(terminal) = std::env::var("TERM") {
        environment.push(("TERM".into(), terminal));
    }
    let exec = Exec {
        // The user's own where there is one; every guest with a shell has this one.
        command: ["/bin/sh", "-c", "exec \"${SHELL:-/bin/sh}\" -l"]
            .map(String::from)
            .into(),
        environment,
        directory,
        user: arguments.user.clone(),
        terminal: io::stdin().is_terminal().then(|| size().unwrap_or(UNKNOWN)),
        input: true,
    };
    perform(client, &exec)
}
