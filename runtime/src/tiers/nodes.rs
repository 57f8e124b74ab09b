//! NUMA nodes: what the system reports of them, and the placement of pages on them.

use super::meminfo::bytes_of;
use super::numa::{self, NumaError};
use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::Path;
use tier_plan_formats::machine::Tier;
use tier_plan_formats::units::show_bytes;
use tier_plan_kernels::shards::STRIPE_BYTES;

/// Folder in which Linux lists its NUMA nodes.
const ROOT: &str = "/sys/devices/system/node";

/// A NUMA node of this machine.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Node {
    /// Number of the node, as in `/sys/devices/system/node/node0`.
    pub number: u32,
    /// Memory of the node, in bytes.
    pub total_bytes: u64,
    /// Bytes that are free, or hold only page cache and reclaimable kernel memory.
    pub free_bytes: u64,
    /// Processors local to the node; none for memory behind a CXL link, for instance.
    pub processors: Vec<u32>,
}

/// Returns the NUMA nodes of this machine that have memory, ascending.
///
/// # Errors
/// [`NumaError::Unavailable`] when the system lists no nodes.
pub fn nodes() -> Result<Vec<Node>, NumaError> {
    nodes_below(Path::new(ROOT))
}

/// Returns the nodes like [`nodes`], from a folder that stands for `/sys/devices/system/node`.
///
/// # Errors
/// [`NumaError::Unavailable`] when the folder lists no nodes.
pub fn nodes_below(root: &Path) -> Result<Vec<Node>, NumaError> {
    let read = |name: &str| fs::read_to_string(root.join(name)).ok();
    let with_memory = read("has_memory")
        .or_else(|| read("online"))
        .and_then(|text| numa::parse_list(&text));
    let mut nodes = Vec::new();
    for number in with_memory.ok_or(NumaError::Unavailable)? {
        let meminfo = read(&format!("node{number}/meminfo")).ok_or(NumaError::Unavailable)?;
        let of = |name: &str| bytes_of(&meminfo, name).unwrap_or(0);
        let total_bytes = bytes_of(&meminfo, "MemTotal").ok_or(NumaError::Unavailable)?;
        // `FilePages` includes shared memory, which can't be dropped.
        let page_cache = of("FilePages").saturating_sub(of("Shmem"));
        let reclaimable = page_cache.saturating_add(of("SReclaimable"));
        let free_bytes = of("MemFree").saturating_add(reclaimable).min(total_bytes);
        // A node without processors has an empty list.
        let processors = read(&format!("node{number}/cpulist"))
            .and_then(|text| numa::parse_list(&text))
            .unwrap_or_default();
        if total_bytes > 0 {
            nodes.push(Node {
                number,
                total_bytes,
                free_bytes,
                processors,
            });
        }
    }
    nodes.sort_by_key(|node| node.number);
    Ok(nodes)
}

/// Returns the nodes that have memory and processors: memory behind a CXL link has no threads that
/// could read it as their own.
///
/// # Errors
/// [`NumaError::Unavailable`] when the system lists no nodes.
pub(super) fn computing() -> Result<Vec<Node>, NumaError> {
    computing_below(Path::new(ROOT))
}

/// [`computing`] with the nodes that are listed below `root`.
pub(super) fn computing_below(root: &Path) -> Result<Vec<Node>, NumaError> {
    let mut nodes = nodes_below(root)?;
    nodes.retain(|node| !node.processors.is_empty());
    Ok(nodes)
}

/// Returns the NUMA node that a tier's memory must be on, if any. An emulated tier stands for
/// memory of another machine, so its pages may be anywhere.
pub fn node_of(tier: &Tier) -> Option<u32> {
    tier.node().filter(|_| !tier.emulated)
}

/// Checks that every node that `tiers` name exists and has the bytes that are wanted of it free.
///
/// # Errors
/// When a node is missing or too full, or the system lists no nodes.
pub fn check<'a>(tiers: impl Iterator<Item = (&'a Tier, u64)>) -> Result<(), NumaError> {
    check_below(Path::new(ROOT), tiers)
}

