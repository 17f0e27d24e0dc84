//! A lab with an agent that hurts its near side, and the network fault in short.

use anyhow::{Context, Result, ensure};
use squall_proto::v1::{
    ArmRequest, Delay, Direction, Fault, Injection, InterfaceSelector, ListRequest, NetworkFault, Peer,
    PortRange, ProcessSelector, RevertRequest, State, Target, UpdateRequest, agent_client::AgentClient,
    fault, target,
};
use tonic::transport::Channel;

use crate::{Agent, AgentOptions, Lab, NetState, Netns, unique};

/// A millisecond in nanoseconds.
pub const MS: u64 = 1_000_000;
/// A second in nanoseconds.
pub const SECOND: u64 = 1_000_000_000;

/// A lab, and an agent beside it.
#[derive(Debug)]
pub struct Bench {
    /// The lab. Its near side is hurt.
    pub lab: Lab,
    /// The agent.
    pub agent: Agent,
    client: AgentClient<Channel>,
    before: [NetState; 2],
}

impl Bench {
    /// A lab with an agent outside it.
    pub async fn new(tag: &str) -> Result<Self> {
        Self::with(Lab::new(tag)?, None).await
    }

    /// A lab with an agent that has one of its namespaces for its own.
    pub async fn with_agent_in(tag: &str, own: fn(&Lab) -> &Netns) -> Result<Self> {
        Self::with(Lab::new(tag)?, Some(own)).await
    }

    async fn with(lab: Lab, own: Option<fn(&Lab) -> &Netns>) -> Result<Self> {
        let before = [lab.near.state()?, lab.far.state()?];
        let netns = own.map(|own| own(&lab));
        let agent = Agent::start(AgentOptions { netns, ..AgentOptions::default() }).await?;
        let client = agent.client().await?;
        Ok(Self { lab, agent, client, before })
    }

    /// Starts the agent again, after it has ended.
    pub async fn restart(&mut self) -> Result<()> {
        self.agent.restart().await?;
        self.client = self.agent.client().await?;
        Ok(())
    }

    /// Takes how the lab is now for how it is to be in the end.
    pub fn settle(&mut self) -> Result<()> {
        self.before = [self.lab.near.state()?, self.lab.far.state()?];
        Ok(())
    }

    /// `near0`, as the target of an agent outside.
    #[must_use]
    pub fn near(&self) -> Target {
        interface("near0", &self.lab.near.path().display().to_string())
    }

    /// Injects a fault into `near0`.
    pub async fn inject(&mut self, fault: NetworkFault) -> Result<Injection> {
        self.inject_into(self.near(), fault).await
    }

    /// Injects a fault for four minutes, longer than any test needs it.
    pub async fn inject_into(&mut self, target: Target, fault: NetworkFault) -> Result<Injection> {
        self.inject_for(target, fault, 240 * SECOND).await
    }

    /// Injects a fault for so many nanoseconds. Fails unless that is one injection, and active.
    pub async fn inject_for(
        &mut self,
        target: Target,
        fault: NetworkFault,
        duration_ns: u64,
    ) -> Result<Injection> {
        let request = ArmRequest {
            id: unique("injection"),
            target: Some(target),
            fault: Some(Fault { kind: Some(fault::Kind::Network(fault)) }),
            duration_ns,
            lease_ns: duration_ns,
            dry_run: false,
            only: Vec::new(),
        };
        let made = self.client.inject(request).await?.into_inner().injections;
        let [injection] = <[Injection; 1]>::try_from(made).ok().context("not one injection")?;
        ensure!(injection.state() == State::Active, "{injection:?}");
        Ok(injection)
    }

    /// What the agent says to a fault that it must refuse. Fails where it is accepted, or where the lab changes.
    pub async fn refused(&mut self, target: Target, fault: NetworkFault) -> Result<String> {
        let refused = self.inject_into(target, fault).await.err().context("it was accepted")?;
        self.is_restored()?;
        Ok(format!("{refused:#}"))
    }

    /// Changes a live injection.
    pub async fn update(&mut self, id: &str, fault: NetworkFault) -> Result<()> {
        let fault = Some(Fault { kind: Some(fault::Kind::Network(fault)) });
        self.client.update(UpdateRequest { id: id.into(), fault }).await?;
        Ok(())
    }

    /// Ends an injection, and says what it did.
    pub async fn revert(&mut self, id: &str) -> Result<Injection> {
        let request = RevertRequest { ids: vec![id.into()], all: false };
        let ended = self.client.revert(request).await?.into_inner().injections;
        let [injection] = <[Injection; 1]>::try_from(ended).ok().context("not one injection")?;
        ensure!(injection.state() == State::Reverted, "{injection:?}\n{}", self.agent.log());
        Ok(injection)
    }

    /// Ends the last injection there is: what it did, with the lab as it was before.
    pub async fn end(&mut self, id: &str) -> Result<Injection> {
        let ended = self.revert(id).await?;
        self.is_restored()?;
        Ok(ended)
    }

    /// A live injection, as it is now.
    pub async fn effect(&mut self, id: &str) -> Result<Injection> {
        let all = self.client.list(ListRequest {}).await?.into_inner().injections;
        all.into_iter().find(|injection| injection.id == id).context("the injection is not listed")
    }

    /// Fails unless both sides have the links, qdiscs and filters that they had before.
    pub fn is_restored(&self) -> Result<()> {
        for (netns, before) in [&self.lab.near, &self.lab.far].into_iter().zip(&self.before) {
            let changes = before.changes(&netns.state()?);
            ensure!(changes.is_empty(), "{}: {changes:?}\n{}", netns.name(), self.agent.log());
        }
        Ok(())
    }
}

/// A figure of an injection's effect; 0 where it is not told.
#[must_use]
pub fn figure(injection: &Injection, name: &str) -> f64 {
    let mut figures = injection.effect.iter().flat_map(|effect| &effect.figures);
    figures.find(|figure| figure.name == name).map_or(0.0, |figure| figure.value)
}

/// An interface as a target; an empty namespace is the agent's own.
#[must_use]
pub fn interface(name: &str, netns: &str) -> Target {
    Target {
        kind: Some(target::Kind::Interface(InterfaceSelector { name: name.into(), netns: netns.into() })),
    }
}

/// A process as a target.
#[must_use]
pub fn process(pid: u32) -> Target {
    Target { kind: Some(target::Kind::Process(ProcessSelector { pid, ..ProcessSelector::default() })) }
}

/// A delay of so many milliseconds.
#[must_use]
pub fn delay(ms: u64, direction: Direction, peers: Vec<Peer>) -> NetworkFault {
    NetworkFault {
        direction: direction.into(),
        peers,
        delay: Some(Delay { latency_ns: ms * MS, ..Delay::default() }),
        ..NetworkFault::default()
    }
}

/// A silent partition.
#[must_use]
pub fn partition(direction: Direction, peers: Vec<Peer>) -> NetworkFault {
    NetworkFault { direction: direction.into(), peers, partition: true, ..NetworkFault::default() }
}

/// Whoever has an address in this prefix.
#[must_use]
pub fn cidr(cidr: &str) -> Peer {
    Peer { cidrs: vec![cidr.into()], ..Peer::default() }
}

/// Whoever has this port.
#[must_use]
pub fn port(port: u16) -> Peer {
    Peer { ports: ports(port), ..Peer::default() }
}

/// One port as ranges.
#[must_use]
pub fn ports(port: u16) -> Vec<PortRange> {
    vec![PortRange { first: port.into(), last: port.into() }]
}
