//! The choice of lexemes.
//!
//! A grammar of llguidance is one of lexemes, each a regular expression. Its lexer takes the longest
//! text that is a lexeme of those that may come, and never goes back. GBNF is a grammar of characters.
//! So lexemes are as large as the lexer can tell them apart: at first each regular part is one. Where
//! two that may come at the same place are at odds, the longer one is cut in two, and so on. They are
//! at odds if one may end where the other goes on, and the text after it may begin with what the other
//! goes on with. Lexemes of a character each are never at odds.

use super::automaton::{Automaton, Budget, Pair};
use super::chars::Chars;
use super::parse::{Expr, Rule, line, shown};
use super::rules::Regular;
use std::collections::{BTreeSet, HashMap, HashSet};

/// Steps of the comparison of lexemes that a grammar may take, some tenths of a second.
const MAX_WORK: u64 = 30_000_000;

/// Most places of lexemes in a grammar with recursion.
const MAX_PLACES: usize = 1000;

/// A lexeme.
#[derive(Debug)]
pub(super) struct Lexeme {
    /// As a regular expression.
    pub regex: String,
    expr: Expr,
    automaton: Automaton,
    /// Whether its parts are in use instead.
    pub is_split: bool,
}

impl Lexeme {
    pub fn is_nullable(&self) -> bool {
        self.automaton.is_nullable
    }
}

/// A part of a rule, of lexemes.
#[derive(Debug)]
pub(super) enum Node {
    Lexeme {
        lexeme: usize,
        /// Number of the place.
        place: usize,
    },
    Seq(Vec<Node>),
    Alt(Vec<Node>),
    Repeat {
        of: Box<Node>,
        min: u32,
        max: Option<u32>,
    },
    Rule(usize),
}

/// A grammar of lexemes.
#[derive(Debug)]
pub(super) struct Lexed {
    pub lexemes: Vec<Lexeme>,
    /// By rule: its body, `None` for those that lexemes have.
    pub rules: Vec<Option<Node>>,
    /// The body of the grammar.
    pub root: Node,
}

/// What may come after a place: other places.
type Places = BTreeSet<usize>;

struct Chooser<'r> {
    regular: &'r Regular,
    lexemes: Vec<Lexeme>,
    by_regex: HashMap<String, usize>,
    /// By place: its lexeme.
    places: Vec<usize>,
    pairs: HashMap<[usize; 2], Pair>,
    budget: Budget,
}

