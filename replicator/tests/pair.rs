//! Both sites' sessions over real QUIC and a real journal, without FUSE: what is published into the sidefile appears in
//! the replica's view.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use twinfs_certs::Identity;
use twinfs_core::change_map::ChangeMap;
use twinfs_core::id::{
    Epoch, FileId, Incarnation, SessionId, SiteName, VolumeIndex, VolumeInstance, VolumeName,
};
use twinfs_core::session::receiver::Ordering;
use twinfs_core::session::sender::{Sender, SenderConfig, SenderVolume};
use twinfs_core::session::{ChainPoint, Role, VolumeState};
use twinfs_core::stamp::Timestamp;
use twinfs_core::update::{Attr, AttrList, Intent, Op};
use twinfs_replicator::primary::activity_log::{ActivityConfig, ActivityLog};
use twinfs_replicator::primary::chain::{PathHints, SetMaker, SetOrigin, SetVolume};
use twinfs_replicator::primary::mover::{CopyProgress, Files, Primary, PrimaryParts, Replica as Peer};
use twinfs_replicator::primary::sidefile::{Capture, Start, StartVolume, bytes_min};
use twinfs_replicator::replica::driver::{PromoteMode, Replica, ReplicaConfig};
use twinfs_replicator::site::{SiteDir, State};
use twinfs_replicator::storage::SimStorage;

const V: VolumeIndex = VolumeIndex(0);

struct NoFiles;

impl PathHints for NoFiles {
    fn path_of(&self, _: VolumeIndex, _: FileId) -> Box<[u8]> {
        Box::default()
    }
}

impl Files for NoFiles {
    fn copy_progress(&self, _: VolumeIndex) -> Option<CopyProgress> {
        None
    }

    fn start_resync(&self, _: VolumeIndex, _: ChangeMap) {}

    fn stop_resync(&self, _: VolumeIndex) -> Option<ChangeMap> {
        None
    }

    fn resync_failed(&self, _: VolumeIndex) -> bool {
        false
    }

    fn restart_copy(&self, _: VolumeIndex) {}
}

fn file(ino: u64) -> FileId {
    FileId { instance: VolumeInstance::new(9).unwrap(), ino, generation: 1 }
}

fn attr(mode: u32, nlink: u32, size: u64) -> Attr {
    Attr { mode, uid: 0, gid: 0, nlink, rdev: 0, size, mtime_s: 1_000_000_000, mtime_ns: 7 }
}

fn publish(capture: &Capture, op: Op<&[u8]>, attrs: &[(FileId, Attr)], data: &[u8]) {
    let reservation = capture.reserve(V, &Intent::Attrs { file: file(1) }, 4096, data.len()).unwrap();
    reservation.publish(op, attrs.iter().copied().collect::<AttrList>(), data).expect("the session captures");
}

fn write(capture: &Capture, ino: u64, text: &[u8]) {
    let op = Op::Write { file: file(ino), offset: 0, len: text.len() as u32 };
    publish(capture, op, &[(file(ino), attr(0o100_644, 1, text.len() as u64))], text);
}

fn start_replica(dir: &Path, identity: &Arc<Identity>, listen: &str) -> Replica {
    let site = SiteDir::new(dir);
    let first = State::new(Role::Replica, Epoch { number: 0, site: identity.id() });
    let state = site.state().unwrap().unwrap_or(first);
    Replica::start(ReplicaConfig {
        site,
        state,
        identity: Arc::clone(identity),
        listen: listen.parse().unwrap(),
        from: None,
        free_space_floor: 1 << 20,
        ordering: Ordering::ByStamp,
    })
    .unwrap()
}

