//! Extended attributes and ACLs.

use rustix::fs::{XattrFlags, getxattr, getxattr_query, listxattr, removexattr, setxattr};
use rustix::io::Errno;
use twinfs_core::id::FileId;
use twinfs_core::limits;
use twinfs_core::update::{Intent, Op, is_xattr_name};

use crate::credentials::{Caller, SetId};
use crate::errno::{FsError, Result};
use crate::mirror::{Mirror, Reserved, Target, attr, read_back, unrecorded};
use crate::ops::attr::fd_path;

pub(crate) const ACCESS_ACL: &[u8] = b"system.posix_acl_access";
pub(crate) const DEFAULT_ACL: &[u8] = b"system.posix_acl_default";
/// How xfs keeps the ACLs, which it shows a second time under their own names.
const XFS_ACLS: &[u8] = b"trusted.SGI_ACL_";
/// Only the superuser sees these.
pub(crate) const TRUSTED: &[u8] = b"trusted.";

impl Mirror {
    /// The value of an extended attribute.
    ///
    /// # Errors
    /// `ENODATA` if there is none; otherwise the backing file system's.
    pub fn getxattr(&self, nodeid: u64, name: &[u8]) -> Result<Vec<u8>> {
        if self.is_list(nodeid) || !is_mirrored(name) {
            return Err(FsError::Os(Errno::NODATA));
        }
        let target = self.target(nodeid)?;
        read_value(&fd_path(&target), name)
    }

    /// The names of all extended attributes that the caller may see, each ended by a NUL.
    ///
    /// # Errors
    /// The backing file system's.
    pub fn listxattr(&self, caller: Caller, nodeid: u64) -> Result<Vec<u8>> {
        if self.is_list(nodeid) {
            return Ok(Vec::new());
        }
        let target = self.target(nodeid)?;
        let mut names = vec![0; limits::XATTR_VALUE_BYTES_MAX];
        let len = match listxattr(fd_path(&target), names.as_mut_slice()) {
            Err(Errno::OPNOTSUPP) => 0,
            other => other?,
        };
        let shown = |name: &&[u8]| is_mirrored(name) && (caller.uid == 0 || !name.starts_with(TRUSTED));
        Ok(names[..len]
            .split(|byte| *byte == 0)
            .filter(shown)
            .flat_map(|name| [name, b"\0"].concat())
            .collect())
    }

    /// Sets an extended attribute; `flags` are those of `setxattr(2)`.
    ///
    /// # Errors
    /// [`FsError::ReservedXattr`]; otherwise the backing file system's.
    pub fn setxattr(&self, caller: Caller, nodeid: u64, name: &[u8], value: &[u8], flags: u32) -> Result<()> {
        let target = self.xattr_target(nodeid, name)?;
        if value.len() > limits::XATTR_VALUE_BYTES_MAX {
            return Err(FsError::Os(Errno::TOOBIG));
        }
        let file = target.node.id;
        let intent = Intent::Xattr { file, name };
        let pending = self.reserve(target.volume, &intent, name.len() + value.len(), 0)?;
        let _guard = self.stripes.lock(&[file]);
        {
            let _set_id = SetId::keep(name != ACCESS_ACL || caller.keeps_set_id())?;
            setxattr(fd_path(&target), name, value, XattrFlags::from_bits_retain(flags))?;
        }
        let attrs = std::iter::once((file, attr(&read_back(&target.fd)?))).collect();
        if name != ACCESS_ACL && name != DEFAULT_ACL {
            let _stamp = pending.publish(Op::SetXattr { file, name, value }, attrs, &[]);
            return Ok(());
        }
        // An ACL that says no more than the mode is not kept.
        let kept = self.read_xattr(&target, name)?;
        let op = match kept.as_deref() {
            Some(kept) if kept.len() <= value.len() => Op::SetXattr { file, name, value: kept },
            Some(_) => Op::SetXattr { file, name, value },
            None => Op::RemoveXattr { file, name },
        };
        let _stamp = pending.publish(op, attrs, &[]);
        Ok(())
    }

