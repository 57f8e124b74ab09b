//! One vector of the rows of a block, with weights for every value by itself.

/// A row of a block, and the scores of its values.
pub(super) type Member<'a> = (&'a [f32], &'a [f32]);

/// Computes `Σ_t softmax_t(g_t) · v_t` over the rows `v` of a block, whose scores are `g`; the softmax
/// is over the rows, for each of the `width` values by itself. The rows are added in their order.
pub(super) fn pool(members: &[Member<'_>], width: usize) -> Vec<f32> {
    let mut largest = vec![f32::NEG_INFINITY; width];
    for (_, scores) in members {
        let scores = largest.iter_mut().zip(*scores);
        scores.for_each(|(l, g)| *l = l.max(*g));
    }
    let (mut pooled, mut sums) = (vec![0.0; width], vec![0.0; width]);
    for (values, scores) in members {
        let weights = scores.iter().zip(&largest).map(|(g, l)| (g - l).exp());
        let sums = pooled.iter_mut().zip(&mut sums);
        for (((pooled, sum), value), weight) in sums.zip(*values).zip(weights) {
            *pooled += weight * value;
            *sum += weight;
        }
    }
    pooled.iter_mut().zip(&sums).for_each(|(v, sum)| *v /= sum);
    pooled
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_has_weights_of_its_own() {
        let (a, b) = ([1.0, 2.0, 5.0], [3.0, -2.0, 7.0]);
        let (ln3, far) = (3.0f32.ln(), [0.0, 0.0, 200.0]);
        let pooled = pool(&[(&a, &[0.0, ln3, 100.0]), (&b, &[ln3, 0.0, 0.0])], 3);
        let expected = [0.25 + 2.25, 1.5 - 0.5, 5.0];
        for (found, expected) in pooled.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-6, "{pooled:?}");
        }
        assert_eq!(pool(&[(&a, &far)], 3), a);
    }
}
