//! The software CPU with the same two windows: 64-bit or compatibility mode at privilege level 3, as the child process has
//! it.

use crate::layout::{CODE, CODE_32, CODE_64, CODE_PAGES, DATA, DATA_PAGES, FLAT_DATA, Memory, PAGE};
use crate::state::{Case, End, Outcome, area};
use posada_engine::{DescriptorTable, NoDevices, Segment};
use posada_memory::GuestRam;
use posada_x86::core::{Core, seg};
use posada_x86::translate::{Ran, Translator};
use std::sync::Arc;

/// Guest physical places: page tables, then the windows' pages.
const TABLES: u64 = 0x1000;
const CODE_GPA: u64 = 0x1_0000;
const DATA_GPA: u64 = 0x2_0000;
/// A string instruction may take one step a round: more than any count that a case sets.
const STEPS: usize = 4096;

const PRESENT: u64 = 1;
const WRITE: u64 = 2;
const USER: u64 = 4;
const NO_EXECUTE: u64 = 1 << 63;

pub struct Guest {
    core: Box<Core>,
    memory: Memory,
}

impl Guest {
    /// An interpreting processor.
    pub fn new() -> Self {
        let ram = Arc::new(GuestRam::new(1 << 20).expect("a mebibyte of guest RAM"));
        let host = |gpa| ram.host(gpa, PAGE).expect("inside guest RAM");
        let put = |table: u64, index: u64, entry: u64| {
            // SAFETY: an aligned entry of a page inside guest RAM, which no CPU uses yet.
            unsafe { host(table).cast::<u64>().add(index as usize % 512).write(entry) };
        };
        let [pml4, pointers, directory, code, data] = std::array::from_fn(|at| TABLES + at as u64 * PAGE);
        let next = PRESENT | WRITE | USER;
        put(pml4, 0, pointers | next);
        put(pointers, 0, directory | next);
        put(directory, CODE >> 21, code | next);
        put(directory, DATA >> 21, data | next);
        for page in 0..CODE_PAGES as u64 {
            put(code, page, CODE_GPA + page * PAGE | PRESENT | USER);
        }
        for (at, (page, write)) in (0..).zip(DATA_PAGES) {
            let rights = PRESENT | USER | NO_EXECUTE | if write { WRITE } else { 0 };
            put(data, page, DATA_GPA + at * PAGE | rights);
        }
        // SAFETY: the pages are guest RAM's, one after another, and only this guest's CPU uses them.
        let memory = unsafe { Memory::new(host(DATA_GPA), host(CODE_GPA)) };
        let mut core = Core::new(ram, Arc::new(NoDevices), Arc::default());
        // CR0: PG, AM, WP, NE, ET, MP, PE. CR4: OSXSAVE, FSGSBASE, OSXMMEXCPT, OSFXSR, PAE. EFER: NXE, LMA, LME, SCE.
        core.cr = [0x8005_0033, 0, 0, pml4, 0x5_0620];
        core.msr.efer = 0xd01;
        core.vector.xcr0 = area::components().into();
        core.gdtr = DescriptorTable::default();
        core.idtr = DescriptorTable::default();
        core.ldtr = Segment::default();
        // A TSS too short for an I/O permission map: no port may be used.
        core.tr.limit = 0;
        Self { core, memory }
    }

    /// One that translates all it can.
    pub fn translating() -> Self {
        let mut guest = Self::new();
        let translator = Translator::new(0).expect("memory for code");
        guest.core.translator = Some(Box::new(translator.at_once().exact()));
        guest
    }

    /// Runs a case as the child does.
    pub fn run(&mut self, case: &Case, outcome: &mut Outcome) {
        self.memory.prepare(case);
        self.core.ram.code().written(CODE_GPA, CODE_PAGES as u64 * PAGE);
        self.load(case);
        let exits = case.exits();
        (outcome.vector, outcome.error, outcome.address) = (0, 0, 0);
        outcome.end = End::Died;
        let at_exit = |core: &Core| exits.clone().any(|exit| exit == core.rip());
        for _ in 0..STEPS {
            self.core.activate_translator();
            if self.core.run_translated() != Ran::Nothing && at_exit(&self.core) {
                outcome.end = End::Retired;
                break;
            }
            if self.core.step().is_err() {
                let raised = &self.core.raised;
                outcome.end = End::Raised;
                outcome.vector = raised.vector.into();
                outcome.error = raised.error.unwrap_or(0);
                outcome.address = if raised.vector == 14 { raised.address } else { 0 };
                break;
            }
            if at_exit(&self.core) {
                outcome.end = End::Retired;
                break;
            }
        }
        self.save(outcome);
        self.memory.collect(outcome);
    }

    fn load(&mut self, case: &Case) {
        let (core, state) = (&mut self.core, &case.state);
        core.regs[..16].copy_from_slice(&state.gpr);
        core.set_rip(state.rip);
        core.set_rflags(state.rflags);
        let flat = |selector, access| Segment {
            selector,
            base: 0,
            limit: u32::MAX,
            access,
        };
        // MOV and PUSH show the selectors.
        core.segments = Default::default();
        core.segments[seg::CS] = flat(CODE_64, 0xa0fb);
        if case.bits == 32 {
            core.segments = [flat(FLAT_DATA, 0xc0f3); 6];
            core.segments[seg::CS] = flat(CODE_32, 0xc0fb);
        }
        core.segments[seg::SS] = flat(FLAT_DATA, 0xc0f3);
        for (segment, base) in [(seg::FS, state.fs_base), (seg::GS, state.gs_base)] {
            core.segments[segment].base = base;
        }
        core.vector.fx[..area::XMM].copy_from_slice(&state.area[..area::XMM]);
        core.vector.fx[24..32].fill(0);
        core.vector.mxcsr = state.mxcsr();
        for number in 0..16 {
            core.vector.ymm[number] = state.ymm(number);
        }
        if area::avx512() {
            for number in 0..16 {
                core.vector.zmm_high[number].copy_from_slice(&state.vector(number)[32..]);
                core.vector.zmm[number] = state.vector(16 + number);
            }
            core.vector.zmm_high_used = true;
            core.vector.opmask = std::array::from_fn(|number| state.opmask(number));
        }
        core.update_mode();
    }

    fn save(&self, outcome: &mut Outcome) {
        let (core, state) = (&self.core, &mut outcome.state);
        state.gpr.copy_from_slice(&core.regs[..16]);
        state.rip = core.rip();
        state.rflags = core.rflags();
        state.fs_base = core.segments[seg::FS].base;
        state.gs_base = core.segments[seg::GS].base;
        state.selectors = [seg::ES, seg::DS, seg::FS, seg::GS].map(|segment| core.segments[segment].selector);
        state.area[..area::XMM].copy_from_slice(&core.vector.fx[..area::XMM]);
        state.area[area::MXCSR..][..4].copy_from_slice(&core.vector.mxcsr.to_le_bytes());
        for (number, value) in core.vector.ymm.iter().enumerate() {
            state.set_ymm(number, value);
        }
        if area::avx512() {
            for number in 0..16 {
                let mut value = state.vector(number);
                value[32..].copy_from_slice(&core.vector.zmm_high[number]);
                state.set_vector(number, &value);
                state.set_vector(16 + number, &core.vector.zmm[number]);
            }
            for (number, value) in core.vector.opmask.into_iter().enumerate() {
                state.set_opmask(number, value);
            }
        }
    }
}
