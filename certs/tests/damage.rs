//! Rot in the files of an identity.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;

use twinfs_certs::{init, load};
use twinfs_core::id::SiteName;

/// Name, id, and what the key signs for never change unnoticed; a bit that has no meaning may.
#[test]
fn one_bit_flipped_at_every_byte_never_makes_another_site() {
    let scratch = tempfile::tempdir().unwrap();
    let site = scratch.path().join("site");
    let whole = init(&site, &SiteName::new("nyc").unwrap(), None).unwrap();
    for name in ["site.json", "key.pem", "cert.pem"] {
        let path = site.join("identity").join(name);
        let good = std::fs::read(&path).unwrap();
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        let mut refused = 0;
        for at in 0..good.len() {
            file.write_all_at(&[good[at] ^ (1 << (at % 8))], at as u64).unwrap();
            match load(&site) {
                Ok(loaded) => assert_eq!(loaded.site(), whole.site(), "{name}, byte {at}"),
                Err(_) => refused += 1,
            }
            file.write_all_at(&good[at..=at], at as u64).unwrap();
        }
        assert!(refused > 30, "{name}: {refused} of {}", good.len());
    }
    assert_eq!(load(&site).unwrap().authority_fingerprint(), whole.authority_fingerprint());
}
