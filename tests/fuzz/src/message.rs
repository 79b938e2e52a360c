//! What travels beside record sets: control messages and write tokens.

use twinfs_core::id::{
    Epoch, GroupNumber, Incarnation, SessionId, SetHash, SetNumber, SiteId, SiteName, VolumeIndex,
    VolumeInstance, VolumeName,
};
use twinfs_core::session::{ChainPoint, Role, VolumeState};
use twinfs_core::stamp::{Seq, Timestamp};
use twinfs_core::token::{Token, TokenBatch, encode_batch};
use twinfs_core::update::sample_file;
use twinfs_core::wire::{
    Ack, Damage, FRAME_BYTES, Frame, Hello, HelloVolume, Message, Progress, PromoteReady, Refuse, RefuseCode,
    Text, Welcome, WelcomeVolume,
};

use crate::sets::{changes, read_set, set};

pub(crate) fn message(bytes: &[u8]) -> bool {
    if let Some(frame) = bytes.first_chunk::<FRAME_BYTES>()
        && let Ok(frame) = Frame::parse(frame)
    {
        let rest = &bytes[FRAME_BYTES..];
        let payload = &rest[..rest.len().min(frame.payload_len())];
        assert_eq!(
            frame.decode(payload).is_ok(),
            Message::decode(&bytes[..FRAME_BYTES + payload.len()]).is_ok()
        );
    }
    let Ok(message) = Message::decode(bytes) else { return false };
    assert_eq!(message.encode(), bytes, "one message, one form");
    match message {
        Message::NullSet(set) => drop(read_set(set)),
        Message::Tokens(batch) => drop(TokenBatch::decode(&batch)),
        _ => {}
    }
    true
}

pub(crate) fn message_seeds() -> Vec<Vec<u8>> {
    let epoch = Epoch { number: 3, site: SiteId::from_bytes([1; 16]) };
    let (name, instance) = (VolumeName::new("data").unwrap(), VolumeInstance::new(9).unwrap());
    let point = ChainPoint { number: SetNumber(4), hash: SetHash([5; 32]), last_seq: Seq(77) };
    let volume = |name: &VolumeName, acked| HelloVolume {
        name: name.clone(),
        instance,
        root: sample_file(2),
        state: VolumeState::Duplex,
        acked,
        oldest: SetNumber(5),
        newest: SetNumber(9),
    };
    let other = VolumeName::new("log").unwrap();
    let mut batch = Vec::new();
    encode_batch(&name, &tokens_of(4), &mut batch);
    let messages = [
        Message::Hello(Hello {
            protocol: 1,
            session: SessionId::from_bytes([3; 16]),
            site: epoch.site,
            name: SiteName::new("nyc").unwrap(),
            epoch,
            incarnation: Incarnation(7),
            volumes: vec![volume(&name, point), volume(&other, ChainPoint::START)],
        }),
        Message::Welcome(Welcome {
            epoch,
            role: Role::Replica,
            group: GroupNumber(8),
            time: Timestamp(9),
            applied: Timestamp(8),
            damage: Some(Damage { whole: false, why: Text::new("rot") }),
            volumes: vec![WelcomeVolume {
                name: name.clone(),
                member: true,
                durable: point,
                beyond: vec![SetNumber(6), SetNumber(9)],
            }],
        }),
        Message::Refuse(Refuse { code: RefuseCode::Fenced, epoch: Some(epoch), text: Text::new("no") }),
        Message::Ack(Ack { volume: VolumeIndex(1), number: SetNumber(12) }),
        Message::Progress(Progress { group: GroupNumber(1), time: Timestamp(2), applied: Timestamp(1) }),
        Message::NullSet(set(&[], 2, 0).bytes),
        Message::Tokens(batch.into()),
        Message::PromoteRequest,
        Message::PromoteReady(PromoteReady {
            end: Timestamp(5),
            finals: vec![Ack { volume: VolumeIndex(0), number: SetNumber(1) }],
        }),
        Message::PromoteRefused(Text::new("later")),
        Message::PromoteDone(epoch),
        Message::Bye(Text::new("stopped")),
    ];
    messages.iter().map(Message::encode).collect()
}

fn tokens_of(seed: u64) -> Vec<Token> {
    changes(seed, 40).iter().map(|change| Token::of(&change.update)).collect()
}

pub(crate) fn tokens(bytes: &[u8]) -> bool {
    let Ok(batch) = TokenBatch::decode(bytes) else { return false };
    let mut again = Vec::new();
    let taken = encode_batch(&batch.volume, &batch.tokens, &mut again);
    assert_eq!((taken, &*again), (batch.tokens.len(), bytes), "one batch, one form");
    true
}

pub(crate) fn token_seeds() -> Vec<Vec<u8>> {
    let batch = |tokens: &[Token]| {
        let mut bytes = Vec::new();
        encode_batch(&VolumeName::new("data").unwrap(), tokens, &mut bytes);
        bytes
    };
    let all = tokens_of(4);
    let mut seeds: Vec<_> = all.chunks(5).map(batch).collect();
    seeds.push(batch(&all));
    seeds
}
