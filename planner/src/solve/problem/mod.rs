//! The problem statement: what may be chosen, what it costs, and what limits it.
//!
//! [`capacity`] sets aside the bytes that every plan needs, [`constraints`] holds what the user
//! fixed, and [`objective`] says what to minimize. [`columns`], [`grid`] and [`enumerate`] list the
//! choices with their costs. [`reuse_table`] prices those that are too many to list.

pub mod capacity;
pub mod columns;
pub mod constraints;
pub mod draft;
pub mod enumerate;
pub mod grid;
mod hint;
pub mod instance;
pub mod objective;
pub mod pool;
pub mod reuse_table;

pub(crate) use hint::hint;

use crate::cost::middle;
use tier_plan_runtime::KvType;
use tier_plan_runtime::formats::machine::Machine;
use tier_plan_runtime::formats::profile::Profile;
use tier_plan_runtime::model::kv::CacheRoom;
use tier_plan_runtime::model::shape::ModelShape;

/// The model, machine and budgets that a plan is made for.
#[derive(Debug, Clone)]
pub struct Problem<'a> {
    /// Sizes of the model.
    pub shape: &'a ModelShape,
    /// Recorded routing. Without it, every expert is taken to be equally likely.
    pub profile: Option<&'a Profile>,
    /// The machine and its tiers.
    pub machine: &'a Machine,
    /// `[tiers]` bytes that the plan may use.
    pub budgets: Vec<u64>,
    /// Context length in tokens that the KV cache is planned for.
    pub context: u32,
    /// Texts at once that the KV cache is planned for.
    pub sequences: u32,
    /// Type that keys and values are stored in.
    pub kv_type: KvType,
    /// Positions that a token looks back at, of its own text, for which plans are to be fast; half of
    /// the context where `None`.
    pub position: Option<u32>,
}

impl Problem<'_> {
    /// Returns the positions that a token looks back at, for which plans are to be fast.
    pub fn position(&self) -> u32 {
        self.position.unwrap_or_else(|| middle(self.context))
    }

    /// Returns what the KV cache has room for.
    pub fn room(&self) -> CacheRoom {
        let room = CacheRoom {
            sequences: self.sequences,
            ..CacheRoom::of_one(self.context)
        };
        room.for_model(self.shape)
    }
}
