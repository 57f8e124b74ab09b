//! Bounds on the sizes of a network, within which every sum of bytes stays in range.

use super::weights::Weight;
use super::{Architecture, Attention, Experts};

/// Largest size of any dimension, far above any real model's.
const MAX_DIM: u32 = 1 << 20;

/// Most parameters of a model: with them every sum of bytes stays in range.
const MAX_PARAMETERS: u128 = 1 << 46;

/// Fails where a size is out of bounds, or sizes contradict each other.
pub(super) fn check(network: &Architecture) -> Result<(), String> {
    check_layers(network)?;
    check_attention(&network.attention)?;
    if let Some(experts) = &network.experts {
        check_experts(network, experts)?;
    }
    // The bounds above keep one layer's sums in range; all layers' are checked here.
    let wide = |w: &Weight| u128::from(w.n_in) * u128::from(w.n_out) * u128::from(w.copies);
    let parameters: u128 = network
        .groups()
        .iter()
        .flat_map(|g| &g.weights)
        .map(wide)
        .sum();
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

fn check_attention(attention: &Attention) -> Result<(), String> {
    match *attention {
        Attention::Gqa {
            heads,
            kv_heads,
            head,
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
    if experts.shared > 0 {
        check_product("experts.shared × ffn", &[experts.shared, experts.ffn])?;
    }
    if network.leading_dense == network.layers {
        return Err(
            "leading_dense leaves no layer to the experts; remove the [experts] table".into(),
        );
    }
    Ok(())
}
