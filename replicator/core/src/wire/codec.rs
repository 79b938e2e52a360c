//! The bytes of messages; the byte map stands in the parent module.

use std::collections::BTreeSet;

use bytes::Bytes;

use super::{
    Ack, BadMessage, Damage, FRAME_BYTES, Frame, Hello, HelloVolume, Message, Progress, PromoteReady, Refuse,
    RefuseCode, Text, VERSION, Welcome, WelcomeVolume,
};
use crate::id::{
    Epoch, FileId, GroupNumber, Incarnation, SessionId, SetHash, SetNumber, SiteId, SiteName, VolumeIndex,
    VolumeInstance, VolumeName,
};
use crate::limits;
use crate::session::{ChainPoint, Role, VolumeState};
use crate::stamp::{Seq, Timestamp};

const HELLO: u8 = 1;
const WELCOME: u8 = 2;
const REFUSE: u8 = 3;
const ACK: u8 = 4;
const PROGRESS: u8 = 5;
const NULL_SET: u8 = 6;
const TOKENS: u8 = 7;
const PROMOTE_REQUEST: u8 = 8;
const PROMOTE_READY: u8 = 9;
const PROMOTE_REFUSED: u8 = 10;
const PROMOTE_DONE: u8 = 11;
const BYE: u8 = 12;

/// Largest payload of a kind, in bytes; `None` for an unknown kind. Keeps a peer from making this site set aside a
/// megabyte for an acknowledgement.
const fn payload_len_max(tag: u8) -> Option<usize> {
    Some(match tag {
        HELLO | WELCOME | TOKENS => limits::MESSAGE_BYTES_MAX - FRAME_BYTES,
        REFUSE => 26 + 2 + limits::TEXT_BYTES_MAX,
        ACK => 10,
        PROGRESS => 24,
        NULL_SET => limits::NULL_SET_BYTES_MAX,
        PROMOTE_REQUEST => 0,
        PROMOTE_READY => 10 + 10 * limits::VOLUMES_MAX,
        PROMOTE_REFUSED | BYE => 2 + limits::TEXT_BYTES_MAX,
        PROMOTE_DONE => 24,
        _ => return None,
    })
}

pub(super) fn parse_frame(bytes: &[u8; FRAME_BYTES]) -> Result<Frame, BadMessage> {
    let [version, tag, zero_a, zero_b, len @ ..] = *bytes;
    if version != VERSION {
        return Err(BadMessage::Version(version));
    }
    let len_max = payload_len_max(tag).ok_or(BadMessage::Tag(tag))?;
    if (zero_a, zero_b) != (0, 0) {
        return Err(BadMessage::Malformed("reserved bytes are not zero"));
    }
    let payload_len = u32::from_le_bytes(len);
    if payload_len as usize > len_max {
        return Err(BadMessage::TooLong(payload_len));
    }
    Ok(Frame { tag, payload_len })
}

pub(super) fn encode(message: &Message) -> Vec<u8> {
    let mut out = vec![0; FRAME_BYTES];
    let tag = put_payload(&mut out, message);
    let len = out.len() - FRAME_BYTES;
    assert!(payload_len_max(tag).is_some_and(|max| len <= max), "a message of its own is within bounds");
    let len = u32::try_from(len).expect("bounded by MESSAGE_BYTES_MAX");
    out[..4].copy_from_slice(&[VERSION, tag, 0, 0]);
    out[4..FRAME_BYTES].copy_from_slice(&len.to_le_bytes());
    out
}

