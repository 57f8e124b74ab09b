//! Run records sorted by model and machine: only speeds of one model on one machine are held against
//! each other.

use super::{PlanEntry, Report};
use tier_plan_runtime::formats::SourceId;
use tier_plan_runtime::formats::record::RunRecord;

/// Digits of a hash that tell two models of one name apart.
const SHORT_HASH: usize = 8;

/// The plans of one model on one machine.
#[derive(Debug, Clone, Default)]
pub struct Group {
    /// Name of the model, with the start of its hash where another one has the same name.
    pub model: String,
    /// Processor, memory, and machine file.
    pub machine: String,
    /// Report of these plans alone.
    pub report: Report,
}

impl Group {
    /// Returns `demo on …`.
    pub fn heading(&self) -> String {
        match (self.model.is_empty(), self.machine.is_empty()) {
            (false, false) => format!("{} on {}", self.model, self.machine),
            (false, true) => self.model.clone(),
            (true, false) => format!("A model on {}", self.machine),
            (true, true) => "Plans of which no run is known".to_string(),
        }
    }
}

/// What makes runs comparable.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Subject {
    model: SourceId,
    /// Name of the machine file.
    file: String,
    /// Processor and memory; `None` for a plan that did not run.
    host: Option<String>,
}

impl Subject {
    fn of(entry: &PlanEntry) -> Self {
        let record = entry.records.first();
        let plan = entry.placement.as_ref();
        let of_record = |of: fn(&RunRecord) -> Option<&SourceId>| record.and_then(of);
        let empty = || SourceId {
            name: String::new(),
            hash: String::new(),
        };
        let model = of_record(|r| r.model.as_ref()).or(plan.map(|p| &p.model));
        let file = of_record(|r| r.machine.as_ref()).or(plan.map(|p| &p.machine));
        Self {
            model: model.cloned().unwrap_or_else(empty),
            file: file.map_or(String::new(), |f| f.name.clone()),
            host: record.map(|r| r.host.clone()),
        }
    }

    /// Whether both are of one model and one machine. A plan that did not run fits any machine that
    /// it was made for.
    fn fits(&self, other: &Self) -> bool {
        let same_host = match (&self.host, &other.host) {
            (Some(a), Some(b)) => a == b,
            _ => true,
        };
        let same_model = if self.model.hash.is_empty() || other.model.hash.is_empty() {
            self.model.name == other.model.name
        } else {
            self.model.hash == other.model.hash
        };
        same_model && same_host && self.file == other.file
    }

    fn machine(&self) -> String {
        let host = self.host.as_deref().unwrap_or_default();
        match (host.is_empty(), self.file.is_empty()) {
            (false, false) => format!("{host} (machine file {})", self.file),
            (true, false) => format!("machine file {}", self.file),
            (_, true) => host.to_string(),
        }
    }
}

/// Makes a report of run records alone: one entry per plan name, model, and machine, in the order
/// they first appear.
///
/// It is dated by its newest record; plans, profile and curves can be added to what is returned.
/// Records of different thread counts are noted, because their speeds don't compare.
pub fn from_records(records: Vec<RunRecord>) -> Report {
    let mut report = Report::default();
    for record in &records {
        if record.when > report.generated {
            report.generated.clone_from(&record.when);
        }
    }
    let mut hosts: Vec<String> = Vec::new();
    let mut subjects: Vec<Subject> = Vec::new();
    for record in records {
        if !record.host.is_empty() && !hosts.contains(&record.host) {
            hosts.push(record.host.clone());
        }
        let new = PlanEntry {
            name: record.plan.clone(),
            placement: None,
            records: vec![record],
        };
        let subject = Subject::of(&new);
        let mut known = report.plans.iter_mut().zip(&subjects);
        let same =
            |(entry, of): &(&mut PlanEntry, &Subject)| entry.name == new.name && **of == subject;
        match known.find(same) {
            Some((entry, _)) => entry.records.extend(new.records),
            None => {
                report.plans.push(new);
                subjects.push(subject);
            }
        }
    }
    report.host = hosts.join("; ");
    let groups = groups(&report);
    report.title = title(&groups);
    for group in &groups {
        let mut threads: Vec<String> = Vec::new();
        for record in group.report.plans.iter().flat_map(|p| &p.records) {
            let count = record.threads.to_string();
            if !threads.contains(&count) {
                threads.push(count);
            }
        }
        if threads.len() > 1 {
            report.notes.push(format!(
                "The records of {} are of different thread counts ({}): part of any difference in speed is the threads'.",
                group.heading(),
                threads.join(", ")
            ));
        }
    }
    report
}

