//! What can be asked of a running VM by its control socket: `posada status`, and `pause` and `resume` of one without the daemon.

use crate::size;
use anyhow::bail;
use clap::Args;
use posada_vmm::control::Condition;
use posada_vmm::remote::{Answer, Client, Request};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Say how a running VM is
#[derive(Args)]
pub struct StatusArguments {
    /// The VM's control socket: what its --control names
    path: PathBuf,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Runs `posada status`.
pub fn status(arguments: &StatusArguments) -> anyhow::Result<ExitCode> {
    let answer = Client::connect(&arguments.path)?.ask(&Request::Status, &mut |_| {})?;
    let Answer::Status(status) = answer else {
        bail!("the VM does not say how it is; use its own posada command");
    };
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&status)?);
        return Ok(ExitCode::SUCCESS);
    }
    let condition = match status.condition {
        Condition::Starting => "starting",
        Condition::Running => "running",
        Condition::Paused => "paused",
        Condition::Debugged => "stopped by gdb",
        Condition::Ending => "ending",
    };
    println!("state    {condition}");
    println!("process  {} (posada {})", status.pid, status.posada);
    println!("CPUs     {}", status.cpus);
    println!(
        "memory   {}, {} of it touched",
        size::of(status.memory),
        size::of(status.touched)
    );
    Ok(ExitCode::SUCCESS)
}

/// Has the VM with this control socket stand still.
pub fn pause(socket: &Path) -> anyhow::Result<()> {
    Client::connect(socket)?.ask(&Request::Pause, &mut |_| {})?;
    Ok(())
}

/// Lets it run on.
pub fn resume(socket: &Path) -> anyhow::Result<()> {
    Client::connect(socket)?.ask(&Request::Resume, &mut |_| {})?;
    Ok(())
}
