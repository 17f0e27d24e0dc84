//! What a person sees while a run goes on: a live view on a terminal, lines otherwise.

mod plain;
mod view;

use std::{
    io::{self, IsTerminal as _, Write},
    time::Instant,
};

use crate::{
    cli::ProgressMode,
    event::{Event, What},
    fold::Run,
    progress::plain::Plain,
    report::Paint,
};

/// A terminal narrower than this gets lines that are cut, not wrapped.
const DEFAULT_SIZE: (usize, usize) = (80, 24);

/// Shows a run on stderr while it goes on.
///
/// The live view never hides the cursor and never switches screens, so there is nothing to restore on any exit.
pub(crate) struct Progress {
    out: Box<dyn Write + Send>,
    shape: Shape,
    /// Last event, by this process's clock and by the run's.
    last: Option<(Instant, f64)>,
}

enum Shape {
    Live { paint: Paint, drawn: usize, size: fn() -> (usize, usize) },
    Plain(Plain),
    Json,
    None,
}

impl Progress {
    /// Chooses the shape: live only where stderr is a terminal that can move its cursor.
    pub(crate) fn new(mode: ProgressMode) -> Self {
        let able = io::stderr().is_terminal() && std::env::var_os("TERM").is_some_and(|term| term != "dumb");
        let paint = Paint { colour: able && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty()) };
        Self::with(mode, able.then_some(size), paint, Box::new(io::stderr()))
    }

    fn with(
        mode: ProgressMode,
        terminal: Option<fn() -> (usize, usize)>,
        paint: Paint,
        out: Box<dyn Write + Send>,
    ) -> Self {
        let shape = match (mode, terminal) {
            (ProgressMode::Auto | ProgressMode::Live, Some(size)) => Shape::Live { paint, drawn: 0, size },
            (ProgressMode::Auto | ProgressMode::Live | ProgressMode::Plain, _) => {
                Shape::Plain(Plain::new(paint))
            }
            (ProgressMode::Json, _) => Shape::Json,
            (ProgressMode::None, _) => Shape::None,
        };
        Self { out, shape, last: None }
    }

    /// Takes in an event that `run` has already taken in.
    pub(crate) fn apply(&mut self, event: &Event, run: &Run) {
        self.last = Some((Instant::now(), run.now));
        match &mut self.shape {
            Shape::Live { .. } => {
                if let What::Note { text } = &event.what {
                    self.say(text, run);
                }
            }
            Shape::Plain(plain) => {
                let lines = plain.event(event, run);
                self.write(&lines);
            }
            Shape::Json => {
                // An event is plain data: serializing one cannot fail.
                let line = serde_json::to_string(event).unwrap_or_default();
                self.write(&format!("{line}\n"));
            }
            Shape::None => {}
        }
    }

    /// Redraws, or gives a sign of life. To be called a few times a second.
    pub(crate) fn tick(&mut self, run: &Run) {
        self.tick_at(run, self.now(run));
    }

    fn tick_at(&mut self, run: &Run, now: f64) {
        match &mut self.shape {
            Shape::Live { .. } => self.draw(run, now),
            Shape::Plain(plain) => {
                let lines = plain.heartbeat(run, now);
                self.write(&lines);
            }
            Shape::Json | Shape::None => {}
        }
    }

    /// Writes a line that stays; above the view, where there is one.
    pub(crate) fn say(&mut self, text: &str, run: &Run) {
        match &self.shape {
            Shape::Live { .. } => {
                let erase = self.erase();
                self.write(&format!("{erase}{text}\n"));
                self.draw(run, self.now(run));
            }
            Shape::Plain(_) => self.write(&format!("{} {text}\n", crate::report::figure::clock(run.now))),
            Shape::Json | Shape::None => {}
        }
    }

    /// Takes the live view away, so that the verdict stands alone.
    pub(crate) fn finish(&mut self) {
        let erase = self.erase();
        self.write(&erase);
    }

    /// The run's clock now: time goes on between events.
    fn now(&self, run: &Run) -> f64 {
        match self.last {
            Some((seen, at)) if run.verdict.is_none() => at + seen.elapsed().as_secs_f64(),
            _ => run.now,
        }
    }

    fn draw(&mut self, run: &Run, now: f64) {
        let Shape::Live { paint, size, .. } = self.shape else { return };
        let (width, height) = size();
        let lines = view::lines(run, now, width);
        // The cursor cannot go above the screen, so a view that is too tall would be drawn twice.
        let room = height.saturating_sub(1).max(1);
        let shown = lines.len().min(room);
        // One write between the marks of a synchronized update (terminals without it ignore them): no flicker.
        let mut text = String::from("\x1b[?2026h");
        text.push_str(&self.erase());
        for line in &lines[..shown] {
            text.push_str(&line.render(width, paint));
            text.push('\n');
        }
        text.push_str("\x1b[?2026l");
        if let Shape::Live { drawn, .. } = &mut self.shape {
            *drawn = shown;
        }
        self.write(&text);
    }

    /// What takes the drawn lines away: up, to the first column, and clear to the end of the screen.
    fn erase(&mut self) -> String {
        match &mut self.shape {
            Shape::Live { drawn, .. } if *drawn > 0 => format!("\x1b[{}F\x1b[J", std::mem::take(drawn)),
            _ => String::new(),
        }
    }

    fn write(&mut self, text: &str) {
        if !text.is_empty() {
            // Nobody may be left to read it; that must not stop a run that has faults to take back.
            let _ = self.out.write_all(text.as_bytes()).and_then(|()| self.out.flush());
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.finish();
    }
}

