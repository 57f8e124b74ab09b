//! A model with a plan for GPUs, and what both compute of it: on the stand-in for the driver, and on the
//! processor.

use crate::common::{self, json, root, stdout, succeeded};
use crate::driver::{Place, Report};
use serde_json::Value;
use std::fs;
use std::path::PathBuf;
use tier_plan_testing::{floats, nmse};

/// How much less likely than the processor's choice a chosen token may be, as a part of the logits'
/// spread.
const NEARLY_EQUAL: f32 = 0.01;

/// A machine with GPUs of so much memory. Its main memory is slow, lest a plan leaves something
/// there that a GPU has room for, and so is its processor at prompts, so that experts pass through
/// a GPU.
pub(super) fn machine(vram: &[&str], dram: &str) -> String {
    let mut text = String::from(
        "format = \"tier-plan machine\"\nversion = 3\nname = \"stand-in\"\ndescription = \"\"\nlayer_overhead_us = 20\n\
         token_overhead_us = 60\n",
    );
    for (n, capacity) in vram.iter().enumerate() {
        text += &format!(
            "[[tier]]\nname = \"gpu{n}\"\nkind = \"vram\"\ncapacity = \"{capacity}\"\nread_gbps = 500\nlatency_us = 5\n\
             prompt_gflops = 900\ndevice = {n}\nsource = \"stood in for\"\n"
        );
    }
    text + &format!(
        "[[tier]]\nname = \"dram\"\nkind = \"dram\"\ncapacity = \"{dram}\"\nread_gbps = 0.5\nlatency_us = 900\n\
         prompt_gflops = 0.01\nsource = \"assumed\"\n[[tier]]\nname = \"nvme\"\nkind = \"nvme\"\ncapacity = \"1GiB\"\n\
         read_gbps = 0.1\nlatency_us = 2000\nsource = \"assumed\"\n"
    )
}

/// A model with a plan for GPUs and one without.
pub(crate) struct Case {
    pub(crate) place: Place,
    pub(super) model: PathBuf,
    /// What `solve` says of the plan for GPUs.
    pub(super) solved: Value,
}

/// What a model computes from tokens: their logits, `[tokens, vocab]`, and the tokens that it adds.
#[derive(PartialEq)]
pub(super) struct Answer {
    pub(super) logits: Vec<f32>,
    pub(super) greedy: Vec<u32>,
}

impl Case {
    /// Three layers of eight experts with 16-bit weights, 395 KiB in all.
    pub(crate) fn small(vram: &[&str], dram: &str, context: &str) -> Self {
        Self::new(
            root().join("tests/data/arch/qwen3moe.gguf"),
            vram,
            dram,
            context,
        )
    }

    pub(crate) fn new(model: PathBuf, vram: &[&str], dram: &str, context: &str) -> Self {
        Self::with(model, vram, dram, context, &[])
    }

    /// The same with more options of `solve`.
    pub(super) fn with(
        model: PathBuf,
        vram: &[&str],
        dram: &str,
        context: &str,
        more: &[&str],
    ) -> Self {
        Self::on(model, &machine(vram, dram), context, more)
    }

    /// The same on any machine.
    pub(super) fn on(model: PathBuf, machine_file: &str, context: &str, more: &[&str]) -> Self {
        let place = Place::new();
        let solve = |text: &str, plan: &str| {
            fs::write(place.path().join("machine.toml"), text).unwrap();
            let list = [
                "solve",
                model.to_str().unwrap(),
                "-m",
                "machine.toml",
                "-o",
                plan,
                "--context",
                context,
            ];
            json(common::run_in(
                place.path(),
                &[&list[..], &["--json"], more].concat(),
            ))
        };
        solve(&machine(&[], "64MiB"), "processor.toml");
        let solved = solve(machine_file, "plan.toml");
        Self {
            place,
            model,
            solved,
        }
    }

