//! Chart: how often each expert is used, and the tier that each plan gives it.

use super::{Chart, MARGIN, Sign, WIDTH, begin, label_every, legend};
use crate::report::ink::Ink;
use crate::report::scene::{Anchor, Scene, fit};
use crate::report::table::{Table, number};
use crate::report::text::{list, percent};
use crate::report::view::{Overview, PlanView, Usage, usage};
use tier_plan_runtime::formats::placement::{LayerPlacement, PerTier, Placement, TierIdx};

const X0: f64 = 92.0;
const SLOT_COLUMN: f64 = 150.0;
/// Smallest row height, in pixels, that has room for a cell and its tier. Lower rows get a separate
/// map of tiers.
const LOWEST_PAIR: f64 = 14.0;
/// Upper ends of the shades, in multiples of an even share; the last has none.
const SHADES: [f64; 6] = [0.25, 0.5, 1.0, 2.0, 4.0, 8.0];
const SHADE_WORDS: [&str; 8] = [
    "never", "under ¼", "¼–½", "½–1", "1–2", "2–4", "4–8", "over 8",
];

/// Geometry shared by all panels.
struct Grid {
    /// Experts per column: more than one only when there are more experts than pixels.
    per_column: usize,
    columns: usize,
    cell: f64,
    row: f64,
}

type Plan<'a> = (&'a PlanView<'a>, &'a Placement);

/// What a panel's cells show.
#[derive(Clone, Copy)]
enum Cells<'a> {
    Use,
    Tiers(Plan<'a>),
    Both(Plan<'a>),
}

impl<'a> Cells<'a> {
    fn plan(self) -> Option<Plan<'a>> {
        match self {
            Cells::Use => None,
            Cells::Tiers(plan) | Cells::Both(plan) => Some(plan),
        }
    }
}

/// What all panels have in common.
struct Map<'a> {
    o: &'a Overview<'a>,
    grid: Grid,
    layers: &'a [u32],
    usage: Usage,
    /// `[layer][rank]`: experts, the most used first.
    order: Vec<Vec<usize>>,
    /// Share of tokens per expert if all were used evenly.
    even: f64,
}

pub(super) fn chart(o: &Overview<'_>) -> Option<Chart> {
    let profile = o.report.profile.as_ref()?;
    let usage = usage(profile)?;
    let experts = profile.n_expert as usize;
    let layers = profile.layers.as_slice();
    let plans = shown_plans(o);
    let map = Map {
        o,
        grid: grid(experts, layers.len()),
        layers,
        order: usage.share.iter().map(|layer| by_use(layer)).collect(),
        even: f64::from(profile.n_used) / experts as f64,
        usage,
    };
    let paired = map.grid.row >= LOWEST_PAIR;
    let title = title(&map, &plans);
    let tokens = format!("{} {} tokens", map.usage.tokens, map.usage.phase);
    let subtitle = match (plans.is_empty(), paired) {
        (true, _) => {
            format!(
                "One row per layer, one cell per expert, most used first. A stronger shade is used more often ({tokens})."
            )
        }
        (false, true) => format!(
            "One row per layer, one cell per expert, most used first. A stronger shade is used more often ({tokens}); the colored \
             foot of a cell is the expert's tier."
        ),
        (false, false) => format!(
            "One row per layer, one column per expert, most used first, in the same order in every panel ({tokens})."
        ),
    };
    let (mut scene, y) = begin(&title, &subtitle);
    let most = map
        .usage
        .share
        .iter()
        .flatten()
        .copied()
        .fold(0.0, f64::max);
    let mut signs = vec![(
        Sign::Words,
        "Use, in multiples of an even share:".to_string(),
    )];
    let shades = usize::from(shade(most, map.even));
    signs.extend(
        (0..=shades).map(|i| (Sign::Swatch(Ink::Heat(i as u8)), SHADE_WORDS[i].to_string())),
    );
    let mut y = legend(&mut scene, y, &signs);
    if !plans.is_empty() {
        let mut signs = vec![(Sign::Words, "Tier:".to_string())];
        for (name, ink) in &o.tiers {
            let last = plans
                .iter()
                .any(|(_, p)| p.tiers.last().is_some_and(|t| t.tier.name == *name));
            let words = if last {
                format!("pooled, at home in {name}")
            } else {
                format!("pinned in {name}")
            };
            signs.push((Sign::Swatch(*ink), words));
        }
        y = legend(&mut scene, y - 4.0, &signs);
    }
    if plans.is_empty() || !paired {
        y = panel(&mut scene, &map, Cells::Use, y) + 6.0;
    }
    for plan in &plans {
        let cells = if paired {
            Cells::Both(*plan)
        } else {
            Cells::Tiers(*plan)
        };
        y = panel(&mut scene, &map, cells, y) + 6.0;
    }
    scene.height = y;
    let where_to_look = if paired {
        "above"
    } else {
        "in the same place as"
    };
    let how = format!(
        "Each layer has its own order of experts. Strong shades {where_to_look} a fast tier's color are what a good plan \
         looks like; strong shades {where_to_look} the last tier's color are served from slots, or waited for. Rows of \
         one shade mean that experts are used evenly, and that pinning cannot help much."
    );
    let data = data(&map, &plans);
    Some(Chart {
        file: "experts",
        title,
        how,
        scene,
        data,
    })
}

