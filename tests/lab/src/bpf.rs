//! eBPF objects of Squall that no living process holds.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, thread,
    time::{Duration, Instant},
};

use aya::{
    maps::loaded_maps,
    programs::{loaded_links, loaded_programs},
};

/// The maps of agent-ebpf, by the names that the kernel keeps.
const MAPS: [&str; 8] =
    ["TABLE", "VALUE_SETS", "DELAYS", "DISTRIBUTIONS", "CGROUP_SETS", "PORT_OWNERS", "PEERS_V4", "PEERS_V6"];

/// How long the kernel may take to free what a process that has ended held.
const FREED: Duration = Duration::from_secs(3);

/// Programs, maps and links of ours that are there though no process has a descriptor of them, or of a program that uses them.
pub(crate) fn orphans() -> BTreeSet<String> {
    let started = Instant::now();
    let mut found = now();
    while !found.is_empty() && started.elapsed() < FREED {
        thread::sleep(Duration::from_millis(50));
        found = found.intersection(&now()).cloned().collect();
    }
    found
}

fn now() -> BTreeSet<String> {
    // Objects before descriptors: what is made meanwhile is in neither, or in the second alone.
    let programs: BTreeMap<u32, (String, Vec<u32>)> = loaded_programs()
        .flatten()
        .filter_map(|program| {
            let name = program.name_as_str().filter(|name| name.starts_with("squall_"))?.to_owned();
            Some((program.id(), (name, program.map_ids().ok().flatten().unwrap_or_default())))
        })
        .collect();
    let maps: BTreeMap<u32, String> = loaded_maps()
        .flatten()
        .filter_map(|map| {
            let name = map.name_as_str().filter(|name| MAPS.contains(name))?;
            Some((map.id(), name.to_owned()))
        })
        .collect();
    let links: BTreeMap<u32, u32> =
        loaded_links().flatten().map(|link| (link.id(), link.program_id())).collect();
    let held = descriptors();
    let is_held = |kind: &str, id: u32| held.contains(&format!("{kind}_id:\t{id}"));
    let used: BTreeSet<u32> = programs
        .iter()
        .filter(|(id, _)| is_held("prog", **id))
        .flat_map(|(_, (_, maps))| maps.clone())
        .collect();

    let mut found = BTreeSet::new();
    for (id, (name, _)) in &programs {
        if !is_held("prog", *id) {
            found.insert(format!("program {name} {id}"));
        }
    }
    for (id, name) in maps {
        if !is_held("map", id) && !used.contains(&id) {
            found.insert(format!("map {name} {id}"));
        }
    }
    for (id, program) in links {
        if programs.contains_key(&program) && !is_held("link", id) {
            found.insert(format!("link {id}"));
        }
    }
    found
}

/// What the descriptors of all processes say about eBPF objects.
fn descriptors() -> BTreeSet<String> {
    let entries = |dir: String| fs::read_dir(dir).into_iter().flatten().flatten();
    let processes = entries("/proc".to_owned()).map(|entry| entry.file_name().to_string_lossy().into_owned());
    let infos = processes
        .filter(|name| name.bytes().all(|b| b.is_ascii_digit()))
        .flat_map(|pid| entries(format!("/proc/{pid}/fdinfo")));
    // Processes and descriptors come and go.
    let texts = infos.filter_map(|info| fs::read_to_string(info.path()).ok());
    texts
        .flat_map(|text| text.lines().filter(|l| l.contains("_id:\t")).map(str::to_owned).collect::<Vec<_>>())
        .collect()
}
