//! Guest memory as instructions see it: soft TLBs in front of the page walks of [`crate::walk`], permissions, MMIO.

use crate::core::{CodeSize, Core, flag, seg};
use crate::fault::{Exception, Exec, Raised, vector};
use crate::host::{modify_atomically, read_host, write_host};
use crate::size::Size;
use crate::tlb::{ENTRIES, FETCH_SUPERVISOR, FETCH_USER, GLOBAL, SUPERVISOR, SUPERVISOR_AC, USER, USER_ALIGNED};
use crate::translate::Wanted;
use crate::walk::Access;
use crate::xsave;

impl Core {
    /// Loads from a linear address with the rights of the current privilege level.
    #[inline(always)]
    pub fn load<T: Size>(&mut self, linear: u64) -> Exec<T> {
        self.load_from(self.mmu.active, linear)
    }

    /// Stores to a linear address with the rights of the current privilege level.
    #[inline(always)]
    pub fn store<T: Size>(&mut self, linear: u64, value: T) -> Exec {
        self.store_to(self.mmu.active, linear, value)
    }

    /// Loads as the processor itself does for its tables: with supervisor rights at any privilege level.
    #[inline]
    pub fn load_system<T: Size>(&mut self, linear: u64) -> Exec<T> {
        self.load_from(SUPERVISOR * ENTRIES, linear)
    }

    /// Stores as the processor itself does.
    #[inline]
    pub fn store_system<T: Size>(&mut self, linear: u64, value: T) -> Exec {
        self.store_to(SUPERVISOR * ENTRIES, linear, value)
    }

    #[inline(always)]
    fn load_from<T: Size>(&mut self, first: usize, linear: u64) -> Exec<T> {
        let entry = self.mmu.entry(first, linear);
        let offset = linear ^ entry.read;
        if offset <= 4096 - T::BYTES {
            // SAFETY: a filled slot names a page of guest RAM, and all the bytes are inside the page.
            return Ok(unsafe { read_host(entry.host.add(offset as usize)) });
        }
        let mut bytes = [0; 8];
        self.load_slow(first, linear, &mut bytes[..T::BYTES as usize])?;
        Ok(T::from_u64(u64::from_le_bytes(bytes)))
    }

    #[inline(always)]
    fn store_to<T: Size>(&mut self, first: usize, linear: u64, value: T) -> Exec {
        let entry = self.mmu.entry(first, linear);
        let offset = linear ^ entry.write;
        if offset <= 4096 - T::BYTES {
            // SAFETY: as in `load_from`; a write tag is only set for writable pages.
            unsafe { write_host(entry.host.add(offset as usize), value) };
            return Ok(());
        }
        self.store_slow(first, linear, &value.to_u64().to_le_bytes()[..T::BYTES as usize])
    }

    /// Pieces of an access: the second is empty unless it crosses a page. Both are translated before anything is done.
    fn pieces(&mut self, first: usize, linear: u64, length: usize, write: bool) -> Exec<[(u64, usize); 2]> {
        let aligned = first == USER_ALIGNED * ENTRIES;
        if aligned && length.is_power_of_two() && length <= 8 && linear & (length as u64 - 1) != 0 {
            return self.raise_code(vector::AC, 0);
        }
        if self.careful {
            self.watch_hits |= self.watched(linear, length as u64, write);
        }
        let room = 4096 - (linear & 0xfff) as usize;
        if length <= room {
            return Ok([(self.look_up(first, linear, write)?, length), (0, 0)]);
        }
        let mut next = linear.wrapping_add(room as u64);
        if self.code_size != CodeSize::Bits64 && linear <= 0xffff_ffff {
            // Such code's own addresses wrap; those of the processor's tables may lie anywhere in long mode.
            next &= 0xffff_ffff;
        } else if next == 1 << 47 {
            // The end of the canonical range comes before any page fault.
            self.look_up(first, next, write)?;
        }
        let gpa = self.look_up(first, linear, write)?;
        let second = self.look_up(first, next, write)?;
        Ok([(gpa, room), (second, length - room)])
    }

