//! Prints a record set, given as a file, with nothing at hand but the file.
//!
//! ```text
//! cargo run -p twinfs-examples --example read_set            makes a small set, prints it
//! cargo run -p twinfs-examples --example read_set FILE       prints the set in FILE
//! cargo run -p twinfs-examples --example read_set FILE 7     and writes the data of its update #7 to stdout
//! ```

use std::io::Write;

use anyhow::{Context, bail};
use twinfs_core::format::describe;
use twinfs_core::id::{
    Epoch, FileId, Incarnation, SessionId, SetHash, SetNumber, SiteId, VolumeInstance, VolumeName,
};
use twinfs_core::limits::SET_BYTES_MAX;
use twinfs_core::record_set::{Builder, SetMeta, SetPlace, UnverifiedSet, VerifiedSet};
use twinfs_core::stamp::{Seq, Stamp, Timestamp};
use twinfs_core::update::{Attr, Op, Update};

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args_os().skip(1);
    let bytes = match args.next() {
        Some(path) => {
            let len =
                std::fs::metadata(&path).with_context(|| format!("cannot read {}", path.display()))?.len();
            if len > SET_BYTES_MAX as u64 {
                bail!("{} is larger than any record set", path.display());
            }
            std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?
        }
        None => sample_set()?,
    };
    // Nothing is looked at before it is verified.
    let set = UnverifiedSet(bytes.into()).verify()?;
    let meta = set.meta()?;
    match args.next() {
        Some(seq) => {
            let seq = seq.to_str().and_then(|seq| seq.parse().ok()).context("not a sequence number")?;
            std::io::stdout().write_all(&data_of(&set, &meta, Seq(seq))?)?;
        }
        None => {
            let mut text = String::new();
            describe(&set, &meta, &mut text)?;
            print!("{text}");
        }
    }
    Ok(())
}

/// The data of one update: of the set, only the frames in which it stands are decompressed.
fn data_of(set: &VerifiedSet, meta: &SetMeta, seq: Seq) -> anyhow::Result<Vec<u8>> {
    let found = meta.updates.iter().find(|(update, _)| update.stamp.seq == seq);
    let (update, data_at) = found.context("no such update in this set")?;
    Ok(set.data(*data_at, update.op.data_len())?)
}

/// A set as a primary makes it: a file is created and written to.
fn sample_set() -> anyhow::Result<Vec<u8>> {
    let instance = VolumeInstance::new(0x0123_4567_89ab_cdef).context("zero is no instance")?;
    let (root, file) =
        (FileId { instance, ino: 2, generation: 0 }, FileId { instance, ino: 12, generation: 1 });
    let start = Timestamp(1_767_225_600_000_000_000);
    let stamp = |n| Stamp { time: Timestamp(start.0 + n * 1000), seq: Seq(n) };
    let attr = |size| Attr {
        mode: 0o100_644,
        uid: 1000,
        gid: 1000,
        nlink: 1,
        rdev: 0,
        size,
        mtime_s: 1_767_225_600,
        mtime_ns: 0,
    };
    let text = b"hello from the primary\n";
    let len = u32::try_from(text.len())?;
    let create = Op::Create { dir: root, name: &b"greeting.txt"[..], file, target: &b""[..] };
    let write = Op::<&[u8]>::Write { file, offset: 0, len };
    let mut builder = Builder::new();
    builder.push_update(
        &Update { stamp: stamp(1), op: create, attrs: [(file, attr(0))].into_iter().collect() },
        b"",
    )?;
    let attrs = [(file, attr(u64::from(len)))].into_iter().collect();
    builder.push_update(&Update { stamp: stamp(2), op: write, attrs }, text)?;
    builder.add_path(file, b"greeting.txt");
    let place = SetPlace {
        session: SessionId::from_bytes([1; 16]),
        volume: VolumeName::new("home")?,
        instance,
        root,
        epoch: Epoch { number: 1, site: SiteId::from_bytes([2; 16]) },
        incarnation: Incarnation(3),
        number: SetNumber(1),
        predecessor: SetHash::NONE,
        first_seq: Seq(1),
        start,
        end: Timestamp(start.0 + 50_000_000),
    };
    Ok(builder.finish(place, 1)?.bytes.to_vec())
}
