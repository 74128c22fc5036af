//! `posada run` and `posada create`.

use super::connect::{api, part};
use super::{exec, manage};
use crate::run;
use anyhow::{Context, anyhow};
use clap::{Args, ValueEnum};
use posada_host::api::Creation;
use posada_host::client::Api;
use posada_host::name;
use posada_host::policy::RestartPolicy;
use posada_host::spec::Spec;
use posada_host::vm::View;
use std::process::ExitCode;

/// Whether a VM is started again when it ends by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Restart {
    /// Never
    No,
    /// When it crashed or its process died
    OnFailure,
    /// When it powered off, too
    Always,
}

impl Restart {
    pub fn policy(self) -> RestartPolicy {
        match self {
            Self::No => RestartPolicy::No,
            Self::OnFailure => RestartPolicy::OnFailure,
            Self::Always => RestartPolicy::Always,
        }
    }
}

/// What the daemon is told of a VM beside what it runs.
#[derive(Args)]
struct Care {
    /// Its name [default: one that is made up]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,

    /// Forget it when it has ended
    #[arg(long)]
    rm: bool,

    /// Whether it is started again when it ends by itself [default: no]
    #[arg(long, value_enum, value_name = "WHEN")]
    restart: Option<Restart>,

    /// A variable for the programs that are run in it by exec and shell
    #[arg(short, long = "env", value_name = "NAME=VALUE")]
    environment: Vec<String>,

    /// Where these programs begin
    #[arg(short = 'w', long = "workdir", value_name = "DIR")]
    directory: Option<String>,

    /// Something to remember, and to find it by
    #[arg(short, long = "label", value_name = "KEY=VALUE")]
    labels: Vec<String>,

    /// Give it no sockets between host and guest; its agent cannot be reached then
    #[arg(long)]
    no_vsock: bool,
}

impl Care {
    fn is_given(&self) -> bool {
        self.name.is_some()
            || self.rm
            || self.restart.is_some()
            || !self.environment.is_empty()
            || self.directory.is_some()
            || !self.labels.is_empty()
            || self.no_vsock
    }

    fn spec(&self, vm: &run::Arguments) -> anyhow::Result<Spec> {
        let mut spec = vm.spec()?;
        spec.restart = self.restart.map(Restart::policy).unwrap_or_default();
        spec.remove = self.rm;
        spec.environment = self.environment.clone();
        spec.directory = self.directory.clone();
        spec.labels = labels(&self.labels)?;
        spec.vsock = !self.no_vsock;
        Ok(spec)
    }
}

/// `KEY=VALUE` and `KEY`.
pub fn labels(texts: &[String]) -> anyhow::Result<std::collections::BTreeMap<String, String>> {
    let pair = |text: &String| {
        let (key, value) = text.split_once('=').unwrap_or((text, ""));
        match key {
            "" => Err(anyhow!("{text:?} is no label; write KEY=VALUE")),
            _ => Ok((key.to_string(), value.to_string())),
        }
    };
    texts.iter().map(pair).collect()
}

/// Run a VM
///
/// With -d, --name, --rm, --restart, -e, -w, --label or --no-vsock the host's daemon has it, and this command shows its console
/// until it ends (or only its name, with -d). Without any of them, or with --foreground, it runs in this process.
#[derive(Args)]
#[command(after_help = run::AFTER_HELP)]
pub struct RunArguments {
    /// Have the daemon run it, and say only its name
    #[arg(short, long, conflicts_with = "foreground")]
    detach: bool,

    /// Run it in this process, without the daemon
    #[arg(long)]
    foreground: bool,

    #[command(flatten)]
    care: Care,

    #[command(flatten)]
    vm: run::Arguments,
}

/// Make a VM that runs later
#[derive(Args)]
pub struct CreateArguments {
    #[command(flatten)]
    care: Care,

    #[command(flatten)]
    vm: run::Arguments,
}

/// Runs `posada run`.
pub fn run(arguments: &RunArguments) -> anyhow::Result<ExitCode> {
    let RunArguments {
        detach,
        foreground,
        care,
        vm,
    } = arguments;
    if *foreground && care.is_given() {
        return Err(anyhow!(
            "--foreground runs a VM without the daemon, which alone knows names, restarts, labels and variables; leave out one of both"
        ));
    }
    if *foreground || !(*detach || care.is_given()) {
        return run::run(vm);
    }
    let spec = care.spec(vm)?;
    let api = api()?;
    let view = make(&api, care.name.clone(), spec)?;
    if *detach {
        let started = manage::operate(&api, &view.id, "start", "");
        // One that was to be forgotten has nothing to look at.
        started.with_context(|| format!("cannot start {}", view.name))?;
        println!("{}", view.name);
        return Ok(ExitCode::SUCCESS);
    }
    exec::start_attached(&api, &view)
}

/// Runs `posada create`.
pub fn create(arguments: &CreateArguments) -> anyhow::Result<ExitCode> {
    let view = make(
        &api()?,
        arguments.care.name.clone(),
        arguments.care.spec(&arguments.vm)?,
    )?;
    println!("{}", view.name);
    Ok(ExitCode::SUCCESS)
}

fn make(api: &Api, name: Option<String>, spec: Spec) -> anyhow::Result<View> {
    let creation = Creation { name, spec };
    Ok(api.call("POST", "/v1/vms", Some(&creation), Some(&name::new_id()))?)
}

/// How a VM is.
pub fn look(api: &Api, vm: &str) -> anyhow::Result<View> {
    Ok(api.get(&format!("/v1/vms/{}", part(vm)))?)
}
