//! What the site directory holds as text, the control socket, and the state of an unfinished copy.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use twinfs::copier::Copier;
use twinfs::mirror::{Layout, Mirror, VolumeSource, open_source};
use twinfs_core::id::{
    Epoch, FileId, SessionId, SetHash, SetNumber, SiteId, SiteName, VolumeIndex, VolumeInstance, VolumeName,
};
use twinfs_core::session::{Role, SuspendReason, VolumeState as CopyStage};
use twinfs_core::stamp::{Seq, Stamp, Timestamp};
use twinfs_core::update::sample_file;
use twinfs_replicator::control::{Answer, Request};
use twinfs_replicator::primary::sidefile::{Capture, Start, StartVolume, bytes_min};
use twinfs_replicator::site::{ReceivedVolume, ReplicaArguments, State, VolumeState};
use twinfs_replicator::status::{PeerStatus, Status, VolumeStatus};

use crate::{choice, chosen, scratch};

pub(crate) fn control(bytes: &[u8]) -> bool {
    let (how, bytes) = choice(bytes);
    if how.is_multiple_of(2) {
        let Ok(request) = serde_json::from_slice::<Request>(bytes) else { return false };
        let again = serde_json::to_vec(&request).unwrap();
        assert_eq!(serde_json::from_slice::<Request>(&again).unwrap(), request);
        return true;
    }
    let Ok(answer) = serde_json::from_slice::<Answer>(bytes) else { return false };
    let again = serde_json::to_vec(&answer).unwrap();
    // Not compared: a number of seconds may lose its last digit.
    serde_json::from_slice::<Answer>(&again).unwrap();
    if let Answer::Status(status) = &answer {
        let _ = (status.to_string(), status.check(1.0));
    }
    true
}

pub(crate) fn control_seeds() -> Vec<Vec<u8>> {
    let status = Status {
        role: Role::Primary,
        session_state: "DUPLEX".into(),
        reason: Some("none".into()),
        epoch: 1,
        group: 2,
        consistency_time: Some("2026-01-01T00:00:00.000000Z".into()),
        delay_seconds: Some(0.5),
        exposure_seconds: 0.25,
        behind_bytes: 3,
        behind_records: 4,
        peer: PeerStatus { name: Some("chi".into()), rtt_ms: Some(1.5), ..PeerStatus::default() },
        volumes: vec![VolumeStatus {
            name: "data".into(),
            state: "COPY".into(),
            files_copied: 1,
            files_total: 2,
            bytes_copied: 3,
            bytes_total: 4,
        }],
        wire_bytes: 5,
        sets_sent: 6,
        sets_received: 7,
        sets_out_of_order: 8,
        tokens_held: 9,
        store_bytes: 10,
        store_bytes_max: 11,
    };
    let requests = [Request::Status, Request::Promote { planned: true, force: false }];
    let answers = [
        Answer::Status(Box::new(status)),
        Answer::Progress("working".into()),
        Answer::Done("done".into()),
        Answer::Failed("why".into()),
    ];
    let requests = requests.iter().map(|request| chosen(0, &serde_json::to_vec(request).unwrap()));
    requests.chain(answers.iter().map(|answer| chosen(1, &serde_json::to_vec(answer).unwrap()))).collect()
}

/// Bytes of the control file before its digits, and from its digits to the rest.
const BEFORE: &[u8] = b"{\n  \"checksum\": \"";
const AFTER: &[u8] = b"\",\n";

pub(crate) fn state(bytes: &[u8]) -> bool {
    let (how, bytes) = choice(bytes);
    let text = if how.is_multiple_of(2) {
        bytes.to_vec()
    } else {
        let digits = blake3::hash(&[b"{\n", bytes].concat()).to_hex();
        [BEFORE, digits.as_bytes(), AFTER, bytes].concat()
    };
    let Ok(state) = State::decode(&text) else { return false };
    assert_eq!(State::decode(&state.encode().unwrap()).unwrap(), state);
    true
}

