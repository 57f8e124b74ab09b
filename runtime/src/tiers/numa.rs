//! NUMA policy of this process: on which nodes its memory is placed, and on which processors it
//! runs.
//!
//! Linux's `mbind`, `set_mempolicy`, and `sched_setaffinity` are called directly, since `libc`
//! wraps only the last of them.

use super::nodes::computing_below;
use std::fmt;
use std::fs;
use std::path::Path;
use std::str::FromStr;
use thiserror::Error;
use tier_plan_kernels::threads::pin_thread_to_cpus;

/// Nodes in a mask; Linux supports at most 1024.
const MAX_NODES: u32 = 1024;

/// Most nodes that can be emulated.
const MAX_EMULATED_NODES: u32 = 64;

/// Memory placement on a machine with several NUMA nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NumaPolicy {
    /// Pages are interleaved over all nodes, so that reads use the bandwidth of all of them.
    Interleave,
    /// Weights are striped over all nodes, and each node's threads read their own stripes; see
    /// [`Shards`](super::shards::Shards).
    Shard,
    /// Threads and addresses are divided as [`Shard`](Self::Shard) does for so many nodes, on a
    /// machine that need not have them: for tests.
    EmulatedShards(u32),
    /// Memory and threads stay on the node with this number.
    Node(u32),
}

/// A NUMA placement that failed.
#[derive(Debug, Error)]
pub enum NumaError {
    /// The text names no policy.
    #[error(
        "unknown NUMA policy '{0}': expected `interleave`, `shard`, `shard:N` for N emulated nodes, or the number of a node"
    )]
    Unknown(String),
    /// The policy names a node that the machine does not have.
    #[error("this machine has no NUMA node {node}: expected one of {nodes}, or `interleave`")]
    NoNode {
        /// Number of the missing node.
        node: u32,
        /// Numbers of the nodes that exist.
        nodes: String,
    },
    /// A tier names a node that the machine does not have.
    #[error("this machine has no NUMA node {node}, only {nodes}; the plan is for another machine")]
    Missing {
        /// Number of the missing node.
        node: u32,
        /// Numbers of the nodes that exist.
        nodes: String,
    },
    /// A node has too little free memory for its tier.
    #[error("NUMA node {node} has {free} free, {wanted} wanted; its tier needs a smaller budget")]
    NodeFull {
        /// Number of the node.
        node: u32,
        /// Bytes that the tier takes, formatted.
        wanted: String,
        /// Bytes that are free, formatted.
        free: String,
    },
    /// The system lists no NUMA nodes.
    #[error("this system does not list its NUMA nodes, so memory can't be placed on one")]
    Unavailable,
    /// A system call failed.
    #[error(
        "placing memory ({policy}) failed: {source}; leave out the NUMA policy, or the tier's `node`"
    )]
    Refused {
        /// The requested placement, formatted.
        policy: String,
        /// The system's error; part of the message, so no source of its own.
        r#source: std::io::Error,
    },
}

impl fmt::Display for NumaPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NumaPolicy::Interleave => f.write_str("interleave"),
            NumaPolicy::Shard => f.write_str("shard"),
            NumaPolicy::EmulatedShards(nodes) => write!(f, "shard:{nodes}"),
            NumaPolicy::Node(node) => write!(f, "{node}"),
        }
    }
}

impl FromStr for NumaPolicy {
    type Err = NumaError;

    fn from_str(text: &str) -> Result<Self, NumaError> {
        let unknown = || NumaError::Unknown(text.to_string());
        match text.trim() {
            "interleave" => Ok(NumaPolicy::Interleave),
            "shard" => Ok(NumaPolicy::Shard),
            other => match other.strip_prefix("shard:") {
                Some(nodes) => match nodes.parse() {
                    Ok(n @ 2..=MAX_EMULATED_NODES) => Ok(NumaPolicy::EmulatedShards(n)),
                    _ => Err(unknown()),
                },
                None => other.parse().map(NumaPolicy::Node).map_err(|_| unknown()),
            },
        }
    }
}

impl NumaPolicy {
    /// Makes this the policy for all memory that the process touches from now on.
    /// [`Node`](Self::Node) also pins this thread, and those it starts later, to the node's
    /// processors.
    ///
    /// Must be called before anything large is allocated or any thread is started.
    ///
    /// # Errors
    /// When the node does not exist, or the system refuses.
    pub fn apply(self) -> Result<(), NumaError> {
        self.apply_below(Path::new("/sys/devices/system/node"))
    }

