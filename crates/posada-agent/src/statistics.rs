//! How the guest is, out of `/proc`.

use crate::session::Refusal;
use crate::system::System;
use posada_protocol::Answer;
use posada_protocol::statistics::{CpuTime, Memory, Pressure, Process, Share, Stall, Statistics};
use std::fs;

/// The most processes that an answer has room for.
const MOST: usize = 1000;
/// Milliseconds of a clock tick as `/proc` counts: USER_HZ is 100 on x86-64.
const TICK_MS: u64 = 10;

/// Takes all of it, with `processes` that use most.
pub fn take(system: &System, processes: u32) -> Result<Answer, Refusal> {
    let pressure = |what: &str| {
        system
            .read(&format!("/proc/pressure/{what}"))
            .ok()
            .as_deref()
            .map(stall)
    };
    let all = [pressure("cpu"), pressure("memory"), pressure("io")];
    let statistics = Statistics {
        uptime_ms: (number::<f64>(&system.read("/proc/uptime")?, 0) * 1000.0) as u64,
        load: {
            let text = system.read("/proc/loadavg")?;
            [0, 1, 2].map(|at| number(&text, at))
        },
        memory: memory(&system.read("/proc/meminfo")?),
        pressure: match all {
            [Some(cpu), Some(memory), Some(io)] => Some(Pressure { cpu, memory, io }),
            _ => None,
        },
        cpus: cpus(&system.read("/proc/stat")?),
        processes: top(all_processes(system)?, (processes as usize).min(MOST)),
    };
    Ok(Answer::Statistics(Box::new(statistics)))
}

/// The word at this place as a number; the kernel writes numbers there.
fn number<N: std::str::FromStr + Default>(text: &str, at: usize) -> N {
    let word = text.split_whitespace().nth(at).and_then(|word| word.parse().ok());
    word.unwrap_or_default()
}

fn memory(meminfo: &str) -> Memory {
    let field = |name: &str| {
        let line = meminfo
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        number::<u64>(line.unwrap_or_default(), 0) << 10
    };
    Memory {
        total: field("MemTotal"),
        free: field("MemFree"),
        available: field("MemAvailable"),
        cached: field("Buffers") + field("Cached"),
        swap_total: field("SwapTotal"),
        swap_free: field("SwapFree"),
    }
}

fn stall(text: &str) -> Stall {
    let share = |name: &str| {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .unwrap_or_default();
        let field = |name: &str| {
            line.split(' ')
                .find_map(|word| word.strip_prefix(name))
                .unwrap_or_default()
        };
        Share {
            percent: ["avg10=", "avg60=", "avg300="].map(|name| number(field(name), 0)),
            total_us: number(field("total="), 0),
        }
    };
    Stall {
        some: share("some "),
        full: share("full "),
    }
}

fn cpus(stat: &str) -> Vec<CpuTime> {
    let lines = stat.lines().filter_map(|line| line.strip_prefix("cpu"));
    lines
        .filter(|line| line.starts_with(|first: char| first.is_ascii_digit()))
        .map(|line| {
            let ms = |at| number::<u64>(line, at) * TICK_MS;
            // CPU, user, nice, system, idle, iowait, irq, softirq, steal.
            CpuTime {
                cpu: number(line, 0),
                user_ms: ms(1) + ms(2),
                system_ms: ms(3) + ms(6) + ms(7),
                idle_ms: ms(4),
                iowait_ms: ms(5),
                steal_ms: ms(8),
            }
        })
        .collect()
}

fn all_processes(system: &System) -> Result<Vec<Process>, Refusal> {
    let folder = system.path("/proc");
    let entries = fs::read_dir(&folder).map_err(|error| Refusal::of("cannot read /proc", &error))?;
    let mut processes = Vec::new();
    for entry in entries.flatten() {
        if entry.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit)
            // It may have ended meanwhile.
            && let Ok(bytes) = fs::read(entry.path().join("stat"))
        {
            processes.extend(process(&String::from_utf8_lossy(&bytes)));
        }
    }
    Ok(processes)
}