/// Columns and rows of the terminal on stderr.
fn size() -> (usize, usize) {
    let (width, height) = terminal_size::terminal_size_of(io::stderr())
        .map_or(DEFAULT_SIZE, |(width, height)| (usize::from(width.0), usize::from(height.0)));
    (width.max(20), height.max(2))
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::report::sample;

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().expect("no writer panics").extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// Everything that is written while the sample goes by, with a tick after each event.
    fn written(mode: ProgressMode, terminal: Option<fn() -> (usize, usize)>) -> String {
        let out = Shared::default();
        let mut progress = Progress::with(mode, terminal, Paint { colour: false }, Box::new(out.clone()));
        let mut run = Run::default();
        for event in sample::events() {
            run.apply(&event);
            progress.apply(&event, &run);
            progress.tick_at(&run, run.now);
        }
        drop(progress);
        let bytes = out.0.lock().expect("no writer panics").clone();
        String::from_utf8(bytes).expect("text")
    }

    /// What a terminal of this size shows after the text, cursor row included.
    fn screen(text: &str) -> Vec<String> {
        let mut rows = vec![String::new()];
        let mut rest = text;
        while let Some(c) = rest.chars().next() {
            if let Some(code) = rest.strip_prefix("\x1b[") {
                let end = code.find(|c: char| c.is_ascii_alphabetic()).expect("a code ends");
                match (&code[..end], &code[end..=end]) {
                    (n, "F") => rows.truncate(rows.len() - 1 - n.parse::<usize>().expect("a count")),
                    ("", "J") => rows.push(String::new()),
                    ("?2026", "h" | "l") => {}
                    other => panic!("unexpected code {other:?}"),
                }
                rest = &code[end + 1..];
                continue;
            }
            match c {
                '\n' => rows.push(String::new()),
                c => rows.last_mut().expect("a row").push(c),
            }
            rest = &rest[c.len_utf8()..];
        }
        rows
    }

    #[test]
    fn the_live_view_redraws_in_place_and_leaves_nothing() {
        let text = written(ProgressMode::Auto, Some(|| (100, 50)));
        assert!(text.contains("GATES"));
        assert_eq!(screen(&text), [""], "after the run only an empty line is left");
        assert!(!text.contains("\x1b[?25l") && !text.contains("\x1b[?1049h") && !text.contains('\r'));
    }

    #[test]
    fn a_view_taller_than_the_screen_is_cut_not_scrolled() {
        let text = written(ProgressMode::Live, Some(|| (80, 6)));
        for frame in text.split("\x1b[?2026h").skip(1) {
            let body = frame.split("\x1b[?2026l").next().expect("a frame ends");
            assert!(body.matches('\n').count() <= 5, "{body}");
        }
    }

    #[test]
    fn without_a_terminal_there_are_only_lines() {
        let text = written(ProgressMode::Live, None);
        assert!(!text.contains('\x1b') && !text.contains('\r'));
        insta::assert_snapshot!(text);
    }

    #[test]
    fn json_is_the_events_themselves() {
        let text = written(ProgressMode::Json, None);
        let events: Vec<Event> = text.lines().map(|l| serde_json::from_str(l).expect("an event")).collect();
        assert_eq!(events, sample::events());
        assert_eq!(written(ProgressMode::None, Some(|| (80, 24))), "");
    }
    #[test]
    #[ignore = "plays the sample on this terminal, to look at"]
    fn look() {
        let mut progress = Progress::new(ProgressMode::Auto);
        let mut run = Run::default();
        for event in sample::events() {
            let wait = (event.at - run.now).max(0.0) / 15.0;
            std::thread::sleep(std::time::Duration::from_secs_f64(wait));
            run.apply(&event);
            progress.apply(&event, &run);
            progress.tick(&run);
        }
    }
}
