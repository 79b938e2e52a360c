//! Real QUIC over loopback.

mod relay;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use quinn::crypto::rustls::QuicClientConfig;
use quinn::rustls;
use quinn::{ClientConfig, Connection, VarInt};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use twinfs_certs::{Identity, SERVER_NAME};
use twinfs_core::id::SiteName;
use twinfs_core::limits;

use super::link::{CONTROL, SET, TOKENS};
use super::options::{self, End};
use super::quic::{self, ALPN, Listener};
use super::{CloseCode, ConnectError, Event, Link, LinkError, LinkEvents};
use relay::{Network, Relay};

/// Only to end a test that hangs.
const PATIENCE: Duration = Duration::from_secs(60);

fn name(name: &str) -> SiteName {
    SiteName::new(name).unwrap()
}

fn identity(dir: &Path, site: &str, authority: Option<&str>) -> Identity {
    let authority = authority.map(|a| dir.join(a));
    twinfs_certs::init(&dir.join(site), &name(site), authority.as_deref()).unwrap()
}

struct Sites {
    scratch: tempfile::TempDir,
    nyc: Identity,
    chi: Identity,
}

impl Sites {
    fn new() -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let nyc = identity(scratch.path(), "nyc", None);
        let chi = identity(scratch.path(), "chi_2", Some("nyc"));
        Self { scratch, nyc, chi }
    }

    fn listen(&self) -> (Listener, String) {
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let listener = Listener::bind(any, &self.chi, Some(name("nyc"))).unwrap();
        let address = listener.local_address().unwrap().to_string();
        (listener, address)
    }

    async fn pair(&self, listener: &mut Listener, target: &str) -> [(Link, LinkEvents); 2] {
        let chi = name("chi_2");
        let connecting = async { quic::connect(target, &chi, &self.nyc).await.unwrap() };
        let both = async { tokio::join!(connecting, listener.accept()) };
        timeout(PATIENCE, both).await.expect("the sites find each other").into()
    }
}

fn pattern(bytes: usize, seed: usize) -> Bytes {
    (0..bytes).map(|i| (i.wrapping_mul(31) >> 3 ^ seed) as u8).collect::<Vec<_>>().into()
}

async fn next(events: &mut LinkEvents) -> Event {
    timeout(PATIENCE, events.next()).await.expect("something arrives").expect("the link is up")
}

async fn next_error(events: &mut LinkEvents) -> LinkError {
    loop {
        if let Err(error) = timeout(PATIENCE, events.next()).await.expect("the link ends") {
            return error;
        }
    }
}

