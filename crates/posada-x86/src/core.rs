//! One software CPU: architectural state and the caches that speed it up, owned by its vCPU thread.

use crate::clock::Rate;
use crate::fault::{Exception, Exec, Raised, vector};
use crate::interpret::Cache;
use crate::lapic::Lapic;
use crate::native::Native;
use crate::shared::Shared;
use crate::state::Undelivered;
use crate::system::steal::Steal;
use crate::tlb::Mmu;
use crate::translate::Translator;
use crate::translate::check::{Checker, Copies, Turns};
use crate::translate::frame::Frame;
use posada_engine::{CpuState, DebugControl, DescriptorTable, Machine, Segment};
use posada_memory::GuestRam;
use std::sync::Arc;

/// RFLAGS bits.
pub mod flag {
    #![allow(missing_docs, reason = "the manual's own mnemonics")]
    pub const CF: u64 = 1;
    pub const PF: u64 = 1 << 2;
    pub const AF: u64 = 1 << 4;
    pub const ZF: u64 = 1 << 6;
    pub const SF: u64 = 1 << 7;
    pub const TF: u64 = 1 << 8;
    pub const IF: u64 = 1 << 9;
    pub const DF: u64 = 1 << 10;
    pub const OF: u64 = 1 << 11;
    pub const IOPL: u64 = 3 << 12;
    pub const NT: u64 = 1 << 14;
    pub const RF: u64 = 1 << 16;
    pub const VM: u64 = 1 << 17;
    pub const AC: u64 = 1 << 18;
    pub const VIF: u64 = 1 << 19;
    pub const VIP: u64 = 1 << 20;
    pub const ID: u64 = 1 << 21;
    /// The flags that arithmetic sets.
    pub const ARITHMETIC: u64 = CF | PF | AF | ZF | SF | OF;
}

/// Segment register numbers, the encoding's order.
pub mod seg {
    #![allow(missing_docs, reason = "the manual's own mnemonics")]
    pub const ES: usize = 0;
    pub const CS: usize = 1;
    pub const SS: usize = 2;
    pub const DS: usize = 3;
    pub const FS: usize = 4;
    pub const GS: usize = 5;
}

/// General register numbers, the encoding's order.
pub mod gpr {
    #![allow(missing_docs, reason = "the manual's own mnemonics")]
    pub const RAX: usize = 0;
    pub const RCX: usize = 1;
    pub const RDX: usize = 2;
    pub const RBX: usize = 3;
    pub const RSP: usize = 4;
    pub const RBP: usize = 5;
    pub const RSI: usize = 6;
    pub const RDI: usize = 7;
}

/// How code is decoded: CS.L and CS.D (with real and virtual-8086 mode as 16-bit code).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum CodeSize {
    /// 16-bit default sizes.
    Bits16,
    /// 32-bit default sizes.
    Bits32,
    /// 64-bit mode.
    Bits64,
}

/// MSRs without an effect of their own in an emulator, and those that instructions read directly.
#[derive(Clone, Debug)]
pub struct Msrs {
    /// IA32_EFER.
    pub efer: u64,
    /// IA32_STAR.
    pub star: u64,
    /// IA32_LSTAR.
    pub lstar: u64,
    /// IA32_CSTAR.
    pub cstar: u64,
    /// IA32_FMASK.
    pub fmask: u64,
    /// IA32_KERNEL_GS_BASE.
    pub kernel_gs_base: u64,
    /// IA32_SYSENTER_CS, ESP, EIP.
    pub sysenter: [u64; 3],
    /// IA32_TSC_AUX.
    pub tsc_aux: u64,
    /// IA32_PAT.
    pub pat: u64,
    /// IA32_MTRR_DEF_TYPE.
    pub mtrr_def_type: u64,
    /// Fixed-range MTRRs: 250h, 258h, 259h, 268h-26Fh.
    pub mtrr_fixed: [u64; 11],
    /// Variable-range MTRRs, base and mask in turn from 200h on.
    pub mtrr_variable: [u64; 16],
    /// IA32_MISC_ENABLE.
    pub misc_enable: u64,
    /// IA32_XSS.
    pub xss: u64,
    /// Guest TSC minus host TSC, in ticks.
    pub tsc_offset: u64,
    /// IA32_TSC_ADJUST.
    pub tsc_adjust: u64,
    /// IA32_SPEC_CTRL.
    pub spec_ctrl: u64,
    /// MSR_KVM_WALL_CLOCK_NEW.
    pub wall_clock: u64,
    /// MSR_KVM_SYSTEM_TIME_NEW.
    pub system_time: u64,
    /// MSR_KVM_STEAL_TIME.
    pub steal_time: u64,
    /// MSR_KVM_PV_EOI_EN.
    pub pv_eoi: u64,
}

