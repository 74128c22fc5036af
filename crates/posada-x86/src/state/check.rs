//! Which states a processor could be in: the rest is refused, so that a damaged or hostile snapshot does no more than a guest
//! could do itself (Intel SDM 3A, chapter 2; 3C, 27.3.1).

use crate::core::{Core, seg};
use crate::fault::vector;
use crate::lapic::{self, base_valid};
use crate::msr::portable;
use crate::system::control::{CR0, cr4_bits};
use crate::system::descriptor::{Rights, canonical};
use crate::walk::PHYSICAL_BITS;
use crate::xsave;
use posada_engine::msr::TSC_DEADLINE;
use posada_engine::{Activity, CpuState, PendingException, Segment};

/// CR0.ET.
pub(super) const ALWAYS_IN_CR0: u64 = 1 << 4;
/// EFER: SCE, LME, LMA, NXE.
const EFER: u64 = 0xd01;
/// RFLAGS that exist, and the bit that is always set.
const RFLAGS: u64 = 0x3f_7fd7;
/// A mode of the LVT timer entry: TSC deadline.
const DEADLINE_MODE: u32 = 2;
/// Offset of the LVT timer entry.
const LVT_TIMER: usize = 0x320;

fn bit(value: u64, bit: u32) -> bool {
    value >> bit & 1 != 0
}

/// The text of the first rule that is broken.
fn first_broken(rules: &[(bool, &str)]) -> Result<(), String> {
    match rules.iter().find(|(broken, _)| *broken) {
        Some((_, rule)) => Err((*rule).into()),
        None => Ok(()),
    }
}

impl Core {
    /// Refuses a state that this processor could not be in.
    ///
    /// # Errors
    /// The first thing that does not fit, as a sentence without a full stop.
    pub fn check(&self, state: &CpuState) -> Result<(), String> {
        let model = self.shared.vm().model();
        control(state, cr4_bits(&model.features))?;
        segments(state)?;
        xsave::area::check(&state.xsave, model)?;
        first_broken(&[
            (
                !xsave::xcr0_valid(state.xcr0, model.xcr0()),
                "XCR0 has components that the processor lacks, or lacks some that belong together",
            ),
            (
                state.debug[4..].iter().any(|value| value >> 32 != 0),
                "DR6 and DR7 have 32 bits",
            ),
            (
                !base_valid(state.apic_base),
                "IA32_APIC_BASE has reserved bits or an impossible mode",
            ),
        ])?;
        portable::check(&state.msrs)?;
        if let Some(page) = &state.apic {
            lapic::page::check(state.apic_base, page, self.shared.index())?;
            let deadline = state.msrs.get(&TSC_DEADLINE).is_some_and(|deadline| *deadline != 0);
            if deadline && page.get(LVT_TIMER) >> 17 & 3 != DEADLINE_MODE {
                return Err("TSC_DEADLINE is set while the local APIC's timer is in another mode".into());
            }
        }
        events(state)
    }
}

fn control(state: &CpuState, cr4_bits: u64) -> Result<(), String> {
    let (protected, paging, long) = (bit(state.cr0, 0), bit(state.cr0, 31), bit(state.efer, 10));
    let v86 = bit(state.rflags, 17);
    first_broken(&[
        (state.cr0 & !CR0 != 0, "CR0 has reserved bits set"),
        (paging && !protected, "CR0.PG needs CR0.PE"),
        (bit(state.cr0, 29) && !bit(state.cr0, 30), "CR0.NW needs CR0.CD"),
        (state.cr3 >> PHYSICAL_BITS != 0, "CR3 is beyond physical memory"),
        (state.cr4 & !cr4_bits != 0, "CR4 has bits set that the processor lacks"),
        (state.efer & !EFER != 0, "EFER has reserved bits set"),
        (
            long != (paging && bit(state.efer, 8)),
            "EFER.LMA is EFER.LME and CR0.PG",
        ),
        (long && !bit(state.cr4, 5), "long mode needs CR4.PAE"),
        (bit(state.cr4, 17) && !long, "CR4.PCIDE needs long mode"),
        (state.rflags & !RFLAGS != 0, "RFLAGS has reserved bits set"),
        (v86 && long, "there is no virtual-8086 mode in long mode"),
        (v86 && !protected, "virtual-8086 mode needs CR0.PE"),
        (!long && state.rip >> 32 != 0, "RIP has 32 bits outside long mode"),
        (long && !canonical(state.rip), "RIP is not canonical"),
    ])
}

