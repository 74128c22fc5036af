//! How a guest is, as its kernel counts. Rates are left to who compares two of these.

use serde::{Deserialize, Serialize};

/// All of it. Times are in milliseconds, memory in bytes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Statistics {
    /// Since the guest's start.
    pub uptime_ms: u64,
    /// Load averages of 1, 5 and 15 minutes.
    pub load: [f64; 3],
    /// Memory.
    pub memory: Memory,
    /// Time that was lost by waiting, where the kernel counts it.
    pub pressure: Option<Pressure>,
    /// CPUs that are online.
    pub cpus: Vec<CpuTime>,
    /// Some processes, those that have used most CPU time first.
    pub processes: Vec<Process>,
}

/// Memory in bytes: fields of `/proc/meminfo`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// MemTotal.
    pub total: u64,
    /// MemFree.
    pub free: u64,
    /// MemAvailable.
    pub available: u64,
    /// Buffers and Cached.
    pub cached: u64,
    /// SwapTotal.
    pub swap_total: u64,
    /// SwapFree.
    pub swap_free: u64,
}

/// Pressure stall information (the kernel's `Documentation/accounting/psi.rst`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Pressure {
    /// Waiting for a CPU.
    pub cpu: Stall,
    /// Waiting for memory.
    pub memory: Stall,
    /// Waiting for disks.
    pub io: Stall,
}

/// How long processes were held up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Stall {
    /// At least one was.
    pub some: Share,
    /// All that had something to do were.
    pub full: Share,
}

/// A share of time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Share {
    /// Percent of the last 10, 60 and 300 seconds.
    pub percent: [f64; 3],
    /// Since the guest's start, in microseconds.
    pub total_us: u64,
}

/// What a CPU has spent its time with, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuTime {
    /// Its number.
    pub cpu: u32,
    /// In user mode.
    pub user_ms: u64,
    /// In the kernel, interrupts included.
    pub system_ms: u64,
    /// Idle.
    pub idle_ms: u64,
    /// Idle, with disks at work.
    pub iowait_ms: u64,
    /// Taken by the host.
    pub steal_ms: u64,
}

/// A process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its number.
    pub pid: u32,
    /// Its parent's number.
    pub parent: u32,
    /// The program's name, cut by the kernel.
    pub name: String,
    /// As in `/proc/PID/stat`: `R`, `S`, `D` and so on.
    pub state: char,
    /// CPU time in milliseconds.
    pub cpu_ms: u64,
    /// Bytes of memory that are really there.
    pub resident: u64,
    /// Threads.
    pub threads: u32,
}
