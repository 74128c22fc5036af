//! `posada ls` and `posada inspect`.

use super::connect::{api, has_store, part, print};
use super::make::look;
use crate::size;
use anyhow::{Context, anyhow};
use clap::Args;
use posada_host::name::nearest;
use posada_host::spec::Boot;
use posada_host::store;
use posada_host::vm::View;
use std::process::ExitCode;

/// Columns of `ls`, by which `--format` names them, too.
const FIELDS: [&str; 12] = [
    "id", "name", "state", "message", "pid", "cpus", "memory", "created", "started", "restarts", "exit", "boot",
];

/// List VMs
#[derive(Args)]
pub struct LsArguments {
    /// Only those in one of these states: created, starting, running, paused, stopping, restarting, stopped, failed, broken
    #[arg(long, value_name = "STATE", value_delimiter = ',')]
    state: Vec<String>,

    /// Only those in whose names this stands
    #[arg(long, value_name = "TEXT")]
    name: Option<String>,

    /// Only those with this label
    #[arg(short, long, value_name = "KEY[=VALUE]")]
    label: Option<String>,

    /// Print JSON
    #[arg(long, conflicts_with_all = ["format", "quiet"])]
    json: bool,

    /// Print a line like this for each, as in '{name} {state}': id, name, state, message, pid, cpus, memory, created, started,
    /// restarts, exit, boot
    #[arg(long, value_name = "TEMPLATE", conflicts_with = "quiet")]
    format: Option<String>,

    /// Print names only
    #[arg(short, long)]
    quiet: bool,
}

/// Say all about VMs, as JSON
#[derive(Args)]
pub struct InspectArguments {
    /// Names, ids, or beginnings of ids
    #[arg(required = true, value_name = "VM")]
    vms: Vec<String>,
}

/// A piece of a template.
enum Piece {
    Text(String),
    Field(&'static str),
}

fn template(text: &str) -> anyhow::Result<Vec<Piece>> {
    let mut pieces = Vec::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('{') {
        pieces.push(Piece::Text(before.into()));
        let (word, after) = after
            .split_once('}')
            .ok_or_else(|| anyhow!("{text:?} has a {{ without its }}"))?;
        let field = FIELDS.into_iter().find(|field| *field == word).ok_or_else(|| {
            let hint = match nearest(word, FIELDS.into_iter()) {
                Some(near) => format!("did you mean {{{near}}}?"),
                None => format!("there are {}", FIELDS.join(", ")),
            };
            anyhow!("there is no field {{{word}}}; {hint}")
        })?;
        pieces.push(Piece::Field(field));
        rest = after;
    }
    pieces.push(Piece::Text(rest.into()));
    Ok(pieces)
}

/// A field, for people.
fn field(view: &View, field: &str) -> String {
    let text = |value: Option<String>| value.unwrap_or_else(|| "-".into());
    let spec = view.spec.as_ref();
    match field {
        "id" => view.id.clone(),
        "name" => view.name.clone(),
        "state" => view.state.name().into(),
        "message" => text(view.message.clone()),
        "pid" => text(view.pid.map(|pid| pid.to_string())),
        "cpus" => text(spec.map(|spec| spec.cpus.to_string())),
        "memory" => text(spec.map(|spec| size::of(spec.memory))),
        "created" => text(Some(view.created).filter(|time| *time > 0).map(ago)),
        "started" => text(view.started.map(ago)),
        "restarts" => view.restarts.to_string(),
        "exit" => text(view.exit.as_ref().map(|exit| exit.code.to_string())),
        _ => text(spec.map(|spec| match &spec.boot {
            Boot::Kernel { kernel, .. } => kernel.display().to_string(),
            Boot::Snapshot { place } => place.display().to_string(),
        })),
    }
}

/// A time in milliseconds since 1970, as how long ago it was.
fn ago(time: u64) -> String {
    let seconds = store::now().saturating_sub(time) / 1000;
    let (count, unit) = match seconds {
        0..60 => (seconds, "second"),
        60..3600 => (seconds / 60, "minute"),
        3600..86400 => (seconds / 3600, "hour"),
        _ => (seconds / 86400, "day"),
    };
    format!("{count} {unit}{} ago", if count == 1 { "" } else { "s" })
}

/// Runs `posada ls`.
pub fn ls(arguments: &LsArguments) -> anyhow::Result<ExitCode> {
    let pieces = arguments.format.as_deref().map(template).transpose()?;
    let mut query = Vec::new();
    if !arguments.state.is_empty() {
        query.push(format!("state={}", part(&arguments.state.join(","))));
    }
    query.extend(arguments.name.iter().map(|name| format!("name={}", part(name))));
    query.extend(arguments.label.iter().map(|label| format!("label={}", part(label))));
    // Whoever has never had a VM needs no daemon to learn that.
    let views: Vec<View> = match has_store()? || !query.is_empty() {
        true => api()?.get(&format!("/v1/vms?{}", query.join("&")))?,
        false => Vec::new(),
    };
    let mut text = String::new();
    if arguments.json {
        text = serde_json::to_string_pretty(&views)? + "\n";
    } else if let Some(pieces) = pieces {
        for view in &views {
            for piece in &pieces {
                match piece {
                    Piece::Text(piece) => text += piece,
                    Piece::Field(name) => text += &field(view, name),
                }
            }
            text.push('\n');
        }
    } else if arguments.quiet {
        views.iter().for_each(|view| text += &format!("{}\n", view.name));
    } else {
        const COLUMNS: [&str; 7] = ["id", "name", "state", "cpus", "memory", "started", "message"];
        let rows = views.iter().map(|view| COLUMNS.map(|column| field(view, column)));
        text = table(&COLUMNS.map(str::to_uppercase), rows.collect());
    }
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}

/// Rows under a head, in columns as wide as they must be.
pub fn table<const N: usize>(head: &[String; N], rows: Vec<[String; N]>) -> String {
    let mut text = String::new();
    let width = |column: usize| {
        rows.iter()
            .map(|row| row[column].len())
            .chain([head[column].len()])
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..N).map(width).collect();
    for row in [head].into_iter().chain(&rows) {
        let cells: Vec<String> = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:<width$}"))
            .collect();
        text += cells.join("  ").trim_end();
        text.push('\n');
    }
    text
}

/// Runs `posada inspect`.
pub fn inspect(arguments: &InspectArguments) -> anyhow::Result<ExitCode> {
    let api = api()?;
    let look = |vm: &String| look(&api, vm).with_context(|| format!("cannot inspect {vm}"));
    let views = arguments.vms.iter().map(look).collect::<anyhow::Result<Vec<View>>>()?;
    print(&(serde_json::to_string_pretty(&views)? + "\n"))?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_s_mistakes_are_told() {
        assert_eq!(template("{name}: {state}").unwrap().len(), 5);
        let said = |text| template(text).err().unwrap().to_string();
        assert!(said("{nam}").contains("did you mean {name}?"));
        assert!(said("{name").contains("without"));
    }

    #[test]
    fn columns_are_as_wide_as_they_must_be() {
        let head = ["A", "B"].map(String::from);
        let rows = vec![["long", "x"].map(String::from), ["s", ""].map(String::from)];
        assert_eq!(table(&head, rows), "A     B\nlong  x\ns\n");
    }
}
