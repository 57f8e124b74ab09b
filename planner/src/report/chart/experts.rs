//! How often each expert is used, and the tier that each plan gives it.

use super::{Chart, MARGIN, Sign, WIDTH, begin, label_every, legend};
use crate::report::ink::Ink;
use crate::report::scene::{Anchor, Scene, fit};
use crate::report::table::{Table, number};
use crate::report::text::{list, percent};
use crate::report::view::{Overview, PlanView, Usage, usage};
use tier_plan_runtime::formats::placement::{LayerPlacement, Placement};

const X0: f64 = 92.0;
const SLOT_COLUMN: f64 = 150.0;
/// Upper ends of the shades, in multiples of even use; the last has none.
const SHADES: [f64; 6] = [0.25, 0.5, 1.0, 2.0, 4.0, 8.0];
const SHADE_WORDS: [&str; 8] =
    ["never used", "under ¼ × even use", "to ½ ×", "to 1 ×", "to 2 ×", "to 4 ×", "to 8 ×", "more"];

/// Geometry shared by all panels.
struct Grid {
    /// Experts a column stands for, more than one only when there are more experts than pixels.
    per_column: usize,
    columns: usize,
    cell: f64,
    row: f64,
}

pub(super) fn chart(o: &Overview<'_>) -> Option<Chart> {
    let profile = o.report.profile.as_ref()?;
    let usage = usage(profile)?;
    let experts = profile.n_expert as usize;
    let order: Vec<Vec<usize>> = usage.share.iter().map(|layer| by_use(layer)).collect();
    let plans: Vec<(&PlanView<'_>, &Placement)> = [o.best(), o.rival()]
        .into_iter()
        .flatten()
        .chain(&o.plans)
        .filter_map(|p| Some((p, p.entry.placement.as_ref()?)))
        .fold(Vec::new(), |mut chosen: Vec<(&PlanView<'_>, &Placement)>, next| {
            if chosen.len() < 2 && !chosen.iter().any(|(p, _)| std::ptr::eq(*p, next.0)) {
                chosen.push(next);
            }
            chosen
        });
    let title = title(&usage, &plans, profile.layers.as_slice());
    let subtitle = format!(
        "One row a layer, one cell an expert, the most used on the left: {} {} tokens. Dark cells are used often; \
         the coloured line under a cell is the expert's tier.",
        usage.tokens, usage.phase
    );
    let (mut scene, y) = begin(&title, &subtitle);
    let even = f64::from(profile.n_used) / experts as f64;
    let most = usage.share.iter().flatten().copied().fold(0.0, f64::max);
    let shades = usize::from(shade(most, even));
    let shade_signs: Vec<_> =
        (0..=shades).map(|i| (Sign::Swatch(Ink::Heat(i as u8)), SHADE_WORDS[i].to_string())).collect();
    let mut y = legend(&mut scene, y, &shade_signs);
    if !plans.is_empty() {
        let mut signs = Vec::new();
        for (name, ink) in &o.tiers {
            let last = plans.iter().any(|(_, p)| p.tiers.last().is_some_and(|t| t.tier.name == *name));
            let words = if last { format!("pooled, at home in {name}") } else { format!("pinned in {name}") };
            signs.push((Sign::Swatch(*ink), words));
        }
        y = legend(&mut scene, y - 4.0, &signs);
    }
    let grid = grid(experts, profile.layers.len());
    if plans.is_empty() {
        y = panel(&mut scene, o, &grid, profile.layers.as_slice(), &usage, &order, even, None, y);
    }
    for (view, placement) in &plans {
        let plan = Some((*view, *placement));
        y = panel(&mut scene, o, &grid, profile.layers.as_slice(), &usage, &order, even, plan, y) + 8.0;
    }
    scene.height = y;
    Some(Chart {
        file: "experts",
        title,
        how: "Each layer has its own order of experts. Dark cells above a fast tier's colour are what a good plan \
              looks like; dark cells above the last tier's colour are served from slots, or waited for. Rows that are \
              grey all along mean that experts are used evenly, and pinning cannot help much."
            .into(),
        scene,
        data: data(profile.layers.as_slice(), &usage, &plans),
    })
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
    let over = SHADES.iter().take_while(|s| share / even > **s * 1.000_001).count();
    1 + over as u8
}

fn grid(experts: usize, layers: usize) -> Grid {
    let room = WIDTH - MARGIN - SLOT_COLUMN - X0;
    let per_column = experts.div_ceil((room * 2.0) as usize).max(1);
    let columns = experts.div_ceil(per_column).max(1);
    // Whole half-pixels, so that every column is drawn equally wide.
    let cell = ((room / columns as f64) * 2.0).floor().max(1.0) / 2.0;
    let row = (470.0 / layers.max(1) as f64).floor().clamp(7.0, 36.0);
    Grid { per_column, columns, cell: cell.min(48.0), row }
}

/// Tier of an expert under a plan: pinned there, or the last tier when pooled.
fn tier_of(layer: Option<&LayerPlacement>, placement: &Placement, expert: usize) -> usize {
    let last = placement.tiers.len().saturating_sub(1);
    let found = layer.and_then(|l| {
        let holds = |list: &Vec<u32>| u32::try_from(expert).is_ok_and(|e| list.binary_search(&e).is_ok());
        l.pinned.iter().find(|(_, experts)| holds(experts)).map(|(tier, _)| *tier)
    });
    found.unwrap_or(last).min(last)
}

fn tier_name(placement: &Placement, tier: usize) -> &str {
    placement.tiers.get(tier).map_or("?", |t| t.tier.name.as_str())
}

/// One plan's panel (or the bare frequencies); returns the y below.
fn panel(
    scene: &mut Scene,
    o: &Overview<'_>,
    grid: &Grid,
    layers: &[u32],
    usage: &Usage,
    order: &[Vec<usize>],
    even: f64,
    plan: Option<(&PlanView<'_>, &Placement)>,
    y: f64,
) -> f64 {
    let right = X0 + grid.cell * grid.columns as f64;
    let mut top = y + 6.0;
    if let Some((view, placement)) = plan {
        let words = format!("{}: {}", o.label(view), served(usage, layers, placement));
        let line = fit(&words, 14.0, true, WIDTH - 2.0 * MARGIN);
        scene.bold(MARGIN, top + 8.0, 14.0, Anchor::Start, Ink::Text, line);
        top += 38.0;
        scene.text(right + 14.0, top - 8.0, 12.0, Anchor::Start, Ink::Muted, "slots of the layer");
    }
    scene.text(X0 - 8.0, top - 8.0, 12.0, Anchor::End, Ink::Muted, "layer");
    let most_slots = plan.map_or(0, |(_, p)| p.layers.iter().map(|l| l.slots).max().unwrap_or(0));
    let every = label_every(grid.row, 15.0);
    let gap = (grid.row * 0.14).max(1.0);
    let tier_height = if plan.is_some() { ((grid.row - gap) * 0.3).max(2.0) } else { 0.0 };
    let heat_height = grid.row - gap - tier_height;
    for (i, number) in layers.iter().enumerate() {
        let row = top + i as f64 * grid.row;
        if i % every == 0 {
            let at = row + (grid.row - gap) / 2.0 + 4.0;
            scene.text(X0 - 8.0, at, 12.0, Anchor::End, Ink::Muted, number.to_string());
        }
        let (Some(share), Some(order)) = (usage.share.get(i), order.get(i)) else { continue };
        let heat: Vec<Ink> = order
            .chunks(grid.per_column)
            .map(|c| Ink::Heat(shade(c.iter().map(|e| share[*e]).sum::<f64>() / c.len() as f64, even)))
            .collect();
        cells(scene, grid, row, heat_height, &heat);
        let Some((_, placement)) = plan else { continue };
        let layer = placement.layers.iter().find(|l| l.layer == *number);
        let tiers: Vec<Ink> = order
            .chunks(grid.per_column)
            .map(|c| o.ink_of(tier_name(placement, tier_of(layer, placement, c[0]))))
            .collect();
        cells(scene, grid, row + heat_height, tier_height, &tiers);
        if let Some(layer) = layer.filter(|l| l.slots > 0) {
            let tier = tier_name(placement, layer.slot_tier);
            let width = 60.0 * f64::from(layer.slots) / f64::from(most_slots.max(1));
            let tall = (grid.row - gap).min(16.0);
            let bar = row + (grid.row - gap - tall) / 2.0;
            scene.rect(right + 14.0, bar, width.max(1.0), tall, o.ink_of(tier));
            if i % every == 0 {
                let words = fit(&format!("{} {tier}", layer.slots), 12.0, false, SLOT_COLUMN - 80.0);
                let at = row + (grid.row - gap) / 2.0 + 4.0;
                scene.text(right + 14.0 + width + 5.0, at, 12.0, Anchor::Start, Ink::Muted, words);
            }
        } else if layer.is_some() && i % every == 0 {
            let at = row + (grid.row - gap) / 2.0 + 4.0;
            scene.text(right + 14.0, at, 12.0, Anchor::Start, Ink::Muted, "none");
        }
    }
    let bottom = top + layers.len() as f64 * grid.row + 6.0;
    scene.text(X0, bottom + 12.0, 12.0, Anchor::Start, Ink::Muted, "most used");
    let middle = (X0 + right) / 2.0;
    let each = if grid.per_column > 1 {
        format!("experts of the layer, {} a column", grid.per_column)
    } else {
        "experts of the layer".to_string()
    };
    if right - X0 > 420.0 {
        scene.text(middle, bottom + 12.0, 12.0, Anchor::Middle, Ink::Muted, each);
    }
    scene.text(right, bottom + 12.0, 12.0, Anchor::End, Ink::Muted, "least used");
    bottom + 28.0
}

/// One row of cells; neighbours of one colour are one shape when cells are too small for gaps.
fn cells(scene: &mut Scene, grid: &Grid, y: f64, height: f64, inks: &[Ink]) {
    let gap = if grid.cell >= 8.0 { 1.0 } else { 0.0 };
    let mut start = 0;
    while start < inks.len() {
        let mut end = start + 1;
        while gap == 0.0 && end < inks.len() && inks[end] == inks[start] {
            end += 1;
        }
        let x = X0 + start as f64 * grid.cell;
        scene.rect(x, y, (end - start) as f64 * grid.cell - gap, height, inks[start]);
        start = end;
    }
}

/// Share of accesses by tier: pinned ones by tier, pooled ones last.
fn shares(usage: &Usage, layers: &[u32], placement: &Placement) -> Vec<f64> {
    let mut by_tier = vec![0.0; placement.tiers.len()];
    let mut all = 0.0;
    for (number, share) in layers.iter().zip(&usage.share) {
        let layer = placement.layers.iter().find(|l| l.layer == *number);
        for (expert, share) in share.iter().enumerate() {
            if let Some(sum) = by_tier.get_mut(tier_of(layer, placement, expert)) {
                *sum += share;
            }
            all += share;
        }
    }
    if all > 0.0 { by_tier.into_iter().map(|s| s / all).collect() } else { by_tier }
}

fn served(usage: &Usage, layers: &[u32], placement: &Placement) -> String {
    let shares = shares(usage, layers, placement);
    let Some((pooled, pinned)) = shares.split_last() else { return "no tiers".into() };
    let mut words: Vec<String> = pinned
        .iter()
        .enumerate()
        .filter(|(_, s)| **s > 0.0)
        .map(|(t, s)| format!("{} to experts pinned in {}", percent(*s), tier_name(placement, t)))
        .collect();
    words.push(format!("{} to pooled ones", percent(*pooled)));
    format!("of all accesses go {}", list(&words))
}

fn title(usage: &Usage, plans: &[(&PlanView<'_>, &Placement)], layers: &[u32]) -> String {
    let (mut top, mut all) = (0.0, 0.0);
    for layer in &usage.share {
        let mut sorted = layer.clone();
        sorted.sort_by(|a, b| b.total_cmp(a));
        top += sorted.iter().take(sorted.len().div_ceil(4)).sum::<f64>();
        all += sorted.iter().sum::<f64>();
    }
    let quarter = format!(
        "The busiest quarter of experts takes {} of accesses",
        percent(if all > 0.0 { top / all } else { 0.0 })
    );
    match plans.first() {
        Some((view, placement)) => {
            let shares = shares(usage, layers, placement);
            let pinned: f64 = shares.split_last().map_or(0.0, |(_, faster)| faster.iter().sum());
            format!("{quarter}; {} pins {} of accesses", view.name(), percent(pinned))
        }
        None => quarter,
    }
}

fn data(layers: &[u32], usage: &Usage, plans: &[(&PlanView<'_>, &Placement)]) -> Table {
    let mut data = Table::new(&["plan", "layer", "expert", "share_of_tokens", "tier", "pooled"]);
    for (number_of, share) in layers.iter().zip(&usage.share) {
        for (expert, share) in share.iter().enumerate() {
            let mut push = |plan: &str, tier: &str, pooled: &str| {
                let cells = [plan, &number_of.to_string(), &expert.to_string(), &number(Some(*share)), tier, pooled];
                data.push(cells.map(str::to_string));
            };
            if plans.is_empty() {
                push("", "", "");
            }
            for (view, placement) in plans {
                let layer = placement.layers.iter().find(|l| l.layer == *number_of);
                let pinned = layer.is_some_and(|l| l.pinned.iter().any(|(_, e)| e.contains(&(expert as u32))));
                let tier = tier_of(layer, placement, expert);
                push(view.name(), tier_name(placement, tier), if pinned { "false" } else { "true" });
            }
        }
    }
    data
}
