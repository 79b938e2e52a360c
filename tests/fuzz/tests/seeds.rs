//! The seeds of the fuzz targets reach what they are made for.

use twinfs_fuzz::{CleanUp, TARGETS};

#[test]
fn every_target_takes_its_seeds_and_refuses_nonsense() {
    let _files = CleanUp;
    for target in &TARGETS {
        let seeds = (target.seeds)();
        let taken = seeds.iter().filter(|seed| (target.run)(seed)).count();
        assert!(taken * 2 > seeds.len(), "{target:?} takes {taken} of {} seeds", seeds.len());
        for nonsense in [&b""[..], b"\0", b"\x01", b"nonsense", &[0xff; 5000]] {
            // An empty input changes nothing in a sidefile.
            assert!(!(target.run)(nonsense) || target.name == "sidefile", "{target:?} takes {nonsense:?}");
        }
    }
}
