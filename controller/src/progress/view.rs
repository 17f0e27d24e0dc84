//! The live view: a pure function from a run to lines.

use super::plain::{length, phase, phase_name};
use crate::{
    event::{Figure, Phase, Verdict},
    fold::{Injected, Round, Run},
    report::{Paint, Sign, Tally, figure, outcome_sign, series, state, verdict_sign},
};

/// Seconds after which an injection that touched nothing is called idle.
const PATIENCE: f64 = 3.0;
const PHASES: [Phase; 3] = [Phase::Baseline, Phase::Fault, Phase::Recovery];
const BLOCKS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// A line of pieces, each with a tone.
#[derive(Debug, Default)]
pub(super) struct Line(Vec<(&'static str, String)>);

impl Line {
    fn of(tone: &'static str, text: impl Into<String>) -> Self {
        Self::default().and(tone, text)
    }

    fn and(mut self, tone: &'static str, text: impl Into<String>) -> Self {
        self.0.push((tone, text.into()));
        self
    }

    /// Characters, each of which takes one column: names are expected to be of that kind.
    fn width(&self) -> usize {
        self.0.iter().map(|(_, text)| text.chars().count()).sum()
    }

    /// Fills up with blanks, so that what follows starts at a column.
    fn to(self, column: usize) -> Self {
        let gap = column.saturating_sub(self.width());
        if gap > 0 { self.and("", " ".repeat(gap)) } else { self }
    }

    /// Cut to a width.
    pub(super) fn render(&self, width: usize, paint: Paint) -> String {
        let mut room = if self.width() > width { width - 1 } else { width };
        let mut out = String::new();
        for (tone, text) in &self.0 {
            let safe = text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c });
            let cut: String = safe.take(room).collect();
            room -= cut.chars().count();
            out.push_str(&match *tone {
                "" => cut,
                "dim" => paint.dim(&cut),
                "bold" => paint.strong("", &cut),
                tone => paint.tone(tone, &cut),
            });
        }
        if self.width() > width {
            out.push('…');
        }
        out
    }
}

/// The view of a run at a time, for a terminal of so many columns.
pub(super) fn lines(run: &Run, now: f64, width: usize) -> Vec<Line> {
    let mut lines = vec![header(run, now, width)];
    let done: Vec<_> = run.rounds.iter().filter(|r| r.finished.is_some()).collect();
    if !done.is_empty() {
        lines.extend(wrapped("DONE     ", done.iter().map(|r| finished(r)), width));
    }
    let current = run.rounds.iter().rposition(|r| !r.phases.is_empty() && r.finished.is_none());
    if let Some((index, round)) = current.and_then(|i| Some((i, run.rounds.get(i)?))) {
        lines.push(
            Line::of("dim", format!("round {}/{} ", index + 1, run.rounds.len()))
                .and("bold", &round.outline.name),
        );
        lines.push(bar(round, now, width));
        lines.extend(injected(run, index, now));
        lines.extend(probes(run, round, now, width));
        lines.extend(gates(round, width));
    }
    let live = run.injections.iter().filter(|i| i.reverted.is_none()).count();
    let revert = if live > 0 { format!(" and revert ({live} active)") } else { String::new() };
    lines.push(Line::of("dim", format!("[Ctrl-C] stop{revert}")));
    lines
}

fn header(run: &Run, now: f64, width: usize) -> Line {
    let mut line = Line::of("bold", "squall  ").and("bold", &run.plan);
    if let Some(version) = &run.version {
        line = line.and("", format!("  {version}"));
    }
    line = line.and("dim", format!("   run {}", run.id));
    let clock = format!("{} / ~{}", figure::clock(now), figure::clock(expected(run, now)));
    let column = width.saturating_sub(clock.chars().count()).max(line.width() + 2);
    line.to(column).and("", clock)
}

/// When the run will be over, if every phase takes as long as it may.
fn expected(run: &Run, now: f64) -> f64 {
    let rest = |round: &Round| {
        if round.finished.is_some() {
            return 0.0;
        }
        let gone = round.phases.iter().next_back().map_or(0.0, |(_, start)| now - start);
        let reached = round.phases.keys().next_back();
        let left = PHASES.iter().filter(|p| reached.is_none_or(|r| *p >= r));
        (left.map(|p| length(round, *p)).sum::<f64>() - gone).max(0.0)
    };
    now + run.rounds.iter().map(rest).sum::<f64>()
}

