//! Which slots of a table are in use, so that forgetting costs what was used: those of global mappings apart from the others.

/// Slots in use, or that were when something was last forgotten.
pub(crate) struct Filled {
    /// Of mappings that are not global, and of global ones.
    lists: [Vec<u32>; 2],
    /// In which lists a slot is, a bit for each.
    listed: Vec<u8>,
}

impl Filled {
    /// None of `slots` slots.
    pub fn new(slots: usize) -> Self {
        Self {
            lists: Default::default(),
            listed: vec![0; slots],
        }
    }

    /// A slot was filled.
    pub fn add(&mut self, slot: usize, global: bool) {
        let list = usize::from(global);
        if self.listed[slot] >> list & 1 == 0 {
            self.listed[slot] |= 1 << list;
            self.lists[list].push(slot as u32);
        }
    }

    /// Goes through slots that are not global, and those that may have been before they were filled anew, and forgets them.
    pub fn drain_context(&mut self, mut each: impl FnMut(usize)) {
        for slot in self.lists[0].drain(..) {
            self.listed[slot as usize] &= !1;
            each(slot as usize);
        }
    }

    /// Goes through all, some perhaps twice, and forgets them.
    pub fn drain(&mut self, mut each: impl FnMut(usize)) {
        for slot in self.lists.iter_mut().flat_map(|list| list.drain(..)) {
            self.listed[slot as usize] = 0;
            each(slot as usize);
        }
    }

    /// All, some perhaps twice.
    pub fn iter(&self) -> impl Iterator<Item = usize> {
        self.lists.iter().flatten().map(|&slot| slot as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(filled: &Filled) -> Vec<usize> {
        filled.iter().collect()
    }

    #[test]
    fn a_slot_is_in_a_list_once_however_often_it_changes() {
        let mut filled = Filled::new(8);
        for _ in 0..100 {
            filled.add(3, false);
            filled.add(3, true);
        }
        assert_eq!(all(&filled), [3, 3]);
        filled.add(5, true);
        let mut seen = Vec::new();
        filled.drain_context(|slot| seen.push(slot));
        assert_eq!((seen, all(&filled)), (vec![3], vec![3, 5]));
        filled.add(3, false);
        assert_eq!(all(&filled), [3, 3, 5]);
        filled.drain(|_| {});
        assert!(all(&filled).is_empty());
        filled.add(5, true);
        assert_eq!(all(&filled), [5]);
    }
}
