//! The network fault and netem side by side, in turns, on one kernel: every row of what the fault must reach. Where the
//! kernel has no netem, the fault is held to theory, and its TAP queue to an unhurt wire.
//!
//! Prints a line for people and one for machines, of JSON behind `SQUALL-ROW`, for each row; and behind `SQUALL-SERIES`
//! what plots are made of. Asserts nothing: `ok` says whether a row reached its limit. See `cargo xtask bench network`.
//!
//! `--only WORDS`: only rows whose name contains this. `--quick`: a tenth of the packets, a third of the time. `--icount`: on a machine whose
//! clocks count instructions, only rows that are about time, and fewer turns, since they are all alike.

#[path = "../tests/side/mod.rs"]
mod side;

use std::{env, fs, thread, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use procfs::process::Process;
use serde_json::{Value, json};
use side::{
    Duel, FAR, PORT, Side, at_once, corrupt, delay, duplicate, figure, jitter, leaving, loss, of_port,
    of_the_probe, rate, reorder, shape, wire_bytes,
};
use squall_lab::{
    Probe, Seen, Stream, bin_dir, monotonic, round_trips,
    stats::{
        Chain, Runs, Z99, binomial99, compare_pairs, inside99, kolmogorov_smirnov, mean, quantile,
        share_of_parts,
    },
};
use squall_proto::v1::{Distribution, FourState, GilbertElliott, Injection, Loss, NetworkFault, Rate};
use squall_tests::Lab;

/// What the bench was asked for.
#[derive(Debug, Clone)]
struct Bench {
    only: String,
    quick: bool,
    icount: bool,
    failed: u32,
}

/// A row of the table.
#[derive(Debug, Clone, Default)]
struct Row {
    name: String,
    unit: &'static str,
    ours: f64,
    /// What netem, or the unhurt wire, did; where there is such a thing.
    peer: Option<f64>,
    /// What must be reached, in words.
    limit: String,
    ok: bool,
}

fn main() -> Result<()> {
    let mut bench = Bench { only: String::new(), quick: false, icount: false, failed: 0 };
    let mut args = env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--only" => bench.only = args.next().context("--only wants a part of a row's name")?,
            "--quick" => bench.quick = true,
            "--icount" => bench.icount = true,
            // What cargo tells every benchmark.
            "--bench" => {}
            _ => bail!("unknown argument {arg}"),
        }
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(bench.measure())
}

/// Runs a group of rows if one of its names is wanted; a group that fails is a row that is not ok.
macro_rules! rows {
    ($bench:ident, $duel:ident, $name:expr, $measure:expr) => {
        let name: String = $name.into();
        if $bench.wants(&name) {
            match $measure.await {
                Ok(rows) => rows.iter().for_each(Row::print),
                Err(e) => {
                    $bench.failed += 1;
                    println!("the agent's log:\n{}", $duel.agent.log());
                    let limit = format!("not measured: {e:#}");
                    Row { name, limit, ..Row::default() }.print();
                }
            }
        }
    };
}

impl Bench {
    /// Packets, or fewer.
    fn packets(&self, full: u32) -> u32 {
        if self.quick { full / 10 } else { full }
    }

    fn seconds(&self, full: u64) -> Duration {
        Duration::from_secs(if self.quick { full.div_ceil(3) } else { full })
    }

    fn rounds(&self, full: u32) -> u32 {
        match (self.quick, self.icount) {
            (true, _) => 1,
            (_, true) => full.div_ceil(4),
            _ => full,
        }
    }

    /// Rounds that take little time in a counted VM, because it does not wait: as many there as elsewhere.
    fn short_rounds(&self, full: u32) -> u32 {
        self.rounds(if self.icount { 4 * full } else { full })
    }

    fn wants(&self, name: &str) -> bool {
        let of_time = ["delay", "TCP throughput", "neighbour"].iter().any(|what| name.starts_with(what));
        name.contains(&self.only) && (of_time || !self.icount)
    }

