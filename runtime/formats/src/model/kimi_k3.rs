//! `kimi-k3`: the layers of Kimi Linear with bounded decays, gated latent attention, experts in a
//! smaller space, SiTU, and attention over earlier hidden states in the place of a plain residual.

use super::ModelError;
use super::blocks::{Common, MoeOptions, latent_moe};
use super::ffn_layers::{FfnLayers, require_gating, require_selection_bias};
use super::kda::{HybridHeads, KdaForm, kda_spec};
use super::mla::{MlaSizes, Queries, mla_spec, sigmoid_gate};
use super::source::Source;
use super::spec::{
    Activation, BankConnection, Connection, Connections, Ffn, Gating, Latent, LayerSpec, Mixer,
    MlaSpec, ModelSpec, MoeSpec, Residual, StreamsEnd, StreamsSpec,
};

/// Bound on hidden states in the bank, far above any real model's.
const MAX_BANK: usize = 64;

pub(super) fn describe(s: &Source<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(s)?;
    let (n_layer, hidden) = (common.n_layer, common.hidden);
    let heads = HybridHeads::read(s, n_layer)?;
    let blocks = FfnLayers::read(s, n_layer)?.always_shared();
    require_gating(s)?;
    let activation = situ(s)?;
    let bank = Bank::read(s, n_layer, hidden)?;
    let layers = (0..n_layer)
        .map(|i| {
            let mixer = if heads.is_kda[i] {
                let (n_head, eps) = (heads.heads[0], common.norm_eps);
                Mixer::Kda(kda_spec(s, i, hidden, n_head, KdaForm::FullGate, eps)?)
            } else {
                Mixer::Mla(attention(s, i, hidden, heads.heads[i])?)
            };
            let ffn = if blocks.is_dense(i) {
                blocks.dense(s, i, hidden, activation)?
            } else {
                let mut options = blocks.options(s, i, Gating::Sigmoid)?;
                options.activation = activation;
                Ffn::Moe(experts(s, i, hidden, &options)?)
            };
            Ok(LayerSpec {
                mixer_norm: s.vector(&format!("blk.{i}.attn_norm.weight"), hidden)?,
                mixer,
                ffn_norm: s.vector(&format!("blk.{i}.ffn_norm.weight"), hidden)?,
                ffn,
                residual: Residual {
                    connections: bank.map(|bank| bank.layer(s, i)).transpose()?,
                    ..Residual::default()
                },
            })
        })
        .collect::<Result<_, ModelError>>()?;
    let mut model = common.model(s, layers)?;
    model.streams = bank.map(|bank| bank.streams(s)).transpose()?;
    Ok(model)
}

/// Reads the activation, which is the same in all blocks.
fn situ(s: &Source<'_>) -> Result<Activation, ModelError> {
    let name = "activation.situ_beta";
    let beta = s.required_f32(name)?;
    if beta <= 0.0 {
        return Err(s.bad(name, format!("{beta}; expected a positive number")));
    }
    let linear = s.required_f32("activation.situ_linear_beta")?.max(0.0);
    Ok(Activation::Situ { beta, linear })
}

fn attention(
    s: &Source<'_>,
    layer: usize,
    hidden: usize,
    n_head: usize,
) -> Result<MlaSpec, ModelError> {
    let sizes = MlaSizes::read(s, n_head, "")?;
    let has = |name: &str| s.has_tensor(&format!("blk.{layer}.{name}.weight"));
    let queries = if has("attn_q_a_norm") {
        Queries::LowRank(s.dim("attention.q_lora_rank")?)
    } else {
        Queries::Plain
    };
    let mut mla = mla_spec(s, layer, hidden, sizes, None, queries)?;
    if has("attn_gate") {
        mla.gate = Some(sigmoid_gate(s, layer, hidden, n_head * sizes.value_dim)?);
    }
    Ok(mla)
}

/// Describes the experts of a layer, in a space of their own where the file has one.
fn experts(
    s: &Source<'_>,
    layer: usize,
    hidden: usize,
    options: &MoeOptions,
) -> Result<MoeSpec, ModelError> {
    let latent = match s.opt_count("expert_latent_length")? {
        0 => None,
        _ => {
            let width = s.dim("expert_latent_length")?;
            let p = format!("blk.{layer}.ffn_routed");
            Some(Latent {
                down: s.linear(&format!("{p}_down"), hidden, width)?,
                norm: s.opt_vector(&format!("{p}_norm.weight"), width)?,
                up: s.linear(&format!("{p}_up"), width, hidden)?,
            })
        }
    };
    let mut moe = latent_moe(s, layer, hidden, latent, options)?;
    if let Some(shared) = &mut moe.shared {
        shared.ffn.activation = options.activation;
    }
    require_selection_bias(s, layer, &moe)?;
    Ok(moe)
}

/// Hidden states that every `block`-th layer adds to a bank.
#[derive(Clone, Copy)]
struct Bank {
    block: usize,
    hidden: usize,
    n_layer: usize,
}

impl Bank {
    /// Reads how the layers use a bank, if they do.
    fn read(s: &Source<'_>, n_layer: usize, hidden: usize) -> Result<Option<Self>, ModelError> {
        let name = "attn_res.block_size";
        let block = s.count(name)? as usize;
        if block == 0 {
            return Ok(None);
        }
        let n = n_layer.div_ceil(block);
        if n > MAX_BANK {
            let what = format!("{block}, which makes {n} blocks; expected at most {MAX_BANK}");
            return Err(s.bad(name, what));
        }
        Ok(Some(Self {
            block,
            hidden,
            n_layer,
        }))
    }

    /// Finds the connection that reads `n_bank` earlier states.
    fn connection(
        self,
        s: &Source<'_>,
        prefix: &str,
        n_bank: usize,
        banks: bool,
    ) -> Result<BankConnection, ModelError> {
        Ok(BankConnection {
            score: s.vector(&format!("{prefix}_res_score.weight"), self.hidden)?,
            n_bank,
            banks,
        })
    }

    /// Finds the connections of a layer.
    fn layer(self, s: &Source<'_>, layer: usize) -> Result<Connections, ModelError> {
        let (before, banks) = (layer.div_ceil(self.block), layer.is_multiple_of(self.block));
        let after = before + usize::from(banks);
        let p = format!("blk.{layer}");
        let mixer = self.connection(s, &format!("{p}.attn"), before, banks)?;
        let ffn = self.connection(s, &format!("{p}.ffn"), after, false)?;
        Ok(Connections {
            mixer: Connection::Bank(mixer),
            ffn: Connection::Bank(ffn),
        })
    }

    /// Describes the streams: the hidden state, and those of the bank.
    fn streams(self, s: &Source<'_>) -> Result<StreamsSpec, ModelError> {
        let n_bank = self.n_layer.div_ceil(self.block);
        let end = self.connection(s, "output", n_bank, false)?;
        Ok(StreamsSpec {
            n: 1 + n_bank,
            end: StreamsEnd::Bank(end),
        })
    }
}