/// The vector and x87 state as XSAVE sees it.
#[derive(Clone, Debug)]
#[repr(C, align(64))]
pub struct VectorState {
    /// XMM and upper YMM halves, one register after another: 32 bytes each.
    pub ymm: [[u8; 32]; 16],
    /// Upper halves of ZMM0-15.
    pub zmm_high: [[u8; 32]; 16],
    /// ZMM16-31.
    pub zmm: [[u8; 64]; 16],
    /// Opmask registers.
    pub opmask: [u64; 8],
    /// x87 state in the first 160 bytes of the FXSAVE64 layout (its XMM and MXCSR fields are not used).
    pub fx: [u8; 512],
    /// MXCSR.
    pub mxcsr: u32,
    /// [`VectorState::zmm_high`] may have something beside zeros.
    pub zmm_high_used: bool,
    /// XCR0.
    pub xcr0: u64,
}

// FXSAVE and FXRSTOR.
const _: () = assert!(std::mem::offset_of!(VectorState, fx).is_multiple_of(16));

impl Default for VectorState {
    fn default() -> Self {
        Self {
            ymm: [[0; 32]; 16],
            zmm_high: [[0; 32]; 16],
            zmm: [[0; 64]; 16],
            opmask: [0; 8],
            fx: [0; 512],
            mxcsr: 0x1f80,
            zmm_high_used: false,
            xcr0: 1,
        }
    }
}

/// One software CPU.
#[repr(C)]
pub struct Core {
    /// RAX-R15, a zero slot, RIP: see [`crate::insn::Insn`].
    pub regs: [u64; 18],
    /// The run loop leaves the block when its cursor reaches this; 0 leaves after the current instruction.
    pub stop_at: usize,
    /// Arithmetic flags as LAHF and SETO give them: SF ZF 0 AF 0 PF 1 CF in the high byte, OF in bit 0.
    pub arithmetic: u16,
    /// A STI or a load of SS just ran: no interrupt before the next instruction ends.
    pub interrupt_shadow: bool,
    /// The default sizes of code, from CS.
    pub code_size: CodeSize,
    /// Current privilege level.
    pub cpl: u8,
    /// Why SSE (bit 0), AVX (bit 1), x87 (bit 2), any VEX (bit 3) or AVX-512 (bit 7) instructions cannot run now: see
    /// [`Core::update_mode`].
    pub fpu_blocked: u8,
    /// RFLAGS without the arithmetic flags (bit 1 set).
    pub system_flags: u64,
    /// Guest RAM soft TLBs and page walks.
    pub mmu: Mmu,
    /// Segment registers.
    pub segments: [Segment; 6],
    /// LDTR.
    pub ldtr: Segment,
    /// TR.
    pub tr: Segment,
    /// GDTR.
    pub gdtr: DescriptorTable,
    /// IDTR.
    pub idtr: DescriptorTable,
    /// CR0, CR2, CR3, CR4 at their own numbers.
    pub cr: [u64; 5],
    /// DR0-DR3, DR6 at 6, DR7 at 7.
    pub dr: [u64; 8],
    /// MSRs.
    pub msr: Msrs,
    /// Vector and x87 state.
    pub vector: VectorState,
    /// Native stubs for vector and x87 instructions.
    pub native: Native,
    /// The local APIC's own side.
    pub lapic: Lapic,
    /// What waits behind an `Err(Raised)`.
    pub raised: Exception,
    /// Each instruction needs a look before and after: break points, single step, RF. See [`Core::update_mode`].
    pub careful: bool,
    /// DR6 bits of data break points that the current instruction hit.
    pub watch_hits: u64,
    /// A handler was entered through the IDT or IVT.
    pub entered: bool,
    /// The page-directory-pointer entries of PAE paging, as the last load of CR3 found them.
    pub pdptes: [u64; 4],
    /// Guest instructions executed.
    pub instructions: u64,
    /// Times when the machine was asked or told something.
    pub exits: u64,
    /// The processor shut down (triple fault).
    pub shut_down: bool,
    /// HLT ran: sleep until the next event.
    pub halted: bool,
    /// What is to be delivered before the next instruction.
    pub undelivered: Undelivered,
    /// What a debugger wants.
    pub debug: DebugControl,
    /// The debugger's break point that the next instruction goes past.
    pub debug_passed: Option<u64>,
    /// Decoded blocks.
    pub cache: Cache,
    /// PAUSE instructions executed.
    pub pauses: u32,
    /// What translated code finds of its own.
    pub frame: Frame,
    /// Runs hot code faster, if it is there.
    pub translator: Option<Box<Translator>>,
    /// Compares what that does with the interpreter, in check mode.
    pub checker: Option<Box<Checker>>,
    /// When it may run guest code, in check mode.
    pub turns: Option<Arc<Turns>>,
    /// Copies of pages that are stored to; in the shadow of a Core only.
    pub copies: Option<Copies>,
    /// Why the VM must end; the processor is shut down too.
    pub failure: Option<String>,
    /// What the guest has yet to be told of time that the host took.
    pub steal: Steal,
    /// Of the settings of the VM's clock, what the guest was told last: see [`crate::shared::Vm::set_clock`].
    pub clock_settings: u64,
    /// The guest has not been told how its TSC and its clock hang together since the state was set.
    pub pvclock_stale: bool,
    /// Guest RAM.
    pub ram: Arc<GuestRam>,
    /// The machine around.
    pub machine: Arc<dyn Machine>,
    /// What other vCPUs and threads see of this vCPU and of the VM.
    pub shared: Arc<Shared>,
    /// How fast the guest's TSC runs: the VM's.
    pub rate: Rate,
}

