//! What a vCPU has done, in numbers.

use serde::Serialize;
use std::ops::AddAssign;

/// A struct of counts, with a sum.
macro_rules! counts {
    ($(#[$meta:meta])* pub struct $name:ident { $($(#[$doc:meta])* pub $field:ident: $type:ty,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
        pub struct $name { $($(#[$doc])* pub $field: $type,)* }

        impl AddAssign for $name {
            fn add_assign(&mut self, other: Self) {
                $(self.$field += other.$field;)*
            }
        }
    };
}

counts! {
    /// What a vCPU has done since it was made.
    pub struct Counters {
        /// Guest instructions executed, but for those of translated code; 0 where the processor itself runs them, uncounted.
        pub instructions: u64,
        /// Times when guest code had to wait for the machine: accesses to ports and to addresses that are not RAM, ends of
        /// level-triggered interrupts. With KVM: returns to this process.
        pub exits: u64,
        /// What its translator has done; all zero without one.
        pub translation: Translation,
    }
}

counts! {
    /// What a translator of guest code has done.
    pub struct Translation {
        /// Blocks made.
        pub blocks: u64,
        /// Blocks copied from others, for the same code at another address.
        pub copies: u64,
        /// Guest instructions in the blocks made.
        pub instructions: u64,
        /// Bytes of host code in them.
        pub code_bytes: u64,
        /// Time that it took to make them.
        pub nanoseconds: u64,
        /// Time that it took to copy those.
        pub copy_nanoseconds: u64,
        /// Direct branches in them.
        pub branches: u64,
        /// Those that were led straight to their target.
        pub links: u64,
        /// Blocks forgotten because the guest's code changed.
        pub outdated: u64,
        /// Times when a part of the code cache was emptied for new code.
        pub evictions: u64,
        /// Soft-TLB entries filled for translated code.
        pub tlb_fills: u64,
        /// Times when translated code looked for an entry, if that is counted.
        pub tlb_lookups: u64,
        /// Times when all entries were forgotten, or all of an address space.
        pub tlb_flushes: u64,
        /// Ways out of translated code.
        pub leaves: Leaves,
        /// Blocks that ran in both ways and were compared, in check mode.
        pub judged: u64,
        /// Blocks that were interpreted only in check mode, as they cannot be repeated.
        pub not_judged: u64,
    }
}

counts! {
    /// How often translated code was left, by the reason.
    pub struct Leaves {
        /// A direct branch that did not lead to its target yet.
        pub unlinked: u64,
        /// An indirect branch or return to where the jump cache knew no block.
        pub unknown: u64,
        /// An instruction that is the interpreter's.
        pub interpret: u64,
        /// Interrupts or other events.
        pub events: u64,
        /// An access that the interpreter must do: a fault, a device, across pages, over code.
        pub refused: u64,
        /// An exception of the host's processor.
        pub trapped: u64,
        /// An instruction changed more than its block knows of.
        pub helped: u64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_several_vcpus_add_up() {
        let mut sum = Counters::default();
        for number in 1..=3 {
            sum += Counters {
                instructions: number,
                translation: Translation {
                    blocks: 10 * number,
                    leaves: Leaves {
                        refused: 100 * number,
                        ..Leaves::default()
                    },
                    ..Translation::default()
                },
                ..Counters::default()
            };
        }
        assert_eq!((sum.instructions, sum.exits), (6, 0));
        assert_eq!((sum.translation.blocks, sum.translation.leaves.refused), (60, 600));
    }
}