fn put_payload(out: &mut Vec<u8>, message: &Message) -> u8 {
    match message {
        Message::Hello(hello) => {
            put_hello(out, hello);
            HELLO
        }
        Message::Welcome(welcome) => {
            put_welcome(out, welcome);
            WELCOME
        }
        Message::Refuse(refuse) => {
            out.push(refuse.code as u8);
            out.push(u8::from(refuse.epoch.is_some()));
            refuse.epoch.iter().for_each(|epoch| put_epoch(out, epoch));
            put_text(out, &refuse.text);
            REFUSE
        }
        Message::Ack(ack) => {
            put_ack(out, ack);
            ACK
        }
        Message::Progress(progress) => {
            put_u64(out, progress.group.0);
            put_u64(out, progress.time.0);
            put_u64(out, progress.applied.0);
            PROGRESS
        }
        Message::NullSet(bytes) => {
            out.extend_from_slice(bytes);
            NULL_SET
        }
        Message::Tokens(bytes) => {
            out.extend_from_slice(bytes);
            TOKENS
        }
        Message::PromoteRequest => PROMOTE_REQUEST,
        Message::PromoteReady(ready) => {
            put_u64(out, ready.end.0);
            put_count(out, ready.finals.len());
            ready.finals.iter().for_each(|ack| put_ack(out, ack));
            PROMOTE_READY
        }
        Message::PromoteRefused(text) => {
            put_text(out, text);
            PROMOTE_REFUSED
        }
        Message::PromoteDone(epoch) => {
            put_epoch(out, epoch);
            PROMOTE_DONE
        }
        Message::Bye(text) => {
            put_text(out, text);
            BYE
        }
    }
}

fn put_hello(out: &mut Vec<u8>, hello: &Hello) {
    out.extend_from_slice(&hello.protocol.to_le_bytes());
    out.extend_from_slice(hello.session.as_bytes());
    out.extend_from_slice(hello.site.as_bytes());
    put_label(out, hello.name.as_str());
    put_epoch(out, &hello.epoch);
    put_u64(out, hello.incarnation.0);
    put_count(out, hello.volumes.len());
    for volume in &hello.volumes {
        put_label(out, volume.name.as_str());
        put_u64(out, volume.instance.get());
        out.extend_from_slice(&volume.root.to_bytes());
        out.push(volume.state as u8);
        put_point(out, &volume.acked);
        put_u64(out, volume.oldest.0);
        put_u64(out, volume.newest.0);
    }
}

fn put_welcome(out: &mut Vec<u8>, welcome: &Welcome) {
    put_epoch(out, &welcome.epoch);
    out.push(welcome.role as u8);
    put_u64(out, welcome.group.0);
    put_u64(out, welcome.time.0);
    put_u64(out, welcome.applied.0);
    match &welcome.damage {
        None => out.push(0),
        Some(damage) => {
            out.push(1 + u8::from(damage.whole));
            put_text(out, &damage.why);
        }
    }
    put_count(out, welcome.volumes.len());
    for volume in &welcome.volumes {
        put_label(out, volume.name.as_str());
        out.push(u8::from(volume.member));
        put_point(out, &volume.durable);
        put_count(out, volume.beyond.len());
        for number in &volume.beyond {
            let offset = u16::try_from(number.0 - volume.durable.number.0)
                .expect("a replica holds sets at most PENDING_SETS_MAX ahead");
            out.extend_from_slice(&offset.to_le_bytes());
        }
    }
}

fn put_u64(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(&value.to_le_bytes());
}

fn put_count(out: &mut Vec<u8>, count: usize) {
    let count = u16::try_from(count).expect("VOLUMES_MAX and PENDING_SETS_MAX fit 16 bits");
    out.extend_from_slice(&count.to_le_bytes());
}

fn put_label(out: &mut Vec<u8>, label: &str) {
    out.push(u8::try_from(label.len()).expect("labels are at most LABEL_BYTES_MAX long"));
    out.extend_from_slice(label.as_bytes());
}

fn put_text(out: &mut Vec<u8>, text: &Text) {
    let bytes = text.as_str().as_bytes();
    out.extend_from_slice(&u16::try_from(bytes.len()).expect("cut at TEXT_BYTES_MAX").to_le_bytes());
    out.extend_from_slice(bytes);
}

fn put_epoch(out: &mut Vec<u8>, epoch: &Epoch) {
    put_u64(out, epoch.number);
    out.extend_from_slice(epoch.site.as_bytes());
}

fn put_point(out: &mut Vec<u8>, point: &ChainPoint) {
    put_u64(out, point.number.0);
    out.extend_from_slice(&point.hash.0);
    put_u64(out, point.last_seq.0);
}

fn put_ack(out: &mut Vec<u8>, ack: &Ack) {
    out.extend_from_slice(&ack.volume.0.to_le_bytes());
    put_u64(out, ack.number.0);
}

