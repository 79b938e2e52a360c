//! What programs must not notice, and what they must: single behaviours of the mount, each with what it records.
#![allow(clippy::unwrap_used, reason = "these are tests")]

mod support;

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::{CWD, XattrFlags};
use rustix::io::Errno;
use support::replay::{Tree, xattrs};
use support::{Mirrored, Tape, VOLUME, mirror_of};
use twinfs::fuse;
use twinfs::inode::ROOT;
use twinfs::mirror::{Caller, Layout, Mirror, NewNode, SetupError, VolumeSource, open_source};
use twinfs::mount::{MountOptions, Place, Unmounted};
use twinfs_core::id::{VolumeIndex, VolumeInstance, VolumeName};
use twinfs_core::update::{Op, OpKind};

const NOBODY: u32 = 65_534;

/// Runs a shell script as nobody in a directory; what it prints.
fn as_nobody(dir: &Path, script: &str) -> String {
    let output =
        Command::new("sh").args(["-ec", script]).current_dir(dir).uid(NOBODY).gid(NOBODY).output().unwrap();
    assert!(output.status.success(), "{script}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn replayed(mirrored: &Mirrored) {
    let mut tree = Tree { complete: true, ..Tree::new(mirrored.mirror.root_of(VOLUME).unwrap()) };
    for (_, update, data) in mirrored.tape.take() {
        tree.apply(&update, &data);
    }
    let differences = tree.differences(&mirrored.source);
    assert!(differences.is_empty(), "{differences:#?}");
}

fn errno<T: std::fmt::Debug>(result: std::io::Result<T>) -> i32 {
    result.unwrap_err().raw_os_error().unwrap()
}

fn open_to_all(mirrored: &Mirrored) {
    // Nobody must get through the directory for temporary files, which is private.
    let parent = mirrored.mountpoint.parent().unwrap();
    for each in [parent, &mirrored.mountpoint] {
        std::fs::set_permissions(each, PermissionsExt::from_mode(0o777)).unwrap();
    }
}

#[test]
fn files_belong_to_the_caller_and_writing_clears_set_id_bits_at_once() {
    let mirrored = Mirrored::new();
    open_to_all(&mirrored);
    as_nobody(&mirrored.mountpoint, "umask 027; mkdir d; echo x > d/f; ln -s f d/l; mkfifo d/p");
    for (name, mode) in [("d", 0o40_750), ("d/f", 0o100_640), ("d/p", 0o10_640), ("d/l", 0o120_777)] {
        let stat = mirrored.source.join(name).symlink_metadata().unwrap();
        assert_eq!((stat.uid(), stat.gid(), stat.mode()), (NOBODY, NOBODY, mode), "{name}");
    }
    let file = mirrored.mountpoint.join("f");
    for script in [
        "echo x >> f",
        ": > f",
        "fallocate -l 9000 f",
        "truncate -s 3 f",
        "head -c 9 /dev/zero | dd of=f conv=notrunc status=none",
    ] {
        std::fs::write(&file, "program").unwrap();
        std::fs::set_permissions(&file, PermissionsExt::from_mode(0o6777)).unwrap();
        let seen = as_nobody(&mirrored.mountpoint, &format!("stat -c %a f; {script}; stat -c %a f"));
        assert_eq!(seen, "6777\n777\n", "{script}");
    }
    std::fs::set_permissions(&file, PermissionsExt::from_mode(0o6777)).unwrap();
    OpenOptions::new().append(true).open(&file).unwrap().write_all(b"by root").unwrap();
    assert_eq!(file.metadata().unwrap().mode() & 0o7777, 0o6777, "root keeps the bits");
    std::os::unix::fs::chown(&file, Some(1), None).unwrap();
    assert_eq!(file.metadata().unwrap().mode() & 0o7777, 0o777, "a change of owner clears them for all");
    replayed(&mirrored);
}

/// `u::rw-,u:7:rwx,g::r--,m::rwx,o::---`, as the kernel encodes it.
fn acl(mask: u16) -> Vec<u8> {
    let mut bytes = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in
        [(1, 6, u32::MAX), (2, 7, 7), (4, 4, u32::MAX), (16, mask, u32::MAX), (32, 0, u32::MAX)]
    {
        bytes.extend(u16::to_le_bytes(tag));
        bytes.extend(u16::to_le_bytes(permissions));
        bytes.extend(u32::to_le_bytes(id));
    }
    bytes
}

#[test]
fn acls_are_inherited_follow_the_mode_and_are_recorded() {
    let mirrored = Mirrored::new();
    let dir = mirrored.mountpoint.join("d");
    std::fs::create_dir(&dir).unwrap();
    rustix::fs::setxattr(&dir, "system.posix_acl_default", &acl(7), XattrFlags::empty()).unwrap();
    std::fs::write(dir.join("f"), "x").unwrap();
    std::fs::create_dir_all(dir.join("sub/deep")).unwrap();
    let inherited = xattrs(&mirrored.source.join("d/sub"));
    assert_eq!(inherited.len(), 2, "{inherited:?}");
    std::fs::set_permissions(dir.join("f"), PermissionsExt::from_mode(0o640)).unwrap();
    assert_eq!(xattrs(&mirrored.source.join("d/f"))[b"system.posix_acl_access".as_slice()], acl(4));
    assert_eq!(
        xattrs(&dir.join("f"))[b"system.posix_acl_access".as_slice()],
        acl(4),
        "the kernel's cache follows"
    );
    // One that says no more than the mode is not kept.
    let minimal =
        [acl(0)[..4].to_vec(), acl(0)[4..12].to_vec(), acl(0)[20..28].to_vec(), acl(0)[36..].to_vec()]
            .concat();
    rustix::fs::setxattr(dir.join("f"), "system.posix_acl_access", &minimal, XattrFlags::empty()).unwrap();
    assert!(xattrs(&mirrored.source.join("d/f")).is_empty());
    replayed(&mirrored);
}

#[test]
fn writing_takes_file_capabilities_away_and_that_is_recorded() {
    let mirrored = Mirrored::new();
    let path = mirrored.mountpoint.join("f");
    let file = File::create(&path).unwrap();
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    for round in 0..6 {
        file.write_at(b"x", round).unwrap();
        rustix::fs::setxattr(&path, "security.capability", &capability, XattrFlags::empty()).unwrap();
        assert_eq!(xattrs(&mirrored.source.join("f")).len(), 1);
        match round {
            0 => std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap(),
            1 => file.set_len(100).unwrap(),
            2 => std::os::unix::fs::chown(&path, Some(3), None).unwrap(),
            3 => rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, 10).unwrap(),
            4 => drop(File::create(&path).unwrap()),
            _ => drop(file.write_at(b"y", 3).unwrap()),
        }
        assert_eq!(xattrs(&mirrored.source.join("f")).len(), usize::from(round == 0), "round {round}");
    }
    replayed(&mirrored);
}

