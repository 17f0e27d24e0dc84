//! Network faults and their far sides.

use std::time::Duration;

use squall_proto::v1;

use super::{
    super::{
        Address, Target,
        fault::nanos,
        network::{self, Distribution, DnsAnswer, Network, Partition},
        tree::{At, Fields, Value, did_you_mean},
        units::{self, Wrong},
    },
    Names, choice, duration, items, maybe, share, unit, unknown,
};

/// A network fault on the target called `on`.
pub(super) fn network(mut fields: Fields<'_>, names: &Names, on: &str) -> Option<Network> {
    let peers = maybe(&mut fields, "to", |at| peers(at, names));
    let except = maybe(&mut fields, "except", |at| self::peers(at, names));
    let direction = maybe(&mut fields, "direction", |at| choice(at, "direction"));
    let share = maybe(&mut fields, "share", part);
    let flows = maybe(&mut fields, "flows", part);
    let delay = maybe(&mut fields, "delay", delay);
    let loss = maybe(&mut fields, "loss", loss);
    let duplicate = maybe(&mut fields, "duplicate", |at| Some(chance(at, "", |_| Some(()))?.0));
    let corrupt = maybe(&mut fields, "corrupt", |at| {
        let (chance, silent) = chance(at, ", silent: true", |fields| maybe(fields, "silent", At::bool))?;
        Some(v1::Corrupt { chance: Some(chance), silent: silent.unwrap_or_default() })
    });
    let reorder = maybe(&mut fields, "reorder", |at| {
        let (chance, gap) = chance(at, ", gap: 5", |fields| maybe(fields, "gap", |at| at_least_1(at, "5")))?;
        Some(v1::Reorder { chance: Some(chance), gap: gap.unwrap_or_default() })
    });
    let rate = maybe(&mut fields, "rate", rate);
    let slots = maybe(&mut fields, "slots", slots);
    let partition = maybe(&mut fields, "partition", partition);
    let reset = maybe(&mut fields, "reset", At::bool);
    let cut = maybe(&mut fields, "cut", cut);
    let dns = maybe(&mut fields, "dns", dns);
    let interface = maybe(&mut fields, "interface", |at| at.text("the name of an interface"));
    let seed = maybe(&mut fields, "seed", |at| at.int("a whole number"));
    let per_segment = maybe(&mut fields, "perSegment", At::bool);
    let unprotected = maybe(&mut fields, "unprotected", At::bool);
    let sockets = maybe(&mut fields, "sockets", |at| choice(at, "choice of sockets"));
    let side = maybe(&mut fields, "side", |at| choice(at, "side"));
    let map = fields.map.clone();
    fields.finish();
    let network = Network {
        peers: peers?.unwrap_or_default(),
        except: except?.unwrap_or_default(),
        direction: direction?.unwrap_or_default(),
        share: share?,
        flows: flows?,
        delay: delay?,
        duplicate: duplicate?,
        loss: loss?,
        corrupt: corrupt?,
        reorder: reorder?,
        rate: rate?,
        slots: slots?,
        partition: partition?.flatten(),
        reset: reset?.unwrap_or_default(),
        cut: cut?,
        dns: dns?,
        interface: interface?,
        seed: seed?,
        per_segment: per_segment?.unwrap_or_default(),
        unprotected: unprotected?.unwrap_or_default(),
        sockets: sockets?,
        side: side?,
    };
    let on_interface = matches!(names.targets.get(on), Some(Some(Target::Interface { .. })));
    let clashes = network.check(on_interface);
    for clash in &clashes {
        map.find(clash.field).problem(&clash.message, &clash.fix);
    }
    clashes.is_empty().then_some(network)
}

// ---- what a packet suffers -----------------------------------------------------------------------------------------

fn part(at: &At<'_>) -> Option<f64> {
    unit(at, "a percentage: 5%", units::part)
}

fn correlation(at: &At<'_>) -> Option<f64> {
    unit(at, "a percentage: 25%", units::correlation)
}

fn held(at: &At<'_>) -> Option<Duration> {
    unit(at, "a length of time: 300ms, 2s", units::held)
}

fn bytes(at: &At<'_>) -> Option<u64> {
    unit(at, "a size: 64KiB", units::some_bytes)
}

fn at_least_1(at: &At<'_>, example: &str) -> Option<u64> {
    let expected = format!("a whole number of at least 1, such as {example}");
    match at.int(&expected)? {
        0 => at.refuse("zero does nothing", format!("expected {expected}")),
        n => Some(n),
    }
}