/// [`check`] with the nodes that are listed below `root`.
fn check_below<'a>(
    root: &Path,
    tiers: impl Iterator<Item = (&'a Tier, u64)>,
) -> Result<(), NumaError> {
    let wanted: BTreeMap<u32, u64> = tiers
        .filter_map(|(tier, bytes)| Some((node_of(tier)?, bytes)))
        .collect();
    if wanted.is_empty() {
        return Ok(());
    }
    let nodes = nodes_below(root)?;
    for (node, wanted) in wanted {
        let Some(present) = nodes.iter().find(|n| n.number == node) else {
            let nodes = nodes
                .iter()
                .map(|n| n.number.to_string())
                .collect::<Vec<_>>()
                .join(", ");
            return Err(NumaError::Missing { node, nodes });
        };
        if wanted > present.free_bytes {
            let (wanted, free) = (show_bytes(wanted), show_bytes(present.free_bytes));
            return Err(NumaError::NodeFull { node, wanted, free });
        }
    }
    Ok(())
}

/// On which NUMA nodes pages are placed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Pages {
    /// Where the system puts them, or the process's [policy](super::numa::NumaPolicy) says.
    Anywhere,
    /// All on the node with this number.
    Node(u32),
    /// Interleaved over several nodes.
    Interleaved(Vec<u32>),
}

impl fmt::Display for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Pages::Anywhere => f.write_str("anywhere"),
            Pages::Node(node) => write!(f, "node {node}"),
            Pages::Interleaved(_) => f.write_str("interleaved over several nodes"),
        }
    }
}

impl Pages {
    /// Returns the placement of a tier's pages.
    pub fn of_tier(tier: &Tier) -> Self {
        node_of(tier).map_or(Pages::Anywhere, Pages::Node)
    }

    /// Binds the whole pages within `len` bytes from `start` to these nodes, and moves those that
    /// are elsewhere.
    ///
    /// # Errors
    /// When the system refuses.
    ///
    /// # Safety
    /// The bytes must be memory of this process.
    pub(crate) unsafe fn bind(&self, start: *const u8, len: usize) -> std::io::Result<()> {
        let nodes = match self {
            Pages::Anywhere => return Ok(()),
            Pages::Node(node) => std::slice::from_ref(node),
            Pages::Interleaved(nodes) => nodes.as_slice(),
        };
        let is_interleaved = matches!(self, Pages::Interleaved(_));
        let (start, len) = if is_interleaved {
            whole_stripes(start, len)
        } else {
            (start, len)
        };
        // SAFETY: the caller's promise.
        unsafe { numa::bind(start, len, nodes, is_interleaved) }
    }

    /// Moves the whole pages within `values` to these nodes. Partly covered pages stay where they
    /// are.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn move_here<T>(&self, values: &[T]) -> std::io::Result<()> {
        // SAFETY: the values are borrowed, and moving their pages does not change them.
        unsafe { self.bind(values.as_ptr().cast(), size_of_val(values)) }
    }
}

