//! `squall-agent clean`: takes back what a dead agent left, without serving anything.
//!
//! First the journal, the newest record first; then, journal or not, what carries our marks: filters `squall_*`, lines
//! `squall*`, stressors. Each has an owner that can be looked up, and what a living agent owns is left alone. TAP devices and
//! TCX links need no cleaning: they end with their agent.

use std::{collections::BTreeSet, fs, path::PathBuf, thread, time::Duration};

use anyhow::{Result, bail};

use crate::{
    fault::KINDS,
    host::{
        bpf::remove_filters,
        line,
        netns::Netns,
        proc,
        tc::{Interface, Netlink},
    },
    journal::{Journal, Left, boot_id, set_aside},
    stress,
};

/// A line is without its owner's mark for a moment after it was made; one that is so for longer has none.
const UNMARKED: Duration = Duration::from_secs(1);

/// What to clean.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Directory of the undo journal; no agent may be using it
    #[arg(long, default_value = "/var/lib/squall", value_name = "DIR")]
    state_dir: PathBuf,
    /// Only say what would be done
    #[arg(long)]
    dry_run: bool,
}

/// What is done, said line by line, and what could not be done.
struct Broom {
    dry_run: bool,
    done: usize,
    failed: Vec<String>,
}

/// Cleans up. Fails where something is left.
pub async fn main(args: &Args) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("squall-agent clean needs root: it enters namespaces and removes what the agent made there");
    }
    let mut broom = Broom { dry_run: args.dry_run, done: 0, failed: Vec::new() };
    // Held to the end, so that no agent starts meanwhile. A dry run makes no directory.
    let journal =
        (args.state_dir.exists() || !args.dry_run).then(|| Journal::open(&args.state_dir)).transpose()?;
    if let Some(journal) = &journal {
        broom.journal(journal).await?;
    }
    broom.strays()?;
    match (broom.failed.is_empty(), broom.done, args.dry_run) {
        (false, _, _) => bail!("not everything could be undone:\n  {}", broom.failed.join("\n  ")),
        (true, 0, _) => println!("nothing to clean"),
        (true, n, true) => println!("{n} to clean; nothing was changed"),
        (true, n, false) => println!("{n} cleaned"),
    }
    Ok(())
}

impl Broom {
    /// Does one thing, or only says it.
    fn sweep(&mut self, what: &str, act: impl FnOnce() -> Result<()>) {
        if self.dry_run {
            println!("would {what}");
            self.done += 1;
            return;
        }
        self.note(what, act());
    }

    fn note(&mut self, what: &str, result: Result<()>) {
        match result {
            Ok(()) => {
                println!("{what}: done");
                self.done += 1;
            }
            Err(e) => self.failed.push(format!("{what}: {e:#}")),
        }
    }

    async fn journal(&mut self, journal: &Journal) -> Result<()> {
        let found = if self.dry_run { journal.undo.look()? } else { journal.undo.read()? };
        for (path, reason) in found.set_aside {
            self.failed.push(format!(
                "{}: {reason}; undo it by hand, or with the version of squall-agent that wrote it",
                path.display()
            ));
        }
        for (path, error) in found.unread {
            self.failed.push(format!("{}: {error}; it stays, so try again", path.display()));
        }
        for path in found.aside {
            self.failed.push(format!(
                "{}: it was set aside before; undo it by hand, or with the version of squall-agent that wrote it, and remove it",
                path.display()
            ));
        }
        let boot_id = boot_id()?;
        for record in found.records {
            let (id, kind, target) = (&record.id, &record.kind, &record.target);
            if record.boot_id != boot_id {
                self.sweep(&format!("forget {id}, which a reboot undid"), || journal.undo.remove(id));
                continue;
            }
            let what = format!("undo {id}, a {kind} fault on {target}");
            let Some(known) = KINDS.iter().find(|known| known.name == kind) else {
                self.failed.push(format!("{what}: this version does not know this kind of fault"));
                continue;
            };
            if self.dry_run {
                self.sweep(&what, || Ok(()));
                continue;
            }
            let reverted = known.revert(record.undo.clone()).await;
            self.note(&what, reverted.and_then(|()| journal.undo.remove(id)));
        }
        let left = if self.dry_run { journal.left.look()? } else { journal.left.read()? };
        for (path, reason) in left.set_aside {
            println!("{}: {reason}; nothing is resumed from it", path.display());
        }
        for (path, error) in left.unread {
            let what = format!("set {} aside ({error}), so that nothing is resumed from it", path.display());
            self.sweep(&what, || set_aside(&path));
        }
        for Left { id, kind, target, .. } in left.records {
            let what = format!("forget that the next agent was to resume {id}, a {kind} fault on {target}");
            self.sweep(&what, || journal.left.remove(&id));
        }
        Ok(())
    }

