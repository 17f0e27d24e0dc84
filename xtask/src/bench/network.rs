//! The network fault beside netem, on one kernel after the other, and the page that shows it.
//!
//! What was measured on a kernel is kept in docs/network until it is measured again, so that the page can be made from several
//! runs, on several machines.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    io::{BufRead, BufReader},
    path::PathBuf,
    process::{Command, ExitCode, Stdio},
};

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::{Value, json};

use super::plot;
use crate::{builds, setup, tools, vm, workspace};

/// What to measure.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Series of kernels for the VMs, with commas between them.
    #[arg(long, value_delimiter = ',', default_value = "5.10,6.1,6.12,7.2")]
    kernels: Vec<String>,
    /// In VMs with one CPU whose clocks count its instructions: only the rows that are about time, which then repeat, whatever else this machine does.
    #[arg(long, conflicts_with = "host")]
    icount: bool,
    /// Measure on this host only: what it has no netem for is held to theory.
    #[arg(long)]
    host: bool,
    /// Only the rows whose name contains this word; the page keeps the others as they were measured before.
    #[arg(long)]
    only: Option<String>,
    /// Fewer packets and seconds. Leaves the page in docs/ as it is.
    #[arg(long)]
    quick: bool,
    /// Longest time for one VM, minutes.
    #[arg(long, default_value_t = 60)]
    minutes: u64,
}

/// Ends the name of what was measured by counting instructions.
const ICOUNT: &str = "-icount";

/// What one kernel gave.
#[derive(Debug, Default)]
pub(super) struct Results {
    /// `host`, or a series, with [`ICOUNT`] where that was so.
    pub(super) name: String,
    kernel: String,
    date: String,
    rows: Vec<Value>,
    /// Points of plots: `plot`, `name`, `points`.
    pub(super) series: Vec<Value>,
}

