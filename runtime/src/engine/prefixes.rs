//! Beginnings of texts that are kept for later texts: a tree whose nodes are pages of the KV cache.
//!
//! A path from a root spells a text, up to [`PAGE`] tokens per node; only a leaf may have fewer. A
//! node shares its page with the texts that still use it, and may have the recurrent states that
//! were reached with its last token. Where memory is wanted, the leaf goes that was used least
//! recently; so does the state.

use super::sequences::States;
use crate::layers::pages::{PAGE, PageIdx, PagePool, StateIdx};
use std::collections::HashMap;

type NodeIdx = usize;

/// A page of a kept text.
#[derive(Debug)]
struct Node {
    parent: Option<NodeIdx>,
    children: Vec<NodeIdx>,
    tokens: Vec<u32>,
    page: PageIdx,
    /// The recurrent states after the last of the tokens.
    state: Option<StateIdx>,
    last_use: u64,
}

/// What is kept of a text's beginning.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Found {
    /// Tokens that need not be read again.
    pub(crate) n: usize,
    /// Their pages. The last one may have other tokens after them.
    pub(crate) pages: Vec<PageIdx>,
    /// The recurrent states after them, where texts have some.
    pub(crate) state: Option<StateIdx>,
}

/// Beginnings of texts that are kept.
#[derive(Debug, Default)]
pub(crate) struct Prefixes {
    nodes: Vec<Option<Node>>,
    /// Indices that have no node.
    free: Vec<NodeIdx>,
    roots: Vec<NodeIdx>,
    /// By page: the nodes that have it. A text that went back may be kept with less of a page.
    nodes_of: HashMap<PageIdx, u32>,
    /// Counts uses.
    clock: u64,
}

impl Prefixes {
    fn node(&self, index: NodeIdx) -> &Node {
        match &self.nodes[index] {
            Some(node) => node,
            None => unreachable!("links lead to nodes"),
        }
    }

    fn node_mut(&mut self, index: NodeIdx) -> &mut Node {
        match &mut self.nodes[index] {
            Some(node) => node,
            None => unreachable!("links lead to nodes"),
        }
    }

    fn children(&self, of: Option<NodeIdx>) -> &[NodeIdx] {
        of.map_or(&self.roots, |of| &self.node(of).children)
    }

    /// Returns how many tokens of `rest` a node begins with.
    fn common(&self, node: NodeIdx, rest: &[u32]) -> usize {
        let tokens = &self.node(node).tokens;
        tokens.iter().zip(rest).take_while(|(a, b)| a == b).count()
    }

    /// Returns the child that shares most tokens with `rest`, and how many.
    fn nearest(&self, of: Option<NodeIdx>, rest: &[u32]) -> Option<(NodeIdx, usize)> {
        let common = |node: &NodeIdx| (*node, self.common(*node, rest));
        self.children(of)
            .iter()
            .map(common)
            .max_by_key(|(_, n)| *n)
            .filter(|(_, n)| *n > 0)
    }

    /// Finds the longest kept beginning of a text, of at most `most` tokens. With `recurrent`, only
    /// one counts whose states are kept too.
    pub(crate) fn find(&mut self, tokens: &[u32], most: usize, recurrent: bool) -> Found {
        let tokens = &tokens[..tokens.len().min(most)];
        self.clock += 1;
        let (mut found, mut path, mut done, mut at) = (Found::default(), Vec::new(), 0, None);
        while let Some((node, n)) = self.nearest(at, &tokens[done..]) {
            path.push(self.node(node).page);
            done += n;
            let is_whole = n == self.node(node).tokens.len();
            let state = self.node(node).state.filter(|_| is_whole);
            if !recurrent || state.is_some() {
                (found.n, found.state) = (done, state);
                found.pages.clone_from(&path);
            }
            let clock = self.clock;
            self.node_mut(node).last_use = clock;
            at = Some(node);
            if !is_whole || n < PAGE {
                break;
            }
        }
        found
    }

    /// Keeps a text, whose pages and states get one more user each where they are not kept already.
    /// `states` are recurrent states by the number of tokens that they were reached with, each at
    /// the end of a page or of the text.
    pub(crate) fn keep(
        &mut self,
        tokens: &[u32],
        pages: &[PageIdx],
        states: &[(usize, StateIdx)],
        pools: (&mut PagePool, &mut States),
    ) {
        self.clock += 1;
        let (mut at, mut done) = (None, 0);
        for (part, page) in tokens.chunks(PAGE).zip(pages) {
            done += part.len();
            let state = states.iter().find(|(n, _)| *n == done);
            let children = self.children(at).iter().copied();
            let covers = |node: &NodeIdx| match state {
                Some(_) => self.node(*node).tokens == part,
                None => self.node(*node).tokens.starts_with(part),
            };
            let node = children.clone().find(covers).unwrap_or_else(|| {
                pools.0.share(*page);
                self.add(at, part, *page)
            });
            let clock = self.clock;
            let entry = self.node_mut(node);
            entry.last_use = clock;
            if let (Some((_, state)), None) = (state, entry.state) {
                pools.1.share(*state);
                entry.state = Some(*state);
            }
            at = Some(node);
        }
    }

