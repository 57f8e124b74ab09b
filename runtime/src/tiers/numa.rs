//! Machines with several memory nodes: where this process's memory goes, and which processors compute.

use std::fmt;
use std::fs;
use std::path::Path;
use std::str::FromStr;
use thiserror::Error;

/// The most nodes that a mask has room for.
const MOST_NODES: u32 = 1024;

/// What to do about several memory nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NumaPolicy {
    /// Pages go to all nodes in turn, so that all of their bandwidth serves every read.
    Interleave,
    /// Memory and threads stay on one node.
    Node(u32),
}

/// Why a policy can't be had.
#[derive(Debug, Error)]
pub enum NumaError {
    /// Not a policy.
    #[error("'{0}' is no policy for memory nodes: use `interleave`, or the number of a node")]
    Unknown(String),
    /// No such node.
    #[error("this machine has no memory node {node}: use one of {nodes}, or `interleave`")]
    NoNode {
        /// What was asked for.
        node: u32,
        /// What there is.
        nodes: String,
    },
    /// No such node for a tier.
    #[error(
        "this machine has no memory node {node}, only {nodes}; plan for this machine's own file, which `tier-plan probe \
         --numa-tiers` writes"
    )]
    Missing {
        /// What was asked for.
        node: u32,
        /// What there is.
        nodes: String,
    },
    /// A node that is too full for a tier.
    #[error(
        "memory node {node} has {free} free, and {wanted} are wanted of it; solve with a smaller budget for its tier"
    )]
    NoRoom {
        /// The node.
        node: u32,
        /// Bytes, in words.
        wanted: String,
        /// Bytes, in words.
        free: String,
    },
    /// The system does not tell of nodes.
    #[error("this system does not say which memory nodes it has; ask for none")]
    NotSaid,
    /// The system refused.
    #[error("the system refused to place memory ({policy}): {source}; leave the option, or the tier's `node`, out")]
    Refused {
        /// What was asked for, in words.
        policy: String,
        /// What it said; part of the message, so no source of its own.
        r#source: std::io::Error,
    },
}

impl fmt::Display for NumaPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NumaPolicy::Interleave => f.write_str("interleave"),
            NumaPolicy::Node(node) => write!(f, "{node}"),
        }
    }
}

impl FromStr for NumaPolicy {
    type Err = NumaError;

    fn from_str(text: &str) -> Result<Self, NumaError> {
        match text.trim() {
            "interleave" => Ok(NumaPolicy::Interleave),
            number => number.parse().map(NumaPolicy::Node).map_err(|_| NumaError::Unknown(text.to_string())),
        }
    }
}

impl NumaPolicy {
    /// Makes this the policy for all memory that the process touches from now on; for a node, also keeps this thread, and
    /// those it starts, on the node's processors. To be called before anything large is allocated or any thread started.
    ///
    /// # Errors
    /// When there is no such node, or the system refuses.
    pub fn apply(self) -> Result<(), NumaError> {
        self.apply_below(Path::new("/sys/devices/system/node"))
    }

    fn apply_below(self, root: &Path) -> Result<(), NumaError> {
        let read = |name: &str| fs::read_to_string(root.join(name)).ok();
        let online = read("online").and_then(|text| list(&text)).ok_or(NumaError::NotSaid)?;
        let nodes = match self {
            NumaPolicy::Interleave => online,
            NumaPolicy::Node(node) if online.contains(&node) => vec![node],
            NumaPolicy::Node(node) => {
                let nodes: Vec<String> = online.iter().map(u32::to_string).collect();
                return Err(NumaError::NoNode { node, nodes: nodes.join(", ") });
            }
        };
        let refused = |r#source| NumaError::Refused { policy: self.to_string(), r#source };
        set_policy(self, &nodes).map_err(refused)?;
        if let NumaPolicy::Node(node) = self {
            let processors = read(&format!("node{node}/cpulist")).and_then(|text| list(&text));
            set_processors(&processors.ok_or(NumaError::NotSaid)?).map_err(refused)?;
        }
        Ok(())
    }
}

/// The numbers of a list like `0-3,8`; `None` where it is none, or a number is too large.
pub(super) fn list(text: &str) -> Option<Vec<u32>> {
    let mut numbers = Vec::new();
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        if last >= MOST_NODES.max(1 << 16) {
            return None;
        }
        numbers.extend(first..=last);
    }
    Some(numbers)
}

/// Pages on the given nodes only.
#[cfg(target_os = "linux")]
pub(super) const BOUND: libc::c_long = 2;

/// Pages on the given nodes in turn.
#[cfg(target_os = "linux")]
const IN_TURN: libc::c_long = 3;

/// A set of nodes as the system takes it.
#[cfg(target_os = "linux")]
fn mask(nodes: &[u32]) -> [libc::c_ulong; (MOST_NODES / libc::c_ulong::BITS) as usize] {
    const BITS: u32 = libc::c_ulong::BITS;
    let mut mask = [0; (MOST_NODES / BITS) as usize];
    for node in nodes.iter().filter(|node| **node < MOST_NODES) {
        mask[(node / BITS) as usize] |= 1 << (node % BITS);
    }
    mask
}

