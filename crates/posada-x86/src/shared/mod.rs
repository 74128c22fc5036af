//! What the vCPUs of a VM share with each other and with other threads: mailboxes, alarms, the VM's clock.

mod alarm;
pub(crate) mod mailbox;
mod vm_clock;

pub use mailbox::Mailbox;
pub use vm_clock::VmClock;

use crate::clock::{self, Rate};
use alarm::Alarms;
use posada_engine::clock::{Moment, real_time_ns};
use posada_engine::cpu::CpuModel;
use posada_memory::{CodeListener, GuestRam};
use std::io;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};

/// One VM's processors, for whoever sends them something.
#[derive(Debug)]
pub struct Vm {
    mailboxes: Arc<[Arc<Mailbox>]>,
    model: CpuModel,
    alarms: OnceLock<Alarms>,
    rate: Rate,
    clock: Mutex<VmClock>,
    /// How often the clock was set.
    clock_settings: AtomicU64,
    /// What the processors' counters were behind the host's TSC (at the guest's rate) when the VM was made: they started at 0.
    tsc_offset: u64,
    /// Announcements of code so far.
    announcements: AtomicU64,
    /// Who is next in lowest-priority arbitration.
    turn: AtomicU32,
}

impl Vm {
    /// A VM with the processors of `model`; its clock starts now.
    pub fn new(model: CpuModel) -> Arc<Self> {
        let rate = Rate::new(model.tsc_khz);
        let host_tsc = rate.guest(clock::host_tsc());
        Arc::new(Self {
            mailboxes: (0..model.cpus).map(|_| Arc::default()).collect(),
            model,
            alarms: OnceLock::new(),
            rate,
            clock: Mutex::new(VmClock::new(rate.khz(), 0, host_tsc)),
            clock_settings: AtomicU64::new(0),
            tsc_offset: host_tsc.wrapping_neg(),
            announcements: AtomicU64::new(0),
            turn: AtomicU32::new(0),
        })
    }

    /// A VM of `cpus` processors that can do all that this engine can.
    pub fn with_cpus(cpus: u32) -> Arc<Self> {
        let model = CpuModel::new(&crate::cpuid::offer(), cpus, None);
        Self::new(model.expect("only a baseline can lack something"))
    }

    /// Starts the alarms now, for a caller who can report that the host refuses.
    ///
    /// # Errors
    /// When the host is out of descriptors or threads.
    pub fn start_alarms(&self) -> io::Result<()> {
        if self.alarms.get().is_none() {
            let alarms = Alarms::new(Arc::clone(&self.mailboxes))?;
            // Another caller's are as good.
            let _ = self.alarms.set(alarms);
        }
        Ok(())
    }

    /// The vCPUs, by index.
    pub fn vcpus(&self) -> &[Arc<Mailbox>] {
        &self.mailboxes
    }

    /// What CPUID shows.
    pub fn model(&self) -> &CpuModel {
        &self.model
    }

    /// How fast the processors' time stamp counters run.
    pub fn rate(&self) -> Rate {
        self.rate
    }

    /// What to add to the host's TSC (at the guest's rate) for counters that started at 0 with the VM.
    pub fn tsc_offset(&self) -> u64 {
        self.tsc_offset
    }

    fn locked_clock(&self) -> MutexGuard<'_, VmClock> {
        self.clock.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The VM's clock.
    pub fn clock(&self) -> VmClock {
        *self.locked_clock()
    }

    /// This moment on the VM's clock and the host's.
    pub fn moment(&self) -> Moment {
        let host_tsc = self.rate.guest(clock::host_tsc());
        Moment {
            vm_ns: self.clock().ns(host_tsc),
            real_ns: real_time_ns(),
            host_tsc,
        }
    }

    /// Sets the VM's clock to `ns` nanoseconds at the host's TSC `host_tsc` (at the guest's rate). Its processors tell the
    /// guest when they next run.
    pub fn set_clock(&self, ns: u64, host_tsc: u64) {
        *self.locked_clock() = VmClock::new(self.rate.khz(), ns, host_tsc);
        self.clock_settings.fetch_add(1, Ordering::Release);
    }

    /// Lets its processors, which translate the code in `ram`, look for changes of it whenever there are some.
    pub fn watch_code(self: &Arc<Self>, ram: &GuestRam) {
        let this: Weak<Self> = Arc::downgrade(self);
        ram.code().listen(this);
    }

    /// How often the clock was set.
    pub(crate) fn clock_settings(&self) -> u64 {
        self.clock_settings.load(Ordering::Acquire)
    }

    /// What vCPU `index` holds of the VM.
    ///
    /// # Panics
    /// If there is no such vCPU.
    pub fn shared(self: &Arc<Self>, index: u32) -> Shared {
        Shared {
            mailbox: Arc::clone(&self.mailboxes[index as usize]),
            vm: Arc::clone(self),
            index,
            announced: AtomicU64::new(0),
        }
    }