/// Writes the fields of a value where it is to be, but for those that are made there already. All are named, or it does not
/// compile.
macro_rules! write_fields {
    ($type:ident at $at:expr, $(with $($made:ident),+)?; { $($field:ident: $value:expr,)* }) => {{
        let _all_named = |value: &$type| {
            let $type { $($field: _,)* $($($made: _,)+)? } = value;
        };
        $((&raw mut (*$at).$field).write($value);)*
    }};
}
pub(crate) use write_fields;

impl Core {
    /// A processor after RESET. It is larger than a stack should hold, as its soft TLBs are part of it.
    pub fn new(ram: Arc<GuestRam>, machine: Arc<dyn Machine>, shared: Arc<Shared>) -> Box<Self> {
        let mut place = Box::<Self>::new_uninit();
        let at = place.as_mut_ptr();
        // SAFETY: all fields of memory of this type are written, and nothing is read before.
        let mut core = unsafe {
            let code = (shared.vcpus().len() > 1).then(|| Arc::clone(ram.code()));
            Mmu::make(&raw mut (*at).mmu, code);
            Frame::make(&raw mut (*at).frame);
            write_fields!(Self at at, with mmu, frame; {
            regs: [0; 18],
            stop_at: 0,
            arithmetic: 0,
            interrupt_shadow: false,
            code_size: CodeSize::Bits16,
            cpl: 0,
            fpu_blocked: 0,
            system_flags: 0,
            segments: Default::default(),
            ldtr: Segment::default(),
            tr: Segment::default(),
            gdtr: DescriptorTable::default(),
            idtr: DescriptorTable::default(),
            cr: [0; 5],
            dr: [0; 8],
            msr: Msrs::default(),
            vector: VectorState::default(),
            native: Native::default(),
            lapic: Lapic::default(),
            raised: Exception::default(),
            careful: false,
            watch_hits: 0,
            entered: false,
            pdptes: [0; 4],
            instructions: 0,
            exits: 0,
            shut_down: false,
            halted: false,
            undelivered: Undelivered::default(),
            debug: DebugControl::default(),
            debug_passed: None,
            cache: Cache::default(),
            pauses: 0,
            translator: None,
            checker: None,
            turns: None,
            copies: None,
            failure: None,
            steal: Steal::default(),
            clock_settings: shared.vm().clock_settings(),
            pvclock_stale: false,
            ram: ram,
            machine: machine,
            rate: shared.vm().rate(),
            shared: shared,
            });
            place.assume_init()
        };
        let reset = CpuState::reset();
        core.set_registers(&reset);
        core.set_xsave_area(&reset.xsave);
        core
    }

