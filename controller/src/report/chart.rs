//! Charts as inline SVG: no script, colours as presentation attributes, so that they stand where CSS is refused.
//!
//! The colours are apart for colour-blind eyes and have at least 3:1 against white and against black; no meaning rests
//! on colour alone. Classes let the page's stylesheet tune them for dark and print.

use std::{collections::BTreeMap, fmt::Write as _};

use super::{
    figure,
    series::{LoadSummary, Mark, Rule, Span, Track},
};
use crate::{
    event::{Finding, Outcome, Phase},
    fold::{Injected, Round, Run},
};

const INK: &str = "#2f7ed8";
const ALARM: &str = "#d9480f";
const GOOD: &str = "#14866d";
const DOUBT: &str = "#8b62d0";
/// More points than this are thinned to the extremes of each step.
const MOST_POINTS: usize = 900;
/// Latencies further apart than this get a logarithmic axis, so that the small ones can be seen too.
const LOG_FROM: f64 = 12.0;

/// Escapes text for HTML and XML, in elements and in double-quoted attributes.
pub(crate) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c if c.is_control() && c != '\n' && c != '\t' => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// An SVG being drawn, with time from left to right.
struct Canvas {
    body: String,
    width: f64,
    left: f64,
    right: f64,
    span: Span,
}

impl Canvas {
    fn new(width: f64, left: f64, right: f64, span: Span) -> Self {
        Self { body: String::new(), width, left, right, span }
    }

    /// Horizontal place of a time, held inside the plot.
    fn x(&self, at: f64) -> f64 {
        let (from, to) = self.span;
        let share = if to > from { ((at - from) / (to - from)).clamp(0.0, 1.0) } else { 0.0 };
        self.left + share * (self.width - self.left - self.right)
    }

    fn add(&mut self, element: std::fmt::Arguments<'_>) {
        self.body.write_fmt(element).expect("writing to a string does not fail");
        self.body.push('\n');
    }

    fn text(&mut self, (x, y): (f64, f64), size: f64, anchor: &str, class: &str, text: &str) {
        let text = escape(text);
        let (fill, weight) = match class {
            "l" => (ALARM, 600),
            "b" => ("currentColor", 600),
            "w" => ("#ffffff", 600),
            _ => ("currentColor", 400),
        };
        let opacity = if class == "m" { " fill-opacity=\"0.7\"" } else { "" };
        self.add(format_args!(
            "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" font-size=\"{size}\" text-anchor=\"{anchor}\" \
             font-weight=\"{weight}\" fill=\"{fill}\"{opacity}>{text}</text>"
        ));
    }

    /// Shades the phases of the rounds.
    fn phases(&mut self, rounds: &[Round], now: f64, (top, bottom): (f64, f64)) {
        for round in rounds {
            for (phase, class, fill, opacity) in
                [(Phase::Fault, "f", ALARM, 0.13), (Phase::Recovery, "r", INK, 0.08)]
            {
                let Some((from, to)) = round.span(phase, now) else { continue };
                if to < self.span.0 || from > self.span.1 {
                    continue;
                }
                let (x, width) = (self.x(from), (self.x(to) - self.x(from)).max(0.5));
                self.add(format_args!(
                    "<rect class=\"{class}\" x=\"{x:.1}\" y=\"{top:.1}\" width=\"{width:.1}\" height=\"{:.1}\" \
                     fill=\"{fill}\" fill-opacity=\"{opacity}\"/>",
                    bottom - top
                ));
            }
        }
    }

    fn line(&mut self, (x1, y1): (f64, f64), (x2, y2): (f64, f64), opacity: f64) {
        self.add(format_args!(
            "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"currentColor\" \
             stroke-opacity=\"{opacity}\"/>"
        ));
    }

    /// A time axis with its labels below `y`; times are told from `zero`.
    fn axis(&mut self, y: f64, zero: Option<f64>) {
        self.line((self.left, y), (self.width - self.right, y), 0.35);
        let (from, to) = self.span;
        let origin = zero.unwrap_or(0.0);
        let step = step((to - from) / ((self.width - self.left - self.right) / 90.0));
        let mut n = ((from - origin) / step).ceil() as i64;
        loop {
            let at = n as f64 * step;
            if at + origin > to + 1e-6 {
                break;
            }
            let x = self.x(at + origin);
            self.line((x, y), (x, y + 4.0), 0.35);
            let label = match zero {
                Some(_) if at > 0.0 => format!("+{}", figure::span(at)),
                Some(_) if at < 0.0 => format!("-{}", figure::span(-at)),
                Some(_) => "fault starts".into(),
                None => figure::clock(at),
            };
            let anchor = if x > self.width - self.right - 24.0 { "end" } else { "middle" };
            self.text((x, y + 15.0), 10.0, anchor, "m", &label);
            n += 1;
        }
    }

