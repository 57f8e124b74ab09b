//! What a network is, and what is special about it, in words.

use std::collections::BTreeMap;
use tier_plan_runtime::model::spec::{
    Activation, CompressedSpec, Ffn, GqaSpec, LayerSpec, Mixer, MlaSpec, ModelSpec, OutputGate,
    Reach, RouterInput, Selection, WindowKind,
};

/// Families by architecture, as their makers call them.
const FAMILIES: [(&str, &str); 47] = [
    ("afmoe", "Trinity"),
    ("bailingmoe2", "Ling 2.0 and Ring"),
    ("bailingmoe3", "Ling 3.0"),
    ("deepseek", "DeepSeek MoE"),
    ("deepseek2", "DeepSeek V2 and V3, Kimi K2"),
    ("deepseek32", "DeepSeek V3.2"),
    ("deepseek4", "DeepSeek V4"),
    ("dots1", "dots.llm1"),
    ("dots3note", "dots3-note"),
    ("ernie4_5-moe", "ERNIE 4.5"),
    ("exaone-moe", "K-EXAONE"),
    ("gemma3", "Gemma 3"),
    ("gemma4", "Gemma 4"),
    ("glm-dsa", "GLM-5"),
    ("glm4moe", "GLM-4.5"),
    ("glm5-next", "GLM-5.3-Flash"),
    ("gpt-oss", "gpt-oss"),
    ("granitemoe", "Granite MoE"),
    ("grok", "Grok"),
    ("hunyuan-moe", "Hunyuan A13B"),
    ("hy_v3", "Hunyuan 3"),
    ("hy_v4", "Hy4"),
    ("kimi-k3", "Kimi K3"),
    ("kimi-linear", "Kimi Linear"),
    ("laguna", "Laguna"),
    ("lfm2moe", "LFM2 MoE"),
    ("llama", "Llama and Mixtral"),
    ("llama4", "Llama 4"),
    ("mimo2", "MiMo V2"),
    ("minimax-m2", "MiniMax M2"),
    ("minimax-m3", "MiniMax M3"),
    ("mistral3", "Ministral 3"),
    ("mistral4", "Mistral 4"),
    ("nemotron_h_moe", "Nemotron 3"),
    ("olmoe", "OLMoE"),
    ("phi3", "Phi-3 and Phi-4"),
    ("qwen2", "Qwen2"),
    ("qwen2moe", "Qwen2 MoE"),
    ("qwen3", "Qwen3"),
    ("qwen35", "Qwen3.5"),
    ("qwen35moe", "Qwen3.5 MoE"),
    ("qwen3moe", "Qwen3 MoE"),
    ("qwen3next", "Qwen3-Next"),
    ("qwen3vlmoe", "Qwen3-VL"),
    ("qwen4exp", "Qwen3.8-Flash-Next"),
    ("smollm3", "SmolLM3"),
    ("step35", "Step 3.5"),
];

/// Returns the name of the family that an architecture belongs to, if it is known.
pub fn family(arch: &str) -> Option<&'static str> {
    let found = FAMILIES.iter().find(|(name, _)| *name == arch);
    found.map(|(_, family)| *family)
}

/// Returns what is special about a network, one phrase for each thing: what changes what is read,
/// kept or placed first.
pub fn special(spec: &ModelSpec) -> Vec<String> {
    let n = spec.layers.len();
    let mut found: BTreeMap<(usize, String), usize> = BTreeMap::new();
    for layer in &spec.layers {
        for (order, what) in of_layer(layer).into_iter().enumerate() {
            if let Some(what) = what {
                *found.entry((order, what)).or_insert(0) += 1;
            }
        }
    }
    let mut said = Vec::new();
    if spec.token_inputs.is_some() {
        said.push("inputs of tokens for every layer, of which a token reads one row".into());
    }
    if let Some(table) = &spec.ngrams {
        said.push(format!(
            "a table of n-grams of up to {} tokens, of which a token reads {} rows",
            table.n,
            table.n_heads()
        ));
    }
    if let Some(streams) = &spec.streams {
        said.push(format!("{} residual streams", streams.n));
    }
    said.extend(found.into_iter().map(|((_, what), layers)| match layers {
        all if all == n => what,
        1 => format!("{what} in 1 of {n} layers"),
        some => format!("{what} in {some} of {n} layers"),
    }));
    if let Some(cap) = spec.head.softcap {
        said.push(format!("logits capped at {cap}"));
    }
    said
}

/// Returns what is special about a layer; equal things of layers are at equal places.
fn of_layer(layer: &LayerSpec) -> Vec<Option<String>> {
    let mut said = match &layer.mixer {
        Mixer::Gqa(attention) => of_attention(attention),
        Mixer::Mla(attention) => of_latent_attention(attention),
        Mixer::Delta(_) => vec![Some("gated delta nets".into())],
        Mixer::Kda(_) => vec![Some("Kimi delta attention".into())],
        Mixer::ShortConv(conv) => {
            vec![Some(format!("convolutions over {} tokens", conv.taps))]
        }
        Mixer::Mamba(_) => vec![Some("Mamba-2".into())],
        Mixer::Compressed(attention) => of_compressed(attention),
        Mixer::None => vec![Some("no mixer".into())],
    };
    said.resize(MIXER_PLACES, None);
    let when = |is: bool, what: &str| is.then(|| what.to_string());
    let residual = &layer.residual;
    said.push(when(
        residual.mixer_norm.is_some() || residual.ffn_norm.is_some(),
        "norms after the blocks",
    ));
    let activation = match &layer.ffn {
        Ffn::Dense(ffn) => ffn.activation,
        Ffn::Moe(moe) => moe.activation,
        Ffn::None => Activation::Silu,
    };
    said.push(match activation {
        Activation::Gelu => Some("GELU".into()),
        Activation::SquaredRelu => Some("squared ReLU without gates".into()),
        Activation::LimitedSilu { .. } => Some("limited activations".into()),
        Activation::Situ { .. } => Some("SiTU".into()),
        _ => None,
    });
    let moe = layer.moe();
    said.push(when(
        moe.is_some_and(|moe| moe.router_input != RouterInput::Normed),
        "routers with an input of their own",
    ));
    said.push(when(
        moe.is_some_and(|moe| moe.by_token.is_some()),
        "experts that the token alone chooses, read ahead exactly",
    ));
    said.push(when(
        moe.is_some_and(|moe| moe.latent.is_some()),
        "experts in a smaller space",
    ));
    said.push(when(
        moe.is_some_and(|moe| moe.weigh_input),
        "weights on what experts read",
    ));
    said
}

