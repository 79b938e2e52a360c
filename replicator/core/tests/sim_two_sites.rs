//! Two sites in one process, in virtual time, from one seed: the state machines of the session over a network that
//! delays, reorders, doubles and drops, with sites that stop and start.
//!
//! The simulated driver does what the real ones do: a mover that cuts intervals, a journal with a durable part and a
//! part that a crash may take, a checkpoint that trims it. Everything is checked after every step:
//!
//! * prefix: what is shown is every member's updates up to the consistency time, and none after it;
//! * atomicity: a group is shown as a whole or not at all, and time and group numbers never go back within a run;
//! * whole: no volume is shown as it is between the beginning and the end of a resync;
//! * no lost acknowledgement: what the primary let go of is durable at the replica, whatever crashes;
//! * no acknowledged set is sent again, and no set twice on one connection;
//! * bounds: window and pending queue;
//! * convergence: once the network is well, everything is shown everywhere.

mod session_common;
mod sim {
    pub(crate) mod network;
    pub(crate) mod primary;
    pub(crate) mod replica;
    pub(crate) mod world;
}

use session_common::for_seeds;
use sim::world::{Options, simulate};
use twinfs_core::session::receiver::Ordering;

#[test]
fn two_sites_keep_the_promises() {
    for_seeds("sim_two_sites", "two_sites_keep_the_promises", 300, |seed| {
        simulate(seed, Options::default()).outcome
    });
}

/// The same seed gives the same bytes, so a failure can be replayed.
#[test]
fn the_same_seed_gives_the_same_trace() {
    for_seeds("sim_two_sites", "the_same_seed_gives_the_same_trace", 20, |seed| {
        let (first, second) = (simulate(seed, Options::default()), simulate(seed, Options::default()));
        if first.trace.is_empty() || first.trace != second.trace {
            return Err("two runs of the same seed differ".to_owned());
        }
        Ok(())
    });
    let other = [0, 1].map(|seed| simulate(seed, Options::default()).trace);
    assert_ne!(other[0], other[1], "the seed must matter");
}

/// The checks are able to fail: without stamp ordering, most seeds break the prefix.
#[test]
fn without_stamp_ordering_the_checks_object() {
    let options = Options { ordering: Ordering::ByArrival };
    let broken = (0..40).filter(|seed| {
        let outcome = simulate(*seed, options).outcome;
        outcome.is_err_and(|why| why.starts_with("prefix"))
    });
    let broken = broken.count();
    assert!(broken > 20, "only {broken} of 40 seeds broke the prefix");
}

/// The simulation really meets what it is there for.
#[test]
fn the_seeds_meet_every_kind_of_trouble() {
    let traces: Vec<String> = (0..40).map(|seed| simulate(seed, Options::default()).trace).collect();
    for event in [
        "duplicate",
        "out of order",
        "connection lost",
        "replica crashes",
        "primary restarts",
        "joins",
        "null",
        "trimmed",
        "within a set",
        "promoted",
        "fenced",
        "sends again",
        "resync begins",
        "resync again",
        "resync ends",
    ] {
        let met = traces.iter().filter(|trace| trace.contains(event)).count();
        assert!(met >= 4, "only {met} of 40 seeds met: {event}");
    }
}