    fn add(&mut self, parent: Option<NodeIdx>, tokens: &[u32], page: PageIdx) -> NodeIdx {
        let node = Node {
            parent,
            children: Vec::new(),
            tokens: tokens.to_vec(),
            page,
            state: None,
            last_use: self.clock,
        };
        let index = self.free.pop().unwrap_or_else(|| {
            self.nodes.push(None);
            self.nodes.len() - 1
        });
        self.nodes[index] = Some(node);
        *self.nodes_of.entry(page).or_default() += 1;
        match parent {
            Some(parent) => self.node_mut(parent).children.push(index),
            None => self.roots.push(index),
        }
        index
    }

    fn all(&self) -> impl Iterator<Item = (NodeIdx, &Node)> {
        let nodes = self.nodes.iter().enumerate();
        nodes.filter_map(|(index, node)| Some((index, node.as_ref()?)))
    }

    /// Returns whether a text uses a node's page.
    fn is_used(&self, node: &Node, pages: &PagePool) -> bool {
        pages.users(node.page) > self.nodes_of.get(&node.page).copied().unwrap_or(0)
    }

    /// Returns the pages that can be given up: those that no text uses, nor one after them.
    pub(crate) fn idle_pages(&self, pages: &PagePool) -> usize {
        let mut busy = vec![false; self.nodes.len()];
        for (index, node) in self.all() {
            let mut above = self.is_used(node, pages).then_some(index);
            while let Some(index) = above.filter(|index| !busy[*index]) {
                busy[index] = true;
                above = self.node(index).parent;
            }
        }
        let idle = self.all().filter(|(index, _)| !busy[*index]);
        let mut idle: Vec<_> = idle.map(|(_, node)| node.page).collect();
        idle.sort_unstable();
        idle.dedup();
        idle.len()
    }

    /// Gives up a page that no text uses, of the leaf that was used least recently. Returns whether
    /// there was one.
    pub(crate) fn give_up_page(&mut self, pages: &mut PagePool, states: &mut States) -> bool {
        let idle =
            |(_, node): &(NodeIdx, &Node)| node.children.is_empty() && !self.is_used(node, pages);
        let oldest = self
            .all()
            .filter(idle)
            .min_by_key(|(_, node)| node.last_use);
        let Some((index, _)) = oldest else {
            return false;
        };
        self.remove(index, pages, states);
        true
    }

    /// Gives up the states that were used least recently. Returns whether there were any.
    pub(crate) fn give_up_state(&mut self, states: &mut States) -> bool {
        let idle =
            |(_, node): &(NodeIdx, &Node)| node.state.is_some_and(|state| !states.is_shared(state));
        let oldest = self
            .all()
            .filter(idle)
            .min_by_key(|(_, node)| node.last_use);
        let Some((index, _)) = oldest else {
            return false;
        };
        if let Some(state) = self.node_mut(index).state.take() {
            states.release(state);
        }
        true
    }

