//! What this node can do, found by trying.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use squall_common::table::Direction;

use super::LOOPBACK;
use crate::{
    crash,
    host::{
        bpf::{Hook, Program, Programs, socket_cgroups},
        line::{self, Line},
        netns::{Netns, run_in_new},
        tap::Device,
        tc::{Interface, Netlink},
    },
};

/// What was found by trying.
#[derive(Debug, Clone)]
pub struct Support {
    /// How programs are attached.
    pub hook: Hook,
    /// Why a line with `sch_fq` cannot be used; `None` where it can.
    pub no_line: Option<String>,
    /// Why a TAP queue cannot be used; `None` where it can.
    pub no_tap: Option<String>,
    /// Whether packets can be chosen by the cgroup (v2) of their socket.
    pub cgroups: bool,
}

/// How packets are held back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holder {
    /// Departure times (EDT) that `sch_fq` keeps, on a veth pair beside the interface.
    Line,
    /// A TAP device with a queue in the agent.
    Tap,
}

impl Support {
    /// Tries everything in a network namespace that nobody else sees. Must be called within the runtime.
    pub fn probe() -> Result<Self> {
        let mut programs = Programs::get()?;
        run_in_new(move || {
            let mut netlink = Netlink::open()?;
            let hook = match programs.attach(Program::Port(Direction::Egress), "lo", Hook::Tcx) {
                Ok(()) => Hook::Tcx,
                Err(tcx) => {
                    netlink.add_clsact(LOOPBACK)?;
                    programs
                        .attach(Program::Port(Direction::Egress), "lo", Hook::Clsact)
                        .with_context(|| format!("neither TCX ({tcx:#}) nor a classifier can be attached"))?;
                    Hook::Clsact
                }
            };
            let line = Line::create(&mut netlink, LOOPBACK, false, Duration::ZERO)
                .and_then(|line| attach_line(&mut programs, &mut netlink, line, LOOPBACK, false, hook));
            let no_line = line.err().map(|e| format!("{:#}", e.root_cause()));
            let tap = [true, false].into_iter().try_for_each(|whole| {
                let device = Device::create(whole)?;
                attach_tap(&mut programs, &mut netlink, &device, hook)?;
                device.up()
            });
            let no_tap = tap.err().map(|e| format!("{e:#}"));
            programs.detach();
            if hook == Hook::Tcx
                && let Err(error) = Netns::scratch().and_then(|netns| programs.keep_warm(netns))
            {
                tracing::debug!("faults begin some milliseconds later than they could: {error:#}");
            }
            programs.give_back();
            Ok(Self { hook, no_line, no_tap, cgroups: socket_cgroups() })
        })
    }

    /// How packets can be held back on an interface. The error says what is missing.
    pub fn holder(&self, interface: &Interface) -> Result<Holder> {
        let name = &interface.name;
        if interface.link_header != Some(14) {
            bail!("packets on {name} cannot be delayed: that needs an interface with Ethernet headers");
        }
        match (&self.no_line, &self.no_tap) {
            (None, _) => Ok(Holder::Line),
            (Some(_), None) => Ok(Holder::Tap),
            (Some(line), Some(tap)) => {
                bail!("packets on {name} cannot be delayed: no sch_fq ({line}), and no TAP queue ({tap})")
            }
        }
    }

    /// Refuses where packets on an interface cannot be changed or answered.
    pub fn worker(&self, interface: &Interface) -> Result<()> {
        let name = &interface.name;
        match (&self.no_tap, interface.link_header) {
            (Some(reason), _) => bail!("packets on {name} cannot be changed: no TAP queue ({reason})"),
            (None, Some(14)) => Ok(()),
            (None, _) => {
                bail!("packets on {name} cannot be changed: that needs an interface with Ethernet headers")
            }
        }
    }
}

pub(super) fn attach_tap(
    programs: &mut Programs,
    netlink: &mut Netlink,
    device: &Device,
    hook: Hook,
) -> Result<()> {
    if hook == Hook::Clsact {
        netlink.add_clsact(device.index())?;
    }
    crash::step("port.tap.program")?;
    programs.attach(Program::TapOut, device.name(), hook)?;
    programs.attach(Program::TapIn, device.name(), hook)
}

pub(super) fn attach_line(
    programs: &mut Programs,
    netlink: &mut Netlink,
    line: Line,
    interface: u32,
    outside: bool,
    hook: Hook,
) -> Result<()> {
    for (name, end) in line::names(interface, outside).iter().zip(line.ends) {
        if hook == Hook::Clsact {
            netlink.add_clsact(end)?;
        }
        crash::step("port.line.program")?;
        programs.attach(Program::LineOut, name, hook)?;
        programs.attach(Program::LineIn, name, hook)?;
    }
    Ok(())
}
