//! The FUSE layers of twinfs, and what its command is made of.
//!
//! The primary's capture layer, from the kernel down to the backing directory:
//!
//! * [`mount`] – puts a file system into the tree, takes it out again.
//! * [`fuse`] – the adapter: unpacks a request, calls, replies.
//! * [`mirror`] – the file system itself, callable without FUSE; its operations stand in `ops`.
//! * [`recorder`] – what the mirror tells of each change, and to whom.
//! * `recovery` – what a killed process left half done.
//! * [`activity`] – the list of touched files, for power loss.
//! * [`scan`] – looks for changes that nobody captured.
//! * [`copier`] – copies a volume while programs go on writing.
//! * [`inode`], [`handle`], [`fds`], [`stripes`], [`credentials`] – its tables, locks and identities.
//! * [`errno`] – the only map from errors to error numbers.
//! * [`holders`] – who could write past the mirror.
#![forbid(unsafe_code)]

pub mod activity;
pub mod cli;
pub mod copier;
mod copies;
pub mod credentials;
pub mod daemon;
pub mod errno;
pub mod fds;
pub mod fuse;
pub mod handle;
pub mod holders;
pub mod inode;
pub mod mirror;
pub mod mount;
mod ops;
pub mod primary;
pub mod recorder;
mod recovery;
pub mod replica;
pub mod replica_view;
pub mod scan;
pub mod slow;
pub mod stripes;