/// Returns the title of a report of these groups.
pub(super) fn title(groups: &[Group]) -> String {
    let count = |of: fn(&Group) -> &str| {
        let mut seen: Vec<&str> = groups.iter().map(of).collect();
        seen.sort_unstable();
        seen.dedup();
        seen.len()
    };
    let plural = |n: usize, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
    match groups {
        [] => "Plans side by side".into(),
        [one] if one.model.is_empty() => "Plans side by side".into(),
        [one] => format!("Plans for {}", one.model),
        _ => format!(
            "{} on {}",
            plural(count(|g| &g.model), "model"),
            plural(count(|g| &g.machine), "machine")
        ),
    }
}

/// Splits a report by model and machine, in the order they first appear. The profile and its curves
/// go to the groups of its model. History and notes stay with a group that is the only one.
pub fn groups(report: &Report) -> Vec<Group> {
    let mut subjects: Vec<(Subject, Vec<usize>)> = Vec::new();
    for (at, entry) in report.plans.iter().enumerate() {
        let subject = Subject::of(entry);
        match subjects.iter_mut().find(|(of, _)| of.fits(&subject)) {
            Some((of, members)) => {
                members.push(at);
                of.host = of.host.take().or(subject.host);
            }
            None => subjects.push((subject, vec![at])),
        }
    }
    let is_only = subjects.len() < 2;
    let name = |of: &Subject| {
        let mut others = subjects.iter().map(|(other, _)| &other.model);
        let SourceId { name, hash } = &of.model;
        if others.any(|other| other.name == *name && other.hash != *hash) {
            let short: String = hash.chars().take(SHORT_HASH).collect();
            format!("{name} ({short})")
        } else {
            name.clone()
        }
    };
    let group = |(of, members): &(Subject, Vec<usize>)| {
        let profile = report.profile.as_ref().filter(|profile| {
            let hash = &profile.model.hash;
            is_only || hash.is_empty() || *hash == of.model.hash
        });
        let mut part = Report {
            title: report.title.clone(),
            generated: report.generated.clone(),
            host: of.host.clone().unwrap_or_default(),
            plans: members.iter().map(|at| report.plans[*at].clone()).collect(),
            profile: profile.cloned(),
            ..Report::default()
        };
        if part.profile.is_some() || is_only {
            part.curves.clone_from(&report.curves);
        }
        if is_only {
            part.host.clone_from(&report.host);
            part.history.clone_from(&report.history);
            part.notes.clone_from(&report.notes);
        }
        Group {
            model: name(of),
            machine: of.machine(),
            report: part,
        }
    };
    if subjects.is_empty() {
        return vec![Group {
            report: report.clone(),
            ..Group::default()
        }];
    }
    subjects.iter().map(group).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::sample;

    fn record(plan: &str, model: &str, host: &str) -> RunRecord {
        RunRecord {
            plan: plan.into(),
            model: Some(SourceId {
                name: model.into(),
                hash: model.repeat(4),
            }),
            host: host.into(),
            threads: 2,
            decode_tokens: 10,
            decode_s: 1.0,
            ..RunRecord::default()
        }
    }

    #[test]
    fn records_are_grouped_by_model_and_machine() {
        let records = vec![
            record("ilp", "a", "small"),
            record("ilp", "a", "large"),
            record("ilp", "b", "small"),
            record("lru", "a", "small"),
            record("ilp", "a", "small"),
        ];
        let report = from_records(records);
        assert_eq!(report.title, "2 models on 2 machines");
        assert!(report.notes.is_empty(), "{:?}", report.notes);
        let found = groups(&report);
        let said: Vec<(String, usize)> = found
            .iter()
            .map(|g| (g.heading(), g.report.plans.len()))
            .collect();
        let wanted = [("a on small", 2), ("a on large", 1), ("b on small", 1)];
        assert_eq!(said, wanted.map(|(h, n)| (h.to_string(), n)));
        assert_eq!(found[0].report.plans[0].records.len(), 2);
        assert_eq!(found[0].report.plans[1].name, "lru");
    }

    #[test]
    fn models_of_one_name_are_told_apart() {
        let mut records = vec![record("p", "a", "h"), record("p", "a", "h")];
        records[1].model.as_mut().unwrap().hash = "0123456789".into();
        let headings: Vec<String> = groups(&from_records(records))
            .iter()
            .map(Group::heading)
            .collect();
        assert_eq!(headings, ["a (aaaa) on h", "a (01234567) on h"]);
    }

    #[test]
    fn other_thread_counts_are_noted() {
        let mut records = vec![record("p", "a", "h"), record("q", "a", "h")];
        records[1].threads = 8;
        let notes = from_records(records).notes;
        assert_eq!(notes.len(), 1, "{notes:?}");
        assert!(notes[0].contains("(2, 8)"), "{notes:?}");
    }

    #[test]
    fn plans_that_did_not_run_are_beside_those_that_did() {
        let mut report = sample::report(4, 16, 2, 3, 3, false);
        report.plans[0].records.clear();
        let found = groups(&report);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].report.plans.len(), 3);
        assert!(found[0].machine.starts_with("A sample processor"));
        assert!(found[0].report.profile.is_some());
        assert_eq!(groups(&Report::default()).len(), 1);
    }
}
