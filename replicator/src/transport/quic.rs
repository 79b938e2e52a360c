//! The transport between sites: QUIC with mutual TLS.
//!
//! The replica listens, the primary connects. Both prove who they are by certificates of one authority; the primary
//! names the site it wants, the replica may name the one it takes. Whoever does not fit is refused with a reason that
//! both sides log, and nobody else notices.

use std::fmt;
use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::rustls::pki_types::CertificateDer;
use quinn::{ClientConfig, Connection, Endpoint, Incoming, ServerConfig, VarInt};
use tokio::net::UdpSocket;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{sleep, timeout};
use twinfs_certs::{CertError, Identity, SERVER_NAME, Site, peer_site};
use twinfs_core::id::{SiteId, SiteName};
use twinfs_core::limits;

use super::error::{CloseCode, ConnectError, LinkError, ListenError, refusal};
use super::link::{self, CONTROL, Link, LinkEvents, Streams, TOKENS};
use super::options::{self, End};

/// Version of the protocol between sites: of the streams of a link, and of all messages over them.
pub const PROTOCOL_VERSION: u32 = 1;
/// What TLS negotiates, so that another version is refused before anything else is said.
pub const ALPN: &[u8] = b"twinfs/1";

const HANDSHAKE: Duration = Duration::from_millis(limits::HANDSHAKE_MS_MAX);
/// How long a shutdown waits for peers to hear of it.
const FAREWELL: Duration = Duration::from_millis(500);
/// How long an answer may take before it is asked whether anybody is there.
const SCOUT_AFTER: Duration = Duration::from_millis(200);

/// The replica's end: waits for primaries.
pub struct Listener {
    endpoint: Endpoint,
    links: mpsc::Receiver<(Link, LinkEvents)>,
    task: JoinHandle<()>,
}

impl fmt::Debug for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Listener").field("address", &self.endpoint.local_addr().ok()).finish_non_exhaustive()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Links that are up go on; new connections are refused.
        self.endpoint.set_server_config(None);
        self.task.abort();
    }
}

impl Listener {
    /// Listens on a UDP address, for sites of our authority; only for site `allowed` if that is given. Must be called
    /// within a tokio runtime.
    ///
    /// # Errors
    /// [`ListenError::Identity`] if the identity is unusable or out of date, [`ListenError::Bind`] if the address is.
    pub fn bind(
        address: SocketAddr,
        identity: &Identity,
        allowed: Option<SiteName>,
    ) -> Result<Self, ListenError> {
        identity.check_time(SystemTime::now())?;
        let tls = identity.server_config(ALPN)?;
        let crypto = QuicServerConfig::try_from(tls).map_err(quic_refuses_tls)?;
        let mut config = ServerConfig::with_crypto(Arc::new(crypto));
        config
            .transport_config(options::transport(End::Replica))
            // Attempts are taken from QUIC at once; this is what may wait during one turn of the scheduler.
            .max_incoming(2 * limits::HANDSHAKES_MAX)
            .incoming_buffer_size(16 << 10)
            .incoming_buffer_size_total(1 << 20);
        let endpoint = options::endpoint(address, Some(config))
            .map_err(|source| ListenError::Bind { address, source })?;
        let (ready, links) = mpsc::channel(1);
        let door = Arc::new(Door { own: identity.id(), allowed, ready });
        let task = tokio::spawn(keep_door(endpoint.clone(), door));
        Ok(Self { endpoint, links, task })
    }

    /// The address that it listens on, with the port that the system chose if 0 was asked for.
    ///
    /// # Errors
    /// What the system says.
    pub fn local_address(&self) -> io::Result<SocketAddr> {
        self.endpoint.local_addr()
    }

    /// The next connection of a site that is allowed. Handshakes go on while nobody waits here, but for no more than a
    /// few seconds each. May be cancelled without loss.
    pub async fn accept(&mut self) -> (Link, LinkEvents) {
        match self.links.recv().await {
            Some(link) => link,
            // The sender lives as long as the task, and that as long as the listener.
            None => std::future::pending().await,
        }
    }

    /// Closes all its connections with the same code and reason, and waits a moment for the peers to hear of it. The
    /// address is free again afterwards, once the links were dropped.
    pub async fn shutdown(self, code: CloseCode, reason: &str) {
        self.endpoint.close(VarInt::from_u32(code.0), reason.as_bytes());
        let _ = timeout(FAREWELL, self.endpoint.wait_idle()).await;
    }
}

fn quic_refuses_tls(error: impl fmt::Display) -> CertError {
    CertError::Crypto { action: "set up TLS for QUIC", reason: error.to_string() }
}

