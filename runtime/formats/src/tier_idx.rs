//! Tier indices, and lists with one value per tier.
//!
//! Plans index much: layers, experts, slots, and tiers. [`TierIdx`] keeps the number of a tier
//! apart from the others, and [`PerTier`] can be indexed by nothing else.

use std::fmt::{self, Display, Formatter};
use std::ops::{Index, IndexMut};

/// Index of a tier in a plan's list of tiers, fastest first; also that of the machine's list, which
/// the plan's is a copy of.
///
/// Files have at most 16 tiers, so 8 bits hold every index.
///
/// ```
/// use tier_plan_formats::tier_idx::{PerTier, TierIdx};
///
/// let free_bytes = PerTier::from([24_u64 << 30, 128 << 30, 2 << 40]);
/// let last = free_bytes.last_idx().expect("there are tiers");
/// assert_eq!((last.get(), last.to_string()), (2, "2".to_string()));
/// assert_eq!(free_bytes[last], 2 << 40);
/// assert_eq!(free_bytes.get(TierIdx::new(3)), None);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct TierIdx(u8);

impl TierIdx {
    /// The fastest tier.
    pub const FIRST: TierIdx = TierIdx(0);

    /// Returns the index of the tier at a position from 0. Positions from 255 on, where no plan has
    /// a tier, all give the index 255.
    pub const fn new(position: usize) -> TierIdx {
        TierIdx(if position < u8::MAX as usize {
            position as u8
        } else {
            u8::MAX
        })
    }

    /// Returns the position in the list of tiers.
    pub const fn get(self) -> usize {
        self.0 as usize
    }

    /// Returns the indices of the first `count` tiers, in order.
    pub fn first(
        count: usize,
    ) -> impl DoubleEndedIterator<Item = TierIdx> + ExactSizeIterator + Clone {
        (0..count).map(TierIdx::new)
    }
}

impl Display for TierIdx {
    /// Writes the number, from 0.
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        Display::fmt(&self.0, f)
    }
}

/// A list of `[tiers]` values, one per tier, fastest first.
///
/// ```
/// use tier_plan_formats::tier_idx::{PerTier, TierIdx};
///
/// let mut used = PerTier::from_fn(3, |_| 0_u64);
/// used[TierIdx::new(1)] += 5;
/// let fullest = used.enumerate().max_by_key(|(_, bytes)| **bytes).map(|(tier, _)| tier);
/// assert_eq!(fullest, Some(TierIdx::new(1)));
/// ```
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct PerTier<T>(Vec<T>);

impl<T> PerTier<T> {
    /// Makes a list of `n_tiers` values, each of its tier's index.
    pub fn from_fn(n_tiers: usize, value: impl FnMut(TierIdx) -> T) -> PerTier<T> {
        TierIdx::first(n_tiers).map(value).collect()
    }

    /// Returns the number of tiers.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is no tier.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns a tier's value, or `None` if there is no such tier.
    pub fn get(&self, tier: TierIdx) -> Option<&T> {
        self.0.get(tier.get())
    }

    /// Returns a tier's value to change, or `None` if there is no such tier.
    pub fn get_mut(&mut self, tier: TierIdx) -> Option<&mut T> {
        self.0.get_mut(tier.get())
    }

    /// Returns the index of the last tier, or `None` if there is no tier.
    pub fn last_idx(&self) -> Option<TierIdx> {
        self.len().checked_sub(1).map(TierIdx::new)
    }

    /// Returns the value of the fastest tier.
    pub fn first(&self) -> Option<&T> {
        self.0.first()
    }

    /// Returns the value of the last tier.
    pub fn last(&self) -> Option<&T> {
        self.0.last()
    }