    async fn measure(mut self) -> Result<()> {
        let mut duel = Duel::new("network").await?;
        let release = nix::sys::utsname::uname()?;
        println!("Linux {}, netem: {}", release.release().to_string_lossy(), duel.netem);
        let (bench, duel) = (&mut self, &mut duel);
        if duel.netem {
            for ms in [1, 10, 100, 1000] {
                rows!(bench, duel, format!("delay {ms} ms"), delays(bench, duel, ms));
            }
            for flows in [1, 16] {
                for ms in [10, 100] {
                    let name = format!("TCP throughput, {flows} flows, {ms} ms");
                    rows!(bench, duel, name.clone(), throughput(bench, duel, &name, flows, ms));
                }
            }
            for percent in [0.1, 1.0, 5.0] {
                let name = format!("TCP retransmits, loss {percent} %");
                rows!(bench, duel, name.clone(), retransmits(bench, duel, &name, percent));
            }
        } else {
            for ms in [0, 10, 100] {
                let name = format!("TAP queue, {ms} ms");
                rows!(bench, duel, name.clone(), tap_delay(bench, duel, &name, ms));
            }
            rows!(bench, duel, "TAP queue, TCP at 10 ms", tap_throughput(bench, duel));
            for (what, rules, cidrs, most) in
                [("1 rule", 1, 1, 20.0), ("64 rules, 10 000 CIDRs", 64, 10_000, 90.0)]
            {
                let name = format!("cost of a packet that does not match, {what}");
                rows!(bench, duel, name.clone(), cost(&name, rules, cidrs, most));
            }
        }
        for percent in [0.1, 1.0, 5.0] {
            let name = format!("UDP loss {percent} %");
            rows!(bench, duel, name.clone(), udp_loss(bench, duel, &name, percent));
        }
        for correlation in [25.0, 50.0] {
            let name = format!("loss 5 %, correlation {correlation} %");
            rows!(bench, duel, name.clone(), correlated(bench, duel, &name, correlation));
        }
        for model in
            [Chain { p: 0.01, r: 0.1, bad: 1.0, good: 0.0 }, Chain { p: 0.01, r: 0.1, bad: 0.7, good: 0.001 }]
        {
            let name = format!("Gilbert–Elliott {} %", gemodel(model).join(" % "));
            rows!(bench, duel, name.clone(), gilbert_elliott(bench, duel, &name, model));
        }
        rows!(bench, duel, "loss state 1 % 20 % 30 % 40 % 0.5 %", four_state(bench, duel));
        rows!(bench, duel, "loss every 7th", every(bench, duel));
        for (name, distribution) in [
            ("uniform", Distribution::Uniform),
            ("normal", Distribution::Normal),
            ("pareto", Distribution::Pareto),
            ("paretonormal", Distribution::Paretonormal),
        ] {
            if duel.netem {
                rows!(bench, duel, format!("jitter, {name}"), jitters(bench, duel, name, distribution));
            }
        }
        rows!(bench, duel, "duplicate 5 %", duplicates(bench, duel));
        rows!(bench, duel, "corrupt 5 %, caught", corrupt_caught(bench, duel));
        rows!(bench, duel, "corrupt 5 %, silent", corrupt_silent(bench, duel));
        for (percent, gap) in [(25.0, 1), (50.0, 5)] {
            let name = format!("reorder {percent} %, gap {gap}");
            rows!(bench, duel, name.clone(), reordered(bench, duel, &name, percent, gap));
        }
        rows!(bench, duel, "rate 10 Mbit/s", rates(bench, duel));
        rows!(bench, duel, "rate 500 kbit/s, burst 50 kB", bursts(bench, duel));
        rows!(bench, duel, "neighbour", neighbours(bench, duel));
        rows!(bench, duel, "change of a live rule", live(bench, duel));
        rows!(bench, duel, "counters: UDP", counters(bench, duel));
        rows!(bench, duel, "counters: TCP segments", segments(bench, duel));
        ensure!(bench.failed == 0, "{} could not be measured", bench.failed);
        Ok(())
    }
}

impl Row {
    fn print(&self) {
        let Self { name, unit, ours, peer, limit, ok } = self;
        let ratio = peer.filter(|peer| *peer != 0.0).map(|peer| ours / peer);
        let line = json!({"row": name, "unit": unit, "ours": ours, "peer": peer, "ratio": ratio, "limit": limit, "ok": ok});
        println!("SQUALL-ROW {line}");
        let number = |x: f64| format!("{x:.6}");
        let peer = peer.map_or_else(|| "-".to_owned(), number);
        let word = if *ok { "ok" } else { "MISSED" };
        println!("{word:6} {name}: {} {unit}, peer {peer} ({limit})", number(*ours));
    }
}

/// Points of a line in a plot.
fn series(plot: &str, name: &str, points: &[(f64, f64)]) {
    let line: Value = json!({"plot": plot, "name": name, "points": points});
    println!("SQUALL-SERIES {line}");
}

fn plot_quantiles(plot: &str, name: &str, sample: &[f64]) {
    let points: Vec<(f64, f64)> = (0..=100)
        .map(|percent| {
            let q = f64::from(percent) / 100.0;
            (quantile(sample, q), q)
        })
        .collect();
    series(plot, name, &points);
}

async fn delays(bench: &Bench, duel: &mut Duel, ms: u64) -> Result<Vec<Row>> {
    let probe = Probe {
        packets: bench.packets(1000),
        // No packet is sent when another comes due, which would measure the sender, and none of many in a row when the kernel's clock ticks.
        gap: Duration::from_nanos(2_313_700),
        patience: Duration::from_millis(ms + 300),
        ..Probe::default()
    };
    let sides = [Side::ours(delay(ms)), Side::Netem(format!("delay {ms}ms limit 100000"))];
    let agent = duel.agent.pid();
    let shapes = in_turns(duel, [&sides[0], &sides[1]], bench.short_rounds(8), |lab| {
        at_rest(agent)?;
        let seen = probe.run(&lab.near, &lab.far, FAR)?;
        ensure!(seen.losses() == 0, "{} packets were lost", seen.losses());
        Ok(shape(&seen.times()))
    });
    let [ours, theirs] = shapes.await?.map(|turns| turns.into_iter().unzip::<f64, f64, Vec<_>, Vec<_>>());
    let spreads = Pairs::new(&[ours.1, theirs.1]);
    let [ours, theirs] = [ours.0, theirs.0].map(|medians| quantile(&medians, 0.5));
    series("delay-error", "ours", &[(ms as f64, ours - ms as f64)]);
    series("delay-error", "netem", &[(ms as f64, theirs - ms as f64)]);
    let most = (theirs * 0.01).max(0.2);
    Ok(vec![
        Row {
            name: format!("delay {ms} ms: median"),
            unit: "ms",
            ours,
            peer: Some(theirs),
            limit: format!("within {most:.2} ms"),
            ok: (ours - theirs).abs() <= most,
        },
        spreads.row(&format!("delay {ms} ms: p99 − p50"), "ms", "≤ 1.25 ×, agent at rest", |ratio| {
            ratio <= 1.25
        }),
    ])
}