/// Returns the best plan and its rival, or the available plans: two at most.
fn shown_plans<'a>(o: &'a Overview<'a>) -> Vec<Plan<'a>> {
    let wanted = [o.best(), o.rival()].into_iter().flatten().chain(&o.plans);
    let mut shown: Vec<Plan<'a>> = Vec::new();
    for plan in wanted {
        if let Some(placement) = &plan.entry.placement
            && shown.len() < 2
            && !shown.iter().any(|(p, _)| std::ptr::eq(*p, plan))
        {
            shown.push((plan, placement));
        }
    }
    shown
}

fn by_use(layer: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..layer.len()).collect();
    order.sort_by(|a, b| layer[*b].total_cmp(&layer[*a]).then(a.cmp(b)));
    order
}

fn shade(share: f64, even: f64) -> u8 {
    if share <= 0.0 || even <= 0.0 {
        return 0;
    }
    let over = SHADES
        .iter()
        .take_while(|s| share / even > **s * 1.000_001)
        .count();
    1 + over as u8
}

fn grid(experts: usize, layers: usize) -> Grid {
    let room = WIDTH - MARGIN - SLOT_COLUMN - X0;
    let per_column = experts.div_ceil((room * 2.0) as usize).max(1);
    let columns = experts.div_ceil(per_column).max(1);
    // Whole half-pixels, so that every column has the same width.
    let cell = ((room / columns as f64) * 2.0).floor().max(1.0) / 2.0;
    let layers = layers.max(1) as f64;
    let paired = (470.0 / layers).floor().min(36.0);
    let row = if paired >= LOWEST_PAIR {
        paired
    } else {
        (400.0 / layers).floor().clamp(5.0, 12.0)
    };
    Grid {
        per_column,
        columns,
        cell: cell.min(48.0),
        row,
    }
}

/// Returns the tier of an expert under a plan: where it is pinned, or the last tier when pooled.
fn tier_of(layer: Option<&LayerPlacement>, placement: &Placement, expert: usize) -> TierIdx {
    let last = placement.home_tier();
    let found = layer.and_then(|l| {
        let holds =
            |list: &Vec<u32>| u32::try_from(expert).is_ok_and(|e| list.binary_search(&e).is_ok());
        l.pinned
            .iter()
            .find(|pins| holds(&pins.experts))
            .map(|pins| pins.tier)
    });
    found.unwrap_or(last).min(last)
}

fn tier_name(placement: &Placement, tier: TierIdx) -> &str {
    placement
        .tiers
        .get(tier)
        .map_or("?", |t| t.tier.name.as_str())
}