/// Notes what one of the makers of `network` refuses.
fn made<T>(at: &At<'_>, made: Result<T, Wrong>) -> Option<T> {
    made.map_err(|(message, fix)| at.problem(message, fix)).ok()
}

/// `5%`, or a mapping with a ratio, a correlation and what `more` reads.
fn chance<T: Default>(
    at: &At<'_>,
    more_shown: &str,
    more: impl FnOnce(&mut Fields<'_>) -> Option<T>,
) -> Option<(v1::Chance, T)> {
    let expected = format!("a percentage such as 5%, or {{ ratio: 5%, correlation: 25%{more_shown} }}");
    let Value::Map(_) = at.value else {
        let ratio = unit(at, &expected, units::part)?;
        return Some((v1::Chance { ratio, correlation: 0.0 }, T::default()));
    };
    let mut fields = at.fields(&expected)?;
    let ratio = fields.require("ratio", "5%").and_then(|at| part(&at));
    let correlation = maybe(&mut fields, "correlation", correlation);
    let more = more(&mut fields);
    fields.finish();
    Some((v1::Chance { ratio: ratio?, correlation: correlation?.unwrap_or_default() }, more?))
}

fn delay(at: &At<'_>) -> Option<v1::Delay> {
    if let Value::Text(text) = at.value
        && units::duration(text).is_ok()
    {
        return at.refuse("a delay has fields", format!("write delay: {{ latency: {text} }}"));
    }
    let mut fields = at.fields("{ latency: 2s, jitter: 300ms }")?;
    let latency = fields.require("latency", "2s").and_then(|at| held(&at));
    let jitter = maybe(&mut fields, "jitter", held);
    let correlation = maybe(&mut fields, "correlation", share);
    let distribution = maybe(&mut fields, "distribution", distribution);
    let keep_order = maybe(&mut fields, "keepOrder", At::bool);
    fields.finish();
    let (latency, jitter) = (latency?, jitter?.unwrap_or_default());
    if latency.is_zero() && jitter.is_zero() {
        return at.refuse("this delays nothing", "give a latency of more than 0");
    }
    let (distribution, table) = distribution?.unwrap_or_default();
    Some(v1::Delay {
        latency_ns: nanos(latency),
        jitter_ns: nanos(jitter),
        correlation: correlation?.unwrap_or_default(),
        distribution: distribution.into(),
        table,
        keep_order: keep_order?.unwrap_or_default(),
    })
}

/// A distribution and, where it is a table, that.
fn distribution(at: &At<'_>) -> Option<(v1::Distribution, Vec<i32>)> {
    let Value::Map(_) = at.value else {
        return Some((choice::<Distribution>(at, "distribution")?.proto(), Vec::new()));
    };
    let mut fields = at.fields("{ table: my.dist }")?;
    let table = fields.require("table", "my.dist").and_then(|at| {
        let path = at.beside(&at.text("the path of a .dist file, as netem has them")?);
        made(&at, network::table(&path))
    });
    fields.finish();
    Some((v1::Distribution::Table, table?))
}

fn loss(at: &At<'_>) -> Option<v1::Loss> {
    const EXPECTED: &str = "a percentage such as 5%, or one of { ratio: … }, { gilbertElliott: { p: 1%, r: 10% } }, \
                            { state: { p13: 1% } }, { every: 10 }";
    let Value::Map(_) = at.value else {
        return Some(v1::Loss { ratio: unit(at, EXPECTED, units::part)?, ..v1::Loss::default() });
    };
    let mut fields = at.fields(EXPECTED)?;
    let ratio = maybe(&mut fields, "ratio", part);
    let correlation = maybe(&mut fields, "correlation", correlation);
    let gilbert_elliott = maybe(&mut fields, "gilbertElliott", gilbert_elliott);
    let four_state = maybe(&mut fields, "state", four_state);
    let every = maybe(&mut fields, "every", |at| at_least_1(at, "10"));
    let ecn = maybe(&mut fields, "ecn", At::bool);
    let models = ["ratio", "gilbertElliott", "state", "every"];
    let given: Vec<&str> = models.into_iter().filter(|model| fields.has(model)).collect();
    let correlated = fields.has("correlation");
    fields.finish();
    if given.len() != 1 {
        let message = match given.as_slice() {
            [] => "there is no model of loss".to_owned(),
            given => format!("{} are different models", given.join(" and ")),
        };
        return at.refuse(message, format!("expected one of {}", models.join(", ")));
    }
    if correlated && given != ["ratio"] {
        let fix = format!("remove correlation, or {}", given.concat());
        return at.find("correlation").refuse("correlation goes with ratio only", fix);
    }
    Some(v1::Loss {
        ratio: ratio?.unwrap_or_default(),
        correlation: correlation?.unwrap_or_default(),
        gilbert_elliott: gilbert_elliott?,
        four_state: four_state?,
        every: every?.unwrap_or_default(),
        ecn: ecn?.unwrap_or_default(),
    })
}

fn gilbert_elliott(at: &At<'_>) -> Option<v1::GilbertElliott> {
    let mut fields = at.fields("{ p: 1%, r: 10%, lossBad: 100%, lossGood: 0% }")?;
    let p = fields.require("p", "1%").and_then(|at| share(&at));
    let [r, bad, good] = ["r", "lossBad", "lossGood"].map(|name| maybe(&mut fields, name, share));
    fields.finish();
    made(at, network::gilbert_elliott(p?, r?, bad?, good?))
}

fn four_state(at: &At<'_>) -> Option<v1::FourState> {
    let mut fields = at.fields("{ p13: 1%, p31: 10%, p32: 30%, p23: 50%, p14: 1% }")?;
    let p13 = fields.require("p13", "1%").and_then(|at| share(&at));
    let [p31, p32, p23, p14] = ["p31", "p32", "p23", "p14"].map(|name| maybe(&mut fields, name, share));
    fields.finish();
    made(at, network::four_state(p13?, [p31?, p32?, p23?, p14?]))
}

fn rate(at: &At<'_>) -> Option<v1::Rate> {
    const EXPECTED: &str =
        "a rate such as 1mbit, or { rate: 10mbit, burst: 32KiB, limit: 1MiB, overhead: 14 }";
    let Value::Map(_) = at.value else {
        return made(at, network::rate(unit(at, EXPECTED, units::bit_rate)?, None, None, None));
    };
    let mut fields = at.fields(EXPECTED)?;
    let rate = fields.require("rate", "10mbit").and_then(|at| unit(&at, "a rate: 10mbit", units::bit_rate));
    let burst = maybe(&mut fields, "burst", bytes);
    let limit = maybe(&mut fields, "limit", bytes);
    let overhead = maybe(&mut fields, "overhead", |at| at.int("a number of bytes, such as 14"));
    fields.finish();
    made(at, network::rate(rate?, burst?, limit?, overhead?))
}

fn slots(at: &At<'_>) -> Option<v1::Slots> {
    let mut fields = at.fields("{ min: 10ms, max: 20ms, packets: 32, bytes: 64KiB }")?;
    let min = fields.require("min", "10ms").and_then(|at| duration(&at));
    let max = maybe(&mut fields, "max", duration);
    let packets = maybe(&mut fields, "packets", |at| at_least_1(at, "32"));
    let bytes = maybe(&mut fields, "bytes", bytes);
    fields.finish();
    made(at, network::slots(min?, max?, packets?, bytes?))
}

/// Inner none for `partition: false`.
#[expect(
    clippy::option_option,
    reason = "the outer one is whether it is right, the inner one whether it is wanted"
)]
fn partition(at: &At<'_>) -> Option<Option<Partition>> {
    match at.value {
        Value::Text(text) if text == "refuse" => Some(Some(Partition::Refuse)),
        Value::Text(text) => {
            let fix =
                did_you_mean(text, ["refuse", "true"]).unwrap_or_else(|| "expected true or refuse".into());
            at.refuse(format!("`{text}` is no partition"), fix)
        }
        Value::Bool(wanted) => Some(wanted.then_some(Partition::Silent)),
        _ => at.expected("true or refuse"),
    }
}