/// Places that a mixer takes among the things of a layer.
const MIXER_PLACES: usize = 8;

fn of_compressed(a: &CompressedSpec) -> Vec<Option<String>> {
    let far = a.far.map(|far| {
        let ratio = far.compressor.ratio;
        match far.index {
            Some(index) => format!("the {} best of blocks of {ratio} tokens", index.kept),
            None => format!("a vector per block of {ratio} tokens"),
        }
    });
    let window = format!("a window of {} tokens", a.window);
    vec![far, Some(window)]
}

fn of_attention(a: &GqaSpec) -> Vec<Option<String>> {
    let when = |is: bool, what: &str| is.then(|| what.to_string());
    let window = a.window.map(|n| match a.window_kind {
        WindowKind::Sliding => format!("a sliding window of {n} tokens"),
        WindowKind::Chunked => format!("chunks of {n} tokens"),
    });
    let gates = matches!(a.gate, Some(OutputGate::Separate { .. }));
    let softcap = a.softcap.map(|cap| format!("scores capped at {cap}"));
    let index = a.index.map(|index| {
        format!(
            "the {} best of blocks of {} tokens",
            index.kept, index.block
        )
    });
    vec![
        index,
        window,
        when(a.shared_kv.is_some(), "keys and values of an earlier layer"),
        when(
            a.shared_kv.is_none() && a.keys_are_values(),
            "values that are the keys",
        ),
        when(a.sinks.is_some(), "attention sinks"),
        when(a.rope.is_none(), "no rotation"),
        when(gates || a.gated(), "gates on attention"),
        softcap,
    ]
}

fn of_latent_attention(a: &MlaSpec) -> Vec<Option<String>> {
    let when = |is: bool, what: &str| is.then(|| what.to_string());
    let reach = match &a.reach {
        Reach::All => None,
        Reach::Window(n) => Some(format!("a sliding window of {n} tokens")),
        Reach::Indexed(indexer) => Some(match indexer.selection {
            Selection {
                blocks,
                block: 1,
                tail: _,
            } => format!("a lightning indexer that chooses {blocks} tokens"),
            Selection { blocks, block, .. } => {
                format!("a lightning indexer that chooses {blocks} blocks of {block} tokens")
            }
        }),
        Reach::Reused(_) => Some("tokens that an earlier layer's indexer chose".into()),
    };
    vec![
        Some("latent attention".into()),
        reach,
        None,
        None,
        when(a.sinks.is_some(), "attention sinks"),
        when(a.rope.is_none(), "no rotation"),
        when(a.gate.is_some(), "gates on attention"),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use tier_plan_runtime::gguf::Gguf;
    use tier_plan_runtime::model::{SUPPORTED, describe};
    use tier_plan_testing::data;

    fn of(name: &str) -> Vec<String> {
        let gguf = Gguf::open(&data(&format!("{name}.gguf"))).unwrap();
        special(&describe(&gguf).unwrap())
    }

    #[test]
    fn plain_models_have_nothing_special() {
        assert!(of("arch/qwen3moe").is_empty());
    }

    #[test]
    fn what_is_special_is_said_with_its_layers() {
        assert_eq!(
            of("arch2/gemma4"),
            [
                "inputs of tokens for every layer, of which a token reads one row",
                "a sliding window of 9 tokens in 4 of 6 layers",
                "keys and values of an earlier layer in 3 of 6 layers",
                "values that are the keys in 1 of 6 layers",
                "norms after the blocks",
                "GELU",
                "routers with an input of their own in 2 of 6 layers",
                "logits capped at 2",
            ]
        );
        assert_eq!(
            of("arch2/glm-dsa"),
            [
                "latent attention",
                "a lightning indexer that chooses 12 tokens in 2 of 3 layers",
                "tokens that an earlier layer's indexer chose in 1 of 3 layers",
            ]
        );
        assert_eq!(
            of("arch2/glm5-next"),
            [
                "4 residual streams",
                "Kimi delta attention in 2 of 4 layers",
                "latent attention in 2 of 4 layers",
                "a lightning indexer that chooses 3 blocks of 4 tokens in 1 of 4 layers",
                "tokens that an earlier layer's indexer chose in 1 of 4 layers",
                "no rotation in 2 of 4 layers",
            ]
        );
        let conv = of("arch2/lfm2moe");
        assert!(conv[0].starts_with("convolutions over "), "{conv:?}");
    }

    #[test]
    fn families_are_of_architectures_that_run() {
        for (arch, name) in FAMILIES {
            assert!(SUPPORTED.contains(&arch), "{arch}: {name}");
            assert_eq!(family(arch), Some(name));
        }
        assert_eq!(family("bert"), None);
    }
}