    /// The arguments that have the plan for GPUs computed.
    pub(crate) fn arguments(&self, tokens: &[u32], greedy: u32) -> Vec<String> {
        let ids: Vec<String> = tokens.iter().map(u32::to_string).collect();
        let (model, ids, greedy) = (
            self.model.to_str().unwrap(),
            ids.join(","),
            greedy.to_string(),
        );
        let list = [
            "logits",
            model,
            "--tokens",
            &ids,
            "--greedy",
            &greedy,
            "-o",
            "logits.bin",
            "--plan",
            "plan.toml",
        ];
        list.map(String::from).into()
    }

    pub(super) fn answer(&self, output: std::process::Output) -> Answer {
        let said = stdout(&succeeded(output));
        let greedy = if said.is_empty() {
            Vec::new()
        } else {
            serde_json::from_str(&said).unwrap()
        };
        let bytes = fs::read(self.place.path().join("logits.bin")).unwrap();
        Answer {
            logits: floats(&bytes),
            greedy,
        }
    }

    /// Computes on the stand-in, with these settings of it.
    pub(super) fn on_gpu(
        &self,
        settings: &[(&str, &str)],
        tokens: &[u32],
        greedy: u32,
    ) -> (Answer, Report) {
        let list = self.arguments(tokens, greedy);
        let (output, report) = self.place.clean(
            settings,
            &list.iter().map(String::as_str).collect::<Vec<_>>(),
        );
        (self.answer(output), report)
    }

    /// The processor must compute nearly the same logits, and find nothing more likely than the
    /// tokens that were added.
    pub(super) fn agrees(&self, tokens: &[u32], answer: &Answer, most: f64) {
        let mut list = self.arguments(&[tokens, &answer.greedy].concat(), 0);
        *list.last_mut().unwrap() = "processor.toml".into();
        let plain = self.answer(common::run_in(self.place.path(), &list)).logits;
        let n_vocab = answer.logits.len() / tokens.len();
        let mut rows = plain.chunks_exact(n_vocab);
        assert_eq!(rows.len(), tokens.len() + answer.greedy.len());
        for (i, (row, found)) in rows
            .by_ref()
            .zip(answer.logits.chunks_exact(n_vocab))
            .enumerate()
        {
            let error = nmse(found, row);
            assert!(
                error < most,
                "the logits after token {i} are off by {error:.1e}"
            );
        }
        let after = plain[(tokens.len() - 1) * n_vocab..].chunks_exact(n_vocab);
        for (i, (row, token)) in after.zip(&answer.greedy).enumerate() {
            let best = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let spread = (row.iter().map(|v| v * v).sum::<f32>() / n_vocab as f32).sqrt();
            let short = (best - row[*token as usize]) / spread;
            assert!(
                short <= NEARLY_EQUAL,
                "token {i} of {:?} is {short} below the best",
                answer.greedy
            );
        }
    }

    /// Bytes of a kind on a tier of the plan for GPUs.
    pub(super) fn bytes(&self, tier: usize, kind: &str) -> u64 {
        self.solved["tiers"][tier][format!("{kind}_bytes")]
            .as_u64()
            .unwrap()
    }
}

/// Ids of the small models, whose vocabulary has 96.
pub(crate) fn tokens(n: u32) -> Vec<u32> {
    (0..n).map(|i| i * 37 % 90 + 1).collect()
}

/// A machine whose GPU and processor read main memory faster together than the processor alone, with
/// a drive or without.
pub(super) fn linked(vram: &str, has_drive: bool) -> String {
    let text = machine(&[vram], "64MiB");
    let drive = text.find("[[tier]]\nname = \"nvme\"").unwrap();
    let text = if has_drive { &text } else { &text[..drive] };
    let link = "link = { to_gbps = 0.5, to_pageable_gbps = 0.3, from_gbps = 0.5, from_pageable_gbps = 0.3, \
                contended_gbps = 0.45, dram_contended_gbps = 0.45 }\n";
    text.replacen("device = 0\n", &("device = 0\n".to_string() + link), 1)
}
