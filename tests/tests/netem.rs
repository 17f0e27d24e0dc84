//! The network fault against netem, in turns on one wire; where the kernel has no netem, against theory. What the bench
//! measures at length (benches/network.rs) is asserted here on fewer packets, as shares, intervals and ratios.
//!
//! Seeds are given, so that ours decides the same each time.

mod side;

use std::{env, fs, time::Duration};

use anyhow::{Context, Result, ensure};
use side::{
    Duel, FAR, MS, PORT, Side, at_once, corrupt, delay, duplicate, figure, jitter, leaving, loss, of_port,
    of_the_probe, rate, reorder, shape, wire_bytes,
};
use squall_lab::{
    Probe, Seen, Stream, monotonic, round_trips,
    stats::{Chain, Runs, inside99, kolmogorov_smirnov, quantile, share_of_parts},
};
use squall_proto::v1::{
    Delay, Distribution, FourState, GilbertElliott, Loss, NetworkFault, Peer, Protocol, Rate, Slots,
};
use squall_tests::Lab;

/// How often two sides are measured at the most, where the machine's noise may be what differs. A fault that really is
/// worse stays worse.
const TURNS: u32 = 8;
/// Of what is random.
const SEED: u64 = 20_261_124;

/// As fast as one can send and another receive.
fn many(packets: u32) -> Probe {
    Probe { packets, gap: Duration::from_micros(20), ..Probe::default() }
}

/// So far apart that each is on its own.
fn apart(packets: u32) -> Probe {
    Probe { packets, gap: Duration::from_millis(2), ..Probe::default() }
}

fn seeded(fault: NetworkFault) -> Side {
    with_seed(fault, SEED)
}

fn with_seed(fault: NetworkFault, seed: u64) -> Side {
    Side::ours(of_the_probe(NetworkFault { seed, ..fault }))
}

