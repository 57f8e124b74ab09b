//! Positions that an indexer chose on one processor, and that a layer on another one attends to.

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
        let most = selection.most();
        let segments = stage.batch.segments(&stage.rows, WHOLE);
        let seen = segments.flat_map(|s| s.past + 1..s.past + s.rows.len() + 1);
        let seen: Vec<usize> = seen.collect();
        if seen.iter().all(|seen| *seen <= most) {
            return Ok(());
        }
        let rows = ChosenRows {
            first_row: stage.rows.start,
            seen: &seen,
            most,
        };
        let positions = match from {
            Some(tier) => self.gpus.of(tier).choices(rows)?,
            None => self.cpu.mixer.choices(rows),
        };
        match to {
            Some(tier) => self.gpus.of(tier).put_choices(rows, &positions)?,
            None => self.cpu.mixer.put_choices(rows, &positions),
        }
        Ok(())
    }
}
