//! Stolen time: how long the host kept this vCPU from running although it would have, and whether it keeps it now (Linux,
//! Documentation/virt/kvm/x86/msr.rst).

use crate::clock;
use crate::core::Core;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::thread::ThreadId;

/// MSR_KVM_STEAL_TIME: the structure is in use.
const ENABLED: u64 = 1;
/// Bits of the MSR that are not of the address.
const LOW: u64 = 0x3f;
/// Bits of the MSR that must be zero.
pub(crate) const RESERVED: u64 = LOW & !ENABLED;
/// Bytes of kvm_steal_time.
const BYTES: u64 = 64;
/// Offsets in kvm_steal_time.
const STEAL: u64 = 0;
const VERSION: u64 = 8;
const PREEMPTED: u64 = 16;
/// Nanoseconds between two looks at what was stolen: a small part of what a guest's scheduler calls long.
const PERIOD: u64 = 4_000_000;

/// What a vCPU knows of the time that its thread waited.
#[derive(Debug, Default)]
pub struct Steal {
    waited: Option<Waited>,
    /// Host TSC before which nobody looks again.
    next: u64,
}

impl Steal {
    /// The guest's structure may be another: look at once.
    pub(crate) fn renew(&mut self) {
        self.next = 0;
    }
}

/// How long a thread has waited for a processor, as its scheduler counts it.
#[derive(Debug)]
struct Waited {
    thread: ThreadId,
    file: File,
    last: u64,
}

impl Waited {
    /// For the calling thread, from now on. `None`: its kernel does not count.
    fn start() -> Option<Self> {
        let file = File::open("/proc/thread-self/schedstat").ok()?;
        let last = read(&file)?;
        Some(Self {
            thread: std::thread::current().id(),
            file,
            last,
        })
    }

    /// Nanoseconds since the last call.
    fn more(&mut self) -> u64 {
        let now = read(&self.file).unwrap_or(self.last);
        now.saturating_sub(std::mem::replace(&mut self.last, now))
    }
}

/// The second number of schedstat: nanoseconds of waiting (Linux, Documentation/scheduler/sched-stats.rst).
fn read(file: &File) -> Option<u64> {
    let mut text = [0; 96];
    let length = file.read_at(&mut text, 0).ok()?;
    let text = std::str::from_utf8(&text[..length]).ok()?;
    text.split_ascii_whitespace().nth(1)?.parse().ok()
}

impl Core {
    /// WRMSR of MSR_KVM_STEAL_TIME, without [`RESERVED`] bits. What was stolen before means nothing to the guest.
    pub(crate) fn write_steal_time(&mut self, value: u64) {
        self.msr.steal_time = value;
        if value & ENABLED != 0 {
            self.steal.waited = Waited::start();
        }
        self.steal.renew();
    }

    /// Where the structure lies, if it is in use.
    fn steal_time(&self) -> Option<u64> {
        let at = self.msr.steal_time & !LOW;
        (self.msr.steal_time & ENABLED != 0 && self.ram.contains(at, BYTES)).then_some(at)
    }

    /// Tells the guest what was stolen since the last time, if that is a while ago; on the vCPU's thread, at host TSC `now`.
    #[inline]
    pub(crate) fn tell_stolen_time(&mut self, now: u64) {
        if self.msr.steal_time & ENABLED != 0 && now >= self.steal.next {
            self.tell_stolen_time_now(now);
        }
    }

    #[cold]
    fn tell_stolen_time_now(&mut self, now: u64) {
        self.steal.next = now.saturating_add(clock::ns_to_ticks(PERIOD));
        let Some(at) = self.steal_time() else {
            return;
        };
        let current = std::thread::current().id();
        // Another thread's waiting before it came here is not this vCPU's.
        let more = match &mut self.steal.waited {
            Some(waited) if waited.thread == current => waited.more(),
            waited => {
                *waited = Waited::start();
                0
            }
        };
        let (mut steal, mut version) = ([0; 8], [0; 4]);
        self.physical_read(at + STEAL, &mut steal);
        self.physical_read(at + VERSION, &mut version);
        let odd = u32::from_le_bytes(version) | 1;
        self.physical_write(at + VERSION, &odd.to_le_bytes());
        let steal = u64::from_le_bytes(steal).wrapping_add(more);
        self.physical_write(at + STEAL, &steal.to_le_bytes());
        self.physical_write(at + PREEMPTED, &[0]);
        self.physical_write(at + VERSION, &odd.wrapping_add(1).to_le_bytes());
    }

