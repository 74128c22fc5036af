//! Code that runs seldom, put behind the block: what failed checks and exits lead to.

use super::memory::Tag;
use super::{Check, Emitter, Hole, Leave, Link, Wanted};

/// Code that runs seldom, put behind the block.
pub(super) enum Cold {
    /// A check failed; where to try again, and the tag.
    Miss { tag: Tag, wanted: Wanted },
    /// One for several accesses failed.
    MissGroup {
        tag: Tag,
        wanted: Wanted,
        rip: u64,
        saved: bool,
    },
    /// To the interpreter, or out for events.
    Leave {
        hole: Hole,
        rip: u64,
        reason: Leave,
        saved: bool,
    },
    /// The exit of a direct branch inside what is mapped together.
    Chain { hole: Hole, target: u64 },
    /// The exit of one that leads elsewhere.
    Far { hole: Hole, target: u64, live: bool },
    /// Vector registers are not there yet.
    Vectors { hole: Hole, back: usize, level: u8 },
}

impl Emitter {
    /// The exit of a branch, which may be led to its target later.
    pub(super) fn chain(&mut self, hole: Hole, target: u64, plain: bool) {
        let a = &mut self.assembler;
        a.land(hole);
        let exit = a.here();
        let own = a.address_r11();
        a.fill(own, exit);
        self.assembler.jump_to(self.stubs.leave[Leave::Chain as usize]);
        self.links.push(Link {
            exit: exit as u16,
            site: hole.0 as u16,
            target: target.wrapping_sub(self.start) as i32,
            plain,
        });
    }

    pub(super) fn finish(&mut self) {
        let mut cold = std::mem::take(&mut self.cold);
        for code in cold.drain(..) {
            let a = &mut self.assembler;
            match code {
                Cold::Miss { tag, wanted } => {
                    a.land(tag.hole);
                    self.miss(tag, wanted);
                }
                Cold::MissGroup {
                    tag,
                    wanted,
                    rip,
                    saved,
                } => {
                    a.land(tag.hole);
                    let site = a.jump();
                    a.land(site);
                    self.miss(tag, wanted);
                    self.checks.push(Check {
                        start: tag.retry as u16,
                        site: site.0 as u16,
                        plain: self.assembler.here() as u16,
                    });
                    if saved {
                        self.load_flags();
                    }
                    let hole = self.assembler.jump();
                    self.chain(hole, rip, true);
                }
                Cold::Leave {
                    hole,
                    rip,
                    reason,
                    saved,
                } => {
                    a.land(hole);
                    if saved {
                        self.load_flags();
                    }
                    self.leave(rip, reason);
                }
                Cold::Chain { hole, target } => self.chain(hole, target, false),
                Cold::Far { hole, target, live } => {
                    a.land(hole);
                    self.publish(live);
                    self.jump_far(target, self.jumps);
                }
                Cold::Vectors { hole, back, level } => {
                    a.land(hole);
                    let hole = a.address_r11();
                    a.fill(hole, back);
                    a.jump_to(self.stubs.load_vectors[usize::from(level) - 1]);
                }
            }
        }
        self.cold = cold;
    }
}
