//! Control messages: what is written is read again, and whatever else comes is refused without harm.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use bytes::Bytes;
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;
use twinfs_core::id::{
    Epoch, FileId, GroupNumber, Incarnation, SessionId, SetHash, SetNumber, SiteId, SiteName, VolumeIndex,
    VolumeInstance, VolumeName,
};
use twinfs_core::limits;
use twinfs_core::session::{ChainPoint, Role, VolumeState};
use twinfs_core::stamp::{Seq, Timestamp};
use twinfs_core::wire::{
    Ack, BadMessage, Damage, FRAME_BYTES, Frame, Hello, HelloVolume, Message, Progress, PromoteReady, Refuse,
    RefuseCode, Text, Welcome, WelcomeVolume,
};

const COUNTER_MAX: u64 = i64::MAX as u64;

fn counter() -> impl Strategy<Value = u64> {
    prop_oneof![0..10u64, 0..=COUNTER_MAX, Just(COUNTER_MAX)]
}

fn epoch() -> impl Strategy<Value = Epoch> {
    (counter(), any::<[u8; 16]>()).prop_map(|(number, site)| Epoch { number, site: SiteId::from_bytes(site) })
}

fn text() -> impl Strategy<Value = Text> {
    ".{0,600}".prop_map(|text: String| Text::new(text))
}

fn point() -> impl Strategy<Value = ChainPoint> {
    let some = (1..(1u64 << 62), 1..=255u8, 0..1000u64).prop_map(|(number, byte, more)| ChainPoint {
        number: SetNumber(number),
        hash: SetHash([byte; 32]),
        last_seq: Seq(number + more),
    });
    prop_oneof![1 => Just(ChainPoint::START), 4 => some]
}

fn ack() -> impl Strategy<Value = Ack> {
    (0..limits::VOLUMES_MAX as u16, counter())
        .prop_map(|(volume, number)| Ack { volume: VolumeIndex(volume), number: SetNumber(number) })
}

fn named<T>(mut volumes: Vec<T>, set_name: impl Fn(&mut T, VolumeName)) -> Vec<T> {
    for (at, volume) in volumes.iter_mut().enumerate() {
        set_name(volume, VolumeName::new(format!("{}{at}", "v".repeat(at % 50 + 1))).unwrap());
    }
    volumes
}

fn hello() -> impl Strategy<Value = Message> {
    let volume = (any::<u64>(), 1..u64::MAX, any::<u32>(), 0..3usize, point(), counter()).prop_map(
        |(ino, instance, generation, state, acked, oldest)| {
            let instance = VolumeInstance::new(instance).unwrap();
            HelloVolume {
                name: VolumeName::new("x").unwrap(),
                instance,
                root: FileId { instance, ino, generation },
                state: [VolumeState::Pending, VolumeState::Copy, VolumeState::Duplex][state],
                acked,
                oldest: SetNumber(oldest),
                newest: SetNumber(oldest / 2),
            }
        },
    );
    let head =
        (any::<u16>(), any::<[u8; 16]>(), any::<[u8; 16]>(), "[a-z][a-z.-]{0,63}", epoch(), any::<u64>());
    (head, vec(volume, 0..6)).prop_map(|((protocol, session, site, name, epoch, incarnation), volumes)| {
        Message::Hello(Hello {
            protocol,
            session: SessionId::from_bytes(session),
            site: SiteId::from_bytes(site),
            name: SiteName::new(name).unwrap(),
            epoch,
            incarnation: Incarnation(incarnation),
            volumes: named(volumes, |volume, name| volume.name = name),
        })
    })
}