    /// A curve with its limits between two heights.
    fn plot(&mut self, track: &Track, (top, bottom): (f64, f64)) {
        let points: Vec<_> = thin(track.inside((self.span.0, self.span.1 + 1e-6)));
        let Some(axis) = Axis::of(track, &points, self.span) else {
            let middle = f64::midpoint(self.left, self.width - self.right);
            self.text((middle, f64::midpoint(top, bottom) + 4.0), 11.0, "middle", "m", "no samples");
            return;
        };
        let y = |value: f64| bottom - axis.share(value) * (bottom - top);
        let edge = self.width - self.right;
        self.line((self.left, bottom), (edge, bottom), 0.25);
        self.line((self.left, top), (edge, top), 0.12);
        self.text((self.left - 5.0, top + 4.0), 10.0, "end", "m", &figure::limit(axis.high, &track.unit));
        self.text((self.left - 5.0, bottom + 3.0), 10.0, "end", "m", &figure::limit(axis.low, &track.unit));

        for decade in axis.decades() {
            let height = y(decade);
            self.line((self.left, height), (edge, height), 0.12);
            if height - top > 12.0 {
                self.text(
                    (self.left - 5.0, height + 3.5),
                    10.0,
                    "end",
                    "m",
                    &figure::limit(decade, &track.unit),
                );
            }
        }
        let dots: Vec<(f64, f64, f64)> = points.iter().map(|(at, v)| (*at, self.x(*at), y(*v))).collect();
        self.curve(&dots, (!axis.log).then_some(bottom));
        for at in &track.misses {
            if *at >= self.span.0 && *at <= self.span.1 {
                let x = self.x(*at);
                self.text((x, bottom - 1.0), 9.0, "middle", "l", "×");
            }
        }
        let mut told: Vec<&str> = Vec::new();
        for rule in &track.rules {
            let label = rule.label();
            let new = !told.contains(&label);
            if self.rule(rule, new, &y, (top, bottom)) {
                told.push(label);
            }
        }
    }

    /// Draws time, x and y as lines broken at gaps, with the area down to `floor` where there is one.
    fn curve(&mut self, dots: &[(f64, f64, f64)], floor: Option<f64>) {
        let gap = dots.windows(2).map(|w| w[1].0 - w[0].0).fold(f64::INFINITY, f64::min).max(0.5) * 3.5;
        for run in dots.chunk_by(|a, b| b.0 - a.0 <= gap) {
            let (Some(first), Some(last)) = (run.first(), run.last()) else { continue };
            if run.len() == 1 {
                self.add(format_args!(
                    "<circle class=\"s\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"1.8\" fill=\"{INK}\" stroke=\"none\"/>",
                    first.1, first.2
                ));
                continue;
            }
            let mut path = String::new();
            for (i, (_, x, y)) in run.iter().enumerate() {
                let _ = write!(path, "{}{x:.1} {y:.1}", if i == 0 { "M" } else { "L" });
            }
            if let Some(floor) = floor {
                self.add(format_args!(
                    "<path class=\"a\" d=\"{path}L{:.1} {floor:.1}L{:.1} {floor:.1}Z\" fill=\"{INK}\" \
                     fill-opacity=\"0.12\"/>",
                    last.1, first.1
                ));
            }
            self.add(format_args!(
                "<path class=\"s\" d=\"{path}\" fill=\"none\" stroke=\"{INK}\" stroke-width=\"1.6\" \
                 stroke-linejoin=\"round\"/>"
            ));
        }
    }

