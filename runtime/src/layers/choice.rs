//! The choice of the best of many scores, with a fixed order of equal ones.

/// Writes the indices of the `n` largest scores, or of all if there are fewer, in ascending order.
/// Of equal scores the earlier come first; NaN counts as smallest. `order` is scratch.
pub(super) fn best(
    scores: impl Iterator<Item = f32>,
    n: usize,
    order: &mut Vec<u64>,
    chosen: &mut Vec<u32>,
) {
    rank_all(scores, n, order);
    chosen.clear();
    chosen.extend(order.iter().take(n).map(|rank| *rank as u32));
    chosen.sort_unstable();
}

/// Does what [`best`] does, for as many indices as `chosen` has; there are no fewer scores.
pub(super) fn best_of(scores: impl Iterator<Item = f32>, order: &mut Vec<u64>, chosen: &mut [u32]) {
    rank_all(scores, chosen.len(), order);
    for (to, rank) in chosen.iter_mut().zip(&*order) {
        *to = *rank as u32;
    }
    chosen.sort_unstable();
}

/// Writes the ranks of scores into `order`, the `n` best of them first.
fn rank_all(scores: impl Iterator<Item = f32>, n: usize, order: &mut Vec<u64>) {
    order.clear();
    order.extend(scores.zip(0u32..).map(|(score, at)| rank(score, at)));
    if n < order.len() {
        order.select_nth_unstable(n);
    }
}

/// Returns a number that is smaller for larger scores, and for earlier ones of equal scores. Its low
/// half is the index.
fn rank(score: f32, at: u32) -> u64 {
    // Zero has one sign; the bits of floats are in the order of their values once negative ones are
    // turned over.
    let bits = (score + 0.0).to_bits();
    let ascending = match bits >> 31 {
        _ if score.is_nan() => 0,
        1 => !bits,
        _ => bits | 1 << 31,
    };
    u64::from(!ascending) << 32 | u64::from(at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tier_plan_testing::Random;

    fn chosen(scores: &[f32], n: usize) -> Vec<u32> {
        let mut chosen = vec![7; 3];
        best(scores.iter().copied(), n, &mut Vec::new(), &mut chosen);
        let mut same = vec![7; n.min(scores.len())];
        best_of(scores.iter().copied(), &mut Vec::new(), &mut same);
        assert_eq!(same, chosen);
        chosen
    }

    #[test]
    fn the_largest_are_chosen_and_the_earlier_of_equals() {
        assert_eq!(chosen(&[1.0, -2.0, 3.0, 0.5], 2), [0, 2]);
        assert_eq!(chosen(&[0.0, -0.0, 0.0, 1.0, 0.0], 3), [0, 1, 3]);
        assert_eq!(chosen(&[-3.0, -1.0, -2.0], 2), [1, 2]);
        let extremes = [f32::NAN, f32::NEG_INFINITY, f32::INFINITY, -f32::NAN, -1.0];
        assert_eq!(chosen(&extremes, 3), [1, 2, 4]);
        assert_eq!(chosen(&[2.0, 1.0], 5), [0, 1]);
        assert!(chosen(&[], 2).is_empty() && chosen(&[1.0], 0).is_empty());
    }

    #[test]
    fn many_are_chosen_as_by_a_stable_sort() {
        let mut random = Random(9);
        let scores: Vec<f32> = (0..300).map(|_| random.below(30) as f32 - 9.0).collect();
        for n in [1, 8, 150, 299] {
            let mut sorted: Vec<u32> = (0..300).collect();
            sorted.sort_by(|a, b| scores[*b as usize].total_cmp(&scores[*a as usize]));
            let mut expected = sorted[..n].to_vec();
            expected.sort_unstable();
            assert_eq!(chosen(&scores, n), expected, "{n}");
        }
    }
}
