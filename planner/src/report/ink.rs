//! Every color of the report, once for light pages and once for dark ones.
//!
//! Paper, text, and lines have the colors of the server's page. Charts are drawn in the light colors. A style sheet of attribute selectors then swaps them on
//! dark pages, so a viewer that knows no style sheets still shows the light chart. That works
//! because no two inks share a light value. Categories are taken from the color-blind-safe palettes
//! of Okabe and Ito (tiers) and of Paul Tol (what fills them).

use std::fmt::Write as _;
use tier_plan_runtime::formats::machine::TierKind;

/// A color by its meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Ink {
    Paper,
    Text,
    Muted,
    Grid,
    Axis,
    Measured,
    Predicted,
    /// A tier, by its index in [`TIERS`].
    Tier(u8),
    Dense,
    Pinned,
    Slots,
    Kv,
    Staging,
    Home,
    Unsplit,
    /// Expert work as a stage of a token.
    Experts,
    /// Waiting for expert reads.
    Waiting,
    /// How often an expert is used: 0 never, 7 most.
    Heat(u8),
    /// A layer, from first (0) to last (7).
    Depth(u8),
}

/// Okabe–Ito, ordered as [`tier_inks`] prefers them: VRAM, DRAM, PMem, CXL, NVMe, and two spares.
const TIERS: [(u32, u32); 7] = [
    (0x009E73, 0x1FBF93),
    (0x0072B2, 0x3D9BDC),
    (0xCC79A7, 0xDB92BC),
    (0x56B4E9, 0x7CC6EF),
    (0xE69F00, 0xF0AE2B),
    (0xD55E00, 0xE8772E),
    (0x8A8D91, 0x9A9DA1),
];
const HEAT: [(u32, u32); 8] = [
    (0xF6F7F8, 0x212429),
    (0xE1E4E8, 0x2C323A),
    (0xC9CED4, 0x414953),
    (0xABB2BA, 0x5C6570),
    (0x858E98, 0x7D8792),
    (0x5E6771, 0xA3ACB6),
    (0x3A424C, 0xCBD2D9),
    (0x14181D, 0xF7F9FB),
];
const DEPTH: [(u32, u32); 8] = [
    (0x440154, 0xB795E6),
    (0x46337E, 0x9D9DEB),
    (0x365C8D, 0x7FB0E8),
    (0x277F8E, 0x5FC3D6),
    (0x1FA187, 0x4FD3B0),
    (0x4AB96B, 0x7DDC8A),
    (0x86A820, 0xB9DD58),
    (0xB58900, 0xF0D648),
];

impl Ink {
    /// Returns `(light, dark)` as 0xRRGGBB.
    fn pair(self) -> (u32, u32) {
        let at = |table: &[(u32, u32)], i: u8| table[usize::from(i).min(table.len() - 1)];
        match self {
            Ink::Paper => (0xFFFFFF, 0x1A1C1F),
            Ink::Text => (0x1E1C19, 0xEAE8E4),
            Ink::Muted => (0x5C574F, 0xAAA69F),
            Ink::Grid => (0xE9E6E0, 0x2A2D32),
            Ink::Axis => (0x8F897D, 0x7F858E),
            Ink::Measured => (0x34495E, 0xC3D0DE),
            Ink::Predicted => (0xB4C0CC, 0x5B6978),
            Ink::Tier(i) => at(&TIERS, i),
            Ink::Dense => (0x332288, 0x8577DB),
            Ink::Pinned => (0x117733, 0x3FA866),
            Ink::Slots => (0x88CCEE, 0x8ACDEF),
            Ink::Kv => (0xCC6677, 0xD98291),
            Ink::Staging => (0xAA4499, 0xC46CB5),
            Ink::Home => (0xDDCC77, 0xD6C56F),
            Ink::Unsplit => (0x8C8270, 0xA79C88),
            Ink::Experts => (0xEE6677, 0xF07F8E),
            Ink::Waiting => (0xCCBB44, 0xD8C95F),
            Ink::Heat(i) => at(&HEAT, i),
            Ink::Depth(i) => at(&DEPTH, i),
        }
    }

