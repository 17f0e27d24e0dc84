//! The units that a plan and the command line are written in. Pure.
//!
//! Every parser gives `(what is wrong, what to write)` for a text it does not take.

use std::{net::IpAddr, time::Duration};

use squall_proto::v1;

use super::{Address, Protocol};

/// The longest time that an agent holds a packet.
pub(crate) const LONGEST_DELAY: Duration = Duration::from_mins(1);
/// Most entries of a distribution's table (`dist` in net/sched/sch_netem.c, Linux 6.12: 16384).
const LONGEST_TABLE: usize = 16384;
/// Names of DSCP code points (RFC 2474, 2597, 3246, 5865, 8622).
const DSCP: [(&str, u32); 24] = [
    ("default", 0),
    ("le", 1),
    ("cs0", 0),
    ("cs1", 8),
    ("cs2", 16),
    ("cs3", 24),
    ("cs4", 32),
    ("cs5", 40),
    ("cs6", 48),
    ("cs7", 56),
    ("af11", 10),
    ("af12", 12),
    ("af13", 14),
    ("af21", 18),
    ("af22", 20),
    ("af23", 22),
    ("af31", 26),
    ("af32", 28),
    ("af33", 30),
    ("af41", 34),
    ("af42", 36),
    ("af43", 38),
    ("va", 44),
    ("ef", 46),
];
/// Names of ICMP types, each with its numbers in ICMP and ICMPv6. A type is matched in both alike, so only those are
/// here whose number in one of them means nothing in the other.
const ICMP: [(&str, &[u32]); 8] = [
    ("echo-request", &[8, 128]),
    ("echo-reply", &[0, 129]),
    ("redirect", &[5, 137]),
    ("packet-too-big", &[2]),
    ("router-solicitation", &[10, 133]),
    ("router-advertisement", &[9, 134]),
    ("neighbor-solicitation", &[135]),
    ("neighbor-advertisement", &[136]),
];
/// TCP flags by their bits.
const TCP_FLAGS: [(&str, u32); 8] =
    [("fin", 1), ("syn", 2), ("rst", 4), ("psh", 8), ("ack", 16), ("urg", 32), ("ece", 64), ("cwr", 128)];

/// What is wrong, and what to write instead.
pub(crate) type Wrong = (String, String);

fn wrong<T>(message: impl Into<String>, fix: impl Into<String>) -> Result<T, Wrong> {
    Err((message.into(), fix.into()))
}

fn number(text: &str) -> Option<f64> {
    let plain =
        text.chars().all(|c| c.is_ascii_digit() || c == '.') && text.chars().any(|c| c.is_ascii_digit());
    plain.then(|| text.parse().ok())?
}

/// `800ms`, `2s`, `1m 30s`, `1.5s`.
pub(crate) fn duration(text: &str) -> Result<Duration, Wrong> {
    let text = text.trim();
    if number(text).is_some() {
        return wrong(format!("`{text}` has no unit"), format!("write {text}ms or {text}s"));
    }
    // humantime reads `M` as months.
    humantime::parse_duration(text).or_else(|_| {
        wrong(format!("`{text}` is no length of time"), "expected a number and a unit: 300ms, 2s, 5m")
    })
}

/// A time for which packets are held: a [`duration`] of at most a minute.
pub(crate) fn held(text: &str) -> Result<Duration, Wrong> {
    let held = duration(text)?;
    if held > LONGEST_DELAY {
        let message = format!("`{}` is longer than a packet can be held", text.trim());
        return wrong(message, "expected at most 60s; a partition is longer");
    }
    Ok(held)
}

/// A [`share`] that is more than nothing.
pub(crate) fn part(text: &str) -> Result<f64, Wrong> {
    match share(text)? {
        0.0 => wrong("zero does nothing", "give more than 0, or leave it out"),
        part => Ok(part),
    }
}

/// How likely a packet suffers what the one before did: a [`share`] of less than all.
pub(crate) fn correlation(text: &str) -> Result<f64, Wrong> {
    let correlation = share(text)?;
    if correlation < 1.0 {
        Ok(correlation)
    } else {
        wrong("a correlation of all would never leave the first decision", "give less than 100%")
    }
}

