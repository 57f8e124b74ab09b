//! Pages of layers with a sliding window: of a text, those that its next tokens see.
//!
//! Layers whose windows are equal are a kind, which has pages of its own. A text lists them by
//! position, as it does the pages of layers that see all positions; those before the window go back
//! to the pool. A checkpoint shares the pages of the window at its place, so that a text can go back
//! further than its own pages reach.
//!
//! [`CacheRoom::window_positions`](tier_plan_formats::model::kv::CacheRoom::window_positions) says
//! how many pages there are: enough for as many texts and checkpoints as planned, so that none is
//! ever wanted in vain.

use crate::layers::pages::{PAGE, PageIdx, PagePool, Pool, StateIdx, pages_for};

/// Stands for a page that was given back.
const GONE: PageIdx = PageIdx::MAX;

/// The pages of one kind that a text has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct WindowPages {
    /// By position; those before `first` are [`GONE`].
    pages: Vec<PageIdx>,
    first: usize,
}

impl WindowPages {
    /// Returns the pages by position, for the positions that the next tokens see.
    pub(crate) fn by_position(&self) -> &[PageIdx] {
        &self.pages
    }

    fn own(&self) -> &[PageIdx] {
        &self.pages[self.first..]
    }
}

/// A page whose first rows go to another one of the same kind.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct PageCopy {
    /// Index of the kind.
    pub(super) kind: usize,
    pub(super) from: PageIdx,
    pub(super) to: PageIdx,
    /// Positions.
    pub(super) len: usize,
}

/// Layers whose tokens see equally many positions.
#[derive(Debug)]
struct Kind {
    /// Positions that a token sees, its own included.
    window: usize,
    pool: PagePool,
}

impl Kind {
    /// Returns the index of the first page that a token after `n` others sees.
    fn first_seen(&self, n: usize) -> usize {
        (n + 1).saturating_sub(self.window) / PAGE
    }

    /// Returns the pages that a text may have while no token is added to it: one more than its
    /// window may touch.
    fn most_at_rest(&self) -> usize {
        self.window.div_ceil(PAGE) + 2
    }

    /// Gives back the pages before index `first`.
    fn drop_before(&mut self, list: &mut WindowPages, first: usize) {
        let first = first.min(list.pages.len());
        for page in list.pages.iter_mut().take(first).skip(list.first) {
            self.pool.release(*page);
            *page = GONE;
        }
        list.first = list.first.max(first);
    }
}

/// All kinds of layers with windows, and what checkpoints hold of them.
#[derive(Debug, Default)]
pub(crate) struct Windows {
    kinds: Vec<Kind>,
    /// By recurrent state, then by kind: the pages of its checkpoint.
    held: Vec<Vec<WindowPages>>,
}

impl Windows {
    /// Makes the pages of kinds, each with its window and its positions, and room for what `states`
    /// checkpoints hold.
    fn new(kinds: &[(usize, usize)], states: usize) -> Self {
        let kind = |&(window, positions): &(usize, usize)| Kind {
            window,
            pool: PagePool::new(positions),
        };
        Self {
            kinds: kinds.iter().map(kind).collect(),
            held: vec![Vec::new(); if kinds.is_empty() { 0 } else { states }],
        }
    }

    /// Whether no layer has a window.
    pub(super) fn is_empty(&self) -> bool {
        self.kinds.is_empty()
    }

    /// Returns the pages of a text without tokens.
    pub(super) fn none(&self) -> Vec<WindowPages> {
        vec![WindowPages::default(); self.kinds.len()]
    }

    /// Whether a text with these pages can go on after its first `n` tokens.
    pub(super) fn reach(&self, lists: &[WindowPages], n: usize) -> bool {
        let reaches = |(kind, list): (&Kind, &WindowPages)| list.first <= kind.first_seen(n);
        self.kinds.iter().zip(lists).all(reaches)
    }

    /// Gives back the pages of all tokens but the first `n`.
    pub(super) fn cut(&mut self, lists: &mut [WindowPages], n: usize) {
        for (kind, list) in self.kinds.iter_mut().zip(lists) {
            let keep = pages_for(n).min(list.pages.len());
            for page in list
                .pages
                .drain(keep..)
                .skip(list.first.saturating_sub(keep))
            {
                kind.pool.release(page);
            }
            list.first = list.first.min(keep);
        }
    }