    fn remove(&mut self, index: NodeIdx, pages: &mut PagePool, states: &mut States) {
        let Some(node) = self.nodes[index].take() else {
            return;
        };
        self.free.push(index);
        pages.release(node.page);
        if let Some(nodes) = self.nodes_of.get_mut(&node.page) {
            *nodes -= 1;
            if *nodes == 0 {
                self.nodes_of.remove(&node.page);
            }
        }
        if let Some(state) = node.state {
            states.release(state);
        }
        let siblings = match node.parent {
            Some(parent) => &mut self.node_mut(parent).children,
            None => &mut self.roots,
        };
        siblings.retain(|child| *child != index);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pools, and a tree over them.
    struct Kept {
        pages: PagePool,
        states: States,
        prefixes: Prefixes,
    }

    impl Kept {
        fn new() -> Self {
            Self {
                pages: PagePool::new(8 * PAGE),
                states: States::new(4, &[]),
                prefixes: Prefixes::default(),
            }
        }

        /// Keeps a text that ends then, with states after these numbers of tokens.
        fn keep(&mut self, tokens: &[u32], states: &[usize]) -> Vec<PageIdx> {
            let pages: Vec<_> = tokens
                .chunks(PAGE)
                .map(|_| self.pages.take(PAGE).unwrap())
                .collect();
            let states: Vec<_> = states
                .iter()
                .map(|n| (*n, self.states.take().unwrap()))
                .collect();
            let pools = (&mut self.pages, &mut self.states);
            self.prefixes.keep(tokens, &pages, &states, pools);
            pages.iter().for_each(|page| self.pages.release(*page));
            states.iter().for_each(|(_, s)| self.states.release(*s));
            pages
        }

        fn found(&mut self, tokens: &[u32]) -> (usize, Vec<PageIdx>) {
            let found = self.prefixes.find(tokens, tokens.len(), false);
            (found.n, found.pages)
        }
    }

    fn text(len: usize, changed: Option<usize>) -> Vec<u32> {
        let token = |i| if changed == Some(i) { 999 } else { i as u32 };
        (0..len).map(token).collect()
    }

    #[test]
    fn the_longest_common_beginning_is_found() {
        let mut kept = Kept::new();
        let first = kept.keep(&text(2 * PAGE + 3, None), &[]);
        assert_eq!(first, [0, 1, 2]);
        assert_eq!(
            kept.found(&text(3 * PAGE, None)),
            (2 * PAGE + 3, vec![0, 1, 2])
        );
        assert_eq!(
            kept.found(&text(3 * PAGE, Some(PAGE + 2))),
            (PAGE + 2, vec![0, 1])
        );
        assert_eq!(kept.found(&text(PAGE, None)), (PAGE, vec![0]));
        assert_eq!(kept.found(&[7]), (0, vec![]));
        assert_eq!(kept.found(&[]), (0, vec![]));
        // A text that goes on differently shares what is the same.
        let second = kept.keep(&text(2 * PAGE, Some(PAGE)), &[]);
        assert_eq!((second, kept.pages.free()), (vec![3, 4], 4));
        assert_eq!(
            kept.found(&text(2 * PAGE, Some(PAGE))),
            (2 * PAGE, vec![0, 4])
        );
        // What is kept already is not kept again.
        kept.keep(&text(2 * PAGE + 3, None), &[]);
        assert_eq!(kept.pages.free(), 4);
    }

    #[test]
    fn recurrent_texts_begin_where_states_are_kept() {
        let mut kept = Kept::new();
        kept.keep(&text(2 * PAGE + 3, None), &[PAGE, 2 * PAGE + 3]);
        let mut found = |len, changed| {
            let tokens = text(len, changed);
            let found = kept.prefixes.find(&tokens, len, true);
            (found.n, found.pages.len(), found.state)
        };
        assert_eq!(found(3 * PAGE, None), (2 * PAGE + 3, 3, Some(1)));
        assert_eq!(found(2 * PAGE + 2, None), (PAGE, 1, Some(0)));
        assert_eq!(found(3 * PAGE, Some(PAGE)), (PAGE, 1, Some(0)));
        assert_eq!(found(3 * PAGE, Some(PAGE - 1)), (0, 0, None));
        assert!(kept.prefixes.give_up_state(&mut kept.states));
        assert!(kept.prefixes.give_up_state(&mut kept.states));
        assert!(!kept.prefixes.give_up_state(&mut kept.states));
        assert_eq!(kept.states.free(), 4);
    }

    #[test]
    fn the_least_recently_used_leaf_goes_first_and_no_page_in_use() {
        let mut kept = Kept::new();
        kept.keep(&text(2 * PAGE, None), &[2 * PAGE]);
        kept.keep(&text(2 * PAGE, Some(PAGE)), &[]);
        kept.found(&text(2 * PAGE, None));
        kept.pages.share(0);
        kept.pages.share(1);
        assert_eq!(kept.prefixes.idle_pages(&kept.pages), 1);
        let give_up = |kept: &mut Kept| {
            kept.prefixes
                .give_up_page(&mut kept.pages, &mut kept.states)
        };
        assert!(give_up(&mut kept));
        assert_eq!(kept.found(&text(2 * PAGE, Some(PAGE))), (PAGE, vec![0]));
        assert!(!give_up(&mut kept), "a text uses the rest");
        kept.pages.release(1);
        kept.pages.release(0);
        assert!(give_up(&mut kept));
        assert_eq!((kept.pages.free(), kept.states.free()), (7, 4));
        assert!(give_up(&mut kept) && !give_up(&mut kept));
        assert_eq!(kept.pages.free(), 8);
        assert_eq!(kept.found(&text(PAGE, None)), (0, vec![]));
    }
}