/// A share: `5%`, `0.12%`.
pub(crate) fn share(text: &str) -> Result<f64, Wrong> {
    let text = text.trim();
    let Some(percent) = text.strip_suffix('%') else {
        if let Some(n) = number(text) {
            let fix = if n <= 1.0 && text.contains('.') {
                format!("write {text}% or {}%", plain(n * 100.0))
            } else {
                format!("write {text}%")
            };
            return wrong(format!("`{text}` has no unit"), fix);
        }
        return wrong(format!("`{text}` is no percentage"), "expected a percentage: 5%, 0.12%");
    };
    match number(percent.trim()) {
        Some(n) if n <= 100.0 => Ok(n / 100.0),
        Some(_) => wrong(format!("`{text}` is more than all"), "expected 0% to 100%"),
        None => wrong(format!("`{text}` is no percentage"), "expected a percentage: 5%, 0.12%"),
    }
}

/// Without the noise that binary fractions leave behind.
pub(crate) fn plain(n: f64) -> f64 {
    (n * 1e9).round() / 1e9
}

/// A rate, as events per second: `200/s`, `5/min`.
pub(crate) fn rate(text: &str) -> Result<f64, Wrong> {
    let text = text.trim();
    let fix = "expected a number per time: 200/s, 5/min";
    let Some((count, per)) = text.split_once('/') else {
        if number(text).is_some() {
            return wrong(format!("`{text}` has no unit"), format!("write {text}/s or {text}/min"));
        }
        return wrong(format!("`{text}` is no rate"), fix);
    };
    let count = count.trim();
    let (Some(count), Some(seconds)) =
        (number(count).or_else(|| size(count).ok().map(|b| b as f64)), period(per))
    else {
        return wrong(format!("`{text}` is no rate"), fix);
    };
    Ok(count / seconds)
}

fn period(text: &str) -> Option<f64> {
    match text.trim() {
        "s" | "sec" | "second" => Some(1.0),
        "m" | "min" | "minute" => Some(60.0),
        "h" | "hour" => Some(3600.0),
        _ => None,
    }
}

/// A size in bytes: `64MiB`, `1GB`, `512KiB`, `100B`.
pub(crate) fn size(text: &str) -> Result<u64, Wrong> {
    const UNITS: [(&str, f64); 9] = [
        ("KiB", 1024.0),
        ("MiB", 1024.0 * 1024.0),
        ("GiB", 1024.0 * 1024.0 * 1024.0),
        ("TiB", 1024.0 * 1024.0 * 1024.0 * 1024.0),
        ("kB", 1e3),
        ("KB", 1e3),
        ("MB", 1e6),
        ("GB", 1e9),
        ("B", 1.0),
    ];
    let text = text.trim();
    if number(text).is_some() {
        return wrong(format!("`{text}` has no unit"), format!("write {text}MiB or {text}B"));
    }
    let unit = UNITS.iter().find_map(|(unit, bytes)| Some((text.strip_suffix(unit)?, bytes)));
    match unit.and_then(|(count, bytes)| Some((number(count.trim())? * bytes).round() as u64)) {
        Some(bytes) => Ok(bytes),
        None => wrong(format!("`{text}` is no size"), "expected a number and a unit: 64MiB, 1GiB"),
    }
}

/// A [`size`] that is more than nothing.
pub(crate) fn some_bytes(text: &str) -> Result<u64, Wrong> {
    match size(text)? {
        0 => wrong("zero does nothing", "give more than 0, or leave it out"),
        bytes => Ok(bytes),
    }
}

/// A rate in the units of tc, as bits a second: `10mbit`, `1gbit`; in `bps`, `kbps`, `mbps` the b is a byte, as in tc.
pub(crate) fn bit_rate(text: &str) -> Result<u64, Wrong> {
    const UNITS: [(&str, f64); 8] = [
        ("kbit", 1e3),
        ("mbit", 1e6),
        ("gbit", 1e9),
        ("bit", 1.0),
        ("kbps", 8e3),
        ("mbps", 8e6),
        ("gbps", 8e9),
        ("bps", 8.0),
    ];
    let text = text.trim();
    if number(text).is_some() {
        return wrong(format!("`{text}` has no unit"), format!("write {text}mbit or {text}kbit"));
    }
    let lower = text.to_lowercase();
    let unit = UNITS.iter().find_map(|(unit, bits)| Some((lower.strip_suffix(unit)?, bits)));
    match unit.and_then(|(count, bits)| Some((number(count.trim())? * bits).round() as u64)) {
        Some(0) => wrong("zero lets nothing pass", "give more than 0; partition drops everything"),
        Some(bits) => Ok(bits),
        None => {
            let fix = "expected a number and a unit: bit, kbit, mbit, gbit, or bps for bytes a second";
            wrong(format!("`{text}` is no rate"), fix)
        }
    }
}