fn welcome() -> impl Strategy<Value = Message> {
    let volume = (any::<bool>(), point(), vec(1..20u64, 0..20)).prop_map(|(member, durable, steps)| {
        let mut number = durable.number.0 + 1;
        let beyond = steps.into_iter().map(|step| {
            number += step;
            SetNumber(number)
        });
        let beyond = beyond.collect();
        WelcomeVolume { name: VolumeName::new("x").unwrap(), member, durable, beyond }
    });
    let role = select(vec![Role::Primary, Role::Replica, Role::Promoted, Role::Fenced]);
    let damage = option::of((any::<bool>(), text()).prop_map(|(whole, why)| Damage { whole, why }));
    (epoch(), role, counter(), counter(), counter(), damage, vec(volume, 0..6)).prop_map(
        |(epoch, role, group, time, applied, damage, volumes)| {
            Message::Welcome(Welcome {
                epoch,
                role,
                group: GroupNumber(group),
                time: Timestamp(time),
                applied: Timestamp(applied),
                damage,
                volumes: named(volumes, |volume, name| volume.name = name),
            })
        },
    )
}

fn message() -> impl Strategy<Value = Message> {
    let code = select(vec![
        RefuseCode::Version,
        RefuseCode::UnknownSession,
        RefuseCode::Fenced,
        RefuseCode::Diverged,
        RefuseCode::Lost,
        RefuseCode::VolumeMissing,
        RefuseCode::NotReplica,
        RefuseCode::TooManyVolumes,
        RefuseCode::Protocol,
        RefuseCode::Failed,
    ]);
    prop_oneof![
        hello(),
        welcome(),
        (code, option::of(epoch()), text()).prop_map(|(code, epoch, text)| Message::Refuse(Refuse {
            code,
            epoch,
            text
        })),
        ack().prop_map(Message::Ack),
        (counter(), counter(), counter()).prop_map(|(group, time, applied)| {
            let (group, time) = (GroupNumber(group), Timestamp(time));
            Message::Progress(Progress { group, time, applied: Timestamp(applied) })
        }),
        vec(any::<u8>(), 0..limits::NULL_SET_BYTES_MAX)
            .prop_map(|bytes| Message::NullSet(Bytes::from(bytes))),
        vec(any::<u8>(), 0..3000).prop_map(|bytes| Message::Tokens(Bytes::from(bytes))),
        Just(Message::PromoteRequest),
        (counter(), vec(ack(), 0..10))
            .prop_map(|(end, finals)| Message::PromoteReady(PromoteReady { end: Timestamp(end), finals })),
        text().prop_map(Message::PromoteRefused),
        epoch().prop_map(Message::PromoteDone),
        text().prop_map(Message::Bye),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_written_is_read(message in message()) {
        let bytes = message.encode();
        prop_assert!(bytes.len() <= limits::MESSAGE_BYTES_MAX);
        prop_assert_eq!(Message::decode(&bytes), Ok(message));
    }

    /// Cut at every byte: refused.
    #[test]
    fn a_truncated_message_is_refused(message in message()) {
        let bytes = message.encode();
        for len in 0..bytes.len() {
            prop_assert!(Message::decode(&bytes[..len]).is_err(), "{} of {} bytes", len, bytes.len());
        }
        let mut longer = bytes;
        longer.push(0);
        prop_assert!(Message::decode(&longer).is_err());
    }

    /// A flipped bit is refused, or it makes another message of which these are exactly the bytes: the form is
    /// canonical, nothing is ignored. (That a message arrives as it was sent is the transport's promise.)
    #[test]
    fn a_flipped_message_is_refused_or_another(message in message(), bit in 0..8u32) {
        let bytes = message.encode();
        for at in 0..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1 << bit;
            if let Ok(other) = Message::decode(&flipped) {
                prop_assert_ne!(&other, &message);
                prop_assert_eq!(other.encode(), flipped);
            }
        }
    }

    #[test]
    fn noise_is_refused_or_canonical(tag in 0..14u8, noise in vec(any::<u8>(), 0..300)) {
        let mut bytes = vec![1, tag, 0, 0];
        bytes.extend_from_slice(&(noise.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&noise);
        if let Ok(message) = Message::decode(&bytes) {
            prop_assert_eq!(message.encode(), bytes);
        }
    }
}

#[test]
fn a_frame_bounds_its_payload_by_its_kind() {
    let frame = |version: u8, tag: u8, len: u32| {
        let mut bytes = [version, tag, 0, 0, 0, 0, 0, 0];
        bytes[4..].copy_from_slice(&len.to_le_bytes());
        Frame::parse(&bytes)
    };
    assert_eq!(frame(2, 4, 10), Err(BadMessage::Version(2)));
    assert_eq!(frame(1, 13, 0), Err(BadMessage::Tag(13)));
    assert_eq!(frame(1, 0, 0), Err(BadMessage::Tag(0)));
    assert_eq!(frame(1, 4, 11), Err(BadMessage::TooLong(11)));
    assert_eq!(frame(1, 1, u32::MAX), Err(BadMessage::TooLong(u32::MAX)));
    assert_eq!(frame(1, 4, 10).map(|frame| frame.payload_len()), Ok(10));
    assert!(Frame::parse(&[1, 8, 1, 0, 0, 0, 0, 0]).is_err());
}

/// Every volume with every set beyond a gap, names as long as they can be.
#[test]
fn the_largest_welcome_fits() {
    let volumes = (0..limits::VOLUMES_MAX).map(|at| WelcomeVolume {
        name: VolumeName::new(format!("{at:0>width$}", width = limits::LABEL_BYTES_MAX)).unwrap(),
        member: true,
        durable: ChainPoint { number: SetNumber(5), hash: SetHash([1; 32]), last_seq: Seq(9) },
        beyond: (7..=5 + limits::PENDING_SETS_MAX as u64).map(SetNumber).collect(),
    });
    let epoch = Epoch { number: 3, site: SiteId::from_bytes([1; 16]) };
    let (group, time) = (GroupNumber(3), Timestamp(4));
    let welcome = Message::Welcome(Welcome {
        epoch,
        role: Role::Replica,
        group,
        time,
        applied: time,
        damage: Some(Damage { whole: true, why: Text::new("x".repeat(limits::TEXT_BYTES_MAX)) }),
        volumes: volumes.collect(),
    });
    let bytes = welcome.encode();
    assert!(bytes.len() <= limits::MESSAGE_BYTES_MAX);
    assert_eq!(Message::decode(&bytes), Ok(welcome));
}

#[test]
fn lists_with_a_volume_twice_or_sets_out_of_order_are_refused() {
    let volume = |beyond: &[u64]| WelcomeVolume {
        name: VolumeName::new("v").unwrap(),
        member: false,
        durable: ChainPoint::START,
        beyond: beyond.iter().copied().map(SetNumber).collect(),
    };
    let decode = |volumes| {
        let epoch = Epoch { number: 3, site: SiteId::from_bytes([1; 16]) };
        let (group, time) = (GroupNumber(3), Timestamp(4));
        let (role, applied, damage) = (Role::Replica, time, None);
        Message::decode(
            &Message::Welcome(Welcome { epoch, role, group, time, applied, damage, volumes }).encode(),
        )
    };
    assert!(decode(vec![volume(&[2, 3])]).is_ok());
    assert!(decode(vec![volume(&[2]), volume(&[2])]).is_err());
    assert!(decode(vec![volume(&[1])]).is_err());
    assert!(decode(vec![volume(&[3, 2])]).is_err());
    assert!(decode(vec![volume(&[limits::PENDING_SETS_MAX as u64 + 1])]).is_err());
}

#[test]
fn a_long_text_is_cut_between_characters() {
    let text = Text::new("ü".repeat(limits::TEXT_BYTES_MAX));
    assert_eq!(text.as_str().len(), limits::TEXT_BYTES_MAX);
    assert_eq!(Text::new(format!("x{}", "ü".repeat(400))).as_str().len(), limits::TEXT_BYTES_MAX - 1);
    assert_eq!(Text::new("a\u{1b}[2J\nb").to_string(), "a\\u{1b}[2J\\nb");
    assert_eq!(FRAME_BYTES, 8);
}