    /// Gives back pages that a text does not need while others add tokens.
    pub(super) fn narrow(&mut self, lists: &mut [WindowPages]) {
        for (kind, list) in self.kinds.iter_mut().zip(lists) {
            kind.drop_before(list, list.pages.len().saturating_sub(kind.most_at_rest()));
        }
    }

    /// Gives a text of `past` tokens the pages for `n` more, none of them shared where those go, and
    /// takes those back that none of them sees. Returns what is to be copied, or `None` where too
    /// few are free.
    pub(super) fn reserve(
        &mut self,
        lists: &mut [WindowPages],
        past: usize,
        n: usize,
    ) -> Option<Vec<PageCopy>> {
        let mut copies = Vec::new();
        for (number, (kind, list)) in self.kinds.iter_mut().zip(lists).enumerate() {
            let end = pages_for(past + n);
            let spare = end.saturating_sub(kind.most_at_rest());
            kind.drop_before(list, kind.first_seen(past).min(spare));
            for index in past / PAGE..end {
                let old = list.pages.get(index).copied();
                if old.is_some_and(|page| !kind.pool.is_shared(page)) {
                    continue;
                }
                let taken = kind.pool.take(PAGE)?;
                let Some(shared) = old else {
                    list.pages.push(taken);
                    continue;
                };
                list.pages[index] = taken;
                kind.pool.release(shared);
                copies.push(PageCopy {
                    kind: number,
                    from: shared,
                    to: taken,
                    len: past.saturating_sub(index * PAGE).min(PAGE),
                });
            }
        }
        Some(copies)
    }

    /// Returns the pages of a text's first `n` tokens, for another text; the two share them.
    pub(super) fn share(&mut self, lists: &[WindowPages], n: usize) -> Vec<WindowPages> {
        let part = |(kind, list): (&mut Kind, &WindowPages)| {
            let pages = list.pages[..pages_for(n)].to_vec();
            let first = list.first.min(pages.len());
            pages[first..]
                .iter()
                .for_each(|page| kind.pool.share(*page));
            WindowPages { pages, first }
        };
        self.kinds.iter_mut().zip(lists).map(part).collect()
    }

    /// Gives back all pages of a text.
    pub(super) fn release(&mut self, mut lists: Vec<WindowPages>) {
        self.cut(&mut lists, 0);
    }

    /// Has a checkpoint hold what a text with these pages sees after its first `n` tokens.
    pub(super) fn hold(&mut self, state: StateIdx, lists: &[WindowPages], n: usize) {
        if self.is_empty() {
            return;
        }
        self.let_go(state);
        let mut held = self.share(lists, n);
        for (kind, list) in self.kinds.iter_mut().zip(&mut held) {
            kind.drop_before(list, kind.first_seen(n));
        }
        self.held[state as usize] = held;
    }

    /// Takes pages of every kind for a checkpoint after `n` tokens, and has it hold them. Returns
    /// them by kind, or `None` where too few are free.
    pub(super) fn hold_new(&mut self, state: StateIdx, n: usize) -> Option<Vec<Vec<PageIdx>>> {
        let mut lists = self.none();
        let mut is_enough = true;
        for (kind, list) in self.kinds.iter_mut().zip(&mut lists) {
            list.first = kind.first_seen(n).min(pages_for(n));
            list.pages = vec![GONE; list.first];
            while is_enough && list.pages.len() < pages_for(n) {
                match kind.pool.take(PAGE) {
                    Some(page) => list.pages.push(page),
                    None => is_enough = false,
                }
            }
        }
        if !is_enough {
            self.release(lists);
            return None;
        }
        let pages = lists.iter().map(|list| list.own().to_vec()).collect();
        if !self.is_empty() {
            self.let_go(state);
            self.held[state as usize] = lists;
        }
        Some(pages)
    }

    /// Returns the pages that a checkpoint holds, by kind.
    pub(super) fn held(&self, state: StateIdx) -> impl Iterator<Item = &[PageIdx]> {
        let held = self.held.get(state as usize);
        held.into_iter().flatten().map(WindowPages::own)
    }