/// A process by its line (proc_pid_stat(5)). Its name may have anything in it, also parentheses.
fn process(stat: &str) -> Option<Process> {
    let (pid, rest) = stat.split_once(" (")?;
    let (name, rest) = rest.rsplit_once(") ")?;
    Some(Process {
        pid: pid.parse().ok()?,
        parent: number(rest, 1),
        name: name.chars().filter(|char| !char.is_control()).collect(),
        state: rest.chars().next()?,
        cpu_ms: (number::<u64>(rest, 11) + number::<u64>(rest, 12)) * TICK_MS,
        threads: number(rest, 17),
        resident: number::<u64>(rest, 21) * rustix::param::page_size() as u64,
    })
}

/// Those `count` that have used most CPU time, and then of the others those that are among the `count` with most memory.
fn top(mut processes: Vec<Process>, count: usize) -> Vec<Process> {
    processes.sort_by_key(|process| std::cmp::Reverse((process.cpu_ms, process.resident)));
    let mut rest = processes.split_off(count.min(processes.len()));
    let mut resident: Vec<u64> = processes.iter().chain(&rest).map(|process| process.resident).collect();
    resident.sort_unstable_by(|one, other| other.cmp(one));
    if let Some(least) = count.checked_sub(1).and_then(|last| resident.get(last)) {
        rest.sort_by_key(|process| std::cmp::Reverse(process.resident));
        rest.retain(|process| process.resident >= *least);
        rest.truncate(count);
        processes.append(&mut rest);
    }
    processes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_figures_are_read() {
        let text = "MemTotal:        2048 kB\nMemFree:  1 kB\nMemAvailable: 3 kB\nBuffers: 4 kB\nCached: 5 kB\n\
                    SwapCached: 99 kB\nSwapTotal: 0 kB\n";
        let expected = Memory {
            total: 2 << 20,
            free: 1 << 10,
            available: 3 << 10,
            cached: 9 << 10,
            swap_total: 0,
            swap_free: 0,
        };
        assert_eq!(memory(text), expected);
        let text =
            "some avg10=1.50 avg60=0.25 avg300=0.01 total=12345\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=7\n";
        let stall = stall(text);
        assert_eq!((stall.some.percent, stall.some.total_us), ([1.5, 0.25, 0.01], 12345));
        assert_eq!(stall.full.total_us, 7);
        let text = "cpu  9 9 9 9 9 9 9 9 9 9\ncpu0 1 2 3 4 5 6 7 8 0 0\ncpu3 1 0 0 0 0 0 0 0 0 0\nintr 5\n";
        let cpus = cpus(text);
        let first = (
            cpus[0].user_ms,
            cpus[0].system_ms,
            cpus[0].idle_ms,
            cpus[0].iowait_ms,
            cpus[0].steal_ms,
        );
        assert_eq!(first, (30, 160, 40, 50, 80));
        assert_eq!((cpus.len(), cpus[1].cpu), (2, 3));
    }

    #[test]
    fn a_processs_name_cannot_lead_astray() {
        let stat =
            "42 (a) R (b\n) S 7 42 42 0 -1 4194304 100 0 0 0 150 25 0 0 20 0 3 0 100 1000000 77 18446744073709551615";
        let process = process(stat).unwrap();
        assert_eq!(
            (process.pid, process.parent, &*process.name, process.state),
            (42, 7, "a) R (b", 'S')
        );
        assert_eq!((process.cpu_ms, process.threads), (1750, 3));
        assert_eq!(process.resident, 77 * rustix::param::page_size() as u64);
        assert_eq!(super::process("strange"), None);
    }

    #[test]
    fn the_top_has_both_kinds_of_greed() {
        let made = |pid, cpu_ms, resident| Process {
            pid,
            cpu_ms,
            resident,
            ..Process::default()
        };
        let all = vec![
            made(1, 10, 1),
            made(2, 30, 2),
            made(3, 0, 900),
            made(4, 20, 3),
            made(5, 1, 800),
        ];
        let pids = |count| {
            top(all.clone(), count)
                .iter()
                .map(|process| process.pid)
                .collect::<Vec<_>>()
        };
        assert_eq!(pids(2), [2, 4, 3, 5]);
        assert_eq!((pids(0), pids(9)), (vec![], vec![2, 4, 1, 5, 3]));
    }
}
