//! The primary: sidefile, stamps, data mover.

pub mod clock;
pub mod mover;
pub mod sidefile;
