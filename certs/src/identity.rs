//! Who a site is.

use std::fmt;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{KeyPair, PKCS_ED25519, PublicKeyData};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde::{Deserialize, Serialize};
use twinfs_core::id::{SiteId, SiteName};
use twinfs_core::stamp::Timestamp;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::authority::{Authority, random};
use crate::error::CertError;
use crate::store::{self, CERT_FILE, IDENTITY_DIR, KEY_FILE, NewFile, SITE_FILE};

/// Days for which the certificate of a site is valid. Long, because a disaster recovery site that nobody looked at for
/// years must still work on the day.
pub const SITE_DAYS: u32 = 3653;

const URI_PREFIX: &str = "twinfs://site/";

/// A site as its certificate proves it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Site {
    /// What people call it.
    pub name: SiteName,
    /// What it is for life.
    pub id: SiteId,
}

impl Site {
    /// The form that stands in certificates, as a URI among the alternative names of the subject. A DNS name would not
    /// do: it knows no `_`, ignores case, and has no room for the id.
    pub(crate) fn to_uri(&self) -> String {
        format!("{URI_PREFIX}{}/{}", self.name, self.id)
    }

    fn from_uri(uri: &str) -> Option<Self> {
        let (name, id) = uri.strip_prefix(URI_PREFIX)?.split_once('/')?;
        let site = Self { name: SiteName::new(name).ok()?, id: SiteId::try_from(id.to_owned()).ok()? };
        // One site, one spelling.
        (site.to_uri() == uri).then_some(site)
    }

    /// Finds the one site among the URIs of a certificate or request.
    pub(crate) fn among<'a>(what: &str, uris: impl Iterator<Item = &'a str>) -> Result<Self, CertError> {
        let mut uris = uris.filter(|uri| uri.starts_with(URI_PREFIX));
        match (uris.next().and_then(Self::from_uri), uris.next()) {
            (Some(site), None) => Ok(site),
            _ => Err(CertError::malformed(what, "it does not name exactly one twinfs site")),
        }
    }
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name, self.id)
    }
}

/// The identity of the site on this machine: who it is, and the key and certificates that prove it.
pub struct Identity {
    pub(crate) site: Site,
    pub(crate) key: PrivateKeyDer<'static>,
    pub(crate) cert: CertificateDer<'static>,
    pub(crate) authority: CertificateDer<'static>,
    valid: (SystemTime, SystemTime),
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Never the key.
        f.debug_struct("Identity").field("site", &self.site).finish_non_exhaustive()
    }
}

impl Identity {
    /// Name and id.
    #[must_use]
    pub const fn site(&self) -> &Site {
        &self.site
    }

    /// The name of the site.
    #[must_use]
    pub const fn name(&self) -> &SiteName {
        &self.site.name
    }

    /// The id of the site.
    #[must_use]
    pub const fn id(&self) -> SiteId {
        self.site.id
    }

    /// SHA-256 of the authority's certificate, for people to compare on both machines.
    #[must_use]
    pub fn authority_fingerprint(&self) -> String {
        crate::tls::fingerprint(&self.authority)
    }

    /// The instant at which the certificate ends.
    #[must_use]
    pub const fn valid_until(&self) -> SystemTime {
        self.valid.1
    }

    /// Whether the certificate is valid at `now`. Not checked by [`load`]: a site whose certificate ran out cannot
    /// talk, but it can still be promoted.
    ///
    /// # Errors
    /// [`CertError::OutOfDate`].
    pub fn check_time(&self, now: SystemTime) -> Result<(), CertError> {
        if (self.valid.0..=self.valid.1).contains(&now) {
            return Ok(());
        }
        let [from, until] = [self.valid.0, self.valid.1].map(utc);
        Err(CertError::OutOfDate { name: self.site.name.clone(), from, until })
    }
}

fn utc(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp(u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)).to_string()
}