#[test]
fn a_fenced_site_is_read_only() {
    let mirrored = Mirrored::new();
    let path = mirrored.mountpoint.join("f");
    let file = File::create(&path).unwrap();
    std::fs::write(&path, "before").unwrap();
    mirrored.tape.take();
    mirrored.tape.fenced.store(true, Ordering::SeqCst);
    let rofs = Errno::ROFS.raw_os_error();
    assert_eq!(errno(file.write_at(b"x", 0)), rofs);
    assert_eq!(errno(std::fs::write(&path, "x")), rofs);
    assert_eq!(errno(std::fs::remove_file(&path)), rofs);
    assert_eq!(errno(std::fs::create_dir(mirrored.mountpoint.join("d"))), rofs);
    assert_eq!(errno(std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600))), rofs);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "before");
    assert!(mirrored.tape.take().is_empty());
}

#[test]
fn our_own_xattrs_are_hidden_and_trusted_ones_are_roots() {
    let mirrored = Mirrored::new();
    open_to_all(&mirrored);
    let path = mirrored.mountpoint.join("f");
    std::fs::write(&path, "x").unwrap();
    let beneath = mirrored.source.join("f");
    let flags = XattrFlags::empty();
    rustix::fs::setxattr(&beneath, "trusted.twinfs.id", b"secret", flags).unwrap();
    for name in ["user.a", "trusted.b"] {
        rustix::fs::setxattr(&path, name, b"value", flags).unwrap();
    }
    assert_eq!(rustix::fs::setxattr(&path, "trusted.twinfs.x", b"", flags), Err(Errno::PERM));
    assert_eq!(rustix::fs::removexattr(&path, "trusted.twinfs.id"), Err(Errno::PERM));
    assert_eq!(rustix::fs::getxattr_query(&path, "trusted.twinfs.id"), Err(Errno::NODATA));
    let shown: Vec<Vec<u8>> = xattrs(&path).into_keys().collect();
    assert_eq!(shown, [b"trusted.b".to_vec(), b"user.a".to_vec()]);
    let python = "import os; print(os.listxattr('f'))";
    if Command::new("python3").arg("-c").arg("0").status().is_ok_and(|status| status.success()) {
        assert_eq!(as_nobody(&mirrored.mountpoint, &format!("python3 -c \"{python}\"")), "['user.a']\n");
    }
    assert_eq!(rustix::fs::setxattr(&path, "user.a", b"", XattrFlags::CREATE), Err(Errno::EXIST));
    assert_eq!(rustix::fs::getxattr(&path, "user.a", &mut [0_u8; 2][..]), Err(Errno::RANGE));
}