/// Returns the whole stripes within `len` bytes from `start`. Linux counts interleaved huge pages
/// from where a policy begins: at a stripe, so that addresses tell the node.
fn whole_stripes(start: *const u8, len: usize) -> (*const u8, usize) {
    let first = start.addr().next_multiple_of(STRIPE_BYTES);
    let end = start.addr().saturating_add(len) / STRIPE_BYTES * STRIPE_BYTES;
    (start.with_addr(first), end.saturating_sub(first))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tiers::arena::{Arena, ArenaError};
    use crate::tiers::system;
    use tier_plan_formats::machine::{Accelerator, TierKind};

    const FILES: [(&str, &str); 7] = [
        ("online", "0-2\n"),
        ("has_memory", "0,2\n"),
        (
            "node0/meminfo",
            "Node 0 MemTotal:       1000 kB\nNode 0 MemFree:          100 kB\nNode 0 FilePages:        300 kB\n\
             Node 0 Shmem:             50 kB\nNode 0 SReclaimable:      10 kB\n",
        ),
        ("node0/cpulist", "0-1,4\n"),
        ("node1/cpulist", "2-3\n"),
        (
            "node2/meminfo",
            "Node 2 MemTotal:  2000 kB\nNode 2 MemFree:   1900 kB\n",
        ),
        ("node2/cpulist", "\n"),
    ];

    fn tier(node: u32, emulated: bool) -> Tier {
        Tier {
            name: format!("dram{node}"),
            kind: TierKind::Dram,
            capacity_bytes: 1 << 20,
            read_gbps: 1.0,
            latency_us: 0.0,
            emulated,
            unit: Some(node),
            accelerator: Accelerator::default(),
            source: String::new(),
        }
    }

    #[test]
    fn nodes_with_memory_are_listed() {
        let root = system(&FILES);
        let expected = [
            Node {
                number: 0,
                total_bytes: 1000 << 10,
                free_bytes: 360 << 10,
                processors: vec![0, 1, 4],
            },
            Node {
                number: 2,
                total_bytes: 2000 << 10,
                free_bytes: 1900 << 10,
                processors: vec![],
            },
        ];
        assert_eq!(nodes_below(root.path()).unwrap(), expected);
        assert_eq!(computing_below(root.path()).unwrap(), expected[..1]);
        for (file, text) in [
            ("has_memory", "0,x"),
            ("node0/meminfo", "Node 0 MemTotal: many kB\n"),
        ] {
            fs::write(root.path().join(file), text).unwrap();
            assert!(
                matches!(nodes_below(root.path()), Err(NumaError::Unavailable)),
                "{file}"
            );
        }
        assert!(matches!(
            nodes_below(Path::new("/nowhere")),
            Err(NumaError::Unavailable)
        ));
    }

    #[test]
    fn tiers_on_nodes_that_are_not_there_or_full_are_refused() {
        let root = system(&FILES);
        let check = |tiers: &[(Tier, u64)]| {
            let found = check_below(root.path(), tiers.iter().map(|(t, bytes)| (t, *bytes)));
            found.map_err(|error| error.to_string())
        };
        assert_eq!(
            check(&[(tier(0, false), 360 << 10), (tier(2, false), 1)]),
            Ok(())
        );
        let error = check(&[(tier(0, false), 1), (tier(1, false), 1)]).unwrap_err();
        assert!(error.contains("no NUMA node 1, only 0, 2"), "{error}");
        assert_eq!(
            check(&[(tier(1, true), 1)]),
            Ok(()),
            "an emulated tier may be anywhere"
        );
        let error = check(&[(tier(0, false), 361 << 10)]).unwrap_err();
        assert!(
            error.contains("NUMA node 0 has 360 KiB free, 361 KiB wanted"),
            "{error}"
        );
        let plain = Tier {
            unit: None,
            ..tier(0, false)
        };
        assert!(check_below(Path::new("/nowhere"), std::iter::once((&plain, 1))).is_ok());
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn pages_are_on_the_node_that_was_asked_for() {
        // Without NUMA nodes there is nothing to test.
        let Some(node) = nodes()
            .ok()
            .and_then(|nodes| nodes.first().map(|n| n.number))
        else {
            return;
        };
        let bytes = 8 << 20;
        let arena = match Arena::on("dram0", bytes, &Pages::Node(node)) {
            // A sandbox may forbid it.
            Err(ArenaError::Node {
                source: NumaError::Refused { .. },
                ..
            }) => return,
            other => other,
        };
        let mut piece = arena.unwrap().take(bytes as usize).unwrap();
        piece.fill(1);
        for at in [0, bytes as usize / 2, bytes as usize - 1] {
            assert_eq!(
                numa::node_of_page(&piece[at]).unwrap(),
                (node, numa::MPOL_BIND),
                "byte {at}"
            );
        }
        let heap = vec![1u8; 4 << 20];
        Pages::Node(node).move_here(&heap).unwrap();
        assert_eq!(
            numa::node_of_page(&heap[2 << 20]).unwrap(),
            (node, numa::MPOL_BIND)
        );
        let error = Arena::on("dram9", bytes, &Pages::Node(1000))
            .map(|_| ())
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("tier 'dram9'") && error.contains("node 1000"),
            "{error}"
        );
    }
}
