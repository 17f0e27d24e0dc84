//! What this agent lets anyone do. Pure.

use std::time::Duration;

use thiserror::Error;

/// A request that is wrong or not allowed. Nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{field}: {value}: {problem}; {fix}")]
pub struct Invalid {
    /// The field, as in the protocol: `network.loss.ratio`.
    pub field: String,
    /// What was given.
    pub value: String,
    /// What is wrong with it.
    pub problem: String,
    /// What to write instead.
    pub fix: String,
}

impl Invalid {
    /// An error that names the field, the value, the problem and the fix.
    pub fn new(
        field: impl Into<String>,
        value: impl ToString,
        problem: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        Self { field: field.into(), value: value.to_string(), problem: problem.into(), fix: fix.into() }
    }
}

/// The limits of this agent, from its command line.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Longest time from Fire to the deadline.
    pub longest: Duration,
    /// Longest lease.
    pub longest_lease: Duration,
    /// Most live injections at once.
    pub most_injections: usize,
    /// Whether a network fault may take every packet of an interface in the agent's own network namespace, which
    /// on a node is everybody's: SSH, the kubelet, this agent.
    pub whole_node_network: bool,
    /// Largest share of a cgroup's memory limit (or of the node's memory) that a memory fault may hold, 0 to 1.
    pub most_memory: f64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            longest: Duration::from_secs(3600),
            longest_lease: Duration::from_secs(300),
            most_injections: 32,
            whole_node_network: false,
            most_memory: 0.98,
        }
    }
}

impl Limits {
    /// Refuses a duration or a lease that is zero or longer than allowed.
    pub fn check_times(&self, duration: Duration, lease: Duration) -> Result<(), Invalid> {
        let within = |field: &str, value: Duration, most: Duration| {
            if value.is_zero() {
                return Err(Invalid::new(
                    field,
                    "0s",
                    "there is no \"forever\"",
                    "say how long, for example 30s",
                ));
            }
            if value > most {
                let fix = format!("ask for at most {most:?}, or start the agent with a larger limit");
                return Err(Invalid::new(field, format!("{value:?}"), "longer than this agent allows", fix));
            }
            Ok(())
        };
        within("duration_ns", duration, self.longest)?;
        within("lease_ns", lease, self.longest_lease)
    }
}
