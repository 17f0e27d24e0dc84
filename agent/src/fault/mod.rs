//! The contract every fault keeps, and the list of them.
//!
//! A fault is data that was parsed and checked, plus four verbs. It never decides *when*: only the engine calls
//! [`Fault::inject`], and only after the undo record is on disk.

use std::future::Future;

use anyhow::Result;
use serde::{Serialize, de::DeserializeOwned};
use squall_proto::v1;

use crate::{
    host::caps::Capability,
    limits::{Invalid, Limits},
    target::{Scope, Target},
    time::BootTime,
};

mod cpu;
mod memory;
mod network;
mod registry;
mod stressing;
pub use network::keep_open;
pub use registry::{AnyFault, AnyHeld, KINDS, Kind};

/// One kind of fault.
///
/// # Contract
///
/// - `plan` reads the host and changes nothing. What it returns is everything `revert` needs.
/// - `inject` either succeeds, or leaves at most what `revert` of the same undo takes back.
/// - `revert` is idempotent, and succeeds where `inject` never ran, ran halfway, or the target has vanished.
/// - The fault ends by itself at `Window::until`, without the agent, wherever the kernel can do that.
/// - Dropping `Held` ends whatever is bound to a handle (links, child processes, TAP queues).
pub trait Fault: Sized + Send + Sync + 'static {
    /// On the wire, in metrics, in the journal.
    const KIND: &'static str;
    /// Without these it does not work at all.
    const NEEDS: &'static [Capability] = &[];
    /// Everything `revert` needs, as plain data: a restarted agent reverts with it what a dead one injected.
    type Undo: Serialize + DeserializeOwned + Send + Sync + 'static;
    /// Kernel handles that end the fault when dropped.
    type Held: Send + 'static;
    /// The message of this fault in the protocol.
    type Proto;

    /// Parses the message. Refuses what is wrong in itself (a loss of 130 %), naming the field, the value and the fix.
    fn parse(proto: Self::Proto) -> Result<Self, Invalid>;

    /// What of a target the fault takes hold of. Targets that share it (two processes of one cgroup, say) get one
    /// injection, not two.
    fn scope(&self) -> Scope;

    /// Refuses what this agent's limits do not allow. Pure.
    fn check(&self, target: &Target, limits: &Limits) -> Result<(), Invalid>;

    /// One line for people: `delay 2s ±300ms, loss 5% to 10.0.0.7/32:6379/tcp, both ways`.
    fn summary(&self) -> String;

    /// Has [`Fault::plan`] draw nothing, but take this seed, unless the message has one. For faults that decide by chance.
    fn draw_from(&mut self, _seed: u64) {}

    /// Reads the host and says what has to be undone. Changes nothing.
    fn plan(&self, target: &Target) -> impl Future<Output = Result<Planned<Self::Undo>>> + Send;

    /// Makes the change. The undo record is on disk.
    fn inject(
        &self,
        target: &Target,
        undo: &Self::Undo,
        window: Window,
    ) -> impl Future<Output = Result<Self::Held>> + Send;

    /// Changes the parameters to `self` in place, without a gap.
    fn update(&self, held: &mut Self::Held) -> impl Future<Output = Result<()>> + Send;

    /// Moves the time at which the kernel (or the stressor) ends the fault by itself.
    fn extend(held: &mut Self::Held, until: BootTime) -> impl Future<Output = Result<()>> + Send;

    /// What it measurably did so far. Also called once more just before `revert`.
    fn effect(held: &mut Self::Held) -> impl Future<Output = Result<v1::Effect>> + Send;

    /// Why it is over already, where it ended by itself. Asked again and again, so it must not wait. For faults whose means can
    /// vanish: a stressor that the kernel killed burns nothing any more.
    fn ended(_held: &mut Self::Held) -> Option<&'static str> {
        None
    }

    /// Puts the host back. The engine drops `Held` first.
    fn revert(undo: &Self::Undo) -> impl Future<Output = Result<()>> + Send;

    /// Whether and how it works on this node. Found by trying, without touching anything that exists.
    fn describe() -> impl Future<Output = v1::FaultSupport> + Send;
}

/// What [`Fault::plan`] found out.
#[derive(Debug, Clone)]
pub struct Planned<U> {
    /// The undo record.
    pub undo: U,
    /// Each change to the host with its undo, in words, for people.
    pub changes: Vec<String>,
    /// What the user should know before it happens.
    pub warnings: Vec<String>,
    /// How it is done on this node: `EDT + sch_fq`.
    pub mechanism: String,
    /// The seed of the fault's random decisions; 0 where it draws nothing.
    pub seed: u64,
}

/// When a fault acts. Both ends are the kernel's to keep wherever it can.
#[derive(Debug, Clone, Copy)]
pub struct Window {
    /// Nothing happens before this time.
    pub not_before: BootTime,
    /// The earlier of lease and deadline; moved by [`Fault::extend`].
    pub until: BootTime,
}
