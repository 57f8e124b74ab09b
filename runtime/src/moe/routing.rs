//! Which experts the tokens of a batch use, and which tokens use an expert.

use tier_plan_kernels::ActView;

/// Which experts each token of a batch uses.
pub(crate) struct BatchRouting<'a> {
    /// `[tokens, n_used]`.
    pub experts: &'a [u16],
    /// `[tokens, n_used]`.
    pub weights: &'a [f32],
    pub n_used: usize,
}

/// The tokens of a batch sorted by expert.
pub(crate) struct TokensByExpert {
    /// First entry of each expert, `[n_expert + 1]`.
    starts: Vec<usize>,
    /// (token, weight), grouped by expert, tokens ascending.
    entries: Vec<(usize, f32)>,
}

impl TokensByExpert {
    pub(crate) fn new(choices: &BatchRouting<'_>, n_expert: usize) -> Self {
        let mut starts = vec![0; n_expert + 1];
        for expert in choices.experts {
            starts[usize::from(*expert) + 1] += 1;
        }
        for i in 0..n_expert {
            starts[i + 1] += starts[i];
        }
        let mut next = starts.clone();
        let mut entries = vec![(0, 0.0); choices.experts.len()];
        for (i, (expert, weight)) in choices.experts.iter().zip(choices.weights).enumerate() {
            let at = &mut next[usize::from(*expert)];
            entries[*at] = (i / choices.n_used, *weight);
            *at += 1;
        }
        Self { starts, entries }
    }

    pub(crate) fn of(&self, expert: usize) -> &[(usize, f32)] {
        &self.entries[self.starts[expert]..self.starts[expert + 1]]
    }

    /// Experts that any token chose, ascending.
    pub(crate) fn present(&self) -> Vec<u32> {
        let used = |e: &usize| self.starts[*e] < self.starts[e + 1];
        (0..self.starts.len() - 1).filter(used).map(|e| e as u32).collect()
    }

    /// The same experts, the one used last at the end.
    pub(crate) fn by_last_use(&self, choices: &BatchRouting<'_>) -> Vec<u32> {
        let mut seen = vec![false; self.starts.len()];
        let mut order = Vec::new();
        for expert in choices.experts.iter().rev() {
            if !std::mem::replace(&mut seen[usize::from(*expert)], true) {
                order.push(u32::from(*expert));
            }
        }
        order.reverse();
        order
    }
}

/// What is the same for a whole step.
#[derive(Clone, Copy)]
pub(crate) struct Batch<'a> {
    pub x: ActView<'a>,
    pub users: &'a TokensByExpert,
    pub hidden: usize,
}
