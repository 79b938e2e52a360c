//! Byte formats, a module for each version. A reader looks at the version first and refuses what it does not know.
//!
//! What the rest of the system uses is re-exported here, so that a later version changes no caller.

pub mod v1;

mod describe;
mod error;

pub use describe::{Escaped, describe};
pub use error::{BadSet, BuildError};
pub use v1::{
    Builder, EncodedSet, Frame, FrameIndex, SetPlace, SetPrefix, Unpacker, UnverifiedSet, VerifiedSet,
};