    /// Returns the color on light pages.
    pub(super) fn rgb(self) -> (u8, u8, u8) {
        let [_, r, g, b] = self.pair().0.to_be_bytes();
        (r, g, b)
    }

    /// Lists every ink.
    pub(super) fn all() -> Vec<Ink> {
        let mut all = vec![
            Ink::Paper,
            Ink::Text,
            Ink::Muted,
            Ink::Grid,
            Ink::Axis,
            Ink::Measured,
            Ink::Predicted,
            Ink::Dense,
            Ink::Pinned,
            Ink::Slots,
            Ink::Kv,
            Ink::Staging,
            Ink::Home,
            Ink::Unsplit,
            Ink::Experts,
            Ink::Waiting,
        ];
        all.extend((0..TIERS.len() as u8).map(Ink::Tier));
        all.extend((0..HEAT.len() as u8).map(Ink::Heat));
        all.extend((0..DEPTH.len() as u8).map(Ink::Depth));
        all
    }
}

/// Returns the style sheet for readers who prefer dark pages.
pub(super) fn dark_css() -> String {
    let mut css = String::from("@media screen and (prefers-color-scheme: dark) {\n");
    for ink in Ink::all() {
        let (light, dark) = ink.pair();
        let _ = writeln!(
            css,
            "svg [fill=\"#{light:06X}\"] {{ fill: #{dark:06X} }} svg [stroke=\"#{light:06X}\"] {{ stroke: #{dark:06X} }}"
        );
    }
    css.push_str("}\n");
    css
}

/// Assigns one ink per tier, the same in every chart: by kind where that is free, otherwise the
/// next free one.
pub(super) fn tier_inks(kinds: &[Option<TierKind>]) -> Vec<Ink> {
    let mut taken = [false; TIERS.len()];
    let mut inks = vec![None; kinds.len()];
    for (ink, kind) in inks.iter_mut().zip(kinds) {
        let Some(kind) = kind else { continue };
        let wish = match kind {
            TierKind::Vram => 0,
            TierKind::Dram => 1,
            TierKind::Pmem => 2,
            TierKind::Cxl => 3,
            TierKind::Nvme => 4,
        };
        if !taken[wish] {
            taken[wish] = true;
            *ink = Some(wish);
        }
    }
    inks.into_iter()
        .map(|ink| {
            let ink = ink
                .or_else(|| taken.iter().position(|t| !t))
                .unwrap_or(TIERS.len() - 1);
            taken[ink] = true;
            Ink::Tier(ink as u8)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn no_two_inks_share_a_light_value() {
        let values: HashSet<u32> = Ink::all().iter().map(|i| i.pair().0).collect();
        assert_eq!(values.len(), Ink::all().len());
    }

    /// The style sheet of the server's page is the source of the colors that charts share with it.
    #[test]
    fn paper_and_text_are_those_of_the_page() {
        for (token, ink) in [
            ("surface", Ink::Paper),
            ("text", Ink::Text),
            ("muted", Ink::Muted),
            ("cell", Ink::Grid),
            ("field", Ink::Axis),
        ] {
            let (light, dark) = ink.pair();
            let line = format!("--{token}: light-dark(#{light:06x}, #{dark:06x});");
            assert!(tier_plan_serve::PAGE_TOKENS.contains(&line), "{line}");
        }
    }

    #[test]
    fn tiers_of_one_kind_differ() {
        let kinds = [
            Some(TierKind::Dram),
            Some(TierKind::Dram),
            None,
            Some(TierKind::Nvme),
        ];
        let inks = tier_inks(&kinds);
        assert_eq!(inks[0], Ink::Tier(1));
        assert_eq!(inks[3], Ink::Tier(4));
        assert_eq!(inks.iter().collect::<HashSet<_>>().len(), 4);
        assert_eq!(tier_inks(&[None; 12]).len(), 12);
    }
}