/// Chooses the lexemes of a grammar.
///
/// # Errors
/// When the grammar is too large.
pub(super) fn choose(text: &str, rules: &[Rule<'_>], regular: &Regular) -> Result<Lexed, String> {
    let mut chooser = Chooser {
        regular,
        lexemes: Vec::new(),
        by_regex: HashMap::new(),
        places: Vec::new(),
        pairs: HashMap::new(),
        budget: Budget(MAX_WORK),
    };
    loop {
        chooser.places.clear();
        let mut nodes = Vec::with_capacity(rules.len());
        for (number, rule) in rules.iter().enumerate() {
            let is_regular = regular.whole(&Expr::Rule(number))?.is_some();
            let body = rule.body.as_ref().filter(|_| !is_regular);
            let node = body.map(|body| chooser.node(body)).transpose();
            nodes.push(node.map_err(|why| {
                let (line, name) = (line(text, rule.at), shown(rule.name));
                format!("line {line}: rule {name}: {why}")
            })?);
        }
        let root = chooser.node(&Expr::Rule(0))?;
        let grammar = Follow::of(&nodes, &root, &chooser)?;
        if !chooser.split(&grammar)? {
            return Ok(Lexed {
                lexemes: chooser.lexemes,
                rules: nodes,
                root,
            });
        }
    }
}

impl Chooser<'_> {
    fn node(&mut self, expr: &Expr) -> Result<Node, String> {
        if let Some(whole) = self.regular.whole(expr)? {
            return self.lexeme(whole);
        }
        Ok(match expr {
            Expr::Seq(parts) => Node::Seq(self.grouped(parts, Expr::Seq)?),
            Expr::Alt(parts) => Node::Alt(self.grouped(parts, Expr::Alt)?),
            Expr::Repeat { of, min, max } => Node::Repeat {
                of: Box::new(self.node(of)?),
                min: *min,
                max: *max,
            },
            Expr::Rule(number) => Node::Rule(*number),
            Expr::Chars(_) => Node::Seq(Vec::new()),
        })
    }

    /// Returns parts, of which regular ones side by side are one.
    fn grouped(
        &mut self,
        parts: &[Expr],
        join: fn(Vec<Expr>) -> Expr,
    ) -> Result<Vec<Node>, String> {
        let mut nodes = Vec::new();
        let mut group = Vec::new();
        for part in parts {
            if let Some(whole) = self.regular.whole(part)? {
                group.push(whole);
                continue;
            }
            if !group.is_empty() {
                nodes.push(self.lexeme(join(std::mem::take(&mut group)))?);
            }
            nodes.push(self.node(part)?);
        }
        if !group.is_empty() {
            nodes.push(self.lexeme(join(group))?);
        }
        Ok(nodes)
    }

    /// Returns a regular part as one lexeme, or as those that it is cut into.
    fn lexeme(&mut self, expr: Expr) -> Result<Node, String> {
        let mut nodes = Vec::new();
        let mut rest = expr;
        // A sequence is cut after its first part, and the rest of it again, where it must be.
        loop {
            rest = alone(rest);
            if matches!(&rest, Expr::Seq(parts) if parts.is_empty()) {
                break;
            }
            let lexeme = self.number(&rest)?;
            if !self.lexemes[lexeme].is_split {
                if self.places.len() == MAX_PLACES {
                    return Err("the grammar is too large with it".into());
                }
                self.places.push(lexeme);
                let place = self.places.len() - 1;
                nodes.push(Node::Lexeme { lexeme, place });
                break;
            }
            match rest {
                Expr::Seq(mut parts) => {
                    let first = parts.remove(0);
                    nodes.push(self.lexeme(first)?);
                    rest = Expr::Seq(parts);
                    continue;
                }
                Expr::Alt(parts) => {
                    let parts = parts.into_iter().map(|part| self.lexeme(part));
                    nodes.push(Node::Alt(parts.collect::<Result<_, _>>()?));
                }
                Expr::Repeat { of, min, max } => nodes.push(Node::Repeat {
                    of: Box::new(self.lexeme(*of)?),
                    min,
                    max,
                }),
                // A character is never cut.
                Expr::Chars(_) | Expr::Rule(_) => {}
            }
            break;
        }
        Ok(match nodes.len() {
            1 => nodes.remove(0),
            _ => Node::Seq(nodes),
        })
    }

    /// Returns the number of the lexeme that a regular part is.
    fn number(&mut self, expr: &Expr) -> Result<usize, String> {
        let mut regex = String::new();
        write(expr, &mut regex);
        self.budget.spend(regex.len())?;
        if let Some(lexeme) = self.by_regex.get(&regex) {
            return Ok(*lexeme);
        }
        let automaton = Automaton::of(expr, &mut self.budget)?;
        self.by_regex.insert(regex.clone(), self.lexemes.len());
        self.lexemes.push(Lexeme {
            regex,
            expr: expr.clone(),
            automaton,
            is_split: false,
        });
        Ok(self.lexemes.len() - 1)
    }

    /// Cuts lexemes that are at odds. Returns whether there were any.
    fn split(&mut self, grammar: &Follow) -> Result<bool, String> {
        let mut seen = HashSet::new();
        let mut open: Vec<[usize; 2]> = Vec::new();
        let mut at_odds = BTreeSet::new();
        let all: Vec<usize> = grammar.first.iter().copied().collect();
        self.meet(&all, &all, &mut seen, &mut open)?;
        while let Some([one, two]) = open.pop() {
            let lexemes = [self.places[one], self.places[two]];
            let pair = self.pair(lexemes)?;
            for (i, [here, there]) in [[one, two], [two, one]].into_iter().enumerate() {
                let after = self.after(grammar, here, here == there);
                if after.share_a_byte(&pair.go_on[i]) {
                    at_odds.insert(self.places[there]);
                }
            }
            if pair.share {
                let [one, two] = [one, two].map(|place| &grammar.follow[place]);
                let [one, two] = [one, two].map(|set| set.iter().copied().collect::<Vec<_>>());
                self.meet(&one, &two, &mut seen, &mut open)?;
            }
        }
        for lexeme in &at_odds {
            self.lexemes[*lexeme].is_split = true;
        }
        Ok(!at_odds.is_empty())
    }

    /// Adds the pairs of places of which each may come.
    fn meet(
        &mut self,
        ones: &[usize],
        others: &[usize],
        seen: &mut HashSet<[usize; 2]>,
        open: &mut Vec<[usize; 2]>,
    ) -> Result<(), String> {
        self.budget.spend(ones.len().saturating_mul(others.len()))?;
        for &one in ones {
            for &other in others {
                let pair = [one.min(other), one.max(other)];
                if seen.insert(pair) {
                    open.push(pair);
                }
            }
        }
        Ok(())
    }

    fn pair(&mut self, [one, two]: [usize; 2]) -> Result<Pair, String> {
        if let Some(pair) = self.pairs.get(&[one, two]) {
            return Ok(pair.clone());
        }
        let [a, b] = [one, two].map(|lexeme| &self.lexemes[lexeme].automaton);
        let pair = a.pair(b, &mut self.budget)?;
        self.pairs.insert([one, two], pair.clone());
        Ok(pair)
    }

    /// Returns the characters that may come after a place. A part that comes any number of times may
    /// go on, rather than begin again where nothing counts how often.
    fn after(&self, grammar: &Follow, place: usize, is_alone: bool) -> Chars {
        let lexeme = &self.lexemes[self.places[place]];
        let is_free = matches!(
            lexeme.expr,
            Expr::Repeat {
                min: 0 | 1,
                max: None,
                ..
            }
        );
        let follow = grammar.follow[place].iter();
        let goes_on = is_alone && is_free && grammar.repeats[place];
        let others = follow.filter(|next| !(goes_on && **next == place));
        let begin = others.map(|next| self.lexemes[self.places[*next]].automaton.begin());
        Chars::of(begin.flat_map(|chars| chars.ranges().to_vec()).collect())
    }
}

