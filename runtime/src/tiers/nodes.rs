//! Memory nodes: what the system says of them, and memory whose pages are on one.

use super::numa::{self, NumaError};
use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::Path;
use tier_plan_formats::machine::Tier;
use tier_plan_formats::units::show_bytes;

/// Where the system tells of its nodes.
const ROOT: &str = "/sys/devices/system/node";

/// A memory node of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Its number.
    pub number: u32,
    /// All of its memory, in bytes.
    pub total_bytes: u64,
    /// Bytes that nobody has, or that only hold copies of files.
    pub free_bytes: u64,
    /// Processors next to it; none next to memory behind a CXL link, for instance.
    pub processors: Vec<u32>,
}

/// The nodes of this machine that have memory, ascending.
///
/// # Errors
/// When the system does not tell.
pub fn nodes() -> Result<Vec<Node>, NumaError> {
    nodes_below(Path::new(ROOT))
}

fn nodes_below(root: &Path) -> Result<Vec<Node>, NumaError> {
    let read = |name: &str| fs::read_to_string(root.join(name)).ok();
    let with_memory = read("has_memory").or_else(|| read("online")).and_then(|text| numa::list(&text));
    let mut found = Vec::new();
    for number in with_memory.ok_or(NumaError::NotSaid)? {
        let meminfo = read(&format!("node{number}/meminfo")).ok_or(NumaError::NotSaid)?;
        let of = |name: &str| kilobytes(&meminfo, name).unwrap_or(0);
        let total_bytes = kilobytes(&meminfo, "MemTotal").ok_or(NumaError::NotSaid)?;
        // Shared memory is among the pages of files, and can't be dropped.
        let copies = of("FilePages").saturating_sub(of("Shmem")).saturating_add(of("SReclaimable"));
        let free_bytes = of("MemFree").saturating_add(copies).min(total_bytes);
        // A node without processors has an empty list.
        let processors = read(&format!("node{number}/cpulist")).and_then(|text| numa::list(&text)).unwrap_or_default();
        if total_bytes > 0 {
            found.push(Node { number, total_bytes, free_bytes, processors });
        }
    }
    found.sort_by_key(|node| node.number);
    Ok(found)
}

/// The value of a line `Node 0 name:   123 kB`, in bytes.
fn kilobytes(meminfo: &str, name: &str) -> Option<u64> {
    let value = meminfo.lines().find_map(|line| {
        let mut words = line.split_whitespace().skip(2);
        (words.next()?.strip_suffix(':')? == name).then(|| words.next())?
    });
    value?.parse::<u64>().ok()?.checked_mul(1024)
}

/// The node that a tier's memory must be on. One that is emulated stands for memory of another machine, and may be
/// anywhere.
pub fn node_of(tier: &Tier) -> Option<u32> {
    tier.node().filter(|_| !tier.emulated)
}

/// Refuses tiers on nodes that this machine has not got, or that have not got the bytes wanted of them.
///
/// # Errors
/// When that is so, or the system does not tell of nodes.
pub fn check<'a>(tiers: impl Iterator<Item = (&'a Tier, u64)>) -> Result<(), NumaError> {
    check_below(Path::new(ROOT), tiers)
}

fn check_below<'a>(root: &Path, tiers: impl Iterator<Item = (&'a Tier, u64)>) -> Result<(), NumaError> {
    let wanted: BTreeMap<u32, u64> = tiers.filter_map(|(tier, bytes)| Some((node_of(tier)?, bytes))).collect();
    if wanted.is_empty() {
        return Ok(());
    }
    let nodes = nodes_below(root)?;
    for (node, wanted) in wanted {
        let Some(found) = nodes.iter().find(|n| n.number == node) else {
            let nodes = nodes.iter().map(|n| n.number.to_string()).collect::<Vec<_>>().join(", ");
            return Err(NumaError::Missing { node, nodes });
        };
        if wanted > found.free_bytes {
            let (wanted, free) = (show_bytes(wanted), show_bytes(found.free_bytes));
            return Err(NumaError::NoRoom { node, wanted, free });
        }
    }
    Ok(())
}

/// Where pages go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Pages {
    /// Where the system puts them, or the process's [policy](super::numa::NumaPolicy).
    Anywhere,
    /// All on one node.
    Node(u32),
    /// On several nodes in turn.
    InTurn(Vec<u32>),
}

impl fmt::Display for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Pages::Anywhere => f.write_str("anywhere"),
            Pages::Node(node) => write!(f, "node {node}"),
            Pages::InTurn(_) => f.write_str("several nodes in turn"),
        }
    }
}

