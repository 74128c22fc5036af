//! Page walks: no paging, 32-bit, PAE and 4-level (Intel SDM 3A, chapter 4).

use crate::core::Core;
use crate::fault::Exec;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Width of guest physical addresses (CPUID 80000008h); page-table bits above are reserved.
pub const PHYSICAL_BITS: u32 = 46;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const GLOBAL: u64 = 1 << 8;
const NO_EXECUTE: u64 = 1 << 63;
/// Physical address bits of a 64-bit entry that this processor has, and those that it lacks.
const ADDRESS: u64 = (1 << PHYSICAL_BITS) - 0x1000;
const BEYOND: u64 = (1 << 52) - (1 << PHYSICAL_BITS);

/// Who accesses, and how.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Access {
    /// With user rights.
    pub user: bool,
    /// EFLAGS.AC lifts SMAP.
    pub override_smap: bool,
    /// A store.
    pub write: bool,
    /// An instruction fetch.
    pub fetch: bool,
}

/// Where a linear address leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mapping {
    /// Guest physical address of the byte.
    pub gpa: u64,
    /// log2 of the page's size.
    pub shift: u8,
    /// Survives a change of CR3.
    pub global: bool,
    /// Stores with the same rights need no further walk.
    pub writable: bool,
}

/// The entries a walk went through, for their accessed and dirty bits.
struct Path {
    steps: [(u64, u64); 4],
    count: usize,
    /// Entries have 4 bytes.
    narrow: bool,
}

impl Path {
    fn push(&mut self, gpa: u64, entry: u64) {
        self.steps[self.count] = (gpa, entry);
        self.count += 1;
    }
}

struct Leaf {
    gpa: u64,
    shift: u8,
    rights: u64,
    entry: u64,
}

impl Core {
    /// Walks, checks rights, sets accessed and dirty bits; the error is a page fault's error code.
    pub(crate) fn walk(&mut self, linear: u64, access: Access) -> Result<Mapping, u32> {
        if self.cr[0] >> 31 & 1 == 0 {
            return Ok(Mapping {
                gpa: linear & 0xffff_ffff,
                shift: 12,
                global: false,
                writable: true,
            });
        }
        let execute_disable = self.cr[4] & 1 << 5 != 0 && self.msr.efer & 1 << 11 != 0;
        let smep = self.cr[4] & 1 << 20 != 0;
        let code = u32::from(access.write) << 1
            | u32::from(access.user) << 2
            | u32::from(access.fetch && (execute_disable || smep)) << 4;
        loop {
            let mut path = Path {
                steps: [(0, 0); 4],
                count: 0,
                narrow: false,
            };
            let leaf = self.descend(linear, &mut path).map_err(|error| error | code)?;
            let (user_page, writable) = (leaf.rights & USER != 0, leaf.rights & WRITABLE != 0);
            let allowed = !(access.fetch && leaf.rights & NO_EXECUTE != 0)
                && if access.user {
                    user_page && (writable || !access.write)
                } else {
                    let smap = self.cr[4] & 1 << 21 != 0 && !access.override_smap;
                    let barred = user_page && if access.fetch { smep } else { smap };
                    !barred && (writable || !access.write || self.cr[0] & 1 << 16 == 0)
                };
            if !allowed {
                return Err(code | 1);
            }
            if !self.touch(&path, access.write) {
                continue;
            }
            let may_write = writable || !access.user && self.cr[0] & 1 << 16 == 0;
            return Ok(Mapping {
                gpa: leaf.gpa,
                shift: leaf.shift,
                global: leaf.entry & GLOBAL != 0 && self.cr[4] & 1 << 7 != 0,
                writable: may_write && (access.write || leaf.entry & DIRTY != 0),
            });
        }
    }

    /// Guest physical address of a linear one, whatever its rights, without side effects.
    pub fn translate(&self, linear: u64) -> Option<u64> {
        if self.cr[0] >> 31 & 1 == 0 {
            return Some(linear & 0xffff_ffff);
        }
        if self.long_mode() && (linear as i64) << 16 >> 16 != linear as i64 {
            return None;
        }
        let mut path = Path {
            steps: [(0, 0); 4],
            count: 0,
            narrow: false,
        };
        self.descend(linear, &mut path).ok().map(|leaf| leaf.gpa)
    }

    /// Goes down to the page; the error has the bits for "not present" (0) or "reserved bit" (9).
    fn descend(&self, linear: u64, path: &mut Path) -> Result<Leaf, u32> {
        if self.cr[4] & 1 << 5 == 0 {
            return self.descend_32bit(linear as u32, path);
        }
        let long = self.long_mode();
        let execute_disable = self.msr.efer & 1 << 11 != 0;
        let reserved = if long { BEYOND } else { BEYOND | 0x7ff << 52 } | if execute_disable { 0 } else { NO_EXECUTE };
        let (mut shift, mut table) = if long { (39, self.cr[3] & ADDRESS) } else { (30, 0) };
        let mut rights = WRITABLE | USER;
        loop {
            if !long && shift == 30 {
                // A PDPTE has neither rights nor an accessed bit.
                let entry = self.pdptes[(linear >> 30 & 3) as usize];
                if entry & PRESENT == 0 {
                    return Err(0);
                }
                (table, shift) = (entry & ADDRESS, 21);
                continue;
            }
            let at = table + (linear >> shift & 0x1ff) * 8;
            let entry = self.read_entry(at);
            if entry & PRESENT == 0 {
                return Err(0);
            }
            if entry & reserved != 0 || shift == 39 && entry & LARGE != 0 {
                return Err(9);
            }
            rights = rights & entry | (rights | entry) & NO_EXECUTE;
            path.push(at, entry);
            if shift == 12 || entry & LARGE != 0 {
                let offset = (1u64 << shift) - 1;
                if shift > 12 && entry & ADDRESS & offset & !0x1fff != 0 {
                    return Err(9);
                }
                return Ok(Leaf {
                    gpa: entry & ADDRESS & !offset | linear & offset,
                    shift,
                    rights,
                    entry,
                });
            }
            (table, shift) = (entry & ADDRESS, shift - 9);
        }
    }

