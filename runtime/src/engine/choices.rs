//! What a part on one processor leaves for parts on another one: blocks of positions that an indexer
//! chose, rows of the n-gram table, and weights for writing results back to several streams.

use super::backend::{Processors, Stage};
use super::sequences::WHOLE;
use crate::error::RunError;
use crate::layers::chosen::ChosenRows;
use crate::layers::index::Layer;
use tier_plan_formats::model::spec::Mixer;

impl Processors {
    /// Brings what an earlier layer's indexer chose for a stage's rows to where `layer` is, which
    /// attends to that.
    pub(super) fn bring_choices(
        &mut self,
        stage: &Stage<'_>,
        layer: Layer<'_>,
    ) -> Result<(), RunError> {
        let Some(indexed) = stage.spec.indexed_before(layer.index.get()) else {
            return Ok(());
        };
        let places = &self.gpus.places.layers;
        let (from, to) = (places[indexed].mixer, places[layer.index.get()].mixer);
        let Mixer::Mla(attention) = &layer.spec.mixer else {
            return Ok(());
        };
        let Some(selection) = attention.reach.selection().filter(|_| from != to) else {
            return Ok(());
        };
        if to.is_none() && stage.rows.start == 0 {
            // Those of an earlier batch or layer, even where no row of this part has any.
            self.cpu.mixer.forget_choices();
        }
        let segments = stage.batch.segments(&stage.rows, WHOLE);
        let seen = segments.flat_map(|s| s.past + 1..s.past + s.rows.len() + 1);
        let seen: Vec<usize> = seen.collect();
        if seen.iter().all(|seen| *seen <= selection.n_dense()) {
            return Ok(());
        }
        let rows = ChosenRows {
            first_row: stage.rows.start,
            seen: &seen,
            selection,
        };
        let blocks = match from {
            Some(tier) => self.gpus.of(tier).choices(rows)?,
            None => self.cpu.mixer.choices(rows),
        };
        match to {
            Some(tier) => self.gpus.of(tier).put_choices(rows, &blocks)?,
            None => self.cpu.mixer.put_choices(rows, &blocks),
        }
        Ok(())
    }

    /// Brings what is in the n-gram table for a stage's rows to the GPU of a layer that adds it.
    pub(super) fn bring_ngrams(
        &mut self,
        stage: &Stage<'_>,
        layer: Layer<'_>,
    ) -> Result<(), RunError> {
        let adds = layer.spec.residual.ngram.is_some();
        let to = self.gpus.places.layers[layer.index.get()].mixer;
        let Some(to) = to.filter(|_| adds) else {
            return Ok(());
        };
        let rows = stage.rows.clone();
        if let Some(values) = self.cpu.ngram_rows(stage.cpu, stage.spec, rows) {
            self.gpus.of(to).put_ngrams(values)?;
        }
        Ok(())
    }

    /// Brings the weights for writing a layer's experts back from its router to its shared expert,
    /// where the sums of all experts will be written.
    pub(super) fn bring_stream_weights(
        &mut self,
        stage: &Stage<'_>,
        layer: Layer<'_>,
    ) -> Result<(), RunError> {
        let places = self.gpus.places.layers[layer.index.get()];
        let (from, to) = (places.ffn, places.shared);
        let (Some(streams), Some(connections)) =
            (&stage.spec.streams, &layer.spec.residual.connections)
        else {
            return Ok(());
        };
        if from == to {
            return Ok(());
        }
        let rows = stage.rows.clone();
        let weights = match from {
            Some(tier) => self.gpus.of(tier).stream_weights(rows.clone())?,
            None => self.cpu.streams.back.rows(&rows, streams.n),
        };
        match to {
            Some(tier) => self.gpus.of(tier).put_stream_weights(rows, &weights)?,
            None => {
                let back = &mut self.cpu.streams.back;
                back.put(&connections.ffn, rows.start, streams.n, &weights);
            }
        }
        Ok(())
    }
}
