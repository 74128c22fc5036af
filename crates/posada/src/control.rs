//! `posada status`, `pause` and `resume`: what can be asked of a running VM by its control socket.

use crate::size;
use anyhow::bail;
use clap::Args;
use posada_vmm::control::Condition;
use posada_vmm::remote::{Answer, Client, Request};
use std::path::PathBuf;
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

/// Have a running VM's CPUs stand still until posada resume
#[derive(Args)]
pub struct PauseArguments {
    /// The VM's control socket: what its --control names
    path: PathBuf,
}

/// Let a VM run on that posada pause has stopped
#[derive(Args)]
pub struct ResumeArguments {
    /// The VM's control socket: what its --control names
    path: PathBuf,
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

/// Runs `posada pause`.
pub fn pause(arguments: &PauseArguments) -> anyhow::Result<ExitCode> {
    Client::connect(&arguments.path)?.ask(&Request::Pause, &mut |_| {})?;
    Ok(ExitCode::SUCCESS)
}

/// Runs `posada resume`.
pub fn resume(arguments: &ResumeArguments) -> anyhow::Result<ExitCode> {
    Client::connect(&arguments.path)?.ask(&Request::Resume, &mut |_| {})?;
    Ok(ExitCode::SUCCESS)
}
