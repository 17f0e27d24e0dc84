//! What the kernel counted in a network namespace: /proc/net/snmp and /proc/net/netstat.

use std::{collections::BTreeMap, fs};

use anyhow::{Context, Result};

use crate::Netns;

/// The counters of a namespace at one time, by protocol and name: `Udp`, `InCsumErrors`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counters(BTreeMap<(String, String), i64>);

impl Netns {
    /// Its counters now. Names are those of /proc/net/snmp and /proc/net/netstat.
    pub fn counters(&self) -> Result<Counters> {
        // /proc/net would show the namespace of the process's first thread.
        let read = |file: &str| {
            let path = format!("/proc/thread-self/net/{file}");
            fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))
        };
        self.inside(|| {
            let mut counters = BTreeMap::new();
            parse(&read("snmp")?, &mut counters)?;
            parse(&read("netstat")?, &mut counters)?;
            Ok(Counters(counters))
        })
    }
}

impl Counters {
    /// By how much a counter has grown since.
    pub fn grown(&self, since: &Self, protocol: &str, name: &str) -> Result<u64> {
        let key = (protocol.to_owned(), name.to_owned());
        let of = |counters: &Self| counters.0.get(&key).copied();
        let (now, then) = of(self).zip(of(since)).with_context(|| format!("no counter {protocol} {name}"))?;
        u64::try_from(now - then).with_context(|| format!("{protocol} {name} went back"))
    }
}

/// Each protocol has a line of names and a line of values.
fn parse(text: &str, into: &mut BTreeMap<(String, String), i64>) -> Result<()> {
    let mut lines = text.lines();
    while let Some((names, values)) = lines.next().zip(lines.next()) {
        let mut words = names.split_whitespace().zip(values.split_whitespace());
        let (protocol, same) = words.next().context("an empty line of counters")?;
        anyhow::ensure!(protocol == same, "{protocol} is followed by {same}");
        let protocol = protocol.trim_end_matches(':');
        for (name, value) in words {
            let value = value.parse().with_context(|| format!("{protocol} {name} is {value}"))?;
            into.insert((protocol.to_owned(), name.to_owned()), value);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Counters> {
        let mut counters = BTreeMap::new();
        parse(text, &mut counters)?;
        Ok(Counters(counters))
    }

    #[test]
    fn names_and_values_come_in_pairs_of_lines() -> Result<()> {
        let then = read("Tcp: MaxConn RetransSegs\nTcp: -1 5\nUdp: InCsumErrors\nUdp: 1\n")?;
        let now = read("Tcp: MaxConn RetransSegs\nTcp: -1 12\nUdp: InCsumErrors\nUdp: 1\n")?;
        assert_eq!(now.grown(&then, "Tcp", "RetransSegs")?, 7);
        assert_eq!(now.grown(&then, "Udp", "InCsumErrors")?, 0);
        assert!(now.grown(&then, "Udp", "NoSuch").is_err());
        assert!(then.grown(&now, "Tcp", "RetransSegs").is_err());
        assert!(read("Tcp: A\nUdp: 1\n").is_err());
        Ok(())
    }
}
