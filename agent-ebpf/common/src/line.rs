//! The queues of a line, the veth pair that holds packets. Which one a packet takes at one end says which CPU takes it at the other.

/// Queues of each end, for sending and receiving.
pub const QUEUES: u32 = 3;
/// A CPU that the flow chooses, by the hash of it, so that its packets keep their order: Receive Packet Steering is on for this queue.
pub const CPU_OF_FLOW: u32 = 0;
/// The CPU that sends it, at once. Not the queue after the other: before 5.13 a packet without XDP comes out of the one before
/// (`veth_xmit` in drivers/net/veth.c, 5.10), which has to be such a queue as well.
pub const ANY_CPU: u32 = 2;