/// Which places may come first, and after each.
#[derive(Debug)]
struct Follow {
    first: Places,
    follow: Vec<Places>,
    /// Whether a place comes after itself in parts alone that come any number of times.
    repeats: Vec<bool>,
}

/// What a part begins with, and whether it can be empty.
#[derive(Debug, Default, Clone, PartialEq)]
struct Begin {
    places: Places,
    is_nullable: bool,
}

struct Walk<'a> {
    lexemes: &'a [Lexeme],
    rules: Vec<Begin>,
    /// By rule: what may come after it.
    after: Vec<Places>,
    /// By place: what may come after it, but what only comes so when a part comes again.
    follow: Vec<Places>,
    /// By place: what comes after it when a part comes again that may come any number of times.
    again: Vec<Places>,
}

impl Follow {
    fn of(nodes: &[Option<Node>], root: &Node, chooser: &Chooser<'_>) -> Result<Self, String> {
        let mut walk = Walk {
            lexemes: &chooser.lexemes,
            rules: vec![Begin::default(); nodes.len()],
            after: vec![Places::new(); nodes.len()],
            follow: vec![Places::new(); chooser.places.len()],
            again: vec![Places::new(); chooser.places.len()],
        };
        let with_body = || {
            let all = nodes.iter().enumerate();
            all.filter_map(|(number, node)| Some((number, node.as_ref()?)))
        };
        let mut work = Budget(MAX_WORK);
        loop {
            let mut has_changed = false;
            for (number, node) in with_body() {
                let begin = walk.begin(node);
                work.spend(1 + begin.places.len())?;
                has_changed |= begin != walk.rules[number];
                walk.rules[number] = begin;
            }
            if !has_changed {
                break;
            }
        }
        loop {
            let count = |walk: &Walk<'_>| {
                let sets = walk.after.iter().chain(&walk.follow).chain(&walk.again);
                sets.map(Places::len).sum::<usize>()
            };
            let before = count(&walk);
            work.spend(1 + before)?;
            walk.walk(root, &Places::new(), &Places::new());
            for (number, node) in with_body() {
                let after = walk.after[number].clone();
                walk.walk(node, &after, &Places::new());
            }
            if count(&walk) == before {
                break;
            }
        }
        let first = walk.begin(root).places;
        let Walk {
            mut follow, again, ..
        } = walk;
        let mut repeats = Vec::with_capacity(follow.len());
        for (place, (follow, again)) in follow.iter_mut().zip(&again).enumerate() {
            repeats.push(!follow.contains(&place));
            follow.extend(again);
        }
        Ok(Self {
            first,
            follow,
            repeats,
        })
    }
}

