//! The names of things: sites, sessions, volumes, files, epochs.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::limits;

/// Why a name from a person or a peer was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{name}` is not a usable {what}: use 1 to {max} letters, digits, `-`, `_` or `.`, not starting with `.` or `-`",
    max = limits::LABEL_BYTES_MAX
)]
pub struct BadLabel {
    what: &'static str,
    name: String,
}

fn check_label(what: &'static str, name: &str) -> Result<(), BadLabel> {
    let good = !name.is_empty()
        && name.len() <= limits::LABEL_BYTES_MAX
        && !name.starts_with(['.', '-'])
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
    if good { Ok(()) } else { Err(BadLabel { what, name: name.escape_debug().to_string() }) }
}

macro_rules! label {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// Checks and takes a name.
            ///
            /// # Errors
            /// [`BadLabel`] unless it is a short plain word that is safe as a file name on any system.
            pub fn new(name: impl Into<String>) -> Result<Self, BadLabel> {
                let name = name.into();
                check_label($what, &name)?;
                Ok(Self(name))
            }

            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = BadLabel;
            fn try_from(name: String) -> Result<Self, BadLabel> {
                Self::new(name)
            }
        }

        impl std::str::FromStr for $name {
            type Err = BadLabel;
            fn from_str(name: &str) -> Result<Self, BadLabel> {
                Self::new(name)
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

label! {
    /// The name of a site, as its certificate proves it.
    SiteName, "site name"
}
label! {
    /// The name of a volume: the directory below the replica's mount point, and the key of the volume in its session.
    VolumeName, "volume name"
}

macro_rules! random_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name([u8; 16]);

        impl $name {
            /// Takes sixteen random bytes (the core has no randomness of its own).
            #[must_use]
            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(bytes)
            }

            /// The sixteen bytes.
            #[must_use]
            pub const fn as_bytes(&self) -> &[u8; 16] {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.to_string()
            }
        }

        impl TryFrom<String> for $name {
            type Error = BadHex;
            fn try_from(text: String) -> Result<Self, BadHex> {
                parse_hex(&text).map(Self)
            }
        }
    };
}

/// Text that should have been hexadecimal digits, two for each byte.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("an identifier must be hexadecimal digits of the right number")]
pub struct BadHex;

fn parse_hex<const N: usize>(text: &str) -> Result<[u8; N], BadHex> {
    let digits = text.as_bytes();
    if digits.len() != 2 * N {
        return Err(BadHex);
    }
    let nibble = |d: u8| char::from(d).to_digit(16).and_then(|v| u8::try_from(v).ok()).ok_or(BadHex);
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = nibble(pair[0])? << 4 | nibble(pair[1])?;
    }
    Ok(bytes)
}

random_id! {
    /// One end of the mirror, for life.
    SiteId
}
random_id! {
    /// The volumes of one primary host that share one consistency time.
    SessionId
}

/// One life of a volume's tree at one site. It changes when the tree or its file system was restored, because inode
/// numbers and generations then no longer name what they named. Drawn by the site that owns the tree, so it stands for
/// the origin site too. Never zero.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct VolumeInstance(std::num::NonZeroU64);

impl VolumeInstance {
    /// Takes a random number; `None` for zero.
    #[must_use]
    pub const fn new(random: u64) -> Option<Self> {
        match std::num::NonZeroU64::new(random) {
            Some(n) => Some(Self(n)),
            None => None,
        }
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0.get()
    }
}

impl fmt::Display for VolumeInstance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for VolumeInstance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VolumeInstance({self})")
    }
}

/// Names a file for life: the tree it was born in, and its file handle there (inode and generation).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct FileId {
    /// The tree in which the file was born.
    pub instance: VolumeInstance,
    /// Its inode number there.
    pub ino: u64,
    /// Its inode generation there, which tells apart the files that had one inode number after each other.
    pub generation: u32,
}

impl FileId {
    /// Bytes of the encoded form.
    pub const BYTES: usize = 20;

    /// The encoded form: instance, inode, generation, little-endian.
    #[must_use]
    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..8].copy_from_slice(&self.instance.get().to_le_bytes());
        bytes[8..16].copy_from_slice(&self.ino.to_le_bytes());
        bytes[16..].copy_from_slice(&self.generation.to_le_bytes());
        bytes
    }

    /// Reads the encoded form; `None` if the instance is zero.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; Self::BYTES]) -> Option<Self> {
        let (instance, rest) = bytes.split_first_chunk::<8>()?;
        let (ino, rest) = rest.split_first_chunk::<8>()?;
        let (generation, _) = rest.split_first_chunk::<4>()?;
        Some(Self {
            instance: VolumeInstance::new(u64::from_le_bytes(*instance))?,
            ino: u64::from_le_bytes(*ino),
            generation: u32::from_le_bytes(*generation),
        })
    }
}

impl fmt::Display for FileId {
    /// Also the name of the object in the replica's staging directory.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}-{:x}-{:x}", self.instance.get(), self.ino, self.generation)
    }
}

impl fmt::Debug for FileId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FileId({self})")
    }
}

impl std::str::FromStr for FileId {
    type Err = BadHex;
    fn from_str(text: &str) -> Result<Self, BadHex> {
        let mut parts = text.split('-');
        let mut number = || parts.next().and_then(|part| u64::from_str_radix(part, 16).ok()).ok_or(BadHex);
        let instance = VolumeInstance::new(number()?).ok_or(BadHex)?;
        let ino = number()?;
        let generation = u32::try_from(number()?).map_err(|_| BadHex)?;
        let id = Self { instance, ino, generation };
        if id.to_string() == text { Ok(id) } else { Err(BadHex) }
    }
}

/// One mount of the primary: drawn at random each time, so that a reverted machine that re-issues numbers is noticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Incarnation(pub u64);

/// The generation of the primary role. A promote raises it; lower ones, and equal ones of another site, are refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Epoch {
    /// Counts promotions.
    pub number: u64,
    /// The site that holds the primary role in this epoch.
    pub site: SiteId,
}

impl Epoch {
    /// Whether a set of epoch `other` must be refused by one who knows `self`: it is lower, or equal and another site's.
    #[must_use]
    pub fn fences(&self, other: &Self) -> bool {
        other.number < self.number || (other.number == self.number && other.site != self.site)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.number, self.site)
    }
}

/// A volume's place in its session, as the handshake lists them. In-memory only; on the wire volumes go by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VolumeIndex(pub u16);

impl VolumeIndex {
    /// As an index of a list of volumes.
    #[must_use]
    pub const fn as_usize(self) -> usize {
        self.0 as usize
    }
}

/// Identifies a record set's contents, and so its place in the chain of its volume: BLAKE3 of its header, which holds
/// the hash of its body.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SetHash(pub [u8; 32]);

impl From<SetHash> for String {
    fn from(hash: SetHash) -> String {
        hash.to_string()
    }
}

impl TryFrom<String> for SetHash {
    type Error = BadHex;
    fn try_from(text: String) -> Result<Self, BadHex> {
        parse_hex(&text).map(Self)
    }
}

impl SetHash {
    /// The predecessor of a volume's first set.
    pub const NONE: Self = Self([0; 32]);
}

impl fmt::Display for SetHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for SetHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SetHash({self})")
    }
}

/// The number of a record set in the chain of its volume: 1, 2, 3, … without gaps. Zero means "none yet".
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SetNumber(pub u64);

impl SetNumber {
    /// The next one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for SetNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// The number of a consistency group at a replica: 1, 2, 3, … Zero means that nothing was committed yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct GroupNumber(pub u64);

impl GroupNumber {
    /// The next one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for GroupNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}
