//! The stressor's own side.

use std::{
    fs,
    io::{self, Write},
    os::fd::AsFd,
    path::Path,
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{
    Args, Order, Report, What, Work,
    burn::{Burner, cpu_time},
    hold::Holder,
};
use crate::{crash, host::proc, time::BootTime};

/// How long it waits for its first order.
const FIRST_ORDER: Duration = Duration::from_secs(30);
/// Longest sleep between two looks at the clock: poll's timeout does not count a suspend of the machine.
const LOOK: Duration = Duration::from_secs(1);

/// Runs a stressor until its input ends, or its time is up.
///
/// Called before anything else of the agent has started: no thread, no runtime, no open file.
pub fn main(args: &Args) -> ExitCode {
    if let Err(error) = set_up(args) {
        // Answers the first order, which is on its way; without a reader there is nobody to tell.
        let _nobody_reads = say(&Report { error: Some(format!("{error:#}")), ..Report::default() });
        return ExitCode::FAILURE;
    }
    match Child::default().live() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{} for {}: {error:#}", proc::STRESSOR, args.injection);
            ExitCode::FAILURE
        }
    }
}

fn set_up(args: &Args) -> Result<()> {
    // Fails only on kernels before 5.9; all descriptors of the agent are close-on-exec anyway.
    let _closed = proc::close_inherited_descriptors();
    crash::point("stressor.child");
    let _named = nix::sys::prctl::set_name(c"squall-stress");
    for cgroup in &args.cgroup {
        join(cgroup)?;
    }
    // Lowering it needs CAP_SYS_RESOURCE; without, what the agent has stays.
    let _adjusted = fs::write("/proc/self/oom_score_adj", args.kind.oom_score_adj().to_string());
    Ok(())
}

fn join(cgroup: &Path) -> Result<()> {
    // Zero is the writer itself [cgroups(7)].
    crash::step("stressor.join").and_then(|()| fs::write(cgroup.join("cgroup.procs"), "0")).with_context(
        || {
            let hint = "a v2 cgroup that has its controllers turned on for its children takes no processes";
            format!("move the stressor into the cgroup {} ({hint})", cgroup.display())
        },
    )
}

fn say(report: &Report) -> io::Result<()> {
    let mut line = serde_json::to_string(report)?;
    line.push('\n');
    let mut out = io::stdout().lock();
    out.write_all(line.as_bytes())?;
    out.flush()
}

#[derive(Default)]
struct Child {
    burner: Burner,
    holder: Option<Holder>,
    /// When the first work started, and the CPU time used until then.
    started: Option<(BootTime, Duration)>,
    until: Option<BootTime>,
}

impl Child {
    fn live(&mut self) -> Result<()> {
        let mut input = Vec::new();
        let first = BootTime::now() + FIRST_ORDER;
        loop {
            let until = self.until.unwrap_or(first);
            if until.remaining().is_zero() {
                // Its last words wait in the pipe for an agent that still lives.
                let _nobody_reads = say(&self.report(0));
                return Ok(());
            }
            if !readable_before(until)? {
                continue;
            }
            if !read_more(&mut input)? {
                return Ok(());
            }
            while let Some(end) = input.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = input.drain(..=end).collect();
                let order: Order = serde_json::from_slice(&line).context("read an order")?;
                let error = self.obey(order.what).err().map(|error| format!("{error:#}"));
                let mut report = self.report(order.number);
                report.error = error.or(report.error);
                say(&report).context("answer an order")?;
            }
        }
    }

    fn obey(&mut self, what: What) -> Result<()> {
        match what {
            What::Work { work, until } => {
                self.until = Some(until);
                self.started.get_or_insert_with(|| (BootTime::now(), cpu_time()));
                self.work(work)
            }
            What::Until { until } => {
                self.until = Some(until);
                Ok(())
            }
            What::Report => Ok(()),
        }
    }

    fn work(&mut self, work: Work) -> Result<()> {
        crash::step("stressor.work")?;
        match work {
            Work::Cpu { usage, workers, cpus } => {
                self.burner.set(usage, workers, &cpus).context("start the workers")?;
            }
            Work::Memory { size, ramp_ns, spare } => {
                let ramp = Duration::from_nanos(ramp_ns);
                if let Some(holder) = &self.holder {
                    holder.change(size, ramp, spare);
                } else {
                    self.holder = Some(Holder::start(size, ramp, spare).context("start to hold memory")?);
                }
            }
        }
        Ok(())
    }

    fn report(&self, number: u64) -> Report {
        let (elapsed, cpu) = self.started.map_or_else(Default::default, |(at, cpu)| {
            (BootTime::now().0.saturating_sub(at.0), cpu_time().saturating_sub(cpu))
        });
        Report {
            number,
            elapsed_ns: elapsed,
            cpu_ns: cpu.as_nanos() as u64,
            held: self.holder.as_ref().map_or(0, Holder::held),
            error: self.holder.as_ref().and_then(Holder::error),
        }
    }
}

/// Waits for input, at most until this time.
fn readable_before(until: BootTime) -> Result<bool> {
    let stdin = io::stdin();
    let mut fds = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
    // Rounded up, so that it does not spin through the last millisecond.
    let milliseconds = until.remaining().min(LOOK).as_micros().div_ceil(1000) as u16;
    match poll(&mut fds, PollTimeout::from(milliseconds)) {
        Ok(ready) => Ok(ready > 0),
        Err(nix::errno::Errno::EINTR) => Ok(false),
        Err(error) => Err(error).context("wait for orders"),
    }
}

/// False: the other end is closed.
fn read_more(input: &mut Vec<u8>) -> Result<bool> {
    let mut buffer = [0; 4096];
    // Not through the buffer of `Stdin`: poll would not see what is in it.
    let count = nix::unistd::read(io::stdin(), &mut buffer).context("read orders")?;
    input.extend_from_slice(&buffer[..count]);
    Ok(count > 0)
}