/// Measures two sides in turns, and returns each side's figures.
async fn in_turns<T>(
    duel: &mut Duel,
    sides: [&Side; 2],
    rounds: u32,
    measure: impl Fn(&Lab) -> Result<T>,
) -> Result<[Vec<T>; 2]> {
    let mut all = [Vec::new(), Vec::new()];
    for round in 0..rounds {
        // Each is first as often as the other.
        for i in if round % 2 == 0 { [0, 1] } else { [1, 0] } {
            all[i].push(duel.during(sides[i], &measure).await?.0);
        }
    }
    Ok(all)
}

/// What two sides reached in pairs of turns.
struct Pairs {
    /// The geometric mean of each side's turns.
    means: [f64; 2],
    /// The 95 % interval of the ratio, where there are turns enough.
    interval: Option<[f64; 2]>,
}

impl Pairs {
    fn new(turns: &[Vec<f64>; 2]) -> Self {
        const ENOUGH: usize = 5;
        let (means, interval) = compare_pairs(turns);
        Self { means, interval: Some(interval).filter(|_| turns[0].len() >= ENOUGH) }
    }

    fn row(self, name: &str, unit: &'static str, limit: &str, ok: impl Fn(f64) -> bool) -> Row {
        let [ours, theirs] = self.means;
        let mut row = Row {
            name: name.into(),
            unit,
            ours,
            peer: Some(theirs),
            limit: limit.to_owned(),
            ok: ok(ours / theirs),
        };
        if let Some([low, high]) = self.interval {
            row.limit = format!("{limit}; 95 % interval {low:.3} to {high:.3}");
            // What it may well be reaches it, where that is narrow enough to say something.
            row.ok |= high - low < 0.2 && (ok(low) || ok(high));
        }
        row
    }
}

async fn throughput(bench: &Bench, duel: &mut Duel, name: &str, flows: u32, ms: u64) -> Result<Vec<Row>> {
    let sides = [Side::ours(delay(ms)), Side::Netem(format!("delay {ms}ms limit 100000"))];
    let seconds = bench.seconds(6);
    let agent = duel.agent.pid();
    // HyStart ends slow start when packets come late, as they do in a VM whenever the machine that runs it has no time.
    let in_vm = env::var_os("SQUALL_VM").is_some();
    let hystart = |on: &str| {
        let file = "/sys/module/tcp_cubic/parameters/hystart";
        if in_vm { fs::write(file, on).with_context(|| format!("cannot write {file}")) } else { Ok(()) }
    };
    hystart("0")?;
    let all = in_turns(duel, [&sides[0], &sides[1]], bench.rounds(8), |lab| {
        at_rest(agent)?;
        Ok(lab.near.streams(&lab.far, FAR, seconds, flows)?.bits_per_second / 1e6)
    });
    let all = all.await;
    hystart("1")?;
    let pairs = Pairs::new(&all?);
    let x = f64::from(flows) * 1000.0 + ms as f64;
    series("throughput", "ours", &[(x, pairs.means[0])]);
    series("throughput", "netem", &[(x, pairs.means[1])]);
    let limit = format!("≥ 1.0 ×, agent at rest{}", if in_vm { ", without HyStart" } else { "" });
    Ok(vec![pairs.row(name, "Mbit/s", &limit, |ratio| ratio >= 1.0)])
}

async fn retransmits(bench: &Bench, duel: &mut Duel, name: &str, percent: f64) -> Result<Vec<Row>> {
    // One segment a packet: a lost packet of many would be sent again as many, or not, and that is noise.
    duel.lab.near.ip("link set near0 gso_max_segs 1")?;
    let sides = [
        Side::ours(loss(Loss { ratio: percent / 100.0, ..Loss::default() })),
        Side::Netem(format!("loss {percent}% limit 100000")),
    ];
    let seconds = bench.seconds(6);
    let all = in_turns(duel, [&sides[0], &sides[1]], bench.rounds(4), |lab| {
        lab.near.stream(&lab.far, FAR, seconds)
    });
    let all = all.await;
    duel.lab.near.ip("link set near0 gso_max_segs 65535")?;
    let [ours, theirs] = all?.map(|streams: Vec<Stream>| {
        let gigabytes = streams.iter().map(|stream| stream.bytes).sum::<u64>() as f64 / 1e9;
        streams.iter().map(|stream| stream.retransmits).sum::<u64>() as f64 / gigabytes
    });
    Ok(vec![Row {
        name: name.into(),
        unit: "segments/GB",
        ours,
        peer: Some(theirs),
        limit: "within 15 %".into(),
        ok: (ours / theirs - 1.0).abs() <= 0.15,
    }])
}

