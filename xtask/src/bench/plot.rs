//! Plots of the network bench, as SVG.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use super::network::Results;

/// The files, and what they show.
pub(super) const FILES: [(&str, &str); 3] = [
    ("network-delay.svg", "What a delay is too long by"),
    ("network-throughput.svg", "TCP throughput under delay, ours against netem's"),
    ("network-jitter.svg", "Delays under jitter, ours and netem's"),
];

const COLOURS: [RGBColor; 6] = [
    RGBColor(31, 119, 180),
    RGBColor(255, 127, 14),
    RGBColor(44, 160, 44),
    RGBColor(214, 39, 40),
    RGBColor(148, 103, 189),
    RGBColor(140, 86, 75),
];

type Points = Vec<(f64, f64)>;

/// Draws what there are points for.
pub(super) fn all(dir: &Path, results: &[Results]) -> Result<()> {
    let paths = FILES.map(|(file, _)| dir.join(file));
    delay(&paths[0], results)?;
    throughput(&paths[1], results)?;
    jitter(&paths[2], results)
}

impl Results {
    /// The lines of a plot by name: all points of that name.
    fn lines(&self, plot: &str) -> BTreeMap<String, Points> {
        let mut lines: BTreeMap<String, Points> = BTreeMap::new();
        for series in self.series.iter().filter(|series| series["plot"] == plot) {
            let points = serde_json::from_value::<Points>(series["points"].clone());
            let name = series["name"].as_str().unwrap_or_default();
            lines.entry(name.to_owned()).or_default().extend(points.unwrap_or_default());
        }
        lines
    }
}

/// One line for each kernel and side: asked for, on a logarithmic axis, and what was too much.
fn delay(path: &Path, results: &[Results]) -> Result<()> {
    let mut lines = Vec::new();
    for results in results {
        for (name, points) in results.lines("delay-error") {
            lines.push((format!("{} {name}", results.name), points));
        }
    }
    let points = || lines.iter().flat_map(|(_, points)| points);
    if points().next().is_none() {
        return Ok(());
    }
    let most = points().map(|point| point.1).fold(0.2, f64::max) * 1.1;
    let least = points().map(|point| point.1).fold(0.0, f64::min);
    let root = SVGBackend::new(path, (900, 420)).into_drawing_area();
    root.fill(&WHITE).map_err(wrong)?;
    let mut chart = ChartBuilder::on(&root)
        .caption("Median one-way delay: measured less asked for", ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(60)
        .build_cartesian_2d((0.8..1300.0).log_scale(), least..most)
        .map_err(wrong)?;
    let mut mesh = chart.configure_mesh();
    mesh.x_desc("delay asked for, ms").y_desc("too long by, ms").draw().map_err(wrong)?;
    for (i, (name, points)) in lines.iter().enumerate() {
        let colour = COLOURS[i % COLOURS.len()];
        let points: Points = points.iter().copied().filter(|point| point.0 > 0.0).collect();
        chart
            .draw_series(LineSeries::new(points.clone(), colour.stroke_width(2)))
            .map_err(wrong)?
            .label(name.clone())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(2)));
        chart
            .draw_series(points.iter().map(|point| Circle::new(*point, 3, colour.filled())))
            .map_err(wrong)?;
    }
    chart
        .configure_series_labels()
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .position(SeriesLabelPosition::UpperLeft)
        .draw()
        .map_err(wrong)?;
    root.present().map_err(wrong)
}

