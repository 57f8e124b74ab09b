//! Bounds on the sizes of a network, within which every sum of bytes stays in range.

use super::weights::Weight;
use super::{Architecture, Attention, Experts, GivenRows, Table};

/// Largest size of any dimension, far above any real model's.
const MAX_DIM: u32 = 1 << 20;

/// Most parameters of a model: with them every sum of bytes stays in range.
const MAX_PARAMETERS: u128 = 1 << 46;

/// Fails where a size is out of bounds, or sizes contradict each other.
pub(super) fn check(network: &Architecture) -> Result<(), String> {
    check_layers(network)?;
    check_mixers(network)?;
    if let Some(experts) = &network.experts {
        check_experts(network, experts)?;
    }
    let table = network.table.as_ref().map_or(Ok(0), check_table)?;
    // The bounds above keep one layer's sums in range; all layers' are checked here.
    let wide = |w: &Weight| u128::from(w.n_in) * u128::from(w.n_out) * u128::from(w.copies);
    let parameters: u128 = network
        .groups()
        .iter()
        .flat_map(|g| &g.weights)
        .map(wide)
        .sum::<u128>()
        + table;
    if parameters > MAX_PARAMETERS {
        return Err(format!(
            "the model would have {:.1e} parameters; at most 7e13 are planned for",
            parameters as f64
        ));
    }
    Ok(())
}

fn check_dim(what: &str, value: u32) -> Result<(), String> {
    match value {
        1..=MAX_DIM => Ok(()),
        _ => Err(format!("{what} is {value}, but must be 1 to {MAX_DIM}")),
    }
}

fn check_product(what: &str, factors: &[u32]) -> Result<(), String> {
    let wide: u128 = factors.iter().map(|f| u128::from(*f)).product();
    let fits = (1..=u128::from(MAX_DIM)).contains(&wide);
    if fits {
        Ok(())
    } else {
        Err(format!(
            "{what} come to {wide}, but may be at most {MAX_DIM} wide"
        ))
    }
}

fn check_layers(network: &Architecture) -> Result<(), String> {
    let Architecture {
        name,
        layers,
        leading_dense,
        dense_ffn,
        ..
    } = network;
    if name.is_empty() || name.len() > 128 || name.chars().any(char::is_control) {
        return Err("name must be 1 to 128 characters on one line".into());
    }
    if !(1..=4096).contains(layers) {
        return Err(format!("layers is {layers}, but must be 1 to 4096"));
    }
    check_dim("hidden", network.hidden)?;
    check_dim("vocab", network.vocab)?;
    if network.context == 0 {
        return Err("context is 0; write the tokens that the model was trained for".into());
    }
    if leading_dense > layers {
        return Err(format!(
            "leading_dense is {leading_dense}, but there are {layers} layers"
        ));
    }
    if network.experts.is_none() || *leading_dense > 0 {
        check_dim("dense_ffn", *dense_ffn)
    } else if *dense_ffn > 0 {
        Err("dense_ffn is given, but leading_dense is 0: no layer would have it; remove one".into())
    } else {
        Ok(())
    }
}

/// Returns the values of a table.
fn check_table(table: &Table) -> Result<u128, String> {
    check_dim("table.width", table.width)?;
    if table.rows == 0 || u64::from(table.read) > table.rows {
        return Err(format!(
            "table.read is {}, but the table has {} rows",
            table.read, table.rows
        ));
    }
    Ok(u128::from(table.rows) * u128::from(table.width))
}

/// Fails unless every layer has one mixer, within bounds.
fn check_mixers(network: &Architecture) -> Result<(), String> {
    let mut count = vec![0u32; network.layers as usize];
    for mixers in &network.mixers {
        check_attention(&mixers.attention)?;
        for layer in &mixers.layers {
            match count.get_mut(*layer as usize) {
                Some(count) => *count += 1,
                None => {
                    return Err(format!(
                        "mixers.layers names layer {layer}, but there are {} layers",
                        network.layers
                    ));
                }
            }
        }
    }
    match count.iter().position(|count| *count != 1) {
        None => Ok(()),
        Some(layer) if count[layer] > 1 => Err(format!(
            "layer {layer} is in more than one of the mixers' `layers`"
        )),
        Some(layer) => Err(format!(
            "layer {layer} has no mixer; add an [attention] table, or list the layer in one of the mixers' `layers`"
        )),
    }
}

