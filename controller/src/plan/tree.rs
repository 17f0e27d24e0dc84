//! YAML as a tree in which every key and value knows its place, and the problems found in it.
//!
//! A plan is read from this tree instead of being deserialized straight into structs, because serde stops at the
//! first error, and a person wants them all.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
};

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, SeqAccess, Visitor},
};
use serde_saphyr::{DuplicateKeyPolicy, Location, Spanned};

/// A value of the YAML tree.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Null,
    Bool(bool),
    Int(i128),
    Float(f64),
    Text(String),
    List(Vec<Spanned<Value>>),
    Map(Vec<(Spanned<String>, Spanned<Value>)>),
}

impl Value {
    /// What it is, for "expected a list, found …".
    fn what(&self) -> &'static str {
        match self {
            Self::Null => "nothing",
            Self::Bool(_) => "true or false",
            Self::Int(_) | Self::Float(_) => "a number",
            Self::Text(_) => "text",
            Self::List(_) => "a list",
            Self::Map(_) => "a mapping",
        }
    }

    fn to_json(&self) -> serde_json::Value {
        use serde_json::Value as Json;
        match self {
            Self::Null => Json::Null,
            Self::Bool(b) => Json::Bool(*b),
            Self::Int(i) => i64::try_from(*i)
                .map(Json::from)
                .or_else(|_| u64::try_from(*i).map(Json::from))
                .unwrap_or(Json::Null),
            Self::Float(f) => Json::from(*f),
            Self::Text(t) => Json::from(t.as_str()),
            Self::List(items) => items.iter().map(|i| i.value.to_json()).collect(),
            Self::Map(entries) => entries.iter().map(|(k, v)| (k.value.clone(), v.value.to_json())).collect(),
        }
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AnyValue;

        impl<'de> Visitor<'de> for AnyValue {
            type Value = Value;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a YAML value")
            }

            fn visit_unit<E>(self) -> Result<Value, E> {
                Ok(Value::Null)
            }

            fn visit_none<E>(self) -> Result<Value, E> {
                Ok(Value::Null)
            }

            fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
                Value::deserialize(deserializer)
            }

            fn visit_bool<E>(self, v: bool) -> Result<Value, E> {
                Ok(Value::Bool(v))
            }

            fn visit_i64<E>(self, v: i64) -> Result<Value, E> {
                Ok(Value::Int(v.into()))
            }

            fn visit_u64<E>(self, v: u64) -> Result<Value, E> {
                Ok(Value::Int(v.into()))
            }

            fn visit_i128<E>(self, v: i128) -> Result<Value, E> {
                Ok(Value::Int(v))
            }

            fn visit_f64<E>(self, v: f64) -> Result<Value, E> {
                Ok(Value::Float(v))
            }

            fn visit_str<E>(self, v: &str) -> Result<Value, E> {
                Ok(Value::Text(v.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
                let mut items = Vec::new();
                while let Some(item) = seq.next_element()? {
                    items.push(item);
                }
                Ok(Value::List(items))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Value::Map(entries))
            }
        }

        deserializer.deserialize_any(AnyValue)
    }
}

/// A problem of a plan, with its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Problem {
    line: usize,
    column: usize,
    width: usize,
    /// `rounds[0].gates[1].errors.max`; empty where it is about the file.
    path: String,
    /// What is wrong.
    message: String,
    /// What was expected, or what to write instead.
    fix: String,
}

/// Everything that is wrong with a plan, ready to print: all of it at once, each with its line and a caret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Invalid {
    /// One paragraph per problem.
    pub(crate) text: String,
    /// How many there are.
    pub(crate) count: usize,
}

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Invalid {}

impl Invalid {
    fn new(file: &Path, source: &str, mut problems: Vec<Problem>) -> Self {
        problems.sort_by_key(|p| (p.line, p.column));
        problems.dedup();
        let lines: Vec<&str> = source.lines().collect();
        let text: Vec<String> = problems.iter().map(|p| p.render(file, &lines)).collect();
        let count = text.len();
        let noun = if count == 1 { "error" } else { "errors" };
        let text = format!("{}\n{count} {noun} in {}\n", text.join("\n"), file.display());
        Self { text, count }
    }
}

