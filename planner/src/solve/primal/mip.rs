//! The integer program (MIP): one column per member, bytes within every tier, least cost.
//!
//! It is stated through good_lp and solved by microlp or HiGHS. Reduced-cost fixing leaves out the
//! columns that cannot improve the incumbent: those whose reduced cost exceeds `incumbent − L`,
//! where `L` is the Lagrangian bound.

use super::choice::{Choice, Master, PricedColumn};
use crate::solve::options::Backend;
use good_lp::solvers::WithInitialSolution;
use good_lp::{
    Constraint, Expression, ProblemVariables, Solution, SolutionStatus, SolverModel, Variable,
    WithTimeLimit, constraint, microlp, variable, variables,
};

/// Columns that the program takes at most.
pub const MAX_COLUMNS: usize = 3000;

/// Reduced cost that columns may have beyond the gap, relative to the incumbent: rounding.
const FIXING_TOLERANCE: f64 = 1e-9;

/// What the program may take.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Surviving columns up to which it is solved.
    pub max_columns: usize,
    /// Seconds of the solver.
    pub seconds: f64,
}

/// What the program found.
#[derive(Debug, Clone, PartialEq)]
pub struct MipResult {
    /// The best choice found, if any fits.
    pub choice: Option<Choice>,
    /// Whether no choice is better than `choice`, or than the incumbent without one.
    pub is_proven: bool,
}

impl MipResult {
    const NOTHING: MipResult = MipResult {
        choice: None,
        is_proven: false,
    };
}

/// Solves the program, starting from the incumbent if there is one.
///
/// With an incumbent and more surviving columns than the limit, nothing would be proven, so it
/// returns nothing. Without an incumbent the cheapest columns are taken.
pub fn solve(
    master: &Master<'_>,
    incumbent: Option<&Choice>,
    limits: Limits,
    backend: Backend,
) -> MipResult {
    let unit = incumbent
        .map_or(master.dual.bound_s, |k| k.cost_s)
        .abs()
        .max(1e-12);
    let Some(Kept {
        columns: kept,
        is_complete,
    }) = surviving_columns(master, incumbent, limits, unit)
    else {
        return MipResult::NOTHING;
    };
    let program = Program::new(master, &kept, incumbent, unit);
    let Some(solved) = program.solve(backend, limits.seconds) else {
        return MipResult::NOTHING;
    };
    let columns: Vec<Vec<usize>> = solved
        .values
        .iter()
        .zip(&kept)
        .map(|(values, columns)| {
            let times = |value: f64| value.round().max(0.0) as usize;
            let members = values.iter().zip(columns);
            members
                .flat_map(|(&v, c)| std::iter::repeat_n(c.column, times(v)))
                .collect()
        })
        .collect();
    let is_whole = columns
        .iter()
        .zip(master.items)
        .all(|(columns, item)| columns.len() == item.count());
    // The solver's arithmetic is inexact; whether the bytes fit is not.
    let choice = is_whole
        .then(|| Choice::new(master.items, master.capacity, columns))
        .flatten();
    let is_proven = is_complete && choice.is_some() && solved.is_optimal;
    MipResult { choice, is_proven }
}

/// The columns that the program takes.
struct Kept {
    /// `[items]` columns.
    columns: Vec<Vec<PricedColumn>>,
    /// Whether they are all that survive reduced-cost fixing.
    is_complete: bool,
}

fn surviving_columns(
    master: &Master<'_>,
    incumbent: Option<&Choice>,
    limits: Limits,
    unit: f64,
) -> Option<Kept> {
    let gap_s = |k: &Choice| (k.cost_s - master.dual.bound_s).max(0.0) + FIXING_TOLERANCE * unit;
    let mut kept = master.reduced_costs(incumbent.map_or(f64::INFINITY, gap_s));
    let total: usize = kept.iter().map(Vec::len).sum();
    let max_columns = if incumbent.is_some() {
        limits.max_columns
    } else {
        MAX_COLUMNS
    };
    let is_complete = total <= max_columns;
    if !is_complete && incumbent.is_some() {
        return None;
    }
    if !is_complete {
        let mut costs: Vec<f64> = kept.iter().flatten().map(|c| c.reduced_cost).collect();
        costs.sort_by(f64::total_cmp);
        let limit = costs[max_columns];
        kept.iter_mut()
            .for_each(|columns| columns.retain(|c| c.reduced_cost < limit));
    }
    for (item, columns) in kept.iter_mut().enumerate() {
        for &column in incumbent.map_or(&[][..], |k| &k.columns[item]) {
            if !columns.iter().any(|c| c.column == column) {
                columns.push(PricedColumn {
                    column,
                    reduced_cost: 0.0,
                });
            }
        }
        if columns.is_empty() {
            return None;
        }
    }
    Some(Kept {
        columns: kept,
        is_complete,
    })
}

