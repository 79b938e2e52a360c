//! Transports: how messages, tokens and record sets get from site to site.
//!
//! A transport knows nothing of what it carries. It proves who the other side is, keeps messages whole and bounded, and
//! hands out three kinds of things as [`Event`]s: control messages (in order), batches of tokens (in order), and record
//! sets (each on its own, in any order).

mod congestion;
mod error;
mod link;
mod options;
pub mod quic;
#[cfg(test)]
mod tests;

pub use error::{CloseCode, ConnectError, LinkError, ListenError};
pub use link::{Event, Link, LinkEvents};