/// Gives a site directory its identity. With `authority`, the site directory of another site on this machine, that
/// one's authority signs it; without, the site makes an authority of its own, to which others then join.
///
/// # Errors
/// [`CertError::Exists`] if the site has an identity; [`CertError::Unsigned`] if it waits for one;
/// [`CertError::NoAuthority`], [`CertError::NameTaken`]; and when files cannot be read or written.
pub fn init(site_dir: &Path, name: &SiteName, authority: Option<&Path>) -> Result<Identity, CertError> {
    init_at(site_dir, name, authority, SystemTime::now())
}

pub(crate) fn init_at(
    site_dir: &Path,
    name: &SiteName,
    authority: Option<&Path>,
    now: SystemTime,
) -> Result<Identity, CertError> {
    store::make_site_dir(site_dir)?;
    match load(site_dir) {
        Err(CertError::NoIdentity { .. }) => {}
        Ok(identity) => {
            return Err(CertError::Exists { site: site_dir.into(), name: identity.site.name });
        }
        Err(other) => return Err(other),
    }
    let site = Site { name: name.clone(), id: SiteId::from_bytes(random()?) };
    let authority_dir = authority.unwrap_or(site_dir);
    let authority = match authority {
        Some(other) => {
            check_name_free(other, &site)?;
            Authority::load(other)?
        }
        None => Authority::make(site_dir, name, now)?,
    };
    let key = new_key()?;
    let bundle = authority.sign(authority_dir, &site, &key, now)?;
    let files = [
        NewFile { name: SITE_FILE, text: &site_json(&site)? },
        NewFile { name: KEY_FILE, text: &key.serialize_pem() },
        NewFile { name: CERT_FILE, text: &bundle },
    ];
    store::install_dir(site_dir, IDENTITY_DIR, &files)?;
    load(site_dir)
}

/// Refuses to give the name of the authority's own site to another site. A slip of the pen: the same `--name` twice.
pub(crate) fn check_name_free(authority_dir: &Path, site: &Site) -> Result<(), CertError> {
    match read_site(authority_dir)? {
        Some(own) if own.name == site.name && own.id != site.id => {
            Err(CertError::NameTaken { name: site.name.clone() })
        }
        _ => Ok(()),
    }
}

/// Reads the identity of a site directory.
///
/// # Errors
/// [`CertError::NoIdentity`] and [`CertError::Unsigned`] if there is none (yet); [`CertError::SiteDirOpen`],
/// [`CertError::NotOwner`] and [`CertError::KeyOpen`] if it is not safe from others; and when its parts do not fit
/// together.
pub fn load(site_dir: &Path) -> Result<Identity, CertError> {
    store::check_site_dir(site_dir)?;
    let dir = site_dir.join(IDENTITY_DIR);
    let site = read_site(site_dir)?.ok_or_else(|| CertError::NoIdentity { site: site_dir.into() })?;
    match store::read_text(&dir.join(CERT_FILE))? {
        Some(bundle) => assemble(&dir, site, &bundle),
        None => Err(CertError::Unsigned { site: site_dir.into(), name: site.name }),
    }
}

/// Puts an identity together from the key in `dir` and a bundle, and checks that they belong together.
pub(crate) fn assemble(dir: &Path, site: Site, bundle: &str) -> Result<Identity, CertError> {
    let (key_path, key_pem) = store::read_key(dir)?
        .ok_or_else(|| CertError::malformed(dir.display().to_string(), "the key file is missing"))?;
    let bad_key = |reason: String| CertError::malformed(key_path.display().to_string(), reason);
    let public = KeyPair::from_pem(&key_pem).map_err(|e| bad_key(e.to_string()))?.subject_public_key_info();
    let key = PrivateKeyDer::from_pem_slice(key_pem.as_bytes()).map_err(|e| bad_key(e.to_string()))?;

    let what = "the certificate bundle";
    let certs: Vec<_> = CertificateDer::pem_slice_iter(bundle.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|e| CertError::malformed(what, e))?;
    let [cert, authority] = <[CertificateDer<'static>; 2]>::try_from(certs).map_err(|certs| {
        CertError::malformed(
            what,
            format!("it holds {} certificates, not two (the site's, then its authority's)", certs.len()),
        )
    })?;
    if public_key(&cert)? != public {
        return Err(CertError::WrongKey { path: key_path });
    }
    let found = site_of(&cert)?;
    if found != site {
        return Err(CertError::WrongSite { expected: site.name, found });
    }
    let valid = validity(&cert)?;
    Ok(Identity { site, key, cert, authority, valid })
}