/// Shows that the listener still serves the site that it is there for.
async fn assert_serves(sites: &Sites, listener: &mut Listener, target: &str) {
    let [(link, _events), (_link, mut events)] = sites.pair(listener, target).await;
    link.send_control(b"hello").await.unwrap();
    assert_eq!(next(&mut events).await, Event::Control(Bytes::from_static(b"hello")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_travels_both_ways() {
    let sites = Sites::new();
    let (mut listener, target) = sites.listen();
    let [near, far] = sites.pair(&mut listener, &target).await;
    assert_eq!((near.0.peer(), far.0.peer()), (sites.chi.site(), sites.nyc.site()));
    assert_eq!(near.0.remote_address().to_string(), target);

    let sizes = [1, 5 << 20, 70_000, limits::SET_BYTES_MAX, 3 << 20, 9 << 20];
    let sets: Vec<_> = sizes.iter().enumerate().map(|(i, n)| pattern(*n, i)).collect();
    let mut ends = JoinSet::new();
    for (link, mut events) in [near, far] {
        let sets = sets.clone();
        ends.spawn(async move {
            let sender = link.clone();
            let to_send = sets.clone();
            let sending = tokio::spawn(async move {
                let mut sending = JoinSet::new();
                for set in to_send {
                    let link = sender.clone();
                    sending.spawn(async move { link.send_set(set).await.unwrap() });
                }
                for i in 0..100_u8 {
                    sender.send_control(&[i; 100]).await.unwrap();
                    sender.send_tokens(&vec![i; 3000]).await.unwrap();
                }
                sending.join_all().await;
            });
            let (mut control, mut tokens, mut arrived) = (0_u8, 0_u8, Vec::new());
            while (control, tokens, arrived.len()) != (100, 100, sets.len()) {
                match next(&mut events).await {
                    Event::Control(message) => {
                        assert_eq!(message, [control; 100].as_slice());
                        control += 1;
                    }
                    Event::Tokens(batch) => {
                        assert_eq!(batch, vec![tokens; 3000]);
                        tokens += 1;
                    }
                    Event::Set(set) => arrived.push(set),
                }
            }
            sending.await.unwrap();
            arrived.sort_by_key(Bytes::len);
            let mut sent = sets;
            sent.sort_by_key(Bytes::len);
            assert!(arrived == sent);
            assert!(link.bytes_sent() > 0 && link.bytes_received() > 30 << 20);
            assert!(link.rtt() > Duration::ZERO);
            (link, events)
        });
    }
    ends.join_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_empty_or_too_large_is_not_sent() {
    let sites = Sites::new();
    let (mut listener, target) = sites.listen();
    let [(link, _events), (_link, mut events)] = sites.pair(&mut listener, &target).await;
    let long = vec![0; limits::MESSAGE_BYTES_MAX + 1];
    assert!(matches!(link.send_control(&long).await, Err(LinkError::Unsendable { .. })));
    assert!(matches!(link.send_tokens(&[]).await, Err(LinkError::Unsendable { .. })));
    let huge = Bytes::from(vec![0; limits::SET_BYTES_MAX + 1]);
    assert!(matches!(link.send_set(huge).await, Err(LinkError::Unsendable { .. })));
    link.send_control(&long[1..]).await.unwrap();
    assert_eq!(next(&mut events).await, Event::Control(Bytes::copy_from_slice(&long[1..])));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sites_that_do_not_belong_here_are_refused_and_told_why() {
    let sites = Sites::new();
    let dir = sites.scratch.path();
    let (mut listener, target) = sites.listen();
    let chi = name("chi_2");

    let ber = identity(dir, "ber", Some("nyc"));
    let refused = quic::connect(&target, &chi, &ber).await.unwrap_err();
    assert!(
        matches!(&refused, ConnectError::NotPaired { reason, .. } if reason.contains("`ber`")),
        "{refused}"
    );

    let refused = quic::connect(&target, &name("par"), &sites.nyc).await.unwrap_err();
    assert!(
        matches!(&refused, ConnectError::WrongSite { found, .. } if found == sites.chi.site()),
        "{refused}"
    );

    let eve = identity(dir, "eve", None);
    let refused = quic::connect(&target, &chi, &eve).await.unwrap_err();
    assert!(matches!(&refused, ConnectError::UnknownAuthority { .. }), "{refused}");

    let refused = quic::connect(&target, &name("nyc"), &sites.nyc).await.unwrap_err();
    assert!(matches!(&refused, ConnectError::Itself(_)), "{refused}");

    assert_serves(&sites, &mut listener, &target).await;
}

/// A certificate resolver and verifier for clients that our own code would never make.
#[derive(Debug)]
struct Careless(Arc<rustls::crypto::CryptoProvider>);

impl rustls::client::danger::ServerCertVerifier for Careless {
    fn verify_server_cert(
        &self,
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &[rustls::pki_types::CertificateDer<'_>],
        _: &rustls::pki_types::ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        unreachable!("QUIC has no TLS 1.2")
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// The TLS of `identity`, which takes whoever answers.
fn careless(identity: &Identity, alpn: &[u8]) -> rustls::ClientConfig {
    let tls = identity.client_config(&name("any"), alpn).unwrap();
    let mut config = Arc::unwrap_or_clone(tls.config);
    let provider = config.crypto_provider().clone();
    config.dangerous().set_certificate_verifier(Arc::new(Careless(provider)));
    config
}

fn no_cert() -> rustls::ClientConfig {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Careless(provider)))
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN.to_vec()];
    config
}

/// A bare QUIC connection to the listener, for peers that misbehave. Keep the endpoint.
async fn bare(target: &str, tls: rustls::ClientConfig) -> Result<Connection, quinn::ConnectionError> {
    let endpoint = options::endpoint((Ipv4Addr::LOCALHOST, 0).into(), None).unwrap();
    let mut config = ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).unwrap()));
    config.transport_config(options::transport(End::Primary));
    endpoint.connect_with(config, target.parse().unwrap(), SERVER_NAME).unwrap().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn peers_without_a_good_certificate_or_protocol_are_refused() {
    let sites = Sites::new();
    let (mut listener, target) = sites.listen();
    let eve = identity(sites.scratch.path(), "eve", None);
    let address = target.parse().unwrap();
    let classify = |error| ConnectError::of(error, address, &name("chi_2"), None);
    // TLS 1.3 tells a client of its own certificate only after it regards the handshake as done.
    let outcome = async |tls| match bare(&target, tls).await {
        Ok(connection) => timeout(PATIENCE, connection.closed()).await.expect("it is refused"),
        Err(error) => error,
    };

    let refused = classify(outcome(no_cert()).await);
    assert!(
        matches!(&refused, ConnectError::NotTrusted { reason, .. } if reason.contains("no certificate")),
        "{refused}"
    );
    let refused = classify(outcome(careless(&eve, ALPN)).await);
    assert!(
        matches!(&refused, ConnectError::NotTrusted { reason, .. } if reason.contains("another authority")),
        "{refused}"
    );
    let refused = classify(outcome(careless(&sites.nyc, b"twinfs/2")).await);
    assert!(matches!(&refused, ConnectError::WrongProtocol { .. }), "{refused}");

    assert_serves(&sites, &mut listener, &target).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connecting_to_nobody_says_so() {
    let sites = Sites::new();
    // A port that was free a moment ago.
    let (listener, target) = sites.listen();
    listener.shutdown(CloseCode::DONE, "done").await;
    let refused = quic::connect(&target, &name("chi_2"), &sites.nyc).await.unwrap_err();
    assert!(matches!(&refused, ConnectError::Refused { .. }), "{refused}");
    let refused = quic::connect("no port", &name("chi_2"), &sites.nyc).await.unwrap_err();
    assert!(matches!(&refused, ConnectError::Resolve { .. }), "{refused}");
    // Somebody who is there, but does not answer.
    let silent = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let target = silent.local_addr().unwrap().to_string();
    let refused = quic::connect(&target, &name("chi_2"), &sites.nyc).await.unwrap_err();
    assert!(matches!(&refused, ConnectError::NoAnswer { .. }), "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silent_peers_do_not_hold_up_others() {
    let sites = Sites::new();
    let (mut listener, target) = sites.listen();
    // They complete the handshake and then never open their control stream.
    let mut silent = Vec::new();
    for _ in 0..limits::HANDSHAKES_MAX / 2 {
        silent.push(bare(&target, careless(&sites.nyc, ALPN)).await.unwrap());
    }
    assert_serves(&sites, &mut listener, &target).await;
}

/// Peers with a good identity that break the format, each in its own way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn malformed_streams_end_their_connection_only() {
    let sites = Sites::new();
    let (mut listener, target) = sites.listen();
    let [(good, _good_events), (_far, mut far_events)] = sites.pair(&mut listener, &target).await;

    let length = |n: usize| u32::try_from(n).unwrap().to_le_bytes();
    let stream = |kind: u8, n: usize, body: &[u8]| [&[kind][..], &length(n), body].concat();
    let cases: [(&str, bool, Vec<u8>); 9] = [
        ("unknown kind", false, vec![9; 100]),
        ("a second stream of tokens", false, stream(TOKENS, 3, b"abc")),
        ("1 to", false, stream(SET, 0, b"")),
        ("1 to", false, stream(SET, limits::SET_BYTES_MAX + 1, b"abc")),
        ("longer", false, stream(SET, 3, b"abcd")),
        ("shorter", false, stream(SET, 3, b"ab")),
        ("ended early", false, vec![SET, 1]),
        ("1 to", true, length(limits::MESSAGE_BYTES_MAX + 1).to_vec()),
        ("ended early", true, [&length(3)[..], b"ab"].concat()),
    ];
    for (what, on_control, bytes) in cases {
        let connection = bare(&target, careless(&sites.nyc, ALPN)).await.unwrap();
        let (mut control, mut answer) = connection.open_bi().await.unwrap();
        control.write_all(&[CONTROL]).await.unwrap();
        let mut tokens = connection.open_uni().await.unwrap();
        tokens.write_all(&stream(TOKENS, 2, b"ok")).await.unwrap();
        let (_link, mut events) = listener.accept().await;
        let mut kind = [0];
        answer.read_exact(&mut kind).await.unwrap();
        // Its tokens were read, so the second stream of them is the second.
        assert_eq!(next(&mut events).await, Event::Tokens(Bytes::from_static(b"ok")));
        let mut bad = if on_control { control } else { connection.open_uni().await.unwrap() };
        bad.write_all(&bytes).await.unwrap();
        bad.finish().unwrap();
        let error = next_error(&mut events).await;
        assert!(matches!(&error, LinkError::Malformed(w) if w.contains(what)), "{what}: {error}");
        let told = timeout(PATIENCE, connection.closed()).await.unwrap().into();
        assert!(matches!(&told, LinkError::ClosedByPeer { code: CloseCode::MALFORMED, .. }), "{told}");
    }

    // A first stream that is not for control is not even a link.
    let connection = bare(&target, careless(&sites.nyc, ALPN)).await.unwrap();
    let (mut control, _answer) = connection.open_bi().await.unwrap();
    control.write_all(&[SET]).await.unwrap();
    let told = timeout(PATIENCE, connection.closed()).await.unwrap().into();
    assert!(matches!(&told, LinkError::ClosedByPeer { code: CloseCode::MALFORMED, .. }), "{told}");

    good.send_control(b"still here").await.unwrap();
    assert_eq!(next(&mut far_events).await, Event::Control(Bytes::from_static(b"still here")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_closed_link_says_why_and_another_can_follow() {
    let sites = Sites::new();
    let (mut listener, target) = sites.listen();
    for round in 0..3_u32 {
        let [(near, mut near_events), (far, mut far_events)] = sites.pair(&mut listener, &target).await;
        near.send_control(&round.to_le_bytes()).await.unwrap();
        assert_eq!(next(&mut far_events).await, Event::Control(Bytes::copy_from_slice(&round.to_le_bytes())));
        far.close(CloseCode(CloseCode::FIRST_FREE.0 + round), "promoted\n");
        let expected = LinkError::ClosedByPeer { code: CloseCode(16 + round), reason: "promoted\\n".into() };
        assert_eq!(next_error(&mut near_events).await, expected);
        assert_eq!(near.closed().await, expected);
        assert_eq!(near.send_set(Bytes::from_static(b"x")).await, Err(expected.clone()));
        assert_eq!(next_error(&mut far_events).await, LinkError::ClosedHere);
        // Queued or not, a message to a closed link fails before long.
        while near.send_control(b"x").await.is_ok() {}
        assert_eq!(near.send_control(b"x").await, Err(expected));
    }
    // Dropping an end closes too.
    let [near, (_far, mut far_events)] = sites.pair(&mut listener, &target).await;
    drop(near);
    let told = next_error(&mut far_events).await;
    assert!(matches!(&told, LinkError::ClosedByPeer { code: CloseCode::DONE, .. }), "{told}");

    let [(_near, mut near_events), _far] = sites.pair(&mut listener, &target).await;
    listener.shutdown(CloseCode::DONE, "the replica stops").await;
    let told = next_error(&mut near_events).await;
    assert!(matches!(&told, LinkError::ClosedByPeer { reason, .. } if reason.contains("stops")), "{told}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_receiver_holds_the_sender_and_loses_nothing() {
    let sites = Sites::new();
    let (mut listener, target) = sites.listen();
    let [(link, _near_events), (_far, mut events)] = sites.pair(&mut listener, &target).await;
    const SET_BYTES: usize = 4 << 20;
    const SETS: usize = 64;
    let taken = Arc::new(AtomicUsize::new(0));
    let counter = taken.clone();
    let sending = tokio::spawn(async move {
        for i in 0..SETS {
            link.send_set(pattern(SET_BYTES, i)).await.unwrap();
            counter.fetch_add(1, Ordering::Relaxed);
        }
        link
    });
    // Nobody takes anything, so the sender comes to rest, and may be caught only before that.
    let mut before = usize::MAX;
    while before != taken.load(Ordering::Relaxed) {
        before = taken.load(Ordering::Relaxed);
        sleep(Duration::from_millis(500)).await;
    }
    let bound =
        limits::SETS_RECEIVED_BYTES_MAX + limits::SETS_SENT_BYTES_MAX + limits::LINK_WINDOW_BYTES as usize;
    assert!(before * SET_BYTES <= bound, "{before} sets were taken");
    let mut arrived = [false; SETS];
    for _ in 0..SETS {
        let Event::Set(set) = next(&mut events).await else { panic!("only sets were sent") };
        let i = (0..SETS).find(|i| set[..8] == pattern(8, *i)).unwrap();
        assert!(set == pattern(SET_BYTES, i) && !arrived[i]);
        arrived[i] = true;
    }
    sending.await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_pass_while_record_sets_wait_to_be_taken() {
    let sites = Sites::new();
    let (mut listener, target) = sites.listen();
    let [(link, _near_events), (_far, mut events)] = sites.pair(&mut listener, &target).await;
    // As much as a primary ever has in flight.
    let set = Bytes::from(vec![7; limits::IN_FLIGHT_BYTES_MAX / 8]);
    for _ in 0..8 {
        link.send_set(set.clone()).await.unwrap();
    }
    link.send_tokens(b"tokens").await.unwrap();
    link.send_control(b"control").await.unwrap();
    let arrived = async {
        while events.waiting() != (1, 1, 8) {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, arrived).await.expect("all arrives, though nothing is taken");
    assert_eq!(next(&mut events).await, Event::Control(Bytes::from_static(b"control")));
    assert_eq!(next(&mut events).await, Event::Tokens(Bytes::from_static(b"tokens")));
    assert_eq!(next(&mut events).await, Event::Set(set));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_overtake_record_sets_on_a_slow_line() {
    let sites = Sites::new();
    let (mut listener, target) = sites.listen();
    let slow = Network {
        delay: Duration::from_millis(5),
        bytes_per_second: 4 << 20,
        queue: Duration::from_millis(100),
        loss_one_in: 0,
        seed: 1,
    };
    let relay = Relay::to(target.parse().unwrap(), slow).await;
    let [(link, _near_events), (_far, mut events)] =
        sites.pair(&mut listener, &relay.address.to_string()).await;
    let mut sending = JoinSet::new();
    for _ in 0..8 {
        let link = link.clone();
        sending.spawn(async move { link.send_set(Bytes::from(vec![7; 16 << 20])).await });
    }
    // The first set is on its way.
    let begun = link.bytes_sent() + (1 << 20);
    while link.bytes_sent() < begun {
        sleep(Duration::from_millis(5)).await;
    }
    link.send_tokens(b"tokens").await.unwrap();
    assert_eq!(next(&mut events).await, Event::Tokens(Bytes::from_static(b"tokens")));
    assert!(link.bytes_sent() < 64 << 20, "{}", link.bytes_sent());
}

/// Sets arrive whole, and none is missing, over a line that loses one packet in fifty.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lossy_line_loses_nothing() {
    let sites = Sites::new();
    let (mut listener, target) = sites.listen();
    let seed = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos() as u64;
    println!("seed {seed}");
    let lossy = Network {
        delay: Duration::from_millis(2),
        bytes_per_second: 100 << 20,
        queue: Duration::from_millis(50),
        loss_one_in: 50,
        seed,
    };
    let relay = Relay::to(target.parse().unwrap(), lossy).await;
    let [(link, _near_events), (_far, mut events)] =
        sites.pair(&mut listener, &relay.address.to_string()).await;
    let mut sending = JoinSet::new();
    for i in 0..40 {
        let link = link.clone();
        sending.spawn(async move { link.send_set(pattern(10_000 * (i + 1), i)).await.unwrap() });
    }
    let mut arrived = [false; 40];
    for _ in 0..40 {
        let Event::Set(set) = next(&mut events).await else { panic!("only sets were sent") };
        let i = set.len() / 10_000 - 1;
        assert!(set == pattern(10_000 * (i + 1), i) && !arrived[i]);
        arrived[i] = true;
    }
}

#[test]
fn close_reasons_of_peers_are_made_printable() {
    let close = quinn::ApplicationClose {
        error_code: VarInt::from_u64(1 << 40).unwrap(),
        reason: Bytes::from(vec![0x1b; 2000]),
    };
    let LinkError::ClosedByPeer { code, reason } = quinn::ConnectionError::ApplicationClosed(close).into()
    else {
        panic!("it is the peer's")
    };
    assert_eq!(code, CloseCode(u32::MAX));
    assert_eq!(reason, "\\u{1b}".repeat(limits::CLOSE_REASON_BYTES_MAX));
}