impl Pages {
    /// Those of a tier.
    pub fn of_tier(tier: &Tier) -> Self {
        node_of(tier).map_or(Pages::Anywhere, Pages::Node)
    }

    /// Has the whole pages among `len` bytes from `start` put there, those that are somewhere already too.
    ///
    /// # Errors
    /// When the system refuses.
    ///
    /// # Safety
    /// The bytes are memory of this process.
    pub(crate) unsafe fn bind(&self, start: *const u8, len: usize) -> std::io::Result<()> {
        let nodes = match self {
            Pages::Anywhere => return Ok(()),
            Pages::Node(node) => std::slice::from_ref(node),
            Pages::InTurn(nodes) => nodes.as_slice(),
        };
        // SAFETY: the caller's promise.
        unsafe { numa::bind(start, len, nodes, matches!(self, Pages::InTurn(_))) }
    }

    /// The same for values that are there already; what shares a page with others stays where it is.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn move_here<T>(&self, values: &[T]) -> std::io::Result<()> {
        // SAFETY: the values are borrowed, and where their pages are changes nothing about them.
        unsafe { self.bind(values.as_ptr().cast(), size_of_val(values)) }
    }
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
        ("node2/meminfo", "Node 2 MemTotal:  2000 kB\nNode 2 MemFree:   1900 kB\n"),
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
            Node { number: 0, total_bytes: 1000 << 10, free_bytes: 360 << 10, processors: vec![0, 1, 4] },
            Node { number: 2, total_bytes: 2000 << 10, free_bytes: 1900 << 10, processors: vec![] },
        ];
        assert_eq!(nodes_below(root.path()).unwrap(), expected);
        for (file, text) in [("has_memory", "0,x"), ("node0/meminfo", "Node 0 MemTotal: many kB\n")] {
            fs::write(root.path().join(file), text).unwrap();
            assert!(matches!(nodes_below(root.path()), Err(NumaError::NotSaid)), "{file}");
        }
        assert!(matches!(nodes_below(Path::new("/nowhere")), Err(NumaError::NotSaid)));
    }

    #[test]
    fn tiers_on_nodes_that_are_not_there_or_full_are_refused() {
        let root = system(&FILES);
        let check = |tiers: &[(Tier, u64)]| {
            let found = check_below(root.path(), tiers.iter().map(|(t, bytes)| (t, *bytes)));
            found.map_err(|error| error.to_string())
        };
        assert_eq!(check(&[(tier(0, false), 360 << 10), (tier(2, false), 1)]), Ok(()));
        let error = check(&[(tier(0, false), 1), (tier(1, false), 1)]).unwrap_err();
        assert!(error.contains("no memory node 1, only 0, 2"), "{error}");
        assert_eq!(check(&[(tier(1, true), 1)]), Ok(()), "what is emulated may be anywhere");
        let error = check(&[(tier(0, false), 361 << 10)]).unwrap_err();
        assert!(error.contains("memory node 0 has 360 KiB free, and 361 KiB are wanted"), "{error}");
        let plain = Tier { unit: None, ..tier(0, false) };
        assert!(check_below(Path::new("/nowhere"), std::iter::once((&plain, 1))).is_ok());
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn pages_are_on_the_node_that_was_asked_for() {
        // Where the system has no nodes there is nothing to ask for.
        let Some(node) = nodes().ok().and_then(|nodes| nodes.first().map(|n| n.number)) else { return };
        let bytes = 8 << 20;
        let arena = match Arena::on("dram0", bytes, &Pages::Node(node)) {
            // A sandbox may forbid it.
            Err(ArenaError::Node { source: NumaError::Refused { .. }, .. }) => return,
            other => other,
        };
        let mut piece = arena.unwrap().take(bytes as usize).unwrap();
        piece.fill(1);
        for at in [0, bytes as usize / 2, bytes as usize - 1] {
            assert_eq!(numa::node_of_page(&piece[at]).unwrap(), (node, numa::BOUND), "byte {at}");
        }
        let heap = vec![1u8; 4 << 20];
        Pages::Node(node).move_here(&heap).unwrap();
        assert_eq!(numa::node_of_page(&heap[2 << 20]).unwrap(), (node, numa::BOUND));
        let error = Arena::on("dram9", bytes, &Pages::Node(1000)).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("tier 'dram9'") && error.contains("node 1000"), "{error}");
    }
}