impl Problem {
    fn render(&self, file: &Path, lines: &[&str]) -> String {
        let Self { line, column, width, path, message, fix } = self;
        let path = if path.is_empty() { String::new() } else { format!("{path}: ") };
        let head = format!("{}:{line}:{column}: {path}{message}\n", file.display());
        let source = line.checked_sub(1).and_then(|i| lines.get(i));
        let body = if let Some(source) = source {
            let number = line.to_string();
            let margin = " ".repeat(number.len());
            let rest = source.chars().count().saturating_sub(column - 1).max(1);
            // A tab before the caret stays a tab, so that both lines are equally wide.
            let indent: String =
                source.chars().take(column - 1).map(|c| if c == '\t' { '\t' } else { ' ' }).collect();
            let caret = "^".repeat((*width).clamp(1, rest));
            format!(" {margin} |\n {number} | {source}\n {margin} | {indent}{caret} {fix}\n")
        } else {
            format!(" {fix}\n")
        };
        head + &body
    }
}

/// The text of a plan and the problems found in it so far.
pub(super) struct Source<'a> {
    file: &'a Path,
    text: &'a str,
    problems: RefCell<Vec<Problem>>,
    files: RefCell<BTreeMap<PathBuf, PathBuf>>,
}

impl<'a> Source<'a> {
    pub(super) fn new(file: &'a Path, text: &'a str) -> Self {
        Self { file, text, problems: RefCell::default(), files: RefCell::default() }
    }

    /// Parses the YAML. Only a text that is no YAML fails here.
    pub(super) fn parse(&self) -> Result<Spanned<Value>, Invalid> {
        let options = serde_saphyr::options! {
            // The tree's readers report every duplicate themselves, together with everything else.
            duplicate_keys: DuplicateKeyPolicy::PassThrough,
            with_snippet: false,
        };
        serde_saphyr::from_str_with_options(self.text, options).map_err(|e| {
            let at = e.location().unwrap_or(Location::UNKNOWN);
            let message = e.without_snippet().to_string();
            let message = message.split(" at line ").next().unwrap_or(&message).trim().to_owned();
            self.problem(at, String::new(), format!("this is no YAML: {message}"), "here".into());
            self.invalid()
        })
    }

    /// The tree's root, for reading.
    pub(super) fn root<'s>(&'s self, node: &'s Spanned<Value>) -> At<'s> {
        At { source: self, path: String::new(), place: node.referenced, value: &node.value }
    }

    pub(super) fn has_problems(&self) -> bool {
        !self.problems.borrow().is_empty()
    }

    /// The files that the plan names and that were read: what it calls each, and where that is.
    pub(super) fn files(&self) -> BTreeMap<PathBuf, PathBuf> {
        self.files.borrow().clone()
    }

    /// Everything found so far.
    pub(super) fn invalid(&self) -> Invalid {
        Invalid::new(self.file, self.text, self.problems.borrow().clone())
    }

    fn problem(&self, at: Location, path: String, message: String, fix: String) {
        let (line, column) = (at.line().max(1) as usize, at.column().max(1) as usize);
        let width = usize::try_from(at.span().len()).unwrap_or(1);
        self.problems.borrow_mut().push(Problem { line, column, width, path, message, fix });
    }
}

/// A value and where it is. Reading from it either gives what was asked for, or notes a problem and gives nothing.
#[derive(Clone)]
pub(super) struct At<'a> {
    source: &'a Source<'a>,
    /// `rounds[0].gates[1].errors.max`.
    pub(super) path: String,
    place: Location,
    pub(super) value: &'a Value,
}

impl<'a> At<'a> {
    /// Notes a problem here.
    pub(super) fn problem(&self, message: impl Into<String>, fix: impl Into<String>) {
        self.source.problem(self.place, self.path.clone(), message.into(), fix.into());
    }

    /// Notes a problem and gives nothing.
    pub(super) fn refuse<T>(&self, message: impl Into<String>, fix: impl Into<String>) -> Option<T> {
        self.problem(message, fix);
        None
    }

    /// Notes that something else was expected here.
    pub(super) fn expected<T>(&self, expected: &str) -> Option<T> {
        self.refuse(format!("found {}", self.value.what()), format!("expected {expected}"))
    }

