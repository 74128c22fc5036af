//! Time, random numbers, identification, segment bases and cache lines.

use super::descriptor::canonical;
use crate::core::{Core, flag, gpr};
use crate::cpuid::{cpuid as leaf, features};
use crate::fault::{Exec, vector};
use crate::insn::{Insn, OPERAND16, WIDE};
use std::arch::asm;

/// How often a host without fresh random numbers is asked again (Intel's guide to its generator asks for ten tries).
const RANDOM_TRIES: u32 = 10;

impl Core {
    /// #GP(0) if CR4.TSD keeps the time stamp counter from user mode.
    fn require_tsc(&mut self) -> Exec {
        if self.cpl != 0 && self.cr[4] & 1 << 2 != 0 {
            return self.general_protection();
        }
        Ok(())
    }

    fn read_tsc(&mut self) {
        let tsc = self.guest_tsc();
        self.regs[gpr::RAX] = tsc & 0xffff_ffff;
        self.regs[gpr::RDX] = tsc >> 32;
    }

    /// Writes a random number that the host may have failed to give.
    fn put_random(&mut self, insn: &Insn, number: Option<u64>) {
        let value = number.unwrap_or(0);
        match insn.flags & (OPERAND16 | WIDE) {
            OPERAND16 => self.write_reg(insn.rm, value as u16),
            0 => self.write_reg(insn.rm, value as u32),
            _ => self.write_reg(insn.rm, value),
        }
        self.set_arithmetic(if number.is_some() { flag::CF } else { 0 });
    }

    /// #UD outside 64-bit mode and without CR4.FSGSBASE.
    fn require_fsgsbase(&mut self) -> Exec {
        if !self.bits64() || self.cr[4] & 1 << 16 == 0 {
            return self.raise(vector::UD);
        }
        Ok(())
    }
}

/// RDTSC.
pub fn rdtsc(core: &mut Core, _: &Insn) -> Exec {
    core.require_tsc()?;
    core.read_tsc();
    Ok(())
}

/// RDTSCP.
pub fn rdtscp(core: &mut Core, _: &Insn) -> Exec {
    if !features().rdtscp {
        return core.raise(vector::UD);
    }
    core.require_tsc()?;
    core.read_tsc();
    core.regs[gpr::RCX] = core.msr.tsc_aux;
    Ok(())
}

/// RDPID: `rm` is the register, as wide as the code's addresses.
pub fn rdpid(core: &mut Core, insn: &Insn) -> Exec {
    if !features().rdpid {
        return core.raise(vector::UD);
    }
    core.write_reg(insn.rm, core.msr.tsc_aux);
    Ok(())
}

/// RDPMC: there are no performance counters, so no counter number is valid.
pub fn rdpmc(core: &mut Core, _: &Insn) -> Exec {
    core.general_protection()
}