/// The program in good_lp's form.
struct Program {
    vars: ProblemVariables,
    objective: Expression,
    rows: Vec<Constraint>,
    /// `[items][columns]` variables.
    chosen: Vec<Vec<Variable>>,
    /// The incumbent, as values of the variables.
    start: Option<Vec<(Variable, f64)>>,
}

/// What a solver returns.
struct Solved {
    /// `[items][columns]` members that take each column.
    values: Vec<Vec<f64>>,
    /// Whether the solver calls it optimal.
    is_optimal: bool,
}

impl Program {
    fn new(
        master: &Master<'_>,
        kept: &[Vec<PricedColumn>],
        incumbent: Option<&Choice>,
        unit: f64,
    ) -> Self {
        let Master {
            items, capacity, ..
        } = *master;
        let n = master.n_rows();
        let mut vars = variables!();
        let mut objective = Expression::from(0.0);
        let mut used = vec![Expression::from(0.0); n];
        let mut chosen = Vec::with_capacity(items.len());
        let mut start = Vec::new();
        for (at, (item, columns)) in items.iter().zip(kept).enumerate() {
            // Costs are stated above the item's least one, so that the solver's tolerances see the
            // differences.
            let least = columns
                .iter()
                .map(|c| item.cost_s[c.column])
                .fold(f64::INFINITY, f64::min);
            let of_item: Vec<_> = columns
                .iter()
                .map(|&PricedColumn { column, .. }| {
                    let var = vars.add(variable().integer().min(0).max(item.count() as f64));
                    objective += var * ((item.cost_s[column] - least) / unit);
                    for (tier, used) in used.iter_mut().enumerate() {
                        let bytes = item.column_bytes(column, n)[tier];
                        if bytes > 0 {
                            *used += var * (bytes as f64 / capacity.left_bytes[tier] as f64);
                        }
                    }
                    if let Some(known) = incumbent {
                        let members = known.columns[at].iter().filter(|&&c| c == column).count();
                        start.push((var, members as f64));
                    }
                    var
                })
                .collect();
            chosen.push(of_item);
        }
        let one_each = chosen.iter().zip(items).map(|(vars, item)| {
            let sum = vars.iter().sum::<Expression>();
            constraint!(sum == item.count() as f64)
        });
        let rows = one_each
            .chain(used.into_iter().map(|used| constraint!(used <= 1.0)))
            .collect();
        let start = incumbent.is_some().then_some(start);
        Program {
            vars,
            objective,
            rows,
            chosen,
            start,
        }
    }

    fn solve(self, backend: Backend, seconds: f64) -> Option<Solved> {
        let Program {
            vars,
            objective,
            rows,
            chosen,
            start,
        } = self;
        let problem = vars.minimise(objective);
        match backend {
            Backend::Microlp => run(problem.using(microlp), rows, start, seconds, &chosen),
            #[cfg(feature = "highs")]
            Backend::Highs => {
                // What HiGHS calls optimal must be that, and its bytes must fit.
                let exact = ["mip_rel_gap", "mip_abs_gap"].map(|key| (key, 0.0));
                let close = ["primal_feasibility_tolerance", "mip_feasibility_tolerance"];
                let options = exact.into_iter().chain(close.map(|key| (key, 1e-9)));
                let program = options
                    .fold(problem.using(good_lp::highs), |program, (key, value)| {
                        program.set_option(key, value)
                    });
                run(program, rows, start, seconds, &chosen)
            }
        }
    }
}

fn run<M: SolverModel + WithTimeLimit + WithInitialSolution>(
    program: M,
    rows: Vec<Constraint>,
    start: Option<Vec<(Variable, f64)>>,
    seconds: f64,
    chosen: &[Vec<Variable>],
) -> Option<Solved> {
    let mut program = program.with_time_limit(seconds.max(0.01));
    for row in rows {
        program.add_constraint(row);
    }
    if let Some(start) = start {
        program = program.with_initial_solution(start);
    }
    let solution = program.solve().ok()?;
    let values = |vars: &Vec<Variable>| vars.iter().map(|&var| solution.value(var)).collect();
    let values = chosen.iter().map(values).collect();
    Some(Solved {
        values,
        is_optimal: matches!(solution.status(), SolutionStatus::Optimal),
    })
}