    /// A number that goes round: `0..of`.
    pub(crate) fn turn(&self, of: usize) -> usize {
        self.turn.fetch_add(1, Ordering::Relaxed) as usize % of
    }
}

/// Translated code looks at nothing but events: a loop of it would not see that it is no longer the guest's.
impl CodeListener for Vm {
    fn code_changed(&self) {
        self.mailboxes.iter().for_each(|mailbox| mailbox.post(mailbox::CHANGED));
    }
}

/// A vCPU's own end: its mailbox and its VM.
#[derive(Debug)]
pub struct Shared {
    mailbox: Arc<Mailbox>,
    vm: Arc<Vm>,
    index: u32,
    /// The VM's announcement count when this vCPU last marked code; 0 once all others have answered.
    announced: AtomicU64,
}

impl Default for Shared {
    /// The only vCPU of a VM.
    fn default() -> Self {
        Vm::with_cpus(1).shared(0)
    }
}

impl Shared {
    /// True when [`crate::core::Core::service`] has something to do.
    #[inline(always)]
    pub fn pending(&self) -> bool {
        self.mailbox.pending()
    }

    /// The vCPU's number, which is its APIC id.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// The VM.
    pub fn vm(&self) -> &Arc<Vm> {
        &self.vm
    }

    /// This vCPU's mailbox.
    pub fn mailbox(&self) -> &Arc<Mailbox> {
        &self.mailbox
    }

    /// All vCPUs of the VM, by index.
    pub fn vcpus(&self) -> &[Arc<Mailbox>] {
        self.vm.vcpus()
    }

    /// Nanoseconds from the Unix epoch to the VM's start, by the host's clock as it stands now.
    pub fn boot_time_ns(&self) -> u64 {
        let now = self.vm.moment();
        now.real_ns.saturating_sub(now.vm_ns)
    }

    /// Sets or clears this vCPU's alarm: `delay` in nanoseconds.
    ///
    /// # Panics
    /// If the host refuses what [`Vm::start_alarms`] would have asked for.
    pub(crate) fn set_alarm(&self, delay: Option<u64>) {
        let alarms = self.vm.alarms.get_or_init(|| {
            Alarms::new(Arc::clone(&self.vm.mailboxes)).expect("the host has a thread and a few descriptors left")
        });
        alarms.set(self.index, delay);
    }

    /// Tells all other vCPUs that a page has got its first code: their soft TLBs may let stores to it go past the code map.
    /// This one's forbids them already.
    ///
    /// Nobody keeps lists. A vCPU that takes notice ([`crate::core::Core::service`]) forbids its own direct stores to every
    /// page that holds code by then, and invalidates those pages, as it may have written to them. The mark was set before
    /// the announcement and is looked at after it, so the page is among them, unless somebody unmarked it meanwhile; then
    /// whoever marks it next announces it again.
    pub fn announce_code(&self) {
        if self.vm.mailboxes.len() == 1 {
            return;
        }
        let count = self.vm.announcements.fetch_add(1, Ordering::AcqRel) + 1;
        self.announced.store(count, Ordering::Relaxed);
        // This vCPU knows of its own. If it has not heard of an earlier one, it answers both when it does.
        if self.mailbox.answered() == count - 1 {
            self.mailbox.answer(count);
        }
        for (index, mailbox) in self.vm.mailboxes.iter().enumerate() {
            if index != self.index as usize {
                mailbox.post(mailbox::CODE);
            }
        }
    }

    /// After a mark in a page that another vCPU has announced: not all others need have taken notice yet.
    pub fn heed_announcements(&self) {
        if self.vm.mailboxes.len() > 1 {
            self.announced.store(self.announcements(), Ordering::Relaxed);
        }
    }

    /// The VM's announcements so far: what a vCPU has answered that looks at the code map from now on.
    pub(crate) fn announcements(&self) -> u64 {
        self.vm.announcements.load(Ordering::Acquire)
    }

    /// True if all other vCPUs have taken notice of the code that this one has marked, or will before they run guest code.
    pub(crate) fn settled(&self) -> bool {
        let announced = self.announced.load(Ordering::Relaxed);
        if announced == 0 {
            return true;
        }
        let settled = |(index, mailbox): (usize, &Arc<Mailbox>)| {
            // At rest: our CODE bit is in the word that the vCPU must take before it runs on.
            index == self.index as usize || mailbox.answered() >= announced || mailbox.at_rest()
        };
        let all = self.vm.mailboxes.iter().enumerate().all(settled);
        if all {
            self.announced.store(0, Ordering::Relaxed);
        }
        all
    }
}