    /// Draws a limit, and its label where asked. Says whether it lies inside the plot.
    fn rule(
        &mut self,
        rule: &Rule,
        labelled: bool,
        y: &dyn Fn(f64) -> f64,
        (top, bottom): (f64, f64),
    ) -> bool {
        let (from, to) = match rule {
            Rule::Level { span, value, .. } => ((span.0, y(*value)), (span.1, y(*value))),
            Rule::Slope { span, start, per_second, .. } => {
                ((span.0, y(*start)), (span.1, y(start + per_second * (span.1 - span.0))))
            }
            Rule::By { at, .. } => ((*at, top), (*at, bottom)),
        };
        if to.0 < self.span.0 || from.0 > self.span.1 {
            return false;
        }
        let (x1, x2) = (self.x(from.0), self.x(to.0));
        self.add(format_args!(
            "<line class=\"l\" x1=\"{x1:.1}\" y1=\"{:.1}\" x2=\"{x2:.1}\" y2=\"{:.1}\" stroke=\"{ALARM}\" \
             stroke-width=\"1.4\" stroke-dasharray=\"5 3\"/>",
            from.1, to.1
        ));
        if !labelled {
            return true;
        }
        let label = rule.label();
        // Beside the line's end where there is room, before it otherwise.
        let after = x2 + 6.0 * label.chars().count() as f64 + 6.0 < self.width;
        let (x, anchor) = if after { (x2 + 3.0, "start") } else { (x2 - 3.0, "end") };
        let height = match rule {
            Rule::By { .. } => bottom,
            // Under the line where there is no room over it.
            _ if to.1 - top < 12.0 => to.1 + 10.0,
            _ => to.1 - 3.0,
        };
        self.text((x, height.min(bottom - 3.0)), 9.5, anchor, "l", label);
        true
    }

    fn finish(self, height: f64, label: &str) -> String {
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" role=\"img\" aria-label=\"{}\" viewBox=\"0 0 {} {height:.0}\" \
             width=\"100%\" font-family=\"system-ui, sans-serif\">\n{}</svg>",
            escape(label),
            self.width,
            self.body
        )
    }
}

/// The range of values of a plot.
struct Axis {
    low: f64,
    high: f64,
    /// Whether equal ratios are equally far apart.
    log: bool,
}

impl Axis {
    fn of(track: &Track, points: &[(f64, f64)], span: Span) -> Option<Self> {
        let mut values: Vec<f64> = points.iter().map(|(_, v)| *v).filter(|v| v.is_finite()).collect();
        if points.is_empty() {
            return None;
        }
        for rule in &track.rules {
            match rule {
                Rule::Level { span: at, value, .. } if at.1 >= span.0 && at.0 <= span.1 => {
                    values.push(value * 1.1);
                }
                Rule::Slope { span: at, start, per_second, .. } if at.1 >= span.0 && at.0 <= span.1 => {
                    values.push(start + per_second * (at.1 - at.0));
                }
                _ => {}
            }
        }
        let low = values.iter().copied().fold(f64::INFINITY, f64::min);
        let high = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        if track.unit == "seconds" && low > 0.0 && high > LOG_FROM * low {
            return Some(Self { low: 10f64.powf(low.log10().floor()), high: nice(high), log: true });
        }
        let from_zero = track.from_zero || low < 0.5 * high || values.is_empty();
        let low = if from_zero { low.min(0.0) } else { low - 0.1 * (high - low).max(1.0) };
        let high = if high > low { high } else { low + 1.0 };
        let scale = if track.unit == "bytes" {
            1024f64.powf((high.abs().max(1.0).log2() / 10.0).floor())
        } else {
            1.0
        };
        let high = if from_zero { nice(high / scale) * scale } else { high };
        Some(Self { low, high, log: false })
    }

    /// Height of a value as a share of the plot.
    fn share(&self, value: f64) -> f64 {
        let share = if self.log {
            (value / self.low).ln() / (self.high / self.low).ln()
        } else {
            (value - self.low) / (self.high - self.low)
        };
        share.clamp(0.0, 1.02)
    }

    /// Powers of ten between the ends, where the axis is logarithmic.
    fn decades(&self) -> impl Iterator<Item = f64> {
        let first = self.low.max(f64::MIN_POSITIVE).log10().round() as i32 + 1;
        let (high, log) = (self.high, self.log);
        (first..first + 12).map(|power| 10f64.powi(power)).take_while(move |v| log && *v < high * 0.999)
    }
}