    #[cold]
    #[inline(never)]
    fn load_slow(&mut self, first: usize, linear: u64, data: &mut [u8]) -> Exec {
        let pieces = self.pieces(first, linear, data.len(), false)?;
        let mut data = data;
        for (gpa, length) in pieces.into_iter().filter(|piece| piece.1 != 0) {
            let (part, rest) = data.split_at_mut(length);
            self.physical_read(gpa, part);
            data = rest;
        }
        Ok(())
    }

    #[cold]
    #[inline(never)]
    fn store_slow(&mut self, first: usize, linear: u64, data: &[u8]) -> Exec {
        let pieces = self.pieces(first, linear, data.len(), true)?;
        let mut data = data;
        for (gpa, length) in pieces.into_iter().filter(|piece| piece.1 != 0) {
            let (part, rest) = data.split_at(length);
            self.physical_write(gpa, part);
            data = rest;
        }
        Ok(())
    }

    /// Guest physical address of a linear one, through the table that starts at slot `first`; fills it if it is RAM.
    fn look_up(&mut self, first: usize, linear: u64, write: bool) -> Exec<u64> {
        let entry = self.mmu.entry(first, linear);
        let tag = if write { entry.write } else { entry.read };
        if (linear ^ tag) < 4096 {
            return Ok(entry.gpa & !0xfff | linear & 0xfff);
        }
        let table = first / ENTRIES;
        let access = Access {
            user: matches!(table, USER | USER_ALIGNED | FETCH_USER),
            override_smap: table == SUPERVISOR_AC,
            write,
            fetch: table == FETCH_USER || table == FETCH_SUPERVISOR,
        };
        if self.long_mode() && (linear as i64) << 16 >> 16 != linear as i64 {
            self.raised = Exception {
                vector: vector::GP,
                error: Some(0),
                non_canonical: true,
                ..Exception::default()
            };
            return Err(Raised);
        }
        let mapping = match self.walk(linear, access) {
            Ok(mapping) => mapping,
            Err(error) => {
                self.raised = Exception {
                    vector: vector::PF,
                    error: Some(error),
                    address: linear,
                    ..Exception::default()
                };
                return Err(Raised);
            }
        };
        let page = mapping.gpa & !0xfff;
        if let Some(host) = self.ram.host(page, 4096)
            && table != USER_ALIGNED
            && (!self.careful || self.watched(linear & !0xfff, 4096, true) == 0)
        {
            let writable = mapping.writable && !self.ram.code().page(page).has_code();
            self.mmu.fill(first, linear, host, &mapping, writable);
        }
        Ok(mapping.gpa)
    }

    /// Reads guest physical memory, at most 64 bytes inside one page.
    pub(crate) fn physical_read(&mut self, gpa: u64, data: &mut [u8]) {
        if let Some(host) = self.ram.host(gpa, data.len() as u64) {
            // SAFETY: `host` covers all of `data`; whole loads where the guest made one.
            unsafe {
                match data.len() {
                    2 => data.copy_from_slice(&read_host::<u16>(host).to_le_bytes()),
                    4 => data.copy_from_slice(&read_host::<u32>(host).to_le_bytes()),
                    8 => data.copy_from_slice(&read_host::<u64>(host).to_le_bytes()),
                    _ => (0..data.len()).for_each(|at| data[at] = read_host(host.add(at))),
                }
            }
        } else if !self.lapic_mmio_read(gpa, data) {
            self.exits += 1;
            self.machine.mmio_read(gpa, data);
        }
    }

    /// Writes guest physical memory, at most 64 bytes inside one page, and drops code that was there.
    pub(crate) fn physical_write(&mut self, gpa: u64, data: &[u8]) {
        if let Some(host) = self.ram.host(gpa, data.len() as u64) {
            // SAFETY: `host` covers all of `data`; whole stores where the guest made one.
            unsafe {
                match *data {
                    [a] => write_host(host, a),
                    [a, b] => write_host(host, u16::from_le_bytes([a, b])),
                    [a, b, c, d] => write_host(host, u32::from_le_bytes([a, b, c, d])),
                    [a, b, c, d, e, f, g, h] => write_host(host, u64::from_le_bytes([a, b, c, d, e, f, g, h])),
                    _ => (0..data.len()).for_each(|at| write_host(host.add(at), data[at])),
                }
            }
            if self.ram.code().written(gpa, data.len() as u64) {
                self.leave_block();
            }
        } else if !self.lapic_mmio_write(gpa, data) {
            self.exits += 1;
            self.machine.mmio_write(gpa, data);
        }
    }