fn finished(round: &Round) -> (&'static str, String) {
    let sign = verdict_sign(round.verdict.unwrap_or(Verdict::Inconclusive));
    let tally = Tally::of_round(round);
    (sign.tone, format!("{} {} {}/{}", sign.glyph, round.outline.name, tally.passed, tally.gates))
}

/// The phases as bars, each as full as it has gone.
fn bar(round: &Round, now: f64, width: usize) -> Line {
    let cells = (width.saturating_sub(54) / 3).clamp(6, 24);
    let mut line = Line::of("", " ");
    for phase in PHASES {
        let span = round.span(phase, now);
        let over = phase < round.phases.keys().next_back().copied().unwrap_or(Phase::Baseline);
        let share = match span {
            Some(_) if over => 1.0,
            Some((from, _)) => ((now - from) / length(round, phase).max(0.001)).clamp(0.0, 1.0),
            None => 0.0,
        };
        let tone = if phase == Phase::Fault { "bad" } else { "good" };
        let full = (share * cells as f64).floor() as usize;
        let half = usize::from(full < cells && share * cells as f64 - full as f64 >= 0.5);
        let label = if span.is_some() && !over { "bold" } else { "dim" };
        line = line
            .and(label, format!("{} ", phase_name(phase)))
            .and(tone, format!("{}{}", "█".repeat(full), "▌".repeat(half)))
            .and("dim", "·".repeat(cells - full - half));
        if phase != Phase::Recovery {
            line = line.and("dim", if over { " ok │ " } else { "    │ " });
        }
    }
    match phase(round, now) {
        Some((_, left)) => line.and("dim", format!("  {} left", figure::span(left.ceil()))),
        None => line,
    }
}

fn injected(run: &Run, round: usize, now: f64) -> Vec<Line> {
    let mut lines = Vec::new();
    let mut told: Vec<(&str, &str)> = Vec::new();
    let of_round = || run.injections.iter().filter(|i| i.round == Some(round));
    for first in of_round() {
        let what = (first.injection.kind.as_str(), first.injection.summary.as_str());
        if told.contains(&what) {
            continue;
        }
        told.push(what);
        let head = if lines.is_empty() { "INJECTED " } else { "         " };
        lines.push(Line::of("bold", head).and("", format!("{} ", what.0)).and("", what.1));
        let same = of_round().filter(|i| (i.injection.kind.as_str(), i.injection.summary.as_str()) == what);
        lines.extend(same.map(|i| effect(i, now)));
    }
    if lines.is_empty()
        && let Some(round) = run.rounds.get(round)
        && !round.outline.faults.is_empty()
    {
        let faults = round.outline.faults.join("; ");
        lines.push(Line::of("bold", "NEXT     ").and("dim", faults));
    }
    lines
}

/// The sign and the word of an injection while the run goes on.
fn live_state(injected: &Injected, now: f64) -> Sign {
    let sign = state(injected);
    match (injected.stuck.is_some(), injected.reverted.is_some(), injected.bit) {
        (true, _, _) => sign,
        (_, true, true) => Sign { glyph: "✔", word: "reverted", tone: "good" },
        (_, true, false) => Sign { glyph: "?", word: "reverted, was IDLE", tone: "doubt" },
        (_, _, true) => Sign { glyph: "●", word: "biting", tone: "bad" },
        (_, _, false) if now - injected.at < PATIENCE => Sign { glyph: "◷", word: "armed", tone: "plain" },
        _ => Sign { glyph: "!", word: "IDLE", tone: "doubt" },
    }
}

