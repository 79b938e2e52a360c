//! Prints a record set for a person.

use std::fmt;

use super::VerifiedSet;
use crate::record_set::{SetHeader, SetMeta};
use crate::stamp::Timestamp;
use crate::update::{Attr, Kind, Op, Update};

/// Writes what a record set says: its header, its file table and each update, names escaped, times in UTC.
///
/// # Errors
/// Only those of `out`.
pub fn describe(set: &VerifiedSet, meta: &SetMeta, out: &mut impl fmt::Write) -> fmt::Result {
    describe_header(set, out)?;
    if set.header().is_null() {
        return Ok(());
    }
    writeln!(out, "files")?;
    for hint in &meta.files {
        write!(out, "  {:<24}", hint.file.to_string())?;
        let is_root = hint.file == set.header().root;
        match &*hint.path {
            [] if is_root => writeln!(out, "  the root of the volume")?,
            [] => writeln!(out, "  path not known")?,
            path => writeln!(out, "  {}", Escaped(path))?,
        }
    }
    writeln!(out, "updates")?;
    for (update, data_at) in &meta.updates {
        describe_update(update, *data_at, out)?;
    }
    Ok(())
}

fn describe_header(set: &VerifiedSet, out: &mut impl fmt::Write) -> fmt::Result {
    let header: &SetHeader = set.header();
    if header.is_null() {
        writeln!(out, "null set after record set {} of volume {}", header.number, header.volume)?;
    } else {
        writeln!(out, "record set {} of volume {}", header.number, header.volume)?;
    }
    writeln!(out, "  format       version {}, {} bytes", super::v1::VERSION, set.bytes().len())?;
    writeln!(out, "  hash         {}", set.hash())?;
    writeln!(out, "  predecessor  {}", header.predecessor)?;
    writeln!(out, "  session      {}", header.session)?;
    writeln!(out, "  epoch        {} of site {}", header.epoch.number, header.epoch.site)?;
    writeln!(out, "  incarnation  {:016x}", header.incarnation.0)?;
    writeln!(out, "  instance     {}, root {}", header.instance, header.root)?;
    writeln!(out, "  interval     after {}", header.start)?;
    writeln!(out, "               to    {}", header.end)?;
    if header.is_null() {
        return writeln!(out, "  updates      none; the next one is #{}", header.first_seq);
    }
    let (first, last) = (header.first_seq, header.last_seq());
    writeln!(out, "  updates      {}, #{first} to #{last}", header.updates)?;
    for (name, len, frames) in [
        ("metadata", header.meta_len, set.frames().meta_frames()),
        ("data", header.data_len, set.frames().data_frames()),
    ] {
        let stored: u32 = frames.iter().map(|frame| frame.stored_len).sum();
        writeln!(out, "  {name:<11}  {len} bytes, stored in {stored}, frames: {}", frames.len())?;
    }
    Ok(())
}

fn describe_update(update: &Update, data_at: u32, out: &mut impl fmt::Write) -> fmt::Result {
    write!(out, "  #{} {} {} ", update.stamp.seq, update.stamp.time, update.op.kind())?;
    match &update.op {
        Op::Write { file, offset, len } => {
            write!(out, "{file} at {offset}, {len} bytes (data section at {data_at})")?;
        }
        Op::Truncate { file, size } => write!(out, "{file} to {size} bytes")?,
        Op::Zero { file, offset, len, hole } => {
            write!(out, "{file} at {offset}, {len} bytes{}", if *hole { ", a hole" } else { "" })?;
        }
        Op::Collapse { file, offset, len } | Op::Insert { file, offset, len } => {
            write!(out, "{file} at {offset}, {len} bytes")?;
        }
        Op::Create { dir, name, file, target } => {
            write!(out, "{} in {dir}: {file}", Escaped(name))?;
            describe_target(target, out)?;
        }
        Op::Link { dir, name, file } | Op::Unlink { dir, name, file } | Op::Bind { dir, name, file } => {
            write!(out, "{} in {dir}: {file}", Escaped(name))?;
        }
        Op::Rename { from_dir, from, to_dir, to, file, replaced } => {
            write!(out, "{} in {from_dir} to {} in {to_dir}: {file}", Escaped(from), Escaped(to))?;
            if let Some(replaced) = replaced {
                write!(out, ", over {replaced}")?;
            }
        }
        Op::Exchange { a_dir, a, a_file, b_dir, b, b_file } => {
            write!(out, "{} in {a_dir}: {a_file} with ", Escaped(a))?;
            write!(out, "{} in {b_dir}: {b_file}", Escaped(b))?;
        }
        Op::SetAttr { file } => write!(out, "{file}")?,
        Op::SetXattr { file, name, value } => {
            write!(out, "{file} {}, {} bytes", Escaped(name), value.len())?;
        }
        Op::RemoveXattr { file, name } => write!(out, "{file} {}", Escaped(name))?,
        Op::Object { file, target } => {
            write!(out, "{file}")?;
            describe_target(target, out)?;
        }
        Op::Complete => write!(out, "the volume is whole")?,
        Op::Resync => write!(out, "the volume is not whole until the next mark")?,
        Op::Unbind { dir, name } => write!(out, "{} in {dir}", Escaped(name))?,
    }
    writeln!(out)?;
    for (file, attr) in update.attrs.iter() {
        write!(out, "      {file}: ")?;
        describe_attr(attr, out)?;
    }
    Ok(())
}

fn describe_target(target: &[u8], out: &mut impl fmt::Write) -> fmt::Result {
    if target.is_empty() { Ok(()) } else { write!(out, " -> {}", Escaped(target)) }
}

fn describe_attr(attr: &Attr, out: &mut impl fmt::Write) -> fmt::Result {
    let kind = match attr.kind() {
        Some(Kind::File) => "file",
        Some(Kind::Dir) => "directory",
        Some(Kind::Symlink) => "symlink",
        Some(Kind::Fifo) => "fifo",
        Some(Kind::Socket) => "socket",
        Some(Kind::CharDevice) => "character device",
        Some(Kind::BlockDevice) => "block device",
        None => "unknown kind",
    };
    write!(out, "{kind} {:04o}, owner {}:{}", attr.mode & 0o7777, attr.uid, attr.gid)?;
    write!(out, ", links {}, {} bytes", attr.nlink, attr.size)?;
    if matches!(attr.kind(), Some(Kind::CharDevice | Kind::BlockDevice)) {
        write!(out, ", device {:#x}", attr.rdev)?;
    }
    let ns = u64::try_from(attr.mtime_s).ok().and_then(|seconds| seconds.checked_mul(1_000_000_000));
    match ns.and_then(|ns| ns.checked_add(u64::from(attr.mtime_ns))) {
        Some(ns) => writeln!(out, ", modified {}", Timestamp(ns)),
        // Before 1970 or after 2554: files say such things, and are copied with them.
        None => writeln!(out, ", modified {} s and {} ns from 1970", attr.mtime_s, attr.mtime_ns),
    }
}

/// Prints a name or path in double quotes so that no byte of it can do anything to a terminal or a log: text stays
/// readable, the rest is escaped.
#[derive(Debug, Clone, Copy)]
pub struct Escaped<'a>(pub &'a [u8]);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("\"")?;
        for chunk in self.0.utf8_chunks() {
            write!(f, "{}", chunk.valid().escape_debug())?;
            chunk.invalid().iter().try_for_each(|b| write!(f, "\\x{b:02x}"))?;
        }
        f.write_str("\"")
    }
}
