//! The estimate of a delta's memory is near what the process really takes. Alone in its process, so that nothing else
//! allocates meanwhile.

use twinfs_core::delta::{DataRef, Delta, SetLocation};
use twinfs_core::model::Model;
use twinfs_core::stamp::Stamp;
use twinfs_core::update::{Attr, Op, Update, sample_file};

/// Resident memory of this process, in bytes.
fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").expect("Linux has it");
    let pages = statm.split(' ').nth(1).expect("the second field is the resident size");
    pages.parse::<usize>().expect("a number") * 4096
}

fn check(what: &str, fold: impl FnOnce(&mut Delta)) {
    let before = resident();
    let mut delta = Delta::default();
    fold(&mut delta);
    let (real, estimate) = (resident().saturating_sub(before), delta.bytes());
    println!("{what}: estimated {estimate}, real {real}");
    assert!(real < estimate * 3 / 2, "{what}: estimated {estimate}, real {real}");
    assert!(real > estimate / 3, "{what}: estimated {estimate}, real {real}");
    // Never given back to the allocator, so that the next measurement does not find it free.
    std::mem::forget(delta);
}

#[test]
fn the_estimate_is_near_what_the_process_takes() {
    let root = sample_file(1);
    let dir = *Model::new(root).object(root).expect("the root is there").attr();
    let attr = Attr { mode: 0o100_644, nlink: 1, size: 1000, ..dir };
    let data = |n: u64| Some(DataRef { set: SetLocation { segment: n, offset: 0 }, offset: 0 });
    let fold = |delta: &mut Delta, op, file| {
        let attrs = [(root, dir), (file, attr)].into_iter().collect();
        let n = delta.bytes() as u64;
        delta.fold(&Update { stamp: Stamp::default(), op, attrs }, data(n));
    };
    check("new small files in one directory", |delta| {
        for ino in 0..40_000 {
            let (file, name) = (sample_file(100 + ino), format!("file-{ino}").into_bytes().into());
            fold(delta, Op::Create { dir: root, name, file, target: Box::default() }, file);
            fold(delta, Op::Write { file, offset: 0, len: 1000 }, file);
        }
    });
    check("random writes to one file", |delta| {
        let file = sample_file(5);
        for n in 0..100_000u64 {
            let offset = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20;
            fold(delta, Op::Write { file, offset, len: 100 }, file);
        }
    });
    check("a few scattered extents in many files", |delta| {
        for n in 0..100_000u64 {
            fold(
                delta,
                Op::Write { file: sample_file(n / 10), offset: n * 9000, len: 100 },
                sample_file(n / 10),
            );
        }
    });
    check("large xattrs", |delta| {
        for ino in 0..5000 {
            let op = Op::SetXattr {
                file: sample_file(ino),
                name: (*b"user.x").into(),
                value: vec![1; 5000].into(),
            };
            fold(delta, op, sample_file(ino));
        }
    });
}
