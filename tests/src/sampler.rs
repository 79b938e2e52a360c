//! Reading the replica's view so that one knows which consistency group was seen.

use std::path::{Path, PathBuf};

/// Reads `.twinfs/group` of a view before and after whatever else is read.
#[derive(Debug, Clone)]
pub struct Sampler {
    group: PathBuf,
}

impl Sampler {
    /// For the replica's mount at `view`.
    #[must_use]
    pub fn new(view: &Path) -> Self {
        Self { group: view.join(".twinfs/group") }
    }

    /// The number of the group that is visible now.
    ///
    /// # Panics
    /// If the file does not say.
    #[must_use]
    pub fn group(&self) -> u64 {
        let text = std::fs::read_to_string(&self.group).expect("the view tells its group");
        text.trim().parse().unwrap_or_else(|_| panic!("{} says {text:?}", self.group.display()))
    }

    /// The number of the group that is visible now; `None` if the view does not answer.
    #[must_use]
    pub fn try_group(&self) -> Option<u64> {
        std::fs::read_to_string(&self.group).ok()?.trim().parse().ok()
    }

    /// What `read` returned, and the group that it saw; `None` if it saw several.
    pub fn sample<T>(&self, read: impl FnOnce() -> T) -> Option<(u64, T)> {
        let before = self.group();
        let seen = read();
        (self.group() == before).then_some((before, seen))
    }
}