/// The next round number at or above a positive value.
fn nice(value: f64) -> f64 {
    if value <= 0.0 {
        return 1.0;
    }
    let power = 10f64.powf(value.log10().floor());
    let steps = [1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0];
    steps.iter().map(|s| s * power).find(|v| *v >= value * 0.999_999).unwrap_or(10.0 * power)
}

/// A step of time that reads well, at least as long as asked.
fn step(least: f64) -> f64 {
    let steps = [1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 900.0, 1800.0];
    steps.into_iter().find(|s| *s >= least).unwrap_or_else(|| (least / 3600.0).ceil() * 3600.0)
}

/// Keeps the lowest and the highest point of each step, in order.
fn thin(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    if points.len() <= MOST_POINTS {
        return points.to_vec();
    }
    let extremes = |chunk: &[(f64, f64)]| {
        let low = chunk.iter().copied().min_by(|a, b| a.1.total_cmp(&b.1));
        let high = chunk.iter().copied().max_by(|a, b| a.1.total_cmp(&b.1));
        let mut both: Vec<_> = low.into_iter().chain(high).collect();
        both.sort_by(|a, b| a.0.total_cmp(&b.0));
        both.dedup();
        both
    };
    points.chunks(points.len().div_ceil(MOST_POINTS / 2)).flat_map(extremes).collect()
}

const WIDE: f64 = 1080.0;
const GUTTER: f64 = 92.0;

/// Rounds, injections by node, and marks over the whole run.
pub(crate) fn timeline(run: &Run, marks: &[Mark]) -> String {
    let mut canvas = Canvas::new(WIDE, GUTTER, 12.0, (0.0, run.now));
    let lanes = lanes(run);
    let rows: usize = lanes.values().map(Vec::len).sum();
    let bottom = 40.0 + rows as f64 * 20.0 + if marks.is_empty() { 4.0 } else { 24.0 };
    canvas.phases(&run.rounds, run.now, (20.0, bottom));
    for round in &run.rounds {
        let Some((from, _)) = round.span(Phase::Baseline, run.now) else { continue };
        let to = round.finished.unwrap_or(run.now);
        let (x1, x2) = (canvas.x(from), canvas.x(to));
        canvas.line((x1, 2.0), (x1, bottom), 0.3);
        let sign = round.verdict.map_or(super::RUNNING, super::verdict_sign).glyph;
        let name = fit(&format!("{sign} {}", round.outline.name), x2 - x1 - 6.0, 6.6);
        canvas.text((x1 + 4.0, 13.0), 12.0, "start", "b", &name);
        for (phase, label) in
            [(Phase::Baseline, "baseline"), (Phase::Fault, "fault"), (Phase::Recovery, "recovery")]
        {
            let Some((from, to)) = round.span(phase, run.now) else { continue };
            let (x1, x2) = (canvas.x(from), canvas.x(to));
            if fit(label, x2 - x1 - 4.0, 5.4) == label {
                canvas.text((x1 + 4.0, 31.0), 10.0, "start", "m", label);
            }
        }
    }
    let mut y = 40.0;
    for (node, rows) in &lanes {
        let label = fit(node, GUTTER - 8.0, 6.2);
        canvas.add(format_args!("<g><title>{}</title>", escape(node)));
        canvas.text((GUTTER - 5.0, y + 11.0), 10.5, "end", "b", &label);
        canvas.add(format_args!("</g>"));
        for row in rows {
            for injected in row {
                bar(&mut canvas, injected, run.now, y);
            }
            y += 20.0;
        }
    }
    if !marks.is_empty() {
        canvas.text((GUTTER - 5.0, y + 15.0), 10.5, "end", "b", "events");
        for mark in marks {
            let x = canvas.x(mark.at);
            let title = escape(&format!("{} {}: {}", figure::clock(mark.at), mark.on, mark.text));
            canvas.add(format_args!(
                "<g><title>{title}</title><text class=\"l\" x=\"{x:.1}\" y=\"{:.1}\" font-size=\"13\" \
                 text-anchor=\"middle\" font-weight=\"600\" fill=\"{ALARM}\">{}</text></g>",
                y + 16.0,
                mark.sign
            ));
        }
    }
    canvas.axis(bottom, None);
    canvas.finish(bottom + 20.0, "Rounds, phases and injections over the run")
}

