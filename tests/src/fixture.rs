//! A directory with one of everything in it, as an initial copy may find it.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt, symlink};
use std::path::Path;
use std::process::Command;

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags, makedev, mkdirat,
    mknodat, openat, utimensat,
};

use crate::ops::Rng;
use crate::process::run;

/// How much there is of what counts.
#[derive(Debug, Clone, Copy)]
pub struct Amounts {
    /// Small files.
    pub files: u64,
    /// Bytes of one large file that does not compress.
    pub bytes: u64,
}

/// Fills `root` with everything that a tree can hold.
///
/// # Panics
/// If the file system refuses.
pub fn fill(root: &Path, amounts: Amounts, seed: u64) {
    let mut random = Rng(seed);
    small_files(&root.join("small"), amounts.files, &mut random);
    large_file(&root.join("large"), amounts.bytes, &mut random);
    sparse_files(root, &mut random);
    kinds(&root.join("kinds"));
    odd_names(&root.join("names"));
    deep_path(root);
    attributes(&root.join("attributes"));
    links(&root.join("links"));
}

fn small_files(dir: &Path, count: u64, random: &mut Rng) {
    for index in 0..count {
        let parent = dir.join(format!("{}/{}", index % 17, index % 5));
        if index < 17 * 5 {
            std::fs::create_dir_all(&parent).expect("a directory");
        }
        let len = random.below(6000) as usize;
        std::fs::write(parent.join(format!("file {index}")), random.bytes(len)).expect("a file");
    }
}

fn large_file(path: &Path, bytes: u64, random: &mut Rng) {
    let mut file = File::create(path).expect("a file");
    let mut left = bytes as usize;
    while left > 0 {
        let mut block = vec![0; left.min(1 << 20)];
        block.chunks_mut(8).for_each(|word| {
            let value = random.next_u64().to_le_bytes();
            word.copy_from_slice(&value[..word.len()]);
        });
        file.write_all(&block).expect("room");
        left -= block.len();
    }
}

fn sparse_files(root: &Path, random: &mut Rng) {
    let file = File::create(root.join("sparse")).expect("a file");
    for offset in [0, 10 << 20, (3 << 40) + 5, (8 << 40) - 100] {
        let data = random.bytes(5000);
        file.write_all_at(&data, offset).expect("sparse files are possible");
    }
    let file = File::create(root.join("hole only")).expect("a file");
    file.set_len(5 << 30).expect("a hole");
    let file = File::create(root.join("data and holes")).expect("a file");
    for block in (0..400).step_by(2) {
        file.write_all_at(&random.bytes(4096), block * 4096).expect("room");
    }
    std::fs::write(root.join("zeros"), vec![0; 100_000]).expect("a file");
}

fn kinds(dir: &Path) {
    std::fs::create_dir_all(dir.join("empty directory")).expect("a directory");
    std::fs::write(dir.join("empty"), b"").expect("a file");
    let at = |name: &str, kind, device| {
        mknodat(CWD, dir.join(name), kind, Mode::from_raw_mode(0o624), device).expect("a node");
    };
    at("fifo", FileType::Fifo, 0);
    at("socket", FileType::Socket, 0);
    at("character device", FileType::CharacterDevice, makedev(1, 3));
    at("block device", FileType::BlockDevice, makedev(7, 250));
    symlink("../small", dir.join("symlink")).expect("a symlink");
    symlink("/nowhere/at all", dir.join("dangling")).expect("a symlink");
    symlink("x".repeat(4000), dir.join("long symlink")).expect("a symlink");
}

fn odd_names(dir: &Path) {
    use std::os::unix::ffi::OsStrExt;
    std::fs::create_dir(dir).expect("a directory");
    let every_byte: Vec<u8> = (1..=255).filter(|byte| *byte != b'/').collect();
    let names: [&[u8]; 9] = [
        &every_byte,
        b" ",
        b"-rf",
        b"...",
        b"new\nline",
        b"\xff\xfe not utf-8",
        "\u{1f4be}\u{202e}".as_bytes(),
        b"a\\b'c\"d$e*?",
        &[b'n'; 255],
    ];
    for name in names {
        std::fs::write(dir.join(std::ffi::OsStr::from_bytes(name)), name).expect("any name is possible");
    }
}

