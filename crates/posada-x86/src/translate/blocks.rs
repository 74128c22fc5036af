//! Translated blocks: found by where they lie and in which mode they run, linked to each other, forgotten with their page.

use super::cache::CodeCache;
use super::emit::{Check, Mark};
use super::help::Helped;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// What a block is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// RIP, which the code contains.
    pub rip: u64,
    /// Guest physical page, and in the low bits all else that the code depends on.
    pub page: u64,
    /// It is to have no groups.
    pub plain: bool,
}

impl Key {
    /// A key; `mode` as [`super::frame::mode`] numbers it, `blocked` what code cannot do there.
    pub fn new(rip: u64, page: u64, mode: usize, shift: u8, blocked: u8) -> Self {
        debug_assert!(page & 0xfff == 0);
        Self {
            rip,
            page: page | mode as u64 | u64::from(shift & 0x1f) << 2 | u64::from(blocked & 0x1f) << 7,
            plain: false,
        }
    }

    /// The guest physical page.
    pub fn page(&self) -> u64 {
        self.page & !0xfff
    }

    /// A number to tell keys apart by.
    pub fn mixed(&self) -> u64 {
        (self.rip ^ self.page.rotate_left(20)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }
}

/// A hasher for keys: they are no one's to choose but the guest's, for its own code.
#[derive(Default)]
pub struct Mixer(u64);

impl Hasher for Mixer {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(byte.into());
        }
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(26) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 ^= self.0 >> 32;
    }
}

/// A map by keys.
pub type Map<K, V> = HashMap<K, V, BuildHasherDefault<Mixer>>;

/// A direct branch of a block.
#[derive(Clone, Copy, Debug)]
pub struct Branch {
    /// Address of its exit.
    pub exit: u64,
    /// Address of its rel32.
    pub site: u64,
    /// It leads to a block without groups.
    pub plain: bool,
}

/// One translated block.
pub struct Block {
    /// What it is for.
    pub key: Key,
    /// Address of its code, which compares R10 with RIP first.
    pub start: u64,
    /// Address of the code behind that.
    pub entry: u64,
    /// What was read of it.
    pub source: Source,
    /// Instructions that its code names.
    _helped: Box<[Helped]>,
    marks: Box<[Mark]>,
    branches: Box<[Branch]>,
    checks: Box<[Check]>,
    /// Branches that lead here.
    incoming: Vec<Branch>,
}

/// The guest's code that a block was made from.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    /// Version of its page when it was read.
    pub version: u32,
    /// Guest physical page after that, where its last instruction ends, and its version.
    pub next: Option<(u64, u32)>,
}

impl Source {
    /// True if that code has not changed.
    pub fn holds(&self, page: u64, version: impl Fn(u64) -> u32) -> bool {
        self.version == version(page) && self.next.is_none_or(|(page, read)| read == version(page))
    }
}

/// What the emitter made.
pub struct Made<'a> {
    /// Address of the code, which compares R10 with RIP first.
    pub start: u64,
    /// Address of the code behind that.
    pub entry: u64,
    /// Where instructions begin.
    pub marks: &'a [Mark],
    /// Direct branches.
    pub branches: Box<[Branch]>,
    /// Checks for several accesses.
    pub checks: &'a [Check],
    /// Instructions that the code names.
    pub helped: Box<[Helped]>,
}

impl Block {
    /// A block that nothing leads to yet.
    pub fn new(key: Key, source: Source, made: Made) -> Self {
        Self {
            key,
            start: made.start,
            entry: made.entry,
            source,
            _helped: made.helped,
            marks: made.marks.into(),
            branches: made.branches,
            checks: made.checks.into(),
            incoming: Vec::new(),
        }
    }
}

/// The blocks of one cache.
#[derive(Default)]
pub struct Blocks {
    /// In the order of their code.
    blocks: Vec<Block>,
    by_key: Map<Key, u32>,
    by_page: Map<u64, Vec<u32>>,
}

impl Blocks {
    /// The block for a key.
    pub fn find(&self, key: &Key) -> Option<u32> {
        self.by_key.get(key).copied()
    }

    /// A block by its number.
    pub fn get(&self, number: u32) -> &Block {
        &self.blocks[number as usize]
    }

    /// Adds a block; its code lies behind that of all others.
    pub fn add(&mut self, block: Block) -> u32 {
        debug_assert!(self.blocks.last().is_none_or(|last| last.start < block.start));
        let number = self.blocks.len() as u32;
        self.by_key.insert(block.key, number);
        let next = block.source.next.map(|(page, _)| page);
        for page in [Some(block.key.page()), next].into_iter().flatten() {
            self.by_page.entry(page).or_default().push(number);
        }
        self.blocks.push(block);
        number
    }

    /// The block whose code is at `address`.
    fn at(&self, address: u64) -> &Block {
        let number = self.blocks.partition_point(|block| block.start <= address);
        &self.blocks[number - 1]
    }

    /// RIP of the instruction whose code is at `address`, and whether the Core holds the flags there.
    pub fn instruction(&self, address: u64) -> (u64, bool) {
        let block = self.at(address);
        let offset = (address - block.start) as u32;
        let number = block.marks.partition_point(|mark| mark.code <= offset);
        let mark = block.marks[number.saturating_sub(1)];
        (block.key.rip.wrapping_add(mark.guest.into()), mark.saved)
    }

    /// The branch whose exit is at `exit`.
    pub fn branch(&self, exit: u64) -> Branch {
        let branch = self.at(exit).branches.iter().find(|branch| branch.exit == exit);
        *branch.expect("exits are those of branches")
    }

    /// If the check at `address` is one for several accesses, lets it lead to a block without groups when it fails.
    pub fn give_up(&self, address: u64, cache: &mut CodeCache) -> bool {
        let block = self.at(address);
        let start = (address - block.start) as u32;
        let check = block.checks.iter().find(|check| check.start == start);
        if let Some(check) = check {
            let address = |offset: u32| block.start + u64::from(offset);
            cache.patch(address(check.site), address(check.plain));
        }
        check.is_some()
    }

    /// Lets a branch lead to a block.
    pub fn link(&mut self, branch: Branch, target: u32, cache: &mut CodeCache) {
        let target = &mut self.blocks[target as usize];
        cache.patch(branch.site, target.entry);
        target.incoming.push(branch);
    }

    /// Forgets the blocks of each page whose version is another than `version` says. True if there were any.
    pub fn forget_stale(&mut self, version: impl Fn(u64) -> u32, cache: &mut CodeCache) -> bool {
        let (blocks, by_key) = (&mut self.blocks, &mut self.by_key);
        let mut any = false;
        self.by_page.retain(|_, numbers| {
            numbers.retain(|&number| {
                let block = &mut blocks[number as usize];
                if block.source.holds(block.key.page(), &version) {
                    return true;
                }
                any = true;
                for branch in std::mem::take(&mut block.incoming) {
                    cache.patch(branch.site, branch.exit);
                }
                if by_key.get(&block.key) == Some(&number) {
                    by_key.remove(&block.key);
                }
                false
            });
            !numbers.is_empty()
        });
        any
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        *self = Self::default();
    }
}
