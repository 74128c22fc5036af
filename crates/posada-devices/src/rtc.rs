//! The CMOS clock at ports 0x70 and 0x71 (Motorola MC146818): the host's wall clock in UTC, and 128 bytes of CMOS memory.
//! The guest cannot set the time, and there are no alarms: Linux keeps its own time after the first look.

use crate::bus::PortDevice;
use crate::state::StateError;
use posada_engine::clock::real_time_ns;
use serde::{Deserialize, Serialize};
use std::sync::Mutex;

/// First port.
pub const PORT: u64 = 0x70;
/// Ports taken: index and data.
pub const PORTS: u64 = 2;

struct State {
    index: u8,
    memory: [u8; MEMORY],
}

/// Bytes of CMOS memory, the clock's registers included.
const MEMORY: usize = 128;

/// What a clock keeps; the time is the host's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RtcState {
    /// The register that the data port shows, 0 to 127.
    pub index: u8,
    /// CMOS memory.
    #[serde(with = "const_hex")]
    pub memory: [u8; MEMORY],
}

/// The clock.
pub struct Rtc {
    state: Mutex<State>,
    /// Seconds since 1970.
    now: fn() -> u64,
}

impl Default for Rtc {
    fn default() -> Self {
        Self::new()
    }
}

impl Rtc {
    /// A clock that shows the host's time.
    pub fn new() -> Self {
        Self {
            state: Mutex::new(State {
                index: 0,
                memory: [0; MEMORY],
            }),
            now: || real_time_ns() / 1_000_000_000,
        }
    }

    /// What it keeps.
    pub fn save(&self) -> RtcState {
        let state = self.state.lock().unwrap();
        RtcState {
            index: state.index,
            memory: state.memory,
        }
    }

    /// Takes that over.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn restore(&self, saved: &RtcState) -> Result<(), StateError> {
        if usize::from(saved.index) >= MEMORY {
            let reason = format!("has no register {:#x}", saved.index);
            return Err(StateError::new(reason).of("the CMOS clock"));
        }
        let mut state = self.state.lock().unwrap();
        state.index = saved.index;
        state.memory = saved.memory;
        Ok(())
    }

    fn register(&self, state: &State) -> u8 {
        let now = (self.now)();
        let (year, month, day) = date(now / 86_400);
        let value = match state.index {
            0 => now % 60,
            2 => now / 60 % 60,
            4 => now / 3600 % 24,
            // Sunday is 1; 1970 began on a Thursday.
            6 => (now / 86_400 + 4) % 7 + 1,
            7 => day,
            8 => month,
            9 => year % 100,
            0x32 => year / 100,
            // 32 kHz time base, no update in progress.
            0xa => return 0x26,
            // 24 hours, BCD.
            0xb => return 0x02,
            0xc => return 0,
            // Battery good.
            0xd => return 0x80,
            index => return state.memory[usize::from(index)],
        };
        (value / 10 << 4 | value % 10) as u8
    }
}

/// Year, month and day (both from 1) of the Gregorian calendar, from days since 1970-01-01.
fn date(days: u64) -> (u64, u64, u64) {
    // Years that begin in March put the leap day last; 400 years have 146,097 days.
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let march = (5 * day + 2) / 153;
    let month = if march < 10 { march + 3 } else { march - 9 };
    let year = era * 400 + year + u64::from(month <= 2);
    (year, month, day - (153 * march + 2) / 5 + 1)
}

impl PortDevice for Rtc {
    fn read(&self, offset: u16, data: &mut [u8]) {
        let state = self.state.lock().unwrap();
        for (byte, at) in data.iter_mut().zip(offset..) {
            *byte = if at == 1 { self.register(&state) } else { 0xff };
        }
    }

    fn write(&self, offset: u16, data: &[u8]) {
        let mut state = self.state.lock().unwrap();
        for (byte, at) in data.iter().zip(offset..) {
            if at == 0 {
                // Bit 7 gates NMIs on real machines.
                state.index = byte & 0x7f;
            } else {
                let index = usize::from(state.index);
                state.memory[index] = *byte;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_date_is_right_across_leap_years() {
        assert_eq!(date(0), (1970, 1, 1));
        assert_eq!(date(11_016), (2000, 2, 29));
        assert_eq!(date(11_017), (2000, 3, 1));
        assert_eq!(date(20_453), (2025, 12, 31));
        assert_eq!(date(47_540), (2100, 2, 28));
        assert_eq!(date(47_541), (2100, 3, 1));
    }

    #[test]
    fn registers_show_the_time_in_bcd() {
        let mut rtc = Rtc::new();
        // 2001-09-09 01:46:40, a Sunday.
        rtc.now = || 1_000_000_000;
        let expected = [
            (0, 0x40),
            (2, 0x46),
            (4, 0x01),
            (6, 1),
            (7, 9),
            (8, 9),
            (9, 0x01),
            (0x32, 0x20),
            (0xd, 0x80),
        ];
        for (index, value) in expected {
            let mut data = [0];
            rtc.write(0, &[index]);
            rtc.read(1, &mut data);
            assert_eq!(data[0], value, "register {index:#x}");
        }
    }

    #[test]
    fn cmos_memory_is_saved_and_its_index_checked() {
        let rtc = Rtc::new();
        rtc.write(0, &[0x40]);
        rtc.write(1, &[0x5a]);
        let state: RtcState = serde_json::from_str(&serde_json::to_string(&rtc.save()).unwrap()).unwrap();
        let other = Rtc::new();
        other.restore(&state).unwrap();
        let mut data = [0];
        other.read(1, &mut data);
        assert_eq!(data, [0x5a]);
        let bad = RtcState { index: 0x80, ..state };
        assert_eq!(
            other.restore(&bad).unwrap_err().to_string(),
            "the CMOS clock has no register 0x80"
        );
    }
}
