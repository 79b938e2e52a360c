//! Runs one target under libFuzzer: `TWINFS_FUZZ_TARGET=NAME fuzz CORPUS… [-max_total_time=SECONDS]`. Build it as
//! `tests/run fuzz` does, or it is blind.
#![no_main]

use std::sync::OnceLock;

use twinfs_fuzz::{Target, target};

fn chosen() -> &'static Target {
    static TARGET: OnceLock<&'static Target> = OnceLock::new();
    TARGET.get_or_init(|| {
        let name = std::env::var("TWINFS_FUZZ_TARGET").expect("TWINFS_FUZZ_TARGET names the target");
        target(&name).unwrap_or_else(|| panic!("there is no target {name}: see `fuzz_seeds`"))
    })
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    (chosen().run)(bytes);
});