#[test]
fn names_may_hold_any_byte_and_paths_may_be_long() {
    use rustix::fs::{Mode, OFlags, mkdirat, openat};
    let mirrored = Mirrored::new();
    let mut name: Vec<u8> = (1..=255).filter(|byte| *byte != b'/').collect();
    name.push(b'x');
    let mut dir = rustix::fs::open(&mirrored.mountpoint, OFlags::DIRECTORY, Mode::empty()).unwrap();
    for _ in 0..40 {
        mkdirat(&dir, name.as_slice(), Mode::from_raw_mode(0o755)).unwrap();
        dir = openat(&dir, name.as_slice(), OFlags::DIRECTORY, Mode::empty()).unwrap();
    }
    let file = openat(&dir, "deep", OFlags::CREATE | OFlags::RDWR, Mode::from_raw_mode(0o644)).unwrap();
    rustix::io::write(&file, b"down here").unwrap();
    let updates = mirrored.tape.take();
    let (_, last, data) = updates.last().unwrap();
    assert_eq!((last.op.kind(), data.as_slice()), (OpKind::Write, b"down here".as_slice()));
    let path = mirrored.mirror.path_of(VOLUME, last.op.files()[0].unwrap());
    assert!(path.ends_with(b"x/deep") && path.len() >= 4095);
    let long = [b'n'; 256];
    assert_eq!(mkdirat(&dir, long.as_slice(), Mode::empty()), Err(Errno::NAMETOOLONG));
    assert_eq!(rustix::fs::renameat(&dir, "deep", &dir, long.as_slice()), Err(Errno::NAMETOOLONG));
}

