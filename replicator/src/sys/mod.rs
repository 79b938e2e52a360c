//! The system calls that have no safe wrapper elsewhere. The only room of twinfs with unsafe code: each block says why
//! it is sound, and nothing here decides anything.
#![allow(unsafe_code)]

pub mod handle;
pub mod map;
pub mod thread;