/// Draws one panel; returns the y below.
fn panel(scene: &mut Scene, map: &Map<'_>, cells: Cells<'_>, y: f64) -> f64 {
    let grid = &map.grid;
    let right = X0 + grid.cell * grid.columns as f64;
    let heading = match cells.plan() {
        Some((view, placement)) => format!("{}: {}", map.o.label(view), served(map, placement)),
        None => "How often each expert is used".to_string(),
    };
    let heading = fit(&heading, 14.0, true, WIDTH - 2.0 * MARGIN);
    scene.bold(MARGIN, y + 14.0, 14.0, Anchor::Start, Ink::Text, heading);
    let top = y + 44.0;
    scene.text(X0 - 8.0, top - 8.0, 12.0, Anchor::End, Ink::Muted, "layer");
    let gap = if grid.row < LOWEST_PAIR {
        1.0
    } else {
        grid.row * 0.14
    };
    let tall = grid.row - gap;
    let (heat, tiers) = match cells {
        Cells::Use => (tall, 0.0),
        Cells::Tiers(_) => (0.0, tall),
        Cells::Both(_) => (tall * 0.7, tall * 0.3),
    };
    let every = label_every(grid.row, 15.0);
    for (i, number) in map.layers.iter().enumerate() {
        let row = top + i as f64 * grid.row;
        if number.is_multiple_of(every) {
            scene.text(
                X0 - 8.0,
                row + tall / 2.0 + 4.0,
                12.0,
                Anchor::End,
                Ink::Muted,
                number.to_string(),
            );
        }
        let (Some(share), Some(order)) = (map.usage.share.get(i), map.order.get(i)) else {
            continue;
        };
        let columns = || order.chunks(grid.per_column);
        let mean = |c: &[usize]| c.iter().map(|e| share[*e]).sum::<f64>() / c.len() as f64;
        let shades: Vec<Ink> = columns()
            .map(|c| Ink::Heat(shade(mean(c), map.even)))
            .collect();
        draw_cells(scene, grid, row, heat, &shades);
        if let Some((_, placement)) = cells.plan() {
            let layer = placement.layers.iter().find(|l| l.layer == *number);
            let name = |c: &[usize]| tier_name(placement, tier_of(layer, placement, c[0]));
            let inks: Vec<Ink> = columns().map(|c| map.o.ink_of(name(c))).collect();
            draw_cells(scene, grid, row + heat, tiers, &inks);
        }
    }
    if let Some((_, placement)) = cells.plan() {
        slots(scene, map, placement, (right + 16.0, top, tall, every));
    }
    let bottom = top + map.layers.len() as f64 * grid.row + 6.0;
    scene.text(
        X0,
        bottom + 12.0,
        12.0,
        Anchor::Start,
        Ink::Muted,
        "most used",
    );
    let each = if grid.per_column > 1 {
        format!("experts of the layer, {} a column", grid.per_column)
    } else {
        "experts of the layer".to_string()
    };
    if right - X0 > 420.0 {
        scene.text(
            (X0 + right) / 2.0,
            bottom + 12.0,
            12.0,
            Anchor::Middle,
            Ink::Muted,
            each,
        );
    }
    if right - X0 > 150.0 {
        scene.text(
            right,
            bottom + 12.0,
            12.0,
            Anchor::End,
            Ink::Muted,
            "least used",
        );
    }
    bottom + 24.0
}

/// Draws the column of slots beside a panel: one bar per layer, in the color of the tier that holds
/// the slots.
fn slots(
    scene: &mut Scene,
    map: &Map<'_>,
    placement: &Placement,
    (x, top, tall, every): (f64, f64, f64, u32),
) {
    scene.text(
        x,
        top - 8.0,
        12.0,
        Anchor::Start,
        Ink::Muted,
        "slots of the layer",
    );
    let most = placement.layers.iter().map(|l| l.slots).max().unwrap_or(0);
    if most == 0 {
        scene.text(
            x,
            top + (tall / 2.0 + 4.0).max(13.0),
            12.0,
            Anchor::Start,
            Ink::Muted,
            "none in any layer",
        );
        return;
    }
    let paired = map.grid.row >= LOWEST_PAIR;
    for (i, number) in map.layers.iter().enumerate() {
        let Some(layer) = placement.layers.iter().find(|l| l.layer == *number) else {
            continue;
        };
        let row = top + i as f64 * map.grid.row;
        let bar = tall.min(16.0);
        let width = 60.0 * f64::from(layer.slots) / f64::from(most);
        let tier = tier_name(placement, layer.slot_tier);
        scene.rect(x, row + (tall - bar) / 2.0, width, bar, map.o.ink_of(tier));
        if !number.is_multiple_of(every) {
            continue;
        }
        let (at, words) = match layer.slots {
            0 => (x, "none".to_string()),
            n if paired => (x + width + 6.0, format!("{n} {tier}")),
            // Low rows are so close that a number must keep clear of its neighbors' bars.
            n => (x + 66.0, n.to_string()),
        };
        let words = fit(&words, 12.0, false, WIDTH - 8.0 - at);
        scene.text(
            at,
            row + tall / 2.0 + 4.0,
            12.0,
            Anchor::Start,
            Ink::Muted,
            words,
        );
    }
}

