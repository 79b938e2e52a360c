//! Convergence: once nothing fails any more, everything is shown, and after a clean stop it stands in the plain trees, with
//! nothing left over.

use crate::sim::primary::desk::Volume;
use crate::sim::replica::Replica;

/// After a clean stop.
pub(crate) fn check(volumes: &[Volume], replica: &Replica) -> Result<(), String> {
    for Volume { history: volume, tree: source, copied_again, .. } in volumes {
        let tree = replica.machine.trees.open(volume.name.as_str());
        let difference = source.live().listing().difference(&tree.listing());
        if !difference.is_empty() {
            return Err(format!("convergence: the plain tree of {} differs:\n{difference}", volume.name));
        }
        let mut left = tree.left_over();
        if *copied_again {
            // What went meanwhile the replica was not told: it stays in staging, out of sight.
            left.retain(|name| !name.starts_with("staging/"));
        }
        if !left.is_empty() {
            return Err(format!("convergence: {left:?} are left over beside {}", volume.name));
        }
    }
    Ok(())
}
