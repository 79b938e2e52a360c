//! twinfs without I/O.
//!
//! Everything hard about the mirror is here, as values in and values out: no clock, file, socket, thread or
//! randomness. Time is a parameter; bytes from outside are parsed into verified types before anything looks at them.
//!
//! The rooms, in the order in which a write passes through them:
//!
//! * [`limits`] – every bound of the system, in one place.
//! * [`id`], [`stamp`] – the names of things, and the order of updates.
//! * [`update`] – one captured mutation, and its byte form.
//! * [`token`] – a stamp with the address it wrote, without the data.
//! * [`record_set`], [`mod@format`] – the shipping unit and its bytes on the wire and in the journal.
//! * [`wire`] – the other messages that sites exchange.
//! * [`session`] – the state machines of both ends: handshake, sender, receiver.
//! * [`delta`] – the net effect of a run of updates; what the replica's view is made of.
//! * [`change_map`] – the same without data: what changed while data could not be kept.
//! * [`loss`] – what a promote without the primary gives up.
//! * [`model`] – a naive file system tree, the oracle of the tests.
#![forbid(unsafe_code)]

pub mod change_map;
pub mod delta;
pub mod format;
pub mod id;
pub mod limits;
pub mod loss;
pub mod model;
pub mod record_set;
pub mod session;
pub mod stamp;
pub mod token;
pub mod update;
pub mod wire;
