//! twinfs with I/O: it drives the core.
#![deny(unsafe_code)]

pub mod control;
pub mod failpoint;
pub mod primary;
pub mod replica;
pub mod site;
pub mod status;
pub mod storage;
pub mod sys;
pub mod transport;