/// Bars: for each kernel, flows and delay, our throughput as a share of netem's.
fn throughput(path: &Path, results: &[Results]) -> Result<()> {
    let mut bars = Vec::new();
    for results in results {
        let lines = results.lines("throughput");
        let Some((ours, theirs)) = lines.get("ours").zip(lines.get("netem")) else { continue };
        for (ours, theirs) in ours.iter().zip(theirs) {
            // See benches/network.rs: 1000 × flows + milliseconds.
            let (flows, ms) = ((ours.0 / 1000.0).floor(), ours.0 % 1000.0);
            bars.push((format!("{}: {flows} × {ms} ms", results.name), ours.1 / theirs.1));
        }
    }
    if bars.is_empty() {
        return Ok(());
    }
    let most = bars.iter().map(|bar| bar.1).fold(1.2, f64::max) * 1.1;
    let height = 90 + 22 * bars.len() as u32;
    let root = SVGBackend::new(path, (900, height)).into_drawing_area();
    root.fill(&WHITE).map_err(wrong)?;
    let mut chart = ChartBuilder::on(&root)
        .caption("TCP throughput under delay, as a share of netem's (flows × delay)", ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(30)
        .y_label_area_size(130)
        .build_cartesian_2d(0.0..most, (0..bars.len() - 1).into_segmented())
        .map_err(wrong)?;
    let label = |at: &SegmentValue<usize>| match at {
        SegmentValue::CenterOf(i) => bars.get(*i).map(|bar| bar.0.clone()).unwrap_or_default(),
        _ => String::new(),
    };
    let mut mesh = chart.configure_mesh();
    mesh.disable_y_mesh().y_labels(bars.len()).y_label_formatter(&label).draw().map_err(wrong)?;
    let bar = |(i, bar): (usize, &(String, f64))| {
        let corners = [(0.0, SegmentValue::Exact(i)), (bar.1, SegmentValue::Exact(i + 1))];
        let mut bar = Rectangle::new(corners, COLOURS[0].mix(0.8).filled());
        bar.set_margin(3, 3, 0, 0);
        bar
    };
    chart.draw_series(bars.iter().enumerate().map(bar)).map_err(wrong)?;
    let one = [(1.0, SegmentValue::Exact(0)), (1.0, SegmentValue::Exact(bars.len()))];
    chart.draw_series([PathElement::new(one, COLOURS[3].stroke_width(2))]).map_err(wrong)?;
    root.present().map_err(wrong)
}

/// The distributions of delays, of the newest kernel that has them, one picture each.
fn jitter(path: &Path, results: &[Results]) -> Result<()> {
    const NAMES: [&str; 4] = ["uniform", "normal", "pareto", "paretonormal"];
    let of = |results: &Results| NAMES.map(|name| results.lines(&format!("jitter-{name}")));
    let complete = |lines: &[BTreeMap<String, Points>; 4]| lines.iter().all(|lines| lines.len() == 2);
    let Some((kernel, all)) =
        results.iter().rev().map(|results| (&results.name, of(results))).find(|(_, lines)| complete(lines))
    else {
        return Ok(());
    };
    let root = SVGBackend::new(path, (900, 640)).into_drawing_area();
    root.fill(&WHITE).map_err(wrong)?;
    let title = format!("Jitter: 100 ms ± 20 ms, kernel {kernel}, share of packets that took no longer");
    let below = root.titled(&title, ("sans-serif", 18)).map_err(wrong)?;
    for ((area, name), lines) in below.split_evenly((2, 2)).iter().zip(NAMES).zip(&all) {
        let ends = || lines.values().flatten().map(|point| point.0);
        let (least, most) = (ends().fold(f64::INFINITY, f64::min), ends().fold(0.0, f64::max));
        let mut chart = ChartBuilder::on(area)
            .caption(name, ("sans-serif", 15))
            .margin(10)
            .x_label_area_size(28)
            .y_label_area_size(34)
            .build_cartesian_2d(least..most, 0.0..1.0)
            .map_err(wrong)?;
        chart.configure_mesh().x_desc("ms").draw().map_err(wrong)?;
        // Ours above, and thinner: where they agree both are seen.
        for (side, colour, width) in [("netem", COLOURS[1], 5), ("ours", COLOURS[0], 2)] {
            let points = lines.get(side).cloned().unwrap_or_default();
            chart
                .draw_series(LineSeries::new(points, colour.stroke_width(width)))
                .map_err(wrong)?
                .label(side)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(width)));
        }
        chart
            .configure_series_labels()
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK.mix(0.3))
            .position(SeriesLabelPosition::LowerRight)
            .draw()
            .map_err(wrong)?;
    }
    root.present().map_err(wrong)
}

/// The library's errors hold what cannot leave this thread.
fn wrong(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("cannot draw: {error}")
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::json;

    use super::*;

    #[test]
    fn what_was_measured_is_drawn() -> Result<()> {
        let mut results = Results::new("6.1");
        let mut add = |plot: &str, name: &str, points: &[(f64, f64)]| {
            results.series.push(json!({"plot": plot, "name": name, "points": points}));
        };
        for side in ["ours", "netem"] {
            add("delay-error", side, &[(1.0, 0.1)]);
            add("delay-error", side, &[(10.0, 0.12)]);
            add("throughput", side, &[(1010.0, 200.0)]);
            add("throughput", side, &[(16_100.0, 400.0)]);
            for name in ["uniform", "normal", "pareto", "paretonormal"] {
                add(&format!("jitter-{name}"), side, &[(32.0, 0.0), (40.0, 0.5), (48.0, 1.0)]);
            }
        }
        let dir = tempfile::tempdir()?;
        all(dir.path(), &[results])?;
        for ((file, _), words) in FILES.iter().zip([["6.1 ours"], ["6.1: 16 × 100 ms"], ["paretonormal"]]) {
            let svg = fs::read_to_string(dir.path().join(file))?;
            for word in words {
                assert!(svg.contains(word), "{file}: {svg}");
            }
        }
        Ok(())
    }
}
