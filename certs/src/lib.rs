//! Site identities of twinfs, for mutual TLS.
//!
//! A site is known by a name, which people choose, and by an id of sixteen random bytes, which stays for life. Its
//! certificate binds both to its key. One site makes the *authority*, which signs the certificates of all sites that
//! are to talk with each other.
//!
//! What stands in a site directory (mode 0700):
//!
//! ```text
//! SITE/identity/site.json    name and id
//!               key.pem      the key of the site; made here, never leaves (0600)
//!               cert.pem     the certificate of the site, then the certificate of its authority
//! SITE/authority/key.pem     only on the site that made the authority: its key, which never leaves either (0600)
//!                cert.pem    the certificate of the authority
//! ```
//!
//! Own certificate and authority share one file, so that installing a certificate is one rename: no crash can leave
//! the one without the other.
//!
//! The ways to an identity:
//!
//! * [`init`] – on the machine of the authority, or as the first site, which makes one.
//! * [`request()`], [`sign`], [`import`] – for a site on another machine: the request and the answer travel, no key does.
//!
//! [`load`] gives the [`Identity`], which makes the rustls configurations of both ends.
#![forbid(unsafe_code)]

mod authority;
mod error;
mod identity;
mod request;
mod store;
mod tls;

pub use authority::AUTHORITY_DAYS;
pub use error::CertError;
pub use identity::{Identity, SITE_DAYS, Site, init, load};
pub use request::{Signed, import, request, sign};
pub use tls::{ClientTls, SERVER_NAME, peer_site};
