//! Why a connection could not be made, or ended.

use std::fmt;
use std::io;
use std::net::SocketAddr;

use quinn::ConnectionError;
use twinfs_certs::{CertError, Site};
use twinfs_core::id::SiteName;
use twinfs_core::limits;

/// Why a side closed a connection. Codes below 16 are the transport's own, the others are free for what is above it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CloseCode(pub u32);

impl CloseCode {
    /// The work is done, or the program ends.
    pub const DONE: Self = Self(0);
    /// This site is not paired with that one.
    pub const NOT_PAIRED: Self = Self(1);
    /// The other side sent bytes that are not twinfs.
    pub const MALFORMED: Self = Self(2);
    /// Too many connections are being set up.
    pub const BUSY: Self = Self(3);
    /// First code that the transport leaves to others.
    pub const FIRST_FREE: Self = Self(16);
}

impl fmt::Display for CloseCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "code {}", self.0)
    }
}

/// Why a link ended, or did not take something.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// The other side closed it.
    #[error("the other site closed the connection ({code}): {reason}")]
    ClosedByPeer {
        /// Its code.
        code: CloseCode,
        /// Its explanation, made printable.
        reason: String,
    },
    /// This side closed it.
    #[error("the connection was closed here")]
    ClosedHere,
    /// Nothing was heard for too long.
    #[error("no sign of the other site for {} seconds: is it, or the network, down?", limits::LINK_IDLE_MS_MAX / 1000)]
    Lost,
    /// The other side does not know the connection any more.
    #[error("the other site was restarted")]
    PeerRestarted,
    /// The other side sent bytes that are not twinfs; the connection was closed.
    #[error("the other site sent something that is not twinfs: {0}")]
    Malformed(String),
    /// What was to be sent is empty or too large; nothing was sent.
    #[error("{bytes} bytes cannot be sent as {what}, only 1 to {bytes_max}")]
    Unsendable {
        /// What was to be sent.
        what: &'static str,
        /// Its size.
        bytes: usize,
        /// The most that is allowed.
        bytes_max: usize,
    },
    /// QUIC gave up.
    #[error("the connection failed: {0}")]
    Transport(String),
}

impl From<ConnectionError> for LinkError {
    fn from(error: ConnectionError) -> Self {
        match error {
            ConnectionError::ApplicationClosed(close) => Self::ClosedByPeer {
                code: CloseCode(u32::try_from(close.error_code.into_inner()).unwrap_or(u32::MAX)),
                reason: printable(&close.reason),
            },
            ConnectionError::LocallyClosed => Self::ClosedHere,
            ConnectionError::TimedOut => Self::Lost,
            ConnectionError::Reset => Self::PeerRestarted,
            ConnectionError::ConnectionClosed(close) => Self::Transport(format!(
                "the other site said {}: {}",
                close.error_code,
                printable(&close.reason)
            )),
            other => Self::Transport(other.to_string()),
        }
    }
}

/// A peer's explanation, safe to log: printable and short.
fn printable(reason: &[u8]) -> String {
    let reason = &reason[..reason.len().min(limits::CLOSE_REASON_BYTES_MAX)];
    String::from_utf8_lossy(reason).escape_debug().to_string()
}

/// Why a replica cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The identity cannot be used.
    #[error(transparent)]
    Identity(#[from] CertError),
    /// The address cannot be used.
    #[error("could not listen on {address} (UDP): {source}; is another twinfs running there?")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
}

/// Why a primary could not connect to its replica.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The own identity cannot be used.
    #[error(transparent)]
    Identity(#[from] CertError),
    /// The peer would be this site.
    #[error("`{0}` is this site itself; name the other site in `--to NAME@HOST:PORT`")]
    Itself(SiteName),
    /// The host name means nothing.
    #[error(
        "could not find `{target}`: {source}; give `--to NAME@HOST:PORT` a host that this machine can resolve"
    )]
    Resolve {
        /// Host and port.
        target: String,
        /// What the system said.
        source: io::Error,
    },
    /// No socket could be opened here.
    #[error("could not open a UDP socket: {0}")]
    Socket(#[source] io::Error),
    /// The host is there, but nobody listens.
    #[error("nobody listens on {address} (UDP); start `twinfs replica` there, or correct the port")]
    Refused {
        /// The address.
        address: SocketAddr,
    },
    /// There is no way to the host.
    #[error("there is no way to {address}: {source}; check the address, the routes and the other machine")]
    Unreachable {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// Nothing came back.
    #[error(
        "no answer from {address} within {} seconds; check that the other machine is up and that firewalls pass UDP",
        limits::HANDSHAKE_MS_MAX / 1000
    )]
    NoAnswer {
        /// The address.
        address: SocketAddr,
    },
    /// The one who answered has a certificate of an authority that is not ours.
    #[error(
        "{address} has an identity from another authority; make both sites' identities with one authority \
         (`twinfs init --authority`, or `twinfs request`, `sign` and `import`)"
    )]
    UnknownAuthority {
        /// The address.
        address: SocketAddr,
    },
    /// The one who answered has a certificate that does not hold.
    #[error(
        "{address} has a certificate that does not hold: {reason}; check both clocks, then the other site's identity"
    )]
    BadCertificate {
        /// The address.
        address: SocketAddr,
        /// What is wrong.
        reason: String,
    },
    /// Another site answered.
    #[error("{address} is site `{}`, not `{expected}`; correct `--to NAME@HOST:PORT`", .found.name)]
    WrongSite {
        /// The address.
        address: SocketAddr,
        /// The site that was meant.
        expected: SiteName,
        /// The site that answered.
        found: Site,
    },
    /// The one who answered speaks something else.
    #[error(
        "{address} does not speak this version of the twinfs protocol; install the same twinfs on both sites"
    )]
    WrongProtocol {
        /// The address.
        address: SocketAddr,
    },
    /// The other site does not accept our certificate.
    #[error(
        "{address} does not accept this site's identity: {reason}; both sites need identities from one authority"
    )]
    NotTrusted {
        /// The address.
        address: SocketAddr,
        /// What it said.
        reason: String,
    },
    /// The other site is paired with somebody else.
    #[error("{address} refuses this site: {reason}; see `--from` of `twinfs replica` there")]
    NotPaired {
        /// The address.
        address: SocketAddr,
        /// What it said.
        reason: String,
    },
    /// The other site is setting up too many connections.
    #[error("{address} is too busy to accept a connection now; it is tried again")]
    Busy {
        /// The address.
        address: SocketAddr,
    },
    /// The connection ended while it was set up.
    #[error("the connection to {address} ended at once: {source}")]
    Ended {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: LinkError,
    },
}

