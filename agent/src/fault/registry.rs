//! The list of faults, and the one place where their types are erased.

use std::any::Any;

use anyhow::{Context, Result, bail};
use futures::future::BoxFuture;
use serde_json::Value;
use squall_proto::v1;

use super::{Fault, Planned, Window};
use crate::{
    host::caps,
    limits::{Invalid, Limits},
    target::{Scope, Target},
    time::BootTime,
};

/// The list: the name of the fault's message in the protocol, and its type. This is all that a new fault adds here.
macro_rules! faults {
    ($($message:ident => $fault:ty),* $(,)?) => {
        /// Every kind of fault this agent knows.
        pub const KINDS: &[Kind] = &[$(Kind::of::<$fault>()),*];

        impl AnyFault {
            /// Parses a fault of any kind.
            pub fn parse(proto: v1::Fault) -> Result<Self, Invalid> {
                let message = proto.clone();
                match proto.kind {
                    $(Some(v1::fault::Kind::$message(fault)) => <$fault>::parse(fault).map(|fault| Self::of(fault, message)),)*
                    None => {
                        let kinds: Vec<_> = KINDS.iter().map(|k| k.name).collect();
                        Err(Invalid::new("fault", "", "no kind is given", format!("give one of {}", kinds.join(", "))))
                    }
                }
            }
        }
    };
}

faults! {
    Network => super::network::Network,
    Cpu => super::cpu::CpuFault,
    Memory => super::memory::MemoryFault,
}

/// A kind of fault, for what can be done without an instance of it.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    /// [`Fault::KIND`].
    pub name: &'static str,
    revert: fn(Value) -> BoxFuture<'static, Result<()>>,
    describe: fn() -> BoxFuture<'static, v1::FaultSupport>,
}

impl Kind {
    /// The kind of `F`.
    #[must_use]
    pub const fn of<F: Fault>() -> Self {
        Self {
            name: F::KIND,
            revert: |undo| Box::pin(revert::<F>(undo)),
            describe: || Box::pin(describe::<F>()),
        }
    }

    /// Takes back what an undo record of this kind describes. Idempotent.
    pub async fn revert(&self, undo: Value) -> Result<()> {
        (self.revert)(undo).await
    }

    /// Whether and how this kind works on this node.
    pub async fn describe(&self) -> v1::FaultSupport {
        (self.describe)().await
    }
}

async fn describe<F: Fault>() -> v1::FaultSupport {
    match caps::missing(F::NEEDS) {
        None => F::describe().await,
        Some(reason) => v1::FaultSupport { kind: F::KIND.to_owned(), reason, ..v1::FaultSupport::default() },
    }
}

async fn revert<F: Fault>(undo: Value) -> Result<()> {
    F::revert(&decode::<F>(&undo)?).await
}

fn decode<F: Fault>(undo: &Value) -> Result<F::Undo> {
    F::Undo::deserialize_value(undo).with_context(|| format!("undo record of a {} fault", F::KIND))
}

/// `serde_json::from_value` without giving the value away.
trait DeserializeValue: Sized {
    fn deserialize_value(value: &Value) -> serde_json::Result<Self>;
}

impl<T: serde::de::DeserializeOwned> DeserializeValue for T {
    fn deserialize_value(value: &Value) -> serde_json::Result<Self> {
        T::deserialize(value)
    }
}

/// A fault of any kind.
pub struct AnyFault {
    fault: Box<dyn Erased>,
    message: v1::Fault,
}

/// What any injected fault holds.
pub struct AnyHeld(Box<dyn ErasedHeld>);

impl AnyFault {
    /// Erases the type of a fault, which was made from a message.
    pub fn of(fault: impl Fault, message: v1::Fault) -> Self {
        Self { fault: Box::new(fault), message }
    }

    /// What it was made from.
    pub fn message(&self) -> &v1::Fault {
        &self.message
    }

    /// [`Fault::draw_from`].
    pub fn draw_from(&mut self, seed: u64) {
        self.fault.draw_from(seed);
    }

    /// [`Fault::KIND`].
    pub fn kind(&self) -> Kind {
        self.fault.kind()
    }

    /// [`Fault::scope`].
    pub fn scope(&self) -> Scope {
        self.fault.scope()
    }

    /// [`Fault::summary`].
    pub fn summary(&self) -> String {
        self.fault.summary()
    }

