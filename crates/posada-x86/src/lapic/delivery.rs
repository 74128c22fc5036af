//! Who receives an interrupt message: destinations, delivery modes, MSI (Intel SDM 3A, 11.6, 11.11 and 11.12.10).

use crate::shared::Vm;
use crate::shared::mailbox::{Address, NMI};
use posada_engine::{Msi, MsiLine, MsiSink, PlainLine};
use std::sync::Arc;

/// What a message asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// A vector, at each destination.
    Fixed,
    /// A vector, at one of the destinations.
    LowestPriority,
    Nmi,
    Init,
    Startup,
}

impl Mode {
    /// From the three bits at 8 of an ICR or of MSI data. SMI and ExtINT have nobody to handle them here.
    pub(crate) fn of(low: u32) -> Option<Self> {
        match low >> 8 & 7 {
            0 => Some(Self::Fixed),
            1 => Some(Self::LowestPriority),
            4 => Some(Self::Nmi),
            5 => Some(Self::Init),
            6 => Some(Self::Startup),
            _ => None,
        }
    }
}

/// What is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Interrupt {
    pub mode: Mode,
    pub vector: u8,
    pub level: bool,
}

/// Whom it is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Destination {
    Everyone,
    AllBut(u32),
    Only(u32),
    /// An MDA: an 8-bit xAPIC one (FFh included) or a 32-bit x2APIC one.
    Logical(u32),
}

impl Destination {
    /// The 8-bit destination of xAPIC ICRs, MSIs and the IOAPIC.
    pub(crate) fn xapic(logical: bool, id: u8) -> Self {
        match (logical, id) {
            (true, id) => Self::Logical(id.into()),
            (false, 0xff) => Self::Everyone,
            (false, id) => Self::Only(id.into()),
        }
    }

    /// The 32-bit destination of x2APIC ICRs.
    pub(crate) fn x2apic(logical: bool, id: u32) -> Self {
        match (logical, id) {
            (_, u32::MAX) => Self::Everyone,
            (true, id) => Self::Logical(id),
            (false, id) => Self::Only(id),
        }
    }

    /// True if vCPU `index`, addressed as `address` says, is meant.
    fn contains(self, index: u32, address: Address) -> bool {
        !address.disabled
            && match self {
                Self::Everyone => true,
                Self::AllBut(but) => index != but,
                Self::Only(only) => index == only,
                Self::Logical(id) if address.x2apic => id >> 16 == index >> 4 && id >> (index & 15) & 1 != 0,
                Self::Logical(id) if address.cluster => {
                    let (cluster, own) = (id >> 4 & 15, u32::from(address.logical));
                    (cluster == 15 || cluster == own >> 4) && id & own & 15 != 0
                }
                Self::Logical(id) => id & u32::from(address.logical) != 0,
            }
    }
}

/// The logical x2APIC id of vCPU `index`: 16 vCPUs a cluster.
pub(crate) fn x2apic_logical_id(index: u32) -> u32 {
    index >> 4 << 16 | 1 << (index & 15)
}

impl Vm {
    /// Delivers a message to the vCPUs it is for. From any thread, and without a lock.
    pub(crate) fn send(&self, interrupt: Interrupt, to: Destination) {
        let meant = (0..).zip(self.vcpus()).filter_map(|(index, mailbox)| {
            let address = mailbox.address();
            to.contains(index, address).then_some((mailbox, address))
        });
        if interrupt.mode == Mode::LowestPriority {
            // Priorities are all alike to us: the destinations take turns.
            let willing = meant.filter(|(_, address)| address.software_enabled);
            let count = willing.clone().count();
            if count != 0 {
                let chosen = willing.map(|(mailbox, _)| mailbox).nth(self.turn(count));
                // None if one of them was switched off just now: then it is as if it had been chosen.
                if let Some(mailbox) = chosen {
                    mailbox.post_vector(interrupt.vector, interrupt.level);
                }
            }
            return;
        }
        for (mailbox, _) in meant {
            match interrupt.mode {
                Mode::Nmi => mailbox.post(NMI),
                Mode::Init => mailbox.post_init(),
                Mode::Startup => mailbox.post_startup(interrupt.vector),
                Mode::Fixed | Mode::LowestPriority => mailbox.post_vector(interrupt.vector, interrupt.level),
            }
        }
    }
}

/// Where a message goes, or `None` for one that means nothing.
fn decode(msi: Msi) -> Option<(Interrupt, Destination)> {
    let (address, data) = (msi.address, msi.data);
    let mode = Mode::of(data).filter(|&mode| mode != Mode::Startup)?;
    let level = data & 1 << 15 != 0;
    // A level that goes away asks for nothing.
    if address >> 20 != 0xfee || level && data & 1 << 14 == 0 {
        return None;
    }
    let (redirect, logical) = (address & 8 != 0, address & 4 != 0);
    let interrupt = Interrupt {
        mode: match mode {
            Mode::Fixed if redirect => Mode::LowestPriority,
            mode => mode,
        },
        vector: data as u8,
        level,
    };
    Some((interrupt, Destination::xapic(logical, (address >> 12) as u8)))
}

impl MsiSink for Vm {
    fn signal_msi(&self, msi: Msi) {
        if let Some((interrupt, to)) = decode(msi) {
            self.send(interrupt, to);
        }
    }

    fn connect(self: Arc<Self>) -> Box<dyn MsiLine> {
        Box::new(PlainLine::new(self))
    }

    /// All ends of level-triggered interrupts are told to the machine.
    fn route_pin(&self, _pin: u8, _msi: Option<Msi>) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shared::mailbox::INIT;

