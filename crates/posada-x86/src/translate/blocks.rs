//! Translated blocks: found by where they lie and in which mode they run, linked to each other, forgotten with their page or
//! with their part of the cache.

use super::cache::{CodeCache, Layout, PARTS};
use super::help::Helped;
use super::relocation::Shape;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;

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

    /// The same for all blocks of this code, wherever it is mapped.
    pub fn anywhere(&self) -> Self {
        Self {
            rip: self.rip & 0xfff,
            ..*self
        }
    }

    /// The guest physical page.
    pub fn page(&self) -> u64 {
        self.page & !0xfff
    }

    /// The mode, as [`super::frame::mode`] numbers it.
    pub fn mode(&self) -> usize {
        (self.page & 3) as usize
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
    /// RIP of its target.
    pub rip: u64,
    /// It leads to a block without groups.
    pub plain: bool,
}

/// One translated block.
pub struct Block {
    /// What it is for.
    pub key: Key,
    /// Address of its code, which compares R10 with RIP first.
    pub start: u64,
    /// What was read of it.
    pub source: Source,
    /// What its code is like.
    pub shape: Arc<Shape>,
    /// RIPs of its instructions and of what follows them, with the arithmetic flags that are wanted before each; in check
    /// mode only.
    pub wanted: Box<[(u64, u8)]>,
    /// Instructions that its code names.
    pub helped: Box<[Helped]>,
    /// Branches that lead here.
    incoming: Vec<Incoming>,
}

/// A branch that was led to a block.
struct Incoming {
    branch: Branch,
    /// Its block's part, and how often that had been emptied: while it still is, the branch is there.
    part: usize,
    emptied: u64,
}

/// A block's number: its part of the cache, and its place in the order of that part's code.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Number {
    part: u32,
    place: u32,
}

/// The blocks of a part of the cache.
#[derive(Default)]
struct Part {
    /// In the order of their code.
    blocks: Vec<Block>,
    /// How often it was emptied.
    emptied: u64,
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
pub struct Made {
    /// Address of the code, which compares R10 with RIP first.
    pub start: u64,
    /// What the code is like.
    pub shape: Arc<Shape>,
    /// [`Block::wanted`].
    pub wanted: Box<[(u64, u8)]>,
    /// Instructions that the code names.
    pub helped: Box<[Helped]>,
}

impl Block {
    /// Guest physical pages with code of it.
    fn pages(&self) -> impl Iterator<Item = u64> + use<> {
        let next = self.source.next.map(|(page, _)| page);
        [Some(self.key.page()), next].into_iter().flatten()
    }

    /// Address of the code behind the comparison of RIP.
    pub fn entry(&self) -> u64 {
        self.start + u64::from(self.shape.entry)
    }

    /// A block that nothing leads to yet.
    pub fn new(key: Key, source: Source, made: Made) -> Self {
        Self {
            key,
            start: made.start,
            source,
            shape: made.shape,
            wanted: made.wanted,
            helped: made.helped,
            incoming: Vec::new(),
        }
    }
}

/// The blocks of one cache.
pub struct Blocks {
    layout: Layout,
    parts: [Part; PARTS],
    by_key: Map<Key, Number>,
    /// By [`Key::anywhere`], the youngest.
    anywhere: Map<Key, Number>,
    by_page: Map<u64, Vec<Number>>,
}

impl Blocks {
    /// None, of a cache of this layout.
    pub fn new(layout: Layout) -> Self {
        Self {
            layout,
            parts: Default::default(),
            by_key: Map::default(),
            anywhere: Map::default(),
            by_page: Map::default(),
        }
    }

    /// The block for a key.
    pub fn find(&self, key: &Key) -> Option<Number> {
        self.by_key.get(key).copied()
    }

    /// A block for the same code, wherever that is mapped.
    pub fn find_anywhere(&self, key: &Key) -> Option<Number> {
        self.anywhere.get(&key.anywhere()).copied()
    }

    /// A block by its number.
    pub fn get(&self, number: Number) -> &Block {
        &self.parts[number.part as usize].blocks[number.place as usize]
    }

    fn get_mut(&mut self, number: Number) -> &mut Block {
        &mut self.parts[number.part as usize].blocks[number.place as usize]
    }

    /// Adds a block; its code lies behind that of all others of its part.
    pub fn add(&mut self, block: Block) -> Number {
        let part = self.layout.part(block.start);
        let blocks = &mut self.parts[part].blocks;
        debug_assert!(blocks.last().is_none_or(|last| last.start < block.start));
        let number = Number {
            part: part as u32,
            place: blocks.len() as u32,
        };
        self.by_key.insert(block.key, number);
        self.anywhere.insert(block.key.anywhere(), number);
        for page in block.pages() {
            self.by_page.entry(page).or_default().push(number);
        }
        blocks.push(block);
        number
    }