fn effect(injected: &Injected, now: f64) -> Line {
    let injection = &injected.injection;
    let sign = live_state(injected, now);
    let line = Line::of("", format!("  {} {}", injection.node, injection.resolved)).to(34).and("", "  ");
    let line = line.and(sign.tone, format!("{} {}", sign.glyph, sign.word)).to(46).and("", "  ");
    let mut parts = Vec::new();
    match (&injected.stuck, &injected.reverted) {
        (Some(why), _) => parts.push(why.clone()),
        (None, Some((_, took, _))) => parts.push(format!("in {}", figure::seconds(*took))),
        (None, None) => {
            if sign.word == "IDLE" {
                parts.push(format!("touched nothing for {}", figure::span((now - injected.at).floor())));
            }
            parts.push(format!("ends in {}", figure::span((injection.ends - now).max(0.0).ceil())));
        }
    }
    parts.extend(figure::effects_as(&injected.figures, brief));
    line.and("", parts.join(" · "))
}

/// A measure in few letters: `1 204 dropped`.
fn brief(figure: &Figure) -> String {
    match figure.unit.as_str() {
        "packets" => format!("{} {}", figure::count(figure.value), figure.name.replace('_', " ")),
        _ => figure::effect(figure),
    }
}

/// Room of the columns of the probes: name, baseline, now, limit.
const COLUMNS: [usize; 4] = [22, 11, 11, 11];

fn probes(run: &Run, round: &Round, now: f64, width: usize) -> Vec<Line> {
    let Some(start) = round.phases.values().next() else { return Vec::new() };
    let baseline = round.span(Phase::Baseline, now);
    let cells = width.saturating_sub(COLUMNS.iter().sum::<usize>() + 30).clamp(8, 40);
    let right = |text: &str, column: usize| format!("{text:>width$}", width = COLUMNS[column]);
    let mut lines = Vec::new();
    for track in series::probes(run, *start) {
        let show = |value: f64| figure::limit(value, &track.unit);
        let before =
            baseline.and_then(|span| track.summary(span)).map_or("–".into(), |(_, mean, _)| show(mean));
        let last = track.points.last();
        let missed = track.misses.last().is_some_and(|at| last.is_none_or(|(seen, _)| at > seen));
        let value = match last {
            _ if missed => "no sample".into(),
            Some((_, value)) => show(*value),
            None => "–".into(),
        };
        let limit = limit(round, &track);
        let past = matches!((&limit, last), (Some((at, _)), Some((_, value))) if value > at);
        let tone = if past || missed { "bad" } else { "" };
        let sign = if missed || past { " !" } else { "  " };
        let name: String = track.name.chars().take(COLUMNS[0] - 3).collect();
        let line = Line::of("", format!("  {name}")).to(COLUMNS[0]);
        let line = line.and("dim", right(&before, 1)).and(tone, format!("{}{sign}", right(&value, 2)));
        let text = limit.map_or("–".into(), |(_, text)| text);
        let line = line.and("dim", right(&text, 3)).and("", "  ");
        lines.push(line.and("ink", spark(&track, cells)).and("dim", schedule(run, &track.name)));
    }
    if lines.is_empty() {
        return lines;
    }
    let head = Line::of("bold", format!("{:width$}", "PROBES", width = COLUMNS[0]))
        .and("dim", format!("{}{}  {}", right("baseline", 1), right("now", 2), right("limit", 3)));
    lines.insert(0, head);
    lines
}

/// The limit of the round for a curve, as a level of its values where it is one, and in words.
fn limit(round: &Round, track: &series::Track) -> Option<(f64, String)> {
    let errors = |source: &str| track.name == format!("{source} errors");
    round.outline.gates.iter().find_map(|gate| match gate.gate.as_str() {
        "latency" if gate.subject == track.name => Some((gate.limit, figure::limit(gate.limit, &gate.unit))),
        "errors" if errors(&gate.source) => Some((gate.limit, figure::limit(gate.limit, &gate.unit))),
        "leak" if gate.source == track.name => {
            Some((f64::INFINITY, format!("+{}", figure::limit(gate.limit, &gate.unit))))
        }
        _ => None,
    })
}

