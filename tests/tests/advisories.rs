//! No dependency has a published security advisory, as far as `tests/advisories.tsv` knows.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::path::Path;

use semver::{Version, VersionReq};

/// The packages of a lock file.
fn packages(lock: &str) -> Vec<(String, Version)> {
    let mut packages = Vec::new();
    let mut name = String::new();
    for line in lock.lines() {
        let value =
            |key: &str| Some(line.strip_prefix(key)?.strip_prefix(" = \"")?.trim_end_matches('"').to_owned());
        if let Some(found) = value("name") {
            name = found;
        } else if let Some(version) = value("version") {
            packages.push((name.clone(), Version::parse(&version).unwrap()));
        }
    }
    packages
}

/// What the table has against the packages.
fn affected(table: &str, packages: &[(String, Version)]) -> Vec<String> {
    let mut found = Vec::new();
    for line in table.lines().filter(|line| !line.starts_with('#')) {
        let fields: Vec<&str> = line.split('\t').collect();
        let [name, advisory, unaffected, title] = fields[..] else { panic!("{line:?} has no four fields") };
        let unaffected: Vec<VersionReq> = unaffected.split(" | ").map(|text| text.parse().unwrap()).collect();
        for (package, version) in packages.iter().filter(|(package, _)| package == name) {
            if !unaffected.iter().any(|versions| versions.matches(version)) {
                found.push(format!("{package} {version}: {advisory}, {title}"));
            }
        }
    }
    found
}

fn table() -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("advisories.tsv")).unwrap()
}

#[test]
fn no_dependency_has_an_advisory() {
    let lock = Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.lock");
    let packages = packages(&std::fs::read_to_string(lock).unwrap());
    assert!(packages.len() > 50 && packages.iter().any(|(name, _)| name == "quinn-proto"));
    let found = affected(&table(), &packages);
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn a_vulnerable_lock_file_is_found() {
    let lock = "[[package]]\nname = \"quinn-proto\"\nversion = \"0.11.14\"\n\n\
                [[package]]\nname = \"quinn-proto\"\nversion = \"0.11.15\"\n\n\
                [[package]]\nname = \"tokio\"\nversion = \"1.43.0\"\n\n\
                [[package]]\nname = \"tokio\"\nversion = \"1.43.1\"\n";
    let found = affected(&table(), &packages(lock));
    assert_eq!(found.len(), 2, "{found:#?}");
    assert!(found[0].starts_with("quinn-proto 0.11.14: RUSTSEC-2026-0185"), "{found:#?}");
    assert!(found[1].starts_with("tokio 1.43.0: RUSTSEC-2025-0023"), "{found:#?}");
}