    /// The value as it was written, for messages: text as it is, numbers as in the file.
    pub(super) fn shown(&self) -> String {
        match self.value {
            Value::Text(t) => t.clone(),
            Value::Int(i) => i.to_string(),
            Value::Float(f) => f.to_string(),
            Value::Bool(b) => b.to_string(),
            other => other.what().to_owned(),
        }
    }

    /// A scalar as text; numbers too, so that `800` can be told that it needs a unit.
    pub(super) fn scalar(&self, expected: &str) -> Option<String> {
        match self.value {
            Value::Text(_) | Value::Int(_) | Value::Float(_) => Some(self.shown()),
            _ => self.expected(expected),
        }
    }

    pub(super) fn text(&self, expected: &str) -> Option<String> {
        match self.value {
            Value::Text(t) if !t.trim().is_empty() => Some(t.clone()),
            Value::Text(_) => self.refuse("this is empty", format!("expected {expected}")),
            _ => self.expected(expected),
        }
    }

    pub(super) fn bool(&self) -> Option<bool> {
        match self.value {
            Value::Bool(b) => Some(*b),
            _ => self.expected("true or false"),
        }
    }

    /// A whole number within a range.
    pub(super) fn int<T: TryFrom<i128>>(&self, expected: &str) -> Option<T> {
        match self.value {
            Value::Int(i) => match T::try_from(*i) {
                Ok(i) => Some(i),
                Err(_) => self.refuse(format!("{i} is out of range"), format!("expected {expected}")),
            },
            _ => self.expected(expected),
        }
    }

    /// Where a file is that the plan names: a path starts at the directory of the plan.
    pub(super) fn beside(&self, path: &str) -> PathBuf {
        let found = self.source.file.parent().unwrap_or(Path::new("")).join(path);
        self.source.files.borrow_mut().insert(path.into(), found.clone());
        found
    }

    pub(super) fn json(&self) -> serde_json::Value {
        self.value.to_json()
    }

    /// The items of a list.
    pub(super) fn list(&self, expected: &str) -> Option<Vec<At<'a>>> {
        let Value::List(items) = self.value else { return self.expected(expected) };
        let item = |(i, item): (usize, &'a Spanned<Value>)| At {
            source: self.source,
            path: format!("{}[{i}]", self.path),
            place: item.referenced,
            value: &item.value,
        };
        Some(items.iter().enumerate().map(item).collect())
    }

    /// The entries of a mapping whose keys are names that the user chose. Duplicates are a problem.
    pub(super) fn named(&self, expected: &str) -> Option<Vec<(String, At<'a>)>> {
        let Value::Map(entries) = self.value else { return self.expected(expected) };
        let mut named: Vec<(String, At<'a>)> = Vec::new();
        for (key, value) in entries {
            let child = self.child(&key.value, value);
            if named.iter().any(|(name, _)| *name == key.value) {
                let at = At { place: key.referenced, ..child };
                at.problem(format!("`{}` is here twice", key.value), "give each a name of its own");
            } else {
                named.push((key.value.clone(), child));
            }
        }
        Some(named)
    }

    /// A mapping with known fields. Call [`Fields::finish`] when all of them have been asked for.
    pub(super) fn fields(&self, expected: &str) -> Option<Fields<'a>> {
        let Value::Map(entries) = self.value else { return self.expected(expected) };
        Some(Fields { map: self.clone(), entries, known: Vec::new() })
    }

    /// A mapping with exactly one entry, whose key is one of `kinds`.
    pub(super) fn one_of(&self, what: &str, kinds: &[&'static str]) -> Option<(&'static str, At<'a>)> {
        let kinds_listed = kinds.join(", ");
        let Value::Map(entries) = self.value else {
            return self.expected(&format!("a {what}: one of {kinds_listed}"));
        };
        let [(key, value)] = entries.as_slice() else {
            let message = format!("a {what} has one entry, this has {}", entries.len());
            return self.refuse(message, format!("expected one of {kinds_listed}"));
        };
        if let Some(kind) = kinds.iter().find(|k| **k == key.value) {
            return Some((kind, self.child(kind, value)));
        }
        let at = At { place: key.referenced, ..self.child(&key.value, value) };
        let fix = did_you_mean(&key.value, kinds.iter().copied())
            .unwrap_or_else(|| format!("expected one of {kinds_listed}"));
        at.refuse(format!("there is no {what} `{}`", key.value), fix)
    }

    /// The value at a path such as `rounds[0].faults[1]`; the last one on the way that is there.
    pub(super) fn find(&self, path: &str) -> At<'a> {
        let (step, rest) = match path.find(['.', '[']) {
            _ if path.is_empty() => return self.clone(),
            Some(0) if path.starts_with('[') => path.split_once(']').unwrap_or((path, "")),
            Some(end) => path.split_at(end),
            None => (path, ""),
        };
        let rest = rest.strip_prefix('.').unwrap_or(rest);
        let next = match (self.value, step.strip_prefix('[')) {
            (Value::List(_), Some(index)) => {
                index.parse().ok().and_then(|i: usize| self.list("").unwrap_or_default().into_iter().nth(i))
            }
            (Value::Map(entries), None) => {
                let entry = entries.iter().find(|(key, _)| key.value == step);
                // The name is a better place for a caret than whatever it stands for.
                entry.map(|(key, value)| At { place: key.referenced, ..self.child(step, value) })
            }
            _ => None,
        };
        next.map_or_else(|| self.clone(), |next| next.find(rest))
    }

    fn child(&self, key: &str, value: &'a Spanned<Value>) -> At<'a> {
        let path = if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) };
        At { source: self.source, path, place: value.referenced, value: &value.value }
    }
}

