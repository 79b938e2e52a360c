//! rustls configurations of both ends: TLS 1.3 only, both sides authenticated, nothing resumed and nothing sent early.

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, verify_server_cert_signed_by_trust_anchor};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use twinfs_core::id::SiteName;

use crate::error::CertError;
use crate::identity::{Identity, Site, site_of};

/// The server name that TLS clients have to give. It is neither sent nor compared: the name of the site is.
pub const SERVER_NAME: &str = "twinfs.invalid";

/// The configuration of the side that opens a connection.
pub struct ClientTls {
    /// What rustls needs. It accepts one site only.
    pub config: Arc<ClientConfig>,
    /// Set during the handshake, once the authority's signature was verified: the site that answered. It is set also
    /// if that is not the expected one and the handshake fails, so that the error can name it.
    pub answered: Arc<OnceLock<Site>>,
}

impl fmt::Debug for ClientTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientTls").field("answered", &self.answered).finish_non_exhaustive()
    }
}

impl Identity {
    /// The configuration for one connection to site `expected`. The handshake fails unless the other side proves, by a
    /// certificate of our authority, to be that site: with `CertificateError::ApplicationVerificationFailure` (TLS alert
    /// `access_denied`) if it is another site.
    ///
    /// # Errors
    /// [`CertError::Crypto`] if rustls does not take our key or certificates.
    pub fn client_config(&self, expected: &SiteName, alpn: &[u8]) -> Result<ClientTls, CertError> {
        let provider = Arc::new(ring::default_provider());
        let answered = Arc::new(OnceLock::new());
        let verifier = SiteVerifier {
            roots: self.roots()?,
            provider: provider.clone(),
            expected: expected.clone(),
            answered: answered.clone(),
        };
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(failed)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_auth_cert(vec![self.cert.clone()], self.key.clone_key())
            .map_err(failed)?;
        config.alpn_protocols = vec![alpn.to_vec()];
        config.resumption = Resumption::disabled();
        config.enable_early_data = false;
        config.enable_sni = false;
        Ok(ClientTls { config: Arc::new(config), answered })
    }

    /// The configuration for accepting connections. The handshake fails unless the other side has a certificate of our
    /// authority; which site that is, [`peer_site`] tells afterwards.
    ///
    /// # Errors
    /// [`CertError::Crypto`] if rustls does not take our key or certificates.
    pub fn server_config(&self, alpn: &[u8]) -> Result<Arc<ServerConfig>, CertError> {
        let provider = Arc::new(ring::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(self.roots()?), provider.clone())
            .build()
            .map_err(|e| CertError::crypto("set up TLS", e))?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(failed)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(vec![self.cert.clone()], self.key.clone_key())
            .map_err(failed)?;
        config.alpn_protocols = vec![alpn.to_vec()];
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.max_early_data_size = 0;
        Ok(Arc::new(config))
    }

    /// Checks our own certificate against the authority, as a peer will.
    pub(crate) fn check_chain(&self, now: SystemTime) -> Result<(), CertError> {
        let now = now
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_err(|_| CertError::NotValid { reason: "the clock stands before 1970".into() })?;
        verify_chain(
            &self.cert,
            &self.roots()?,
            &[],
            UnixTime::since_unix_epoch(now),
            &ring::default_provider(),
        )
        .map_err(|e| CertError::NotValid { reason: e.to_string() })
    }

    fn roots(&self) -> Result<RootCertStore, CertError> {
        let mut roots = RootCertStore::empty();
        roots.add(self.authority.clone()).map_err(|e| CertError::NotValid { reason: e.to_string() })?;
        Ok(roots)
    }
}

