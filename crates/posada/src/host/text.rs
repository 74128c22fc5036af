//! What is made of the commands' definitions: completions and manual pages.

use super::connect::print;
use anyhow::Context;
use clap::{Args, Command};
use clap_complete::Shell;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Print what a shell needs to complete commands
#[derive(Args)]
#[command(after_help = "Example:\n  posada completions bash > ~/.local/share/bash-completion/completions/posada")]
pub struct CompletionsArguments {
    /// The shell
    shell: Shell,
}

/// Write manual pages, one for each command
#[derive(Args)]
#[command(after_help = "Example:\n  posada man ~/.local/share/man/man1")]
pub struct ManArguments {
    /// The folder for them; it is made if it is missing
    directory: PathBuf,
}

/// Runs `posada completions`.
pub fn completions(arguments: &CompletionsArguments, mut command: Command) -> anyhow::Result<ExitCode> {
    let mut text = Vec::new();
    clap_complete::generate(arguments.shell, &mut command, "posada", &mut text);
    print(&String::from_utf8_lossy(&text))?;
    Ok(ExitCode::SUCCESS)
}

/// Runs `posada man`.
pub fn man(arguments: &ManArguments, mut command: Command) -> anyhow::Result<ExitCode> {
    let directory = &arguments.directory;
    std::fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
    command.build();
    write(directory, &command, "posada")?;
    for sub in command
        .get_subcommands()
        .filter(|sub| !sub.is_hide_set() && sub.get_name() != "help")
    {
        write(directory, sub, &format!("posada-{}", sub.get_name()))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn write(directory: &Path, command: &Command, name: &str) -> anyhow::Result<()> {
    let path = directory.join(format!("{name}.1"));
    let mut page = Vec::new();
    let page_of = clap_mangen::Man::new(command.clone()).title(name);
    page_of.render(&mut page).context("the page")?;
    std::fs::write(&path, page).with_context(|| format!("cannot write {}", path.display()))
}
