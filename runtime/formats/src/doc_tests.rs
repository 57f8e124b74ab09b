//! The examples in docs/FORMAT.md are files that the readers accept.

use super::kind::ALL;
use super::{machine, placement, profile, record, shape, slots};
use std::path::Path;

const DOC: &str = include_str!("../../../docs/FORMAT.md");

/// The code block of a language under a heading.
fn example(heading: &str, language: &str) -> &'static str {
    let section = DOC.split_once(&format!("\n## {heading}\n")).unwrap().1;
    let section = section.split_once("\n## ").map_or(section, |(own, _)| own);
    let block = section.split_once(&format!("```{language}\n")).unwrap().1;
    block.split_once("```").unwrap().0
}

#[test]
fn every_version_is_documented_and_has_a_fixture() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/formats");
    let names = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let names: Vec<String> = names.collect();
    let of_kinds = [
        "machine",
        "placement",
        "profile",
        "record",
        "logprobs",
        "shape",
        "sums",
        "pack",
        "slots",
    ];
    for (kind, stem) in ALL.into_iter().zip(of_kinds) {
        let start = format!("| [{}](", kind.what.trim_start_matches("file of "));
        let row = DOC
            .lines()
            .find(|line| line.starts_with(&start))
            .expect(kind.what);
        assert!(
            row.contains(&format!("` | {} | ", kind.newest)),
            "version {} of {row}",
            kind.newest
        );
        for version in 1..=kind.newest {
            let prefix = format!("{stem}.v{version}.");
            assert!(
                names.iter().any(|name| name.starts_with(&prefix)),
                "tests/data/formats/{prefix}* is missing"
            );
        }
    }
}

#[test]
fn the_examples_are_readable() {
    let path = Path::new("FORMAT.md");
    let machine = machine::decode(example("Machine file", "toml").as_bytes(), path).unwrap();
    assert_eq!(machine.tiers[1].capacity_bytes, 96 << 30);
    let record = record::decode(example("Run record", "json").as_bytes(), path).unwrap();
    assert_eq!(record.decode_tok_s(), 6.0);

    let shape = shape::decode(example("Model shape", "toml").as_bytes(), path).unwrap();
    assert_eq!(shape.parameters().total, 1_026_408_232_448);

    let slots = slots::decode(example("Slots", "json").as_bytes(), path).unwrap();
    assert_eq!(slots.layers[0].experts, [5, 0, 31]);

    // The plan shows one tier of three; the fixture has the others.
    let plan = example("Placement plan", "toml");
    let error = placement::decode(plan.as_bytes(), path)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("names the tier \"dram\", but the plan's tiers are vram"),
        "{error}"
    );
    let fixture = include_str!("../../../tests/data/formats/placement.v1.toml");
    let tiers = &fixture[fixture.find("[[tier]]").unwrap()..fixture.find("[[layer]]").unwrap()];
    let (start, end) = (
        plan.find("[[tier]]").unwrap(),
        plan.find("[[layer]]").unwrap(),
    );
    let whole = [&plan[..start], tiers, &plan[end..]].concat();
    let plan = placement::decode(whole.as_bytes(), path).unwrap();
    assert_eq!(plan.layers.len(), 4);

    // The profile's header before choices of experts 0 to 3, eight of which take five bytes.
    let header = example("Profile", "json").as_bytes();
    let choices = 320 * 6 * 4;
    let eight = (0..8u64)
        .fold(0, |bits, i| bits | (i % 4) << (5 * i))
        .to_le_bytes();
    let mut bytes = [
        &b"tierprof"[..],
        &1u32.to_le_bytes(),
        &(header.len() as u32).to_le_bytes(),
        header,
    ]
    .concat();
    for _ in 0..2 {
        bytes.extend(eight[..5].repeat(choices / 8));
        bytes.extend(vec![0; choices]);
    }
    bytes.extend(xxhash_rust::xxh3::xxh3_64(&bytes).to_le_bytes());
    let profile = profile::decode(&bytes, path).unwrap();
    assert_eq!(profile.chosen(1, 319, 5), [0, 1, 2, 3]);
}