fn cut(at: &At<'_>) -> Option<u64> {
    const EXPECTED: &str = "a size such as 64KiB, or { after: 64KiB }";
    let Value::Map(_) = at.value else { return unit(at, EXPECTED, units::some_bytes) };
    let mut fields = at.fields(EXPECTED)?;
    let after = fields.require("after", "64KiB").and_then(|at| bytes(&at));
    fields.finish();
    after
}

fn dns(at: &At<'_>) -> Option<v1::Dns> {
    let mut fields = at.fields("{ names: [\"*.example.com\"], answer: nxdomain }")?;
    let names = maybe(&mut fields, "names", |at| {
        items(at, "a list of names: [\"*.example.com\"]", |at| {
            unit(at, "a name: api.example.com", units::dns_name)
        })
    });
    let answer = maybe(&mut fields, "answer", |at| choice::<DnsAnswer>(at, "answer"));
    let addresses = maybe(&mut fields, "addresses", |at| {
        items(at, "a list of addresses: [10.0.0.9]", |at| unit(at, "an address: 10.0.0.9", units::ip))
    });
    let delay = maybe(&mut fields, "delay", held);
    fields.finish();
    let (names, answer, addresses) = (names?.unwrap_or_default(), answer?, addresses?.unwrap_or_default());
    made(at, network::dns(names, answer, addresses, delay?.unwrap_or_default()))
}

