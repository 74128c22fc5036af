//! The `posada` command. See `posada help`.

mod accel;
mod bounded;
mod control;
mod doctor;
mod exec;
mod host;
mod run;
mod signals;
mod size;
mod snapshot;
mod summary;
mod vm;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, Subcommand};
use std::io::IsTerminal;
use std::process::ExitCode;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::writer::BoxMakeWriter;

/// Exit code of bad arguments and of everything else that keeps a command from doing its work.
const FAILURE: u8 = 125;

/// A hypervisor that brings its own virtual CPU.
#[derive(Parser)]
#[command(name = "posada", version, max_term_width = 110, after_help = AFTER_HELP)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

const AFTER_HELP: &str = "POSADA_LOG says what is logged to standard error, for example POSADA_LOG=info or \
POSADA_LOG=posada_vmm=debug. Without it warnings are.";

#[derive(Subcommand)]
enum Command {
    Run(Box<host::RunArguments>),
    Create(Box<host::CreateArguments>),
    Start(host::NamesArguments),
    Stop(host::StopArguments),
    Restart(host::RestartArguments),
    /// Have VMs' CPUs stand still until posada resume; a VM without the daemon is named by its control socket
    Pause(host::NamesArguments),
    /// Let VMs run on that posada pause has stopped
    Resume(host::NamesArguments),
    Kill(host::KillArguments),
    Rm(host::RmArguments),
    #[command(visible_alias = "ps")]
    Ls(host::LsArguments),
    Inspect(host::InspectArguments),
    Attach(host::AttachArguments),
    Exec(exec::Arguments),
    Shell(host::ShellArguments),
    Cp(host::CpArguments),
    Logs(host::LogsArguments),
    Wait(host::WaitArguments),
    Events(host::EventsArguments),
    Stats(host::StatsArguments),
    Top(host::TopArguments),
    Rename(host::RenameArguments),
    Set(host::SetArguments),
    Status(control::StatusArguments),
    Snapshot(snapshot::Arguments),
    Doctor(doctor::Arguments),
    Daemon(host::DaemonArguments),
    Completions(host::CompletionsArguments),
    Man(host::ManArguments),
    Vm(vm::Arguments),
}

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            if error.use_stderr() && error.kind() != ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
                eprintln!("posada: {}", sentence(&error.render().to_string()));
                return ExitCode::from(FAILURE);
            }
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { FAILURE } else { 0 });
        }
    };
    let filter = EnvFilter::try_from_env("POSADA_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    let lonely = match &arguments.command {
        Command::Vm(_) => true,
        Command::Daemon(daemon) => daemon.is_in_background(),
        _ => false,
    };
    let writer = match lonely {
        true => BoxMakeWriter::new(|| bounded::Log),
        false => BoxMakeWriter::new(std::io::stderr),
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(writer)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    let result = match arguments.command {
        Command::Run(arguments) => host::run(&arguments),
        Command::Create(arguments) => host::create(&arguments),
        Command::Start(arguments) => host::start(&arguments),
        Command::Stop(arguments) => host::stop(&arguments),
        Command::Restart(arguments) => host::restart(&arguments),
        Command::Pause(arguments) => host::pause(&arguments),
        Command::Resume(arguments) => host::resume(&arguments),
        Command::Kill(arguments) => host::kill(&arguments),
        Command::Rm(arguments) => host::rm(&arguments),
        Command::Ls(arguments) => host::ls(&arguments),
        Command::Inspect(arguments) => host::inspect(&arguments),
        Command::Attach(arguments) => host::attach(&arguments),
        Command::Exec(arguments) => exec::run(&arguments),
        Command::Shell(arguments) => host::shell(&arguments),
        Command::Cp(arguments) => host::cp(&arguments),
        Command::Logs(arguments) => host::logs(&arguments),
        Command::Wait(arguments) => host::wait(&arguments),
        Command::Events(arguments) => host::events(&arguments),
        Command::Stats(arguments) => host::stats(&arguments),
        Command::Top(arguments) => host::top(&arguments),
        Command::Rename(arguments) => host::rename(&arguments),
        Command::Set(arguments) => host::set(&arguments),
        Command::Status(arguments) => control::status(&arguments),
        Command::Snapshot(arguments) => snapshot::run(&arguments),
        Command::Doctor(arguments) => doctor::run(&arguments),
        Command::Daemon(arguments) => host::daemon(&arguments),
        Command::Completions(arguments) => host::completions(&arguments, Arguments::command()),
        Command::Man(arguments) => host::man(&arguments, Arguments::command()),
        Command::Vm(arguments) => vm::run(&arguments),
    };
    result.unwrap_or_else(|error| {
        eprintln!("posada: {}", with_causes(&error));
        ExitCode::from(FAILURE)
    })
}

/// clap's explanation in one sentence: its first paragraph, and the way to more.
fn sentence(text: &str) -> String {
    let paragraph = text.split("\n\n").next().unwrap_or_default();
    let words: Vec<&str> = paragraph.split_whitespace().collect();
    let line = words.join(" ");
    format!(
        "{}; --help lists what there is",
        line.strip_prefix("error: ").unwrap_or(&line)
    )
}

/// An error and its causes in one line. Many errors say their cause themselves; it is not said again.
fn with_causes(error: &anyhow::Error) -> String {
    error
        .chain()
        .map(ToString::to_string)
        .fold(String::new(), |line, cause| {
            if line.contains(&cause) {
                line
            } else if line.is_empty() {
                cause
            } else {
                format!("{line}: {cause}")
            }
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_said_once() {
        let error = anyhow::anyhow!("no disk")
            .context("cannot start: no disk; get one")
            .context("run");
        assert_eq!(with_causes(&error), "run: cannot start: no disk; get one");
    }

    #[test]
    fn bad_arguments_are_one_sentence() {
        let Err(error) = Arguments::try_parse_from(["posada", "run", "--kernel", "x", "--memory", "lots"]) else {
            panic!("\"lots\" is a size");
        };
        let text = sentence(&error.render().to_string());
        assert!(
            !text.contains('\n') && text.contains("--memory") && text.contains("512M"),
            "{text}"
        );
    }
}