async fn tap_delay(bench: &Bench, duel: &mut Duel, name: &str, ms: u64) -> Result<Vec<Row>> {
    let probe = Probe {
        packets: bench.packets(1000),
        gap: Duration::from_millis(2),
        patience: Duration::from_millis(ms + 300),
        ..Probe::default()
    };
    // Without a delay: what the decision costs.
    let fault = if ms == 0 { loss(Loss { ratio: 0.001, ..Loss::default() }) } else { delay(ms) };
    let fault = Side::ours(fault);
    let sides = [&fault, &Side::Nothing];
    let [ours, none] = in_turns(duel, sides, bench.rounds(3), |lab| {
        Ok(shape(&probe.run(&lab.near, &lab.far, FAR)?.times()).0)
    })
    .await?;
    let (ours, none) = (quantile(&ours, 0.5), quantile(&none, 0.5));
    let error = ours - none - ms as f64;
    series("delay-error", "TAP queue", &[(ms as f64, error)]);
    Ok(vec![Row {
        name: format!("{name}: added error at p50"),
        unit: "ms",
        ours: error,
        peer: None,
        limit: "≤ 0.2 ms".into(),
        ok: error.abs() <= 0.2,
    }])
}

async fn tap_throughput(bench: &Bench, duel: &mut Duel) -> Result<Vec<Row>> {
    let seconds = bench.seconds(8);
    let [ours, none] = in_turns(duel, [&Side::ours(delay(10)), &Side::Nothing], bench.rounds(3), |lab| {
        Ok(lab.near.stream(&lab.far, FAR, seconds)?.bits_per_second / 1e6)
    })
    .await?;
    let (ours, none) = (mean(&ours).0, mean(&none).0);
    series("throughput", "TAP queue", &[(1010.0, ours)]);
    series("throughput", "unhurt", &[(1010.0, none)]);
    Ok(vec![Row {
        name: "TAP queue, TCP at 10 ms".into(),
        unit: "Mbit/s",
        ours,
        peer: Some(none),
        limit: "≥ 5 % of the unhurt wire".into(),
        ok: ours >= none * 0.05,
    }])
}

/// Many packets, as fast as one can send and another receive.
fn many(packets: u32) -> Probe {
    Probe { packets, gap: Duration::from_micros(20), ..Probe::default() }
}

/// Sends many packets under ours, and under netem where there is one.
async fn both(
    duel: &mut Duel,
    fault: NetworkFault,
    words: &str,
    probe: Probe,
) -> Result<(Seen, Option<Injection>, Option<Seen>)> {
    let (ours, ended) = duel.probe(&Side::ours(of_the_probe(fault)), probe).await?;
    let theirs = if duel.netem {
        Some(duel.probe(&Side::Netem(format!("{words} limit 100000")), probe).await?.0)
    } else {
        None
    };
    Ok((ours, ended, theirs))
}

fn interval(hits: u64, trials: u64) -> String {
    let (low, high) = binomial99(hits, trials);
    format!("{:.3} % to {:.3} %", low * 100.0, high * 100.0)
}

async fn udp_loss(bench: &Bench, duel: &mut Duel, name: &str, percent: f64) -> Result<Vec<Row>> {
    let fault = loss(Loss { ratio: percent / 100.0, ..Loss::default() });
    let probe = many(bench.packets(100_000));
    let (ours, _, theirs) = both(duel, fault, &format!("loss {percent}%"), probe).await?;
    let (lost, sent) = (ours.losses(), ours.sent.len() as u64);
    Ok(vec![Row {
        name: name.into(),
        unit: "%",
        ours: lost as f64 / sent as f64 * 100.0,
        peer: theirs.map(|seen| seen.losses() as f64 / seen.sent.len() as f64 * 100.0),
        limit: format!("99 % interval {} has it", interval(lost, sent)),
        ok: inside99(percent / 100.0, lost, sent),
    }])
}

fn chain_rows(name: &str, chain: Chain, ours: &Seen, theirs: Option<&Seen>) -> Vec<Row> {
    let runs = Runs::of(&ours.lost());
    let theirs = theirs.map(|seen| Runs::of(&seen.lost()));
    let share = Z99 * chain.deviation(runs.total) * 100.0;
    vec![
        Row {
            name: format!("{name}: rate"),
            unit: "%",
            ours: runs.rate() * 100.0,
            peer: theirs.as_ref().map(|theirs| theirs.rate() * 100.0),
            limit: format!("{:.3} ± {share:.3} %", chain.rate() * 100.0),
            ok: chain.fits_rate(&runs),
        },
        Row {
            name: format!("{name}: run length"),
            unit: "packets",
            ours: runs.length().0,
            peer: theirs.map(|theirs| theirs.length().0),
            limit: format!("{:.3} ± {:.3}", chain.run_length(), chain.run_width(&runs)),
            ok: chain.fits_runs(&runs),
        },
    ]
}