macro_rules! random {
    ($(#[$doc:meta])* $name:ident, $feature:ident) => {
        $(#[$doc])*
        pub fn $name(core: &mut Core, insn: &Insn) -> Exec {
            if !features().$feature {
                return core.raise(vector::UD);
            }
            let number = (0..RANDOM_TRIES).find_map(|_| {
                let (value, valid): (u64, u8);
                // SAFETY: the host has the instruction, else its feature would not be shown.
                unsafe {
                    asm!(
                        concat!(stringify!($name), " {}"),
                        "setc {}",
                        out(reg) value,
                        out(reg_byte) valid,
                        options(nomem, nostack)
                    );
                }
                (valid != 0).then_some(value)
            });
            core.put_random(insn, number);
            Ok(())
        }
    };
}

random! {
    /// RDRAND: `rm` is the register.
    rdrand, rdrand
}
random! {
    /// RDSEED: `rm` is the register.
    rdseed, rdseed
}

/// CPUID.
pub fn cpuid(core: &mut Core, _: &Insn) -> Exec {
    let [eax, ebx, ecx, edx] = leaf(core, core.regs[gpr::RAX] as u32, core.regs[gpr::RCX] as u32);
    core.regs[gpr::RAX] = eax.into();
    core.regs[gpr::RBX] = ebx.into();
    core.regs[gpr::RCX] = ecx.into();
    core.regs[gpr::RDX] = edx.into();
    core.serializing();
    Ok(())
}

/// SERIALIZE.
pub fn serialize(core: &mut Core, _: &Insn) -> Exec {
    if !features().serialize {
        return core.raise(vector::UD);
    }
    core.serializing();
    Ok(())
}

/// RDFSBASE and RDGSBASE: `reg` is the segment's number, `rm` the register.
pub fn read_base(core: &mut Core, insn: &Insn) -> Exec {
    core.require_fsgsbase()?;
    let base = core.segments[usize::from(insn.reg)].base;
    if insn.flags & WIDE != 0 {
        core.write_reg(insn.rm, base);
    } else {
        core.write_reg(insn.rm, base as u32);
    }
    Ok(())
}

/// WRFSBASE and WRGSBASE: as [`read_base`].
pub fn write_base(core: &mut Core, insn: &Insn) -> Exec {
    core.require_fsgsbase()?;
    let base = if insn.flags & WIDE != 0 {
        core.read_reg::<u64>(insn.rm)
    } else {
        core.read_reg::<u32>(insn.rm).into()
    };
    if !canonical(base) {
        return core.general_protection();
    }
    core.segments[usize::from(insn.reg)].base = base;
    Ok(())
}

/// CLFLUSH, CLFLUSHOPT and CLWB: caches are the host's business, but the address must be readable.
pub fn clflush(core: &mut Core, insn: &Insn) -> Exec {
    let linear = core.linear(insn, 1, false)?;
    core.host_range(linear, 1, false)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::seg;
    use crate::system::tests::*;

    #[test]
    fn the_counter_may_be_kept_from_users() {
        let mut core = long_user();
        assert_eq!(rdtsc(&mut core, &insn()), Ok(()));
        let tsc = |core: &Core| core.regs[gpr::RDX] << 32 | core.regs[gpr::RAX];
        let before = tsc(&core);
        core.msr.tsc_aux = 7;
        assert_eq!(rdtscp(&mut core, &insn()), Ok(()));
        assert!(tsc(&core) > before && core.regs[gpr::RCX] == 7);
        core.cr[4] |= 1 << 2;
        assert!(rdtsc(&mut core, &insn()).is_err());
        assert!(rdtscp(&mut core, &insn()).is_err());
        assert_eq!(raised(&core), (vector::GP, Some(0)));
    }

    #[test]
    fn random_numbers_differ_and_set_only_carry() {
        if !features().rdrand {
            return;
        }
        let mut core = long();
        let mut insn = insn();
        insn.flags = WIDE;
        let mut numbers = [0; 4];
        for number in &mut numbers {
            core.set_arithmetic(flag::ARITHMETIC & !flag::CF);
            assert_eq!(rdrand(&mut core, &insn), Ok(()));
            assert_eq!(core.rflags() & flag::ARITHMETIC, flag::CF);
            *number = core.regs[gpr::RAX];
        }
        assert!(numbers.iter().any(|&number| number != numbers[0]));
        core.put_random(&insn, None);
        assert_eq!((core.regs[gpr::RAX], core.rflags() & flag::ARITHMETIC), (0, 0));
    }

    #[test]
    fn bases_need_cr4_and_canonical_addresses() {
        let mut core = long_user();
        let mut insn = insn();
        insn.reg = seg::GS as u8;
        insn.flags = WIDE;
        assert!(read_base(&mut core, &insn).is_err());
        assert_eq!(core.raised.vector, vector::UD);
        core.cr[4] |= 1 << 16;
        core.regs[gpr::RAX] = 0x7fff_1234_5678;
        assert_eq!(write_base(&mut core, &insn), Ok(()));
        insn.flags = 0;
        assert_eq!(read_base(&mut core, &insn), Ok(()));
        assert_eq!(core.regs[gpr::RAX], 0x1234_5678);
        insn.flags = WIDE;
        core.regs[gpr::RAX] = 1 << 47;
        assert!(write_base(&mut core, &insn).is_err());
        assert_eq!(raised(&core), (vector::GP, Some(0)));
        assert_eq!(core.segments[seg::GS].base, 0x7fff_1234_5678);
    }

    #[test]
    fn cpuid_clears_the_upper_halves() {
        let mut core = long();
        core.regs = [u64::MAX; 18];
        core.regs[gpr::RAX] = 0x8000_0000;
        assert_eq!(cpuid(&mut core, &insn()), Ok(()));
        assert_eq!(core.regs[..4], [0x8000_0008, 0, 0, 0]);
    }
}
