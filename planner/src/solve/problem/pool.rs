//! Columns that were priced before, shared by the searches of one command.
//!
//! The seconds of a configuration follow from the layer's routing and sizes and from the rates of
//! the tiers. They do not change with capacities, prices of bytes, or the tier of the KV cache. So
//! what one search has priced is where the next one begins: the instances of one problem, and the
//! same machine with more bytes. Reuse tables are kept beside them, up to a limit.
//!
//! Every entry is a pure function of its key, so that a search finds the same with a full pool as
//! it would by pricing again.

use super::columns::Config;
use super::draft::Draft;
use super::reuse_table::ReuseTable;
use crate::profile::{Judged, LayerEvidence};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tier_plan_runtime::formats::placement::TierIdx;

/// Bytes that the reuse tables of a pool may take together; beyond, tables are made anew.
const MAX_TABLES_BYTES: usize = 128 << 20;

/// Choices that are kept: those of the tiers that the KV cache may be on.
const MAX_DRAFTS: usize = 3;

/// Layers that share their priced columns.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum PoolKey {
    /// Layers of one class and the same sizes, about which the same is known.
    Alike {
        class: u32,
        n_expert: u32,
        n_used: u32,
        expert_bytes: u64,
        /// Bytes of the dense stage before, where its time hides transfers.
        ahead_bytes: Option<u64>,
        /// Tiers that their experts may not be on.
        forbidden: BTreeSet<TierIdx>,
    },
    /// One layer, by position.
    Layer(usize),
}

/// Configurations of one layer with their mean seconds per token.
pub(crate) type Priced = HashMap<Config, f64>;

/// What was found out about the layers of one key.
#[derive(Debug, Clone, Default)]
pub(crate) struct LayerPool {
    pub(crate) priced: Priced,
    table: Option<Arc<ReuseTable>>,
}

/// Priced columns by layer.
#[derive(Debug, Default)]
pub struct ColumnPool {
    layers: Mutex<BTreeMap<PoolKey, Arc<Mutex<LayerPool>>>>,
    tables_bytes: AtomicUsize,
    /// Dual prices that the last search ended with.
    prices: Mutex<Option<Vec<f64>>>,
    /// The best choice of each search, the last one first.
    drafts: Mutex<Vec<Draft>>,
}

/// Locks a mutex. What a pool holds is sound after a panic, too: entries are inserted whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Clone for ColumnPool {
    /// Copies the priced columns; the tables are shared.
    fn clone(&self) -> Self {
        let copied = |(key, layer): (&PoolKey, &Arc<Mutex<LayerPool>>)| {
            (key.clone(), Arc::new(Mutex::new(lock(layer).clone())))
        };
        ColumnPool {
            layers: Mutex::new(lock(&self.layers).iter().map(copied).collect()),
            tables_bytes: AtomicUsize::new(self.tables_bytes.load(Ordering::Relaxed)),
            prices: Mutex::new(self.prices()),
            drafts: Mutex::new(self.drafts()),
        }
    }
}

impl ColumnPool {
    /// Returns the dual prices that the last search ended with, if there was one.
    pub(crate) fn prices(&self) -> Option<Vec<f64>> {
        lock(&self.prices).clone()
    }

    /// Returns the choices of the last searches, which others may begin with.
    pub(crate) fn drafts(&self) -> Vec<Draft> {
        lock(&self.drafts).clone()
    }

    /// Keeps the dual prices and the choice that a search ended with.
    pub(crate) fn keep(&self, prices: &[f64], draft: &Draft) {
        *lock(&self.prices) = Some(prices.to_vec());
        let mut drafts = lock(&self.drafts);
        drafts.insert(0, draft.clone());
        drafts.truncate(MAX_DRAFTS);
    }

    /// Calls `each` with what is known of a key's layers, which it may add to.
    pub(crate) fn with<T>(&self, key: &PoolKey, each: impl FnOnce(&mut LayerPool) -> T) -> T {
        let layer = lock(&self.layers).entry(key.clone()).or_default().clone();
        let mut layer = lock(&layer);
        each(&mut layer)
    }

    /// Returns a layer's reuse table. Returns `None` if it has no recorded tokens, or too many.
    pub(crate) fn table(
        &self,
        known: &mut LayerPool,
        layer: &LayerEvidence,
    ) -> Option<Arc<ReuseTable>> {
        if let Some(table) = &known.table {
            return Some(table.clone());
        }
        let Judged::Recorded(trace) = &layer.judged else {
            return None;
        };
        let table = Arc::new(ReuseTable::new(layer, trace)?);
        let bytes = table.bytes();
        if self.tables_bytes.load(Ordering::Relaxed) + bytes <= MAX_TABLES_BYTES {
            self.tables_bytes.fetch_add(bytes, Ordering::Relaxed);
            known.table = Some(table.clone());
        }
        Some(table)
    }
}
