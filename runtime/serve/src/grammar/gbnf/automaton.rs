//! What must be known of two lexemes that may come at the same place.
//!
//! An automaton has a state per set of characters in the expression (Glushkov). A part that comes up
//! to `n` times counts as one that comes any number of times: the automaton takes more texts than the
//! lexeme, so that what it finds apart is apart.

use super::chars::Chars;
use super::parse::Expr;

/// Work that a grammar may take.
#[derive(Debug)]
pub(super) struct Budget(pub u64);

impl Budget {
    /// Takes some of what is left.
    pub fn spend(&mut self, n: usize) -> Result<(), String> {
        match self.0.checked_sub(n as u64) {
            Some(left) => {
                self.0 = left;
                Ok(())
            }
            None => Err("the grammar is too large".into()),
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct Automaton {
    /// By state: the characters that lead to it.
    chars: Vec<Chars>,
    first: Vec<usize>,
    /// By state: the states after it.
    next: Vec<Vec<usize>>,
    /// By state: whether a text may end there.
    is_last: Vec<bool>,
    /// By state: all characters that may come.
    out: Vec<Chars>,
    pub is_nullable: bool,
}

/// States where a part begins and ends.
struct Ends {
    first: Vec<usize>,
    last: Vec<usize>,
    is_nullable: bool,
}

/// What two lexemes have to do with each other.
#[derive(Debug, Clone, Default)]
pub(super) struct Pair {
    /// Whether some text is both.
    pub share: bool,
    /// By lexeme: with which characters the other one can go on after a text that is this one.
    pub go_on: [Chars; 2],
}

impl Automaton {
    pub fn of(expr: &Expr, budget: &mut Budget) -> Result<Self, String> {
        let mut automaton = Self::default();
        let ends = automaton.add(expr, budget)?;
        automaton.is_last = vec![false; automaton.chars.len()];
        for state in ends.last {
            automaton.is_last[state] = true;
        }
        for states in &mut automaton.next {
            states.sort_unstable();
            states.dedup();
        }
        let out = automaton.next.iter().map(|next| automaton.all(next));
        automaton.out = out.collect();
        automaton.first = ends.first;
        automaton.is_nullable = ends.is_nullable;
        Ok(automaton)
    }

    /// Returns all characters that lead to some states.
    fn all(&self, states: &[usize]) -> Chars {
        let sets = states.iter().map(|state| &self.chars[*state]);
        Chars::of(sets.flat_map(Chars::ranges).copied().collect())
    }

    /// Returns the characters that a text may begin with.
    pub fn begin(&self) -> Chars {
        self.all(&self.first)
    }

    fn join(&mut self, from: &[usize], to: &[usize], budget: &mut Budget) -> Result<(), String> {
        budget.spend(from.len().saturating_mul(to.len()))?;
        from.iter().for_each(|state| self.next[*state].extend(to));
        Ok(())
    }

    fn add(&mut self, expr: &Expr, budget: &mut Budget) -> Result<Ends, String> {
        budget.spend(1)?;
        let mut ends = Ends {
            first: Vec::new(),
            last: Vec::new(),
            is_nullable: false,
        };
        match expr {
            Expr::Chars(chars) => {
                let state = self.chars.len();
                self.chars.push(chars.clone());
                self.next.push(Vec::new());
                (ends.first, ends.last) = (vec![state], vec![state]);
            }
            Expr::Seq(parts) => {
                ends.is_nullable = true;
                for part in parts {
                    let part = self.add(part, budget)?;
                    self.join(&ends.last, &part.first, budget)?;
                    if ends.is_nullable {
                        ends.first.extend(&part.first);
                    }
                    if part.is_nullable {
                        ends.last.extend(part.last);
                    } else {
                        ends.last = part.last;
                    }
                    ends.is_nullable &= part.is_nullable;
                    budget.spend(ends.first.len() + ends.last.len())?;
                }
            }
            Expr::Alt(parts) => {
                for part in parts {
                    let part = self.add(part, budget)?;
                    ends.first.extend(part.first);
                    ends.last.extend(part.last);
                    ends.is_nullable |= part.is_nullable;
                }
            }
            Expr::Repeat { of, min, max } => {
                ends = self.add(of, budget)?;
                if *max != Some(1) {
                    self.join(&ends.last, &ends.first, budget)?;
                }
                ends.is_nullable |= *min == 0;
            }
            // Lexemes have no references.
            Expr::Rule(_) => {}
        }
        Ok(ends)
    }

    /// Compares two lexemes.
    pub fn pair(&self, other: &Self, budget: &mut Budget) -> Result<Pair, String> {
        let width = other.chars.len();
        let mut is_seen = vec![false; self.chars.len() * width];
        budget.spend(is_seen.len())?;
        let mut open: Vec<[usize; 2]> = Vec::new();
        let mut go_on = [Vec::new(), Vec::new()];
        let mut pair = Pair::default();
        let (mut ours, mut others) = (&self.first, &other.first);
        loop {
            budget.spend(ours.len().saturating_mul(others.len()))?;
            for &one in ours {
                for &two in others {
                    let is_new = !is_seen[one * width + two];
                    if is_new && self.chars[one].meets(&other.chars[two]) {
                        is_seen[one * width + two] = true;
                        open.push([one, two]);
                    }
                }
            }
            let Some([one, two]) = open.pop() else {
                break;
            };
            if self.is_last[one] {
                go_on[0].extend(other.out[two].ranges());
            }
            if other.is_last[two] {
                go_on[1].extend(self.out[one].ranges());
            }
            pair.share |= self.is_last[one] && other.is_last[two];
            (ours, others) = (&self.next[one], &other.next[two]);
        }
        pair.go_on = go_on.map(Chars::of);
        Ok(pair)
    }
}