    /// Tells the other vCPUs whether this one leaves the processor: they need not spin for what it holds.
    pub(crate) fn set_preempted(&mut self, preempted: bool) {
        if let Some(at) = self.steal_time() {
            self.physical_write(at + PREEMPTED, &[preempted.into()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lapic::testing::lone;
    use crate::shared::mailbox::KICK;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    const AT: u64 = 0x9000;

    fn word(core: &mut Core, offset: u64) -> u64 {
        let mut bytes = [0; 8];
        core.physical_read(AT + offset, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    #[test]
    fn a_thread_that_waits_for_its_processor_loses_time_and_the_guest_is_told() {
        let mut core = lone();
        core.write_steal_time(AT | ENABLED);
        let now = clock::host_tsc();
        core.tell_stolen_time(now);
        assert_eq!((word(&mut core, STEAL), word(&mut core, VERSION)), (0, 2));
        // More busy threads than processors: all of them have to wait.
        let stop = Arc::new(AtomicBool::new(false));
        let count = std::thread::available_parallelism().unwrap().get() * 2;
        let others: Vec<_> = (0..count)
            .map(|_| {
                let stop = Arc::clone(&stop);
                std::thread::spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        std::hint::spin_loop();
                    }
                })
            })
            .collect();
        let end = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while word(&mut core, STEAL) == 0 && std::time::Instant::now() < end {
            core.tell_stolen_time(clock::host_tsc());
        }
        stop.store(true, Ordering::Relaxed);
        others.into_iter().for_each(|other| other.join().unwrap());
        let stolen = word(&mut core, STEAL);
        assert!(stolen > 0 && stolen < 30_000_000_000, "{stolen} ns");
        assert_eq!(word(&mut core, VERSION) & 1, 0);
    }

    #[test]
    fn the_guest_is_told_once_in_a_while() {
        let mut core = lone();
        core.write_steal_time(AT | ENABLED);
        let now = clock::host_tsc();
        core.tell_stolen_time(now);
        core.tell_stolen_time(now + 1);
        assert_eq!(word(&mut core, VERSION), 2);
        core.tell_stolen_time(now + clock::ns_to_ticks(PERIOD));
        assert_eq!(word(&mut core, VERSION), 4);
    }

    #[test]
    fn a_vcpu_that_sleeps_is_preempted() {
        let mut core = lone();
        core.write_steal_time(AT | ENABLED);
        core.halted = true;
        let (mailbox, ram) = (Arc::clone(core.shared.mailbox()), Arc::clone(&core.ram));
        let other = std::thread::spawn(move || {
            while !mailbox.at_rest() {
                std::thread::yield_now();
            }
            let host = ram.host(AT + PREEMPTED, 1).unwrap();
            // SAFETY: a byte of guest RAM.
            let preempted = unsafe { host.read_volatile() };
            mailbox.post(KICK);
            preempted
        });
        assert_eq!(core.service(), Some(posada_engine::Exit::Kicked));
        assert_eq!((other.join().unwrap(), word(&mut core, PREEMPTED)), (1, 0));
    }

    #[test]
    fn nothing_is_told_outside_ram_or_when_off() {
        let mut core = lone();
        for value in [AT, (1 << 20) | ENABLED, !LOW | ENABLED] {
            core.write_steal_time(value);
            core.tell_stolen_time(clock::host_tsc());
            core.set_preempted(true);
        }
        assert_eq!((word(&mut core, VERSION), word(&mut core, PREEMPTED)), (0, 0));
    }
}