pub(crate) fn state_seeds() -> Vec<Vec<u8>> {
    let (name, instance) = (VolumeName::new("data").unwrap(), VolumeInstance::new(9).unwrap());
    let mut state = State::new(Role::Replica, Epoch { number: 3, site: SiteId::from_bytes([1; 16]) });
    let empty = state.encode().unwrap();
    state.session = Some(SessionId::from_bytes([2; 16]));
    state.peer = Some(SiteName::new("chi").unwrap());
    state.volumes.push(VolumeState {
        name: name.clone(),
        source: "/srv/data".into(),
        instance,
        root_ino: 2,
        root_generation: 7,
        state: CopyStage::Duplex,
        complete: Some(Stamp { time: Timestamp(5), seq: Seq(6) }),
        acked_set: SetNumber(12),
        acked_hash: SetHash([3; 32]),
        acked_seq: Seq(400),
        acked_end: Timestamp(70),
        end: Timestamp(77),
        last_seq: Seq(401),
    });
    state.received.push(ReceivedVolume { name, instance, root: sample_file(2) });
    state.replica = Some(ReplicaArguments { mountpoint: "/mnt".into(), listen: "[::]:7".into() });
    state.suspended = Some(SuspendReason::Lag);
    let full = state.encode().unwrap();
    let body = |text: &[u8]| text[BEFORE.len() + 64 + AFTER.len()..].to_vec();
    vec![chosen(0, &empty), chosen(0, &full), chosen(1, &body(&empty)), chosen(1, &body(&full))]
}

static TREE: OnceLock<PathBuf> = OnceLock::new();
static MIRROR: OnceLock<Mirror> = OnceLock::new();
const VOLUME: VolumeIndex = VolumeIndex(0);

/// A mirror whose copies go nowhere: only their saved state is of interest.
fn mirror() -> &'static Mirror {
    MIRROR.get_or_init(|| {
        let dir = scratch(&TREE, |dir| std::fs::create_dir(dir.join("tree")).unwrap());
        let source = VolumeSource {
            index: VOLUME,
            name: VolumeName::new("data").unwrap(),
            instance: VolumeInstance::new(9).unwrap(),
            root: open_source(&dir.join("tree")).unwrap(),
        };
        let start = Start {
            session: SessionId::from_bytes([2; 16]),
            volumes: &[StartVolume::NEW],
            floor: Timestamp::ZERO,
            limit: Timestamp(u64::MAX),
        };
        let capture = Capture::create(&dir.join("sidefile"), bytes_min(), &start).unwrap();
        Mirror::new(vec![source], Arc::new(capture), Layout::SingleVolume).unwrap()
    })
}

fn root() -> FileId {
    mirror().root_of(VOLUME).unwrap()
}

pub(crate) fn copy_state(bytes: &[u8]) -> bool {
    let (how, bytes) = choice(bytes);
    let bytes =
        if how.is_multiple_of(2) { bytes.to_vec() } else { [bytes, blake3::hash(bytes).as_bytes()].concat() };
    let Ok(state) = Copier::prepare(mirror(), VOLUME, Some(&bytes)) else { return false };
    let _ = state.progress();
    let saved = state.save().expect("a copy that goes on is not complete");
    let again = Copier::prepare(mirror(), VOLUME, Some(&saved)).unwrap();
    assert_eq!(again.save(), Some(saved));
    true
}

/// The byte form that stands in `copier/saved.rs`.
pub(crate) fn copy_state_seeds() -> Vec<Vec<u8>> {
    let fresh = Copier::prepare(mirror(), VOLUME, None).unwrap().save().unwrap();
    let mut body = [b"TWINCOPY", &1_u32.to_le_bytes()[..], &root().to_bytes()].concat();
    for number in [3_u64, 70_000, 2, 2] {
        body.extend_from_slice(&number.to_le_bytes());
    }
    for ino in [9_u64, 4] {
        body.extend_from_slice(&ino.to_le_bytes());
        body.extend_from_slice(&1_u32.to_le_bytes());
        body.extend_from_slice(&5_u64.to_le_bytes());
    }
    for step in [&[1_u8][..], &[0x80, 3]] {
        body.extend_from_slice(step);
        body.extend_from_slice(&7_u32.to_le_bytes());
    }
    let without_hash = fresh[..fresh.len() - 32].to_vec();
    vec![chosen(0, &fresh), chosen(1, &without_hash), chosen(1, &body)]
}