fn check_given(parameters: u64, rows: &[GivenRows], state_bytes: u64) -> Result<(), String> {
    const MAX_OF_LAYER: u64 = 1 << 40;
    for (what, value) in [("parameters", parameters), ("state_bytes", state_bytes)] {
        if value > MAX_OF_LAYER {
            return Err(format!(
                "{what} of a mixer are {value}, but may be at most {MAX_OF_LAYER}"
            ));
        }
    }
    for row in rows {
        check_dim("rows.width", row.width)?;
        check_dim("rows.every", row.every)?;
        check_product("rows.width × per_token", &[row.width, row.per_token])?;
        if row.queries > MAX_DIM {
            check_dim("rows.queries", row.queries)?;
        }
        if row.window == Some(0) {
            return Err("rows.window is 0; leave it out if all positions are seen".into());
        }
        if row.chosen == Some(0) {
            return Err("rows.chosen is 0; leave it out if all positions are read".into());
        }
    }
    Ok(())
}

fn check_attention(attention: &Attention) -> Result<(), String> {
    match *attention {
        Attention::Given {
            parameters,
            ref rows,
            state_bytes,
        } => check_given(parameters, rows, state_bytes),
        Attention::Gqa {
            heads,
            kv_heads,
            head,
            value,
            window,
            full_every,
            ..
        } => {
            if window == Some(0) {
                return Err(
                    "attention.window is 0; leave it out if every layer looks at all positions"
                        .into(),
                );
            }
            if window.is_none() && full_every > 0 {
                return Err(
                    "attention.full_every is given, but no window; write `window = …` too".into(),
                );
            }
            check_dim("attention.kv_heads", kv_heads)?;
            check_product("attention.heads × head", &[heads, head])?;
            check_product("attention.kv_heads × head", &[kv_heads, head])?;
            check_product("attention.heads × value", &[heads, value])?;
            if !heads.is_multiple_of(kv_heads) {
                return Err(format!(
                    "attention.kv_heads is {kv_heads}, which does not divide heads = {heads}"
                ));
            }
            Ok(())
        }
        Attention::Mla {
            heads,
            q_rank,
            kv_rank,
            nope,
            rope,
            value,
        } => {
            if q_rank > MAX_DIM {
                check_dim("attention.q_rank", q_rank)?;
            }
            for (what, value) in [
                ("kv_rank", kv_rank),
                ("nope", nope),
                ("rope", rope),
                ("value", value),
            ] {
                check_dim(&format!("attention.{what}"), value)?;
            }
            check_product("attention.heads × (nope + rope)", &[heads, nope + rope])?;
            check_product("attention.heads × value", &[heads, value])
        }
    }
}

fn check_experts(network: &Architecture, experts: &Experts) -> Result<(), String> {
    if experts.count == 0 || experts.count > 65_535 {
        return Err(format!(
            "experts.count is {}, but must be 1 to 65535",
            experts.count
        ));
    }
    if experts.used == 0 || experts.used > experts.count {
        return Err(format!(
            "experts.used is {}, but must be 1 to {}",
            experts.used, experts.count
        ));
    }
    check_dim("experts.ffn", experts.ffn)?;
    check_dim("experts.hidden", experts.hidden)?;
    if experts.shared > 0 {
        check_product("experts.shared × ffn", &[experts.shared, experts.ffn])?;
    }
    if experts.shared_ffn > 0 {
        check_dim("experts.shared_ffn", experts.shared_ffn)?;
    }
    if !experts.gated && experts.bias {
        return Err("experts.bias is for experts with a gate; remove one".into());
    }
    let outside = |layer: &&u32| !(network.leading_dense..network.layers).contains(layer);
    if let Some(layer) = experts.layers.iter().find(outside) {
        return Err(format!(
            "experts.layers names layer {layer}, but must be from leading_dense = {} to {}",
            network.leading_dense,
            network.layers - 1
        ));
    }
    let no_experts = |layer: &&u32| experts.layers.binary_search(layer).is_err();
    if let Some(layer) = experts.by_token.iter().find(no_experts) {
        return Err(format!(
            "experts.by_token names layer {layer}, which has no routed experts"
        ));
    }
    if experts.layers.is_empty() {
        return Err(
            "leading_dense leaves no layer to the experts; remove the [experts] table".into(),
        );
    }
    Ok(())
}
