//! The units that a plan and the command line are written in. Pure.
//!
//! Every parser gives `(what is wrong, what to write)` for a text it does not take.

use std::{net::IpAddr, time::Duration};

use super::{Address, Protocol};

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
    let (rest, of) = match full.rsplit_once('/') {
        Some((rest, last))
            if last.starts_with(|c: char| c.is_ascii_alphabetic()) && !last.contains([':', ']']) =>
        {
            (rest, protocol(last)?)
        }
        _ => (full, Protocol::Any),
    };
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
    Ok(Address { cidrs, ports, local_ports: vec![], protocol: of })
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