async fn correlated(bench: &Bench, duel: &mut Duel, name: &str, correlation: f64) -> Result<Vec<Row>> {
    let fault = loss(Loss { ratio: 0.05, correlation: correlation / 100.0, ..Loss::default() });
    let probe = many(bench.packets(100_000));
    let (ours, _, theirs) = both(duel, fault, &format!("loss 5% {correlation}%"), probe).await?;
    let chain = Chain::correlated(0.05, correlation / 100.0);
    Ok(chain_rows(name, chain, &ours, theirs.as_ref()))
}

/// The model's parameters as netem wants them, percent.
fn gemodel(chain: Chain) -> [String; 4] {
    [chain.p, chain.r, chain.bad, chain.good].map(|ratio| format!("{}", (ratio * 1e6).round() / 1e4))
}

async fn gilbert_elliott(bench: &Bench, duel: &mut Duel, name: &str, chain: Chain) -> Result<Vec<Row>> {
    let Chain { p, r, bad, good } = chain;
    let model = GilbertElliott { p, r, loss_bad: bad, loss_good: good };
    let fault = loss(Loss { gilbert_elliott: Some(model), ..Loss::default() });
    let words = format!("loss gemodel {}%", gemodel(chain).join("% "));
    let (ours, _, theirs) = both(duel, fault, &words, many(bench.packets(100_000))).await?;
    Ok(chain_rows(name, chain, &ours, theirs.as_ref()))
}

async fn four_state(bench: &Bench, duel: &mut Duel) -> Result<Vec<Row>> {
    let model = FourState { p13: 0.01, p31: 0.2, p32: 0.3, p23: 0.4, p14: 0.005 };
    let fault = loss(Loss { four_state: Some(model), ..Loss::default() });
    let words = "loss state 1% 20% 30% 40% 0.5%";
    let (ours, _, theirs) = both(duel, fault, words, many(bench.packets(100_000))).await?;
    // How often each state is visited, if the first is visited once.
    let burst_lost = model.p13 / model.p31;
    let burst_received = burst_lost * model.p32 / model.p23;
    let theory = (burst_lost + model.p14) / (1.0 + burst_lost + burst_received + model.p14);
    let (rate, width) = share_of_parts(&ours.lost());
    Ok(vec![Row {
        name: "loss state 1 % 20 % 30 % 40 % 0.5 %".into(),
        unit: "%",
        ours: rate * 100.0,
        peer: theirs.map(|seen| Runs::of(&seen.lost()).rate() * 100.0),
        limit: format!("{:.3} ± {:.3} %", theory * 100.0, width * 100.0),
        ok: (rate - theory).abs() <= width,
    }])
}

async fn every(bench: &Bench, duel: &mut Duel) -> Result<Vec<Row>> {
    let fault = of_the_probe(loss(Loss { every: 7, ..Loss::default() }));
    let (seen, _) = duel.probe(&Side::ours(fault), many(bench.packets(7_000))).await?;
    let lost = seen.lost();
    let right = lost.iter().enumerate().filter(|(i, lost)| **lost == (i % 7 == 6)).count();
    Ok(vec![Row {
        name: "loss every 7th".into(),
        unit: "% of fates as they must be",
        ours: right as f64 / lost.len() as f64 * 100.0,
        peer: None,
        limit: "100 %".into(),
        ok: right == lost.len(),
    }])
}

async fn jitters(bench: &Bench, duel: &mut Duel, name: &str, distribution: Distribution) -> Result<Vec<Row>> {
    // Apart enough that no two leave at once; and so wide that what a timer adds is little beside it.
    let probe = Probe {
        packets: bench.packets(1_250),
        gap: Duration::from_millis(2),
        patience: Duration::from_millis(500),
        ..Probe::default()
    };
    let words =
        if distribution == Distribution::Uniform { String::new() } else { format!("distribution {name}") };
    let ours = Side::ours(jitter(100, 20, distribution));
    let theirs = Side::Netem(format!("delay 100ms 20ms {words} limit 100000"));
    let all =
        in_turns(duel, [&ours, &theirs], 4, |lab| Ok(probe.run(&lab.near, &lab.far, FAR)?.times())).await?;
    let [ours, theirs] = all.map(|rounds| rounds.concat());
    let (distance, p) = kolmogorov_smirnov(&ours, &theirs);
    plot_quantiles(&format!("jitter-{name}"), "ours", &ours);
    plot_quantiles(&format!("jitter-{name}"), "netem", &theirs);
    Ok(vec![Row {
        name: format!("jitter, {name}: Kolmogorov–Smirnov p"),
        unit: "",
        ours: p,
        peer: None,
        limit: format!("> 0.01; distance {distance:.4}"),
        ok: p > 0.01,
    }])
}

async fn duplicates(bench: &Bench, duel: &mut Duel) -> Result<Vec<Row>> {
    let probe = many(bench.packets(50_000));
    let (ours, _, theirs) = both(duel, duplicate(0.05), "duplicate 5%", probe).await?;
    let (twice, sent) = (ours.duplicates(), ours.sent.len() as u64);
    Ok(vec![Row {
        name: "duplicate 5 %".into(),
        unit: "%",
        ours: twice as f64 / sent as f64 * 100.0,
        peer: theirs.map(|seen| seen.duplicates() as f64 / seen.sent.len() as f64 * 100.0),
        limit: format!("99 % interval {} has it, none lost", interval(twice, sent)),
        ok: inside99(0.05, twice, sent) && ours.losses() == 0,
    }])
}

