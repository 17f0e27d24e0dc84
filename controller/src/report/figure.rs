//! Figures as people read them: short, with their unit.

use crate::event::{Figure, Finding, GateOutline};

/// A whole number with its thousands apart: `11 842`.
#[must_use]
pub(crate) fn count(value: f64) -> String {
    let digits = format!("{:.0}", value.abs());
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(' ');
        }
        text.push(digit);
    }
    if value < 0.0 && digits != "0" { format!("-{text}") } else { text }
}

/// A latency or another measured time, seconds: `850µs`, `41ms`, `1.93s`, `127s`.
#[must_use]
pub(crate) fn seconds(value: f64) -> String {
    match value.abs() {
        0.0 => "0s".into(),
        v if v < 0.000_999_5 => format!("{}µs", significant(value * 1e6)),
        v if v < 0.999_5 => format!("{}ms", significant(value * 1e3)),
        _ => format!("{}s", significant(value)),
    }
}

/// A length of time that was planned or has passed, seconds: `15s`, `8m41s`, `1h02m`. Below ten seconds with a tenth.
#[must_use]
pub(crate) fn span(value: f64) -> String {
    if value < 10.0 {
        return if value.fract().abs() < 0.05 { format!("{value:.0}s") } else { seconds(value) };
    }
    let whole = value.round() as u64;
    match whole {
        0..60 => format!("{whole}s"),
        60..3600 => format!("{}m{:02}s", whole / 60, whole % 60),
        _ => format!("{}h{:02}m", whole / 3600, whole % 3600 / 60),
    }
}

/// A reading of the run's clock, seconds: `03:12`, `1:03:12`.
#[must_use]
pub(crate) fn clock(value: f64) -> String {
    let whole = value.max(0.0) as u64;
    let (h, m, s) = (whole / 3600, whole % 3600 / 60, whole % 60);
    if h > 0 { format!("{h}:{m:02}:{s:02}") } else { format!("{m:02}:{s:02}") }
}

/// `p95`, `p99.9`.
#[must_use]
pub(crate) fn percentile(value: f64) -> String {
    // 0.999 * 100 is 99.900…01 in binary; four decimals are more than any plan has.
    let text = format!("{:.4}", value * 100.0);
    format!("p{}", text.trim_end_matches('0').trim_end_matches('.'))
}

/// A value with its unit, as named in [`Figure::unit`] and [`Finding::unit`].
#[must_use]
pub(crate) fn value(value: f64, unit: &str) -> String {
    if value.is_infinite() {
        return if value > 0.0 { "∞".into() } else { "-∞".into() };
    }
    if value.is_nan() {
        return "not a number".into();
    }
    match unit {
        "seconds" => seconds(value),
        "ratio" => percent(value),
        "per_minute" => format!("{}/min", signed(value)),
        "bytes" => bytes(value),
        "count" | "packets" if value.fract() == 0.0 => count(value),
        _ => significant(value),
    }
}

/// A limit with its unit; unlike an estimate, a limit on growth needs no sign.
#[must_use]
pub(crate) fn limit(limit: f64, unit: &str) -> String {
    if unit == "per_minute" { format!("{}/min", significant(limit)) } else { value(limit, unit) }
}

/// An interval: `[1.88, 1.97]` where the unit is that of the value beside it, each end with its own otherwise; `≤ 2s`
/// where one end is open.
#[must_use]
pub(crate) fn interval(ends: (Option<f64>, Option<f64>), beside: Option<f64>, unit: &str) -> String {
    let (low, high) = match ends {
        (Some(low), Some(high)) => (value(low, unit), value(high, unit)),
        (Some(low), None) => return format!("≥ {}", value(low, unit)),
        (None, Some(high)) => return format!("≤ {}", value(high, unit)),
        (None, None) => return "unknown".into(),
    };
    let shared = beside.map(|v| suffix(&value(v, unit)).to_owned()).unwrap_or_default();
    let bare = |text: &str| text == "∞" || text == "-∞" || (!shared.is_empty() && suffix(text) == shared);
    if bare(&low) && bare(&high) {
        let strip = |text: &str| text.strip_suffix(shared.as_str()).unwrap_or(text).to_owned();
        return format!("[{}, {}]", strip(&low), strip(&high));
    }
    format!("[{low}, {high}]")
}

/// The value of a finding, or a dash.
#[must_use]
pub(crate) fn found(finding: &Finding) -> String {
    match finding.value {
        Some(v) if finding.gate == "oom" => kills(v),
        Some(v) => value(v, &finding.unit),
        None => "–".into(),
    }
}

/// The limit of a gate in words: `≤ 800ms`.
#[must_use]
pub(crate) fn gate_limit(gate: &GateOutline) -> String {
    match gate.gate.as_str() {
        "oom" => format!("≤ {}", kills(gate.limit)),
        "recovery" => format!("≤ {}", span(gate.limit)),
        _ => format!("≤ {}", limit(gate.limit, &gate.unit)),
    }
}