    /// What carries our marks and has no living owner.
    fn strays(&mut self) -> Result<()> {
        for (pid, token) in stress::orphans()? {
            let what = format!("end the stressor {pid} of {token}, whose agent is gone");
            self.sweep(&what, || stress::end(pid, &token).map(drop));
        }
        let all = Netns::all()?;
        if all.iter().map(unowned).collect::<Result<Vec<_>>>()?.concat().iter().any(|i| i.alias.is_none()) {
            thread::sleep(UNMARKED);
        }
        for netns in &all {
            for Interface { name, index, .. } in unowned(netns)? {
                let what = format!("remove {name} from net:[{}]", netns.inode());
                self.sweep(&what, || netns.run(|| Netlink::open()?.remove_link(index)));
            }
        }
        all.iter().try_for_each(|netns| self.filters(netns))
    }

    fn filters(&mut self, netns: &Netns) -> Result<()> {
        let found = netns.run(|| {
            let mut netlink = Netlink::open()?;
            let mut found = Vec::new();
            for interface in netlink.interfaces()?.into_iter().filter(|i| !line::is_name(&i.name)) {
                let filters = netlink.filters(interface.index)?;
                let ours: Vec<_> = filters.iter().filter(|f| f.name.starts_with("squall_")).collect();
                if ours.is_empty() {
                    continue;
                }
                // Looked up after the filters, so that none is taken for a stray that is being made.
                let held = held_programs();
                if !ours.iter().any(|f| held.contains(&f.program)) {
                    found.push((interface, ours.len() == filters.len()));
                }
            }
            Ok(found)
        })?;
        for (Interface { name, index, .. }, alone) in found {
            let more = if alone { " and its clsact qdisc" } else { "" };
            let what = format!("remove the filters squall_* of {name} in net:[{}]{more}", netns.inode());
            self.sweep(&what, || {
                netns.run(|| {
                    remove_filters(&name)?;
                    // Nobody else used it.
                    if alone { Netlink::open()?.remove_empty_clsact(index) } else { Ok(()) }
                })
            });
        }
        Ok(())
    }
}

/// Ends of lines whose agent is gone.
fn unowned(netns: &Netns) -> Result<Vec<Interface>> {
    let mut all = netns.run(|| Netlink::open()?.interfaces())?;
    all.retain(|i| line::is_name(&i.name) && !line::owned(i.alias.as_deref()));
    Ok(all)
}

/// Ids of the eBPF programs of which a process has a descriptor.
fn held_programs() -> BTreeSet<u32> {
    let infos = proc::pids().unwrap_or_default().into_iter();
    let infos =
        infos.flat_map(|pid| fs::read_dir(format!("/proc/{pid}/fdinfo")).into_iter().flatten().flatten());
    // Processes and descriptors come and go.
    let texts = infos.filter_map(|info| fs::read_to_string(info.path()).ok());
    texts
        .filter_map(|text| text.lines().find_map(|l| l.strip_prefix("prog_id:")?.trim().parse().ok()))
        .collect()
}
