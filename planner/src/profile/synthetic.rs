//! Synthetic routing for tests and benchmarks: skewed, partly by domain, and local in time.
//!
//! Plans made from it say nothing about any model.

use tier_plan_runtime::formats::SourceId;
use tier_plan_runtime::formats::profile::{Profile, PromptTrace, Split};
use tier_plan_runtime::model::shape::ModelShape;

/// Parameters of the routing.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Routing {
    /// Exponent of the popularity of experts by rank; 0 makes all alike.
    pub skew: f64,
    /// Probability that a choice repeats one of the last token's.
    pub repeat: f64,
    /// Number of prompts, by turns of two domains; the last quarter is held out.
    pub prompts: u32,
    /// Prompt tokens per prompt.
    pub prompt_tokens: u32,
    /// Decoded tokens per prompt.
    pub decode_tokens: u32,
    /// Seed of the generator.
    pub seed: u64,
}

/// A pseudorandom generator (xorshift64*, G. Marsaglia and S. Vigna).
pub struct Random(u64);

impl Random {
    /// Makes a generator; equal seeds give equal numbers.
    pub fn new(seed: u64) -> Self {
        Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// Returns a number uniform in `[0, 1)`.
    pub fn unit(&mut self) -> f64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Returns an integer uniform below `n`, 0 when there is none below.
    pub fn below(&mut self, n: usize) -> usize {
        ((self.unit() * n as f64) as usize).min(n.saturating_sub(1))
    }
}

/// Makes a profile of the model with such routing. All layers with experts must have the same
/// counts.
pub fn profile(shape: &ModelShape, routing: &Routing) -> Profile {
    let (n_expert, n_used) = shape
        .experts
        .first()
        .map_or((1, 0), |e| (e.n_expert as usize, e.n_used as usize));
    let mut random = Random::new(routing.seed);
    // `[layer][domain][n_expert]` cumulative popularity over shuffled experts.
    let popularity: Vec<Vec<(Vec<f64>, Vec<u16>)>> = shape
        .experts
        .iter()
        .map(|_| {
            (0..2)
                .map(|_| {
                    let mut experts: Vec<u16> = (0..n_expert as u16).collect();
                    (1..n_expert).for_each(|i| experts.swap(i, random.below(i + 1)));
                    let mut sum = 0.0;
                    let weights = (1..=n_expert).map(|rank| {
                        sum += (rank as f64).powf(-routing.skew);
                        sum
                    });
                    (weights.collect(), experts)
                })
                .collect()
        })
        .collect();
    let prompts = (0..routing.prompts)
        .map(|at| {
            let domain = at as usize % 2;
            let tokens = routing.prompt_tokens + routing.decode_tokens;
            let mut experts: Vec<u16> =
                Vec::with_capacity(tokens as usize * shape.experts.len() * n_used);
            let stride = shape.experts.len() * n_used;
            for _ in 0..tokens {
                for by_domain in &popularity {
                    let (weights, ids) = &by_domain[domain];
                    let before = experts.len().checked_sub(stride);
                    let from = experts.len();
                    while experts.len() < from + n_used {
                        let expert = match before {
                            Some(before) if random.unit() < routing.repeat => {
                                experts[before + random.below(n_used)]
                            }
                            _ => {
                                let aim = random.unit() * weights[n_expert - 1];
                                ids[weights.partition_point(|&w| w < aim).min(n_expert - 1)]
                            }
                        };
                        if !experts[from..].contains(&expert) {
                            experts.push(expert);
                        }
                    }
                }
            }
            PromptTrace {
                domain: ["even", "odd"][domain].to_string(),
                name: format!("{at}"),
                split: if at * 4 >= routing.prompts * 3 {
                    Split::HeldOut
                } else {
                    Split::Train
                },
                prompt_tokens: routing.prompt_tokens,
                decode_tokens: routing.decode_tokens,
                weights: vec![0; experts.len()],
                experts,
            }
        })
        .collect();
    Profile {
        model: shape.id.clone(),
        layers: shape.experts.iter().map(|e| e.layer).collect(),
        n_expert: n_expert as u32,
        n_used: n_used as u32,
        made: format!("{routing:?}"),
        prompts,
        counted: None,
        guesses: None,
        id: SourceId {
            name: "synthetic".to_string(),
            hash: "0".repeat(32),
        },
    }
}
