//! Predicting which experts the next layer will use: its router, asked about the hidden state
//! before this layer's experts have been added to it.

use crate::layers::index::MoeIdx;

/// Predicted experts of one layer, and which of its predictions will be compared with the router's
/// choice.
#[derive(Default)]
pub(crate) struct RouterPredictor {
    /// `[tokens, n_used]`.
    experts: Vec<u16>,
    /// `[n_expert]`: whether any token of a batch has the expert; empty for a single token.
    present: Vec<bool>,
    /// The layer that a single token's prediction is for, until it is scored.
    scored: Option<MoeIdx>,
}

impl RouterPredictor {
    /// Starts a prediction, whose experts go to the returned buffer, `[tokens, n_used]`.
    pub(crate) fn begin(&mut self) -> &mut Vec<u16> {
        self.experts.clear();
        &mut self.experts
    }

    /// Remembers that the prediction is for a single token in the layer `moe`, and will be
    /// [scored](Self::score).
    pub(crate) fn will_be_scored(&mut self, moe: MoeIdx) {
        self.scored = Some(moe);
    }

    /// Returns how many experts the last prediction named and how many of them are `chosen`, if it
    /// was for the layer `moe`.
    pub(crate) fn score(&mut self, moe: MoeIdx, chosen: &[u16]) -> Option<(u64, u64)> {
        self.scored.take_if(|scored| *scored == moe)?;
        let right = self.experts.iter().filter(|e| chosen.contains(e)).count();
        Some((self.experts.len() as u64, right as u64))
    }

    /// Returns the predicted experts: of one token in the router's order, of several in ascending
    /// order, each once.
    pub(crate) fn predicted(
        &mut self,
        n_used: usize,
        n_expert: usize,
    ) -> impl Iterator<Item = u32> + '_ {
        self.present.clear();
        if self.experts.len() > n_used {
            self.present.resize(n_expert, false);
            self.experts
                .iter()
                .for_each(|e| self.present[usize::from(*e)] = true);
        }
        let batch = self
            .present
            .iter()
            .enumerate()
            .filter(|(_, present)| **present)
            .map(|(e, _)| e as u32);
        let token = if self.present.is_empty() {
            &self.experts[..]
        } else {
            &[]
        };
        token.iter().map(|e| u32::from(*e)).chain(batch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_keeps_the_routers_order_and_a_batch_names_each_expert_once() {
        let mut predictor = RouterPredictor::default();
        predictor.begin().extend([5, 2]);
        assert_eq!(predictor.predicted(2, 8).collect::<Vec<_>>(), [5, 2]);
        predictor.begin().extend([5, 2, 2, 0]);
        assert_eq!(predictor.predicted(2, 8).collect::<Vec<_>>(), [0, 2, 5]);
    }

    #[test]
    fn a_prediction_is_scored_once_and_by_its_own_layer() {
        let (mut predictor, layer) = (RouterPredictor::default(), MoeIdx::new(3));
        predictor.will_be_scored(layer);
        predictor.begin().extend([5, 2]);
        assert_eq!(predictor.score(MoeIdx::new(2), &[5, 2]), None);
        assert_eq!(predictor.score(layer, &[2, 7]), Some((2, 1)));
        assert_eq!(predictor.score(layer, &[2, 7]), None);
    }
}
