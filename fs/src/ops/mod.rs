//! The operations of the [`Mirror`](crate::mirror::Mirror).

pub(crate) mod attr;
pub(crate) mod data;
pub(crate) mod dir;
pub(crate) mod namespace;
pub(crate) mod partial;
pub(crate) mod space;
pub(crate) mod xattr;