    const FIXED: Interrupt = Interrupt {
        mode: Mode::Fixed,
        vector: 0x60,
        level: false,
    };

    /// Which vCPUs have vector 60h, as bits; takes them.
    fn receivers(vm: &Vm) -> u32 {
        (0..)
            .zip(vm.vcpus())
            .map(|(index, mailbox)| u32::from(mailbox.take_vectors()[1].0 == 1 << 32) << index)
            .sum()
    }

    fn vm(address: impl Fn(u32) -> Address) -> std::sync::Arc<Vm> {
        let vm = Vm::with_cpus(20);
        (0..)
            .zip(vm.vcpus())
            .for_each(|(index, mailbox)| mailbox.set_address(address(index)));
        vm
    }

    fn flat(index: u32) -> Address {
        Address {
            software_enabled: true,
            logical: 1u32.checked_shl(index).unwrap_or(0) as u8,
            ..Address::default()
        }
    }

    #[test]
    fn physical_destinations_name_one_or_all() {
        let vm = vm(flat);
        let sent = |to| {
            vm.send(FIXED, to);
            receivers(&vm)
        };
        assert_eq!(sent(Destination::xapic(false, 3)), 1 << 3);
        assert_eq!(sent(Destination::xapic(false, 200)), 0);
        assert_eq!(sent(Destination::xapic(false, 0xff)), 0xf_ffff);
        assert_eq!(sent(Destination::x2apic(false, 0xff)), 0);
        assert_eq!(sent(Destination::x2apic(false, u32::MAX)), 0xf_ffff);
        assert_eq!(sent(Destination::AllBut(4)), 0xf_ffef);
    }

    #[test]
    fn logical_destinations_follow_each_receivers_model() {
        let sent = |vm: &Vm, to| {
            vm.send(FIXED, to);
            receivers(vm)
        };
        let flat = vm(flat);
        assert_eq!(sent(&flat, Destination::xapic(true, 0x85)), 0x85);
        let clusters = vm(|index| Address {
            cluster: true,
            logical: (index / 4 << 4 | 1 << (index % 4)) as u8,
            ..Address::default()
        });
        assert_eq!(sent(&clusters, Destination::xapic(true, 0x25)), 0x500);
        assert_eq!(sent(&clusters, Destination::xapic(true, 0xf2)), 0x2_2222);
        let x2apic = vm(|_| Address {
            x2apic: true,
            ..Address::default()
        });
        assert_eq!(sent(&x2apic, Destination::x2apic(true, 1 << 16 | 5)), 5 << 16);
        assert_eq!(sent(&x2apic, Destination::x2apic(true, x2apic_logical_id(18))), 1 << 18);
        assert_eq!(
            sent(&x2apic, Destination::xapic(true, 0x85)),
            0x85,
            "an MSI reaches cluster 0"
        );
        assert_eq!(sent(&x2apic, Destination::x2apic(true, u32::MAX)), 0xf_ffff);
    }

    #[test]
    fn lowest_priority_goes_round_among_those_switched_on() {
        let vm = vm(|index| Address {
            software_enabled: index != 2,
            ..flat(index)
        });
        let mut seen = 0;
        for _ in 0..8 {
            let lowest = Interrupt {
                mode: Mode::LowestPriority,
                ..FIXED
            };
            vm.send(lowest, Destination::Logical(0x0f));
            let receiver = receivers(&vm);
            assert_eq!(receiver.count_ones(), 1);
            seen |= receiver;
        }
        assert_eq!(seen, 0b1011);
    }

    #[test]
    fn nothing_arrives_at_a_disabled_apic() {
        let vm = vm(|index| Address {
            disabled: index < 10,
            ..flat(index)
        });
        vm.send(FIXED, Destination::Everyone);
        assert_eq!(receivers(&vm), 0xf_fc00);
    }

    #[test]
    fn messages_are_decoded_as_the_manual_says() {
        let decode = |address, data| decode(Msi { address, data });
        let fixed = |vector, level| Interrupt {
            mode: Mode::Fixed,
            vector,
            level,
        };
        assert_eq!(
            decode(0xfee0_3000, 0x41),
            Some((fixed(0x41, false), Destination::Only(3)))
        );
        assert_eq!(
            decode(0xfee0_f004, 0xc042),
            Some((fixed(0x42, true), Destination::Logical(0xf)))
        );
        let lowest = Interrupt {
            mode: Mode::LowestPriority,
            ..fixed(0x41, false)
        };
        assert_eq!(decode(0xfeef_f00c, 0x41), Some((lowest, Destination::Logical(0xff))));
        assert_eq!(decode(0xfee0_3000, 0x8041), None, "a level that goes away");
        assert_eq!(decode(0xfed0_3000, 0x41), None, "not the APICs' address range");
        assert_eq!(decode(0x1_fee0_3000, 0x41), None);
        for (mode, known) in [(2, false), (3, false), (4, true), (5, true), (6, false), (7, false)] {
            assert_eq!(decode(0xfee0_0000, mode << 8).is_some(), known, "mode {mode}");
        }
    }

    #[test]
    fn an_nmi_and_an_init_by_message_reach_the_mailbox() {
        let vm = vm(flat);
        for data in [4 << 8, 5 << 8] {
            vm.signal_msi(Msi {
                address: 0xfee0_1000,
                data,
            });
        }
        let taken: Vec<u32> = vm.vcpus().iter().map(|mailbox| mailbox.take() & (NMI | INIT)).collect();
        assert_eq!((taken[1], taken.iter().sum::<u32>()), (NMI | INIT, NMI | INIT));
    }
}