    /// The page-directory-pointer entries that PAE paging takes from `cr3` (Intel SDM 3A, 4.4.1).
    pub(crate) fn read_pdptes(&self, cr3: u64) -> [u64; 4] {
        std::array::from_fn(|number| self.read_entry((cr3 & 0xffff_ffe0) + number as u64 * 8))
    }

    /// Loads the page-directory-pointer entries, if `cr0`, `cr4` and EFER are those of PAE paging.
    ///
    /// # Errors
    /// #GP(0) if one of them has a reserved bit set; nothing is changed then.
    pub(crate) fn load_pdptes(&mut self, cr0: u64, cr3: u64, cr4: u64) -> Exec {
        if cr0 >> 31 & 1 == 0 || cr4 & 1 << 5 == 0 || self.msr.efer & 1 << 8 != 0 {
            return Ok(());
        }
        let entries = self.read_pdptes(cr3);
        let reserved = BEYOND | 0xfff << 52 | 0x1e6;
        if entries
            .iter()
            .any(|entry| entry & PRESENT != 0 && entry & reserved != 0)
        {
            return self.general_protection();
        }
        self.pdptes = entries;
        Ok(())
    }

    fn descend_32bit(&self, linear: u32, path: &mut Path) -> Result<Leaf, u32> {
        path.narrow = true;
        let at = (self.cr[3] & 0xffff_f000) + u64::from(linear >> 22) * 4;
        let directory = self.read_entry32(at);
        if directory & PRESENT == 0 {
            return Err(0);
        }
        path.push(at, directory);
        if directory & LARGE != 0 && self.cr[4] & 1 << 4 != 0 {
            if directory & 1 << 21 != 0 {
                return Err(9);
            }
            let high = (directory >> 13 & 0xff) << 32;
            return Ok(Leaf {
                gpa: high | directory & 0xffc0_0000 | u64::from(linear) & 0x3f_ffff,
                shift: 22,
                rights: directory,
                entry: directory,
            });
        }
        let at = (directory & 0xffff_f000) + u64::from(linear >> 12 & 0x3ff) * 4;
        let entry = self.read_entry32(at);
        if entry & PRESENT == 0 {
            return Err(0);
        }
        path.push(at, entry);
        Ok(Leaf {
            gpa: entry & 0xffff_f000 | u64::from(linear) & 0xfff,
            shift: 12,
            rights: directory & entry,
            entry,
        })
    }

    /// Sets the accessed bits, and the leaf's dirty bit; false if an entry changed meanwhile.
    fn touch(&mut self, path: &Path, write: bool) -> bool {
        for (at, &(gpa, entry)) in path.steps[..path.count].iter().enumerate() {
            let dirty = write && at + 1 == path.count;
            let wanted = entry | ACCESSED | if dirty { DIRTY } else { 0 };
            if wanted == entry {
                continue;
            }
            let Some(host) = self.ram.host(gpa, if path.narrow { 4 } else { 8 }) else {
                continue;
            };
            let (order, relaxed) = (Ordering::SeqCst, Ordering::Relaxed);
            let same = if path.narrow {
                // SAFETY: RAM of the guest, aligned as page-table entries are.
                let word = unsafe { AtomicU32::from_ptr(host.cast()) };
                word.compare_exchange(entry as u32, wanted as u32, order, relaxed)
                    .is_ok()
            } else {
                // SAFETY: as above.
                let word = unsafe { AtomicU64::from_ptr(host.cast()) };
                word.compare_exchange(entry, wanted, order, relaxed).is_ok()
            };
            if !same {
                return false;
            }
            if self.ram.code().written(gpa, if path.narrow { 4 } else { 8 }) {
                self.leave_block();
            }
        }
        true
    }

    fn read_entry(&self, gpa: u64) -> u64 {
        // SAFETY: RAM of the guest, aligned as page-table entries are.
        self.ram.host(gpa, 8).map_or(u64::MAX, |host| unsafe {
            AtomicU64::from_ptr(host.cast()).load(Ordering::Relaxed)
        })
    }

    fn read_entry32(&self, gpa: u64) -> u64 {
        // SAFETY: as in `read_entry`.
        self.ram.host(gpa, 4).map_or(u64::from(u32::MAX), |host| unsafe {
            AtomicU32::from_ptr(host.cast()).load(Ordering::Relaxed).into()
        })
    }
}
