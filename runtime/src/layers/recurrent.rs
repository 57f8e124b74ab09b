//! Recurrent states: what a layer keeps of past tokens in a size that no number of tokens changes.

use super::pages::StateIdx;
use crate::tiers::nodes::Pages;
use std::cmp::Ordering;

/// The recurrent state of one text in one layer. No token: all zeros.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct RecurrentState {
    /// Inputs of the last tokens, for a convolution or for blocks that are not complete.
    pub(super) inputs: Vec<f32>,
    /// What the recurrence itself carries on.
    pub(super) matrices: Vec<f32>,
    /// Inputs of the last tokens, for the convolution of an n-gram block before the mixer.
    pub(super) ngram: Vec<f32>,
}

impl RecurrentState {
    /// Makes the state of no token, with so many values.
    pub(super) fn new(inputs: usize, matrices: usize, ngram: usize) -> Self {
        Self {
            inputs: vec![0.0; inputs],
            matrices: vec![0.0; matrices],
            ngram: vec![0.0; ngram],
        }
    }

    fn parts(&self) -> [&Vec<f32>; 3] {
        [&self.inputs, &self.matrices, &self.ngram]
    }

    fn parts_mut(&mut self) -> [&mut Vec<f32>; 3] {
        [&mut self.inputs, &mut self.matrices, &mut self.ngram]
    }

    /// Forgets all tokens.
    pub(super) fn reset(&mut self) {
        self.parts_mut().into_iter().for_each(|part| part.fill(0.0));
    }

    /// Takes over the tokens of another state of the same layer.
    fn copy_from(&mut self, other: &Self) {
        for (to, from) in self.parts_mut().into_iter().zip(other.parts()) {
            to.copy_from_slice(from);
        }
    }

    /// Appends the state to `out`, little-endian.
    pub(super) fn save(&self, out: &mut Vec<u8>) {
        let values = self.parts().into_iter().flatten();
        out.extend(values.flat_map(|x| x.to_le_bytes()));
    }

    /// Takes the state from the beginning of `bytes`. Returns the rest.
    pub(super) fn load<'b>(&mut self, bytes: &'b [u8]) -> &'b [u8] {
        let (bytes, rest) = bytes.split_at(self.bytes() as usize);
        let values = bytes.as_chunks::<4>().0;
        for (to, from) in self.parts_mut().into_iter().flatten().zip(values) {
            *to = f32::from_le_bytes(*from);
        }
        rest
    }

    /// Moves its pages to where `pages` says.
    pub(super) fn move_to(&self, pages: &Pages) -> std::io::Result<()> {
        let mut parts = self.parts().into_iter().filter(|part| !part.is_empty());
        parts.try_for_each(|part| pages.move_here(part))
    }

    /// Returns the bytes of the state.
    pub(super) fn bytes(&self) -> u64 {
        let values: usize = self.parts().into_iter().map(Vec::len).sum();
        size_of::<f32>() as u64 * values as u64
    }
}

/// Copies one of a layer's states to another.
pub(super) fn copy_state(states: &mut [RecurrentState], from: StateIdx, to: StateIdx) {
    copy_part(states, from, to, RecurrentState::copy_from);
}

/// Copies what the mixer keeps in one of a layer's states to another.
pub(super) fn copy_mixer_state(states: &mut [RecurrentState], from: StateIdx, to: StateIdx) {
    copy_part(states, from, to, |to, from| {
        to.inputs.copy_from_slice(&from.inputs);
        to.matrices.copy_from_slice(&from.matrices);
    });
}

/// Copies what an n-gram block keeps in one of a layer's states to another.
pub(super) fn copy_ngram_state(states: &mut [RecurrentState], from: StateIdx, to: StateIdx) {
    copy_part(states, from, to, |to, from| {
        to.ngram.copy_from_slice(&from.ngram);
    });
}

fn copy_part(
    states: &mut [RecurrentState],
    from: StateIdx,
    to: StateIdx,
    copy: fn(&mut RecurrentState, &RecurrentState),
) {
    let (from, to) = (from as usize, to as usize);
    let (low, high) = states.split_at_mut(from.max(to));
    match from.cmp(&to) {
        Ordering::Less => copy(&mut high[0], &low[from]),
        Ordering::Greater => copy(&mut low[to], &high[0]),
        Ordering::Equal => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_is_saved_copied_and_forgotten_whole() {
        let mut states = vec![RecurrentState::new(2, 3, 1); 3];
        states[1].inputs = vec![1.0, 2.0];
        states[1].matrices = vec![3.0, 4.0, 5.0];
        states[1].ngram = vec![6.0];
        let full = states[1].clone();
        copy_state(&mut states, 1, 0);
        copy_state(&mut states, 1, 2);
        copy_state(&mut states, 1, 1);
        assert!(states.iter().all(|state| *state == full));
        states[2].reset();
        copy_mixer_state(&mut states, 1, 2);
        assert!(states[2].ngram == [0.0] && states[2].matrices == full.matrices);
        copy_ngram_state(&mut states, 1, 2);
        assert!(states.iter().all(|state| *state == full));
        let mut saved = Vec::new();
        full.save(&mut saved);
        assert_eq!(saved.len() as u64, full.bytes());
        saved.push(7);
        states[0].reset();
        assert_eq!(states[0], RecurrentState::new(2, 3, 1));
        assert_eq!(states[0].load(&saved), [7]);
        assert_eq!(states[0], full);
    }
}