pub(crate) fn new_key() -> Result<KeyPair, CertError> {
    KeyPair::generate_for(&PKCS_ED25519).map_err(|e| CertError::crypto("make a key", e))
}

pub(crate) fn site_json(site: &Site) -> Result<String, CertError> {
    let mut text =
        serde_json::to_string_pretty(site).map_err(|e| CertError::crypto("write the site file", e))?;
    text.push('\n');
    Ok(text)
}

/// Reads the site file; `None` if there is none.
pub(crate) fn read_site(site_dir: &Path) -> Result<Option<Site>, CertError> {
    let path = site_dir.join(IDENTITY_DIR).join(SITE_FILE);
    let Some(text) = store::read_text(&path)? else { return Ok(None) };
    serde_json::from_str(&text).map(Some).map_err(|e| CertError::malformed(path.display().to_string(), e))
}

fn parse<'a>(cert: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, CertError> {
    match X509Certificate::from_der(cert) {
        Ok((_, parsed)) => Ok(parsed),
        Err(e) => Err(CertError::malformed("the certificate", e)),
    }
}

/// The site that a certificate is for. Proves nothing unless the certificate was verified.
pub(crate) fn site_of(cert: &CertificateDer<'_>) -> Result<Site, CertError> {
    let parsed = parse(cert)?;
    let names = parsed
        .subject_alternative_name()
        .map_err(|e| CertError::malformed("the certificate", e))?
        .map(|extension| extension.value.general_names.as_slice())
        .unwrap_or_default();
    let uris = names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    Site::among("the certificate", uris)
}

/// The public key of a certificate, as the DER of its `SubjectPublicKeyInfo`.
pub(crate) fn public_key(cert: &CertificateDer<'_>) -> Result<Vec<u8>, CertError> {
    Ok(parse(cert)?.tbs_certificate.subject_pki.raw.to_vec())
}