#[test]
fn removed_files_and_directories_live_on_for_those_who_have_them_open() {
    let mirrored = Mirrored::new();
    let at = |name: &str| mirrored.mountpoint.join(name);
    let file = OpenOptions::new().create_new(true).read(true).write(true).open(at("f")).unwrap();
    std::fs::write(at("over"), "new").unwrap();
    std::fs::rename(at("over"), at("f")).unwrap();
    std::fs::create_dir(at("d")).unwrap();
    let dir = File::open(at("d")).unwrap();
    std::fs::remove_dir(at("d")).unwrap();
    // These are known to the kernel only: nothing is open below.
    let path_only =
        |name: &str| rustix::fs::open(at(name), rustix::fs::OFlags::PATH, rustix::fs::Mode::empty()).unwrap();
    std::fs::write(at("p"), "x").unwrap();
    std::fs::create_dir(at("q")).unwrap();
    let (lone_file, lone_dir) = (path_only("p"), path_only("q"));
    std::fs::remove_file(at("p")).unwrap();
    std::fs::remove_dir(at("q")).unwrap();
    let ino = |fd: &std::os::fd::OwnedFd| rustix::fs::fstat(fd).unwrap().st_ino;
    let held =
        [file.metadata().unwrap().ino(), dir.metadata().unwrap().ino(), ino(&lone_file), ino(&lone_dir)];
    // Numbers of removed objects are not given away while somebody holds them.
    for number in 0..300 {
        std::fs::write(at(&format!("n{number}")), "x").unwrap();
        let ino = at(&format!("n{number}")).metadata().unwrap().ino();
        assert!(!held.contains(&ino));
    }
    for (fd, mode) in [(&lone_file, 0o640), (&lone_dir, 0o750)] {
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(fd));
        std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
        assert_eq!(rustix::fs::fstat(fd).unwrap().st_mode & 0o777, mode);
    }
    file.write_at(b"still here", 0).unwrap();
    file.set_len(5).unwrap();
    file.set_permissions(PermissionsExt::from_mode(0o600)).unwrap();
    rustix::fs::fsetxattr(&file, "user.x", b"1", XattrFlags::empty()).unwrap();
    rustix::fs::fchown(&file, None, Some(rustix::fs::Gid::from_raw(5))).unwrap();
    let again = File::open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file))).unwrap();
    let mut text = String::new();
    (&again).read_to_string(&mut text).unwrap();
    let stat = file.metadata().unwrap();
    assert_eq!((text.as_str(), stat.nlink(), stat.gid(), stat.mode() & 0o777), ("still", 0, 5, 0o600));
    let no_entry = rustix::fs::mkdirat(&dir, "sub", rustix::fs::Mode::empty());
    assert_eq!(no_entry, Err(Errno::NOENT));
    assert_eq!(dir.metadata().unwrap().nlink(), 0);
    drop((file, again, dir, lone_file, lone_dir));
    replayed(&mirrored);
}