/// A DSCP code point: 0 to 63, or a name such as `ef`, `af11`, `cs1`.
pub(crate) fn dscp(text: &str) -> Result<u32, Wrong> {
    let name = text.trim().to_lowercase();
    let named = DSCP.iter().find(|(known, _)| *known == name).map(|(_, point)| *point);
    named.or_else(|| name.parse().ok().filter(|point| *point < 64)).map_or_else(
        || {
            wrong(
                format!("`{text}` is no DSCP code point"),
                "expected 0 to 63, or ef, af11 to af43, cs0 to cs7",
            )
        },
        Ok,
    )
}

/// A VLAN id, 1 to 4094, or `untagged`, which is 0.
pub(crate) fn vlan(text: &str) -> Result<u32, Wrong> {
    match text.trim() {
        "untagged" => Ok(0),
        id => match id.parse() {
            Ok(id @ 1..=4094) => Ok(id),
            _ => wrong(format!("`{text}` is no VLAN"), "expected 1 to 4094, or untagged"),
        },
    }
}

/// An ICMP type: 0 to 255, or a name, which stands for its number in ICMP and the one in ICMPv6.
pub(crate) fn icmp(text: &str) -> Result<Vec<u32>, Wrong> {
    let name = text.trim().to_lowercase();
    if let Some((_, types)) = ICMP.iter().find(|(known, _)| *known == name) {
        return Ok(types.to_vec());
    }
    if let Ok(kind @ 0..=255) = name.parse() {
        return Ok(vec![kind]);
    }
    let known: Vec<&str> = ICMP.iter().map(|(name, _)| *name).collect();
    wrong(format!("`{text}` is no ICMP type"), format!("expected 0 to 255, or {}", known.join(", ")))
}

/// TCP flags that are set, and those that are not: `syn,!ack`.
pub(crate) fn tcp_flags(text: &str) -> Result<v1::TcpFlags, Wrong> {
    let mut flags = v1::TcpFlags::default();
    for flag in text.split(',') {
        let name = flag.trim().to_lowercase();
        let (name, bits) = match name.strip_prefix('!') {
            Some(name) => (name.trim(), &mut flags.clear),
            None => (name.as_str(), &mut flags.set),
        };
        let Some((_, bit)) = TCP_FLAGS.iter().find(|(known, _)| *known == name) else {
            let fix =
                "expected fin, syn, rst, psh, ack, urg, ece, cwr; with ! where it must not be set: syn,!ack";
            return wrong(format!("`{name}` is no TCP flag"), fix);
        };
        *bits |= bit;
    }
    if flags.set & flags.clear != 0 {
        return wrong(format!("`{text}` wants a flag both set and not set"), "write each flag once");
    }
    Ok(flags)
}

/// [`tcp_flags`] as they are written.
pub(crate) fn tcp_flags_shown(flags: v1::TcpFlags) -> String {
    let of = |bits: u32, sign: &'static str| {
        TCP_FLAGS.iter().filter(move |(_, bit)| bits & bit != 0).map(move |(name, _)| format!("{sign}{name}"))
    };
    of(flags.set, "").chain(of(flags.clear, "!")).collect::<Vec<_>>().join(",")
}

/// A host name: `redis.internal`.
pub(crate) fn host(text: &str) -> Result<String, Wrong> {
    let name = text.trim();
    if name.parse::<IpAddr>().is_ok() {
        return wrong(format!("`{name}` is an address, not a name"), "name it by its CIDR, not as a host");
    }
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_'))
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let labels = name.strip_suffix('.').unwrap_or(name);
    // A resolver takes a last label of digits for a part of an address.
    let number = |label: &str| label.chars().all(|c| c.is_ascii_digit());
    if labels.len() > 253 || !labels.split('.').all(label) || labels.rsplit('.').next().is_some_and(number) {
        return wrong(format!("`{name}` is no host name"), "expected a name such as redis.internal");
    }
    Ok(name.to_owned())
}

/// What a DNS query asks for: `api.example.com`, or `*.example.com` for everything below it.
pub(crate) fn dns_name(text: &str) -> Result<String, Wrong> {
    let name = text.trim();
    match host(name.strip_prefix("*.").unwrap_or(name)) {
        Ok(_) => Ok(name.to_owned()),
        Err(_) => wrong(format!("`{name}` is no DNS name"), "expected api.example.com or *.example.com"),
    }
}

