//! A virtqueue as a device sees it: checked chains out, used buffers in, notifications as the driver wants them.

use super::{Interrupt, Signal};
use posada_memory::GuestRam;
use std::sync::Arc;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

/// VIRTQ_AVAIL_F_NO_INTERRUPT.
const NO_INTERRUPT: u16 = 1;
/// Chains of a queue before the next one has its turn.
const TURN: u16 = 8;

/// The driver broke the rules of the ring; nothing in it can be trusted until a reset.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// The ring's own indices or memory.
    #[error("the ring is inconsistent: {0}")]
    Ring(#[from] virtio_queue::Error),
    /// A chain that loops, leaves RAM, ends early or mixes directions.
    #[error("descriptor chain {0} is malformed")]
    Chain(u16),
}

/// Buffers in guest RAM, in order: what a chain offers in one direction.
#[derive(Clone, Debug, Default)]
pub struct Segments(Vec<(u64, u32)>);

impl Segments {
    /// Total bytes.
    pub fn length(&self) -> u64 {
        self.0.iter().map(|(_, length)| u64::from(*length)).sum()
    }

    /// Guest physical address and bytes of each buffer; all of it is RAM.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u32)> + '_ {
        self.0.iter().copied()
    }

    /// Cuts off the first `count` bytes (or all there are) and returns them.
    pub fn take(&mut self, count: u64) -> Segments {
        let mut taken = Vec::new();
        let (mut left, mut whole) = (count, 0);
        for (gpa, length) in &mut self.0 {
            let part = left.min((*length).into()) as u32;
            if part > 0 {
                taken.push((*gpa, part));
            }
            left -= u64::from(part);
            if part < *length {
                *gpa += u64::from(part);
                *length -= part;
                break;
            }
            whole += 1;
        }
        self.0.drain(..whole);
        Segments(taken)
    }

    /// Reads exactly `bytes.len()` bytes from the front and cuts them off; false if there are fewer.
    pub fn read(&mut self, ram: &GuestRam, bytes: &mut [u8]) -> bool {
        let part = self.take(bytes.len() as u64);
        let mut at = 0;
        for (gpa, length) in part.iter() {
            let end = at + length as usize;
            if ram.memory().read_slice(&mut bytes[at..end], GuestAddress(gpa)).is_err() {
                return false;
            }
            at = end;
        }
        at == bytes.len()
    }

    /// Writes as much of `bytes` as fits to the front and cuts it off; returns the number of bytes.
    pub fn write(&mut self, ram: &GuestRam, bytes: &[u8]) -> usize {
        let part = self.take(bytes.len() as u64);
        let mut at = 0;
        for (gpa, length) in part.iter() {
            let end = at + length as usize;
            if ram.memory().write_slice(&bytes[at..end], GuestAddress(gpa)).is_err() {
                break;
            }
            at = end;
        }
        at
    }
}

/// A request: every buffer lies in RAM, what the device reads comes before what it writes.
#[derive(Clone, Debug)]
pub struct Chain {
    /// For the used ring.
    pub head: u16,
    /// What the device reads.
    pub readable: Segments,
    /// What the device writes.
    pub writable: Segments,
}

/// One queue of an active device.
pub struct VirtQueue {
    queue: Queue,
    ram: Arc<GuestRam>,
    interrupt: Arc<Interrupt>,
    index: u16,
}

impl VirtQueue {
    pub(super) fn new(queue: Queue, ram: Arc<GuestRam>, interrupt: Arc<Interrupt>, index: u16) -> Self {
        Self {
            queue,
            ram,
            interrupt,
            index,
        }
    }

    /// Guest RAM.
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// How far the device has got: chains taken and given back, both modulo 65,536.
    pub(super) fn positions(&self) -> (u16, u16) {
        (self.queue.next_avail(), self.queue.next_used())
    }

    /// The next chain, if there is one.
    ///
    /// # Errors
    /// [`Broken`], after which the queue must not be used.
    pub fn pop(&mut self) -> Result<Option<Chain>, Broken> {
        if !self.queue.ready() {
            return Ok(None);
        }
        let Some(descriptors) = self.queue.iter(self.ram.memory())?.next() else {
            return Ok(None);
        };
        let head = descriptors.head_index();
        let mut chain = Chain {
            head,
            readable: Segments::default(),
            writable: Segments::default(),
        };
        // The iterator stops at loops, bad indices and nested tables; only a descriptor without a successor ends a chain.
        let mut complete = false;
        for descriptor in descriptors {
            let (gpa, length) = (descriptor.addr().0, descriptor.len());
            let wrong_order = !descriptor.is_write_only() && !chain.writable.0.is_empty();
            if wrong_order || !self.ram.contains(gpa, length.into()) {
                return Err(Broken::Chain(head));
            }
            let segments = if descriptor.is_write_only() {
                &mut chain.writable
            } else {
                &mut chain.readable
            };
            if length > 0 {
                segments.0.push((gpa, length));
            }
            complete = !descriptor.has_next();
        }
        if complete {
            Ok(Some(chain))
        } else {
            Err(Broken::Chain(head))
        }
    }