    /// Returns how many pages of each kind a checkpoint after `n` tokens holds.
    pub(super) fn held_pages(&self, n: usize) -> impl Iterator<Item = usize> + '_ {
        let pages = move |kind: &Kind| pages_for(n).saturating_sub(kind.first_seen(n));
        self.kinds.iter().map(pages)
    }

    /// Returns the pages of a text that begins at a checkpoint, or without tokens.
    pub(super) fn begin_at(&mut self, state: Option<StateIdx>) -> Vec<WindowPages> {
        let held = state.and_then(|state| self.held.get(state as usize));
        let Some(held) = held.filter(|held| !held.is_empty()).cloned() else {
            return self.none();
        };
        for (kind, list) in self.kinds.iter_mut().zip(&held) {
            list.own().iter().for_each(|page| kind.pool.share(*page));
        }
        held
    }

    /// Gives back what a checkpoint holds.
    fn let_go(&mut self, state: StateIdx) {
        if let Some(held) = self.held.get_mut(state as usize) {
            let held = std::mem::take(held);
            self.release(held);
        }
    }

    /// Returns the windows, in words; nothing where there are none.
    pub(super) fn words(&self) -> String {
        let words = self.kinds.iter().map(|kind| kind.window.to_string());
        words.collect::<Vec<_>>().join(" ")
    }

    /// Returns the pages in use by kind, and the window of each.
    #[cfg(test)]
    pub(crate) fn in_use(&self) -> Vec<(usize, usize)> {
        let used = |kind: &Kind| (kind.window, kind.pool.total() - kind.pool.free());
        self.kinds.iter().map(used).collect()
    }
}

/// Recurrent states and checkpoints. A checkpoint of a model without recurrent states is one too:
/// what it holds of windows goes with its last user.
#[derive(Debug)]
pub(crate) struct States {
    pool: Pool,
    pub(super) windows: Windows,
}

impl States {
    /// Makes `n` states without users, and the pages of windows, each given by its positions in all
    /// beside it.
    pub(crate) fn new(n: usize, windows: &[(usize, usize)]) -> Self {
        Self {
            pool: Pool::new(n),
            windows: Windows::new(windows, n),
        }
    }

    /// Returns how many have no user.
    pub(crate) fn free(&self) -> usize {
        self.pool.free()
    }

    /// Takes one without users, if there is one.
    pub(crate) fn take(&mut self) -> Option<StateIdx> {
        self.pool.take()
    }

    /// Adds a user to one that has some.
    pub(crate) fn share(&mut self, state: StateIdx) {
        self.pool.share(state);
    }

    /// Returns whether one has several users.
    pub(crate) fn is_shared(&self, state: StateIdx) -> bool {
        self.pool.is_shared(state)
    }