impl ConnectError {
    /// Whether somebody answered at all. Of several addresses, the one that answered has the more telling error.
    pub(super) const fn was_answered(&self) -> bool {
        !matches!(self, Self::Refused { .. } | Self::Unreachable { .. } | Self::NoAnswer { .. })
    }

    /// What a failed handshake means to the side that began it.
    pub(super) fn of(
        error: ConnectionError,
        address: SocketAddr,
        expected: &SiteName,
        answered: Option<&Site>,
    ) -> Self {
        match handshake_fault(&error) {
            Some((_, ALERT_NO_PROTOCOL)) => Self::WrongProtocol { address },
            Some((Side::Here, ALERT_UNKNOWN_CA)) => Self::UnknownAuthority { address },
            Some((Side::Here, _)) => match answered {
                Some(found) if found.name != *expected => {
                    Self::WrongSite { address, expected: expected.clone(), found: found.clone() }
                }
                _ => Self::BadCertificate { address, reason: error.to_string() },
            },
            Some((Side::There, alert)) => Self::NotTrusted { address, reason: alert_text(alert).to_owned() },
            None => match error {
                ConnectionError::TimedOut => Self::NoAnswer { address },
                ConnectionError::VersionMismatch => Self::WrongProtocol { address },
                ConnectionError::ConnectionClosed(close) if close.error_code == CONNECTION_REFUSED => {
                    Self::Busy { address }
                }
                error => match LinkError::from(error) {
                    LinkError::ClosedByPeer { code: CloseCode::NOT_PAIRED, reason } => {
                        Self::NotPaired { address, reason }
                    }
                    LinkError::ClosedByPeer { code: CloseCode::BUSY, .. } => Self::Busy { address },
                    source => Self::Ended { address, source },
                },
            },
        }
    }
}

/// QUIC's code for a server that does not want a connection now (RFC 9000, 20.1).
const CONNECTION_REFUSED: quinn::TransportErrorCode = quinn::TransportErrorCode::CONNECTION_REFUSED;

/// Who found fault with the other in a TLS handshake.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Here,
    There,
}

const ALERT_DECRYPT_ERROR: u8 = 51;
const ALERT_CERTIFICATE_EXPIRED: u8 = 45;
const ALERT_UNKNOWN_CA: u8 = 48;
const ALERT_ACCESS_DENIED: u8 = 49;
const ALERT_CERTIFICATE_REQUIRED: u8 = 116;
const ALERT_NO_PROTOCOL: u8 = 120;

/// The TLS alert in a connection error: QUIC codes from 0x100 are alerts (RFC 9001, 4.8).
fn handshake_fault(error: &ConnectionError) -> Option<(Side, u8)> {
    let (side, code) = match error {
        ConnectionError::TransportError(error) => (Side::Here, error.code),
        ConnectionError::ConnectionClosed(close) => (Side::There, close.error_code),
        _ => return None,
    };
    let alert = u64::from(code).checked_sub(0x100)?;
    u8::try_from(alert).ok().map(|alert| (side, alert))
}

const fn alert_text(alert: u8) -> &'static str {
    match alert {
        ALERT_UNKNOWN_CA => "it comes from another authority",
        ALERT_CERTIFICATE_EXPIRED => {
            "the certificate is not valid at this time (expired, or a clock is wrong)"
        }
        ALERT_CERTIFICATE_REQUIRED => "no certificate was shown",
        ALERT_ACCESS_DENIED => "it is for another site",
        ALERT_DECRYPT_ERROR => "a signature does not hold",
        ALERT_NO_PROTOCOL => "it does not speak this version of the twinfs protocol",
        _ => "the certificate does not hold",
    }
}

/// What a failed handshake means to the side that listens, for its log.
pub(super) fn refusal(error: &ConnectionError) -> String {
    match handshake_fault(error) {
        Some((Side::Here, ALERT_UNKNOWN_CA)) => {
            "its identity comes from another authority (or it is no twinfs site)".into()
        }
        Some((Side::There, alert)) => {
            format!("it does not accept this site's identity: {}", alert_text(alert))
        }
        Some((Side::Here, alert)) => format!("{} ({error})", alert_text(alert)),
        None => LinkError::from(error.clone()).to_string(),
    }
}