    /// Returns the values in the order of the tiers.
    pub fn iter(&self) -> std::slice::Iter<'_, T> {
        self.0.iter()
    }

    /// Returns the values to change, in the order of the tiers.
    pub fn iter_mut(&mut self) -> std::slice::IterMut<'_, T> {
        self.0.iter_mut()
    }

    /// Returns the indices of all tiers, in order.
    pub fn indices(
        &self,
    ) -> impl DoubleEndedIterator<Item = TierIdx> + ExactSizeIterator + Clone + use<T> {
        TierIdx::first(self.len())
    }

    /// Returns the values with the indices of their tiers.
    pub fn enumerate(
        &self,
    ) -> impl DoubleEndedIterator<Item = (TierIdx, &T)> + ExactSizeIterator + Clone {
        self.iter()
            .enumerate()
            .map(|(position, value)| (TierIdx::new(position), value))
    }

    /// Returns the index of the first tier whose value passes a test.
    pub fn position(&self, test: impl FnMut(&T) -> bool) -> Option<TierIdx> {
        self.iter().position(test).map(TierIdx::new)
    }

    /// Returns the values as a slice, for work that does not care which tier is which.
    pub fn as_slice(&self) -> &[T] {
        &self.0
    }
}

impl<T> Default for PerTier<T> {
    /// Returns a list of no tiers.
    fn default() -> Self {
        PerTier(Vec::new())
    }
}

impl<T> Index<TierIdx> for PerTier<T> {
    type Output = T;

    fn index(&self, tier: TierIdx) -> &T {
        &self.0[tier.get()]
    }
}

impl<T> IndexMut<TierIdx> for PerTier<T> {
    fn index_mut(&mut self, tier: TierIdx) -> &mut T {
        &mut self.0[tier.get()]
    }
}

impl<T> From<Vec<T>> for PerTier<T> {
    fn from(values: Vec<T>) -> Self {
        PerTier(values)
    }
}

impl<T, const N: usize> From<[T; N]> for PerTier<T> {
    fn from(values: [T; N]) -> Self {
        PerTier(values.into())
    }
}

impl<T> From<PerTier<T>> for Vec<T> {
    fn from(values: PerTier<T>) -> Self {
        values.0
    }
}

impl<T> FromIterator<T> for PerTier<T> {
    fn from_iter<I: IntoIterator<Item = T>>(values: I) -> Self {
        PerTier(values.into_iter().collect())
    }
}

impl<T> IntoIterator for PerTier<T> {
    type Item = T;
    type IntoIter = std::vec::IntoIter<T>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

impl<'a, T> IntoIterator for &'a PerTier<T> {
    type Item = &'a T;
    type IntoIter = std::slice::Iter<'a, T>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl<'a, T> IntoIterator for &'a mut PerTier<T> {
    type Item = &'a mut T;
    type IntoIter = std::slice::IterMut<'a, T>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter_mut()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_beyond_all_lists_is_of_no_tier() {
        assert_eq!(TierIdx::new(254).get(), 254);
        assert_eq!(
            [255, 256, usize::MAX].map(|position| TierIdx::new(position).get()),
            [255; 3]
        );
        assert_eq!(PerTier::from([1, 2]).get(TierIdx::new(usize::MAX)), None);
        assert_eq!(PerTier::<u8>::default().last_idx(), None);
    }

    #[test]
    fn indices_are_in_the_order_of_the_tiers() {
        let mut tens = PerTier::from_fn(3, |tier| 10 * tier.get());
        assert_eq!(Vec::from(tens.clone()), [0, 10, 20]);
        assert!(
            tens.enumerate()
                .all(|(tier, &value)| value == 10 * tier.get() && tens[tier] == value)
        );
        assert!(
            tens.indices().eq(TierIdx::first(3)) && tens.indices().next_back() == tens.last_idx()
        );
        assert_eq!(tens.position(|&value| value > 5), Some(TierIdx::new(1)));
        for value in &mut tens {
            *value += 1;
        }
        tens[TierIdx::FIRST] = 7;
        assert_eq!(tens, PerTier::from([7, 11, 21]));
    }
}