/// An address on its own: `10.0.0.9`, `fd00::9`.
pub(crate) fn ip(text: &str) -> Result<String, Wrong> {
    match text.trim().parse::<IpAddr>() {
        Ok(ip) => Ok(ip.to_string()),
        Err(_) => wrong(format!("`{text}` is no address"), "expected 10.0.0.9 or fd00::9"),
    }
}

/// A distribution's table in the form of netem's `.dist` files: whole numbers, and comments from `#` to the end of a
/// line. An error comes with its line, from 1.
pub(crate) fn table(text: &str) -> Result<Vec<i32>, (usize, Wrong)> {
    let mut table = Vec::new();
    let mut last = 1;
    for (line, entries) in (1..).zip(text.lines()) {
        last = line;
        let entries = entries.split('#').next().unwrap_or_default();
        for entry in entries.split_whitespace() {
            // netem keeps them in 16 bits (`struct disttable` in net/sched/sch_netem.c, Linux 6.12).
            let Ok(value) = entry.parse::<i16>() else {
                let fix = "expected whole numbers from -32768 to 32767, where 8192 is one jitter";
                return Err((line, (format!("`{entry}` is no entry of a table"), fix.into())));
            };
            if table.len() == LONGEST_TABLE {
                let fix = format!("expected at most {LONGEST_TABLE} entries");
                return Err((line, ("the table is too long".into(), fix)));
            }
            table.push(value.into());
        }
    }
    if table.is_empty() {
        return Err((last, ("the table is empty".into(), "expected 1 to 16384 whole numbers".into())));
    }
    Ok(table)
}

/// One port or a range: `6379`, `8000-8010`.
pub(crate) fn ports(text: &str) -> Result<(u16, u16), Wrong> {
    let port = |p: &str| p.trim().parse::<u16>().ok().filter(|p| *p > 0);
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    match (port(first), port(last)) {
        (Some(first), Some(last)) if first <= last => Ok((first, last)),
        (Some(_), Some(_)) => {
            wrong(format!("`{text}` ends before it starts"), format!("write {last}-{first}"))
        }
        _ => wrong(format!("`{text}` is no port"), "expected 1 to 65535, or a range such as 8000-8010"),
    }
}

/// An address with its prefix length: `10.0.0.7/32`, `fd00::/64`; one without gets the longest.
pub(crate) fn cidr(text: &str) -> Result<String, Wrong> {
    let text = text.trim();
    let (address, prefix) = text.split_once('/').map_or((text, None), |(a, p)| (a, Some(p)));
    let Ok(address) = address.parse::<IpAddr>() else {
        return wrong(format!("`{text}` is no address"), "expected a CIDR: 10.0.0.7/32, fd00::/64");
    };
    let longest = if address.is_ipv4() { 32 } else { 128 };
    match prefix.map_or(Ok(longest), str::parse::<u8>) {
        Ok(prefix) if prefix <= longest => Ok(format!("{address}/{prefix}")),
        _ => wrong(format!("`{text}` has a prefix that is too long"), format!("expected /0 to /{longest}")),
    }
}

/// `tcp`, `udp`, `icmp` or `any`.
pub(crate) fn protocol(text: &str) -> Result<Protocol, Wrong> {
    match text.trim().to_lowercase().as_str() {
        "any" => Ok(Protocol::Any),
        "tcp" => Ok(Protocol::Tcp),
        "udp" => Ok(Protocol::Udp),
        "icmp" => Ok(Protocol::Icmp),
        _ => wrong(format!("`{text}` is no protocol"), "expected tcp, udp, icmp or any"),
    }
}

