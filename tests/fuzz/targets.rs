//! What the agent's and the controller's fuzz targets have in common: which one runs, and on what.

/// Takes any input without a panic.
pub(super) type Parser = fn(&[u8]);

/// The target that `SQUALL_FUZZ` names.
#[cfg(feature = "fuzz")]
pub(super) fn chosen(targets: &[(&str, Parser)]) -> Parser {
    let name = std::env::var("SQUALL_FUZZ").unwrap_or_default();
    let found = targets.iter().find(|(known, _)| *known == name);
    found.unwrap_or_else(|| panic!("SQUALL_FUZZ is {name:?}, which is no target")).1
}

/// Runs the targets of a package on what fuzzing found worth keeping. So every ordinary test run compiles them.
#[cfg(test)]
pub(super) fn take_corpora(package: &str, targets: &[(&str, Parser)]) {
    use std::{fs, path::Path};

    let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/corpus").join(package);
    let there = fs::read_dir(&corpora).expect("a directory").count();
    assert_eq!(there, targets.len(), "each target has a corpus");
    for (name, target) in targets {
        let inputs: Vec<_> = fs::read_dir(corpora.join(name)).expect("a corpus").collect();
        assert!(!inputs.is_empty(), "the corpus of {name} is empty");
        for input in inputs {
            target(&fs::read(input.expect("an entry").path()).expect("an input"));
        }
    }
}