/// Packets large enough that hardly a flipped bit hits a header.
fn large(packets: u32) -> Probe {
    Probe { size: 1_000, ..many(packets) }
}

async fn corrupt_caught(bench: &Bench, duel: &mut Duel) -> Result<Vec<Row>> {
    let probe = large(bench.packets(50_000));
    let mut caught = Vec::new();
    let mut sides = vec![Side::ours(of_the_probe(corrupt(0.05, false)))];
    if duel.netem {
        sides.push(Side::Netem("corrupt 5% limit 100000".into()));
    }
    for side in sides {
        let before = duel.lab.far.counters()?;
        let (seen, _) = duel.probe(&side, probe).await?;
        let errors = duel.lab.far.counters()?.grown(&before, "Udp", "InCsumErrors")?;
        caught.push((seen, errors));
    }
    let (seen, errors) = &caught[0];
    let (lost, sent) = (seen.losses(), seen.sent.len() as u64);
    Ok(vec![Row {
        name: "corrupt 5 %, caught".into(),
        unit: "% with a wrong checksum",
        ours: *errors as f64 / sent as f64 * 100.0,
        peer: caught.get(1).map(|(seen, errors)| *errors as f64 / seen.sent.len() as f64 * 100.0),
        limit: format!("99 % interval {} has it, none arrives wrong", interval(lost, sent)),
        // A bit of the length in the UDP header makes a packet that is too short: one of 500.
        ok: inside99(0.05, lost, sent) && *errors * 100 >= lost * 98 && seen.flipped().0 == 0,
    }])
}

async fn corrupt_silent(bench: &Bench, duel: &mut Duel) -> Result<Vec<Row>> {
    let probe = large(bench.packets(50_000));
    let (seen, _) = duel.probe(&Side::ours(of_the_probe(corrupt(0.05, true))), probe).await?;
    let ((wrong, most), lost, sent) = (seen.flipped(), seen.losses(), seen.sent.len() as u64);
    Ok(vec![Row {
        name: "corrupt 5 %, silent".into(),
        unit: "% arrived wrong",
        ours: wrong as f64 / sent as f64 * 100.0,
        peer: None,
        limit: format!("99 % interval {} has it, one bit each", interval(wrong + lost, sent)),
        // A bit of the UDP header loses the packet: one of 125.
        ok: inside99(0.05, wrong + lost, sent) && most == 1 && lost * 20 <= wrong,
    }])
}

async fn reordered(bench: &Bench, duel: &mut Duel, name: &str, percent: f64, gap: u64) -> Result<Vec<Row>> {
    let probe = Probe { packets: bench.packets(20_000), gap: Duration::from_micros(250), ..Probe::default() };
    let ratio = percent / 100.0;
    let fault = reorder(50, ratio, gap);
    let words = format!("delay 50ms reorder {percent}% gap {gap}");
    let (ours, _, theirs) = both(duel, fault, &words, probe).await?;
    let (early, chances) = at_once(&ours, 50.0, gap);
    let apart = early.windows(2).all(|pair| u64::from(pair[1] - pair[0]) >= gap);
    let share = |seen: &Seen| at_once(seen, 50.0, gap).0.len() as f64 / seen.sent.len() as f64 * 100.0;
    let hits = early.len() as u64;
    Ok(vec![Row {
        name: name.into(),
        unit: "% sent at once",
        ours: share(&ours),
        peer: theirs.as_ref().map(share),
        limit: format!("99 % interval {} of the chances has it", interval(hits, chances)),
        ok: inside99(ratio, hits, chances) && apart && ours.losses() == 0 && ours.early() > 0,
    }])
}

async fn rates(bench: &Bench, duel: &mut Duel) -> Result<Vec<Row>> {
    let seconds = bench.seconds(10).as_secs_f64();
    let probe = Probe { size: 1_000, ..Probe::default() };
    let bits = wire_bytes(probe) as f64 * 8.0;
    // A fifth more than fits; what is too much waits.
    let packets = (10e6 * seconds / bits) as u32;
    let probe = Probe {
        packets,
        gap: Duration::from_secs_f64(bits / 12e6),
        patience: Duration::from_secs_f64(seconds * 0.2 + 1.0),
        ..probe
    };
    let fault = rate(Rate { bits_per_second: 10_000_000, limit_bytes: 50_000_000, ..Rate::default() });
    let (ours, _, theirs) = both(duel, fault, "rate 10mbit", probe).await?;
    let reached = |seen: &Seen| seen.rate() * bits / 1e6;
    Ok(vec![Row {
        name: "rate 10 Mbit/s".into(),
        unit: "Mbit/s",
        ours: reached(&ours),
        peer: theirs.as_ref().map(reached),
        limit: format!("within 2 % over {seconds} s, none lost"),
        ok: (reached(&ours) / 10.0 - 1.0).abs() <= 0.02 && ours.losses() == 0,
    }])
}