/// The last values as bars, from zero to the highest.
fn spark(track: &series::Track, cells: usize) -> String {
    let recent = &track.points[track.points.len().saturating_sub(cells)..];
    let finite = || recent.iter().map(|(_, v)| *v).filter(|v| v.is_finite());
    let high = finite().fold(0.0, f64::max);
    let low = if track.from_zero { 0.0 } else { finite().fold(f64::INFINITY, f64::min).min(high) };
    let level = |value: f64| {
        let share = if high > low { (value - low) / (high - low) } else { 0.0 };
        BLOCKS[(share.clamp(0.0, 1.0) * 7.0).round() as usize]
    };
    recent.iter().map(|(_, value)| level(*value)).collect()
}

/// Whether a load probe keeps to its rate, told beside its first curve.
fn schedule(run: &Run, curve: &str) -> String {
    let mut probes = run.probes.iter().filter(|(_, probe)| probe.outline.kind == "load");
    let bins = probes.find_map(|(name, probe)| {
        let latency = curve.strip_prefix(name.as_str()).is_some_and(|rest| rest.starts_with(" p"));
        (latency && !probe.bins.is_empty()).then(|| &probe.bins[probe.bins.len().saturating_sub(10)..])
    });
    let Some(bins) = bins else { return String::new() };
    let sum = series::LoadSummary::of(bins);
    let rate = figure::count(sum.due as f64 / bins.len() as f64);
    match (sum.late, sum.dropped) {
        (0, 0) => format!("  {rate}/s on schedule"),
        (late, dropped) => format!("  {rate}/s ! {late} late, {dropped} dropped"),
    }
}

fn gates(round: &Round, width: usize) -> Vec<Line> {
    let words = round.outline.gates.iter().map(|gate| {
        let finding = round.findings.iter().find(|f| f.gate == gate.gate && f.subject == gate.subject);
        let sign =
            finding.map_or(Sign { glyph: "◷", word: "wait", tone: "dim" }, |f| outcome_sign(f.outcome));
        (sign.tone, format!("{} {} {} {}", sign.glyph, sign.word, gate.gate, gate.subject))
    });
    wrapped("GATES    ", words, width)
}

/// Items after a heading, on as many lines as they need.
fn wrapped(head: &str, items: impl Iterator<Item = (&'static str, String)>, width: usize) -> Vec<Line> {
    let indent = head.chars().count();
    let mut lines = vec![Line::of("bold", head)];
    for (tone, text) in items {
        let room = width.saturating_sub(text.chars().count() + 3);
        if lines.last().is_some_and(|line| line.width() > room && line.width() > indent) {
            lines.push(Line::of("", " ".repeat(indent)));
        }
        let line = lines.pop().unwrap_or_default();
        lines.push(line.and(tone, text).and("", "   "));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::sample;

    fn drawn(run: &Run, width: usize) -> String {
        let paint = Paint { colour: false };
        let lines = lines(run, run.now, width);
        lines.iter().map(|line| line.render(width, paint).trim_end().to_owned() + "\n").collect()
    }

    #[test]
    fn during_a_fault() {
        insta::assert_snapshot!(drawn(&sample::cut(), 100));
    }

    #[test]
    fn no_line_is_wider_than_the_terminal() {
        for width in [40, 80, 120, 200] {
            for end in [0.05, 5.0, 14.0, 75.0, 150.0, 300.0] {
                let run = Run::of(sample::events().iter().take_while(|e| e.at < end));
                for line in drawn(&run, width).lines() {
                    assert!(line.chars().count() <= width, "{line}");
                }
            }
        }
    }

    #[test]
    fn what_touches_nothing_is_called_idle() {
        let mut run = sample::cut();
        let last = run.injections.last_mut().expect("an injection");
        (last.bit, last.figures) = (false, Vec::new());
        let view = drawn(&run, 120);
        assert!(view.contains("! IDLE"), "{view}");
        assert!(view.contains("touched nothing for 18s"), "{view}");
        let at = run.injections.last().expect("an injection").at;
        let early = lines(&run, at + 1.0, 120);
        let early: String = early.iter().map(|l| l.render(120, Paint { colour: false })).collect();
        assert!(early.contains("◷ armed") && !early.contains("IDLE"), "{early}");
    }

    #[test]
    fn control_characters_in_names_do_not_reach_the_terminal() {
        let mut run = sample::cut();
        run.plan = "evil\x1b[2Jplan".into();
        assert!(!drawn(&run, 100).contains('\x1b'));
    }
}
