//! Storage type of the KV cache.

use crate::hint::HintExt;
use anyhow::{Result, bail};
use clap::Args;
use tier_plan_runtime::KvType;

/// Storage type of the KV cache. Keys and values have one type, so llama.cpp's two options must
/// agree.
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Memory")]
pub struct KvArgs {
    /// KV cache type: f16, q8_0 (about half the memory), or f32 [default: the plan's, or f16]
    #[arg(long, value_name = "TYPE", conflicts_with_all = ["cache_type_k", "cache_type_v"])]
    pub kv_type: Option<KvType>,
    /// llama.cpp's name for the type of keys
    #[arg(long, value_name = "TYPE", hide = true)]
    pub cache_type_k: Option<KvType>,
    /// llama.cpp's name for the type of values
    #[arg(long, value_name = "TYPE", hide = true)]
    pub cache_type_v: Option<KvType>,
}

impl KvArgs {
    /// Returns the one type of keys and values, `None` if not given.
    ///
    /// # Errors
    /// When keys and values are given different types.
    pub fn checked(&self) -> Result<Option<KvType>> {
        match (self.cache_type_k, self.cache_type_v) {
            (None, None) => Ok(self.kv_type),
            (Some(keys), Some(values)) if keys == values => Ok(Some(keys)),
            // llama.cpp leaves the other one at f16.
            (Some(KvType::F16), None) | (None, Some(KvType::F16)) => Ok(Some(KvType::F16)),
            (keys, values) => {
                let (keys, values) = (keys.unwrap_or(KvType::F16), values.unwrap_or(KvType::F16));
                let wanted = if keys == KvType::F16 { values } else { keys };
                let mixed = || {
                    bail!(
                        "KV cache types: {keys} for keys and {values} for values, expected one for both"
                    )
                };
                mixed().hint(format!("pass --kv-type {wanted}"))
            }
        }
    }
}