/// The far side in one word: `10.0.0.7/32:6379/tcp`, `[fd00::/64]:6379`, `10.0.0.0/8`, `*:53/udp`.
pub(crate) fn address(text: &str) -> Result<Address, Wrong> {
    let fix = "expected CIDR[:PORT][/PROTOCOL]: 10.0.0.7/32:6379/tcp, [fd00::/64]:6379, *:53/udp";
    let full = text.trim();
    let (rest, of) = split_protocol(full)?;
    let (host, port) = if let Some(inner) = rest.strip_prefix('[') {
        let Some((host, after)) = inner.split_once(']') else {
            return wrong(format!("`{full}` has no closing bracket"), fix);
        };
        (host, after.strip_prefix(':'))
    } else if rest.matches(':').count() > 1 {
        (rest, None)
    } else {
        rest.split_once(':').map_or((rest, None), |(host, port)| (host, Some(port)))
    };
    let cidrs = match host {
        "*" | "" => vec![],
        host => vec![cidr(host).or_else(|_| wrong(format!("`{full}` is no address"), fix))?],
    };
    let ports = port.map(ports).transpose()?.into_iter().collect();
    Ok(Address { cidrs, ports, protocol: of, ..Address::default() })
}

/// The far side by its name: `redis.internal:6379/tcp`, `redis.internal`.
pub(crate) fn named_address(text: &str) -> Result<Address, Wrong> {
    let (rest, protocol) = split_protocol(text.trim())?;
    let (name, port) = rest.split_once(':').map_or((rest, None), |(name, port)| (name, Some(port)));
    let ports = port.map(ports).transpose()?.into_iter().collect();
    Ok(Address { hosts: vec![host(name)?], ports, protocol, ..Address::default() })
}

/// What is before `/tcp`, and that.
fn split_protocol(text: &str) -> Result<(&str, Protocol), Wrong> {
    match text.rsplit_once('/') {
        Some((rest, last))
            if last.starts_with(|c: char| c.is_ascii_alphabetic()) && !last.contains([':', ']']) =>
        {
            Ok((rest, protocol(last)?))
        }
        _ => Ok((text, Protocol::Any)),
    }
}

