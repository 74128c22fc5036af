//! `--summary`: what a run has cost, for scripts.

use anyhow::Context;
use posada_engine::Translation;
use posada_vmm::vm::Report;
use serde::Serialize;
use std::path::Path;
use std::time::Duration;

/// The file's content.
#[derive(Debug, Serialize)]
struct Summary<'a> {
    wall_seconds: f64,
    /// Those that were interpreted, where there is a translator.
    guest_instructions: u64,
    /// Unknown where there is a translator.
    #[serde(skip_serializing_if = "Option::is_none")]
    instructions_per_second: Option<f64>,
    /// The most memory the process had at any time.
    peak_resident_bytes: u64,
    /// Guest RAM that the host has really given, at the end.
    touched_guest_bytes: u64,
    reboots: u64,
    exit_reason: &'a str,
    /// What translators have done, if there were any.
    #[serde(skip_serializing_if = "Option::is_none")]
    translation: Option<Translated>,
}

/// The counts of all translators, and what follows from them.
#[derive(Debug, Serialize)]
struct Translated {
    #[serde(flatten)]
    counts: Translation,
    /// Direct branches that were led straight to their target, of all.
    chain_rate: f64,
    nanoseconds_per_instruction: f64,
    /// Lookups in soft TLBs that found an entry, of all; unknown unless they are counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    tlb_hit_rate: Option<f64>,
}

impl Translated {
    fn new(counts: Translation) -> Self {
        let rate = |part: u64, of: u64| part as f64 / of.max(1) as f64;
        Self {
            counts,
            chain_rate: rate(counts.links, counts.branches),
            nanoseconds_per_instruction: rate(counts.nanoseconds, counts.instructions),
            tlb_hit_rate: (counts.tlb_lookups != 0).then(|| 1.0 - rate(counts.tlb_fills, counts.tlb_lookups)),
        }
    }
}

/// Writes the summary of a run.
pub fn write(path: &Path, report: &Report, reason: &str, wall: Duration) -> anyhow::Result<()> {
    let seconds = wall.as_secs_f64();
    let counters = report.counters;
    let translated = counters.translation != Translation::default();
    let translation = translated.then(|| Translated::new(counters.translation));
    let summary = Summary {
        wall_seconds: seconds,
        guest_instructions: counters.instructions,
        instructions_per_second: translation
            .is_none()
            .then(|| counters.instructions as f64 / seconds.max(1e-9)),
        peak_resident_bytes: peak_resident(),
        touched_guest_bytes: report.touched,
        reboots: report.reboots,
        exit_reason: reason,
        translation,
    };
    let text = serde_json::to_string_pretty(&summary).context("the summary")? + "\n";
    std::fs::write(path, text).with_context(|| format!("cannot write the summary to {}", path.display()))
}

/// VmHWM of `/proc/self/status`, in bytes; 0 if the host does not tell.
fn peak_resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok())
        .map_or(0, |kib| kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_process_has_used_memory() {
        assert!(peak_resident() > 64 << 10);
    }
}