pub(super) fn decode(tag: u8, payload_len: u32, payload: &[u8]) -> Result<Message, BadMessage> {
    if payload.len() != payload_len as usize {
        return Err(BadMessage::Malformed("its length is not what its frame says"));
    }
    let mut r = Reader(payload);
    let message = match tag {
        HELLO => Message::Hello(r.hello()?),
        WELCOME => Message::Welcome(r.welcome()?),
        REFUSE => Message::Refuse(Refuse {
            code: RefuseCode::from_u8(r.u8()?).ok_or(BadMessage::Malformed("an unknown refusal"))?,
            epoch: if r.flag()? { Some(r.epoch()?) } else { None },
            text: r.text()?,
        }),
        ACK => Message::Ack(r.ack()?),
        PROGRESS => {
            let (group, time) = (GroupNumber(r.counter()?), Timestamp(r.counter()?));
            Message::Progress(Progress { group, time, applied: Timestamp(r.counter()?) })
        }
        NULL_SET => Message::NullSet(Bytes::copy_from_slice(r.rest())),
        TOKENS => Message::Tokens(Bytes::copy_from_slice(r.rest())),
        PROMOTE_REQUEST => Message::PromoteRequest,
        PROMOTE_READY => {
            let end = Timestamp(r.counter()?);
            let count = r.count(limits::VOLUMES_MAX)?;
            Message::PromoteReady(PromoteReady {
                end,
                finals: (0..count).map(|_| r.ack()).collect::<Result<_, _>>()?,
            })
        }
        PROMOTE_REFUSED => Message::PromoteRefused(r.text()?),
        PROMOTE_DONE => Message::PromoteDone(r.epoch()?),
        BYE => Message::Bye(r.text()?),
        _ => return Err(BadMessage::Tag(tag)),
    };
    if r.0.is_empty() { Ok(message) } else { Err(BadMessage::Malformed("bytes left over")) }
}

