//! Transports.

pub mod quic;
