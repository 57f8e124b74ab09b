//! Which experts each token of a batch uses, and which tokens use each expert.

use tier_plan_formats::model::spec::MoeSpec;
use tier_plan_kernels::ActView;

/// The experts that a layer's router chose for each token of a batch.
#[derive(Clone, Copy)]
pub(crate) struct BatchRouting<'a> {
    /// `[tokens, n_used]`, in the router's order.
    pub experts: &'a [u16],
    /// `[tokens, n_used]`.
    pub weights: &'a [f32],
    /// Experts per token.
    pub n_used: usize,
}

/// The tokens of a batch, grouped by expert.
pub(crate) struct TokensByExpert {
    /// First entry of each expert, `[n_expert + 1]`.
    starts: Vec<usize>,
    /// (token, weight), grouped by expert, tokens ascending.
    entries: Vec<(usize, f32)>,
}

impl TokensByExpert {
    pub(crate) fn new(routing: &BatchRouting<'_>, n_expert: usize) -> Self {
        let mut starts = vec![0; n_expert + 1];
        for expert in routing.experts {
            starts[usize::from(*expert) + 1] += 1;
        }
        for i in 0..n_expert {
            starts[i + 1] += starts[i];
        }
        let mut next = starts.clone();
        let mut entries = vec![(0, 0.0); routing.experts.len()];
        for (i, (expert, weight)) in routing.experts.iter().zip(routing.weights).enumerate() {
            let entry = &mut next[usize::from(*expert)];
            entries[*entry] = (i / routing.n_used, *weight);
            *entry += 1;
        }
        Self { starts, entries }
    }

    /// Returns the tokens that chose an expert, ascending, each with the expert's weight.
    pub(crate) fn of(&self, expert: usize) -> &[(usize, f32)] {
        &self.entries[self.starts[expert]..self.starts[expert + 1]]
    }

    /// Returns how many choices are of experts before this one.
    pub(crate) fn first_of(&self, expert: usize) -> usize {
        self.starts[expert]
    }

    /// Returns the experts that any token chose, ascending.
    pub(crate) fn present(&self) -> Vec<u32> {
        let used = |e: &usize| self.starts[*e] < self.starts[e + 1];
        (0..self.starts.len() - 1)
            .filter(used)
            .map(|e| e as u32)
            .collect()
    }

    /// Returns the experts that any token chose in order of their last use.
    pub(crate) fn by_last_use(&self, routing: &BatchRouting<'_>) -> Vec<u32> {
        let mut seen = vec![false; self.starts.len()];
        let mut order = Vec::new();
        for expert in routing.experts.iter().rev() {
            if !std::mem::replace(&mut seen[usize::from(*expert)], true) {
                order.push(u32::from(*expert));
            }
        }
        order.reverse();
        order
    }
}

/// The input of a batch's experts.
#[derive(Clone, Copy)]
pub(crate) struct Batch<'a> {
    /// `[tokens, hidden]`: normed rows.
    pub x: ActView<'a>,
    pub users: &'a TokensByExpert,
    pub moe: &'a MoeSpec,
    pub hidden: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_grouped_by_expert() {
        let routing = BatchRouting {
            experts: &[3, 1, 1, 0, 3, 2],
            weights: &[0.1, 0.2, 0.3, 0.4, 0.5, 0.6],
            n_used: 2,
        };
        let tokens = TokensByExpert::new(&routing, 5);
        assert_eq!(tokens.present(), [0, 1, 2, 3]);
        assert_eq!(tokens.of(3), [(0, 0.1), (2, 0.5)]);
        assert_eq!(tokens.of(1), [(0, 0.2), (1, 0.3)]);
        assert!(tokens.of(4).is_empty());
        assert_eq!(tokens.by_last_use(&routing), [1, 0, 3, 2]);
    }
}