impl Walk<'_> {
    fn begin(&self, node: &Node) -> Begin {
        match node {
            Node::Lexeme { lexeme, place } => Begin {
                places: Places::from([*place]),
                is_nullable: self.lexemes[*lexeme].is_nullable(),
            },
            Node::Seq(parts) => {
                let mut all = Begin {
                    is_nullable: true,
                    ..Begin::default()
                };
                for part in parts {
                    let part = self.begin(part);
                    all.places.extend(part.places);
                    if !part.is_nullable {
                        all.is_nullable = false;
                        break;
                    }
                }
                all
            }
            Node::Alt(parts) => parts.iter().fold(Begin::default(), |mut all, part| {
                let part = self.begin(part);
                all.places.extend(part.places);
                all.is_nullable |= part.is_nullable;
                all
            }),
            Node::Repeat { of, min, .. } => {
                let mut begin = self.begin(of);
                begin.is_nullable |= *min == 0;
                begin
            }
            Node::Rule(number) => self.rules[*number].clone(),
        }
    }

    /// Notes what comes after the places in a part, after which `after` comes, or `again` if a part around
    /// it comes again that may come any number of times.
    fn walk(&mut self, node: &Node, after: &Places, again: &Places) {
        match node {
            Node::Lexeme { place, .. } => {
                self.follow[*place].extend(after);
                self.again[*place].extend(again);
            }
            // How often a rule comes may be counted where it is used.
            Node::Rule(number) => self.after[*number].extend(after.union(again)),
            Node::Alt(parts) => parts.iter().for_each(|part| self.walk(part, after, again)),
            Node::Repeat { of, min, max } => {
                let (mut after, mut again) = (after.clone(), again.clone());
                let begin = self.begin(of).places;
                match (min, max) {
                    (_, Some(1)) => {}
                    (0 | 1, None) => again.extend(begin),
                    _ => after.extend(begin),
                }
                self.walk(of, &after, &again);
            }
            Node::Seq(parts) => {
                let (mut after, mut again) = (after.clone(), again.clone());
                for part in parts.iter().rev() {
                    self.walk(part, &after, &again);
                    let begin = self.begin(part);
                    if !begin.is_nullable {
                        after.clear();
                        again.clear();
                    }
                    after.extend(begin.places);
                }
            }
        }
    }
}

/// Returns the part of a sequence or a choice of one part.
fn alone(mut expr: Expr) -> Expr {
    while let Expr::Seq(parts) | Expr::Alt(parts) = &mut expr
        && parts.len() == 1
    {
        expr = parts.remove(0);
    }
    expr
}

/// Writes a regular part as a regular expression.
fn write(expr: &Expr, regex: &mut String) {
    match expr {
        Expr::Chars(chars) => chars.write(regex),
        Expr::Seq(parts) => {
            for part in parts {
                let is_choice = matches!(part, Expr::Alt(_));
                write_part(part, is_choice, regex);
            }
        }
        Expr::Alt(parts) => {
            for (i, part) in parts.iter().enumerate() {
                if i > 0 {
                    regex.push('|');
                }
                write_part(part, false, regex);
            }
        }
        Expr::Repeat { of, min, max } => {
            write_part(of, !matches!(**of, Expr::Chars(_)), regex);
            regex.push_str(&times(*min, *max));
        }
        // Regular parts have none.
        Expr::Rule(_) => {}
    }
}

fn write_part(part: &Expr, in_group: bool, regex: &mut String) {
    if in_group {
        regex.push_str("(?:");
        write(part, regex);
        regex.push(')');
    } else {
        write(part, regex);
    }
}

/// Returns how often a part comes, as regular expressions and Lark write it.
pub(super) fn times(min: u32, max: Option<u32>) -> String {
    match (min, max) {
        (0, None) => "*".into(),
        (1, None) => "+".into(),
        (0, Some(1)) => "?".into(),
        (min, None) => format!("{{{min},}}"),
        (min, Some(max)) if min == max => format!("{{{min}}}"),
        (min, Some(max)) => format!("{{{min},{max}}}"),
    }
}