    /// Replaces an operand by the first of what `change` makes of it, and returns the second; with `lock` atomically, then
    /// `change` may be called more than once.
    ///
    /// # Errors
    /// What a store to the operand raises, before `change` is called.
    #[inline(always)]
    pub fn modify<T: Size, R>(&mut self, linear: u64, lock: bool, mut change: impl FnMut(T) -> (T, R)) -> Exec<R> {
        let entry = self.mmu.entry(self.mmu.active, linear);
        let offset = linear ^ entry.write;
        if offset <= 4096 - T::BYTES {
            let pointer = entry.host.wrapping_add(offset as usize);
            if !lock {
                // SAFETY: as in `load_from`; the page is writable.
                let (new, result) = change(unsafe { read_host(pointer) });
                // SAFETY: as above.
                unsafe { write_host(pointer, new) };
                return Ok(result);
            }
            // A lock that crosses a cache line is dear, or forbidden, on the host.
            if offset % 64 <= 64 - T::BYTES {
                // SAFETY: as above.
                return Ok(unsafe { modify_atomically(pointer, change) });
            }
        }
        let mut result = None;
        self.modify_slow(linear, T::BYTES, lock, &mut |old| {
            let (new, value) = change(T::from_u64(old));
            result = Some(value);
            new.to_u64()
        })?;
        Ok(result.expect("modify_slow calls it"))
    }

    /// Replaces an operand atomically as the processor itself does in its tables.
    ///
    /// # Errors
    /// What a store with supervisor rights raises.
    pub fn modify_system<T: Size, R>(&mut self, linear: u64, change: impl FnMut(T) -> (T, R)) -> Exec<R> {
        let active = std::mem::replace(&mut self.mmu.active, SUPERVISOR * ENTRIES);
        let result = self.modify(linear, true, change);
        self.mmu.active = active;
        result
    }