fn segments(state: &CpuState) -> Result<(), String> {
    const NAMES: [&str; 6] = ["ES", "CS", "SS", "DS", "FS", "GS"];
    let long = bit(state.efer, 10);
    let protected = bit(state.cr0, 0) && !bit(state.rflags, 17);
    for (number, (segment, name)) in state.segments.iter().zip(NAMES).enumerate() {
        hidden_part(segment, name)?;
        let far = number < seg::FS && segment.present() && segment.base >> 32 != 0;
        let system = segment.present() && segment.system().is_some();
        if far || system {
            let why = if far {
                "has a base above 4 GiB"
            } else {
                "is not a segment of code or data"
            };
            return Err(format!("{name} {why}"));
        }
    }
    hidden_part(&state.ldtr, "LDTR")?;
    hidden_part(&state.tr, "TR")?;
    let (code, stack) = (&state.segments[seg::CS], &state.segments[seg::SS]);
    // Just after CR0.PE was set, CS may still be what a far jump in real mode left: data.
    let data = code.data() && code.writable() && code.dpl() == 0;
    let privileges = if code.conforming() {
        code.dpl() <= stack.dpl()
    } else {
        code.dpl() == stack.dpl()
    };
    let task = state.tr.system().is_some_and(|kind| kind == 11 || kind == 3 && !long);
    let tables = [state.gdtr.base, state.idtr.base];
    first_broken(&[
        (long && code.long() && code.big(), "CS.L and CS.D exclude each other"),
        (protected && !code.present(), "CS is not present"),
        (protected && !code.code() && !data, "CS is not a code segment"),
        (
            protected && !data && !privileges,
            "CS and SS have different privilege levels",
        ),
        (!state.tr.present() || !task, "TR is not a busy task state segment"),
        (
            state.ldtr.present() && state.ldtr.system() != Some(2),
            "LDTR is not a local descriptor table",
        ),
        (
            !tables.into_iter().all(canonical),
            "GDTR or IDTR has a base that is not canonical",
        ),
    ])
}

/// Limits have a granularity, bases an end.
fn hidden_part(segment: &Segment, name: &str) -> Result<(), String> {
    let pages = bit(segment.access.into(), 15);
    let limit = if pages {
        segment.limit & 0xfff == 0xfff
    } else {
        segment.limit >> 20 == 0
    };
    let why = if segment.access & 0xf00 != 0 {
        "has reserved access rights"
    } else if segment.present() && !limit {
        "has a limit that its granularity cannot give"
    } else if !canonical(segment.base) {
        "has a base that is not canonical"
    } else {
        return Ok(());
    };
    Err(format!("{name} {why}"))
}

fn events(state: &CpuState) -> Result<(), String> {
    let events = &state.events;
    let pushes = |number| matches!(number, vector::DF | vector::TS..=vector::PF | vector::AC | 21 | 29 | 30);
    let bad = |PendingException { vector: number, error }| {
        number > 31 || number == vector::NMI || error.is_some() && !pushes(number)
    };
    let delivery = events.exception.is_some() || events.interrupt.is_some();
    first_broken(&[
        (
            events.exception.is_some_and(bad),
            "the exception in delivery does not exist, or has no error code",
        ),
        (
            events.interrupt.is_some_and(|vector| vector < 16),
            "the interrupt in delivery has a vector below 16",
        ),
        (
            delivery && state.activity == Activity::WaitingForStartup,
            "a processor that waits for its start has nothing in delivery",
        ),
    ])
}
