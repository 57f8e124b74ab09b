//! What is known of rules before lexemes are chosen: which are regular, and that none is left-recursive.

use super::parse::{Expr, Rule, line, shown};

/// Most parts of a rule with the rules in it, and of all rules.
const MAX_RULE_PARTS: usize = 30_000;
const MAX_ALL_PARTS: usize = 300_000;

/// Most levels of parts in parts. The reader of regular expressions takes 250.
const MAX_LEVELS: usize = 120;

/// Parts and levels of an expression.
#[derive(Debug, Clone, Copy, Default)]
struct Size {
    parts: usize,
    levels: usize,
}

/// The rules that need no other rule: a regular expression says the same.
#[derive(Debug, Default)]
pub(super) struct Regular {
    bodies: Vec<Option<Expr>>,
    sizes: Vec<Option<Size>>,
}

impl Regular {
    /// Finds the rules that lead to no recursion, and puts into each the rules that it uses.
    pub fn of(text: &str, rules: &[Rule<'_>]) -> Result<Self, String> {
        let mut regular = Self {
            bodies: vec![None; rules.len()],
            sizes: vec![None; rules.len()],
        };
        let mut left: Vec<usize> = (0..rules.len()).collect();
        let mut total = 0usize;
        loop {
            let mut later = Vec::with_capacity(left.len());
            for &number in &left {
                let Some(body) = &rules[number].body else {
                    continue;
                };
                let Some(size) = regular.size(body) else {
                    later.push(number);
                    continue;
                };
                total = total.saturating_add(size.parts);
                if size.exceeds() || total > MAX_ALL_PARTS {
                    let rule = &rules[number];
                    let (line, name) = (line(text, rule.at), shown(rule.name));
                    return Err(format!("line {line}: rule {name} is too large or too deep"));
                }
                regular.bodies[number] = Some(regular.expanded(body));
                regular.sizes[number] = Some(size);
            }
            if later.len() == left.len() {
                return Ok(regular);
            }
            left = later;
        }
    }

    /// Returns the size of a part with the rules in it, `None` if one of those is not regular.
    fn size(&self, expr: &Expr) -> Option<Size> {
        let one = Size {
            parts: 1,
            levels: 1,
        };
        let of_all = |parts: &[Expr]| {
            parts.iter().try_fold(one, |sum, part| {
                let size = self.size(part)?;
                Some(Size {
                    parts: sum.parts.saturating_add(size.parts),
                    levels: sum.levels.max(size.levels + 1),
                })
            })
        };
        match expr {
            Expr::Chars(chars) => Some(Size {
                parts: chars.ranges().len(),
                levels: 1,
            }),
            Expr::Seq(parts) | Expr::Alt(parts) => of_all(parts),
            Expr::Repeat { of, .. } => of_all(std::slice::from_ref(of)),
            Expr::Rule(number) => self.sizes[*number],
        }
    }

    /// Returns a part without references to rules, if it is regular.
    pub fn whole(&self, expr: &Expr) -> Result<Option<Expr>, String> {
        match self.size(expr) {
            None => Ok(None),
            Some(size) if size.exceeds() => Err("a part is too large or too deep".into()),
            Some(_) => Ok(Some(self.expanded(expr))),
        }
    }

    /// Puts rules in the place of references to them. Alternatives of characters become one set.
    fn expanded(&self, expr: &Expr) -> Expr {
        match expr {
            Expr::Chars(_) => expr.clone(),
            Expr::Seq(parts) => Expr::Seq(parts.iter().map(|part| self.expanded(part)).collect()),
            Expr::Alt(parts) => {
                let mut all: Vec<Expr> = Vec::with_capacity(parts.len());
                for part in parts {
                    match (all.last_mut(), self.expanded(part)) {
                        (Some(Expr::Chars(one)), Expr::Chars(other)) => *one = one.union(&other),
                        (_, part) => all.push(part),
                    }
                }
                match all.len() {
                    1 => all.remove(0),
                    _ => Expr::Alt(all),
                }
            }
            Expr::Repeat { of, min, max } => Expr::Repeat {
                of: Box::new(self.expanded(of)),
                min: *min,
                max: *max,
            },
            // `size` has found all rules that are used.
            Expr::Rule(number) => self.bodies[*number]
                .clone()
                .unwrap_or(Expr::Seq(Vec::new())),
        }
    }
}

impl Size {
    fn exceeds(self) -> bool {
        self.parts > MAX_RULE_PARTS || self.levels > MAX_LEVELS
    }
}

/// Checks that no rule can begin with itself.
pub(super) fn check_left_recursion(text: &str, rules: &[Rule<'_>]) -> Result<(), String> {
    let none = Expr::Seq(Vec::new());
    let bodies: Vec<&Expr> = rules
        .iter()
        .map(|rule| rule.body.as_ref().unwrap_or(&none))
        .collect();
    let mut nullable = vec![false; rules.len()];
    loop {
        let mut has_changed = false;
        for (number, body) in bodies.iter().enumerate() {
            if !nullable[number] && begin(body, &nullable, &mut Vec::new()) {
                nullable[number] = true;
                has_changed = true;
            }
        }
        if !has_changed {
            break;
        }
    }
    let begins = |body: &&Expr| {
        let mut first = Vec::new();
        begin(body, &nullable, &mut first);
        first
    };
    let first: Vec<Vec<usize>> = bodies.iter().map(begins).collect();
    // Rules that begin with no rule, or with such that are known to be right, are right.
    let mut is_right = vec![false; rules.len()];
    loop {
        let mut has_changed = false;
        for number in 0..rules.len() {
            if !is_right[number] && first[number].iter().all(|rule| is_right[*rule]) {
                is_right[number] = true;
                has_changed = true;
            }
        }
        if !has_changed {
            break;
        }
    }
    let Some(mut at) = is_right.iter().position(|is_right| !is_right) else {
        return Ok(());
    };
    // Each of the others begins with one of them, so that this way comes back.
    let mut is_seen = vec![false; rules.len()];
    while !std::mem::replace(&mut is_seen[at], true) {
        at = first[at]
            .iter()
            .copied()
            .find(|rule| !is_right[*rule])
            .unwrap_or(at);
    }
    let (line, name) = (line(text, rules[at].at), shown(rules[at].name));
    Err(format!(
        "line {line}: rule {name} begins with itself, expected no left recursion"
    ))
}

/// Gathers the rules that a part can begin with. Returns whether the part can be empty.
fn begin(expr: &Expr, nullable: &[bool], first: &mut Vec<usize>) -> bool {
    match expr {
        Expr::Chars(_) => false,
        Expr::Seq(parts) => parts.iter().all(|part| begin(part, nullable, first)),
        Expr::Alt(parts) => {
            let mut is_empty = false;
            for part in parts {
                is_empty |= begin(part, nullable, first);
            }
            is_empty
        }
        Expr::Repeat { of, min, .. } => begin(of, nullable, first) || *min == 0,
        Expr::Rule(number) => {
            first.push(*number);
            nullable[*number]
        }
    }
}