    /// The operand crosses a page or a cache line, is not RAM, or lies in a page with code.
    #[cold]
    #[inline(never)]
    fn modify_slow(&mut self, linear: u64, bytes: u64, lock: bool, change: &mut dyn FnMut(u64) -> u64) -> Exec {
        let [(gpa, length), _] = self.pieces(self.mmu.active, linear, bytes as usize, true)?;
        let whole = length as u64 == bytes && linear % 64 <= 64 - bytes;
        if let Some(host) = self.ram.host(gpa, bytes).filter(|_| lock && whole) {
            // SAFETY: the bytes are RAM inside one cache line.
            unsafe {
                match bytes {
                    1 => modify_atomically(host, |old: u8| (change(old.into()) as u8, ())),
                    2 => modify_atomically(host, |old: u16| (change(old.into()) as u16, ())),
                    4 => modify_atomically(host, |old: u32| (change(old.into()) as u32, ())),
                    _ => modify_atomically(host, |old: u64| (change(old), ())),
                }
            }
            if self.ram.code().written(gpa, bytes) {
                self.leave_block();
            }
            return Ok(());
        }
        // Split locks exclude each other; Linux forbids them where it can.
        static SPLIT: std::sync::Mutex<()> = std::sync::Mutex::new(());
        let guard = lock.then(|| SPLIT.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
        let mut data = [0; 8];
        let data = &mut data[..bytes as usize];
        self.load_slow(self.mmu.active, linear, data)?;
        let mut word = [0; 8];
        word[..data.len()].copy_from_slice(data);
        let new = change(u64::from_le_bytes(word)).to_le_bytes();
        self.store_slow(self.mmu.active, linear, &new[..data.len()])?;
        drop(guard);
        Ok(())
    }

    /// Loads any number of bytes; all their pages are translated before the first is read.
    ///
    /// # Errors
    /// What the access raises.
    pub fn load_bytes(&mut self, linear: u64, data: &mut [u8]) -> Exec {
        debug_assert!(data.len() <= 4096);
        self.load_slow(self.mmu.active, linear, data)
    }

    /// Stores any number of bytes up to a page, all or none.
    ///
    /// # Errors
    /// What the access raises.
    pub fn store_bytes(&mut self, linear: u64, data: &[u8]) -> Exec {
        debug_assert!(data.len() <= 4096);
        self.store_slow(self.mmu.active, linear, data)
    }

    /// Host address for a read-modify-write of one operand: `None` (with the rights checked) if it crosses a page, is
    /// not RAM, or lies in a page with code.
    #[inline(always)]
    pub fn rmw<T: Size>(&mut self, linear: u64) -> Exec<Option<*mut T>> {
        let entry = self.mmu.entry(self.mmu.active, linear);
        let offset = linear ^ entry.write;
        if offset <= 4096 - T::BYTES {
            return Ok(Some(entry.host.wrapping_add(offset as usize).cast()));
        }
        Ok(self.host_range(linear, T::BYTES, true)?.map(<*mut u8>::cast))
    }

    /// Host address of `length` bytes for the current privilege level, on [`Core::rmw`]'s conditions. Raises what an
    /// access to the bytes' one or two pages would.
    #[inline(always)]
    pub fn host_range(&mut self, linear: u64, length: u64, write: bool) -> Exec<Option<*mut u8>> {
        let entry = self.mmu.entry(self.mmu.active, linear);
        let offset = linear ^ if write { entry.write } else { entry.read };
        if offset < 4096 && length <= 4096 - offset {
            return Ok(Some(entry.host.wrapping_add(offset as usize)));
        }
        self.host_range_slow(linear, length, write)
    }

    #[cold]
    #[inline(never)]
    fn host_range_slow(&mut self, linear: u64, length: u64, write: bool) -> Exec<Option<*mut u8>> {
        let first = self.mmu.active;
        let [_, (_, second)] = self.pieces(first, linear, length.clamp(1, 4096) as usize, write)?;
        let entry = self.mmu.entry(first, linear);
        let offset = linear ^ if write { entry.write } else { entry.read };
        Ok((second == 0 && length <= 4096 && offset < 4096).then(|| entry.host.wrapping_add(offset as usize)))
    }

    /// The page of code that holds `linear`: its guest physical and host addresses, both page-aligned. Outside RAM the
    /// bus answers all ones, which is no instruction: #UD.
    #[inline]
    pub fn fetch_page(&mut self, linear: u64) -> Exec<(u64, *const u8)> {
        let first = self.fetch_table();
        let entry = self.mmu.entry(first, linear);
        if (linear ^ entry.read) < 4096 {
            return Ok((entry.gpa & !0xfff, entry.host));
        }
        self.look_up(first, linear, false)?;
        let entry = self.mmu.entry(first, linear);
        if (linear ^ entry.read) < 4096 {
            Ok((entry.gpa & !0xfff, entry.host))
        } else {
            self.raise(vector::UD)
        }
    }

    #[inline(always)]
    fn fetch_table(&self) -> usize {
        let table = if self.cpl == 3 { FETCH_USER } else { FETCH_SUPERVISOR };
        table * ENTRIES
    }

    /// [`crate::tlb::Entry::gpa`] of the page of code at `linear`, which was just fetched from.
    pub(crate) fn fetched_gpa(&self, linear: u64) -> u64 {
        self.mmu.entry(self.fetch_table(), linear).gpa
    }

    /// True if the page of code at `linear`, which was just fetched from, is mapped globally.
    pub(crate) fn fetched_globally(&self, linear: u64) -> bool {
        self.fetched_gpa(linear) & GLOBAL != 0
    }

    /// log2 of the size of the page of code at `linear`, which was just fetched from.
    pub(crate) fn fetched_shift(&self, linear: u64) -> u8 {
        (self.fetched_gpa(linear) & 0x3f) as u8
    }

    /// After a translated access found no tag: fills the slot. False if that does not help: the access faults, is not to
    /// RAM, writes to a page with code, or crosses the page's end, as its tag is there.
    pub(crate) fn fill_for_translated(&mut self, linear: u64, wanted: Wanted) -> bool {
        let known = |core: &Self| {
            let entry = core.mmu.entry(core.mmu.active, linear);
            let tag = if wanted == Wanted::Read {
                entry.read
            } else {
                entry.write
            };
            (linear ^ tag) < 4096
        };
        !known(self) && (self.look_up(self.mmu.active, linear, wanted == Wanted::Write)).is_ok() && known(self)
    }

    /// Derives what is kept for speed from CR0, CR4, EFER, XCR0, DR7, the segments, the system flags and the debugger's
    /// wishes: to be called after any change.
    pub fn update_mode(&mut self) {
        let (protected, v86) = (self.protected(), self.virtual_8086());
        let code = self.segments[seg::CS].access;
        self.cpl = match (protected, v86) {
            (false, _) => 0,
            (true, true) => 3,
            (true, false) => (self.segments[seg::SS].access >> 5 & 3) as u8,
        };
        self.code_size = if protected && self.long_mode() && code & 1 << 13 != 0 {
            CodeSize::Bits64
        } else if code & 1 << 14 != 0 && !v86 {
            CodeSize::Bits32
        } else {
            CodeSize::Bits16
        };
        let table = match self.cpl {
            3 if self.system_flags & flag::AC != 0 && self.cr[0] & 1 << 18 != 0 => USER_ALIGNED,
            3 => USER,
            _ if self.system_flags & flag::AC != 0 => SUPERVISOR_AC,
            _ => SUPERVISOR,
        };
        self.mmu.active = table * ENTRIES;
        let (em, ts) = (self.cr[0] & 1 << 2 != 0, self.cr[0] & 1 << 3 != 0);
        let sse = ts || em || self.cr[4] & 1 << 9 == 0;
        let avx = ts || self.cr[4] & 1 << 18 == 0 || self.vector.xcr0 & 6 != 6 || !protected || v86;
        let avx512 = avx || self.vector.xcr0 & xsave::AVX512 != xsave::AVX512;
        let vex = !protected || v86;
        self.fpu_blocked =
            u8::from(sse) | u8::from(avx) << 1 | u8::from(em || ts) << 2 | u8::from(vex) << 3 | u8::from(avx512) << 7;
        let debugger = self.debug.single_step || !self.debug.breakpoints.is_empty();
        let watched = debugger || self.dr[7] & 0xff != 0;
        if !watched {
            // It holds back nothing. All returns from faults set it.
            self.system_flags &= !flag::RF;
        }
        self.careful = watched || self.system_flags & flag::TF != 0;
        self.leave_block();
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use posada_engine::NoDevices;
    use posada_memory::GuestRam;
    use std::sync::Arc;

    pub(crate) fn core() -> Box<Core> {
        let ram = Arc::new(GuestRam::new(1 << 20).unwrap());
        let mut core = Core::new(ram, Arc::new(NoDevices), Default::default());
        // 4-level tables at 0x1000; linear pages 0 and 1 lead to 0x8000 and 0x9000.
        core.cr = [0x8001_0033, 0, 0, 0x1000, 0x20];
        core.msr.efer = 0xd00;
        for (at, entry) in [
            (0x1000, 0x2007),
            (0x2000, 0x3007),
            (0x3000, 0x4007),
            (0x4000, 0x8007),
            (0x4008, 0x9007),
        ] {
            put(&mut core, at, entry);
        }
        core.segments[seg::CS].access = 0xa09b;
        core.update_mode();
        core
    }

    fn put(core: &mut Core, gpa: u64, value: u64) {
        core.physical_write(gpa, &value.to_le_bytes());
        core.mmu.flush();
    }

    fn get(core: &mut Core, gpa: u64) -> u64 {
        let mut bytes = [0; 8];
        core.physical_read(gpa, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    fn user(core: &mut Core) {
        core.segments[seg::SS].access = 0xf3;
        core.update_mode();
    }

    #[test]
    fn accessed_and_dirty_bits_follow_use() {
        let mut core = core();
        assert_eq!(core.load::<u32>(0x10), Ok(0));
        assert_eq!(get(&mut core, 0x4000), 0x8027);
        assert_eq!(core.store(0x10, 7u32), Ok(()));
        assert_eq!(get(&mut core, 0x4000), 0x8067);
        assert_eq!(get(&mut core, 0x2000), 0x3027);
        assert_eq!(core.load::<u32>(0x10), Ok(7));
    }

    #[test]
    fn tables_of_compatibility_mode_may_cross_pages_above_4_gib() {
        let mut core = core();
        // Linear 1_0000_0000h leads to the same pages as 0.
        put(&mut core, 0x2020, 0x3007);
        core.code_size = CodeSize::Bits32;
        assert_eq!(core.store_system(0x1_0000_0ffc, 0x1122_3344_5566_7788u64), Ok(()));
        put(&mut core, 0x2000, 0);
        assert_eq!(core.load_system::<u64>(0x1_0000_0ffc), Ok(0x1122_3344_5566_7788));
    }

    #[test]
    fn an_access_across_pages_faults_before_it_stores() {
        let mut core = core();
        assert_eq!(core.store(0xffc, 0x1122_3344_5566_7788u64), Ok(()));
        assert_eq!(core.load::<u64>(0xffc), Ok(0x1122_3344_5566_7788));
        assert_eq!(get(&mut core, 0x9000), 0x1122_3344);
        put(&mut core, 0x4008, 0);
        assert!(core.store(0xffc, 0u64).is_err());
        assert_eq!(
            (core.raised.vector, core.raised.error, core.raised.address),
            (14, Some(2), 0x1000)
        );
        assert_eq!(core.load::<u32>(0xffc), Ok(0x5566_7788));
    }

    #[test]
    fn rights_give_the_manuals_error_codes() {
        let mut core = core();
        user(&mut core);
        put(&mut core, 0x4000, 0x8003);
        assert!(core.load::<u8>(0).is_err());
        assert_eq!(core.raised.error, Some(5));
        assert_eq!(core.load_system::<u8>(0), Ok(0));
        put(&mut core, 0x4000, 0x8005 | 1 << 63);
        assert!(core.store(0, 1u8).is_err());
        assert_eq!(core.raised.error, Some(7));
        assert!(core.fetch_page(0).is_err());
        assert_eq!(core.raised.error, Some(0x15));
        put(&mut core, 0x4000, 0x8007 | 1 << 50);
        assert!(core.load::<u8>(0).is_err());
        assert_eq!(core.raised.error, Some(0xd));
        assert!(core.load::<u8>(1 << 47).is_err());
        assert_eq!(core.raised.vector, vector::GP);
    }

    #[test]
    fn smap_bars_the_kernel_unless_ac_is_set() {
        let mut core = core();
        core.cr[4] |= 1 << 21;
        core.update_mode();
        assert!(core.load::<u8>(0).is_err());
        assert_eq!(core.raised.error, Some(1));
        core.system_flags |= flag::AC;
        core.update_mode();
        assert_eq!(core.load::<u8>(0), Ok(0));
        assert!(core.load_system::<u8>(0).is_err());
    }

    #[test]
    fn large_pages_and_their_flush() {
        let mut core = core();
        put(&mut core, 0x3000, 0x87);
        assert_eq!(core.translate(0x1_2345), Some(0x1_2345));
        assert_eq!(core.store(0x1_2345, 9u8), Ok(()));
        assert_eq!(core.load::<u8>(0x1_2345), Ok(9));
        core.physical_write(0x3000, &[0; 8]);
        core.mmu.flush_page(0x1f_f000);
        assert!(core.load::<u8>(0x1_2345).is_err());
    }

    #[test]
    fn a_store_over_code_leaves_the_block() {
        let mut core = core();
        core.ram.code().page(0x8000).mark(0x40, 16);
        let before = core.ram.code().page(0x8000).version();
        core.stop_at = 1;
        assert_eq!(core.store(0x44, 1u8), Ok(()));
        assert_eq!(core.stop_at, 0);
        assert_ne!(core.ram.code().page(0x8000).version(), before);
        assert!(core.rmw::<u8>(0x44).unwrap().is_some(), "overwritten code is data");
        core.ram.code().page(0x8000).mark(0x40, 16);
        core.mmu.forbid_writes(0x8000);
        assert_eq!(core.rmw::<u8>(0x44), Ok(None));
        assert!(core.rmw::<u8>(0x1044).unwrap().is_some());
    }
}