/// Kills with their noun: `0 kills`, `1 kill`.
#[must_use]
pub(crate) fn kills(n: f64) -> String {
    format!("{} {}", count(n), if (n - 1.0).abs() < f64::EPSILON { "kill" } else { "kills" })
}

/// The measures of an effect in one line: `1 204 packets dropped, delay p50 2.01s p99 2.28s, TCP RTT 41ms → 2.05s`.
#[must_use]
pub(crate) fn effects(figures: &[Figure]) -> String {
    effects_as(figures, effect).join(", ")
}

/// The measures of an effect, those that belong together as one, each other one as `alone` says it.
#[must_use]
pub(crate) fn effects_as(figures: &[Figure], alone: impl Fn(&Figure) -> String) -> Vec<String> {
    let find = |name: &str| figures.iter().find(|f| f.name == name);
    let mut parts: Vec<String> = Vec::new();
    for figure in figures {
        match figure.name.as_str() {
            name if name.starts_with("delay_p") => {
                let quantile = format!("p{} {}", &name["delay_p".len()..], value(figure.value, &figure.unit));
                match parts.iter_mut().find(|part| part.starts_with("delay p")) {
                    Some(part) => *part += &format!(" {quantile}"),
                    None => parts.push(format!("delay {quantile}")),
                }
            }
            "tcp_rtt_before" if find("tcp_rtt").is_some() => {}
            "tcp_rtt" => {
                let before = find("tcp_rtt_before").map(|f| format!("{} → ", value(f.value, &f.unit)));
                let now = value(figure.value, &figure.unit);
                parts.push(format!("TCP RTT {}{now}", before.unwrap_or_default()));
            }
            _ => parts.push(alone(figure)),
        }
    }
    parts
}

/// A measure of an effect: `1 204 packets dropped`, `cpu usage 89.9%`.
#[must_use]
pub(crate) fn effect(figure: &Figure) -> String {
    let name = figure.name.replace('_', " ");
    match (figure.name.as_str(), figure.unit.as_str()) {
        ("tcp_rtt_before", unit) => format!("TCP RTT before {}", value(figure.value, unit)),
        ("bytes", "bytes") => format!("{} matched", bytes(figure.value)),
        // Packets that the stack cuts into several are matched once.
        ("segments", _) => several(figure.value as usize, "segment"),
        (_, "packets") => format!("{} {name}", several(figure.value as usize, "packet")),
        (_, unit) => format!("{name} {}", value(figure.value, unit)),
    }
}

/// A count with its noun, which takes an s for any count but one: `1 round`, `5 rounds`.
#[must_use]
pub(crate) fn several(n: usize, noun: &str) -> String {
    if n == 1 { format!("1 {noun}") } else { format!("{} {noun}s", count(n as f64)) }
}

/// A reason as a sentence: with a capital, where it starts with a plain word, and a full stop.
pub(crate) fn sentence(text: &str) -> String {
    let word = text.split_whitespace().next().unwrap_or_default();
    let mut chars = text.chars();
    let mut out = match chars.next() {
        Some(first) if word.chars().all(|c| c.is_ascii_lowercase()) => {
            first.to_uppercase().chain(chars).collect::<String>()
        }
        _ => text.to_owned(),
    };
    if !out.is_empty() && !out.ends_with(['.', '!', '?']) {
        out.push('.');
    }
    out
}

fn percent(ratio: f64) -> String {
    let value = ratio * 100.0;
    match value.abs() {
        v if v >= 99.995 => format!("{value:.0}%"),
        v if v >= 10.0 => format!("{value:.1}%"),
        v if v == 0.0 || v >= 0.01 => format!("{value:.2}%"),
        _ => format!("{value:.4}%"),
    }
}

fn bytes(value: f64) -> String {
    let mut scaled = value;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if scaled.abs() < 1024.0 {
            return format!("{} {unit}", significant(scaled));
        }
        scaled /= 1024.0;
    }
    format!("{} TiB", significant(scaled))
}

fn signed(value: f64) -> String {
    let text = significant(value);
    if value > 0.0 && text != "0" { format!("+{text}") } else { text }
}

