//! What is done with VMs that are there.

use super::connect::{api, part};
use super::make::{Restart, labels};
use crate::exec::is_socket;
use crate::{control, size};
use anyhow::{Context, anyhow};
use clap::Args;
use posada_host::api::Naming;
use posada_host::client::Api;
use posada_host::name;
use posada_host::operations::{Operation, Stage};
use posada_host::vm::{Change, View};
use std::path::Path;
use std::process::ExitCode;

/// Seconds that one request waits for an operation's end.
const WAIT: u32 = 60;

/// Some VMs.
#[derive(Args)]
pub struct NamesArguments {
    /// Names, ids, or beginnings of ids
    #[arg(required = true, value_name = "VM")]
    vms: Vec<String>,
}

/// Stop VMs: their guests are asked to power off, then their processes are told to end, then killed
#[derive(Args)]
pub struct StopArguments {
    #[command(flatten)]
    names: NamesArguments,

    /// Seconds that a guest has to power off
    #[arg(short = 't', long, value_name = "SECONDS", default_value_t = 10.0)]
    time: f64,
}

/// Stop VMs and start them
#[derive(Args)]
pub struct RestartArguments {
    #[command(flatten)]
    names: NamesArguments,

    /// Seconds that a guest has to power off
    #[arg(short = 't', long, value_name = "SECONDS", default_value_t = 10.0)]
    time: f64,
}

/// End VMs at once, as pulling their plugs would
#[derive(Args)]
pub struct KillArguments {
    #[command(flatten)]
    names: NamesArguments,
}

/// Forget VMs: what the daemon keeps of them, not their disks
#[derive(Args)]
pub struct RmArguments {
    #[command(flatten)]
    names: NamesArguments,

    /// Kill those that run
    #[arg(short, long)]
    force: bool,
}

/// Give a VM another name
#[derive(Args)]
pub struct RenameArguments {
    /// The VM
    vm: String,

    /// Its new name
    name: String,
}

/// Change a VM: its restart policy and labels at once, CPUs and memory from its next start on
#[derive(Args)]
pub struct SetArguments {
    /// The VM
    vm: String,

    /// Whether it is started again when it ends by itself
    #[arg(long, value_enum, value_name = "WHEN")]
    restart: Option<Restart>,

    /// Number of virtual CPUs
    #[arg(long, value_name = "N")]
    cpus: Option<u32>,

    /// Guest memory, as in 512M or 2GiB
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    memory: Option<u64>,

    /// Something to remember, and to find it by
    #[arg(short, long = "label", value_name = "KEY=VALUE")]
    labels: Vec<String>,
}

/// Does it with each VM; one that fails does not keep the others from it.
fn each(
    vms: &[String],
    doing: &str,
    mut work: impl FnMut(&Api, &str) -> anyhow::Result<()>,
) -> anyhow::Result<ExitCode> {
    let api = api()?;
    let mut failed = Vec::new();
    for vm in vms {
        match work(&api, vm) {
            Ok(()) => println!("{vm}"),
            Err(error) => failed.push(error.context(format!("cannot {doing} {vm}"))),
        }
    }
    let last = failed.pop();
    for error in failed {
        eprintln!("posada: {}", crate::with_causes(&error));
    }
    last.map_or(Ok(ExitCode::SUCCESS), Err)
}

/// Begins an operation and waits for its end; if the daemon goes meanwhile, the next one is asked.
pub fn operate(api: &Api, vm: &str, what: &str, query: &str) -> anyhow::Result<()> {
    let key = name::new_id();
    let address = format!("/v1/vms/{}/{what}?wait={WAIT}{query}", part(vm));
    // With its key it is not done twice by the same daemon, and what is done already is no harm by the next.
    let mut operation: Operation = api.call("POST", &address, None::<&()>, Some(&key))?;
    loop {
        match operation.stage {
            Stage::Running => operation = api.get(&format!("/v1/operations/{}?wait={WAIT}", operation.id))?,
            Stage::Done => return Ok(()),
            Stage::Cancelled => return Err(anyhow!("somebody has cancelled it")),
            Stage::Failed => return Err(anyhow!(operation.error.unwrap_or_default())),
        }
    }
}