/// A probe over the whole run.
pub(crate) fn track(run: &Run, track: &Track) -> String {
    let mut canvas = Canvas::new(WIDE, GUTTER, 12.0, (0.0, run.now));
    let (top, bottom) = (22.0, 86.0);
    canvas.phases(&run.rounds, run.now, (top, bottom));
    let room = WIDE - GUTTER - 7.4 * track.name.chars().count() as f64 - 24.0;
    let (name, about) = (escape(&track.name), escape(&fit(&track.about, room, 5.6)));
    canvas.add(format_args!(
        "<text x=\"{GUTTER}\" y=\"14\" font-size=\"12\" font-weight=\"600\" fill=\"currentColor\">{name}<tspan dx=\"8\" \
         font-size=\"10.5\" font-weight=\"400\" fill-opacity=\"0.7\">{about}</tspan></text>"
    ));
    canvas.plot(track, (top, bottom));
    canvas.finish(92.0, &format!("{} over the run", track.name))
}

/// What a gate judged, over its round.
pub(crate) fn gate(run: &Run, round: &Round, track: &Track, baseline: Option<f64>) -> Option<String> {
    let fault = round.span(Phase::Fault, run.now)?;
    let from = round.phases.get(&Phase::Baseline).copied().unwrap_or(fault.0);
    let mut canvas = Canvas::new(540.0, 58.0, 14.0, (from, round.finished.unwrap_or(run.now)));
    let (top, bottom) = (24.0, 150.0);
    canvas.phases(std::slice::from_ref(round), run.now, (top, bottom));
    for (phase, label) in
        [(Phase::Baseline, "baseline"), (Phase::Fault, "fault"), (Phase::Recovery, "recovery")]
    {
        if let Some((from, to)) = round.span(phase, run.now) {
            let (x1, x2) = (canvas.x(from), canvas.x(to));
            let label = fit(label, x2 - x1, 5.6);
            canvas.text((f64::midpoint(x1, x2), 14.0), 10.5, "middle", "m", &label);
        }
    }
    canvas.plot(track, (top, bottom));
    if let (Some(baseline), Some(axis)) = (baseline, Axis::of(track, track.inside(canvas.span), canvas.span))
        && track.from_zero
    {
        let y = bottom - axis.share(baseline) * (bottom - top);
        let (x1, x2) = (canvas.left, canvas.width - canvas.right);
        canvas.add(format_args!(
            "<line x1=\"{x1:.1}\" y1=\"{y:.1}\" x2=\"{x2:.1}\" y2=\"{y:.1}\" stroke=\"currentColor\" \
             stroke-opacity=\"0.55\" stroke-dasharray=\"1 3\"/>"
        ));
    }
    canvas.axis(bottom, Some(fault.0));
    Some(canvas.finish(172.0, &format!("{} in round {}", track.name, round.outline.name)))
}