#[tokio::test(flavor = "multi_thread")]
async fn delays_have_netems_median_and_spread() -> Result<()> {
    let mut duel = Duel::new("delays").await?;
    for ms in [1, 10, 100] {
        let peer = if duel.netem { Side::Netem(format!("delay {ms}ms limit 100000")) } else { Side::Nothing };
        let add = if duel.netem { 0.0 } else { ms as f64 };
        let mut best = [(f64::INFINITY, f64::INFINITY); 2];
        // In turns, the best of each, until they agree: what else runs on the machine only makes turns worse.
        for turn in 1.. {
            for (side, best) in [seeded(delay(ms)), peer.clone()].iter().zip(&mut best) {
                let (seen, ended) = duel.probe(side, apart(200)).await?;
                ensure!(seen.losses() == 0, "{side:?}: {} lost", seen.losses());
                if let Some(ended) = &ended {
                    assert_eq!(figure(Some(ended), "delayed"), 200, "{ended:?}");
                }
                let (median, spread) = shape(&seen.times());
                *best = (best.0.min(median), best.1.min(spread));
            }
            let [ours, theirs] = best;
            println!("{ms} ms: ours {ours:.3?}, peer {theirs:.3?}");
            let most = (ms as f64 * 0.01).max(0.4);
            // Two of 200 packets are the spread. In a VM without KVM both sides' wakeups share two CPUs with everything else:
            // what a timer adds is held to netem's by the bench, over more packets.
            let spread = if duel.netem { theirs.1 * 1.5 + 5.0 } else { theirs.1 + 1.0 };
            if (ours.0 - add - theirs.0).abs() < most && ours.1 < spread {
                break;
            }
            ensure!(turn < TURNS, "{ms} ms: median and spread are {ours:?}, the peer's {theirs:?}");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn many_flows_are_as_fast_as_under_netem() -> Result<()> {
    let mut duel = Duel::new("flows").await?;
    let run = |lab: &Lab| lab.near.streams(&lab.far, FAR, Duration::from_secs(4), 16);
    let peer = if duel.netem { Side::Netem("delay 10ms limit 100000".into()) } else { Side::Nothing };
    // Sixteen flows at 10 ms are as fast as the CPU, and an emulated one pays for each hop of the detour: it is `cargo xtask
    // bench network` that says how much, this test only that nothing strangles them. Without netem the peer is the unhurt
    // wire, and the agent's TAP queue carries one in twenty at least.
    let least = if duel.netem { 0.5 } else { 0.05 };
    let mut best = [0.0_f64; 2];
    for turn in 1.. {
        for (side, best) in [Side::ours(delay(10)), peer.clone()].iter().zip(&mut best) {
            *best = best.max(duel.during(side, run).await?.0.bits_per_second);
        }
        println!("ours {:.0}, peer {:.0} Mbit/s", best[0] / 1e6, best[1] / 1e6);
        if best[0] >= best[1] * least {
            break;
        }
        ensure!(turn < TURNS, "less than {least} of the peer's throughput: {best:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn packets_of_a_flow_do_not_overtake_each_other() -> Result<()> {
    // Several flows, so that several CPUs send and empty queues. What TCP saw arrive out of order: hundreds in a second where
    // one CPU may hold up what another sends on.
    const MOST: u64 = 20;
    let mut duel = Duel::new("order").await?;
    let overtaken = |lab: &Lab| -> Result<u64> {
        Ok(lab.near.tcp_counter("TCPSACKReorder")? + lab.near.tcp_counter("TCPTSReorder")?)
    };
    for turn in 1.. {
        let run = |lab: &Lab| {
            let before = overtaken(lab)?;
            let stream = lab.near.streams(&lab.far, FAR, Duration::from_secs(3), 16)?;
            ensure!(stream.bytes > 1_000_000, "{stream:?}");
            Ok(overtaken(lab)? - before)
        };
        let (seen, injection) = duel.during(&Side::ours(delay(10)), run).await?;
        ensure!(figure(injection.as_ref(), "delayed") > 100, "{injection:?}");
        println!("{seen} times a packet was overtaken");
        if seen < MOST {
            break;
        }
        ensure!(turn < TURNS, "{seen} times, {MOST} may be");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn loss_is_inside_its_interval_and_tcp_sees_netems() -> Result<()> {
    let mut duel = Duel::new("lossy").await?;
    for ratio in [0.001, 0.01, 0.05] {
        let side = seeded(loss(Loss { ratio, ..Loss::default() }));
        let (seen, ended) = duel.probe(&side, many(20_000)).await?;
        let (lost, sent) = (seen.losses(), seen.sent.len() as u64);
        println!("{ratio}: {lost} of {sent}");
        ensure!(inside99(ratio, lost, sent), "{lost} of {sent} is not {ratio}");
        assert_eq!(figure(ended.as_ref(), "dropped"), lost, "{ended:?}");
    }
    if !duel.netem {
        return Ok(());
    }
    // One segment a packet, or the few lost packets of many segments are mostly noise.
    duel.lab.near.ip("link set near0 gso_max_segs 1")?;
    let sides = [
        Side::ours(loss(Loss { ratio: 0.01, ..Loss::default() })),
        Side::Netem("loss 1% limit 100000".into()),
    ];
    let mut sums = [(0, 0); 2];
    for _ in 0..2 {
        for (side, sum) in sides.iter().zip(&mut sums) {
            let run = |lab: &Lab| lab.near.stream(&lab.far, FAR, Duration::from_secs(4));
            let stream: Stream = duel.during(side, run).await?.0;
            *sum = (sum.0 + stream.retransmits, sum.1 + stream.bytes);
        }
    }
    let [ours, theirs] = sums.map(|(again, bytes)| again as f64 / bytes as f64 * 1e9);
    println!("retransmits a GB: ours {ours:.0}, netem {theirs:.0}");
    ensure!((ours / theirs - 1.0).abs() <= 0.2, "ours {ours} a GB, netem {theirs}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn bursts_of_loss_follow_their_models() -> Result<()> {
    let mut duel = Duel::new("bursts").await?;
    let gilbert = |chain: Chain| {
        let Chain { p, r, bad, good } = chain;
        Loss {
            gilbert_elliott: Some(GilbertElliott { p, r, loss_bad: bad, loss_good: good }),
            ..Loss::default()
        }
    };
    let simple = Chain { p: 0.01, r: 0.1, bad: 1.0, good: 0.0 };
    let full = Chain { p: 0.02, r: 0.2, bad: 0.7, good: 0.002 };
    let models = [
        (Chain::correlated(0.05, 0.5), Loss { ratio: 0.05, correlation: 0.5, ..Loss::default() }),
        (simple, gilbert(simple)),
        (full, gilbert(full)),
    ];
    for (chain, model) in models {
        let (seen, ended) = duel.probe(&seeded(loss(model)), many(40_000)).await?;
        let runs = Runs::of(&seen.lost());
        println!("{chain:?}: {} and {:?}", runs.rate(), runs.length());
        ensure!(chain.fits_rate(&runs), "{chain:?}: {} is not {}", runs.rate(), chain.rate());
        ensure!(chain.fits_runs(&runs), "{chain:?}: {:?} is not {}", runs.length(), chain.run_length());
        assert_eq!(figure(ended.as_ref(), "dropped"), runs.hits, "{ended:?}");
    }
    let model = FourState { p13: 0.01, p31: 0.2, p32: 0.3, p23: 0.4, p14: 0.005 };
    let side = seeded(loss(Loss { four_state: Some(model), ..Loss::default() }));
    let lost = duel.probe(&side, many(40_000)).await?.0.lost();
    let (runs, (share, width)) = (Runs::of(&lost), share_of_parts(&lost));
    // Visits: 1 received in a gap, 1/20 lost and 3/80 received in a burst, 1/200 lost in a gap.
    let theory = 0.055 / 1.0925;
    println!("four states: {share} ± {width} and {:?}", runs.length());
    ensure!((share - theory).abs() < width, "{share} ± {width} is not {theory}");
    let (length, error) = runs.length();
    // A burst's run goes on with 1/2, and a loss in a gap is alone: 55 losses in runs that start 30 times.
    ensure!((length - 55.0 / 30.0).abs() < 2.58 * error, "runs of {length}");
    let side = seeded(loss(Loss { every: 7, ..Loss::default() }));
    let lost = duel.probe(&side, many(700)).await?.0.lost();
    let right = lost.iter().enumerate().all(|(i, lost)| *lost == (i % 7 == 6));
    ensure!(right, "not every 7th: {lost:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn jitter_has_netems_distributions() -> Result<()> {
    let mut duel = Duel::new("jitter").await?;
    // What the wire and the queue add to each packet says nothing about the distribution.
    let added = if duel.netem {
        0.0
    } else {
        quantile(&duel.probe(&Side::ours(delay(100)), apart(300)).await?.0.times(), 0.5) - 100.0
    };
    println!("{added} ms more at the median");
    ensure!((-0.1..1.0).contains(&added), "{added} ms more at the median");
    for (name, distribution) in [
        ("uniform", Distribution::Uniform),
        ("normal", Distribution::Normal),
        ("pareto", Distribution::Pareto),
        ("paretonormal", Distribution::Paretonormal),
    ] {
        let words = match distribution {
            Distribution::Uniform => String::new(),
            _ => format!("distribution {name}"),
        };
        let netem = Side::Netem(format!("delay 100ms 20ms {words} limit 100000"));
        // What is right fails at 0.01 once in a hundred times, and twice in a row once in ten thousand.
        for seed in [SEED, SEED + 1] {
            let ours = with_seed(jitter(100, 20, distribution), seed);
            let (mut a, mut b) = (Vec::new(), Vec::new());
            for _ in 0..2 {
                a.extend(duel.probe(&ours, apart(750)).await?.0.times());
                if duel.netem {
                    b.extend(duel.probe(&netem, apart(750)).await?.0.times());
                }
            }
            if !duel.netem {
                b = draws(distribution)?;
                for delay in &mut a {
                    *delay -= added;
                }
            }
            let (distance, p) = kolmogorov_smirnov(&a, &b);
            println!("{name}: distance {distance:.4}, p {p:.4}");
            if p > 0.01 {
                break;
            }
            ensure!(seed == SEED, "{name}: distance {distance}, p {p}");
        }
    }
    Ok(())
}

/// What netem would draw for 100 ± 20 ms: each quantile of its table once.
fn draws(distribution: Distribution) -> Result<Vec<f64>> {
    let name = match distribution {
        Distribution::Normal => "normal",
        Distribution::Pareto => "pareto",
        Distribution::Paretonormal => "paretonormal",
        _ => return Ok((0..4_000).map(|i| 80.0 + 40.0 * (f64::from(i) + 0.5) / 4_000.0).collect()),
    };
    let path = format!("/usr/lib/x86_64-linux-gnu/tc/{name}.dist");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let words = text.lines().filter(|line| !line.starts_with('#')).flat_map(str::split_whitespace);
    words.map(|word| Ok((100.0 + 20.0 * word.parse::<f64>()? / 8192.0).max(0.0))).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_doubled_corrupted_or_early_is_as_much_as_asked() -> Result<()> {
    let mut duel = Duel::new("shares").await?;
    let (seen, ended) = duel.probe(&seeded(duplicate(0.05)), many(10_000)).await?;
    let twice = seen.duplicates();
    ensure!(inside99(0.05, twice, 10_000) && seen.losses() == 0, "{twice} came twice: {ended:?}");
    assert_eq!(figure(ended.as_ref(), "duplicated"), twice, "{ended:?}");

    let large = Probe { size: 1_000, ..many(10_000) };
    let before = duel.lab.far.counters()?;
    let (seen, ended) = duel.probe(&seeded(corrupt(0.05, false)), large).await?;
    let errors = duel.lab.far.counters()?.grown(&before, "Udp", "InCsumErrors")?;
    let lost = seen.losses();
    println!("caught: {lost} lost, {errors} wrong checksums");
    ensure!(inside99(0.05, lost, 10_000), "{lost} lost: {ended:?}");
    ensure!(errors * 100 >= lost * 97, "{errors} wrong checksums of {lost} lost");
    ensure!(seen.flipped() == (0, 0), "{:?} arrived wrong", seen.flipped());
    assert_eq!(figure(ended.as_ref(), "corrupted"), lost, "{ended:?}");

    let (seen, ended) = duel.probe(&seeded(corrupt(0.05, true)), large).await?;
    let ((wrong, most), lost) = (seen.flipped(), seen.losses());
    println!("silent: {wrong} arrived wrong, {lost} lost");
    ensure!(most == 1 && inside99(0.05, wrong + lost, 10_000), "{wrong} wrong, {lost} lost: {ended:?}");
    ensure!(lost * 20 <= wrong, "{lost} lost, {wrong} arrived wrong");
    assert_eq!(figure(ended.as_ref(), "corrupted"), wrong + lost, "{ended:?}");

    for (ratio, gap) in [(0.25, 1), (0.5, 5)] {
        let probe = Probe { packets: 5_000, gap: Duration::from_micros(300), ..Probe::default() };
        let (seen, ended) = duel.probe(&seeded(reorder(60, ratio, gap)), probe).await?;
        let (early, chances) = at_once(&seen, 60.0, gap);
        let hits = early.len() as u64;
        println!("gap {gap}: {hits} early of {chances} chances");
        ensure!(inside99(ratio, hits, chances), "gap {gap}: {hits} of {chances}: {ended:?}");
        let spaced = early.windows(2).all(|pair| u64::from(pair[1] - pair[0]) >= gap);
        ensure!(spaced && seen.losses() == 0 && seen.early() > 0, "gap {gap}: {early:?}");
        assert_eq!(figure(ended.as_ref(), "reordered"), hits, "{ended:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rate_is_kept_and_a_burst_passes() -> Result<()> {
    let mut duel = Duel::new("rate").await?;
    let probe = Probe { size: 1_000, ..Probe::default() };
    let bits = wire_bytes(probe) as f64 * 8.0;
    let overload = Probe {
        packets: (10e6 * 3.0 / bits) as u32,
        gap: Duration::from_secs_f64(bits / 12e6),
        patience: Duration::from_secs(2),
        ..probe
    };
    let fault = rate(Rate { bits_per_second: 10_000_000, limit_bytes: 50_000_000, ..Rate::default() });
    let (seen, ended) = duel.probe(&seeded(fault), overload).await?;
    let reached = seen.rate() * bits / 10e6;
    println!("{reached} of 10 Mbit/s");
    ensure!((reached - 1.0).abs() < 0.02 && seen.losses() == 0, "{reached} of 10 Mbit/s: {ended:?}");

    let burst = Probe { packets: 72, gap: Duration::ZERO, patience: Duration::from_millis(1_000), ..probe };
    let fault = |limit_bytes| {
        rate(Rate { bits_per_second: 500_000, burst_bytes: 50_000, limit_bytes, ..Rate::default() })
    };
    let (seen, ended) = duel.probe(&seeded(fault(1_000_000)), burst).await?;
    let spacing = bits / 500e3 * 1e3;
    let passed = seen.times().iter().filter(|&&time| time < spacing / 2.0).count() as f64;
    println!("{passed} passed at once");
    let expected = 50_000.0 / wire_bytes(probe) as f64;
    ensure!((passed - expected).abs() <= 1.5, "{passed} passed at once, not {expected}: {ended:?}");
    ensure!(seen.losses() == 0, "{} lost", seen.losses());

    // Ten may wait, and the rest is dropped; while they are sent, some leave.
    let (seen, ended) = duel.probe(&seeded(fault(10 * wire_bytes(probe))), burst).await?;
    let arrived = seen.arrivals.len() as f64;
    let sending = seen.sent.last().zip(seen.sent.first()).map_or(0, |(last, first)| last - first);
    let (least, left) = (expected + 10.0 - 2.0, sending as f64 / 1e6 / spacing);
    ensure!(
        (least..=least + 4.0 + left).contains(&arrived) && seen.losses() > 0,
        "{arrived} of {} arrived, {least} and {left:.1} may: {ended:?}",
        burst.packets
    );
    assert_eq!(figure(ended.as_ref(), "dropped"), seen.losses(), "{ended:?}");
    Ok(())
}

/// One packet a millisecond, in slots of 20 ms: they arrive in heaps, and wait from 20 ms down to nothing.
#[tokio::test(flavor = "multi_thread")]
async fn packets_leave_in_slots() -> Result<()> {
    let mut duel = Duel::new("slots").await?;
    let slots = Slots { min_ns: 20 * MS, max_ns: 20 * MS, ..Slots::default() };
    let ours = of_the_probe(NetworkFault { slots: Some(slots), ..leaving() });
    let mut sides = vec![Side::ours(ours)];
    if duel.netem {
        sides.push(Side::Netem("slot 20ms 20ms limit 100000".into()));
    }
    for side in &sides {
        for turn in 1.. {
            let (seen, ended) = duel.probe(side, Probe { packets: 2_000, ..Probe::default() }).await?;
            let times: Vec<u64> = seen.arrivals.iter().map(|arrival| arrival.at).collect();
            let heaps = 1 + times.windows(2).filter(|w| w[1] - w[0] > 5 * MS).count();
            let took = seen.sent[seen.sent.len() - 1] - seen.sent[0];
            let (expected, median) = (took as f64 / (20 * MS) as f64, quantile(&seen.times(), 0.5));
            println!("{side:?}: {heaps} heaps in {expected:.0} slots, median {median} ms");
            ensure!(seen.losses() == 0, "{side:?}: {} lost", seen.losses());
            if (heaps as f64 / expected - 1.0).abs() < 0.15 && (median - 10.0).abs() < 2.5 {
                break;
            }
            ensure!(turn < TURNS, "{side:?}: {heaps} heaps, median {median} ms: {ended:?}");
        }
    }
    Ok(())
}

/// No timer fires early, so none leaves too soon but those that were sent off sooner because all before them were late.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_late_by_machinery_is_taken_off() -> Result<()> {
    /// The bound of a bucket of the histogram, and its width below.
    const DELAY: u64 = 1 << 24;
    const WIDTH: u64 = 1 << 20;
    let mut duel = Duel::new("late").await?;
    let fault = of_the_probe(NetworkFault {
        delay: Some(Delay { latency_ns: DELAY, ..Delay::default() }),
        ..leaving()
    });
    let (seen, ended) = duel.probe(&Side::ours(fault), Probe { packets: 2_000, ..Probe::default() }).await?;
    let delays = ended.and_then(|ended| ended.effect).context("no effect")?.delays;
    let up_to = |most: u64| delays.iter().filter(|b| b.up_to_ns <= most).map(|b| b.count).sum::<u64>();
    println!("{} of {} were sooner than asked", up_to(DELAY), seen.arrivals.len());
    ensure!(up_to(DELAY) > 0, "none was sent off sooner: {delays:?}");
    ensure!(up_to(DELAY) < 1_000, "most were sent off too soon: {delays:?}");
    ensure!(up_to(DELAY - WIDTH) == 0, "some were much too soon: {delays:?}");
    Ok(())
}

/// How many packets of a CPU's backlog wait for it, which is everybody's setting: only of a machine that is ours.
struct Backlog(String);

impl Backlog {
    const FILE: &str = "/proc/sys/net/core/netdev_max_backlog";

    fn shrink(to: u32) -> Result<Self> {
        let before = fs::read_to_string(Self::FILE)?;
        fs::write(Self::FILE, to.to_string())?;
        Ok(Self(before))
    }
}

impl Drop for Backlog {
    fn drop(&mut self) {
        if let Err(error) = fs::write(Self::FILE, &self.0) {
            eprintln!("cannot restore {}: {error}", Self::FILE);
        }
    }
}

/// Packets that come out of a line faster than the CPU takes them that they are for.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_lost_behind_the_delay_is_counted() -> Result<()> {
    if env::var_os("SQUALL_VM").is_none() {
        println!("nothing was tried: it takes a kernel of its own");
        return Ok(());
    }
    let mut duel = Duel::new("backlog").await?;
    // Twenty at once.
    let slots = Slots { min_ns: 20 * MS, max_ns: 20 * MS, ..Slots::default() };
    let fault = of_the_probe(NetworkFault { slots: Some(slots), ..leaving() });
    // What gets lost behind our interface is not ours.
    let missed = |lab: &Lab| {
        let text = lab.far.inside(|| Ok(fs::read_to_string("/proc/thread-self/net/dev")?))?;
        let line = text.lines().find_map(|line| line.trim().strip_prefix("far0:")).context("no far0")?;
        let drops = line.split_whitespace().nth(3).context("no drops of far0")?;
        drops.parse::<u64>().with_context(|| format!("far0 dropped {drops}"))
    };
    let before = missed(&duel.lab)?;
    let backlog = Backlog::shrink(1)?;
    let (seen, ended) = duel.probe(&Side::ours(fault), Probe { packets: 2_000, ..Probe::default() }).await?;
    drop(backlog);
    let elsewhere = missed(&duel.lab)? - before;
    let (sent, arrived) = (seen.sent.len() as u64, seen.arrivals.len() as u64);
    let failed = figure(ended.as_ref(), "failed");
    println!(
        "{sent} sent, {failed} lost behind the delay, {elsewhere} behind the interface, {arrived} arrived"
    );
    ensure!(failed > 0, "nothing was lost: {ended:?}");
    assert_eq!(sent, arrived + failed + elsewhere, "{ended:?}");
    assert_eq!(figure(ended.as_ref(), "delayed"), sent, "{ended:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn congestion_is_marked_where_that_is_understood() -> Result<()> {
    let mut duel = Duel::new("ecn").await?;
    for netns in [&duel.lab.near, &duel.lab.far] {
        netns.inside(|| Ok(fs::write("/proc/sys/net/ipv4/tcp_ecn", "1")?))?;
        // Else a SYN that is lost, which is not marked either, makes a connection that does not understand.
        netns.inside(|| Ok(fs::write("/proc/sys/net/ipv4/tcp_ecn_fallback", "0")?))?;
    }
    let fault = loss(Loss { ratio: 0.05, ecn: true, ..Loss::default() });
    let tcp = |lab: &Lab| {
        let before = lab.far.counters()?;
        let stream = lab.near.stream(&lab.far, FAR, Duration::from_secs(2))?;
        Ok((stream, lab.far.counters()?.grown(&before, "IpExt", "InCEPkts")?))
    };
    let ((stream, marks), ended) = duel.during(&Side::ours(fault.clone()), tcp).await?;
    let figures = ["marked", "dropped"].map(|name| figure(ended.as_ref(), name));
    println!("{figures:?} of {} bytes, {marks} marks arrived", stream.bytes);
    let [marked, dropped] = figures;
    // Handshakes, bare acknowledgements and what is sent again are not marked (RFC 3168), and the kernel counts segments.
    ensure!(marked > 20 && marks >= marked && dropped < marked / 4, "{ended:?}, {marks} marks arrived");
    // The probe's packets are nobody's who understands.
    let (seen, ended) = duel.probe(&seeded(fault), many(20_000)).await?;
    ensure!(inside99(0.05, seen.losses(), 20_000), "{} lost: {ended:?}", seen.losses());
    assert_eq!(figure(ended.as_ref(), "marked"), 0, "{ended:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_neighbour_notices_nothing() -> Result<()> {
    let mut duel = Duel::new("neighbour").await?;
    // All its machinery is in place, and nothing of this matches.
    let elsewhere = Side::ours(of_port(delay(10), 4_711));
    let sides = [elsewhere, Side::Nothing];
    let mut best = [(0.0_f64, f64::INFINITY); 2];
    for turn in 1.. {
        for (side, best) in sides.iter().zip(&mut best) {
            let measure = |lab: &Lab| {
                let stream = lab.near.stream(&lab.far, FAR, Duration::from_secs(2))?;
                let times = round_trips(&lab.near, &lab.far, FAR, PORT, 2_000)?;
                Ok((stream.bits_per_second, quantile(&times, 0.99)))
            };
            let ((bits, p99), ended) = duel.during(side, measure).await?;
            assert_eq!(figure(ended.as_ref(), "matched"), 0, "{ended:?}");
            *best = (best.0.max(bits), best.1.min(p99));
        }
        let [ours, none] = best;
        println!("with a rule for others {ours:?}, without {none:?}");
        // The bench holds this to 2 %, over more turns. An emulated CPU counts every instruction of the program that passes it by,
        // and stands still at times; what would be the rule's is 10 ms.
        if ours.0 >= none.0 * 0.7 && ours.1 <= none.1 + 2.0 {
            break;
        }
        ensure!(turn < TURNS, "throughput and p99: {ours:?} with a rule for others, {none:?} without");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_live_rule_changes_at_once_and_loses_nothing() -> Result<()> {
    const CHANGES: u32 = 10;
    const HOLD: Duration = Duration::from_millis(150);
    let mut duel = Duel::new("live").await?;
    let ways = [delay(20), delay(40)].map(of_the_probe);
    let injection = duel.inject(ways[0].clone()).await?;
    let qdiscs = duel.lab.near.tc("qdisc show")?;
    let gap = Duration::from_micros(500);
    let packets = ((HOLD * CHANGES + Duration::from_secs(2)).as_micros() / gap.as_micros()) as u32;
    let probe = Probe { packets, gap, ..Probe::default() };
    let flight = probe.start(&duel.lab.near, &duel.lab.far, FAR)?;
    let mut returned = Vec::new();
    for n in 0..CHANGES as usize {
        tokio::time::sleep(HOLD).await;
        duel.update(&injection.id, ways[(n + 1) % 2].clone()).await?;
        returned.push(monotonic()?);
    }
    tokio::time::sleep(HOLD).await;
    ensure!(!flight.is_sent(), "the changes took longer than the stream");
    assert_eq!(duel.lab.near.tc("qdisc show")?, qdiscs, "a qdisc was touched");
    let seen = flight.finish()?;
    let ended = duel.revert(&injection.id).await?;
    ensure!(seen.losses() == 0, "{} lost: {ended:?}", seen.losses());
    assert_eq!(figure(Some(&ended), "matched"), u64::from(packets), "{ended:?}");
    // Of the packets sent after an RPC returned and well before the next was made, none is delayed as before.
    for (n, &at) in returned.iter().enumerate() {
        let until = at + HOLD.as_nanos() as u64 / 2;
        let long = n % 2 == 0;
        let after: Vec<(u32, f64)> = seen
            .delays()
            .into_iter()
            .filter(|(number, _)| (at + MS..until).contains(&seen.sent[*number as usize]))
            .collect();
        ensure!(after.len() > 20, "change {n}: only {} packets", after.len());
        let wrong = after.iter().filter(|(_, delay)| (*delay >= 30.0) != long).count();
        // The machine may stop for longer than the difference, but not for most of them.
        let most = if long { 0 } else { after.len() / 5 };
        ensure!(wrong <= most, "change {n}: {wrong} of {} are delayed as before", after.len());
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn counters_are_what_both_ends_counted() -> Result<()> {
    let mut duel = Duel::new("counters").await?;
    let fault = NetworkFault {
        loss: Some(Loss { ratio: 0.1, ..Loss::default() }),
        duplicate: duplicate(0.1).duplicate,
        ..delay(5)
    };
    let (seen, ended): (Seen, _) = duel.probe(&seeded(fault), many(10_000)).await?;
    let of = |name| figure(ended.as_ref(), name);
    let (sent, arrived) = (seen.sent.len() as u64, seen.arrivals.len() as u64);
    assert_eq!(of("matched"), sent, "{ended:?}");
    assert_eq!(sent + of("duplicated"), of("dropped") + arrived, "{ended:?}");
    assert_eq!(of("delayed"), arrived, "{ended:?}");
    assert_eq!(of("failed"), 0, "{ended:?}");

    let tcp = NetworkFault {
        peers: vec![Peer { protocol: Protocol::Tcp.into(), ..Peer::default() }],
        loss: Some(Loss { ratio: 0.001, ..Loss::default() }),
        ..leaving()
    };
    let run = |lab: &Lab| {
        let before = lab.near.counters()?;
        lab.near.stream(&lab.far, FAR, Duration::from_secs(2))?;
        let after = lab.near.counters()?;
        Ok(after.grown(&before, "Tcp", "OutSegs")? + after.grown(&before, "Tcp", "RetransSegs")?)
    };
    let (sent, ended) = duel.during(&Side::ours(tcp), run).await?;
    assert_eq!(figure(ended.as_ref(), "segments"), sent, "{ended:?}");
    Ok(())
}
