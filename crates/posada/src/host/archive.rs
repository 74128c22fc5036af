//! `posada cp`: files and folders into a VM and out of it, by its agent.

use super::connect::api;
use super::exec::agent;
use anyhow::{Context, anyhow};
use clap::Args;
use posada_host::client::Api;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Copy files and folders into a VM or out of it, by its agent
#[derive(Args)]
#[command(after_help = "Examples:\n  posada cp web:/etc/hosts .\n  posada cp page.html web:/srv/")]
pub struct CpArguments {
    /// PATH, or VM:PATH
    from: String,

    /// VM:DIR, or PATH: a folder into which it comes, or the new name of what came out
    to: String,
}

/// The most bytes that a guest may send: a disk's worth.
const MOST: u64 = 1 << 40;

/// A place in a VM. What has a slash before its first colon is a path here.
fn in_vm(text: &str) -> Option<(&str, &str)> {
    let (vm, path) = text.split_once(':')?;
    (!vm.is_empty() && !vm.contains('/')).then_some((vm, path))
}

/// Runs `posada cp`.
pub fn cp(arguments: &CpArguments) -> anyhow::Result<ExitCode> {
    let (from, to) = (&arguments.from, &arguments.to);
    match (in_vm(from), in_vm(to)) {
        (Some((vm, path)), None) => get(&api()?, vm, path, Path::new(to)),
        (None, Some((vm, path))) => Ok(agent(&api()?, vm)?.copy_in(Path::new(from), path)?),
        _ => {
            return Err(anyhow!(
                "one of both places must be in a VM, as VM:PATH, and the other one here"
            ));
        }
    }
    .with_context(|| format!("cannot copy {from} to {to}"))?;
    Ok(ExitCode::SUCCESS)
}

/// A folder that goes with its value.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// What comes is put into an empty folder first: of the guest's names only the one file or folder that was asked for leaves it.
fn get(api: &Api, vm: &str, path: &str, to: &Path) -> anyhow::Result<()> {
    let inside = to.is_dir();
    let folder = match to.parent() {
        _ if inside => to,
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let scratch = Scratch(folder.join(format!(".posada-cp-{}", std::process::id())));
    fs::create_dir(&scratch.0).with_context(|| format!("cannot write to {}", folder.display()))?;
    agent(api, vm)?.copy_out(path, &scratch.0, MOST)?;
    let found = fs::read_dir(&scratch.0)?.next().transpose()?;
    let found = found.ok_or_else(|| anyhow!("the agent has sent nothing"))?;
    let target = match inside {
        true => to.join(found.file_name()),
        false => to.into(),
    };
    fs::rename(found.path(), &target).with_context(|| format!("cannot replace {}", target.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_in_a_vm_or_here() {
        assert_eq!(in_vm("web:/etc"), Some(("web", "/etc")));
        assert_eq!(in_vm("./a:b"), None);
        assert_eq!(in_vm("a"), None);
        assert_eq!(in_vm(":a"), None);
    }
}
