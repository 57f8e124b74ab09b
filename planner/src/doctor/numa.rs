//! NUMA nodes, their processors, and automatic balancing.

use super::{Check, System};
use serde_json::{Value, json};
use tier_plan_runtime::tiers::nodes::{Node, nodes_below};
use tier_plan_runtime::units::show_bytes;

const NODES: &str = "sys/devices/system/node";

pub(super) fn checks(system: &System) -> Vec<Check> {
    let nodes = nodes_below(&system.path(NODES)).unwrap_or_default();
    vec![list(system, &nodes), balancing(system, &nodes)]
}

/// Nodes that have processors; memory without any is behind a link.
fn with_processors(nodes: &[Node]) -> usize {
    nodes.iter().filter(|n| !n.processors.is_empty()).count()
}

fn list(system: &System, nodes: &[Node]) -> Check {
    let id = "numa.nodes";
    let each = |n: &Node| {
        json!({
            "node": n.number,
            "hardware_threads": n.processors.len(),
            "total_bytes": n.total_bytes,
            "free_bytes": n.free_bytes,
        })
    };
    let facts = |check: Check| {
        let list: Vec<Value> = nodes.iter().map(each).collect();
        check.fact("nodes", list)
    };
    match nodes {
        [] => facts(Check::ok(id, "unknown: the system lists no nodes")),
        [one] => facts(Check::ok(
            id,
            format!("one node with {} hardware threads", one.processors.len()),
        )),
        _ => {
            let parts: Vec<String> = nodes
                .iter()
                .map(|n| {
                    format!(
                        "node {} with {} hardware threads and {} free of {}",
                        n.number,
                        n.processors.len(),
                        show_bytes(n.free_bytes),
                        show_bytes(n.total_bytes)
                    )
                })
                .collect();
            let check = facts(Check::ok(id, parts.join(", ")));
            if with_processors(nodes) < 2 {
                return check;
            }
            check
                .warning(distance(system, nodes))
                .mend("tier-plan run MODEL --numa shard; or `tier-plan probe --numa-tiers` and a plan for its tiers")
        }
    }
}

/// Says how far a node's memory is from the processors of another one.
fn distance(system: &System, nodes: &[Node]) -> String {
    let first = nodes.first().map_or(0, |n| n.number);
    let row = system.text(&format!("{NODES}/node{first}/distance"));
    let row: Vec<u64> = row
        .unwrap_or_default()
        .split_whitespace()
        .filter_map(|distance| distance.parse().ok())
        .collect();
    match (row.iter().min(), row.iter().max()) {
        (Some(near), Some(far)) if near < far => format!(
            "weights may all lie on one node, and its rate is then that of all threads; reads of another node have the \
             distance {far}, of the own {near}"
        ),
        _ => {
            "weights may all lie on one node, and its rate is then that of all threads".to_string()
        }
    }
}

fn balancing(system: &System, nodes: &[Node]) -> Check {
    let id = "numa.balancing";
    let Some(setting) = system.number("proc/sys/kernel/numa_balancing") else {
        return Check::ok(id, "none");
    };
    let words = match setting {
        0 => "off",
        _ => "on",
    };
    let check = Check::ok(id, words).fact("setting", setting);
    if setting == 0 || nodes.len() < 2 {
        return check;
    }
    check
        .warning(format!(
            "kernel.numa_balancing is {setting}: the system unmaps and moves weights while threads of {} nodes read them",
            nodes.len()
        ))
        .mend("sudo sysctl kernel.numa_balancing=0")
}