    /// [`Fault::check`].
    pub fn check(&self, target: &Target, limits: &Limits) -> Result<(), Invalid> {
        self.fault.check(target, limits)
    }

    /// [`Fault::plan`].
    pub async fn plan(&self, target: &Target) -> Result<Planned<Value>> {
        self.fault.plan(target).await
    }

    /// [`Fault::inject`].
    pub async fn inject(&self, target: &Target, undo: &Value, window: Window) -> Result<AnyHeld> {
        self.fault.inject(target, undo, window).await
    }
}

impl AnyHeld {
    /// [`Fault::update`].
    pub async fn update(&mut self, fault: &AnyFault) -> Result<()> {
        self.0.update(fault).await
    }

    /// [`Fault::extend`].
    pub async fn extend(&mut self, until: BootTime) -> Result<()> {
        self.0.extend(until).await
    }

    /// [`Fault::effect`].
    pub async fn effect(&mut self) -> Result<v1::Effect> {
        self.0.effect().await
    }

    /// [`Fault::ended`].
    pub fn ended(&mut self) -> Option<&'static str> {
        self.0.ended()
    }
}

trait Erased: Send + Sync {
    fn kind(&self) -> Kind;
    fn scope(&self) -> Scope;
    fn summary(&self) -> String;
    fn draw_from(&mut self, seed: u64);
    fn check(&self, target: &Target, limits: &Limits) -> Result<(), Invalid>;
    fn plan<'a>(&'a self, target: &'a Target) -> BoxFuture<'a, Result<Planned<Value>>>;
    fn inject<'a>(
        &'a self,
        target: &'a Target,
        undo: &'a Value,
        window: Window,
    ) -> BoxFuture<'a, Result<AnyHeld>>;
    fn as_any(&self) -> &dyn Any;
}

impl<F: Fault> Erased for F {
    fn kind(&self) -> Kind {
        Kind::of::<F>()
    }

    fn scope(&self) -> Scope {
        self.scope()
    }

    fn summary(&self) -> String {
        self.summary()
    }

    fn draw_from(&mut self, seed: u64) {
        self.draw_from(seed);
    }

    fn check(&self, target: &Target, limits: &Limits) -> Result<(), Invalid> {
        self.check(target, limits)
    }

    fn plan<'a>(&'a self, target: &'a Target) -> BoxFuture<'a, Result<Planned<Value>>> {
        Box::pin(async move {
            let Planned { undo, changes, warnings, mechanism, seed } = self.plan(target).await?;
            let undo = serde_json::to_value(undo).context("write the undo record as JSON")?;
            Ok(Planned { undo, changes, warnings, mechanism, seed })
        })
    }

    fn inject<'a>(
        &'a self,
        target: &'a Target,
        undo: &'a Value,
        window: Window,
    ) -> BoxFuture<'a, Result<AnyHeld>> {
        Box::pin(async move {
            let held = self.inject(target, &decode::<F>(undo)?, window).await?;
            Ok(AnyHeld(Box::new(HeldOf::<F>(held))))
        })
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

trait ErasedHeld: Send {
    fn update<'a>(&'a mut self, fault: &'a AnyFault) -> BoxFuture<'a, Result<()>>;
    fn extend(&mut self, until: BootTime) -> BoxFuture<'_, Result<()>>;
    fn effect(&mut self) -> BoxFuture<'_, Result<v1::Effect>>;
    fn ended(&mut self) -> Option<&'static str>;
}

struct HeldOf<F: Fault>(F::Held);

impl<F: Fault> ErasedHeld for HeldOf<F> {
    fn update<'a>(&'a mut self, fault: &'a AnyFault) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let Some(same) = fault.fault.as_any().downcast_ref::<F>() else {
                bail!(
                    "a {} fault cannot become a {} fault; revert it and inject the other",
                    F::KIND,
                    fault.kind().name
                );
            };
            same.update(&mut self.0).await
        })
    }

    fn extend(&mut self, until: BootTime) -> BoxFuture<'_, Result<()>> {
        Box::pin(F::extend(&mut self.0, until))
    }

    fn effect(&mut self) -> BoxFuture<'_, Result<v1::Effect>> {
        Box::pin(F::effect(&mut self.0))
    }

    fn ended(&mut self) -> Option<&'static str> {
        F::ended(&mut self.0)
    }
}
