//! Partial results of softmax attention (online softmax), and how they are merged.

use tier_plan_kernels::Kernels;

/// The softmax of one query over some positions (online softmax): the largest score, the sum of the
/// exponentials below it, and the rows mixed by them, not yet divided by the sum. Over no position:
/// minus infinity, 0 and zeros.
pub(in crate::layers) struct PartialSoftmax<'a> {
    pub largest: &'a mut f32,
    pub sum: &'a mut f32,
    pub mixed: &'a mut [f32],
}

/// A [`PartialSoftmax`] to read.
#[derive(Clone, Copy)]
pub(in crate::layers) struct PartialSoftmaxRef<'a> {
    pub largest: f32,
    pub sum: f32,
    pub mixed: &'a [f32],
}

impl PartialSoftmax<'_> {
    /// Merges the softmax over later positions.
    pub(in crate::layers) fn merge(&mut self, kernels: Kernels, later: PartialSoftmaxRef<'_>) {
        if later.sum == 0.0 {
            return;
        }
        if *self.sum == 0.0 {
            (*self.largest, *self.sum) = (later.largest, later.sum);
            self.mixed.copy_from_slice(later.mixed);
            return;
        }
        let largest = self.largest.max(later.largest);
        let (a, b) = (
            (*self.largest - largest).exp(),
            (later.largest - largest).exp(),
        );
        kernels.axpby(a, self.mixed, b, later.mixed);
        *self.sum = a * *self.sum + b * later.sum;
        *self.largest = largest;
    }

    /// Returns the factor on what is mixed, with an attention sink where there is one: a score
    /// beside those of the positions, which takes its share of the weights and has no value.
    pub(in crate::layers) fn factor(&self, sink: Option<f32>) -> f32 {
        let (largest, sum) = (*self.largest, *self.sum);
        match sink {
            Some(sink) => {
                let most = largest.max(sink);
                let a = (largest - most).exp();
                a / (a * sum + (sink - most).exp())
            }
            None => 1.0 / sum,
        }
    }
}

/// What a block finds in one chunk or in several: `[queries, value_width]`, then `[queries]`
/// largest scores, then `[queries]` sums.
pub(in crate::layers) struct Part<'a> {
    pub mixed: &'a mut [f32],
    pub largest: &'a mut [f32],
    pub sums: &'a mut [f32],
    width: usize,
}

impl<'a> Part<'a> {
    pub(in crate::layers) fn new(part: &'a mut [f32], queries: usize, width: usize) -> Self {
        let (mixed, rest) = part.split_at_mut(queries * width);
        let (largest, rest) = rest.split_at_mut(queries);
        Self {
            mixed,
            largest,
            sums: &mut rest[..queries],
            width,
        }
    }

    /// Sets the part to that of no position.
    pub(in crate::layers) fn clear(&mut self) {
        self.mixed.fill(0.0);
        self.largest.fill(f32::NEG_INFINITY);
        self.sums.fill(0.0);
    }

    pub(in crate::layers) fn query_mut(&mut self, query: usize) -> PartialSoftmax<'_> {
        let mixed = &mut self.mixed[query * self.width..][..self.width];
        PartialSoftmax {
            largest: &mut self.largest[query],
            sum: &mut self.sums[query],
            mixed,
        }
    }

    pub(in crate::layers) fn query(&self, query: usize) -> PartialSoftmaxRef<'_> {
        let mixed = &self.mixed[query * self.width..][..self.width];
        PartialSoftmaxRef {
            largest: self.largest[query],
            sum: self.sums[query],
            mixed,
        }
    }
}
