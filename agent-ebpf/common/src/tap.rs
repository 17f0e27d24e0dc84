//! What travels with a packet through the TAP queue, in front of its link-layer header.
//!
//! The program on the TAP device's egress pushes it; the queue in the agent takes it off. It has the form of an
//! Ethernet header so that the kernel's TAP driver has something to look at, and so that a VLAN tag from the kernel's
//! metadata, which the driver inserts at byte 12, is found.

/// Length of the header in bytes.
pub const LEN: usize = 32;
/// "Local experimental" ethertype of IEEE 802.
pub const ETHERTYPE: u16 = 0x88b5;
/// The first six bytes, where a destination address would be: locally administered.
pub const MAGIC: [u8; 6] = [0x02, b's', b'q', b'u', b'a', b'l'];

/// So many lower bits of an arrival time in nanoseconds travel with a packet: 68 seconds, and no packet is held longer than 60.
pub const ARRIVED_BITS: u32 = 36;

/// What is to be done with a packet when it is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Job {
    /// Send it on.
    Send = 0,
    /// Flip a bit in one segment of it, and send it on.
    Corrupt = 1,
    /// The same, and make the checksum right.
    CorruptSilently = 2,
    /// Answer it with a refusal instead.
    Refuse = 3,
    /// End its TCP connection at both ends instead.
    Reset = 4,
    /// Whatever the rule says about DNS.
    Dns = 5,
}

impl Job {
    /// The job with a number.
    #[must_use]
    pub fn from_number(number: u8) -> Option<Self> {
        let all = [Self::Send, Self::Corrupt, Self::CorruptSilently, Self::Refuse, Self::Reset, Self::Dns];
        all.get(usize::from(number)).copied()
    }
}

/// When a packet came and when it is to go, what for, and which rule says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// The rule.
    pub rule: u16,
    /// A [`Job`].
    pub job: u8,
    /// `CLOCK_MONOTONIC` in nanoseconds.
    pub arrived: u64,
    /// `CLOCK_MONOTONIC` in nanoseconds.
    pub due: u64,
}

impl Header {
    /// The header's bytes.
    #[inline(always)]
    #[must_use]
    pub fn to_bytes(self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        let [m0, m1, m2, m3, m4, m5] = MAGIC;
        let [e0, e1] = ETHERTYPE.to_be_bytes();
        let [r0, r1] = self.rule.to_be_bytes();
        let head = [m0, m1, m2, m3, m4, m5, self.job, 0, 0, 0, 0, 0, e0, e1, r0, r1];
        let mut i = 0;
        while i < 16 {
            bytes[i] = head[i];
            i += 1;
        }
        let (arrived, due) = (self.arrived.to_be_bytes(), self.due.to_be_bytes());
        let mut i = 0;
        while i < 8 {
            bytes[16 + i] = arrived[i];
            bytes[24 + i] = due[i];
            i += 1;
        }
        bytes
    }

    /// Takes a frame from the TAP device apart: the header, and a VLAN tag where the driver inserted one. `None` where
    /// the frame is not ours.
    #[cfg(any(test, feature = "user"))]
    #[must_use]
    pub fn split(frame: &[u8]) -> Option<Split<'_>> {
        let (head, rest) = frame.split_first_chunk::<12>()?;
        if head[..6] != MAGIC {
            return None;
        }
        let (tag, rest) = match rest {
            [0x81, 0x00, ..] | [0x88, 0xa8, ..] => {
                let (tag, rest) = rest.split_first_chunk::<4>()?;
                (Some(*tag), rest)
            }
            _ => (None, rest),
        };
        let (fields, packet) = rest.split_first_chunk::<20>()?;
        if fields[..2] != ETHERTYPE.to_be_bytes() {
            return None;
        }
        let number = |at: usize| Some(u64::from_be_bytes(fields.get(at..at + 8)?.try_into().ok()?));
        let header = Self {
            rule: u16::from_be_bytes([fields[2], fields[3]]),
            job: head[6],
            arrived: number(4)?,
            due: number(12)?,
        };
        Some(Split { header, tag, packet })
    }
}

/// A frame from the TAP device, taken apart.
#[cfg(any(test, feature = "user"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Split<'a> {
    /// The header.
    pub header: Header,
    /// A VLAN tag that belongs after byte 12 of the packet.
    pub tag: Option<[u8; 4]>,
    /// The packet with its own link-layer header.
    pub packet: &'a [u8],
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_comes_back_with_and_without_a_vlan_tag() {
        let header = Header { rule: 63, job: Job::Dns as u8, arrived: 12_345_678_901, due: u64::MAX - 3 };
        let mut frame = header.to_bytes().to_vec();
        frame.extend(b"packet");
        assert_eq!(Header::split(&frame), Some(Split { header, tag: None, packet: b"packet" }));
        frame.splice(12..12, [0x81, 0x00, 0x00, 0x07]);
        let tag = Some([0x81, 0x00, 0x00, 0x07]);
        assert_eq!(Header::split(&frame), Some(Split { header, tag, packet: b"packet" }));
    }

    #[test]
    fn other_frames_are_not_ours() {
        assert_eq!(Header::split(&[0x33; 90]), None);
        let header = Header { rule: 0, job: 0, arrived: 0, due: 0 }.to_bytes();
        assert_eq!(Header::split(&header[..LEN - 1]), None);
    }
}
