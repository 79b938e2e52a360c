//! What can go wrong with identities, said to the person who has to put it right.

use std::io;
use std::path::PathBuf;

use twinfs_core::id::SiteName;

use crate::identity::Site;

/// Why an identity could not be made, read or used.
#[derive(Debug, thiserror::Error)]
pub enum CertError {
    /// The site directory holds no identity.
    #[error("{site} has no identity yet; run `twinfs init --site {site} --name NAME` first")]
    NoIdentity {
        /// The site directory.
        site: PathBuf,
    },
    /// The site directory holds a key, but its certificate was not imported.
    #[error(
        "site `{name}` in {site} still waits for its certificate; run `twinfs sign` where the authority is, \
         then `twinfs import --site {site} FILE` here"
    )]
    Unsigned {
        /// The site directory.
        site: PathBuf,
        /// The name in the pending request.
        name: SiteName,
    },
    /// An identity is there and is never overwritten.
    #[error(
        "{site} already belongs to site `{name}`, and that is not overwritten; choose another directory, \
         or stop twinfs and remove {site}/identity to give the site a new identity"
    )]
    Exists {
        /// The site directory.
        site: PathBuf,
        /// The name of the site that it belongs to.
        name: SiteName,
    },
    /// Somebody else installed the same thing at the same time.
    #[error("{path} appeared just now: another `twinfs` command is at work in this site directory")]
    Raced {
        /// What was to be made.
        path: PathBuf,
    },
    /// The site directory has no authority.
    #[error(
        "{site} holds no authority and so cannot sign; name the site directory in which the first `twinfs init` was run"
    )]
    NoAuthority {
        /// The site directory.
        site: PathBuf,
    },
    /// The authority's certificate is out of date.
    #[error("the authority in {site} expired; all sites need new identities from a new authority")]
    AuthorityExpired {
        /// The site directory of the authority.
        site: PathBuf,
    },
    /// Two sites would carry one name.
    #[error(
        "`{name}` is the name of the authority's own site; give the other site another name, so that they can be told apart"
    )]
    NameTaken {
        /// The name asked for.
        name: SiteName,
    },
    /// The site directory cannot be trusted with keys.
    #[error(
        "{path} is open to other users (mode {mode:o}); run `chmod 700 {path}` if it is meant to be a site directory"
    )]
    SiteDirOpen {
        /// The site directory.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The site directory belongs to somebody else.
    #[error("{path} belongs to user {owner}, not to the user who runs twinfs; choose another site directory")]
    NotOwner {
        /// The site directory.
        path: PathBuf,
        /// The user who owns it.
        owner: u32,
    },
    /// A key can be read by others.
    #[error(
        "{path} can be read by other users (mode {mode:o}); run `chmod 600 {path}`, and consider the key known"
    )]
    KeyOpen {
        /// The key file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A certificate does not go with the key beside it.
    #[error("the certificate is not for the key in {path}; import the answer to this site's own request")]
    WrongKey {
        /// The key file.
        path: PathBuf,
    },
    /// A certificate names a site that we did not mean.
    #[error("the certificate is for site `{found}`, not for `{expected}`")]
    WrongSite {
        /// The site that was meant.
        expected: SiteName,
        /// The site that the certificate names.
        found: Site,
    },
    /// A certificate does not stand up to its authority, or is out of date.
    #[error("the certificate does not hold: {reason}")]
    NotValid {
        /// What the verifier said.
        reason: String,
    },
    /// A certificate is not valid at this time.
    #[error(
        "the certificate of site `{name}` is not valid now, only from {from} to {until}; \
         check this machine's clock, or give the site a new certificate"
    )]
    OutOfDate {
        /// The site.
        name: SiteName,
        /// First instant of validity, UTC.
        from: String,
        /// Last instant of validity, UTC.
        until: String,
    },
    /// Bytes that should be a key, certificate, request or site file are not.
    #[error("{what} is not usable: {reason}")]
    Malformed {
        /// What was read.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A cryptographic library call failed.
    #[error("could not {action}: {reason}")]
    Crypto {
        /// What was to be done.
        action: &'static str,
        /// What the library said.
        reason: String,
    },
    /// A file could not be read or written.
    #[error("could not {action} {path}: {source}")]
    Io {
        /// What was to be done.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl CertError {
    pub(crate) fn malformed(what: impl Into<String>, reason: impl ToString) -> Self {
        Self::Malformed { what: what.into(), reason: reason.to_string() }
    }

    pub(crate) fn crypto(action: &'static str, reason: impl ToString) -> Self {
        Self::Crypto { action, reason: reason.to_string() }
    }
}