/// The percentile that a key such as `p95` or `p99.9` names, as a ratio.
pub(crate) fn percentile(key: &str) -> Option<f64> {
    let percent = number(key.strip_prefix('p')?)?;
    (50.0..=99.9).contains(&percent).then_some(plain(percent / 100.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case("800ms", 0.8)]
    #[case("1m 30s", 90.0)]
    #[case("1.5s", 1.5)]
    #[case("5m", 300.0)]
    fn durations(#[case] text: &str, #[case] seconds: f64) {
        assert_eq!(duration(text).expect("valid"), Duration::from_secs_f64(seconds));
    }

    #[rstest::rstest]
    #[case("800", "write 800ms or 800s")]
    #[case("2x", "expected a number and a unit: 300ms, 2s, 5m")]
    #[case("-2s", "expected a number and a unit: 300ms, 2s, 5m")]
    fn no_durations(#[case] text: &str, #[case] fix: &str) {
        assert_eq!(duration(text).expect_err("invalid").1, fix);
    }

    #[rstest::rstest]
    #[case("5%", Ok(0.05))]
    #[case("0.12%", Ok(0.0012))]
    #[case("100 %", Ok(1.0))]
    #[case("5", Err("write 5%"))]
    #[case("0.05", Err("write 0.05% or 5%"))]
    #[case("130%", Err("expected 0% to 100%"))]
    #[case("-1%", Err("expected a percentage: 5%, 0.12%"))]
    fn shares(#[case] text: &str, #[case] expected: Result<f64, &str>) {
        match (share(text), expected) {
            (Ok(a), Ok(b)) => assert!((a - b).abs() < 1e-12, "{a} {b}"),
            (a, b) => assert_eq!(a.map_err(|e| e.1), b.map_err(str::to_owned)),
        }
    }

    #[test]
    fn rates_and_sizes() {
        assert_eq!(rate("200/s"), Ok(200.0));
        assert_eq!(rate("30/min"), Ok(0.5));
        assert_eq!(rate("1MiB/s"), Ok(1_048_576.0));
        assert_eq!(rate("200").expect_err("no unit").1, "write 200/s or 200/min");
        assert!(rate("200/fortnight").is_err());
        assert_eq!(size("64MiB"), Ok(64 << 20));
        assert_eq!(size("1.5 GiB"), Ok(3 << 29));
        assert_eq!(size("100B"), Ok(100));
        assert_eq!(size("64").expect_err("no unit").1, "write 64MiB or 64B");
        assert!(size("64MiBs").is_err());
    }

    #[rstest::rstest]
    #[case("800bit", 800)]
    #[case("1.5 kbit", 1500)]
    #[case("10Mbit", 10_000_000)]
    #[case("1gbit", 1_000_000_000)]
    #[case("100bps", 800)]
    #[case("1kbps", 8000)]
    #[case("2mbps", 16_000_000)]
    #[case("1gbps", 8_000_000_000)]
    fn rates_are_those_of_tc(#[case] text: &str, #[case] bits: u64) {
        assert_eq!(bit_rate(text), Ok(bits));
    }

    #[test]
    fn times_for_which_packets_are_held() {
        assert_eq!(held("60s"), Ok(LONGEST_DELAY));
        assert!(held("60001ms").is_err());
        assert_eq!(held("2").expect_err("no unit").1, "write 2ms or 2s");
    }

    #[test]
    fn names_of_numbers() {
        assert_eq!([dscp("EF"), dscp("0"), dscp("63"), dscp("af43")], [Ok(46), Ok(0), Ok(63), Ok(38)]);
        assert_eq!([vlan("untagged"), vlan("1"), vlan("4094")], [Ok(0), Ok(1), Ok(4094)]);
        assert_eq!(
            [icmp("0"), icmp("255"), icmp("echo-reply")],
            [Ok(vec![0]), Ok(vec![255]), Ok(vec![0, 129])]
        );
        let flags = tcp_flags(" SYN, ! ack,!rst").expect("valid");
        assert_eq!((flags.set, flags.clear), (2, 20));
        assert_eq!(tcp_flags_shown(flags), "syn,!rst,!ack");
        for bad in ["", "syn,", "!"] {
            assert!(tcp_flags(bad).is_err(), "{bad}");
        }
        // All of Assured Forwarding (RFC 2597): class times 8, and twice the drop precedence.
        for (class, drop) in (1..=4).flat_map(|class| (1..=3).map(move |drop| (class, drop))) {
            assert_eq!(dscp(&format!("af{class}{drop}")), Ok(8 * class + 2 * drop));
        }
    }

    #[test]
    fn names_of_hosts() {
        for good in ["redis", "redis.internal.", "_sip._tcp.a-b.c", "0x.de", "1.2.3.a"] {
            assert_eq!(host(good).as_deref(), Ok(good));
        }
        for bad in ["", ".", "a..b", "a b", "*.a", "fd00::1", "10.0.0.7", &"a".repeat(64), &"a.".repeat(128)]
        {
            assert!(host(bad).is_err(), "{bad}");
        }
        assert_eq!(dns_name("*.example.com").as_deref(), Ok("*.example.com"));
        for bad in ["*", "*.", "a.*.b", "*example.com"] {
            assert!(dns_name(bad).is_err(), "{bad}");
        }
        let named = named_address("redis.b:6379-6380/tcp").expect("valid");
        assert_eq!((named.hosts, named.ports), (vec!["redis.b".to_owned()], vec![(6379, 6380)]));
    }

    #[test]
    fn the_tables_that_tc_brings() {
        for line in ["1 2\n3\t-4 # 5", "# 0\n1 2 3 -4\n", "1\n\n2\n3\n-4"] {
            assert_eq!(table(line), Ok(vec![1, 2, 3, -4]));
        }
    }

    #[test]
    fn addresses() {
        let parsed = address("10.0.0.7/32:6379/tcp").expect("valid");
        assert_eq!(
            (parsed.cidrs, parsed.ports, parsed.protocol),
            (vec!["10.0.0.7/32".to_owned()], vec![(6379, 6379)], Protocol::Tcp)
        );
        let parsed = address("[fd00::/64]:8000-8010").expect("valid");
        assert_eq!(
            (parsed.cidrs, parsed.ports, parsed.protocol),
            (vec!["fd00::/64".to_owned()], vec![(8000, 8010)], Protocol::Any)
        );
        assert_eq!(address("fd00::1").expect("valid").cidrs, ["fd00::1/128"]);
        assert_eq!(address("10.0.0.7/udp").expect("valid").protocol, Protocol::Udp);
        assert_eq!(address("*:53/udp").expect("valid").cidrs, Vec::<String>::new());
        for bad in
            ["redis", "10.0.0.7/33", "10.0.0.7:0", "10.0.0.7:70000", "[fd00::1:80", "10.0.0.7/32:80/sctp"]
        {
            assert!(address(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn percentiles() {
        assert_eq!(percentile("p95"), Some(0.95));
        assert!((percentile("p99.9").expect("known") - 0.999).abs() < 1e-12);
        for bad in ["p", "95", "p100", "p10", "px", "p99.99"] {
            assert_eq!(percentile(bad), None, "{bad}");
        }
    }
}