    /// Removes an extended attribute.
    ///
    /// # Errors
    /// [`FsError::ReservedXattr`]; otherwise the backing file system's.
    pub fn removexattr(&self, nodeid: u64, name: &[u8]) -> Result<()> {
        let target = self.xattr_target(nodeid, name)?;
        let file = target.node.id;
        let pending = self.reserve(target.volume, &Intent::Xattr { file, name }, name.len(), 0)?;
        let _guard = self.stripes.lock(&[file]);
        removexattr(fd_path(&target), name)?;
        let attrs = std::iter::once((file, attr(&read_back(&target.fd)?))).collect();
        let _stamp = pending.publish(Op::RemoveXattr { file, name }, attrs, &[]);
        Ok(())
    }

    fn xattr_target(&self, nodeid: u64, name: &[u8]) -> Result<Target<'_>> {
        let target = self.target(nodeid)?;
        if is_mirrored(name) { Ok(target) } else { Err(FsError::ReservedXattr) }
    }

    /// The length of an extended attribute, if the object has it.
    pub(crate) fn xattr_len(&self, target: &Target<'_>, name: &[u8]) -> Result<Option<usize>> {
        match getxattr_query(fd_path(target), name) {
            Ok(len) => Ok(Some(len)),
            Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Reads back an extended attribute after a change.
    pub(crate) fn read_xattr(&self, target: &Target<'_>, name: &[u8]) -> Result<Option<Vec<u8>>> {
        match read_value(&fd_path(target), name) {
            Ok(value) => Ok(Some(value)),
            Err(FsError::Os(Errno::NODATA | Errno::OPNOTSUPP)) => Ok(None),
            Err(error) => Err(unrecorded("reading back an extended attribute", error)),
        }
    }

    /// The length of the ACL that what is made in a directory inherits, if there is one.
    pub(crate) fn default_acl_len(&self, dir: &Target<'_>) -> Option<usize> {
        self.xattr_len(dir, DEFAULT_ACL).ok().flatten().filter(|len| *len > 0)
    }

    /// What [`record_inherited_acls`](Self::record_inherited_acls) needs room for, if the ACL has `len` bytes.
    pub(crate) fn inherited_acls<'n>(
        dir: FileId,
        name: &'n [u8],
        len: usize,
    ) -> [(Intent<'n>, usize, usize); 2] {
        [ACCESS_ACL, DEFAULT_ACL].map(|acl| (Intent::Acls { dir, name }, acl.len() + len, 0))
    }

    /// Records the ACLs that a new object has inherited, under the lock of its directory: nobody knows the object yet.
    pub(crate) fn record_inherited_acls<'a>(
        &self,
        target: &Target<'_>,
        reserved: impl Iterator<Item = Reserved<'a>>,
    ) -> Result<()> {
        let file = target.node.id;
        for (pending, name) in reserved.zip([ACCESS_ACL, DEFAULT_ACL]) {
            if let Some(value) = self.read_xattr(target, name)? {
                let attrs = std::iter::once((file, attr(&read_back(&target.fd)?))).collect();
                let _stamp = pending.publish(Op::SetXattr { file, name, value: &value }, attrs, &[]);
            }
        }
        Ok(())
    }
}

/// Whether an extended attribute is one of the object: neither twinfs's own, nor another view of an ACL.
pub(crate) fn is_mirrored(name: &[u8]) -> bool {
    is_xattr_name(name) && !name.starts_with(XFS_ACLS)
}

/// Reads a value of any length.
fn read_value(path: &std::ffi::CStr, name: &[u8]) -> Result<Vec<u8>> {
    let mut value = vec![0; 256];
    loop {
        match getxattr(path, name, value.as_mut_slice()) {
            Ok(len) => {
                value.truncate(len);
                return Ok(value);
            }
            Err(Errno::RANGE) if value.len() < limits::XATTR_VALUE_BYTES_MAX => {
                value.resize(limits::XATTR_VALUE_BYTES_MAX, 0);
            }
            Err(error) => return Err(error.into()),
        }
    }
}