/// Keeps this thread, and those it starts, on the processors given.
///
/// # Errors
/// When the system refuses.
pub fn stay_on(processors: &[u32]) -> std::io::Result<()> {
    set_processors(processors)
}

/// Has the whole pages among `len` bytes from `start` be on these nodes, also those that are elsewhere now.
///
/// # Safety
/// The bytes are memory of this process.
#[cfg(target_os = "linux")]
pub(super) unsafe fn bind(start: *const u8, len: usize, nodes: &[u32], in_turn: bool) -> std::io::Result<()> {
    const MOVE: libc::c_uint = 2;
    // SAFETY: the call only asks for a number.
    let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096);
    let first = start.addr().next_multiple_of(page);
    let end = start.addr().saturating_add(len) / page * page;
    if end <= first {
        return Ok(());
    }
    let mode = if in_turn { IN_TURN } else { BOUND };
    let mask = mask(nodes);
    // SAFETY: the pages lie within memory of this process; the system reads at most the mask's bits, and counts one more
    // than it reads.
    let rc = unsafe {
        libc::syscall(
            libc::SYS_mbind,
            start.with_addr(first),
            end - first,
            mode,
            mask.as_ptr(),
            libc::c_ulong::from(MOST_NODES) + 1,
            MOVE,
        )
    };
    if rc == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// See above.
///
/// # Safety
/// None is needed.
#[cfg(not(target_os = "linux"))]
pub(super) unsafe fn bind(_: *const u8, _: usize, _: &[u32], _: bool) -> std::io::Result<()> {
    Err(std::io::ErrorKind::Unsupported.into())
}

/// The node that a byte's page is on, and the policy of its surroundings.
#[cfg(all(test, target_os = "linux"))]
pub(super) fn node_of_page(byte: &u8) -> std::io::Result<(u32, libc::c_long)> {
    const NODE: libc::c_ulong = 1;
    const ADDRESS: libc::c_ulong = 2;
    let ask = |flags: libc::c_ulong| {
        let mut answer: libc::c_int = -1;
        let none = std::ptr::null_mut::<libc::c_ulong>();
        // SAFETY: the number outlives the call, no mask is given, and the byte is borrowed.
        let rc = unsafe {
            libc::syscall(libc::SYS_get_mempolicy, &raw mut answer, none, 0 as libc::c_ulong, &raw const *byte, flags)
        };
        if rc == 0 { Ok(answer) } else { Err(std::io::Error::last_os_error()) }
    };
    Ok((ask(NODE | ADDRESS)? as u32, libc::c_long::from(ask(ADDRESS)?)))
}

#[cfg(target_os = "linux")]
fn set_policy(policy: NumaPolicy, nodes: &[u32]) -> std::io::Result<()> {
    let mode = if policy == NumaPolicy::Interleave { IN_TURN } else { BOUND };
    let mask = mask(nodes);
    // SAFETY: the system reads at most the mask's bits; it counts one bit more than it reads.
    let rc =
        unsafe { libc::syscall(libc::SYS_set_mempolicy, mode, mask.as_ptr(), libc::c_ulong::from(MOST_NODES) + 1) };
    if rc == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

#[cfg(target_os = "linux")]
fn set_processors(processors: &[u32]) -> std::io::Result<()> {
    // SAFETY: a set of processors is plain bits.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    for processor in processors.iter().filter(|p| **p < libc::CPU_SETSIZE as u32) {
        // SAFETY: the processor is below the size of the set.
        unsafe { libc::CPU_SET(*processor as usize, &mut set) };
    }
    // SAFETY: the system reads the set, whose size is given.
    let rc = unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set) };
    if rc == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

#[cfg(not(target_os = "linux"))]
fn set_policy(_: NumaPolicy, _: &[u32]) -> std::io::Result<()> {
    Err(std::io::ErrorKind::Unsupported.into())
}

#[cfg(not(target_os = "linux"))]
fn set_processors(_: &[u32]) -> std::io::Result<()> {
    Err(std::io::ErrorKind::Unsupported.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_the_system_are_read() {
        assert_eq!(list("0-1,4\n"), Some(vec![0, 1, 4]));
        assert_eq!(list("7"), Some(vec![7]));
        for wrong in ["", "a", "1-", "0-4000000000"] {
            assert_eq!(list(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn policies_have_names() {
        assert_eq!("interleave".parse::<NumaPolicy>().unwrap(), NumaPolicy::Interleave);
        assert_eq!("3".parse::<NumaPolicy>().unwrap(), NumaPolicy::Node(3));
        assert!("everywhere".parse::<NumaPolicy>().unwrap_err().to_string().contains("'everywhere'"));
    }

    #[test]
    fn a_node_that_is_not_there_is_named_with_those_that_are() {
        let root = tempfile::tempdir().unwrap();
        assert!(matches!(NumaPolicy::Interleave.apply_below(root.path()), Err(NumaError::NotSaid)));
        fs::write(root.path().join("online"), "0-1\n").unwrap();
        let error = NumaPolicy::Node(2).apply_below(root.path()).unwrap_err().to_string();
        assert!(error.contains("node 2") && error.contains("0, 1"), "{error}");
    }
}