async fn bursts(_: &Bench, duel: &mut Duel) -> Result<Vec<Row>> {
    let probe = Probe {
        packets: 96,
        size: 1_000,
        gap: Duration::ZERO,
        patience: Duration::from_millis(1_500),
        ..Probe::default()
    };
    let fault = rate(Rate {
        bits_per_second: 500_000,
        burst_bytes: 50_000,
        limit_bytes: 1_000_000,
        ..Rate::default()
    });
    let (seen, ended) = duel.probe(&Side::ours(of_the_probe(fault)), probe).await?;
    let spacing = wire_bytes(probe) as f64 * 8.0 / 500e3 * 1e3;
    let at_once = seen.times().iter().filter(|&&time| time < spacing / 2.0).count() as f64;
    let burst = 50_000.0 / wire_bytes(probe) as f64;
    ensure!(seen.losses() == 0, "{} packets were lost: {ended:?}", seen.losses());
    Ok(vec![Row {
        name: "rate 500 kbit/s, burst 50 kB".into(),
        unit: "packets at once",
        ours: at_once,
        peer: None,
        limit: format!("{burst:.1} ± 1.5"),
        ok: (at_once - burst).abs() <= 1.5,
    }])
}

/// A rule that has all its machinery in place and that no packet of the measurement matches.
fn elsewhere() -> NetworkFault {
    of_port(delay(10), 4_711)
}

/// What a packet pays that no rule is about, above an empty program: the agent measures its own (`BPF_PROG_TEST_RUN`). Of the ways to be
/// nobody's the dearest counts; of several tries the least, because a machine is slow now and then.
async fn cost(name: &str, rules: u32, cidrs: u32, most: f64) -> Result<Vec<Row>> {
    let mut dearest = 0.0_f64;
    for miss in ["address", "port"] {
        let mut least = f64::INFINITY;
        for _ in 0..5 {
            let (rules, cidrs) = (rules.to_string(), cidrs.to_string());
            let args = ["cost", "--rules", &rules, "--cidrs", &cidrs, "--miss", miss];
            let run =
                tokio::process::Command::new(bin_dir().join("squall-agent")).args(args).output().await?;
            ensure!(
                run.status.success(),
                "squall-agent cost failed:\n{}",
                String::from_utf8_lossy(&run.stderr)
            );
            let cost: Value = serde_json::from_slice(&run.stdout)?;
            least = least.min(cost["nanoseconds"].as_f64().context("no nanoseconds")?);
        }
        dearest = dearest.max(least);
    }
    let limit = format!("≤ {most} ns");
    Ok(vec![Row {
        name: name.to_owned(),
        unit: "ns",
        ours: dearest,
        limit,
        ok: dearest <= most,
        ..Row::default()
    }])
}

/// Waits until the agent has done what it does ahead of need: programs loaded for the next injection.
fn at_rest(agent: u32) -> Result<()> {
    // Longer than it waits before it begins (`RESTOCK` in agent/src/host/bpf.rs).
    const LOOK: Duration = Duration::from_secs(2);
    let ticks = || -> Result<u64> {
        let stat = Process::new(agent.cast_signed())?.stat()?;
        Ok(stat.utime + stat.stime)
    };
    let mut before = ticks()?;
    for _ in 0..30 {
        thread::sleep(LOOK);
        let now = ticks()?;
        // A hundredth of a second or two.
        if now <= before + 2 {
            return Ok(());
        }
        before = now;
    }
    bail!("the agent is never at rest")
}

/// With a rule for others in place, and with no agent at all, in turns.
async fn neighbours(bench: &Bench, duel: &mut Duel) -> Result<Vec<Row>> {
    let (seconds, count) = (bench.seconds(3), bench.packets(10_000));
    let measure = |lab: &Lab| -> Result<[f64; 3]> {
        let stream = lab.near.pinned_stream(&lab.far, FAR, seconds)?;
        let times = round_trips(&lab.near, &lab.far, FAR, PORT, count)?;
        Ok([stream.bits_per_second / 1e6, quantile(&times, 0.5) * 1e3, quantile(&times, 0.99) * 1e3])
    };
    let mut all = [Vec::new(), Vec::new()];
    ensure!(duel.agent.terminate()?.success(), "the agent failed:\n{}", duel.agent.log());
    for round in 0..bench.short_rounds(8) {
        // Each is first as often as the other.
        for side in if round % 2 == 0 { [0, 1] } else { [1, 0] } {
            let injection = if side == 0 {
                duel.restart().await?;
                let injection = duel.inject(elsewhere()).await?;
                at_rest(duel.agent.pid())?;
                Some(injection)
            } else {
                None
            };
            for _ in 0..2 {
                all[side].push(measure(&duel.lab)?);
            }
            if let Some(injection) = injection {
                duel.revert(&injection.id).await?;
                ensure!(duel.agent.terminate()?.success(), "the agent failed:\n{}", duel.agent.log());
            }
        }
    }
    duel.restart().await?;
    let of = |figure: usize| {
        Pairs::new(&all.each_ref().map(|turns| turns.iter().map(|turn| turn[figure]).collect()))
    };
    let limit = "within 2 %, agent at rest";
    Ok(vec![
        of(0).row("neighbour: throughput", "Mbit/s", limit, |ratio| ratio >= 0.98),
        of(1).row("neighbour: median RTT", "µs", limit, |ratio| ratio <= 1.02),
        of(2).row("neighbour: p99 RTT", "µs", limit, |ratio| ratio <= 1.02),
    ])
}

