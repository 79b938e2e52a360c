//! Identities for sites on other machines: request, sign, import. The keys stay where they were made.

use std::path::Path;
use std::time::SystemTime;

use rcgen::{CertificateSigningRequestParams, KeyPair, SanType};
use twinfs_core::id::{SiteId, SiteName};

use crate::authority::{Authority, random, site_params};
use crate::error::CertError;
use crate::identity::{self, Identity, Site};
use crate::store::{self, CERT_FILE, IDENTITY_DIR, KEY_FILE, NewFile, SITE_FILE};

/// Makes the key and id of a site, if it has none yet, and gives the request for its certificate, as PEM. Asking again
/// before the answer was imported gives a request for the same key.
///
/// # Errors
/// [`CertError::Exists`] if the site has its certificate, or waits for one under another name; and when files cannot be
/// read or written.
pub fn request(site_dir: &Path, name: &SiteName) -> Result<String, CertError> {
    store::make_site_dir(site_dir)?;
    let site = match identity::load(site_dir) {
        Err(CertError::NoIdentity { .. }) => begin(site_dir, name)?,
        Err(CertError::Unsigned { name: waiting, .. }) if waiting == *name => {
            identity::read_site(site_dir)?.ok_or_else(|| CertError::NoIdentity { site: site_dir.into() })?
        }
        Err(CertError::Unsigned { name, .. }) => {
            return Err(CertError::Exists { site: site_dir.into(), name });
        }
        Ok(identity) => {
            return Err(CertError::Exists { site: site_dir.into(), name: identity.site.name });
        }
        Err(other) => return Err(other),
    };
    let dir = site_dir.join(IDENTITY_DIR);
    let (path, key) =
        store::read_key(&dir)?.ok_or_else(|| CertError::NoIdentity { site: site_dir.into() })?;
    let key = KeyPair::from_pem(&key).map_err(|e| CertError::malformed(path.display().to_string(), e))?;
    site_params(&site)?
        .serialize_request(&key)
        .and_then(|csr| csr.pem())
        .map_err(|e| CertError::crypto("make the request", e))
}

fn begin(site_dir: &Path, name: &SiteName) -> Result<Site, CertError> {
    let site = Site { name: name.clone(), id: SiteId::from_bytes(random()?) };
    let files = [
        NewFile { name: SITE_FILE, text: &identity::site_json(&site)? },
        NewFile { name: KEY_FILE, text: &identity::new_key()?.serialize_pem() },
    ];
    store::install_dir(site_dir, IDENTITY_DIR, &files)?;
    Ok(site)
}

/// A request that the authority granted.
#[derive(Debug)]
pub struct Signed {
    /// The site that asked.
    pub site: Site,
    /// Its certificate and the authority's, as PEM, for [`import`].
    pub bundle_pem: String,
}

/// Signs a request with the authority of a site directory. The request must be signed by the key it names, and nothing
/// but its site and key is heeded.
///
/// # Errors
/// [`CertError::NoAuthority`], [`CertError::AuthorityExpired`], [`CertError::NameTaken`]; [`CertError::Malformed`] if
/// the request is not one.
pub fn sign(site_dir: &Path, csr_pem: &[u8]) -> Result<Signed, CertError> {
    let authority = Authority::load(site_dir)?;
    let what = "the certificate request";
    let text = store::parse_text(what, csr_pem)?;
    let csr = CertificateSigningRequestParams::from_pem(text).map_err(|e| CertError::malformed(what, e))?;
    let uris = csr.params.subject_alt_names.iter().filter_map(|name| match name {
        SanType::URI(uri) => Some(uri.as_str()),
        _ => None,
    });
    let site = Site::among(what, uris)?;
    identity::check_name_free(site_dir, &site)?;
    let bundle_pem = authority.sign(site_dir, &site, &csr.public_key, SystemTime::now())?;
    Ok(Signed { site, bundle_pem })
}