    /// RIP: of the next instruction inside handlers.
    #[inline(always)]
    pub fn rip(&self) -> u64 {
        self.regs[17]
    }

    /// Sets RIP.
    #[inline(always)]
    pub fn set_rip(&mut self, rip: u64) {
        self.regs[17] = rip;
    }

    /// Makes the run loop look at everything anew after this instruction: mode, code pages, events.
    #[inline(always)]
    pub fn leave_block(&mut self) {
        self.stop_at = 0;
    }

    /// Raises an exception without error code.
    #[cold]
    pub fn raise<T>(&mut self, vector: u8) -> Exec<T> {
        self.raised = Exception {
            vector,
            ..Exception::default()
        };
        Err(Raised)
    }

    /// Raises an exception with an error code.
    #[cold]
    pub fn raise_code<T>(&mut self, vector: u8, error: u32) -> Exec<T> {
        self.raised = Exception {
            vector,
            error: Some(error),
            ..Exception::default()
        };
        Err(Raised)
    }

    /// Raises #GP(0).
    #[cold]
    pub fn general_protection<T>(&mut self) -> Exec<T> {
        self.raise_code(vector::GP, 0)
    }

    /// RFLAGS, whole.
    pub fn rflags(&self) -> u64 {
        let a = u64::from(self.arithmetic);
        self.system_flags | (a >> 8) & (flag::ARITHMETIC & 0xff) | (a & 1) << 11
    }

    /// Sets RFLAGS, whole, without any check.
    pub fn set_rflags(&mut self, value: u64) {
        self.set_arithmetic(value);
        self.system_flags = value & 0x3f_7fd5 & !flag::ARITHMETIC | 2;
    }

    /// Sets only the arithmetic flags.
    #[inline(always)]
    pub fn set_arithmetic(&mut self, value: u64) {
        self.arithmetic = ((value & 0xd5 | 2) << 8 | value >> 11 & 1) as u16;
    }

    /// True in long mode (EFER.LMA), 64-bit or compatibility.
    #[inline]
    pub fn long_mode(&self) -> bool {
        self.msr.efer & 1 << 10 != 0
    }

    /// True in protected (or long) mode.
    #[inline]
    pub fn protected(&self) -> bool {
        self.cr[0] & 1 != 0
    }

    /// True in 64-bit mode.
    #[inline(always)]
    pub fn bits64(&self) -> bool {
        self.code_size == CodeSize::Bits64
    }

    /// True in virtual-8086 mode.
    #[inline]
    pub fn virtual_8086(&self) -> bool {
        self.system_flags & flag::VM != 0
    }

    /// Reads a register of `T`'s size at a byte offset of [`Core::regs`].
    #[inline(always)]
    pub fn read_reg<T: Copy>(&self, at: u8) -> T {
        debug_assert!(usize::from(at) + size_of::<T>() <= size_of_val(&self.regs));
        // SAFETY: decoders only make offsets of registers; any bits are a valid unsigned integer.
        unsafe {
            self.regs
                .as_ptr()
                .cast::<u8>()
                .add(usize::from(at))
                .cast::<T>()
                .read_unaligned()
        }
    }

    /// Writes a register of `T`'s size; a 32-bit write clears the upper half.
    #[inline(always)]
    pub fn write_reg<T: crate::size::Size>(&mut self, at: u8, value: T) {
        debug_assert!(usize::from(at) + size_of::<T>() <= 16 * 8);
        let pointer = self.regs.as_mut_ptr().cast::<u8>().wrapping_add(usize::from(at));
        if size_of::<T>() == 4 {
            // SAFETY: the offset is that of a whole register for this size.
            unsafe { pointer.cast::<u64>().write(value.to_u64()) }
        } else {
            // SAFETY: as in `read_reg`.
            unsafe { pointer.cast::<T>().write_unaligned(value) }
        }
    }
}
