//! What happens to VMs, what they print and what they use: `posada events`, `wait`, `logs`, `stats`, `top`.

use super::connect::{api, part, print};
use super::exec::{Stdout, agent, wait_for};
use super::list::table;
use crate::size;
use anyhow::Context;
use clap::Args;
use posada_host::api::Statistics;
use posada_host::client::Api;
use posada_host::vm::View;
use std::io;
use std::process::ExitCode;

/// Watch what happens to VMs, as a line of JSON for each event
#[derive(Args)]
pub struct EventsArguments {
    /// Tell those behind this number first, as far as they are remembered
    #[arg(long, value_name = "NUMBER")]
    since: Option<u64>,

    /// End after what is remembered instead of waiting for more
    #[arg(long)]
    past: bool,
}

/// Wait until VMs have ended, and print their exit codes
#[derive(Args)]
pub struct WaitArguments {
    /// Names, ids, or beginnings of ids
    #[arg(required = true, value_name = "VM")]
    vms: Vec<String>,
}

/// Print what a VM's console printed
#[derive(Args)]
pub struct LogsArguments {
    /// Go on as it grows, until the VM has ended
    #[arg(short, long)]
    follow: bool,

    /// Only so many of its last lines
    #[arg(short = 'n', long, value_name = "LINES")]
    tail: Option<usize>,

    /// What the VM's process had to say instead
    #[arg(long)]
    process: bool,

    /// The VM
    vm: String,
}

/// Say what VMs use of this host
#[derive(Args)]
pub struct StatsArguments {
    /// Names, ids, or beginnings of ids [default: all that run]
    #[arg(value_name = "VM")]
    vms: Vec<String>,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Say what a VM's programs use, by its agent
#[derive(Args)]
pub struct TopArguments {
    /// So many programs, those that use most first
    #[arg(short = 'n', long, value_name = "N", default_value_t = 20)]
    number: u32,

    /// Print JSON, of all that the agent tells
    #[arg(long)]
    json: bool,

    /// The VM
    vm: String,
}

/// Copies an answer that goes on to standard output.
fn pass(api: &Api, address: &str) -> anyhow::Result<ExitCode> {
    let mut answer = api.send("GET", address, None, None)?;
    match io::copy(&mut answer, &mut Stdout) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error).context("the daemon's answer"),
        _ => Ok(ExitCode::SUCCESS),
    }
}

/// Runs `posada events`.
pub fn events(arguments: &EventsArguments) -> anyhow::Result<ExitCode> {
    let since = arguments
        .since
        .map(|since| format!("&since={since}"))
        .unwrap_or_default();
    pass(&api()?, &format!("/v1/events?past={}{since}", arguments.past))
}

/// Runs `posada wait`.
pub fn wait(arguments: &WaitArguments) -> anyhow::Result<ExitCode> {
    let api = api()?;
    for vm in &arguments.vms {
        let view = wait_for(&api, vm).with_context(|| format!("cannot wait for {vm}"))?;
        println!("{}", view.exit.map_or(0, |exit| exit.code));
    }
    Ok(ExitCode::SUCCESS)
}

/// Runs `posada logs`.
pub fn logs(arguments: &LogsArguments) -> anyhow::Result<ExitCode> {
    let tail = arguments.tail.map(|lines| format!("&tail={lines}")).unwrap_or_default();
    let (follow, process) = (arguments.follow, arguments.process);
    let vm = part(&arguments.vm);
    pass(
        &api()?,
        &format!("/v1/vms/{vm}/logs?follow={follow}&process={process}{tail}"),
    )
}

/// Runs `posada stats`.
pub fn stats(arguments: &StatsArguments) -> anyhow::Result<ExitCode> {
    let api = api()?;
    let mut names = arguments.vms.clone();
    if names.is_empty() {
        let views: Vec<View> = api.get("/v1/vms?state=running,paused")?;
        names.extend(views.into_iter().map(|view| view.name));
    }
    let of = |vm: &String| api.get(&format!("/v1/vms/{}/stats", part(vm)));
    let all = names.iter().map(of).collect::<Result<Vec<Statistics>, _>>()?;
    if arguments.json {
        print(&(serde_json::to_string_pretty(&all)? + "\n"))?;
        return Ok(ExitCode::SUCCESS);
    }
    let head = ["NAME", "CPUS", "CPU TIME", "MEMORY", "TOUCHED", "PROCESS"].map(String::from);
    let rows = all.iter().map(|one| {
        [
            one.name.clone(),
            one.cpus.to_string(),
            format!("{:.1} s", one.cpu_seconds),
            size::of(one.memory),
            size::of(one.touched),
            size::of(one.resident),
        ]
    });
    print(&table(&head, rows.collect()))?;
    Ok(ExitCode::SUCCESS)
}

/// Runs `posada top`.
pub fn top(arguments: &TopArguments) -> anyhow::Result<ExitCode> {
    let api = api()?;
    let statistics = agent(&api, &arguments.vm)?.statistics(arguments.number)?;
    if arguments.json {
        print(&(serde_json::to_string_pretty(&statistics)? + "\n"))?;
        return Ok(ExitCode::SUCCESS);
    }
    let memory = &statistics.memory;
    let load = statistics.load.map(|load| format!("{load:.2}")).join(" ");
    let (available, total) = (size::of(memory.available), size::of(memory.total));
    let seconds = statistics.uptime_ms / 1000;
    let mut text = format!("up {seconds} s, load {load}, memory {available} of {total} available\n");
    let head = ["PID", "CPU TIME", "MEMORY", "STATE", "NAME"].map(String::from);
    let rows = statistics.processes.iter().map(|process| {
        [
            process.pid.to_string(),
            format!("{:.1} s", process.cpu_ms as f64 / 1000.0),
            size::of(process.resident),
            process.state.to_string(),
            // A guest names its programs as it likes.
            process.name.chars().filter(|letter| !letter.is_control()).collect(),
        ]
    });
    text += &table(&head, rows.collect());
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}