    /// [`apply`](Self::apply) with the nodes that are listed below `root`.
    fn apply_below(self, root: &Path) -> Result<(), NumaError> {
        if let NumaPolicy::EmulatedShards(_) = self {
            return Ok(());
        }
        let read = |name: &str| fs::read_to_string(root.join(name)).ok();
        let online = read("online")
            .and_then(|text| parse_list(&text))
            .ok_or(NumaError::Unavailable)?;
        let nodes = match self {
            NumaPolicy::Interleave | NumaPolicy::EmulatedShards(_) => online,
            // Stripes go round exactly the nodes whose threads read them.
            NumaPolicy::Shard => computing_below(root)?.iter().map(|n| n.number).collect(),
            NumaPolicy::Node(node) if online.contains(&node) => vec![node],
            NumaPolicy::Node(node) => {
                let nodes: Vec<String> = online.iter().map(u32::to_string).collect();
                return Err(NumaError::NoNode {
                    node,
                    nodes: nodes.join(", "),
                });
            }
        };
        let refused = |r#source| NumaError::Refused {
            policy: self.to_string(),
            r#source,
        };
        set_policy(self, &nodes).map_err(refused)?;
        if let NumaPolicy::Node(node) = self {
            let processors =
                read(&format!("node{node}/cpulist")).and_then(|text| parse_list(&text));
            pin_thread_to_cpus(&processors.ok_or(NumaError::Unavailable)?).map_err(refused)?;
        }
        Ok(())
    }
}

/// Parses a list like `0-3,8`. Returns `None` when the text is no such list, or a number is too
/// large.
pub(super) fn parse_list(text: &str) -> Option<Vec<u32>> {
    let mut numbers = Vec::new();
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        if last >= MAX_NODES.max(1 << 16) {
            return None;
        }
        numbers.extend(first..=last);
    }
    Some(numbers)
}

/// Linux's mode of pages that are on the given nodes only.
#[cfg(target_os = "linux")]
pub(super) const MPOL_BIND: libc::c_long = 2;

/// Linux's mode of pages that are interleaved over the given nodes.
#[cfg(target_os = "linux")]
const MPOL_INTERLEAVE: libc::c_long = 3;

/// Returns a set of nodes as the bit mask that Linux takes.
#[cfg(target_os = "linux")]
fn mask(nodes: &[u32]) -> [libc::c_ulong; (MAX_NODES / libc::c_ulong::BITS) as usize] {
    const BITS: u32 = libc::c_ulong::BITS;
    let mut mask = [0; (MAX_NODES / BITS) as usize];
    for node in nodes.iter().filter(|node| **node < MAX_NODES) {
        mask[(node / BITS) as usize] |= 1 << (node % BITS);
    }
    mask
}

/// Binds the whole pages within `len` bytes from `start` to these nodes, or interleaves them, and
/// moves those that are elsewhere.
///
/// # Safety
/// The bytes must be memory of this process.
#[cfg(target_os = "linux")]
pub(super) unsafe fn bind(
    start: *const u8,
    len: usize,
    nodes: &[u32],
    interleaved: bool,
) -> std::io::Result<()> {
    const MPOL_MF_MOVE: libc::c_uint = 2;
    // SAFETY: the call takes no memory and only returns a number.
    let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096);
    let first = start.addr().next_multiple_of(page);
    let end = start.addr().saturating_add(len) / page * page;
    if end <= first {
        return Ok(());
    }
    let mode = if interleaved {
        MPOL_INTERLEAVE
    } else {
        MPOL_BIND
    };
    let mask = mask(nodes);
    // SAFETY: the pages lie within memory of this process. The system reads `maxnode - 1` bits of
    // the mask, which is its length.
    let rc = unsafe {
        libc::syscall(
            libc::SYS_mbind,
            start.with_addr(first),
            end - first,
            mode,
            mask.as_ptr(),
            libc::c_ulong::from(MAX_NODES) + 1,
            MPOL_MF_MOVE,
        )
    };
    if rc == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error())
    }
}

/// Fails: pages can be bound on Linux only.
///
/// # Safety
/// Always safe to call; unsafe only to match the Linux version.
#[cfg(not(target_os = "linux"))]
pub(super) unsafe fn bind(_: *const u8, _: usize, _: &[u32], _: bool) -> std::io::Result<()> {
    Err(std::io::ErrorKind::Unsupported.into())
}