async fn live(bench: &Bench, duel: &mut Duel) -> Result<Vec<Row>> {
    const HOLD: Duration = Duration::from_millis(150);
    let changes = bench.packets(200);
    let ways = [delay(20), delay(40)].map(of_the_probe);
    let injection = duel.inject(ways[0].clone()).await?;
    let qdiscs = duel.lab.near.tc("qdisc show")?;
    let gap = Duration::from_micros(200);
    let probe = Probe {
        // A second more than the changes take, where the calls take no time. Where they do, there are fewer changes.
        packets: ((HOLD * (changes + 2) + Duration::from_secs(1)).as_micros() / gap.as_micros()) as u32,
        gap,
        ..Probe::default()
    };
    let flight = probe.start(&duel.lab.near, &duel.lab.far, FAR)?;
    let mut calls = Vec::new();
    for n in 0..changes {
        tokio::time::sleep(HOLD).await;
        if flight.is_sent() {
            break;
        }
        let called = monotonic()?;
        duel.update(&injection.id, ways[(n as usize + 1) % 2].clone()).await?;
        calls.push((called, monotonic()?));
    }
    tokio::time::sleep(HOLD).await;
    let same = duel.lab.near.tc("qdisc show")? == qdiscs;
    let seen = flight.finish()?;
    duel.revert(&injection.id).await?;
    let made = calls.len();
    ensure!(made * 2 >= changes as usize, "only {made} changes were made while packets were sent");
    // How long after the RPC returned a packet was still sent as before, at the most: of the changes to the longer delay,
    // since no stop of the machine makes a delay shorter.
    let mut late = 0.0_f64;
    let delays = seen.delays();
    for pair in calls.windows(2).step_by(2) {
        let (returned, next) = (pair[0].1, pair[1].0);
        for (number, delay) in &delays {
            let sent = seen.sent[*number as usize];
            if (returned..next).contains(&sent) && *delay < 30.0 {
                late = late.max((sent - returned) as f64 / 1e6);
            }
        }
    }
    Ok(vec![
        Row {
            name: "change of a live rule: in force after the RPC".into(),
            unit: "ms",
            ours: late,
            peer: None,
            limit: format!("≤ 1 ms, the worst of {made}; no qdisc touched"),
            ok: late <= 1.0 && same,
        },
        Row {
            name: "change of a live rule: packets lost".into(),
            unit: "packets",
            ours: seen.losses() as f64,
            peer: None,
            limit: format!("0 of {}", seen.sent.len()),
            ok: seen.losses() == 0,
        },
    ])
}

async fn counters(bench: &Bench, duel: &mut Duel) -> Result<Vec<Row>> {
    let fault = of_the_probe(NetworkFault {
        loss: Some(Loss { ratio: 0.1, ..Loss::default() }),
        duplicate: duplicate(0.1).duplicate,
        ..delay(5)
    });
    let probe = many(bench.packets(50_000));
    let (seen, ended) = duel.probe(&Side::ours(fault), probe).await?;
    let counted = |name| figure(ended.as_ref(), name);
    let (sent, arrived) = (seen.sent.len() as u64, seen.arrivals.len() as u64);
    // What is doubled and lost is one copy less.
    let copies = sent + counted("duplicated");
    let differences = [
        counted("matched").abs_diff(sent),
        copies.abs_diff(counted("dropped") + arrived),
        counted("delayed").abs_diff(arrived),
    ];
    let differences: u64 = differences.iter().sum();
    Ok(vec![Row {
        name: "counters: UDP".into(),
        unit: "packets of difference",
        ours: differences as f64,
        peer: None,
        limit: format!(
            "0 of {sent} sent, {arrived} received; matched {}, dropped {}, duplicated {}, delayed {}",
            counted("matched"),
            counted("dropped"),
            counted("duplicated"),
            counted("delayed")
        ),
        ok: differences == 0 && counted("failed") == 0,
    }])
}

async fn segments(bench: &Bench, duel: &mut Duel) -> Result<Vec<Row>> {
    let tcp = NetworkFault {
        peers: vec![squall_proto::v1::Peer {
            protocol: squall_proto::v1::Protocol::Tcp.into(),
            ..Default::default()
        }],
        loss: Some(Loss { ratio: 0.001, ..Loss::default() }),
        ..leaving()
    };
    let seconds = bench.seconds(3);
    let (sent, ended) = duel
        .during(&Side::ours(tcp), |lab| {
            let before = lab.near.counters()?;
            lab.near.stream(&lab.far, FAR, seconds)?;
            let after = lab.near.counters()?;
            Ok(after.grown(&before, "Tcp", "OutSegs")? + after.grown(&before, "Tcp", "RetransSegs")?)
        })
        .await?;
    let counted = figure(ended.as_ref(), "segments");
    Ok(vec![Row {
        name: "counters: TCP segments".into(),
        unit: "segments",
        ours: counted as f64,
        peer: Some(sent as f64),
        limit: "what the kernel's TCP counted".into(),
        ok: counted == sent,
    }])
}
