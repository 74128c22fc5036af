//! `posada exec`: a program in a guest, by its agent.

use crate::{FAILURE, host, signals};
use clap::Args;
use posada_protocol::{Client, Error, Event, Exec, Failure, Input, Size};
use posada_vmm::console::{RawMode, restore_terminal};
use std::io::{self, IsTerminal, Read, Write};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::process::{ExitCode, exit};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// How long an agent may take to answer.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// As Docker has them: the program is there and cannot be run; it is not there.
const NOT_RUN: u8 = 126;
const NOT_FOUND: u8 = 127;

const AFTER_HELP: &str = "\
In the guest posada-agent must run. Without --terminal, SIGINT, SIGTERM and SIGHUP go to the program.

Exit codes: the program's, 128 + n if signal n has ended it; 125, 126 and 127 if it was not run, as there was an error, it
may not be run, or is not there.

Examples:
  posada run -d --name web …             posada exec -it web bash
  posada run --vsock vm.vsock …          posada exec -it ./vm.vsock bash";

/// Run a program in a guest
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub struct Arguments {
    /// Pass standard input on to the program
    #[arg(short, long)]
    interactive: bool,

    /// Give the program a terminal; with -i on a terminal, each key goes to it
    #[arg(short, long)]
    terminal: bool,

    /// Run it as this user, by name or number [default: root]
    #[arg(short, long, value_name = "USER")]
    user: Option<String>,

    /// Run it in this directory [default: the VM's -w, or the user's home]
    #[arg(short = 'w', long, value_name = "DIR")]
    directory: Option<String>,

    /// Set this in its environment
    #[arg(short, long = "env", value_name = "NAME=VALUE", value_parser = variable)]
    environment: Vec<(String, String)>,

    /// The VM, or for one without the daemon its vsock: what its --vsock names
    vm: String,

    /// The program and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

fn variable(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.into(), value.into())),
        _ => Err("give it as NAME=VALUE".into()),
    }
}

/// The size of a terminal that does not say it.
pub const UNKNOWN: Size = Size { columns: 80, rows: 24 };

/// The size of the terminal that standard output is.
pub fn size() -> Option<Size> {
    let size = rustix::termios::tcgetwinsize(rustix::stdio::stdout()).ok()?;
    Some(Size {
        columns: size.ws_col,
        rows: size.ws_row,
    })
}

/// Runs the command.
pub fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let Arguments { vm, .. } = arguments;
    let Guest {
        client,
        mut environment,
        directory,
    } = match is_socket(vm) {
        true => Guest {
            client: Client::connect(Path::new(vm), PATIENCE)?,
            environment: Vec::new(),
            directory: None,
        },
        false => host::guest(vm)?,
    };
    environment.extend(arguments.environment.iter().cloned());
    let exec = Exec {
        command: arguments.command.clone(),
        environment,
        directory: arguments.directory.clone().or(directory),
        user: arguments.user.clone(),
        terminal: arguments.terminal.then(|| size().unwrap_or(UNKNOWN)),
        input: arguments.interactive,
    };
    perform(client, &exec)
}

/// The agent of a VM, and what programs have there if nobody says otherwise.
pub struct Guest {
    /// The agent.
    pub client: Client,
    /// Environment.
    pub environment: Vec<(String, String)>,
    /// Where they begin.
    pub directory: Option<String>,
}

/// Whether a word is the path of a VM's socket: it has a slash, or a socket is there. VMs of the daemon have names.
pub fn is_socket(word: &str) -> bool {
    word.contains('/')
        || Path::new(word)
            .symlink_metadata()
            .is_ok_and(|found| found.file_type().is_socket())
}

/// Runs a program in a guest with this process's input and output, and ends as it does.
pub fn perform(client: Client, exec: &Exec) -> anyhow::Result<ExitCode> {
    // From here on signals wait until there is a program to have them.
    let (give, take) = mpsc::channel::<Input>();
    let terminal = exec.terminal.is_some();
    let mut program = None;
    signals::follow(&[&signals::SIGNALS[..], &[libc::SIGWINCH]].concat(), move |signal| {
        if program.is_none() {
            program = take.try_recv().ok();
        }
        pass_on(program.as_ref(), terminal, signal);
    })?;
    let (input, mut output) = match client.exec(exec) {
        Ok(started) => started,
        Err(Error::Failed { why, message }) => {
            eprintln!("posada: {message}");
            return Ok(ExitCode::from(match why {
                Failure::NotFound => NOT_FOUND,
                Failure::NotPermitted => NOT_RUN,
                Failure::Invalid | Failure::Other => FAILURE,
            }));
        }
        Err(error) => return Err(error.into()),
    };
    let _ = give.send(input.clone());
    let raw = terminal && exec.input && io::stdin().is_terminal();
    let _raw = raw.then(RawMode::enter).transpose()?;
    if exec.input {
        // It ends with the process.
        thread::spawn(move || send(&input));
    }
    let (mut stdout, mut stderr) = (io::stdout(), io::stderr());
    loop {
        let written = match output.next_event()? {
            Event::Output(bytes) => stdout.write_all(&bytes).and_then(|()| stdout.flush()),
            Event::Errors(bytes) => stderr.write_all(&bytes),
            // As every process's, the code keeps its low byte.
            Event::Ended(status) => return Ok(ExitCode::from(status.code() as u8)),
        };
        if let Err(error) = written {
            if error.kind() == io::ErrorKind::BrokenPipe {
                return Ok(ExitCode::from(128 + libc::SIGPIPE as u8));
            }
            return Err(error.into());
        }
    }
}

/// A signal of ours for the program; before that runs, it ends us.
fn pass_on(program: Option<&Input>, terminal: bool, signal: libc::c_int) {
    match (program, signal) {
        (Some(program), libc::SIGWINCH) => {
            if let (true, Some(size)) = (terminal, size()) {
                let _ = program.resize(size);
            }
        }
        (None, libc::SIGWINCH) => {}
        (Some(program), _) if !terminal => {
            let _ = program.signal(signal);
        }
        // What runs on a terminal has its hang-up when we go.
        _ => {
            restore_terminal();
            exit(128 + signal);
        }
    }
}

/// Passes standard input on to its end, or the program's.
fn send(program: &Input) -> Result<(), Error> {
    let mut bytes = [0; 16 << 10];
    loop {
        match io::stdin().read(&mut bytes) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(count) if count > 0 => program.write(&bytes[..count])?,
            _ => return program.close(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        arguments: Arguments,
    }

    #[test]
    fn what_follows_the_program_is_its_own() {
        let words = [
            "exec", "-it", "-e", "A=b=c", "vm.vsock", "ls", "-t", "--user", "--", "x",
        ];
        let arguments = Line::parse_from(words).arguments;
        assert!(arguments.interactive && arguments.terminal && arguments.user.is_none());
        assert_eq!(arguments.environment, [("A".into(), "b=c".into())]);
        assert_eq!(arguments.command, ["ls", "-t", "--user", "--", "x"]);
        assert!(Line::try_parse_from(["exec", "vm.vsock"]).is_err());
        assert!(variable("=x").is_err() && variable("x").is_err());
    }
}
