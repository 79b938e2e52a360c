//! The entry that takes record sets back.

use twinfs_core::id::{SetNumber, VolumeName};
use twinfs_core::limits;

/// Record sets that stand before this entry in the journal and count no longer: they lay beyond a gap in the chain of
/// their volume, and the primary's process that made them was killed. Its next one makes others in their places.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Withdrawn {
    /// The volume.
    pub volume: VolumeName,
    /// The sets, at most [`limits::PENDING_SETS_MAX`], in rising order.
    pub numbers: Vec<SetNumber>,
}

impl Withdrawn {
    /// The encoded form, as the map of the journal's module says.
    ///
    /// # Panics
    /// If there are more sets than may be pending.
    pub(super) fn encode(&self) -> Vec<u8> {
        assert!(
            self.numbers.len() <= limits::PENDING_SETS_MAX,
            "no more sets than may be pending are withdrawn"
        );
        let name = self.volume.as_str().as_bytes();
        let mut bytes = vec![u8::try_from(name.len()).expect("a volume name is short")];
        bytes.extend_from_slice(name);
        for number in &self.numbers {
            bytes.extend_from_slice(&number.0.to_le_bytes());
        }
        bytes
    }

    /// Reads the encoded form, or says what is wrong.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, &'static str> {
        let (len, rest) = bytes.split_first().ok_or("a withdrawal ends too early")?;
        let (name, rest) = rest.split_at_checked(usize::from(*len)).ok_or("a withdrawal ends too early")?;
        let name = std::str::from_utf8(name).ok().and_then(|name| VolumeName::new(name).ok());
        let (numbers, left) = rest.as_chunks::<8>();
        let numbers: Vec<_> = numbers.iter().map(|number| SetNumber(u64::from_le_bytes(*number))).collect();
        if !left.is_empty() || numbers.is_empty() || numbers.len() > limits::PENDING_SETS_MAX {
            return Err("a withdrawal of another length");
        }
        if !numbers.is_sorted_by(|a, b| a < b) {
            return Err("a withdrawal that names its sets in disorder");
        }
        Ok(Self { volume: name.ok_or("not a volume name")?, numbers })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn withdrawals_come_back_and_nothing_else_does() {
        let volume = VolumeName::new("data").unwrap();
        let withdrawn = Withdrawn { volume, numbers: vec![SetNumber(7), SetNumber(9)] };
        let bytes = withdrawn.encode();
        assert_eq!(Withdrawn::decode(&bytes), Ok(withdrawn.clone()));
        for len in 0..bytes.len() {
            let cut = Withdrawn::decode(&bytes[..len]);
            assert!(cut.as_ref() != Ok(&withdrawn) && (cut.is_err() || len == bytes.len() - 8), "{len}");
        }
        let disorder = Withdrawn { numbers: vec![SetNumber(9), SetNumber(7)], ..withdrawn };
        assert!(Withdrawn::decode(&disorder.encode()).is_err());
    }
}