/// Draws one row of cells. Neighbors of one color are one shape when cells are too small for gaps.
fn draw_cells(scene: &mut Scene, grid: &Grid, y: f64, height: f64, inks: &[Ink]) {
    let gap = if grid.cell >= 8.0 { 1.0 } else { 0.0 };
    let mut start = 0;
    while start < inks.len() {
        let mut end = start + 1;
        while gap == 0.0 && end < inks.len() && inks[end] == inks[start] {
            end += 1;
        }
        let x = X0 + start as f64 * grid.cell;
        scene.rect(
            x,
            y,
            (end - start) as f64 * grid.cell - gap,
            height,
            inks[start],
        );
        start = end;
    }
}

/// Returns the share of accesses per tier: pinned ones by tier, pooled ones last.
fn shares(map: &Map<'_>, placement: &Placement) -> Vec<f64> {
    let mut by_tier = PerTier::from_fn(placement.tiers.len(), |_| 0.0);
    let mut all = 0.0;
    for (number, share) in map.layers.iter().zip(&map.usage.share) {
        let layer = placement.layers.iter().find(|l| l.layer == *number);
        for (expert, share) in share.iter().enumerate() {
            if let Some(sum) = by_tier.get_mut(tier_of(layer, placement, expert)) {
                *sum += share;
            }
            all += share;
        }
    }
    if all > 0.0 {
        by_tier.into_iter().map(|s| s / all).collect()
    } else {
        by_tier.into()
    }
}

fn served(map: &Map<'_>, placement: &Placement) -> String {
    let shares = shares(map, placement);
    let Some((_, pinned)) = shares.split_last() else {
        return "no tiers".into();
    };
    let pinned: Vec<(f64, &str)> = pinned
        .iter()
        .zip(placement.tiers.indices())
        .map(|(s, t)| (*s, tier_name(placement, t)))
        .filter(|(s, _)| *s > 0.0)
        .collect();
    let words: Vec<String> = pinned
        .iter()
        .map(|(s, tier)| format!("{} in {tier}", percent(*s)))
        .collect();
    if pinned.is_empty() {
        return "nothing is pinned, all experts are pooled".into();
    }
    format!(
        "of all accesses, {} go to pinned experts ({})",
        percent(pinned.iter().map(|p| p.0).sum()),
        list(&words)
    )
}

fn title(map: &Map<'_>, plans: &[Plan<'_>]) -> String {
    let (mut top, mut all) = (0.0, 0.0);
    for layer in &map.usage.share {
        let mut sorted = layer.clone();
        sorted.sort_by(|a, b| b.total_cmp(a));
        top += sorted.iter().take(sorted.len().div_ceil(4)).sum::<f64>();
        all += sorted.iter().sum::<f64>();
    }
    let share = percent(if all > 0.0 { top / all } else { 0.0 });
    let quarter = format!("The busiest quarter of experts takes {share} of accesses");
    match plans.first() {
        Some((view, placement)) => {
            let shares = shares(map, placement);
            let pinned: f64 = shares
                .split_last()
                .map_or(0.0, |(_, faster)| faster.iter().sum());
            format!(
                "{quarter}; those that {} pins take {}",
                view.name(),
                percent(pinned)
            )
        }
        None => quarter,
    }
}

fn data(map: &Map<'_>, plans: &[Plan<'_>]) -> Table {
    let mut data = Table::new(&[
        "plan",
        "layer",
        "expert",
        "share_of_tokens",
        "tier",
        "pooled",
    ]);
    for (layer_number, share) in map.layers.iter().zip(&map.usage.share) {
        for (expert, share) in share.iter().enumerate() {
            let mut push = |plan: &str, tier: &str, pooled: &str| {
                let cells = [
                    plan,
                    &layer_number.to_string(),
                    &expert.to_string(),
                    &number(Some(*share)),
                    tier,
                    pooled,
                ];
                data.push(cells.map(str::to_string));
            };
            if plans.is_empty() {
                push("", "", "");
            }
            for (view, placement) in plans {
                let layer = placement.layers.iter().find(|l| l.layer == *layer_number);
                let pinned = layer.is_some_and(|l| {
                    l.pinned
                        .iter()
                        .any(|pins| pins.experts.contains(&(expert as u32)))
                });
                let tier = tier_of(layer, placement, expert);
                push(
                    view.name(),
                    tier_name(placement, tier),
                    if pinned { "false" } else { "true" },
                );
            }
        }
    }
    data
}