/// Who may come in, and where to.
struct Door {
    own: SiteId,
    allowed: Option<SiteName>,
    ready: mpsc::Sender<(Link, LinkEvents)>,
}

/// Takes every attempt to connect, many at once, so that a slow or hostile peer holds up nobody.
async fn keep_door(endpoint: Endpoint, door: Arc<Door>) {
    let places = Arc::new(Semaphore::new(limits::HANDSHAKES_MAX));
    let mut handshakes = JoinSet::new();
    while let Some(incoming) = endpoint.accept().await {
        while handshakes.try_join_next().is_some() {}
        let address = incoming.remote_address();
        let Ok(place) = places.clone().try_acquire_owned() else {
            tracing::warn!(%address, "refused a connection: too many others are being set up");
            incoming.refuse();
            continue;
        };
        if places.available_permits() < limits::HANDSHAKES_MAX / 2 && incoming.may_retry() {
            // Under pressure, peers first have to show that they receive at the address they claim.
            let _ = incoming.retry();
            continue;
        }
        let door = door.clone();
        handshakes.spawn(async move {
            match timeout(HANDSHAKE, door.let_in(incoming)).await {
                Ok(Ok(())) => {}
                Ok(Err(reason)) => tracing::warn!(%address, "refused a connection: {reason}"),
                Err(_) => tracing::warn!(%address, "refused a connection: it was not set up in time"),
            }
            drop(place);
        });
    }
}

impl Door {
    async fn let_in(&self, incoming: Incoming) -> Result<(), String> {
        let connection = incoming.await.map_err(|e| refusal(&e))?;
        let refuse = |code: CloseCode, here: String, there: &str| {
            connection.close(VarInt::from_u32(code.0), there.as_bytes());
            Err(here)
        };
        let Some(peer) = proven_site(&connection) else {
            return refuse(
                CloseCode::NOT_PAIRED,
                "its certificate names no twinfs site".into(),
                "your certificate names no twinfs site",
            );
        };
        if peer.id == self.own {
            return refuse(
                CloseCode::NOT_PAIRED,
                format!("`{}` has this site's own identity; a site directory must not be copied", peer.name),
                "you have this site's own identity; a site directory must not be copied",
            );
        }
        if let Some(allowed) = &self.allowed
            && *allowed != peer.name
        {
            return refuse(
                CloseCode::NOT_PAIRED,
                format!("it is site `{}`, and only `{allowed}` is allowed", peer.name),
                &format!("site `{}` is not the one that is allowed here", peer.name),
            );
        }
        self.welcome(connection, peer).await
    }

    async fn welcome(&self, connection: Connection, peer: Site) -> Result<(), String> {
        let reason = |e: LinkError| e.to_string();
        let (mut control_out, mut control_in) = connection.accept_bi().await.map_err(|e| refusal(&e))?;
        if read_kind(&mut control_in).await.map_err(reason)? != CONTROL {
            let what = "the first stream is not for control messages";
            connection.close(VarInt::from_u32(CloseCode::MALFORMED.0), what.as_bytes());
            return Err(what.into());
        }
        // A place to go to comes first: a link that nobody takes would only buffer.
        let Ok(place) = self.ready.reserve().await else { return Ok(()) };
        control_out.write_all(&[CONTROL]).await.map_err(|e| e.to_string())?;
        let tokens_out = open_tokens(&connection).await.map_err(reason)?;
        place.send(link::start(connection, peer, Streams { control_out, control_in, tokens_out }));
        Ok(())
    }
}

/// The site that the peer's certificate proves.
fn proven_site(connection: &Connection) -> Option<Site> {
    let chain = connection.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    peer_site(&chain).ok()
}

async fn read_kind(stream: &mut quinn::RecvStream) -> Result<u8, LinkError> {
    let mut kind = [0];
    match stream.read_exact(&mut kind).await {
        Ok(()) => Ok(kind[0]),
        Err(quinn::ReadExactError::ReadError(quinn::ReadError::ConnectionLost(e))) => Err(e.into()),
        Err(e) => Err(LinkError::Malformed(e.to_string())),
    }
}

async fn open_tokens(connection: &Connection) -> Result<quinn::SendStream, LinkError> {
    let mut stream = connection.open_uni().await?;
    match stream.write_all(&[TOKENS]).await {
        Ok(()) => Ok(stream),
        Err(quinn::WriteError::ConnectionLost(e)) => Err(e.into()),
        Err(e) => Err(LinkError::Malformed(e.to_string())),
    }
}

