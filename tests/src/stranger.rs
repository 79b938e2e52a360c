//! Peers that do not belong: they knock at a replica's port with another identity, in another protocol, or with garbage.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, Endpoint};
use twinfs_core::id::SiteName;

use crate::ops::Rng;

/// How long a stranger tries.
const PATIENCE: Duration = Duration::from_secs(10);

/// Connects to the replica `chi` at `port` on loopback as the site in `site`, speaking `alpn`, and says `words` on a stream
/// if it is let in. Returns how that ended: what the other side said when it hung up.
///
/// # Errors
/// What went wrong while connecting.
///
/// # Panics
/// If the site has no identity.
pub fn knock(site: &Path, port: u16, alpn: &[u8], words: &[u8]) -> Result<String, String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let talk = talk(site, port, alpn, words);
        tokio::time::timeout(PATIENCE, talk).await.unwrap_or_else(|_| Ok("nothing happened".into()))
    })
}

async fn talk(site: &Path, port: u16, alpn: &[u8], words: &[u8]) -> Result<String, String> {
    let identity = twinfs_certs::load(site).expect("the site has an identity");
    let chi: SiteName = "chi".parse().expect("a site's name");
    let tls = identity.client_config(&chi, alpn).map_err(|error| error.to_string())?;
    let crypto = QuicClientConfig::try_from(tls.config).map_err(|error| error.to_string())?;
    let mut endpoint =
        Endpoint::client(SocketAddr::from(([127, 0, 0, 1], 0))).map_err(|error| error.to_string())?;
    endpoint.set_default_client_config(ClientConfig::new(Arc::new(crypto)));
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    let connecting =
        endpoint.connect(address, twinfs_certs::SERVER_NAME).map_err(|error| error.to_string())?;
    let connection = connecting.await.map_err(|error| error.to_string())?;
    // Whether we are let in is known when the other side has seen our certificate.
    if let Ok((mut send, _receive)) = connection.open_bi().await {
        // It may hang up while we speak.
        if send.write_all(words).await.is_ok() {
            let _ = send.finish();
        }
    }
    if let Ok(mut send) = connection.open_uni().await
        && send.write_all(words).await.is_ok()
    {
        let _ = send.finish();
    }
    Ok(connection.closed().await.to_string())
}

/// Sends datagrams of garbage to a port.
///
/// # Panics
/// If there is no socket to send from.
pub fn throw_garbage(port: u16, datagrams: u64) {
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").expect("a free UDP port");
    let mut random = Rng(port.into());
    for _ in 0..datagrams {
        let len = 1 + random.below(1400) as usize;
        // The first bits say QUIC, now and then.
        let mut bytes = random.bytes(len);
        bytes[0] |= [0x00, 0xc0, 0x40][random.below(3) as usize];
        drop(socket.send_to(&bytes, ("127.0.0.1", port)));
    }
}