/// First and last instant of a certificate.
pub(crate) fn validity(cert: &CertificateDer<'_>) -> Result<(SystemTime, SystemTime), CertError> {
    let parsed = parse(cert)?;
    let instant = |seconds: i64| {
        let seconds = u64::try_from(seconds).ok()?;
        UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
    };
    let validity = parsed.validity();
    instant(validity.not_before.timestamp())
        .zip(instant(validity.not_after.timestamp()))
        .ok_or_else(|| CertError::malformed("the certificate", "its validity is out of range"))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn name(name: &str) -> SiteName {
        SiteName::new(name).unwrap()
    }

    #[test]
    fn the_first_site_makes_the_authority_and_the_second_joins() {
        let scratch = tempfile::tempdir().unwrap();
        let (nyc_dir, chi_dir) = (scratch.path().join("nyc"), scratch.path().join("chi"));
        assert!(matches!(load(&nyc_dir), Err(CertError::NoIdentity { .. })));
        let nyc = init(&nyc_dir, &name("nyc_1.Prod"), None).unwrap();
        let chi = init(&chi_dir, &name("chi"), Some(&nyc_dir)).unwrap();
        assert_eq!(nyc.name().as_str(), "nyc_1.Prod");
        assert_ne!(nyc.id(), chi.id());
        assert_eq!(nyc.authority_fingerprint(), chi.authority_fingerprint());
        assert_eq!(site_of(&chi.cert).unwrap(), *chi.site());
        assert_eq!(load(&chi_dir).unwrap().site(), chi.site());
        assert!(!chi_dir.join("authority").exists());
        for key in ["identity/key.pem", "authority/key.pem"] {
            assert_eq!(fs::metadata(nyc_dir.join(key)).unwrap().permissions().mode() & 0o7777, 0o600);
        }
        assert!(!format!("{nyc:?}").contains("key"));
        let years = nyc.valid_until().duration_since(SystemTime::now()).unwrap().as_secs() / 86_400 / 365;
        assert_eq!(years, 10);
    }

    #[test]
    fn an_identity_is_never_overwritten() {
        let scratch = tempfile::tempdir().unwrap();
        let dir = scratch.path().join("s");
        let first = init(&dir, &name("one"), None).unwrap();
        let refused = init(&dir, &name("two"), None).unwrap_err();
        assert!(matches!(&refused, CertError::Exists { name, .. } if name.as_str() == "one"), "{refused}");
        assert_eq!(load(&dir).unwrap().site(), first.site());
    }

    #[test]
    fn joining_needs_an_authority_and_a_name_of_ones_own() {
        let scratch = tempfile::tempdir().unwrap();
        let dirs = ["a", "b", "c"].map(|d| scratch.path().join(d));
        init(&dirs[0], &name("a"), None).unwrap();
        init(&dirs[1], &name("b"), Some(&dirs[0])).unwrap();
        let refused = init(&dirs[2], &name("c"), Some(&dirs[1]));
        assert!(matches!(refused, Err(CertError::NoAuthority { .. })), "{refused:?}");
        let refused = init(&dirs[2], &name("a"), Some(&dirs[0]));
        assert!(matches!(refused, Err(CertError::NameTaken { .. })), "{refused:?}");
        init(&dirs[2], &name("c"), Some(&dirs[0])).unwrap();
    }

    #[test]
    fn a_key_that_others_can_read_is_refused() {
        let scratch = tempfile::tempdir().unwrap();
        init(scratch.path(), &name("a"), None).unwrap();
        let key = scratch.path().join("identity/key.pem");
        fs::set_permissions(&key, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(load(scratch.path()), Err(CertError::KeyOpen { mode: 0o640, .. })));
    }

    #[test]
    fn mixed_up_parts_are_refused() {
        let scratch = tempfile::tempdir().unwrap();
        let (a, b) = (scratch.path().join("a"), scratch.path().join("b"));
        init(&a, &name("a"), None).unwrap();
        init(&b, &name("b"), Some(&a)).unwrap();
        fs::copy(b.join("identity/cert.pem"), a.join("identity/cert.pem")).unwrap();
        assert!(matches!(load(&a), Err(CertError::WrongKey { .. })));
        fs::copy(b.join("identity/key.pem"), a.join("identity/key.pem")).unwrap();
        assert!(matches!(load(&a), Err(CertError::WrongSite { .. })));
        fs::write(a.join("identity/cert.pem"), "nothing").unwrap();
        assert!(matches!(load(&a), Err(CertError::Malformed { .. })));
        fs::write(a.join("identity/site.json"), "{}").unwrap();
        assert!(matches!(load(&a), Err(CertError::Malformed { .. })));
    }

    #[test]
    fn time_is_checked_apart_from_loading() {
        let scratch = tempfile::tempdir().unwrap();
        let then = SystemTime::now() - Duration::from_secs(86_400 * 366 * 11);
        let old = init_at(scratch.path(), &name("a"), None, then).unwrap();
        old.check_time(then).unwrap();
        let refused = old.check_time(SystemTime::now()).unwrap_err();
        assert!(matches!(refused, CertError::OutOfDate { .. }), "{refused}");
        load(scratch.path()).unwrap();
    }

    #[test]
    fn uris_name_exactly_one_site() {
        let site = Site { name: name("nyc_1"), id: SiteId::from_bytes([7; 16]) };
        let uri = site.to_uri();
        let among = |uris: &[&str]| Site::among("it", uris.iter().copied());
        assert_eq!(among(&["https://example.org", &uri]).unwrap(), site);
        assert!(among(&[]).is_err());
        assert!(among(&[&uri, &uri]).is_err());
        assert!(among(&[&uri.to_uppercase()]).is_err());
        assert!(among(&[&uri.replace("07", "AB")]).is_err());
        assert!(among(&[&format!("{uri}/x")]).is_err());
        assert!(among(&["twinfs://site/../00"]).is_err());
    }
}