/// The latency of each phase from the median to the tail. `limits` are percentiles with their limits in seconds.
pub(crate) fn spectrum(
    name: &str,
    phases: &[(Phase, &str, LoadSummary)],
    limits: &[(f64, f64)],
) -> Option<String> {
    let curves: Vec<_> = phases.iter().map(|(phase, label, sum)| (*phase, *label, sum.spectrum())).collect();
    let points = || curves.iter().flat_map(|(.., points)| points);
    let last = points().map(|(x, _)| *x).reduce(f64::max)?;
    let marks: Vec<_> = limits.iter().map(|(q, limit)| (-(1.0 - q).log10(), *q, *limit)).collect();
    let all = || points().map(|(_, v)| *v).chain(marks.iter().map(|(.., limit)| *limit)).filter(|v| *v > 0.0);
    let (low, high) = (all().reduce(f64::min)?, all().reduce(f64::max)?);
    let axis = Axis { low: 10f64.powf(low.log10().floor()), high: nice(high), log: true };
    let last = marks.iter().map(|(x, ..)| *x).fold(last, f64::max).max(1.0);
    let mut canvas = Canvas::new(540.0, 58.0, 14.0, (0.0, last));
    let (top, bottom) = (26.0, 190.0);
    let y = |value: f64| bottom - axis.share(value) * (bottom - top);
    let edge = canvas.width - canvas.right;
    for value in [axis.low].into_iter().chain(axis.decades()).chain([axis.high]) {
        canvas.line((canvas.left, y(value)), (edge, y(value)), 0.14);
        if (value - axis.high).abs() < f64::EPSILON || y(value) - top > 12.0 {
            canvas.text((canvas.left - 5.0, y(value) + 3.5), 10.0, "end", "m", &figure::seconds(value));
        }
    }
    for q in [0.0, 0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999] {
        let at = -(1.0f64 - q).log10();
        if at <= last {
            let x = canvas.x(at);
            canvas.line((x, bottom), (x, bottom + 4.0), 0.35);
            let label = if q > 0.0 { figure::percentile(q) } else { "fastest".into() };
            canvas.text((x, bottom + 15.0), 10.0, "middle", "m", &label);
        }
    }
    for (i, (phase, label, points)) in curves.iter().enumerate() {
        let (colour, class, dash, width) = match phase {
            Phase::Baseline => ("currentColor", "", "1 3", 1.6),
            Phase::Fault => (ALARM, "bad", "none", 2.0),
            Phase::Recovery => (INK, "ink", "6 3", 1.6),
        };
        let stroke = format!(
            "class=\"c {class}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"{width}\" stroke-dasharray=\"{dash}\""
        );
        let x = canvas.left + 4.0 + i as f64 * 110.0;
        canvas.add(format_args!("<path {stroke} d=\"M{x:.1} 10L{:.1} 10\"/>", x + 26.0));
        canvas.text((x + 32.0, 14.0), 10.5, "start", "m", label);
        let mut path = String::new();
        for (i, (at, value)) in points.iter().enumerate() {
            let _ = write!(path, "{}{:.1} {:.1}", if i == 0 { "M" } else { "L" }, canvas.x(*at), y(*value));
        }
        if !path.is_empty() {
            canvas.add(format_args!("<path {stroke} d=\"{path}\"/>"));
        }
    }
    for (at, q, limit) in marks {
        let (x, y) = (canvas.x(at), y(limit));
        canvas.add(format_args!(
            "<path class=\"l\" d=\"M{:.1} {y:.1}L{:.1} {y:.1}\" fill=\"none\" stroke=\"{ALARM}\" stroke-width=\"3\"/>",
            x - 9.0,
            x + 9.0
        ));
        let label = format!("{} limit {}", figure::percentile(q), figure::seconds(limit));
        canvas.text((x - 13.0, y + 3.5), 9.5, "end", "l", &label);
    }
    Some(canvas.finish(208.0, &format!("Latency of {name} from the fastest request to the slowest")))
}

/// Where the interval of a finding lies against its limit.
pub(crate) fn interval(finding: &Finding) -> Option<String> {
    let value = finding.value.filter(|v| v.is_finite())?;
    let finite = |v: Option<f64>| v.filter(|v| v.is_finite());
    let (low, high) = finding.interval.map_or((Some(value), Some(value)), |(l, h)| (finite(l), finite(h)));
    let known = [Some(0.0), Some(finding.limit), Some(value), low, high];
    let least = known.iter().flatten().copied().fold(f64::INFINITY, f64::min);
    let most = known.iter().flatten().copied().fold(f64::NEG_INFINITY, f64::max);
    let room = (most - least).max(f64::EPSILON) * 1.08;
    let x = |v: f64| 3.0 + (v - least) / room * 114.0;
    let (from, to) = (low.map_or(1.0, x), high.map_or(119.0, x));
    let (colour, class) = match finding.outcome {
        Outcome::Pass => (GOOD, "good"),
        Outcome::Fail => (ALARM, "bad"),
        Outcome::Inconclusive => (DOUBT, "doubt"),
    };
    let label = escape(&format!(
        "{} against a limit of {}",
        figure::found(finding),
        figure::limit(finding.limit, &finding.unit)
    ));
    let (limit, value, width) = (x(finding.limit), x(value), (to - from).max(1.5));
    Some(format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" role=\"img\" aria-label=\"{label}\" viewBox=\"0 0 122 16\" \
         width=\"122\" height=\"16\">\
         <line x1=\"1\" y1=\"8\" x2=\"120\" y2=\"8\" stroke=\"currentColor\" stroke-opacity=\"0.2\"/>\
         <rect class=\"{class}\" x=\"{from:.1}\" y=\"5\" width=\"{width:.1}\" height=\"6\" rx=\"2\" fill=\"{colour}\" \
         fill-opacity=\"0.45\"/>\
         <circle class=\"{class}\" cx=\"{value:.1}\" cy=\"8\" r=\"3.2\" fill=\"{colour}\"/>\
         <line class=\"l\" x1=\"{limit:.1}\" y1=\"1\" x2=\"{limit:.1}\" y2=\"15\" stroke=\"{ALARM}\" \
         stroke-width=\"1.6\" stroke-dasharray=\"3 2\"/></svg>"
    ))
}