/// Installs the answer to a request: certificate and authority. They must be for this site's name, id and key, and must
/// hold now. A bundle for the same key may be imported again.
///
/// # Errors
/// [`CertError::NoIdentity`] if no request was made here; [`CertError::WrongKey`], [`CertError::WrongSite`],
/// [`CertError::NotValid`], [`CertError::Malformed`] if the bundle is not the answer to it.
pub fn import(site_dir: &Path, bundle_pem: &[u8]) -> Result<Identity, CertError> {
    store::check_site_dir(site_dir)?;
    let dir = site_dir.join(IDENTITY_DIR);
    let site =
        identity::read_site(site_dir)?.ok_or_else(|| CertError::NoIdentity { site: site_dir.into() })?;
    let text = store::parse_text("the certificate bundle", bundle_pem)?;
    let identity = identity::assemble(&dir, site, text)?;
    identity.check_time(SystemTime::now())?;
    identity.check_chain(SystemTime::now())?;
    store::replace_file(&dir, &NewFile { name: CERT_FILE, text })?;
    Ok(identity)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::{init, load};

    fn name(name: &str) -> SiteName {
        SiteName::new(name).unwrap()
    }

    #[test]
    fn a_site_on_another_machine_gets_its_certificate() {
        let scratch = tempfile::tempdir().unwrap();
        let (nyc, chi) = (scratch.path().join("nyc"), scratch.path().join("chi"));
        let authority = init(&nyc, &name("nyc"), None).unwrap();
        let csr = request(&chi, &name("chi")).unwrap();
        let unsigned = load(&chi).unwrap_err();
        assert!(matches!(unsigned, CertError::Unsigned { .. }), "{unsigned}");
        // Asking again keeps the key, so that either answer fits.
        request(&chi, &name("chi")).unwrap();
        assert!(matches!(request(&chi, &name("chicago")), Err(CertError::Exists { .. })));
        assert!(matches!(init(&chi, &name("chi"), None), Err(CertError::Unsigned { .. })));

        let signed = sign(&nyc, csr.as_bytes()).unwrap();
        assert_eq!(signed.site.name, name("chi"));
        assert!(!signed.bundle_pem.contains("PRIVATE"));
        let imported = import(&chi, signed.bundle_pem.as_bytes()).unwrap();
        assert_eq!(*imported.site(), signed.site);
        assert_eq!(imported.authority_fingerprint(), authority.authority_fingerprint());
        assert_eq!(load(&chi).unwrap().site(), imported.site());
        assert!(matches!(request(&chi, &name("chi")), Err(CertError::Exists { .. })));
    }

    #[test]
    fn bundles_that_do_not_fit_are_refused_and_change_nothing() {
        let scratch = tempfile::tempdir().unwrap();
        let [nyc, ber, chi, par] = ["nyc", "ber", "chi", "par"].map(|d| scratch.path().join(d));
        init(&nyc, &name("nyc"), None).unwrap();
        init(&ber, &name("ber"), None).unwrap();
        let csr = request(&chi, &name("chi")).unwrap();
        let good = sign(&nyc, csr.as_bytes()).unwrap().bundle_pem;
        let other_key = sign(&nyc, request(&par, &name("par")).unwrap().as_bytes()).unwrap().bundle_pem;
        assert!(matches!(import(&chi, other_key.as_bytes()), Err(CertError::WrongKey { .. })));

        // Our certificate, but with the authority of others.
        let end = "-----END CERTIFICATE-----\n";
        let ours = good.split_inclusive(end).next().unwrap();
        let theirs = sign(&ber, csr.as_bytes()).unwrap().bundle_pem;
        let mixed = format!("{ours}{}", theirs.split_inclusive(end).nth(1).unwrap());
        let refused = import(&chi, mixed.as_bytes());
        assert!(matches!(refused, Err(CertError::NotValid { .. })), "{refused:?}");

        for bad in [&b""[..], b"\xff", ours.as_bytes(), csr.as_bytes(), &good.as_bytes()[..good.len() / 2]] {
            let refused = import(&chi, bad);
            assert!(matches!(refused, Err(CertError::Malformed { .. })), "{refused:?}");
        }
        assert!(matches!(load(&chi), Err(CertError::Unsigned { .. })));
        assert!(matches!(import(&scratch.path().join("none"), b""), Err(CertError::NoIdentity { .. })));
        import(&chi, good.as_bytes()).unwrap();
    }

    #[test]
    fn requests_are_verified_and_only_name_and_key_are_heeded() {
        let scratch = tempfile::tempdir().unwrap();
        let (nyc, chi) = (scratch.path().join("nyc"), scratch.path().join("chi"));
        init(&nyc, &name("nyc"), None).unwrap();
        assert!(matches!(sign(&chi, b""), Err(CertError::NoAuthority { .. })));
        assert!(matches!(sign(&nyc, b"what"), Err(CertError::Malformed { .. })));

        let same_name = request(&chi, &name("nyc")).unwrap();
        assert!(matches!(sign(&nyc, same_name.as_bytes()), Err(CertError::NameTaken { .. })));

        // A request that asks to be an authority becomes an ordinary site.
        let key = identity::new_key().unwrap();
        let site = Site { name: name("eve"), id: SiteId::from_bytes([1; 16]) };
        let mut params = site_params(&site).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
        let greedy = params.serialize_request(&key).unwrap();
        let signed = sign(&nyc, greedy.pem().unwrap().as_bytes()).unwrap();
        use rustls_pki_types::pem::PemObject;
        let cert = rustls_pki_types::CertificateDer::from_pem_slice(signed.bundle_pem.as_bytes()).unwrap();
        let (_, parsed) = x509_parser::parse_x509_certificate(&cert).unwrap();
        assert!(!parsed.is_ca());
        assert!(!parsed.key_usage().unwrap().unwrap().value.key_cert_sign());

        // A request whose signature does not hold.
        let mut der = greedy.der().to_vec();
        *der.last_mut().unwrap() ^= 1;
        let refused = CertificateSigningRequestParams::from_der(&der.as_slice().into());
        assert_eq!(refused.unwrap_err(), rcgen::Error::InvalidCertificationRequestSignature);
    }
}