/// A mapping that is being read field by field.
pub(super) struct Fields<'a> {
    pub(super) map: At<'a>,
    entries: &'a [(Spanned<String>, Spanned<Value>)],
    known: Vec<String>,
}

impl<'a> Fields<'a> {
    /// A field that may be missing; one that is there with no value counts as missing.
    pub(super) fn get(&mut self, name: &str) -> Option<At<'a>> {
        self.known.push(name.to_owned());
        let (_, value) = self.entries.iter().find(|(key, _)| key.value == name)?;
        (value.value != Value::Null).then(|| self.map.child(name, value))
    }

    /// Whether a field is there, right or wrong.
    pub(super) fn has(&self, name: &str) -> bool {
        self.entries.iter().any(|(key, _)| key.value == name)
    }

    /// A field that has to be there.
    pub(super) fn require(&mut self, name: &str, example: &str) -> Option<At<'a>> {
        let found = self.get(name);
        if found.is_none() {
            self.map.problem(format!("`{name}` is missing"), format!("add {name}: {example}"));
        }
        found
    }

    /// The entries whose keys have this form; for families of fields such as `p95`.
    pub(super) fn matching(&mut self, form: impl Fn(&str) -> bool) -> Vec<(String, At<'a>)> {
        let entries = self.entries.iter().filter(|(key, _)| form(&key.value));
        let found: Vec<_> =
            entries.map(|(key, value)| (key.value.clone(), self.map.child(&key.value, value))).collect();
        self.known.extend(found.iter().map(|(name, _)| name.clone()));
        found
    }

    /// Notes every field that nobody asked for, and every one that is there twice.
    pub(super) fn finish(self) {
        for (i, (key, value)) in self.entries.iter().enumerate() {
            let at = At { place: key.referenced, ..self.map.child(&key.value, value) };
            if !self.known.contains(&key.value) {
                let known = self.known.iter().map(String::as_str);
                let fix = did_you_mean(&key.value, known)
                    .unwrap_or_else(|| format!("known here: {}", self.known.join(", ")));
                at.problem(format!("unknown field `{}`", key.value), fix);
            } else if self.entries[..i].iter().any(|(earlier, _)| earlier.value == key.value) {
                at.problem(format!("`{}` is here twice", key.value), "remove one of them");
            }
        }
    }
}

/// "did you mean …", where one of the known names is close enough.
pub(super) fn did_you_mean<'k>(name: &str, known: impl IntoIterator<Item = &'k str>) -> Option<String> {
    let near = known.into_iter().map(|k| (distance(&name.to_lowercase(), &k.to_lowercase()), k)).min()?;
    let length = name.chars().count();
    let most = (length / 3).clamp(1, 3);
    (near.0 <= most && near.0 < length).then(|| format!("did you mean `{}`?", near.1))
}

/// Edit distance, a swap of neighbours counting once (optimal string alignment).
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows = vec![(0..=b.len()).collect::<Vec<usize>>()];
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let substitution = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut best = substitution.min(rows[i - 1][j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            row.push(best);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}