/// Three significant digits, without zeros that say nothing.
fn significant(value: f64) -> String {
    let decimals = match value.abs() {
        v if v >= 99.95 => return count(value),
        v if v >= 9.995 => 1,
        v if v >= 0.999_5 => 2,
        _ => 3,
    };
    let text = format!("{value:.decimals$}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "-0" { "0".into() } else { text.into() }
}

/// The unit at the end of a formatted value.
fn suffix(text: &str) -> &str {
    text.trim_start_matches(|c: char| c.is_ascii_digit() || matches!(c, '+' | '-' | '.' | ' '))
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case(0.0, "0s")]
    #[case(0.000_85, "850µs")]
    #[case(0.041, "41ms")]
    #[case(0.0413, "41.3ms")]
    #[case(0.8, "800ms")]
    #[case(0.999_9, "1s")]
    #[case(1.93, "1.93s")]
    #[case(127.0, "127s")]
    fn times_have_three_digits(#[case] value: f64, #[case] text: &str) {
        assert_eq!(seconds(value), text);
    }

    #[rstest]
    #[case(0.0, "0.00%")]
    #[case(0.0004, "0.04%")]
    #[case(0.0012, "0.12%")]
    #[case(0.000_04, "0.0040%")]
    #[case(0.899, "89.9%")]
    #[case(1.0, "100%")]
    fn ratios_are_read_as_percent(#[case] ratio: f64, #[case] text: &str) {
        assert_eq!(value(ratio, "ratio"), text);
    }

    #[rstest]
    #[case(15.0, "15s")]
    #[case(2.5, "2.5s")]
    #[case(521.0, "8m41s")]
    #[case(3725.0, "1h02m")]
    fn spans(#[case] value: f64, #[case] text: &str) {
        assert_eq!(span(value), text);
    }

    #[test]
    fn an_interval_drops_its_unit_only_beside_the_same_unit() {
        assert_eq!(interval((Some(1.88), Some(1.97)), Some(1.93), "seconds"), "[1.88, 1.97]");
        assert_eq!(interval((Some(0.59), Some(1.2)), Some(0.612), "seconds"), "[590ms, 1.2s]");
        assert_eq!(interval((Some(-1.4), Some(5.6)), Some(2.1), "per_minute"), "[-1.4, +5.6]");
        assert_eq!(interval((None, Some(0.0012)), Some(0.0004), "ratio"), "≤ 0.12%");
        assert_eq!(interval((Some(3.0), None), Some(3.0), "seconds"), "≥ 3s");
        assert_eq!(interval((Some(3.0), Some(f64::INFINITY)), Some(3.0), "seconds"), "[3, ∞]");
        assert_eq!(interval((Some(0.8), Some(0.9)), None, "seconds"), "[800ms, 900ms]");
    }

    #[test]
    fn effects_are_one_line() {
        let figure =
            |(name, value, unit): (&str, f64, &str)| Figure { name: name.into(), value, unit: unit.into() };
        let all = [
            ("matched", 4_812.0, "packets"),
            ("segments", 9_000.0, "packets"),
            ("dropped", 0.0, "packets"),
            ("delayed", 4_571.0, "packets"),
            ("duplicated", 1.0, "packets"),
            ("corrupted", 2.0, "packets"),
            ("reordered", 3.0, "packets"),
            ("refused", 4.0, "packets"),
            ("reset", 5.0, "packets"),
            ("answered", 6.0, "packets"),
            ("bytes", 5_242_880.0, "bytes"),
            ("failed", 7.0, "packets"),
            ("delay_p50", 2.01, "seconds"),
            ("delay_p90", 2.2, "seconds"),
            ("delay_p99", 2.28, "seconds"),
            ("tcp_rtt_before", 0.0004, "seconds"),
            ("tcp_rtt", 4.02, "seconds"),
        ];
        insta::assert_snapshot!(effects(&all.map(figure)), @"4 812 packets matched, 9 000 segments, 0 packets dropped, 4 571 packets delayed, 1 packet duplicated, 2 packets corrupted, 3 packets reordered, 4 packets refused, 5 packets reset, 6 packets answered, 5 MiB matched, 7 packets failed, delay p50 2.01s p90 2.2s p99 2.28s, TCP RTT 400µs → 4.02s");
        assert_eq!(effects(&[figure(("tcp_rtt", 4.02, "seconds"))]), "TCP RTT 4.02s");
        assert_eq!(effects(&[figure(("tcp_rtt_before", 0.0004, "seconds"))]), "TCP RTT before 400µs");
        assert_eq!(effects(&[figure(("cpu_usage", 0.899, "ratio"))]), "cpu usage 89.9%");
        assert_eq!(effects(&[figure(("first_match", 0.012, "seconds"))]), "first match 12ms");
        assert_eq!(effects(&[]), "");
    }

    #[test]
    fn sentences_leave_names_as_they_are() {
        assert_eq!(sentence("the load was late"), "The load was late.");
        assert_eq!(sentence("redis-slow/latency failed."), "redis-slow/latency failed.");
        assert_eq!(sentence("8 of 17 gates"), "8 of 17 gates.");
        assert_eq!(sentence(""), "");
    }

    #[test]
    fn counts_and_percentiles() {
        assert_eq!(count(11_842.0), "11 842");
        assert_eq!(count(-1_204.0), "-1 204");
        assert_eq!(percentile(0.95), "p95");
        assert_eq!(percentile(0.999), "p99.9");
        assert_eq!(value(536_870_912.0, "bytes"), "512 MiB");
        assert_eq!(limit(5.0, "per_minute"), "5/min");
    }
}
