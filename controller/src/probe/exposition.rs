//! The Prometheus text format, version 0.0.4, and as much of `OpenMetrics` as servers send under its name.
//!
//! Written here because the crates for it are regular expressions that trip over escaped label values.

use std::collections::BTreeMap;

/// What a line of samples says.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Sample {
    pub(crate) name: String,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) value: f64,
}

/// A page of metrics.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Page {
    /// Types by family: `counter`, `gauge`, `histogram`, …
    pub(crate) types: BTreeMap<String, String>,
    pub(crate) samples: Vec<Sample>,
}

/// Parses a page.
///
/// # Errors
///
/// The number of the first line that is none of the format, and what is wrong with it.
pub(crate) fn parse(text: &str) -> Result<Page, String> {
    let mut page = Page::default();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if let Some(comment) = line.strip_prefix('#') {
            let mut words = comment.split_whitespace();
            if words.next() == Some("TYPE")
                && let (Some(name), Some(kind)) = (words.next(), words.next())
            {
                page.types.insert(name.into(), kind.into());
            }
        } else if !line.is_empty() {
            page.samples.push(sample(line).map_err(|e| format!("line {}: {e}", number + 1))?);
        }
    }
    Ok(page)
}

fn sample(line: &str) -> Result<Sample, String> {
    let end = line.find(|c: char| c == '{' || c.is_whitespace()).ok_or("there is no value")?;
    let (name, rest) = line.split_at(end);
    if name.is_empty() {
        return Err("there is no name".into());
    }
    let rest = rest.trim_start();
    let (labels, rest) = match rest.strip_prefix('{') {
        Some(inside) => labels(inside)?,
        None => (BTreeMap::new(), rest),
    };
    // A timestamp or an exemplar may follow.
    let value = rest.split_whitespace().next().ok_or("there is no value")?;
    let value = number(value).ok_or_else(|| format!("{value:?} is not a number"))?;
    Ok(Sample { name: name.into(), labels, value })
}

/// A number as Go reads it.
fn number(text: &str) -> Option<f64> {
    match text {
        "+Inf" | "Inf" => Some(f64::INFINITY),
        "-Inf" => Some(f64::NEG_INFINITY),
        "NaN" => Some(f64::NAN),
        _ => text.parse().ok(),
    }
}

/// Labels up to the closing brace, and what follows it.
fn labels(mut rest: &str) -> Result<(BTreeMap<String, String>, &str), String> {
    let mut labels = BTreeMap::new();
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        if let Some(after) = rest.strip_prefix('}') {
            return Ok((labels, after));
        }
        let (name, after) = rest.split_once('=').ok_or("a label has no value")?;
        let after = after.trim_start().strip_prefix('"').ok_or("a label's value is not in quotes")?;
        let (value, after) = quoted(after).ok_or("a label's value does not end")?;
        labels.insert(name.trim().to_owned(), value);
        rest = after;
    }
}

/// A value up to the closing quote with its escapes undone, and what follows it.
fn quoted(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => match chars.next()?.1 {
                'n' => value.push('\n'),
                other => value.push(other),
            },
            _ => value.push(c),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn one(line: &str) -> Sample {
        parse(line).expect("parses").samples.remove(0)
    }

    #[test]
    fn a_page_with_everything() {
        let page = parse(
            "# HELP http_requests_total Requests with a \"quote\".\n# TYPE http_requests_total counter\n\
             http_requests_total{method=\"post\",code=\"200\"} 1027 1395066363000\n\n\
             # a comment\nmetric_without_labels 12.47\r\n   spaced  { a = \"b\" , } \t -Inf\n\
             # TYPE rpc histogram\nrpc_bucket{le=\"+Inf\"} 7 # {trace=\"x\"} 0.5\n# EOF\n",
        )
        .expect("parses");
        assert_eq!(page.types["http_requests_total"], "counter");
        assert_eq!(page.types["rpc"], "histogram");
        let names: Vec<_> = page.samples.iter().map(|s| (s.name.as_str(), s.value)).collect();
        let expected = [
            ("http_requests_total", 1027.0),
            ("metric_without_labels", 12.47),
            ("spaced", f64::NEG_INFINITY),
            ("rpc_bucket", 7.0),
        ];
        assert_eq!(names, expected);
        assert_eq!(page.samples[2].labels["a"], "b");
    }

    #[test]
    fn escapes_in_label_values() {
        let sample = one(r#"m{path="C:\\dir\\f.txt",error="say \"no\"\nthen } go, a=b"} 1e3"#);
        assert_eq!(sample.labels["path"], r"C:\dir\f.txt");
        assert_eq!(sample.labels["error"], "say \"no\"\nthen } go, a=b");
        assert_eq!(sample.value, 1000.0);
    }

    #[rstest]
    #[case("m +Inf", f64::INFINITY)]
    #[case("m{} 0x1p-2", f64::NAN)]
    #[case("m -1.5e-3", -0.0015)]
    fn numbers(#[case] line: &str, #[case] value: f64) {
        match parse(line) {
            Ok(page) => assert_eq!(page.samples[0].value, value),
            Err(_) => assert!(value.is_nan()),
        }
        assert!(one("m NaN").value.is_nan());
    }

    #[rstest]
    #[case("m", "line 1: there is no value")]
    #[case("a 1\nm{x=\"y} 1", "line 2: a label's value does not end")]
    #[case("m{x} 1", "line 1: a label has no value")]
    #[case("m{x=y} 1", "line 1: a label's value is not in quotes")]
    #[case("<html> not metrics", "line 1: \"not\" is not a number")]
    fn what_is_no_page(#[case] text: &str, #[case] error: &str) {
        assert_eq!(parse(text).expect_err("is refused"), error);
    }
}