/// Connects to the replica `expected` at `target` (`HOST:PORT`; an IPv6 address in brackets). All addresses of the host
/// are tried in turn, each for some seconds. Must be called within a tokio runtime.
///
/// # Errors
/// [`ConnectError`]; of several addresses, the error of one where somebody answered.
pub async fn connect(
    target: &str,
    expected: &SiteName,
    identity: &Identity,
) -> Result<(Link, LinkEvents), ConnectError> {
    if expected == identity.name() {
        return Err(ConnectError::Itself(expected.clone()));
    }
    identity.check_time(SystemTime::now())?;
    let resolve = |source| ConnectError::Resolve { target: target.into(), source };
    let addresses = timeout(HANDSHAKE, tokio::net::lookup_host(target))
        .await
        .unwrap_or_else(|_| Err(ErrorKind::TimedOut.into()))
        .map_err(resolve)?;
    let mut worst: Option<ConnectError> = None;
    for address in addresses.take(limits::ADDRESSES_MAX) {
        match connect_to(address, expected, identity).await {
            Ok(link) => return Ok(link),
            Err(error) => {
                if worst.as_ref().is_none_or(|w| !w.was_answered()) {
                    worst = Some(error);
                }
            }
        }
    }
    Err(worst.unwrap_or_else(|| resolve(ErrorKind::NotFound.into())))
}

async fn connect_to(
    address: SocketAddr,
    expected: &SiteName,
    identity: &Identity,
) -> Result<(Link, LinkEvents), ConnectError> {
    let any: SocketAddr = match address {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let endpoint = options::endpoint(any, None).map_err(ConnectError::Socket)?;
    let scout = UdpSocket::bind(any).await.map_err(ConnectError::Socket)?;
    let attempt = async {
        tokio::select! {
            biased;
            link = shake_hands(&endpoint, address, expected, identity) => link,
            error = bounce(&scout, address) => Err(match error.kind() {
                ErrorKind::ConnectionRefused => ConnectError::Refused { address },
                _ => ConnectError::Unreachable { address, source: error },
            }),
        }
    };
    timeout(HANDSHAKE, attempt).await.unwrap_or(Err(ConnectError::NoAnswer { address }))
}

/// Waits for the network to say that nobody is there. QUIC's own socket is not connected and so never hears of it; if
/// no answer comes at once, an empty datagram from a connected one brings the news before the time runs out.
async fn bounce(scout: &UdpSocket, address: SocketAddr) -> io::Error {
    if let Err(error) = scout.connect(address).await {
        return error;
    }
    sleep(SCOUT_AFTER).await;
    if let Err(error) = scout.send(&[]).await {
        return error;
    }
    loop {
        if let Err(error) = scout.recv(&mut [0]).await {
            return error;
        }
    }
}

async fn shake_hands(
    endpoint: &Endpoint,
    address: SocketAddr,
    expected: &SiteName,
    identity: &Identity,
) -> Result<(Link, LinkEvents), ConnectError> {
    let tls = identity.client_config(expected, ALPN)?;
    let crypto = QuicClientConfig::try_from(tls.config).map_err(quic_refuses_tls)?;
    let mut config = ClientConfig::new(Arc::new(crypto));
    config.transport_config(options::transport(End::Primary));
    let failed = |e| ConnectError::of(e, address, expected, tls.answered.get());
    let connecting = endpoint
        .connect_with(config, address, SERVER_NAME)
        .map_err(|e| ConnectError::Unreachable { address, source: io::Error::other(e) })?;
    let connection = connecting.await.map_err(failed)?;
    let ended = |source| ConnectError::Ended { address, source };
    let peer = proven_site(&connection)
        .ok_or_else(|| ended(LinkError::Malformed("its certificate names no twinfs site".into())))?;

    let (mut control_out, mut control_in) = connection.open_bi().await.map_err(failed)?;
    // The replica judges our certificate after we have judged its own; only its answer says that we are in.
    let answer = async {
        control_out.write_all(&[CONTROL]).await.ok()?;
        read_kind(&mut control_in).await.ok()
    };
    match answer.await {
        Some(CONTROL) => {}
        Some(_) => {
            let what = "the answer is not for control messages";
            connection.close(VarInt::from_u32(CloseCode::MALFORMED.0), what.as_bytes());
            return Err(ended(LinkError::Malformed(what.into())));
        }
        None => return Err(failed(connection.closed().await)),
    }
    let tokens_out = open_tokens(&connection).await.map_err(ended)?;
    Ok(link::start(connection, peer, Streams { control_out, control_in, tokens_out }))
}
