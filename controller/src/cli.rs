//! The command line: what can be written, and what the exit codes mean.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::{
    agents::{Address, Tls},
    certs::Certs,
    plan::{
        fault::{Cpu, Memory, Size},
        units::{self, Wrong},
    },
    replicas::Take,
};

mod network;

pub(crate) use self::network::InjectNetwork;

/// Exit codes. They are an API: CI reads them.
pub(crate) mod exit {
    /// Every gate passed, or the command did what it was asked.
    pub(crate) const OK: u8 = 0;
    /// The plan or the command is wrong. Nothing was injected.
    pub(crate) const WRONG: u8 = 2;
    /// Nothing failed, but not everything is proven.
    pub(crate) const INCONCLUSIVE: u8 = 3;
    /// Stopped by a person, a safety limit or a lost agent.
    pub(crate) const ABORTED: u8 = 4;
    /// Our own failure.
    pub(crate) const OURS: u8 = 5;
}

/// What `squall help exit-codes` prints.
pub(crate) const EXIT_CODES: &str = "\
Exit codes
  0  promote: every gate passed and every fault bit (other commands: done)
  1  block or rollback: a gate failed
  2  the plan or the command is wrong; nothing was injected
  3  inconclusive: nothing failed, but not everything is proven
  4  aborted by a person, a safety limit or a lost agent
  5  squall itself failed; never to be read as a verdict";

/// Breaks a running service on purpose and says whether a release may go out.
#[derive(Debug, Parser)]
#[command(name = "squall", version, after_help = "`squall help exit-codes` says what the exit codes mean.")]
pub(crate) struct Cli {
    #[command(flatten)]
    pub common: Common,
    #[command(subcommand)]
    pub command: Command,
}

/// What every command takes.
#[derive(Debug, Args)]
pub(crate) struct Common {
    /// An agent: `unix:///run/squall/agent.sock`, `https://node-1:7400` (with --tls-…) or `http://127.0.0.1:7400`
    /// (loopback only). Repeatable; without it the agent of this host is used, and where none runs, one is started
    /// for this command
    #[arg(
        long = "agents",
        value_name = "ADDRESS",
        global = true,
        help_heading = "Everywhere",
        value_delimiter = ','
    )]
    pub agents: Vec<Address>,
    #[command(flatten)]
    pub tls: Tls,
    /// Form of the output
    #[arg(
        short,
        long,
        value_name = "FORM",
        global = true,
        help_heading = "Everywhere",
        default_value = "text"
    )]
    pub output: Output,
    /// What to show of a run while it runs, on stderr
    #[arg(long, value_name = "MODE", global = true, help_heading = "Everywhere", default_value = "auto")]
    pub progress: ProgressMode,
    /// Directory of the runs
    #[arg(long, value_name = "DIR", global = true, help_heading = "Everywhere", default_value = "runs")]
    pub runs: PathBuf,
}

/// Form of the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people.
    Text,
    /// For scripts.
    Json,
}

/// What to show of a run while it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ProgressMode {
    /// Live on a terminal, plain otherwise
    Auto,
    /// A view that redraws itself
    Live,
    /// Lines, with a heartbeat
    Plain,
    /// Nothing
    None,
    /// Every event as a line of JSON
    Json,
}

/// Commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run the rounds of a plan, print the verdict, write `runs/ID/`
    Run {
        /// The plan, a YAML file
        plan: PathBuf,
        /// Seed from which the seeds of all faults are drawn, instead of the plan's; to run again what ran before
        #[arg(long)]
        seed: Option<u64>,
        /// Only say what would be changed, host by host, as the agents plan it
        #[arg(long)]
        dry_run: bool,
    },
    /// Validate a plan, resolve its targets, ask every agent what it can do; change nothing
    Check {
        /// The plan, a YAML file
        plan: PathBuf,
    },
    /// Inject one fault by hand
    #[command(subcommand)]
    Inject(Box<Inject>),
    /// Injections that agents hold, and what they measurably do
    Status,
    /// End injections and wait until the hosts are as before
    Revert {
        /// Ids, as `squall status` shows them
        #[arg(value_name = "ID", required_unless_present = "all", conflicts_with = "all")]
        ids: Vec<String>,
        /// Everything on every agent
        #[arg(long)]
        all: bool,
    },
    /// Stop every agent at once: revert everything, and refuse injections, also after a restart
    Stop {
        /// Every agent of --agents; without it the agent of this host
        #[arg(long, required_unless_present = "release")]
        all: bool,
        /// Allow injections again
        #[arg(long, conflicts_with = "all")]
        release: bool,
    },
    /// Agents, their nodes, and which faults work there
    Nodes,
    /// Make a CA, and certificates of it for agents and their clients, to start with
    Certs(Certs),
    /// Make the reports of a run again from its events
    Report {
        /// Id of the run (its first letters are enough), or its directory
        run: String,
        /// Print one report instead of writing the files
        #[arg(short, long, value_name = "FORMAT")]
        format: Option<Format>,
    },
    /// What the exit codes mean
    #[command(hide = true, about = EXIT_CODES, help_template = "{about}")]
    ExitCodes,
}