    /// The chain that [`VirtQueue::pop`] gave last was not needed: it is the next again.
    pub fn put_back(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Gives a chain back, `written` bytes of it written, and interrupts the driver if it wants that.
    ///
    /// # Errors
    /// [`Broken`] if the used ring is not in RAM.
    pub fn push(&mut self, head: u16, written: u32) -> Result<(), Broken> {
        let memory = self.ram.memory();
        self.queue.add_used(memory, head, written)?;
        let wanted = if self.queue.event_idx_enabled() {
            self.queue.needs_notification(memory)?
        } else {
            // The driver's flag must be read after the used index is written.
            std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
            self.available_word(0).is_none_or(|flags| flags & NO_INTERRUPT == 0)
        };
        if wanted {
            self.interrupt.queue(self.index);
        }
        Ok(())
    }

    /// The 16-bit word at `offset` of the available ring.
    fn available_word(&self, offset: u64) -> Option<u16> {
        let at = self.queue.avail_ring().checked_add(offset)?;
        self.ram.memory().read_obj(GuestAddress(at)).ok().map(u16::from_le)
    }

    /// Interrupts the driver if it may still wait to hear of a chain that it has back. For a queue that was saved: a message
    /// may have been on its way to a processor whose state was taken already. One too many does no harm.
    pub(super) fn remind(&self) {
        if !self.queue.ready() {
            return;
        }
        let used = self.queue.next_used();
        let waits = if self.queue.event_idx_enabled() {
            // The driver wants to hear of the chain of this number, and that is behind us.
            let event = self.available_word(4 + 2 * u64::from(self.queue.size()));
            event.is_some_and(|event| used.wrapping_sub(event).wrapping_sub(1) < 1 << 15)
        } else {
            used != 0 && self.available_word(0).is_some_and(|flags| flags & NO_INTERRUPT == 0)
        };
        if waits {
            self.interrupt.queue(self.index);
        }
    }

    /// Asks for a notification of the next chain; true if one came meanwhile.
    ///
    /// # Errors
    /// [`Broken`] if the used ring is not in RAM.
    pub fn enable_notification(&mut self) -> Result<bool, Broken> {
        Ok(self.queue.ready() && self.queue.enable_notification(self.ram.memory())?)
    }

    /// Asks for no notifications.
    ///
    /// # Errors
    /// [`Broken`] if the used ring is not in RAM.
    pub fn disable_notification(&mut self) -> Result<(), Broken> {
        if self.queue.ready() {
            self.queue.disable_notification(self.ram.memory())?;
        }
        Ok(())
    }

    /// Serves chains until there are none or `signal` says stop; `serve` returns the bytes it wrote.
    ///
    /// # Errors
    /// [`Broken`], also from `serve`.
    pub fn drain(
        &mut self,
        signal: &Signal,
        mut serve: impl FnMut(&GuestRam, Chain) -> Result<u32, Broken>,
    ) -> Result<(), Broken> {
        while self.turn(signal, u16::MAX, &mut serve)? {}
        Ok(())
    }

    /// The same for several queues, by turns: none waits long for a full one.
    ///
    /// # Errors
    /// [`Broken`], also from `serve`.
    pub fn drain_all(
        queues: &mut [Self],
        signal: &Signal,
        mut serve: impl FnMut(&GuestRam, Chain) -> Result<u32, Broken>,
    ) -> Result<(), Broken> {
        loop {
            let mut more = false;
            for queue in &mut *queues {
                more |= queue.turn(signal, TURN, &mut serve)?;
            }
            if !more || signal.stopping() {
                return Ok(());
            }
        }
    }

    /// Serves up to `most` chains. True: there may be more, and the driver will not ring for them.
    fn turn(
        &mut self,
        signal: &Signal,
        most: u16,
        serve: &mut impl FnMut(&GuestRam, Chain) -> Result<u32, Broken>,
    ) -> Result<bool, Broken> {
        // With EVENT_IDX there is nothing to do for that: the driver rings only for the chain that was asked for.
        self.disable_notification()?;
        for _ in 0..most {
            if signal.stopping() {
                return Ok(false);
            }
            let Some(chain) = self.pop()? else {
                return self.enable_notification();
            };
            let head = chain.head;
            let written = serve(&self.ram, chain)?;
            self.push(head, written)?;
        }
        Ok(true)
    }
}