#[test]
fn space_of_removed_files_is_freed() {
    let mirrored = Mirrored::new();
    let path = mirrored.mountpoint.join("f");
    std::fs::write(&path, vec![1; 8 << 20]).unwrap();
    let ino = path.metadata().unwrap().ino();
    std::fs::remove_file(&path).unwrap();
    // The kernel forgets a node some time after its last use; then nothing here may hold the inode.
    for _ in 0..200 {
        let held = std::fs::read_dir("/proc/self/fd")
            .unwrap()
            .flatten()
            .any(|fd| std::fs::metadata(fd.path()).is_ok_and(|stat| stat.ino() == ino && stat.nlink() == 0));
        if !held {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    panic!("a removed file is held for ever");
}

#[test]
fn times_are_exact_also_before_1970_and_when_a_file_stays_empty() {
    use rustix::fs::{AtFlags, Timespec, Timestamps, utimensat};
    let mirrored = Mirrored::new();
    let path = mirrored.mountpoint.join("f");
    File::create(&path).unwrap();
    let at = |tv_sec, tv_nsec| Timespec { tv_sec, tv_nsec };
    for (seconds, nanoseconds) in [(-5, 7), (0, 0), (3_000_000_000, 999_999_999)] {
        let times = Timestamps { last_access: at(1, 2), last_modification: at(seconds, nanoseconds) };
        utimensat(CWD, &path, &times, AtFlags::empty()).unwrap();
        for each in [&path, &mirrored.source.join("f")] {
            let stat = each.metadata().unwrap();
            assert_eq!((stat.mtime(), stat.mtime_nsec()), (seconds, nanoseconds));
        }
    }
    File::create(&path).unwrap();
    assert!(path.metadata().unwrap().mtime() < 3_000_000_000, "O_TRUNC sets the time of an empty file");
    replayed(&mirrored);
}

#[test]
fn shared_mappings_are_recorded_when_they_are_written_back() {
    let mirrored = Mirrored::new();
    let path = mirrored.mountpoint.join("f");
    std::fs::write(&path, vec![b'.'; 10_000]).unwrap();
    let python = "import mmap,sys; f=open(sys.argv[1],'r+b'); m=mmap.mmap(f.fileno(),0); f.close(); \
                  m[5000:5005]=b'hello'; m.flush(); m[9000:9003]=b'end'; m.close()";
    match Command::new("python3").args(["-c", python]).arg(&path).status() {
        Ok(status) => assert!(status.success()),
        Err(_) => return, // fsx tests mappings in depth; this is for a quick answer.
    }
    File::open(&path).unwrap().sync_all().unwrap();
    assert_eq!(&std::fs::read(mirrored.source.join("f")).unwrap()[5000..5005], b"hello");
    replayed(&mirrored);
}

#[test]
fn ranges_are_cut_out_opened_and_copied() {
    const BLOCK: usize = 4096;
    let dir = tempfile::tempdir().unwrap();
    let tape = Arc::new(Tape::default());
    let mirror = mirror_of(dir.path(), tape.clone());
    // FUSE lets neither collapse nor insert through, so this goes past it.
    let (_, fh) = mirror.create(Caller::ROOT, ROOT, b"f", 0o644, 0, libc::O_RDWR).unwrap();
    let node = mirror.lookup(ROOT, b"f").unwrap().unwrap().nodeid;
    for block in 0..4 {
        let data = [b'a' + block; BLOCK];
        mirror.write(node, fh, u64::from(block) * BLOCK as u64, &data, false, false).unwrap();
    }
    let block = BLOCK as u64;
    let collapse = libc::FALLOC_FL_COLLAPSE_RANGE.cast_unsigned();
    if mirror.fallocate(Caller::ROOT, fh, block, block, collapse).is_err() {
        return; // Not every file system can.
    }
    mirror
        .fallocate(Caller::ROOT, fh, 2 * block, block, libc::FALLOC_FL_INSERT_RANGE.cast_unsigned())
        .unwrap();
    assert_eq!(mirror.fallocate(Caller::ROOT, fh, 0, 1, 0x80).unwrap_err().errno(), Errno::OPNOTSUPP);
    let mut buffer = Vec::new();
    mirror.copy_range(Caller::ROOT, (fh, 0), (fh, 5 * block), 2 * block, &mut buffer).unwrap();
    let written = std::fs::read(dir.path().join("f")).unwrap();
    let blocks: Vec<u8> = written.chunks(BLOCK).map(|chunk| chunk[0]).collect();
    assert_eq!(blocks, *b"ac\0d\0ac");
    let mut tree = Tree { complete: true, ..Tree::new(mirror.root_of(VOLUME).unwrap()) };
    let kinds: Vec<OpKind> = tape
        .take()
        .iter()
        .map(|(_, update, data)| {
            tree.apply(update, data);
            update.op.kind()
        })
        .collect();
    assert_eq!(kinds[5..], [OpKind::Collapse, OpKind::Insert, OpKind::Write]);
    assert!(tree.differences(dir.path()).is_empty());
}

#[test]
fn failures_and_nothings_leave_no_record() {
    let mirrored = Mirrored::new();
    let at = |name: &str| mirrored.mountpoint.join(name);
    std::fs::create_dir(at("d")).unwrap();
    std::fs::write(at("d/f"), "x").unwrap();
    std::fs::hard_link(at("d/f"), at("d/g")).unwrap();
    mirrored.tape.take();
    std::fs::rename(at("d/f"), at("d/g")).unwrap();
    assert!(at("d/f").exists(), "two names of one file: nothing happens");
    assert!(std::fs::remove_dir(at("d")).is_err());
    assert!(std::fs::rename(at("none"), at("other")).is_err());
    assert!(std::fs::rename(at("d"), at("d/into")).is_err());
    assert!(std::fs::hard_link(at("d"), at("e")).is_err());
    assert!(std::fs::create_dir(at("d")).is_err());
    assert!(std::fs::write(at("d"), "x").is_err());
    assert!(OpenOptions::new().write(true).create_new(true).open(at("d/f")).is_err());
    let records = mirrored.tape.take();
    assert!(records.is_empty(), "{records:?}");
}

#[test]
fn a_mirror_goes_over_its_own_source_and_shows_nothing_mounted_below() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    std::fs::create_dir_all(source.join("nested")).unwrap();
    std::fs::write(source.join("nested/beneath"), "x").unwrap();
    let run = |command: &str| {
        let done = Command::new("sh").args(["-ec", command]).current_dir(dir.path()).status().unwrap();
        assert!(done.success(), "{command}");
    };
    run("mount -t tmpfs none source/nested; touch source/nested/above");
    let nested = twinfs::holders::nested_mounts(&source).unwrap();
    let tape = Arc::new(Tape::default());
    let mounted = fuse::mount(mirror_of(&source, tape.clone()), &source, &MountOptions::default()).unwrap();
    let shown = [source.join("nested/beneath").exists(), source.join("nested/above").exists()];
    std::fs::write(source.join("f"), "through the mirror").unwrap();
    let gone = mounted.unmount().unwrap();
    run("umount source/nested");
    assert_eq!(nested, [source.join("nested").canonicalize().unwrap()]);
    assert_eq!((shown, gone), ([true, false], Unmounted::Clean));
    assert_eq!(std::fs::read_to_string(source.join("f")).unwrap(), "through the mirror");
    assert_eq!(tape.take().len(), 2);
}

#[test]
fn an_unmount_from_outside_ends_the_session_and_a_busy_mount_is_detached() {
    let dir = tempfile::tempdir().unwrap();
    let (source, mountpoint) = (dir.path().join("source"), dir.path().join("mount"));
    std::fs::create_dir(&source).unwrap();
    std::fs::create_dir(&mountpoint).unwrap();
    let mount = || {
        let mirror = mirror_of(&source, Arc::new(Tape::default()));
        fuse::mount(mirror, &mountpoint, &MountOptions::default()).unwrap()
    };
    let mounted = mount();
    rustix::mount::unmount(&mountpoint, rustix::mount::UnmountFlags::empty()).unwrap();
    mounted.wait().unwrap();
    assert_eq!(mounted.unmount().unwrap(), Unmounted::NotOurs);

    let mounted = mount();
    let mut file = File::create(mountpoint.join("f")).unwrap();
    assert_eq!(mounted.unmount().unwrap(), Unmounted::Detached);
    file.write_all(b"to the end").unwrap();
    assert!(mounted.wait_for(Some(std::time::Duration::from_millis(1))).is_none());
    drop(file);
    mounted.wait().unwrap();
    assert_eq!(std::fs::read_to_string(source.join("f")).unwrap(), "to the end");
}

#[test]
fn a_mount_beneath_another_comes_to_light_when_that_one_goes() {
    let dir = tempfile::tempdir().unwrap();
    let (sources, mountpoint) = (["a", "b"].map(|name| dir.path().join(name)), dir.path().join("mount"));
    sources.iter().chain([&mountpoint]).for_each(|each| std::fs::create_dir(each).unwrap());
    let mount = |source: &Path, place| {
        let options = MountOptions { place, ..MountOptions::default() };
        fuse::mount(mirror_of(source, Arc::new(Tape::default())), &mountpoint, &options)
    };
    let top = mount(&sources[0], Place::Over).unwrap();
    let bottom = match mount(&sources[1], Place::Beneath) {
        Ok(bottom) => bottom,
        // Before Linux 6.5; whoever promotes detaches first, then.
        Err(error) => {
            assert_eq!(error.os().raw_os_error(), Some(Errno::INVAL.raw_os_error()), "{error}");
            top.unmount().unwrap();
            return;
        }
    };
    std::fs::write(mountpoint.join("f"), "above").unwrap();
    assert_eq!(bottom.unmount().unwrap(), Unmounted::NotOurs, "the upper one is in the way, and stays");
    assert_eq!(top.unmount().unwrap(), Unmounted::Clean);
    std::fs::write(mountpoint.join("f"), "below").unwrap();
    assert_eq!(bottom.unmount().unwrap(), Unmounted::Clean);
    for (source, text) in sources.iter().zip(["above", "below"]) {
        assert_eq!(std::fs::read_to_string(source.join("f")).unwrap(), text);
    }
}

fn volume(root: &Path, number: u16) -> VolumeSource {
    VolumeSource {
        index: VolumeIndex(number),
        name: VolumeName::new(format!("v{number}")).unwrap(),
        instance: VolumeInstance::new(100 + u64::from(number)).unwrap(),
        root: open_source(root).unwrap(),
    }
}

#[test]
fn several_volumes_stand_below_a_directory_that_cannot_be_changed() {
    let dir = tempfile::tempdir().unwrap();
    let (sources, mountpoint) = (["a", "b"].map(|name| dir.path().join(name)), dir.path().join("mount"));
    sources.iter().chain([&mountpoint]).for_each(|each| std::fs::create_dir(each).unwrap());
    let tape = Arc::new(Tape::default());
    let volumes = vec![volume(&sources[0], 0), volume(&sources[1], 1)];
    let mirror = Arc::new(Mirror::new(volumes, tape.clone(), Layout::VolumeList).unwrap());
    let mounted = fuse::mount(mirror.clone(), &mountpoint, &MountOptions::default()).unwrap();
    let at = |name: &str| mountpoint.join(name);
    let listed: BTreeMap<_, _> = std::fs::read_dir(&mountpoint)
        .unwrap()
        .map(|entry| entry.map(|entry| (entry.file_name(), entry.metadata().unwrap().is_dir())).unwrap())
        .collect();
    assert_eq!(listed, BTreeMap::from([("v0".into(), true), ("v1".into(), true)]));
    std::fs::write(at("v0/f"), "x").unwrap();
    std::fs::create_dir(at("v1/d")).unwrap();
    let rofs = Errno::ROFS.raw_os_error();
    assert_eq!(errno(std::fs::create_dir(at("new"))), rofs);
    assert_eq!(errno(std::fs::remove_dir(at("v1"))), rofs);
    assert_eq!(errno(std::fs::rename(at("v0"), at("v2"))), rofs);
    assert_eq!(errno(std::fs::set_permissions(&mountpoint, PermissionsExt::from_mode(0o700))), rofs);
    let xdev = Errno::XDEV.raw_os_error();
    assert_eq!(errno(std::fs::rename(at("v0/f"), at("v1/f"))), xdev);
    assert_eq!(errno(std::fs::hard_link(at("v0/f"), at("v1/f"))), xdev);
    assert_eq!(std::fs::read_dir(&mountpoint).unwrap().count(), 2);
    assert_eq!(mountpoint.metadata().unwrap().nlink(), 4);
    assert!(!at("nothing").exists());
    rustix::fs::statvfs(&mountpoint).unwrap();
    let volumes: Vec<(u16, OpKind)> =
        tape.take().iter().map(|(volume, update, _)| (volume.0, update.op.kind())).collect();
    assert_eq!(volumes, [(0, OpKind::Create), (0, OpKind::Write), (1, OpKind::Create)]);
    assert_eq!(mounted.unmount().unwrap(), Unmounted::Clean);
}

#[test]
fn unusable_sources_are_refused() {
    let proc = VolumeSource { root: File::open("/proc").unwrap().into(), ..volume(Path::new("/tmp"), 0) };
    let tape = Arc::new(Tape::default());
    let refused = Mirror::new(vec![proc], tape.clone(), Layout::SingleVolume).unwrap_err();
    assert!(matches!(refused, SetupError::NoHandles { .. }), "{refused}");
    let twice = Mirror::new(
        vec![volume(Path::new("/tmp"), 0), volume(Path::new("/tmp"), 0)],
        tape,
        Layout::VolumeList,
    );
    assert!(matches!(twice, Err(SetupError::Volumes(_))));
    // A mirror of a mirror would be one without stable handles.
    let mirrored = Mirrored::new();
    let again =
        Mirror::new(vec![volume(&mirrored.mountpoint, 0)], Arc::new(Tape::default()), Layout::SingleVolume);
    assert!(matches!(again, Err(SetupError::NoHandles { .. })), "{again:?}");
}

#[test]
fn a_directory_is_read_in_pieces_while_it_changes() {
    let mirrored = Mirrored::new();
    for number in 0..3000 {
        File::create(mirrored.mountpoint.join(format!("file with a long name {number:05}"))).unwrap();
    }
    let mut seen = 0;
    for (number, entry) in std::fs::read_dir(&mirrored.mountpoint).unwrap().enumerate() {
        let name = entry.unwrap().file_name();
        seen += 1;
        if number % 2 == 0 {
            std::fs::remove_file(mirrored.mountpoint.join(name)).unwrap();
        }
    }
    assert_eq!(seen, 3000, "each is seen once though half of them go away meanwhile");
    assert_eq!(std::fs::read_dir(&mirrored.mountpoint).unwrap().count(), 1500);
    replayed(&mirrored);
}

#[test]
fn without_the_kernels_own_locks_the_order_of_records_is_that_of_the_changes() {
    // Above, the kernel lets one change of a file or directory through at a time. This goes past it.
    let dir = tempfile::tempdir().unwrap();
    let tape = Arc::new(Tape::default());
    let mirror = mirror_of(dir.path(), tape.clone());
    let (file, fh) = mirror.create(Caller::ROOT, ROOT, b"shared", 0o644, 0, libc::O_RDWR).unwrap();
    let names: Vec<String> = (0..4).map(|number| format!("n{number}")).collect();
    std::thread::scope(|scope| {
        for thread in 0..4_u64 {
            let (mirror, names) = (&mirror, &names);
            scope.spawn(move || {
                let mut random = support::actor::Random(thread);
                let mut name = move || names[random.below(4) as usize].as_bytes();
                let mut random = support::actor::Random(thread + 100);
                for round in 0..800_u64 {
                    let _fails_often = match random.below(6) {
                        0 | 1 => {
                            let data = vec![(thread * 50 + round % 50) as u8; 2000];
                            mirror.write(file.nodeid, fh, random.below(500), &data, false, false).map(drop)
                        }
                        2 => mirror.link(file.nodeid, ROOT, name()).map(drop),
                        3 => mirror.remove(ROOT, name(), false),
                        4 => mirror.rename(ROOT, name(), ROOT, name(), 0),
                        _ => mirror
                            .make(Caller::ROOT, ROOT, name(), 0, NewNode::Symlink { target: b"x" })
                            .map(drop),
                    };
                }
            });
        }
    });
    let mut tree = Tree { complete: true, ..Tree::new(mirror.root_of(VOLUME).unwrap()) };
    let updates = tape.take();
    assert!(updates.len() > 1000, "{} updates", updates.len());
    for (_, update, data) in updates {
        tree.apply(&update, &data);
    }
    let differences = tree.differences(dir.path());
    assert!(differences.is_empty(), "{differences:#?}");
    for name in &names {
        let _may_be_gone = mirror.remove(ROOT, name.as_bytes(), false);
    }
    mirror.link(file.nodeid, ROOT, b"n0").unwrap();
    tape.take();
    mirror.rename(ROOT, b"n0", ROOT, b"shared", 0).unwrap();
    assert!(tape.take().is_empty(), "two names of one file: nothing happens");
}

#[test]
fn the_file_system_can_be_called_without_fuse() {
    let dir = tempfile::tempdir().unwrap();
    let tape = Arc::new(Tape::default());
    let mirror = mirror_of(dir.path(), tape.clone());
    let caller = Caller { uid: 5, gid: 6 };
    let made = mirror.make(caller, ROOT, b"d", 0o22, NewNode::Dir { mode: 0o777 }).unwrap();
    assert_eq!((made.attributes.uid, made.attributes.gid, made.attributes.mode & 0o7777), (5, 6, 0o755));
    let [(_, update, _)] = &tape.take()[..] else { panic!("one update") };
    assert!(matches!(&update.op, Op::Create { name, .. } if **name == *b"d"));
    assert_eq!(update.attrs.len(), 2);
    assert!(mirror.lookup(ROOT, b"none").unwrap().is_none());
    assert_eq!(
        mirror.make(caller, ROOT, b"..", 0, NewNode::Dir { mode: 0 }).unwrap_err().errno(),
        Errno::INVAL
    );
    assert_eq!(mirror.getattr(12_345, None).unwrap_err().errno(), Errno::STALE);
    assert_eq!(mirror.read(99, 0, &mut [0]).unwrap_err().errno(), Errno::BADF);
}