    /// The block whose code is at `address`.
    pub fn at(&self, address: u64) -> &Block {
        let blocks = &self.parts[self.layout.part(address)].blocks;
        let place = blocks.partition_point(|block| block.start <= address);
        &blocks[place - 1]
    }

    /// RIP of the instruction whose code is at `address`, and whether the Core holds the flags there.
    pub fn instruction(&self, address: u64) -> (u64, bool) {
        let block = self.at(address);
        let offset = address - block.start;
        let marks = &block.shape.marks;
        let number = marks.partition_point(|mark| u64::from(mark.code) <= offset);
        let mark = marks[number.saturating_sub(1)];
        (block.key.rip.wrapping_add(mark.guest.into()), mark.saved)
    }

    /// The branch whose exit is at `exit`.
    pub fn branch(&self, exit: u64) -> Branch {
        let block = self.at(exit);
        let mut links = block.shape.links.iter();
        let link = links.find(|link| block.start + u64::from(link.exit) == exit);
        let link = link.expect("exits are those of branches");
        Branch {
            exit,
            site: block.start + u64::from(link.site),
            rip: block.key.rip.wrapping_add(link.target as u64),
            plain: link.plain,
        }
    }

    /// If the check at `start` is one for several accesses, lets it lead to a block without groups when it fails.
    pub fn give_up(&self, start: u64, cache: &mut CodeCache) -> bool {
        let block = self.at(start);
        let address = |offset: u16| block.start + u64::from(offset);
        let mut checks = block.shape.checks.iter();
        let check = checks.find(|check| address(check.start) == start);
        if let Some(check) = check {
            cache.patch(address(check.site), address(check.plain));
        }
        check.is_some()
    }

    /// Lets a branch lead to a block.
    pub fn link(&mut self, branch: Branch, target: Number, cache: &mut CodeCache) {
        let part = self.layout.part(branch.site);
        let emptied = self.parts[part].emptied;
        let target = self.get_mut(target);
        cache.patch(branch.site, target.entry());
        target.incoming.push(Incoming { branch, part, emptied });
    }

    /// Nothing leads to a block any longer, and it is not found. Its code stays where it is.
    fn forget(&mut self, number: Number, cache: &mut CodeCache, forget: &mut impl FnMut(&Block)) {
        forget(self.get(number));
        let block = self.get_mut(number);
        let (key, incoming) = (block.key, std::mem::take(&mut block.incoming));
        for Incoming { branch, part, emptied } in incoming {
            if self.parts[part].emptied == emptied {
                cache.patch(branch.site, branch.exit);
            }
        }
        for (map, key) in [(&mut self.by_key, key), (&mut self.anywhere, key.anywhere())] {
            if map.get(&key) == Some(&number) {
                map.remove(&key);
            }
        }
    }

    fn leave_page(&mut self, page: u64, number: Number) {
        if let Some(numbers) = self.by_page.get_mut(&page) {
            numbers.retain(|&other| other != number);
            if numbers.is_empty() {
                self.by_page.remove(&page);
            }
        }
    }

    /// Forgets the blocks with code of `page` that has changed: its version, as that of all pages, is what `version` says.
    /// Gives how many. `forget` is told of each.
    pub fn forget_stale(
        &mut self,
        page: u64,
        version: impl Fn(u64) -> u32,
        cache: &mut CodeCache,
        mut forget: impl FnMut(&Block),
    ) -> u64 {
        let numbers = self.by_page.get(&page);
        let stale: Vec<Number> = numbers
            .into_iter()
            .flatten()
            .copied()
            .filter(|&number| {
                let block = self.get(number);
                !block.source.holds(block.key.page(), &version)
            })
            .collect();
        for &number in &stale {
            self.forget(number, cache, &mut forget);
            for page in self.get(number).pages() {
                self.leave_page(page, number);
            }
        }
        stale.len() as u64
    }

    /// Pages that any block has code of.
    pub fn pages(&self) -> Vec<u64> {
        self.by_page.keys().copied().collect()
    }

    /// Forgets the blocks of a part of the cache, whose code goes. `forget` is told of each.
    pub fn empty(&mut self, part: usize, cache: &mut CodeCache, mut forget: impl FnMut(&Block)) {
        for place in 0..self.parts[part].blocks.len() as u32 {
            let number = Number {
                part: part as u32,
                place,
            };
            self.forget(number, cache, &mut forget);
        }
        // A page at a time: it may have thousands of blocks.
        self.by_page.retain(|_, numbers| {
            numbers.retain(|number| number.part != part as u32);
            !numbers.is_empty()
        });
        self.parts[part].blocks.clear();
        self.parts[part].emptied += 1;
    }
}