    /// Takes a user from one, which holds nothing after the last.
    pub(crate) fn release(&mut self, state: StateIdx) {
        self.pool.release(state);
        if self.pool.users(state) == 0 {
            self.windows.let_go(state);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: usize = 2 * PAGE;

    fn one_kind() -> States {
        States::new(2, &[(WINDOW, 9 * PAGE)])
    }

    fn used(states: &States) -> usize {
        states.windows.in_use()[0].1
    }

    #[test]
    fn a_text_has_the_pages_that_its_next_tokens_see() {
        let mut states = one_kind();
        let windows = &mut states.windows;
        let mut lists = windows.none();
        for past in 0..20 * PAGE {
            assert_eq!(windows.reserve(&mut lists, past, 1), Some(vec![]));
            let first = (past + 1).saturating_sub(WINDOW);
            let seen = &lists[0].by_position()[first / PAGE..=past / PAGE];
            assert!(!seen.contains(&GONE), "{past}");
            assert!(windows.in_use()[0].1 <= 4, "{past}");
        }
        assert!(windows.reach(&lists, 20 * PAGE) && windows.reach(&lists, 19 * PAGE));
        assert!(!windows.reach(&lists, 17 * PAGE) && !windows.reach(&lists, 0));
        // Many tokens at once: all that the first of them sees, and their own.
        assert!(windows.reserve(&mut lists, 20 * PAGE, 5 * PAGE).is_some());
        assert!(windows.in_use()[0].1 <= 2 + 5 + 1);
        assert_eq!(windows.reserve(&mut lists, 25 * PAGE, 8 * PAGE), None);
        windows.cut(&mut lists, 25 * PAGE);
        windows.narrow(&mut lists);
        assert_eq!(windows.in_use(), [(WINDOW, 2)]);
        windows.release(lists);
        assert_eq!(windows.in_use(), [(WINDOW, 0)]);
    }

    #[test]
    fn checkpoints_hold_their_windows_and_writing_copies_them() {
        let mut states = one_kind();
        let mut lists = states.windows.none();
        let at = 3 * PAGE + 3;
        for past in 0..at {
            states.windows.reserve(&mut lists, past, 1).unwrap();
        }
        let state = states.take().unwrap();
        states.windows.hold(state, &lists, at);
        assert_eq!(states.windows.held_pages(at).collect::<Vec<_>>(), [3]);
        let page = lists[0].pages[3];
        let copies = states.windows.reserve(&mut lists, at, 1).unwrap();
        let copy = PageCopy {
            kind: 0,
            from: page,
            to: lists[0].pages[3],
            len: 3,
        };
        assert_eq!(copies, [copy]);
        for past in at + 1..12 * PAGE {
            assert_eq!(states.windows.reserve(&mut lists, past, 1), Some(vec![]));
        }
        assert!(!states.windows.reach(&lists, at));
        states.windows.release(lists);
        assert_eq!(used(&states), 3);
        let lists = states.windows.begin_at(Some(state));
        assert!(states.windows.reach(&lists, at));
        assert!(lists[0].pages.len() == 4 && lists[0].pages[3] == page);
        states.share(state);
        states.release(state);
        assert_eq!(used(&states), 3);
        states.release(state);
        assert_eq!(used(&states), 3, "the text has them");
        states.windows.release(lists);
        assert_eq!(used(&states), 0);
        let state = states.take().unwrap();
        let pages = states.windows.hold_new(state, 8 * PAGE).unwrap();
        assert_eq!((pages.len(), pages[0].len(), used(&states)), (1, 2, 2));
        assert!(states.windows.held(state).eq([&pages[0][..]]));
        let other = states.take().unwrap();
        for past in 0..7 {
            let mut lists = states.windows.none();
            states.windows.reserve(&mut lists, 0, past * PAGE).unwrap();
            states.windows.release(lists);
        }
        let mut lists = states.windows.none();
        states.windows.reserve(&mut lists, 0, 6 * PAGE).unwrap();
        assert_eq!(states.windows.hold_new(other, 8 * PAGE), None);
        assert_eq!(used(&states), 8);
    }

    #[test]
    fn a_text_that_reaches_nothing_is_cut_to_nothing() {
        let mut states = one_kind();
        let windows = &mut states.windows;
        let mut lists = windows.none();
        for past in 0..12 * PAGE {
            windows.reserve(&mut lists, past, 1).unwrap();
        }
        windows.cut(&mut lists, PAGE);
        assert_eq!(
            (windows.in_use()[0].1, windows.reach(&lists, PAGE)),
            (0, false)
        );
        windows.cut(&mut lists, 0);
        assert!(windows.reach(&lists, 0) && windows.reserve(&mut lists, 0, 3).is_some());
    }

    #[test]
    fn kinds_have_pages_of_their_own() {
        let mut states = States::new(1, &[(3, 9 * PAGE), (4 * PAGE, 9 * PAGE)]);
        let mut lists = states.windows.none();
        for past in 0..20 * PAGE {
            states.windows.reserve(&mut lists, past, 1).unwrap();
        }
        assert_eq!(states.windows.in_use(), [(3, 3), (4 * PAGE, 6)]);
        assert_eq!(states.windows.words(), "3 32");
        let n = 18 * PAGE + 4;
        assert!(states.windows.reach(&lists, n - 1 + PAGE));
        assert!(
            !states.windows.reach(&lists, 17 * PAGE),
            "the wide one does not"
        );
        let state = states.take().unwrap();
        states.windows.hold(state, &lists, 20 * PAGE);
        let held: Vec<usize> = states.windows.held(state).map(<[_]>::len).collect();
        assert!(held == [1, 4] && states.windows.held_pages(20 * PAGE).eq(held));
        states.windows.release(lists);
        assert_eq!(states.windows.in_use(), [(3, 1), (4 * PAGE, 4)]);
    }

    #[test]
    fn models_without_windows_hold_nothing() {
        let mut states = States::new(1, &[]);
        let state = states.take().unwrap();
        let lists = states.windows.none();
        states.windows.hold(state, &lists, 5);
        assert_eq!(states.windows.hold_new(state, 5), Some(vec![]));
        assert!(states.windows.begin_at(Some(state)).is_empty() && states.windows.reach(&lists, 0));
        states.release(state);
        assert_eq!(states.free(), 1);
    }
}