// ---- the far side --------------------------------------------------------------------------------------------------

/// A far side by its terms.
pub(super) fn address(at: &At<'_>) -> Option<Address> {
    let mut fields = at.fields("{ cidrs: [10.0.0.7/32], ports: [6379], protocol: tcp }")?;
    let cidrs = list(&mut fields, "cidrs", "CIDRs: [10.0.0.7/32]", units::cidr);
    let hosts = list(&mut fields, "hosts", "names: [redis.internal]", units::host);
    let ports = list(&mut fields, "ports", "ports: [6379, 8000-8010]", units::ports);
    let local_ports = list(&mut fields, "localPorts", "ports: [6379, 8000-8010]", units::ports);
    let protocol = maybe(&mut fields, "protocol", |at| unit(at, "tcp, udp, icmp or any", units::protocol));
    let dscp = list(&mut fields, "dscp", "DSCP code points: [46, af11]", units::dscp);
    let vlans = list(&mut fields, "vlans", "VLAN ids: [100, untagged]", units::vlan);
    let icmp = list(&mut fields, "icmp", "ICMP types: [echo-request, 3]", units::icmp);
    let tcp_flags = maybe(&mut fields, "tcpFlags", |at| unit(at, "TCP flags: syn,!ack", units::tcp_flags));
    let fragments = maybe(&mut fields, "fragments", |at| choice(at, "choice of fragments"));
    fields.finish();
    let address = Address {
        cidrs: cidrs?,
        hosts: hosts?,
        ports: ports?,
        local_ports: local_ports?,
        protocol: protocol?.unwrap_or_default(),
        dscp: dscp?,
        vlans: vlans?,
        icmp: icmp?.concat(),
        tcp_flags: tcp_flags?,
        fragments: fragments?,
    };
    if address.is_everything() {
        return at.refuse("this matches every packet", "add cidrs, hosts, ports or protocol");
    }
    made(at, address.check())?;
    Some(address)
}

/// A list of scalars that a parser of `units` understands; empty where there is none.
fn list<T>(
    fields: &mut Fields<'_>,
    name: &str,
    of: &str,
    parse: fn(&str) -> Result<T, Wrong>,
) -> Option<Vec<T>> {
    let read =
        |at: &At<'_>| items(at, &format!("a list of {of}"), |at| unit(at, &format!("one of {of}"), parse));
    Some(maybe(fields, name, read)?.unwrap_or_default())
}

/// Far sides: a name, an address, a mapping, or a list of these.
fn peers(at: &At<'_>, names: &Names) -> Option<Vec<(String, Address)>> {
    match at.value {
        Value::List(_) => items(at, "names of address targets", |at| peer(at, names)),
        _ => Some(vec![peer(at, names)?]),
    }
}

fn peer(at: &At<'_>, names: &Names) -> Option<(String, Address)> {
    if let Value::Map(_) = at.value {
        let address = address(at)?;
        return Some((address.shown(), address));
    }
    let text = at.text("the name of an address target, or an address such as 10.0.0.7/32:6379/tcp")?;
    match names.targets.get(&text) {
        Some(Some(Target::Address(address))) => return Some((text, address.clone())),
        Some(Some(_)) => {
            let fix = "name a target with `address`, or write 10.0.0.7/32:6379/tcp here";
            return at.refuse(format!("`{text}` is not an address"), fix);
        }
        Some(None) => return None,
        None => {}
    }
    // What looks like an address is judged as one, everything else as a name.
    if text.contains([':', '/', '*']) || text.starts_with(|c: char| c.is_ascii_digit()) {
        let address = made(at, units::address(&text))?;
        made(at, address.check())?;
        return Some((text, address));
    }
    let addresses = names.targets.iter().filter(|(_, t)| matches!(t, Some(Target::Address(_)) | None));
    unknown(at, "target", &text, addresses.map(|(name, _)| name.as_str()))
}