/// A form of report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// One self-contained file
    Html,
    /// For machines
    Json,
    /// For CI servers: a suite for each round, a case for each gate
    Junit,
    /// For comments and job summaries
    Md,
}

/// Kinds of fault.
#[derive(Debug, Subcommand)]
pub(crate) enum Inject {
    /// Delay, lose, damage, slow down or cut off packets, as netem does; or answer DNS queries wrongly
    Network(Box<InjectNetwork>),
    /// Burn CPU time inside the target's cgroup
    Cpu(InjectCpu),
    /// Hold memory inside the target's cgroup
    Memory(InjectMemory),
}

/// What to hurt, and for how long.
#[derive(Debug, Args)]
pub(crate) struct What {
    #[command(flatten)]
    pub target: TargetArgs,
    /// How long, then it ends by itself: 30s, 5m
    #[arg(long = "for", value_name = "TIME", value_parser = parse(units::duration))]
    pub duration: Duration,
    /// Only some of what matches, over all agents: 50%, or 1. A pod is one, however many processes it has
    #[arg(long, value_name = "SHARE|N")]
    pub replicas: Option<Take>,
    /// Seed by which they are chosen, to choose the same again; drawn and shown where none is given
    #[arg(long, value_name = "SEED", requires = "replicas")]
    pub replicas_seed: Option<u64>,
    /// Come back at once; needs an agent that keeps running, and the fault ends after --for
    #[arg(long)]
    pub detach: bool,
    /// Only say what would be changed, host by host
    #[arg(long, conflicts_with = "detach")]
    pub dry_run: bool,
}

/// What to hurt. Every given term must match.
#[derive(Debug, Args)]
#[group(required = true, multiple = true)]
pub(crate) struct TargetArgs {
    /// Processes with this executable: a path, or its last part
    #[arg(long, value_name = "NAME", conflicts_with = "cgroup")]
    pub exe: Option<String>,
    /// Processes with this in their command line
    #[arg(long, value_name = "TEXT", conflicts_with = "cgroup")]
    pub cmdline: Option<String>,
    /// The process with this pid
    #[arg(long, conflicts_with = "cgroup")]
    pub pid: Option<u32>,
    /// A cgroup, by its path
    #[arg(long, value_name = "PATH")]
    pub cgroup: Option<String>,
    /// An interface. With a process or cgroup: this one of its network namespace; alone: the target itself
    #[arg(long, value_name = "NAME")]
    pub interface: Option<String>,
    /// Network namespace of the interface: a name in /run/netns or a path
    #[arg(long, value_name = "NETNS", requires = "interface", conflicts_with_all = ["exe", "cmdline", "pid", "cgroup"])]
    pub netns: Option<String>,
}

/// `squall inject cpu`.
#[derive(Debug, Args)]
pub(crate) struct InjectCpu {
    #[command(flatten)]
    pub common: What,
    /// Load on the CPUs that the target may use
    #[arg(long, value_name = "SHARE", value_parser = parse(units::share))]
    pub load: f64,
    /// Threads; one for each of these CPUs where none are given
    #[arg(long, value_name = "N")]
    pub workers: Option<u32>,
}

/// `squall inject memory`.
#[derive(Debug, Args)]
pub(crate) struct InjectMemory {
    #[command(flatten)]
    pub common: What,
    /// How much: 200MiB, or 90% of the limit
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub size: Size,
    /// Time to reach the size
    #[arg(long, value_name = "TIME", value_parser = parse(units::duration), default_value = "0s")]
    pub ramp: Duration,
}

/// A parser of `units` for clap: what is wrong and what to write in one line.
fn parse<T>(parser: fn(&str) -> Result<T, Wrong>) -> impl Fn(&str) -> Result<T, String> + Clone {
    move |text| parser(text).map_err(|(message, fix)| format!("{message}: {fix}"))
}

fn parse_size(text: &str) -> Result<Size, String> {
    if text.trim().ends_with('%') {
        parse(units::share)(text).map(Size::Share)
    } else {
        parse(units::size)(text).map(Size::Bytes)
    }
}

impl Inject {
    /// What to hurt, and for how long.
    pub(crate) fn common(&self) -> &What {
        match self {
            Self::Network(n) => &n.common,
            Self::Cpu(c) => &c.common,
            Self::Memory(m) => &m.common,
        }
    }