/// The site that a peer proved to be: of the certificate chain that rustls verified during the handshake.
///
/// # Errors
/// [`CertError::Malformed`] if there is no certificate, or it does not name exactly one site.
pub fn peer_site(verified_chain: &[CertificateDer<'_>]) -> Result<Site, CertError> {
    let cert = verified_chain
        .first()
        .ok_or_else(|| CertError::malformed("the peer's certificate", "it showed none"))?;
    site_of(cert)
}

fn failed(e: rustls::Error) -> CertError {
    CertError::crypto("set up TLS", e)
}

fn verify_chain(
    cert: &CertificateDer<'_>,
    roots: &RootCertStore,
    intermediates: &[CertificateDer<'_>],
    now: UnixTime,
    provider: &CryptoProvider,
) -> Result<(), rustls::Error> {
    let parsed = ParsedCertificate::try_from(cert)?;
    let algorithms = provider.signature_verification_algorithms.all;
    verify_server_cert_signed_by_trust_anchor(&parsed, roots, intermediates, now, algorithms)
}

/// SHA-256 of a certificate, as `openssl x509 -fingerprint -sha256` prints it.
pub(crate) fn fingerprint(cert: &CertificateDer<'_>) -> String {
    let hash = ring::cipher_suite::TLS13_AES_128_GCM_SHA256
        .tls13()
        .map(|suite| suite.common.hash_provider.hash(cert))
        .expect("the suite is one of TLS 1.3");
    let digits: Vec<_> = hash.as_ref().iter().map(|b| format!("{b:02X}")).collect();
    digits.join(":")
}

/// Accepts the certificate of one site: signed by the authority, valid now, and naming that site.
#[derive(Debug)]
struct SiteVerifier {
    roots: RootCertStore,
    provider: Arc<CryptoProvider>,
    expected: SiteName,
    answered: Arc<OnceLock<Site>>,
}

impl ServerCertVerifier for SiteVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        verify_chain(end_entity, &self.roots, intermediates, now, &self.provider)?;
        let site = site_of(end_entity).map_err(|_| CertificateError::BadEncoding)?;
        let expected = site.name == self.expected;
        self.answered.get_or_init(|| site);
        if expected {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(CertificateError::ApplicationVerificationFailure.into())
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::time::Duration;

    use rustls::{ClientConnection, ServerConnection};

    use super::*;
    use crate::identity::{init, init_at};

    const ALPN: &[u8] = b"test/1";

    fn name(name: &str) -> SiteName {
        SiteName::new(name).unwrap()
    }

    struct Sites {
        _scratch: tempfile::TempDir,
        nyc_dir: PathBuf,
        nyc: Identity,
        chi: Identity,
        /// Of another authority.
        eve: Identity,
    }

    fn sites() -> Sites {
        let scratch = tempfile::tempdir().unwrap();
        let [nyc_dir, chi, eve] = ["nyc", "chi", "eve"].map(|d| scratch.path().join(d));
        Sites {
            nyc: init(&nyc_dir, &name("nyc"), None).unwrap(),
            chi: init(&chi, &name("chi_2"), Some(&nyc_dir)).unwrap(),
            eve: init(&eve, &name("chi_2"), None).unwrap(),
            nyc_dir,
            _scratch: scratch,
        }
    }

    /// A whole handshake in memory, and the client's certificates as the server saw them.
    fn shake(
        client: Arc<ClientConfig>,
        server: Arc<ServerConfig>,
    ) -> Result<Vec<CertificateDer<'static>>, (rustls::Error, &'static str)> {
        let server_name = ServerName::try_from(SERVER_NAME).unwrap();
        let mut client = ClientConnection::new(client, server_name).unwrap();
        let mut server = ServerConnection::new(server).unwrap();
        for _ in 0..8 {
            let mut wire = Vec::new();
            while client.wants_write() {
                client.write_tls(&mut wire).unwrap();
            }
            server.read_tls(&mut wire.as_slice()).unwrap();
            server.process_new_packets().map_err(|e| (e, "server"))?;
            wire.clear();
            while server.wants_write() {
                server.write_tls(&mut wire).unwrap();
            }
            client.read_tls(&mut wire.as_slice()).unwrap();
            client.process_new_packets().map_err(|e| (e, "client"))?;
        }
        assert!(!client.is_handshaking() && !server.is_handshaking());
        assert_eq!(client.handshake_kind(), Some(rustls::HandshakeKind::Full));
        Ok(server.peer_certificates().unwrap().iter().map(|c| c.clone().into_owned()).collect())
    }

    #[derive(Debug)]
    struct NoCert;

    impl rustls::client::ResolvesClientCert for NoCert {
        fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<rustls::sign::CertifiedKey>> {
            None
        }

        fn has_certs(&self) -> bool {
            false
        }
    }

    #[test]
    fn both_sides_prove_their_name_and_id() {
        let s = sites();
        let tls = s.nyc.client_config(&name("chi_2"), ALPN).unwrap();
        let server = s.chi.server_config(ALPN).unwrap();
        for _ in 0..2 {
            let chain = shake(tls.config.clone(), server.clone()).unwrap();
            assert_eq!(peer_site(&chain).unwrap(), *s.nyc.site());
        }
        assert_eq!(tls.answered.get(), Some(s.chi.site()));
    }

    #[test]
    fn a_site_of_another_name_is_refused_and_named() {
        let s = sites();
        for expected in ["chi", "CHI_2", "nyc"] {
            let tls = s.nyc.client_config(&name(expected), ALPN).unwrap();
            let (error, side) = shake(tls.config, s.chi.server_config(ALPN).unwrap()).unwrap_err();
            assert_eq!(error, CertificateError::ApplicationVerificationFailure.into());
            assert_eq!((side, tls.answered.get()), ("client", Some(s.chi.site())));
        }
    }

    #[test]
    fn sites_of_another_authority_are_refused_on_both_sides() {
        let s = sites();
        let tls = s.nyc.client_config(&name("chi_2"), ALPN).unwrap();
        let (error, side) = shake(tls.config, s.eve.server_config(ALPN).unwrap()).unwrap_err();
        assert_eq!((error, side), (CertificateError::UnknownIssuer.into(), "client"));
        assert_eq!(tls.answered.get(), None);

        // A client that would take any authority, to see the server refuse it.
        let mut eve = s.eve;
        eve.authority = s.nyc.authority.clone();
        let tls = eve.client_config(&name("nyc"), ALPN).unwrap();
        let (error, side) = shake(tls.config, s.nyc.server_config(ALPN).unwrap()).unwrap_err();
        assert_eq!((error, side), (CertificateError::UnknownIssuer.into(), "server"));
    }

    #[test]
    fn clients_without_a_certificate_or_with_another_protocol_are_refused() {
        let s = sites();
        let server = s.chi.server_config(ALPN).unwrap();
        let tls = s.nyc.client_config(&name("chi_2"), b"test/2").unwrap();
        let (error, _) = shake(tls.config, server.clone()).unwrap_err();
        assert_eq!(error, rustls::Error::NoApplicationProtocol);

        let tls = s.nyc.client_config(&name("chi_2"), ALPN).unwrap();
        let mut bare = Arc::unwrap_or_clone(tls.config);
        bare.client_auth_cert_resolver = Arc::new(NoCert);
        let (error, side) = shake(Arc::new(bare), server).unwrap_err();
        assert_eq!((error, side), (rustls::Error::NoCertificatesPresented, "server"));
    }

    #[test]
    fn certificates_out_of_date_are_refused() {
        let s = sites();
        let then = SystemTime::now() - Duration::from_secs(86_400 * 366 * 11);
        let [old_nyc, old_chi] = ["old_nyc", "old_chi"].map(|d| s.nyc_dir.with_file_name(d));
        let old_nyc_id = init_at(&old_nyc, &name("nyc"), None, then).unwrap();
        let old_chi_id = init_at(&old_chi, &name("chi"), Some(&old_nyc), then).unwrap();
        // The authority lasts twice as long, so only the certificate of the site is out of date.
        let fresh = init(&s.nyc_dir.with_file_name("fresh"), &name("fresh"), Some(&old_nyc)).unwrap();
        let tls = fresh.client_config(&name("chi"), ALPN).unwrap();
        let (error, side) = shake(tls.config, old_chi_id.server_config(ALPN).unwrap()).unwrap_err();
        assert!(
            matches!(&error, rustls::Error::InvalidCertificate(CertificateError::ExpiredContext { .. })),
            "{error}"
        );
        assert_eq!(side, "client");
        let tls = old_nyc_id.client_config(&name("fresh"), ALPN).unwrap();
        let (error, side) = shake(tls.config, fresh.server_config(ALPN).unwrap()).unwrap_err();
        assert!(
            matches!(&error, rustls::Error::InvalidCertificate(CertificateError::ExpiredContext { .. })),
            "{error}"
        );
        assert_eq!(side, "server");
    }

    #[test]
    fn fingerprints_look_as_openssl_prints_them() {
        let print = fingerprint(&CertificateDer::from(b"abc".to_vec()));
        assert!(print.starts_with("BA:78:16:BF:8F:01:CF:EA:") && print.len() == 95, "{print}");
    }
}