/// Runs `posada start`.
pub fn start(arguments: &NamesArguments) -> anyhow::Result<ExitCode> {
    each(&arguments.vms, "start", |api, vm| operate(api, vm, "start", ""))
}

/// Runs `posada stop`.
pub fn stop(arguments: &StopArguments) -> anyhow::Result<ExitCode> {
    let query = format!("&timeout={}", arguments.time);
    each(&arguments.names.vms, "stop", |api, vm| operate(api, vm, "stop", &query))
}

/// Runs `posada restart`.
pub fn restart(arguments: &RestartArguments) -> anyhow::Result<ExitCode> {
    let query = format!("&timeout={}", arguments.time);
    each(&arguments.names.vms, "restart", |api, vm| {
        operate(api, vm, "restart", &query)
    })
}

fn post(api: &Api, vm: &str, what: &str) -> anyhow::Result<()> {
    let address = format!("/v1/vms/{}/{what}", part(vm));
    api.call::<View>("POST", &address, None::<&()>, None)?;
    Ok(())
}

/// Runs `posada kill`.
pub fn kill(arguments: &KillArguments) -> anyhow::Result<ExitCode> {
    each(&arguments.names.vms, "kill", |api, vm| post(api, vm, "kill"))
}

fn set_paused(
    vms: &[String],
    what: &str,
    without_daemon: impl Fn(&Path) -> anyhow::Result<()>,
) -> anyhow::Result<ExitCode> {
    if let [vm] = vms
        && is_socket(vm)
    {
        without_daemon(Path::new(vm))?;
        return Ok(ExitCode::SUCCESS);
    }
    each(vms, what, |api, vm| match is_socket(vm) {
        true => without_daemon(Path::new(vm)),
        false => post(api, vm, what),
    })
}

/// Runs `posada pause`.
pub fn pause(arguments: &NamesArguments) -> anyhow::Result<ExitCode> {
    set_paused(&arguments.vms, "pause", control::pause)
}

/// Runs `posada resume`.
pub fn resume(arguments: &NamesArguments) -> anyhow::Result<ExitCode> {
    set_paused(&arguments.vms, "resume", control::resume)
}

/// Runs `posada rm`.
pub fn rm(arguments: &RmArguments) -> anyhow::Result<ExitCode> {
    let force = arguments.force;
    each(&arguments.names.vms, "remove", |api, vm| {
        let address = format!("/v1/vms/{}?force={force}", part(vm));
        Ok(api.call::<()>("DELETE", &address, None::<&()>, None)?)
    })
}

/// Runs `posada rename`.
pub fn rename(arguments: &RenameArguments) -> anyhow::Result<ExitCode> {
    let address = format!("/v1/vms/{}/rename", part(&arguments.vm));
    let naming = Naming {
        name: arguments.name.clone(),
    };
    let renamed = api()?.call::<View>("POST", &address, Some(&naming), None);
    println!(
        "{}",
        renamed.with_context(|| format!("cannot rename {}", arguments.vm))?.name
    );
    Ok(ExitCode::SUCCESS)
}

/// Runs `posada set`.
pub fn set(arguments: &SetArguments) -> anyhow::Result<ExitCode> {
    let change = Change {
        restart: arguments.restart.map(Restart::policy),
        cpus: arguments.cpus,
        memory: arguments.memory,
        labels: labels(&arguments.labels)?,
    };
    if change == Change::default() {
        return Err(anyhow!("say what to change: --restart, --cpus, --memory or --label"));
    }
    let address = format!("/v1/vms/{}", part(&arguments.vm));
    let view: View = api()?.call("PATCH", &address, Some(&change), None)?;
    println!("{}", view.name);
    let later = arguments.cpus.is_some() || arguments.memory.is_some();
    if later && view.pid.is_some() {
        eprintln!(
            "posada: {} has its new CPUs and memory from its next start on",
            view.name
        );
    }
    Ok(ExitCode::SUCCESS)
}
