//! virtio-vsock (virtio 1.2 section 5.10), stream sockets: programs of the guest and of the host connect to each other without
//! a network. The host's side are Unix sockets ([`unix`]).
//!
//! The device's thread does all of it and never waits for either side. [`packet`], [`connection`] and [`switch`] know the
//! protocol and no system call. Connections end with the driver's reset and are not part of a snapshot: a restored guest is told
//! that they are gone.

pub mod connection;
pub mod packet;
pub mod switch;
pub mod unix;

use super::{Broken, DeviceState, Signal, VirtQueue, VirtioDevice};
use crate::state::StateError;
use connection::WINDOW;
use packet::{HEADER, Header};
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use switch::Switch;
use unix::{HostEvent, HostStream, UnixHost};

/// VIRTIO_VSOCK_F_STREAM.
const STREAM: u64 = 1;
const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;
/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET.
const TRANSPORT_RESET: u32 = 0;
/// Packets of one direction before the other has its turn.
const TURN: usize = 32;
/// Bytes of data in the largest packet to the guest.
const MOST_DATA: u64 = 64 << 10;

/// What a vsock keeps for its guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    /// The guest's context id.
    pub cid: u64,
}

/// The device.
pub struct Vsock {
    cid: u64,
    /// Tells of work from the host.
    host: Arc<OwnedFd>,
    traffic: Mutex<Traffic>,
    /// The guest's connections are gone, and it does not know.
    owes_reset: AtomicBool,
}

struct Traffic {
    switch: Switch<HostStream>,
    host: UnixHost,
    /// Data of one packet.
    data: Vec<u8>,
}

/// Whether a guest can have this context id: 0 to 2 and the largest are reserved.
pub fn is_guest_cid(cid: u64) -> bool {
    (3..u32::MAX.into()).contains(&cid)
}

impl Vsock {
    /// A device for a guest with this context id. Programs of the host come to `listener`, which listens at `path`.
    ///
    /// # Errors
    /// When the process has no file descriptor left.
    pub fn new(cid: u64, listener: UnixListener, path: &Path) -> io::Result<Arc<Self>> {
        let host = UnixHost::new(listener, path)?;
        Ok(Arc::new(Self {
            cid,
            host: Arc::clone(host.epoll()),
            traffic: Mutex::new(Traffic {
                switch: Switch::new(cid),
                host,
                data: vec![0; WINDOW as usize],
            }),
            owes_reset: AtomicBool::new(false),
        }))
    }

    /// Tells the guest that its connections are gone, once it has a buffer for that.
    fn announce(&self, queue: &mut VirtQueue) -> Result<(), Broken> {
        while self.owes_reset.load(Ordering::Relaxed) {
            let Some(mut chain) = queue.pop()? else {
                if queue.enable_notification()? {
                    continue;
                }
                break;
            };
            let ram = Arc::clone(queue.ram());
            let written = chain.writable.write(&ram, &TRANSPORT_RESET.to_le_bytes());
            queue.push(chain.head, written as u32)?;
            self.owes_reset.store(false, Ordering::Relaxed);
        }
        Ok(())
    }
}

impl Traffic {
    fn clear(&mut self) {
        self.switch.clear();
        self.host.clear();
    }

    /// Takes what has come from the host's side.
    fn poll(&mut self) {
        for event in self.host.poll(self.switch.room_for_host()) {
            match event {
                HostEvent::Connect(token, stream, port) => self.switch.open(token, stream, port),
                HostEvent::Ready(token, now) => self.switch.ready(token, now),
            }
        }
    }

    /// Does some of what there is to do. True: there may be more.
    fn turn(&mut self, queues: &mut [VirtQueue], signal: &Signal) -> Result<bool, Broken> {
        self.poll();
        let received = self.receive(&mut queues[TX], signal)?;
        let sent = self.send(&mut queues[RX], signal)?;
        Ok(received || sent || self.host.can_accept(self.switch.room_for_host()))
    }

    /// Takes packets from the guest. True: there may be more, and the driver will not ring for them.
    fn receive(&mut self, queue: &mut VirtQueue, signal: &Signal) -> Result<bool, Broken> {
        let ram = Arc::clone(queue.ram());
        queue.disable_notification()?;
        for _ in 0..TURN {
            // When the guest has taken packets, we come here again.
            if signal.stopping() || !self.switch.can_receive() {
                return Ok(false);
            }
            let Some(mut chain) = queue.pop()? else {
                return queue.enable_notification();
            };
            let mut header = [0; HEADER];
            if chain.readable.read(&ram, &mut header) {
                let packet = Header::decode(&header);
                let length = u64::from(packet.length).min(WINDOW.into()).min(chain.readable.length());
                let data = &mut self.data[..length as usize];
                if chain.readable.read(&ram, data) {
                    self.switch.receive(&packet, data, |port| self.host.dial(port));
                }
            }
            queue.push(chain.head, 0)?;
        }
        Ok(true)
    }

    /// Gives packets to the guest while it has buffers. True: there was something. Notifications of buffers are wanted only
    /// while there is something for which there are none.
    fn send(&mut self, queue: &mut VirtQueue, signal: &Signal) -> Result<bool, Broken> {
        let ram = Arc::clone(queue.ram());
        queue.disable_notification()?;
        let mut count = 0;
        while self.switch.has_to_send() && count < TURN && !signal.stopping() {
            let Some(mut chain) = queue.pop()? else {
                if queue.enable_notification()? {
                    queue.disable_notification()?;
                    continue;
                }
                break;
            };
            let Some(room) = chain.writable.length().checked_sub(HEADER as u64) else {
                return Err(Broken::Chain(chain.head));
            };
            let room = room.min(MOST_DATA) as usize;
            let Some(packet) = self.switch.send(&mut self.data[..room]) else {
                queue.put_back();
                break;
            };
            let data = &self.data[..packet.length as usize];
            let mut written = chain.writable.write(&ram, &packet.encode());
            written += chain.writable.write(&ram, data);
            queue.push(chain.head, written as u32)?;
            count += 1;
        }
        Ok(count > 0)
    }
}

impl VirtioDevice for Vsock {
    fn name(&self) -> &'static str {
        "vsock"
    }

    fn id(&self) -> u16 {
        19
    }

    fn features(&self) -> u64 {
        STREAM
    }

    fn queue_sizes(&self) -> &[u16] {
        &[128, 128, 16]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::read_config(&self.cid.to_le_bytes(), offset, data);
    }

    fn serve(&self, queues: &mut [VirtQueue], signal: &Signal) -> Result<(), Broken> {
        let mut traffic = self.traffic.lock().unwrap();
        loop {
            let more = self
                .announce(&mut queues[EVENT])
                .and_then(|()| traffic.turn(queues, signal))
                // Nobody serves the connections until the driver's reset.
                .inspect_err(|_| traffic.clear())?;
            if !more || signal.stopping() {
                return Ok(());
            }
        }
    }

    fn host_events(&self) -> Option<BorrowedFd<'_>> {
        Some(self.host.as_fd())
    }

    fn reset(&self) {
        self.traffic.lock().unwrap().clear();
        self.owes_reset.store(false, Ordering::Relaxed);
    }

    fn save(&self) -> DeviceState {
        DeviceState::Vsock(VsockState { cid: self.cid })
    }

    /// The guest hears of another context id together with the end of its connections.
    fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        let DeviceState::Vsock(_) = state else {
            return Err(state.is_not(self));
        };
        self.traffic.lock().unwrap().clear();
        self.owes_reset.store(true, Ordering::Relaxed);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