fn wait<T>(what: &str, mut ready: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = ready() {
            return value;
        }
        assert!(start.elapsed() < Duration::from_secs(20), "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn shown(replica: &Replica, ino: u64) -> Option<Vec<u8>> {
    let view = replica.image().view();
    let (volume, ..) = view.members().next()?;
    let node = view.node(volume, file(ino)).ok()?;
    view.read(volume, file(ino), 0, node.attr.size as usize).ok()
}

#[test]
fn what_is_published_is_shown_survives_restarts_and_can_be_promoted() {
    let dir = tempfile::tempdir().unwrap();
    let (nyc, chi) = (dir.path().join("nyc"), dir.path().join("chi"));
    let name = |name: &str| SiteName::new(name).unwrap();
    let primary_identity = Arc::new(twinfs_certs::init(&nyc, &name("nyc"), None).unwrap());
    let replica_identity = Arc::new(twinfs_certs::init(&chi, &name("chi"), Some(&nyc)).unwrap());
    let port = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let listen = format!("127.0.0.1:{port}");
    let replica = start_replica(&chi, &replica_identity, &listen);

    let session = SessionId::from_bytes([3; 16]);
    let start =
        Start { session, volumes: &[StartVolume::NEW], floor: Timestamp::ZERO, limit: Timestamp(u64::MAX) };
    let capture = Arc::new(Capture::create(&nyc.join("sidefile"), bytes_min(), &start).unwrap());
    let epoch = Epoch { number: 1, site: primary_identity.id() };
    let volume = SetVolume {
        name: VolumeName::new("data").unwrap(),
        instance: VolumeInstance::new(9).unwrap(),
        root: file(1),
    };
    let config = SenderConfig {
        session,
        site: primary_identity.id(),
        name: name("nyc"),
        epoch,
        incarnation: Incarnation(5),
    };
    let kept = SenderVolume {
        name: volume.name.clone(),
        instance: volume.instance,
        root: volume.root,
        state: VolumeState::Pending,
        complete: None,
        acked: ChainPoint::START,
        end: Timestamp::ZERO,
        issued: Vec::new(),
        acked_end: Timestamp::ZERO,
        forgotten: Vec::new(),
    };
    let mut sender = Sender::new(config, vec![kept], capture.now());
    sender.handle_copy_started(V).unwrap();
    let origin = SetOrigin { session, epoch, incarnation: Incarnation(5), level: 1 };
    let disk = Arc::new(SimStorage::new(1));
    // Nobody flushes it but the mover, before it ships a set.
    let config = ActivityConfig { flush_ns: None, ..ActivityConfig::default() };
    let log = Arc::new(ActivityLog::open(disk, session, Timestamp(1), config).unwrap().0);
    let primary = Primary::start(PrimaryParts {
        log: Some(Arc::clone(&log)),
        capture: Arc::clone(&capture),
        sender,
        maker: SetMaker::new(origin, vec![volume.clone()]),
        volumes: vec![volume],
        files: Arc::new(NoFiles),
        replica: Some(Peer { name: name("chi"), address: listen.clone() }),
        identity: primary_identity,
        role: Role::Primary,
        epoch,
        reason: None,
        examining: false,
        on_fenced: Box::new(|_| {}),
    })
    .unwrap();

    let root = (file(1), attr(0o040_755, 2, 4096));
    publish(&capture, Op::Object { file: file(1), target: b"" }, &[root], b"");
    let created = Op::Create { dir: file(1), name: &b"hello"[..], file: file(2), target: &b""[..] };
    publish(&capture, created, &[root, (file(2), attr(0o100_644, 1, 0))], b"");
    drop(log.touch(V, [file(1), file(2)].into_iter()).unwrap());
    write(&capture, 2, b"before the copy was whole");
    assert_eq!(shown(&replica, 2), None, "a volume appears whole or not at all");
    publish(&capture, Op::Complete, &[], b"");
    wait("the volume", || shown(&replica, 2).filter(|text| text == b"before the copy was whole"));
    assert!(log.is_durable(V, file(2)), "what the replica has is in the activity log");
    log.end_era(&|| capture.now()).unwrap();
    drop(log.touch(V, std::iter::once(file(2))).unwrap());
    assert!(!log.is_durable(V, file(2)));

    for round in 0..200u32 {
        write(&capture, 2, format!("round {round}").as_bytes());
    }
    wait("the last round", || shown(&replica, 2).filter(|text| text == b"round 199"));
    assert!(log.is_durable(V, file(2)), "also in the next era");
    let status = wait("DUPLEX", || primary.status().filter(|status| status.session_state == "DUPLEX"));
    assert!(status.peer.connected && status.sets_sent > 0, "{status:?}");

    replica.stop();
    drop(replica);
    // Without its journal it shows what its trees hold, and says so. (It is not told to anybody here.)
    std::fs::rename(chi.join("journal"), chi.join("away")).unwrap();
    let control_file = std::fs::read(chi.join("state.json")).unwrap();
    for _ in 0..2 {
        let damaged = start_replica(&chi, &replica_identity, "127.0.0.1:0");
        let status = damaged.status().unwrap();
        assert_eq!(status.session_state, "SUSPENDED");
        let why = status.reason.unwrap();
        assert!(why.starts_with("ERROR: the journal is damaged (the journal ends at group 0"), "{why}");
        assert!(why.contains("is read again from the primary"), "{why}");
        assert_eq!(shown(&damaged, 2).unwrap(), b"round 199");
        damaged.stop();
    }
    assert!(chi.join("journal.damaged-1").exists() && !chi.join("journal.damaged-2").exists());
    std::fs::remove_dir_all(chi.join("journal")).unwrap();
    std::fs::rename(chi.join("away"), chi.join("journal")).unwrap();
    std::fs::write(chi.join("state.json"), control_file).unwrap();

    // The replica goes and comes: it shows what it showed, and takes what it missed.
    write(&capture, 2, b"while the replica was away");
    let replica = start_replica(&chi, &replica_identity, &listen);
    assert!(shown(&replica, 2).is_some(), "what was committed shows at once");
    wait("what it missed", || shown(&replica, 2).filter(|text| text == b"while the replica was away"));

    let refused = replica.promote(PromoteMode::Plain, &mut |_| {}).unwrap_err();
    assert!(refused.contains("--planned"), "{refused}");
    let mut lines = Vec::new();
    let promoted = replica.promote(PromoteMode::Planned, &mut |line| lines.push(line)).unwrap();
    assert_eq!(promoted.epoch.number, 2);
    assert!(lines.iter().any(|line| line.contains("0 updates lost")), "{lines:?}");
    let text = std::fs::read(promoted.volumes[0].1.join("hello")).unwrap();
    assert_eq!(text, b"while the replica was away");
    wait("the fence", || primary.status().filter(|status| status.role == Role::Fenced));
    assert!(capture.reserve(V, &Intent::Attrs { file: file(1) }, 64, 0).is_err());
    primary.stop(Duration::from_secs(1));
}