/// Measures everywhere that was asked for. Fails where something could not be measured, not where it missed its limit.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    setup::ensure(setup::ALL)?;
    let binaries = builds::release()?;
    let build = ["bench", "--locked", "--package", "squall-tests", "--bench", "network", "--no-run"];
    let built = builds::executables(build)?;
    let [(_, bench)] = &built[..] else { anyhow::bail!("not one benchmark: {built:?}") };
    let mut args = Vec::new();
    if let Some(only) = &options.only {
        // The VM's init splits at spaces.
        ensure!(!only.contains(char::is_whitespace), "--only takes one word");
        args.extend(["--only".to_owned(), only.clone()]);
    }
    if options.quick {
        args.push("--quick".to_owned());
    }
    if options.icount {
        args.push("--icount".to_owned());
    }
    let keep = !options.quick;
    let mut all_measured = true;
    let kernels: &[String] = if options.host { &[] } else { &options.kernels };
    for series in kernels {
        let command = std::iter::once("/bench/network".to_owned()).chain(args.iter().cloned());
        let job = vm::Job {
            programs: vec![("/bench/network".into(), bench.clone())],
            commands: vec![command.collect::<Vec<_>>().join(" ")],
            minutes: options.minutes,
            icount: options.icount,
        };
        let name = if options.icount { format!("{series}{ICOUNT}") } else { series.clone() };
        let mut results = Results::new(&name);
        all_measured &= vm::boot(series, &binaries, &job, |line| results.take(line))?;
        if options.icount {
            // The plots have lines enough.
            results.series.clear();
        }
        results.show(keep)?;
    }
    if options.host {
        let mut command = Command::new(bench);
        command.args(&args).env("SQUALL_BIN_DIR", &binaries).stdout(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("cannot start {}", tools::line(&command)))?;
        let mut results = Results::new("host");
        for line in BufReader::new(child.stdout.take().context("a pipe was asked for")?).lines() {
            let line = line?;
            println!("{line}");
            results.take(&line);
        }
        all_measured &= child.wait()?.success();
        results.show(keep)?;
    }
    if keep {
        let results = Results::all()?;
        fs::write(workspace().join("docs/network.md"), page(&results))?;
        plot::all(&workspace().join("docs"), &results)?;
        println!("docs/network.md and its plots are new");
    }
    Ok(if all_measured { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Results {
    pub(super) fn new(name: &str) -> Self {
        let date = jiff::Timestamp::now().strftime("%Y-%m-%d").to_string();
        Self { name: name.to_owned(), date, ..Self::default() }
    }

    /// Takes what a line of the benchmark's says.
    fn take(&mut self, line: &str) {
        if let Some(rest) = line.strip_prefix("Linux ") {
            self.kernel = rest.split(',').next().unwrap_or_default().to_owned();
        }
        let mut add = |marker: &str, into: fn(&mut Self) -> &mut Vec<Value>| {
            // A serial line may lose a character, and a row; it is then missing from the page.
            let value = line.strip_prefix(marker).and_then(|json| serde_json::from_str(json).ok());
            into(self).extend(value);
        };
        add("SQUALL-ROW ", |results| &mut results.rows);
        add("SQUALL-SERIES ", |results| &mut results.series);
    }

    /// Prints the table; and keeps the results, unless they were made quickly. Rows that were not measured stay.
    fn show(mut self, keep: bool) -> Result<()> {
        println!("\n{}", self.table());
        if !keep {
            return Ok(());
        }
        fs::create_dir_all(kept())?;
        let before = Self::all()?.into_iter().find(|old| old.is_of(&self));
        if let Some(mut before) = before {
            // The name of a row that could not be measured is that of its group.
            before
                .rows
                .retain(|row| !row["limit"].as_str().is_some_and(|limit| limit.starts_with("not measured")));
            self.rows = merge(before.rows, self.rows, |row| row["row"].clone());
            // A plot's line may be of several series, a point each.
            self.series = merge(before.series, self.series, |series| {
                let alone = series["points"].get(1).is_none();
                let at = if alone { series["points"][0][0].clone() } else { Value::Null };
                json!([series["plot"], series["name"], at])
            });
        }
        let Self { name, kernel, date, rows, series } = self;
        let json = json!({"name": name, "kernel": kernel, "date": date, "rows": rows, "series": series});
        fs::write(kept().join(format!("{name}.json")), lines(&json))?;
        Ok(())
    }

    /// Whether both are of one kernel. Hosts' builds of one version have names of their own.
    fn is_of(&self, other: &Self) -> bool {
        let kernel = |results: &Self| match results.name.as_str() {
            "host" => results.kernel.split('-').next().map(ToOwned::to_owned),
            _ => Some(results.kernel.clone()),
        };
        self.name == other.name && kernel(self) == kernel(other)
    }

    /// All that is kept: the kernels in order, the host last.
    fn all() -> Result<Vec<Self>> {
        let mut all = BTreeMap::new();
        for entry in fs::read_dir(kept())? {
            let path = entry?.path();
            let mut value: Value = serde_json::from_slice(&fs::read(&path)?)
                .with_context(|| format!("{} is damaged: remove it", path.display()))?;
            let mut list = |field: &str| match value[field].take() {
                Value::Array(list) => list,
                _ => Vec::new(),
            };
            let (rows, series) = (list("rows"), list("series"));
            let text = |field: &str| value[field].as_str().unwrap_or_default().to_owned();
            let results =
                Self { name: text("name"), kernel: text("kernel"), date: text("date"), rows, series };
            let (series, last) = match results.name.strip_suffix(ICOUNT) {
                Some(series) => (series, true),
                None => (results.name.as_str(), false),
            };
            let order: Vec<u32> = series.split('.').map(|n| n.parse().unwrap_or(u32::MAX)).collect();
            all.insert((order, last), results);
        }
        Ok(all.into_values().collect())
    }

    fn table(&self) -> String {
        let mut table =
            "| what | ours | netem, or unhurt | ratio | must reach | |\n|---|--:|--:|--:|---|---|\n"
                .to_owned();
        for row in &self.rows {
            let text = |field: &str| row[field].as_str().unwrap_or_default();
            let figure = |field: &str| row[field].as_f64().map(number).unwrap_or_default();
            let word = if row["ok"] == true { "✓" } else { "**missed**" };
            let _ = writeln!(
                table,
                "| {} | {} {} | {} | {} | {} | {word} |",
                text("row"),
                figure("ours"),
                text("unit"),
                figure("peer"),
                figure("ratio"),
                text("limit").replace('|', "\\|"),
            );
        }
        table
    }

    fn missed(&self) -> usize {
        self.rows.iter().filter(|row| row["ok"] != true).count()
    }
}

/// The old ones, each replaced by the new one of the same key; then the rest of the new ones.
fn merge(old: Vec<Value>, mut new: Vec<Value>, key: impl Fn(&Value) -> Value) -> Vec<Value> {
    let mut merged: Vec<Value> = Vec::new();
    for old in old {
        let same = new.iter().position(|new| key(new) == key(&old));
        merged.push(same.map_or(old, |at| new.remove(at)));
    }
    merged.append(&mut new);
    merged
}

/// JSON with a line for each row and series, so that a change shows as one.
fn lines(results: &Value) -> String {
    results.to_string().replace("},{", "},\n{").replace("[{", "[\n{")
}

fn kept() -> PathBuf {
    workspace().join("docs/network")
}

/// About four digits.
fn number(x: f64) -> String {
    let digits = match x.abs() {
        a if a >= 100.0 || a == 0.0 => 0,
        a if a >= 10.0 => 1,
        a if a >= 1.0 => 2,
        a if a >= 0.01 => 3,
        _ => 5,
    };
    format!("{x:.digits$}")
}

fn page(all: &[Results]) -> String {
    let mut page = "# The network fault beside netem\n\n\
        Made by `cargo xtask bench network` (kernels in VMs, in QEMU without KVM) and `cargo xtask bench network --host`, as \
        root. The two sides hurt the same wire in turns, in one boot: a veth pair between two network namespaces, hurt where \
        packets leave. A VM without KVM is slow and shares the machine, so that times have outliers; ratios of the same run \
        are what counts. Of throughputs, spreads and p99s the geometric means of the turns are shown, and their ratio must reach the \
        limit, or its 95 % interval must where that is narrower than 0.2. netem has no part in rows without its figure; what they must reach follows from what was asked. \
        A date is that of the newest row of its table. \
        Neighbours are beside a fault that is not about them. Where the row says so, they and delays are measured with an agent \
        at rest: a second after an injection it loads the programs for the next one, when nobody else wants the CPU, and that is \
        not in these rows. It takes some seconds of CPU in such a VM. And HyStart is switched off where the row says so, on either side: TCP's slow \
        start takes a VM's stall for a full queue, once in a while, and then the rest of that turn is slow.\n\n\
        With `--icount` the VM has one CPU whose clocks count its instructions, two nanoseconds each (`-icount` of QEMU). What takes time \
        is then the same in every turn, to a fraction of a microsecond, so that a difference of a percent shows; and so do spreads of a microsecond, \
        whose ratio says little. What several CPUs do to each other does not show there.\n\n"
        .to_owned();
    page.push_str("| kernel | measured | rows | missed |\n|---|---|--:|--:|\n");
    for results in all {
        let Results { name, kernel, date, rows, .. } = results;
        let _ = writeln!(page, "| {name} ({kernel}) | {date} | {} | {} |", rows.len(), results.missed());
    }
    page.push('\n');
    for (file, words) in plot::FILES {
        if workspace().join("docs").join(file).exists() {
            let _ = writeln!(page, "![{words}]({file})");
        }
    }
    for results in all {
        let command = match results.name.as_str() {
            "host" => "cargo xtask bench network --host".to_owned(),
            name => match name.strip_suffix(ICOUNT) {
                Some(series) => format!("cargo xtask bench network --icount --kernels {series}"),
                None => format!("cargo xtask bench network --kernels {name}"),
            },
        };
        let Results { name, kernel, date, .. } = results;
        let how = if name.ends_with(ICOUNT) { ", one CPU, instructions counted" } else { "" };
        let _ = write!(page, "\n## Linux {kernel}{how}\n\n{date}, `{command}`\n\n{}", results.table());
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_become_a_table() {
        let mut results = Results::new("6.1");
        results.take("Linux 6.1.0-50-cloud-amd64, netem: true");
        results.take(
            r#"SQUALL-ROW {"row":"delay 1 ms","unit":"ms","ours":1.06,"peer":1.0,"ratio":1.06,"limit":"near","ok":false}"#,
        );
        results.take("SQUALL-ROW {half");
        results.take("anything");
        assert_eq!((results.rows.len(), results.missed()), (1, 1));
        let table = results.table();
        assert!(table.contains("| delay 1 ms | 1.06 ms | 1.00 | 1.06 | near | **missed** |"), "{table}");
        let page = page(&[results]);
        assert!(page.contains("| 6.1 (6.1.0-50-cloud-amd64) |"), "{page}");
        assert!(page.contains("cargo xtask bench network --kernels 6.1"), "{page}");
    }

    #[test]
    fn what_is_measured_again_replaces_what_was() {
        let row = |name: &str, ours: u32| json!({"row": name, "ours": ours});
        let merged =
            merge(vec![row("a", 1), row("b", 2)], vec![row("c", 3), row("a", 4)], |row| row["row"].clone());
        assert_eq!(merged, [row("a", 4), row("b", 2), row("c", 3)]);
    }

    #[test]
    fn numbers_have_the_digits_that_say_something() {
        let all = [0.0, 0.000_123_4, 0.012_34, 1.234, 12.34, 123.4, -1.5].map(number);
        assert_eq!(all, ["0", "0.00012", "0.012", "1.23", "12.3", "123", "-1.50"]);
    }
}
