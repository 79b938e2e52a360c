//! The authority: the key that signs the certificates of the sites.

use std::path::Path;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PKCS_ED25519, PublicKeyData, SanType, SerialNumber,
};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use twinfs_core::id::SiteName;

use crate::error::CertError;
use crate::identity::{SITE_DAYS, Site, validity};
use crate::store::{self, AUTHORITY_DIR, CERT_FILE, KEY_FILE, NewFile};

/// Days for which an authority is valid: twice as long as the sites', so that one signed late still gets its full time.
pub const AUTHORITY_DAYS: u32 = 2 * SITE_DAYS;

const DAY: Duration = Duration::from_secs(86_400);

/// An authority whose key is at hand.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    cert_pem: String,
    until: SystemTime,
}

impl Authority {
    /// Makes the authority of a site directory, or takes the one that is there (an `init` that was interrupted left
    /// it, or the site's identity was removed to be made anew).
    pub(crate) fn make(site_dir: &Path, name: &SiteName, now: SystemTime) -> Result<Self, CertError> {
        match Self::load(site_dir) {
            Err(CertError::NoAuthority { .. }) => {}
            other => return other,
        }
        let failed = |e| CertError::crypto("make the authority", e);
        let key = KeyPair::generate_for(&PKCS_ED25519).map_err(failed)?;
        let mut params = CertificateParams::default();
        // The random part keeps the authorities of two careless sites apart, so that a peer of the other one is
        // reported as such and not as a forged signature.
        let mark: String = random::<4>()?.iter().map(|b| format!("{b:02x}")).collect();
        params.distinguished_name = common_name(&format!("twinfs authority of {name} {mark}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.serial_number = Some(serial()?);
        params.not_before = (now - DAY).into();
        params.not_after = (now + AUTHORITY_DAYS * DAY).into();
        let cert = params.self_signed(&key).map_err(failed)?;
        let files = [
            NewFile { name: KEY_FILE, text: &key.serialize_pem() },
            NewFile { name: CERT_FILE, text: &cert.pem() },
        ];
        store::install_dir(site_dir, AUTHORITY_DIR, &files)?;
        Self::load(site_dir)
    }

    /// Reads the authority of a site directory.
    ///
    /// # Errors
    /// [`CertError::NoAuthority`] if it has none.
    pub(crate) fn load(site_dir: &Path) -> Result<Self, CertError> {
        let dir = site_dir.join(AUTHORITY_DIR);
        let (Some((key_path, key_pem)), Some(cert_pem)) =
            (store::read_key(&dir)?, store::read_text(&dir.join(CERT_FILE))?)
        else {
            return Err(CertError::NoAuthority { site: site_dir.into() });
        };
        store::check_site_dir(site_dir)?;
        let key = KeyPair::from_pem(&key_pem)
            .map_err(|e| CertError::malformed(key_path.display().to_string(), e))?;
        let what = || dir.join(CERT_FILE).display().to_string();
        let cert = CertificateDer::from_pem_slice(cert_pem.as_bytes())
            .map_err(|e| CertError::malformed(what(), e))?;
        let until = validity(&cert)?.1;
        if crate::identity::public_key(&cert)? != key.subject_public_key_info() {
            return Err(CertError::WrongKey { path: key_path });
        }
        let issuer = Issuer::from_ca_cert_der(&cert, key).map_err(|e| CertError::malformed(what(), e))?;
        Ok(Self { issuer, cert_pem, until })
    }

    /// Signs a certificate that binds `site` to `public_key`; gives it with the authority's own, as PEM.
    ///
    /// Nothing but site and key is taken from whoever asks: a request cannot smuggle in other powers.
    pub(crate) fn sign(
        &self,
        site_dir: &Path,
        site: &Site,
        public_key: &impl PublicKeyData,
        now: SystemTime,
    ) -> Result<String, CertError> {
        if now >= self.until {
            return Err(CertError::AuthorityExpired { site: site_dir.into() });
        }
        let failed = |e| CertError::crypto("sign the certificate", e);
        let mut params = site_params(site)?;
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        params.serial_number = Some(serial()?);
        params.not_before = (now - DAY).into();
        params.not_after = (now + SITE_DAYS * DAY).min(self.until).into();
        let cert = params.signed_by(public_key, &self.issuer).map_err(failed)?;
        Ok(format!("{}{}", cert.pem(), self.cert_pem))
    }
}

/// The part of a certificate, or of a request for one, that says which site it is.
pub(crate) fn site_params(site: &Site) -> Result<CertificateParams, CertError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = common_name(site.name.as_str());
    let uri = site.to_uri().try_into().map_err(|e| CertError::crypto("name the site", e))?;
    params.subject_alt_names = vec![SanType::URI(uri)];
    Ok(params)
}

fn common_name(name: &str) -> DistinguishedName {
    let mut dn = DistinguishedName::new();
    dn.push(DnType::CommonName, name);
    dn
}

/// A random serial number. Random, because a renewal for the same key must not repeat it: revocation goes by serial.
fn serial() -> Result<SerialNumber, CertError> {
    let mut bytes = random::<16>()?;
    // Positive, and never with leading zeros.
    bytes[0] = bytes[0] & 0x7f | 0x40;
    Ok(SerialNumber::from_slice(&bytes))
}

pub(crate) fn random<const N: usize>() -> Result<[u8; N], CertError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|e| CertError::crypto("draw random bytes", e))?;
    Ok(bytes)
}