/// Returns the node that each page is on; `None` for one that has no memory yet. Nothing is read
/// from the addresses.
///
/// # Errors
/// When the system refuses.
#[cfg(target_os = "linux")]
pub(super) fn node_of_pages(pages: &[usize]) -> std::io::Result<Vec<Option<u32>>> {
    let mut nodes: Vec<libc::c_int> = vec![-1; pages.len()];
    // SAFETY: both arrays have `pages.len()` elements and outlive the call. Without target nodes
    // nothing is moved, and addresses that are no memory of this process only give an error code.
    let rc = unsafe {
        libc::syscall(
            libc::SYS_move_pages,
            0 as libc::c_int,
            pages.len() as libc::c_ulong,
            pages.as_ptr(),
            std::ptr::null::<libc::c_int>(),
            nodes.as_mut_ptr(),
            0 as libc::c_int,
        )
    };
    if rc < 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(nodes
        .into_iter()
        .map(|node| u32::try_from(node).ok())
        .collect())
}

/// Fails: the node of a page is known on Linux only.
#[cfg(not(target_os = "linux"))]
pub(super) fn node_of_pages(_: &[usize]) -> std::io::Result<Vec<Option<u32>>> {
    Err(std::io::ErrorKind::Unsupported.into())
}

/// Returns the node that a byte's page is on, and the policy mode of its mapping.
#[cfg(all(test, target_os = "linux"))]
pub(super) fn node_of_page(byte: &u8) -> std::io::Result<(u32, libc::c_long)> {
    const MPOL_F_NODE: libc::c_ulong = 1;
    const MPOL_F_ADDR: libc::c_ulong = 2;
    let query = |flags: libc::c_ulong| {
        let mut answer: libc::c_int = -1;
        let none = std::ptr::null_mut::<libc::c_ulong>();
        // SAFETY: the number outlives the call, no mask is given, and the byte is borrowed.
        let rc = unsafe {
            libc::syscall(
                libc::SYS_get_mempolicy,
                &raw mut answer,
                none,
                0 as libc::c_ulong,
                &raw const *byte,
                flags,
            )
        };
        if rc == 0 {
            Ok(answer)
        } else {
            Err(std::io::Error::last_os_error())
        }
    };
    Ok((
        query(MPOL_F_NODE | MPOL_F_ADDR)? as u32,
        libc::c_long::from(query(MPOL_F_ADDR)?),
    ))
}

/// Sets the memory policy of this thread and those it starts later.
#[cfg(target_os = "linux")]
fn set_policy(policy: NumaPolicy, nodes: &[u32]) -> std::io::Result<()> {
    let mode = if let NumaPolicy::Node(_) = policy {
        MPOL_BIND
    } else {
        MPOL_INTERLEAVE
    };
    let mask = mask(nodes);
    // SAFETY: the system reads `maxnode - 1` bits of the mask, which is its length.
    let rc = unsafe {
        libc::syscall(
            libc::SYS_set_mempolicy,
            mode,
            mask.as_ptr(),
            libc::c_ulong::from(MAX_NODES) + 1,
        )
    };
    if rc == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error())
    }
}

#[cfg(not(target_os = "linux"))]
fn set_policy(_: NumaPolicy, _: &[u32]) -> std::io::Result<()> {
    Err(std::io::ErrorKind::Unsupported.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_lists_are_parsed() {
        assert_eq!(parse_list("0-1,4\n"), Some(vec![0, 1, 4]));
        assert_eq!(parse_list("7"), Some(vec![7]));
        for wrong in ["", "a", "1-", "0-4000000000"] {
            assert_eq!(parse_list(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn policies_have_names() {
        assert_eq!(
            "interleave".parse::<NumaPolicy>().unwrap(),
            NumaPolicy::Interleave
        );
        for policy in [
            NumaPolicy::Node(3),
            NumaPolicy::Shard,
            NumaPolicy::EmulatedShards(2),
        ] {
            assert_eq!(policy.to_string().parse::<NumaPolicy>().unwrap(), policy);
        }
        for wrong in ["shard:", "shard:1", "shard:65", "shards"] {
            assert!(wrong.parse::<NumaPolicy>().is_err(), "{wrong}");
        }
        assert!(
            "everywhere"
                .parse::<NumaPolicy>()
                .unwrap_err()
                .to_string()
                .contains("'everywhere'")
        );
    }

    #[test]
    fn a_node_that_is_not_there_is_named_with_those_that_are() {
        let root = tempfile::tempdir().unwrap();
        assert!(matches!(
            NumaPolicy::Interleave.apply_below(root.path()),
            Err(NumaError::Unavailable)
        ));
        fs::write(root.path().join("online"), "0-1\n").unwrap();
        let error = NumaPolicy::Node(2)
            .apply_below(root.path())
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("node 2") && error.contains("0, 1"),
            "{error}"
        );
    }
}