/// A path that no single call can name: longer than `PATH_MAX`.
fn deep_path(root: &Path) {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut dir = openat(CWD, root, flags, Mode::empty()).expect("the root opens");
    let name = "d".repeat(220);
    for _ in 0..25 {
        mkdirat(&dir, &name, Mode::from_raw_mode(0o755)).expect("a directory");
        dir = openat(&dir, &name, flags, Mode::empty()).expect("a directory opens");
    }
    let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC;
    let file = openat(&dir, "bottom", flags, Mode::from_raw_mode(0o600)).expect("a file");
    rustix::io::write(&file, b"deep").expect("room");
}

fn attributes(dir: &Path) {
    std::fs::create_dir(dir).expect("a directory");
    for mode in [0o000, 0o400, 0o4755, 0o2755, 0o6711, 0o1666, 0o7777] {
        let path = dir.join(format!("mode {mode:o}"));
        let mut file =
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).expect("a file");
        file.write_all(b"contents").expect("room");
        rustix::fs::fchmod(&file, Mode::from_raw_mode(mode)).expect("a mode");
    }
    std::fs::create_dir(dir.join("sticky")).expect("a directory");
    rustix::fs::chmod(dir.join("sticky"), Mode::from_raw_mode(0o3777)).expect("a mode");
    for id in [1, 1000, 65_534, 4_000_000_000] {
        let path = dir.join(format!("owner {id}"));
        std::fs::write(&path, b"owned").expect("a file");
        rustix::fs::chown(&path, Some(Uid::from_raw(id)), Some(Gid::from_raw(id))).expect("an owner");
    }
    let path = dir.join("xattrs");
    std::fs::write(&path, b"with xattrs").expect("a file");
    for (name, value) in [("user.empty", &b""[..]), ("user.binary", &[0, 255, 10]), ("trusted.root", b"yes")]
    {
        rustix::fs::setxattr(&path, name, value, XattrFlags::empty()).expect("an xattr");
    }
    rustix::fs::setxattr(&path, "user.large", &[b'v'; 2000], XattrFlags::empty()).expect("an xattr");
    rustix::fs::setxattr(dir, "user.on a directory", b"1", XattrFlags::empty()).expect("an xattr");
    let acl = dir.join("acl");
    std::fs::create_dir(&acl).expect("a directory");
    run(Command::new("setfacl").args(["-m", "u:1:rwx,g:2:r,d:u:3:rw,d:g:4:x"]).arg(&acl));
    std::fs::write(acl.join("inherited"), b"acl").expect("a file");
    for (name, seconds, nanoseconds) in
        [("old", 1, 1), ("before the epoch", -1_000_000_000, 5), ("far", 4_294_967_296, 999_999_999)]
    {
        std::fs::write(dir.join(name), b"time").expect("a file");
        set_time(&dir.join(name), seconds, nanoseconds);
    }
    std::fs::create_dir(dir.join("old directory")).expect("a directory");
    std::fs::write(dir.join("old directory/new file"), b"time").expect("a file");
    set_time(&dir.join("old directory"), 77, 77);
    symlink("nothing", dir.join("old symlink")).expect("a symlink");
    set_time(&dir.join("old symlink"), 78, 78);
}

fn set_time(path: &Path, tv_sec: i64, tv_nsec: i64) {
    let time = Timespec { tv_sec, tv_nsec };
    let times = Timestamps { last_access: time, last_modification: time };
    utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).expect("a time");
}

fn links(dir: &Path) {
    std::fs::create_dir_all(dir.join("a/b")).expect("directories");
    std::fs::write(dir.join("one"), b"linked").expect("a file");
    for name in ["two", "a/three", "a/b/four"] {
        std::fs::hard_link(dir.join("one"), dir.join(name)).expect("a hard link");
    }
    mknodat(CWD, dir.join("fifo"), FileType::Fifo, Mode::from_raw_mode(0o600), 0).expect("a fifo");
    std::fs::hard_link(dir.join("fifo"), dir.join("a/same fifo")).expect("a hard link");
    symlink("one", dir.join("symlink")).expect("a symlink");
    std::fs::hard_link(dir.join("symlink"), dir.join("a/same symlink")).expect("a hard link");
}