/// Injections by node, in rows so that none covers another.
fn lanes(run: &Run) -> BTreeMap<&str, Vec<Vec<&Injected>>> {
    let mut lanes: BTreeMap<&str, Vec<Vec<&Injected>>> = BTreeMap::new();
    for injected in &run.injections {
        let rows = lanes.entry(&injected.injection.node).or_default();
        let free = |row: &Vec<&Injected>| row.last().is_none_or(|last| end(last, run.now) <= injected.at);
        if let Some(row) = rows.iter().position(free) {
            rows[row].push(injected);
        } else {
            rows.push(vec![injected]);
        }
    }
    lanes
}

/// When an injection ended, or where its bar does.
fn end(injected: &Injected, now: f64) -> f64 {
    injected.reverted.as_ref().map_or(now, |(at, ..)| *at)
}

fn bar(canvas: &mut Canvas, injected: &Injected, now: f64, y: f64) {
    let injection = &injected.injection;
    let (x1, x2) = (canvas.x(injected.at), canvas.x(end(injected, now)));
    let width = (x2 - x1).max(2.0);
    let state = super::state(injected);
    let title = escape(&format!(
        "{} on {} ({}): {}, {}",
        injection.kind, injection.target, injection.node, injection.summary, state.word
    ));
    let (text, class, paint) = if injected.bit && injected.stuck.is_none() {
        (injection.kind.clone(), "w", format!("class=\"bar\" fill=\"{ALARM}\""))
    } else {
        let text = format!("{} {} {}", state.glyph, injection.kind, state.word);
        (text, "b", format!("fill=\"none\" stroke=\"{DOUBT}\" stroke-width=\"1.4\" stroke-dasharray=\"4 2\""))
    };
    let text = fit(&text, width - 6.0, 5.8);
    canvas.add(format_args!("<g><title>{title}</title>"));
    canvas.add(format_args!(
        "<rect {paint} x=\"{x1:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"15\" rx=\"3\"/>"
    ));
    canvas.text((x1 + 4.0, y + 11.0), 10.0, "start", class, &text);
    canvas.add(format_args!("</g>"));
}

/// Cuts a text to the room there is, with an average width of its letters.
fn fit(text: &str, room: f64, letter: f64) -> String {
    let most = (room / letter).max(0.0) as usize;
    if text.chars().count() <= most {
        return text.into();
    }
    if most < 3 {
        return String::new();
    }
    let mut cut: String = text.chars().take(most - 1).collect();
    cut.push('…');
    cut
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_end_on_round_numbers() {
        assert!((nice(612.0) - 800.0).abs() < 1e-9);
        assert!((nice(0.00131) - 0.0015).abs() < 1e-9);
        assert!((nice(1.0) - 1.0).abs() < 1e-9);
        assert!((step(13.0) - 15.0).abs() < 1e-9);
        assert!((step(4000.0) - 7200.0).abs() < 1e-9);
    }

    #[test]
    fn thinning_keeps_the_spike() {
        let mut points: Vec<(f64, f64)> = (0..20_000).map(|i| (f64::from(i), 1.0)).collect();
        points[7_123].1 = 99.0;
        let thin = thin(&points);
        assert!(thin.len() <= MOST_POINTS + 2);
        assert!(thin.contains(&(7_123.0, 99.0)));
        assert!(thin.is_sorted_by(|a, b| a.0 <= b.0));
    }

    #[test]
    fn text_is_escaped_and_cut() {
        assert_eq!(escape("<img onerror=\"x\">\u{1b}[1m"), "&lt;img onerror=&quot;x&quot;&gt;\u{fffd}[1m");
        assert_eq!(fit("recovery", 30.0, 5.0), "recov…");
        assert_eq!(fit("recovery", 8.0, 5.0), "");
    }
}
