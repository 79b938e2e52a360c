//! Certificates, requests, keys and site files.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use pem::Pem;
use rustls_pki_types::CertificateDer;
use twinfs_certs::{import, init, load, peer_site, request, sign};
use twinfs_core::id::SiteName;

use crate::{choice, chosen, scratch};

static DIR: OnceLock<PathBuf> = OnceLock::new();

const REQUEST: &str = "CERTIFICATE REQUEST";
const CERTIFICATE: &str = "CERTIFICATE";
const FILES: [&str; 3] = ["site.json", "key.pem", "cert.pem"];

/// An authority, a site that waits for its certificate, and one that has it.
fn fill(dir: &Path) {
    let name = |name: &str| SiteName::new(name).unwrap();
    init(&dir.join("authority"), &name("authority"), None).unwrap();
    let csr = request(&dir.join("waits"), &name("waits")).unwrap();
    let signed = sign(&dir.join("authority"), csr.as_bytes()).unwrap();
    std::fs::write(dir.join("csr.pem"), csr).unwrap();
    std::fs::write(dir.join("bundle.pem"), signed.bundle_pem).unwrap();
    init(&dir.join("ready"), &name("ready"), Some(&dir.join("authority"))).unwrap();
}

fn dir() -> &'static Path {
    scratch(&DIR, fill)
}

fn text(name: &str) -> String {
    std::fs::read_to_string(dir().join(name)).unwrap()
}

/// The certificates or the request in a file, without their text form.
fn der(name: &str) -> Vec<Vec<u8>> {
    pem::parse_many(text(name)).unwrap().into_iter().map(Pem::into_contents).collect()
}

fn armoured(label: &str, der: &[u8]) -> String {
    pem::encode(&Pem::new(label, der))
}

/// Loads an identity one of whose files has these bytes.
fn load_with(file: &str, bytes: &[u8]) -> bool {
    let identity = dir().join("ready/identity");
    let path = identity.join(file);
    let good = std::fs::read(&path).unwrap();
    std::fs::write(&path, bytes).unwrap();
    let loaded = load(&dir().join("ready"));
    std::fs::write(&path, good).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    loaded.is_ok()
}

pub(crate) fn identity(bytes: &[u8]) -> bool {
    let (how, bytes) = choice(bytes);
    match how % 8 {
        0 => sign(&dir().join("authority"), bytes).is_ok(),
        1 => sign(&dir().join("authority"), armoured(REQUEST, bytes).as_bytes()).is_ok(),
        2 => import(&dir().join("waits"), bytes).is_ok(),
        3 => {
            let authority = armoured(CERTIFICATE, &der("bundle.pem")[1]);
            import(&dir().join("waits"), (armoured(CERTIFICATE, bytes) + &authority).as_bytes()).is_ok()
        }
        4 => peer_site(&[CertificateDer::from(bytes)]).is_ok(),
        file => load_with(FILES[usize::from(file) - 5], bytes),
    }
}

pub(crate) fn identity_seeds() -> Vec<Vec<u8>> {
    let (csr, bundle) = (text("csr.pem"), text("bundle.pem"));
    let cert = &der("bundle.pem")[0];
    let mut seeds = vec![
        chosen(0, csr.as_bytes()),
        chosen(1, &der("csr.pem")[0]),
        chosen(2, bundle.as_bytes()),
        chosen(3, cert),
        chosen(4, cert),
    ];
    for (how, file) in (5..).zip(FILES) {
        seeds.push(chosen(how, text(&format!("ready/identity/{file}")).as_bytes()));
    }
    seeds
}
