//! Convergence: once nothing fails any more, everything is shown, and after a clean stop it stands in the plain trees, with
//! nothing left over.

use crate::sim::primary::Primary;
use crate::sim::replica::Replica;

/// After a clean stop.
pub(crate) fn check(primary: &Primary, replica: &Replica) -> Result<(), String> {
    for volume in &primary.volumes {
        let tree = replica.machine.trees.open(volume.name.as_str());
        let difference = volume.model_at(volume.last_seq()).listing().difference(&tree.listing());
        if !difference.is_empty() {
            return Err(format!("convergence: the plain tree of {} differs:\n{difference}", volume.name));
        }
        if tree.left_over() > 0 {
            return Err(format!(
                "convergence: {} objects are left over beside {}",
                tree.left_over(),
                volume.name
            ));
        }
    }
    Ok(())
}