/// Reads fields from the front.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn slice(&mut self, len: usize) -> Result<&'a [u8], BadMessage> {
        let (head, tail) = self.0.split_at_checked(len).ok_or(BadMessage::Malformed("it ends too early"))?;
        self.0 = tail;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], BadMessage> {
        let (head, tail) =
            self.0.split_first_chunk::<N>().ok_or(BadMessage::Malformed("it ends too early"))?;
        self.0 = tail;
        Ok(*head)
    }

    fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    fn u8(&mut self) -> Result<u8, BadMessage> {
        self.array::<1>().map(|[b]| b)
    }

    fn u16(&mut self) -> Result<u16, BadMessage> {
        self.array().map(u16::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, BadMessage> {
        self.array().map(u64::from_le_bytes)
    }

    /// A number or time that counts up from zero: half the range, so that adding to it never overflows.
    fn counter(&mut self) -> Result<u64, BadMessage> {
        let value = self.u64()?;
        if value <= i64::MAX as u64 { Ok(value) } else { Err(BadMessage::Malformed("a number out of range")) }
    }

    fn count(&mut self, max: usize) -> Result<usize, BadMessage> {
        let count = usize::from(self.u16()?);
        if count <= max { Ok(count) } else { Err(BadMessage::Malformed("a list is too long")) }
    }

    fn flag(&mut self) -> Result<bool, BadMessage> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(BadMessage::Malformed("a flag is neither 0 nor 1")),
        }
    }

    fn label(&mut self) -> Result<&'a str, BadMessage> {
        let len = usize::from(self.u8()?);
        std::str::from_utf8(self.slice(len)?).map_err(|_| BadMessage::Malformed("a name is not UTF-8"))
    }

    fn volume_name(&mut self) -> Result<VolumeName, BadMessage> {
        VolumeName::new(self.label()?).map_err(|_| BadMessage::Malformed("not a volume name"))
    }

    fn text(&mut self) -> Result<Text, BadMessage> {
        let len = self.count(limits::TEXT_BYTES_MAX)?;
        let text = std::str::from_utf8(self.slice(len)?)
            .map_err(|_| BadMessage::Malformed("a text is not UTF-8"))?;
        Ok(Text::new(text))
    }

    fn epoch(&mut self) -> Result<Epoch, BadMessage> {
        Ok(Epoch { number: self.counter()?, site: SiteId::from_bytes(self.array()?) })
    }

    fn point(&mut self) -> Result<ChainPoint, BadMessage> {
        let point = ChainPoint {
            number: SetNumber(self.counter()?),
            hash: SetHash(self.array()?),
            last_seq: Seq(self.counter()?),
        };
        let started = point.number != SetNumber::default();
        let agrees = started == (point.hash != SetHash::NONE) && point.last_seq.0 >= point.number.0;
        if agrees && (started || point == ChainPoint::START) {
            Ok(point)
        } else {
            Err(BadMessage::Malformed("not a point of a chain"))
        }
    }

    fn ack(&mut self) -> Result<Ack, BadMessage> {
        let volume = self.u16()?;
        if usize::from(volume) >= limits::VOLUMES_MAX {
            return Err(BadMessage::Malformed("a volume out of range"));
        }
        Ok(Ack { volume: VolumeIndex(volume), number: SetNumber(self.counter()?) })
    }

    fn hello(&mut self) -> Result<Hello, BadMessage> {
        let protocol = self.u16()?;
        let session = SessionId::from_bytes(self.array()?);
        let site = SiteId::from_bytes(self.array()?);
        let name = SiteName::new(self.label()?).map_err(|_| BadMessage::Malformed("not a site name"))?;
        let epoch = self.epoch()?;
        let incarnation = Incarnation(self.u64()?);
        let count = self.count(limits::VOLUMES_MAX)?;
        let volumes = (0..count).map(|_| self.hello_volume()).collect::<Result<Vec<_>, _>>()?;
        check_names_occur_once(volumes.iter().map(|volume| &volume.name))?;
        Ok(Hello { protocol, session, site, name, epoch, incarnation, volumes })
    }

    fn hello_volume(&mut self) -> Result<HelloVolume, BadMessage> {
        Ok(HelloVolume {
            name: self.volume_name()?,
            instance: VolumeInstance::new(self.u64()?)
                .ok_or(BadMessage::Malformed("a volume without an instance"))?,
            root: FileId::from_bytes(&self.array()?)
                .ok_or(BadMessage::Malformed("a file of no volume instance"))?,
            state: VolumeState::from_u8(self.u8()?)
                .ok_or(BadMessage::Malformed("an unknown volume state"))?,
            acked: self.point()?,
            oldest: SetNumber(self.counter()?),
            newest: SetNumber(self.counter()?),
        })
    }

    fn welcome(&mut self) -> Result<Welcome, BadMessage> {
        let epoch = self.epoch()?;
        let role = Role::from_u8(self.u8()?).ok_or(BadMessage::Malformed("an unknown role"))?;
        let group = GroupNumber(self.counter()?);
        let time = Timestamp(self.counter()?);
        let applied = Timestamp(self.counter()?);
        let damage = match self.u8()? {
            0 => None,
            kind @ 1..=2 => Some(Damage { whole: kind == 2, why: self.text()? }),
            _ => return Err(BadMessage::Malformed("an unknown kind of damage")),
        };
        let count = self.count(limits::VOLUMES_MAX)?;
        let volumes = (0..count).map(|_| self.welcome_volume()).collect::<Result<Vec<_>, _>>()?;
        check_names_occur_once(volumes.iter().map(|volume| &volume.name))?;
        Ok(Welcome { epoch, role, group, time, applied, damage, volumes })
    }

    fn welcome_volume(&mut self) -> Result<WelcomeVolume, BadMessage> {
        let name = self.volume_name()?;
        let member = self.flag()?;
        let durable = self.point()?;
        let count = self.count(limits::PENDING_SETS_MAX)?;
        let mut beyond = Vec::with_capacity(count);
        // The set after the durable one is missing, or that one would not be the last.
        let mut previous = 1;
        for _ in 0..count {
            let offset = self.u16()?;
            if offset <= previous || usize::from(offset) > limits::PENDING_SETS_MAX {
                return Err(BadMessage::Malformed("sets beyond a gap out of order"));
            }
            previous = offset;
            beyond.push(SetNumber(durable.number.0 + u64::from(offset)));
        }
        Ok(WelcomeVolume { name, member, durable, beyond })
    }
}

fn check_names_occur_once<'a>(names: impl Iterator<Item = &'a VolumeName>) -> Result<(), BadMessage> {
    let mut seen = BTreeSet::new();
    for name in names {
        if !seen.insert(name) {
            return Err(BadMessage::Malformed("a volume is listed twice"));
        }
    }
    Ok(())
}