    /// The fault for an agent, and a line for people.
    pub(crate) fn fault(&self) -> Result<(squall_proto::v1::Fault, String), Wrong> {
        let what = self.common();
        let of = what.replicas.map(|take| format!(" (replicas: {take})")).unwrap_or_default();
        let on = what.target.shown() + &of;
        match self {
            Self::Network(args) => {
                let network = args.network()?;
                Ok((network.proto(), network.summary(&on)))
            }
            Self::Cpu(args) => {
                let cpu = Cpu { load: args.load, workers: args.workers };
                Ok((cpu.proto(), cpu.summary(&on)))
            }
            Self::Memory(args) => {
                if args.ramp >= what.duration {
                    let fix = "give a shorter --ramp, or a longer --for".to_owned();
                    return Err(("the ramp is as long as the fault: so much is never held".to_owned(), fix));
                }
                let memory = Memory { size: args.size, ramp: args.ramp };
                Ok((memory.proto(), memory.summary(&on)))
            }
        }
    }
}

impl TargetArgs {
    fn is_interface(&self) -> bool {
        self.exe.is_none() && self.cmdline.is_none() && self.pid.is_none() && self.cgroup.is_none()
    }

    /// The target in the words of a plan.
    pub(crate) fn target(&self) -> crate::plan::Target {
        use crate::plan::Target;
        match (&self.cgroup, &self.interface) {
            (Some(path), _) => Target::Cgroup { path: path.clone() },
            (None, Some(name)) if self.is_interface() => {
                Target::Interface { name: name.clone(), netns: self.netns.clone() }
            }
            _ => Target::Process { pid: self.pid, exe: self.exe.clone(), cmdline: self.cmdline.clone() },
        }
    }

    /// What was asked for, for people.
    pub(crate) fn shown(&self) -> String {
        let pid = self.pid.map(|pid| format!("pid {pid}"));
        let cmdline = self.cmdline.as_ref().map(|text| format!("*{text}*"));
        let interface = self.interface.clone().filter(|_| self.is_interface());
        let terms = [self.exe.clone(), cmdline, pid, self.cgroup.clone(), interface];
        terms.into_iter().flatten().collect::<Vec<_>>().join(" ")
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    fn inject(line: &str) -> Inject {
        let cli = Cli::try_parse_from(line.split(' ')).expect("valid");
        let Command::Inject(inject) = cli.command else { panic!("not inject") };
        *inject
    }

    #[test]
    fn the_line_of_the_readme() {
        let inject = inject(
            "squall inject network --exe recommender --to 10.0.0.7/32:6379/tcp --delay 2s --jitter 300ms --loss 5% \
             --for 30s",
        );
        let (_, summary) = inject.fault().expect("valid");
        assert_eq!(summary, "network recommender ↔ 10.0.0.7/32:6379/tcp: delay 2s ±300ms, loss 5%");
        assert_eq!(inject.common().duration, Duration::from_secs(30));
    }

    #[test]
    fn an_interface_alone_is_the_target_and_with_a_process_a_part_of_it() {
        let alone = inject("squall inject network --interface eth0 --netns web --partition --for 5s");
        assert_eq!(
            alone.common().target.target(),
            crate::plan::Target::Interface { name: "eth0".into(), netns: Some("web".into()) }
        );
        let part = inject("squall inject network --pid 42 --interface eth0 --partition --for 5s");
        assert!(matches!(part.common().target.target(), crate::plan::Target::Process { pid: Some(42), .. }));
        assert!(part.fault().expect("valid").1.ends_with("at eth0"));
    }

    #[rstest::rstest]
    #[case("squall inject cpu --load 90% --for 5s", "required")]
    #[case("squall inject cpu --exe x --load 90%", "--for")]
    #[case("squall inject cpu --exe x --load 90 --for 5s", "write 90%")]
    #[case("squall inject memory --exe x --size 64 --for 5s", "write 64MiB")]
    #[case("squall inject cpu --exe x --load 90% --for 5", "write 5ms or 5s")]
    #[case("squall inject network --exe x --to nowhere --partition --for 5s", "expected CIDR")]
    #[case("squall --agents http://10.0.0.7:7400 status", "is refused")]
    #[case("squall revert", "required")]
    fn wrong_lines(#[case] line: &str, #[case] why: &str) {
        let error = Cli::try_parse_from(line.split(' ')).expect_err("wrong").to_string();
        assert!(error.contains(why), "{error}");
    }

    #[test]
    fn a_network_fault_that_does_nothing_is_refused() {
        let wrong = inject("squall inject network --exe x --for 5s").fault().expect_err("nothing to do");
        assert!(wrong.1.starts_with("give --delay, --loss, --partition"), "{wrong:?}");
    }
}
