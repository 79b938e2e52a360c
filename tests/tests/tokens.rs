//! Write tokens run ahead of data: the replica knows of a late small write while much earlier data is still unsent.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs::File;
use std::os::unix::fs::FileExt;

use twinfs_tests::ops::Rng;
use twinfs_tests::pair::{Pair, Setup};
use twinfs_tests::process::wait_for;
use twinfs_tests::relay::Link;

const MIB: u64 = 1 << 20;
/// Earlier data that does not compress: large enough that 64 MiB of it are unsent for as long as the test looks.
const EARLIER: u64 = 160 * MIB;
const UNSENT: u64 = 64 * MIB;
/// Late writes; many, so that their tokens show in a count.
const LATE: u64 = 3000;

#[test]
fn a_token_arrives_while_64_mib_of_earlier_data_are_unsent() {
    let mut pair = Pair::start(Setup { relay: true, ..Setup::default() });
    pair.relay().set(Link { bandwidth: Some(3 * MIB), ..Link::default() });
    let sent_before = pair.relay().bytes_to_target();
    let mut random = Rng(1);
    let early = File::create(pair.mount("data").join("early")).unwrap();
    let mut block = vec![0; MIB as usize];
    for at in 0..EARLIER / MIB {
        block.chunks_mut(8).for_each(|word| word.copy_from_slice(&random.next_u64().to_le_bytes()));
        early.write_all_at(&block, at * MIB).unwrap();
    }
    // More tokens than there are of the earlier data.
    let late = File::create(pair.mount("data").join("late")).unwrap();
    for n in 0..LATE {
        late.write_all_at(&n.to_le_bytes(), n * 8).unwrap();
    }
    let (held, sent) = wait_for("the tokens of the late writes", || {
        let held = pair.number("chi", "tokens_held") as u64;
        // In this order: what is counted as sent was so when the tokens were held, or later.
        let sent = pair.relay().bytes_to_target() - sent_before;
        assert!(sent + UNSENT <= EARLIER, "{held} tokens are held when {sent} of {EARLIER} bytes were sent");
        (held >= LATE).then_some((held, sent))
    });
    let behind = pair.number("nyc", "behind_bytes") as u64;
    println!("{held} tokens held; {sent} bytes sent of {EARLIER}; {behind} bytes behind");
    assert!(behind >= UNSENT, "only {behind} bytes are behind");
    assert!(!pair.view("data").join("late").exists(), "tokens show nothing yet");
    assert_eq!(pair.status("chi")["session_state"], "DUPLEX");

    pair.relay().set(Link::default());
    pair.assert_converged();
    assert_eq!(pair.number("chi", "tokens_held"), 0.0, "each token met its data");
    pair.assert_plain_trees();
}

/// A single large write on an idle link is in a record set at once, and that takes long to arrive.
#[test]
fn a_token_arrives_although_its_update_is_in_the_only_set_in_flight() {
    let mut pair = Pair::start(Setup { relay: true, ..Setup::default() });
    let file = File::create(pair.mount("data").join("file")).unwrap();
    pair.wait_caught_up();
    pair.relay().set(Link { bandwidth: Some(32 << 10), ..Link::default() });
    let sent_before = pair.relay().bytes_to_target();
    let mut random = Rng(2);
    // One update, in one set.
    let mut block = vec![0; MIB as usize / 2];
    block.chunks_mut(8).for_each(|word| word.copy_from_slice(&random.next_u64().to_le_bytes()));
    file.write_all_at(&block, 0).unwrap();
    wait_for("the token of the write", || {
        let held = pair.number("chi", "tokens_held");
        let sent = pair.relay().bytes_to_target() - sent_before;
        assert!(sent < MIB / 4, "{held} tokens are held when {sent} bytes were sent");
        (held > 0.0).then_some(())
    });
    // A replica that is started anew has forgotten it, and hears of it again.
    pair.replica.take().unwrap().kill();
    pair.start_replica();
    wait_for("the token again", || (pair.number("chi", "tokens_held") > 0.0).then_some(()));
    pair.relay().set(Link::default());
    pair.assert_converged();
    assert_eq!(pair.number("chi", "tokens_held"), 0.0, "the token met its data");
}
