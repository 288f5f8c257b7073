//! What the user is told about an object of Weft's own kinds. No I/O; the clock is an argument.
//!
//! Two conditions. `Accepted`: the object was understood and is in force; if not, what is wrong, and what is in force
//! instead. `Programmed`: how many of the agents that are connected to the writing replica have applied it.

use std::time::Duration;

use mesh_api::manifest::Condition;
use tokio::time::Instant;

use super::inputs::{Instead, Report, line};
use crate::xds::Spread;

/// Problems that a message lists.
const PROBLEMS_SHOWN_MAX: usize = 10;
/// Bytes of a message (Kubernetes allows 32 KiB; a human reads this).
const MESSAGE_MAX_BYTES: usize = 2_048;
/// Writes that may follow each other at once.
const BURST: f64 = 20.0;
/// Writes per second in the long run: status is for humans, and the API server has others to serve.
const RATE: f64 = 5.0;
/// Least time between two writes that only count agents on.
pub(super) const COUNTS_INTERVAL: Duration = Duration::from_secs(5);

const ACCEPTED: &str = "Accepted";
const PROGRAMMED: &str = "Programmed";

/// The conditions that an object should bear. `now` is RFC 3339.
pub(super) fn conditions(report: &Report, spread: Option<Spread>, now: &str) -> Vec<Condition> {
    let condition = |kind: &str, (status, reason, message): (&str, &str, String)| {
        let earlier = report.own.conditions.iter().find(|it| it.r#type == kind);
        let since = earlier
            .filter(|earlier| earlier.status == status)
            .map_or(now, |earlier| &earlier.last_transition_time);
        Condition {
            r#type: kind.into(),
            status: status.into(),
            observed_generation: Some(report.own.generation),
            last_transition_time: since.into(),
            reason: reason.into(),
            message,
        }
    };
    vec![
        condition(ACCEPTED, accepted(report)),
        condition(PROGRAMMED, programmed(report, spread)),
    ]
}

fn accepted(report: &Report) -> (&'static str, &'static str, String) {
    if report.problems.is_empty() {
        return ("True", "Accepted", "understood and in force".into());
    }
    let shown = report.problems.iter().take(PROBLEMS_SHOWN_MAX).map(line);
    let mut message = shown.collect::<Vec<_>>().join("; ");
    let more = report.problems.len().saturating_sub(PROBLEMS_SHOWN_MAX);
    if more > 0 {
        message.push_str(&format!("; and {more} more"));
    }
    message.truncate(message.floor_char_boundary(MESSAGE_MAX_BYTES));
    message.push_str(match report.instead {
        Instead::LastGood => ". Its last good version stays in force",
        Instead::StandIn => {
            ". No good version of it is known: until it is mended, what it may have been meant to forbid is refused"
        }
        Instead::Nothing | Instead::Absent => ". It is not in force",
    });
    ("False", "Invalid", message)
}

fn programmed(report: &Report, spread: Option<Spread>) -> (&'static str, &'static str, String) {
    if !report.problems.is_empty() {
        return (
            "False",
            "Invalid",
            "this version is not told to agents".into(),
        );
    }
    match spread {
        None => ("False", "Pending", "not told to agents yet".into()),
        Some(Spread { agents: 0, .. }) => ("Unknown", "NoAgents", "no agent is connected".into()),
        Some(Spread {
            agents, applied, ..
        }) if applied >= agents => {
            let message = format!("applied by all {agents} agents");
            ("True", "Applied", message)
        }
        Some(spread) => {
            let names: Vec<_> = spread.lacking.iter().map(ToString::to_string).collect();
            let more = spread.agents - spread.applied > names.len();
            let message = format!(
                "applied by {} of {} agents; not yet by {}{}",
                spread.applied,
                spread.agents,
                names.join(", "),
                if more { " and others" } else { "" }
            );
            ("False", "Pending", message)
        }
    }
}

/// How two sets of conditions differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Difference {
    /// Not at all.
    None,
    /// In numbers of agents only.
    Counts,
    /// In what matters.
    Meaning,
}

/// Compares what is with what should be.
pub(super) fn difference(is: &[Condition], should: &[Condition]) -> Difference {
    let same_meaning = is.len() == should.len()
        && is.iter().zip(should).all(|(is, should)| {
            (&is.r#type, &is.status, &is.reason, is.observed_generation)
                == (
                    &should.r#type,
                    &should.status,
                    &should.reason,
                    should.observed_generation,
                )
                && (is.r#type == PROGRAMMED || is.message == should.message)
        });
    match (same_meaning, is == should) {
        (true, true) => Difference::None,
        (true, false) => Difference::Counts,
        (false, _) => Difference::Meaning,
    }
}

/// What is worth an Event: that an object was refused, and that it is in force again.
pub(super) fn event(is: &[Condition], should: &[Condition]) -> Option<(&'static str, Condition)> {
    let accepted = |conditions: &[Condition]| {
        let mut conditions = conditions.iter();
        conditions.find(|it| it.r#type == ACCEPTED).cloned()
    };
    let (before, now) = (accepted(is), accepted(should)?);
    let changed =
        |before: &Condition| (&before.status, &before.message) != (&now.status, &now.message);
    match (now.status.as_str(), &before) {
        ("False", None) => Some(("Warning", now)),
        ("False", Some(before)) if changed(before) => Some(("Warning", now)),
        ("True", Some(before)) if before.status == "False" => Some(("Normal", now)),
        _ => None,
    }
}

/// A token bucket.
#[derive(Debug)]
pub(super) struct Pacer {
    tokens: f64,
    at: Instant,
}

impl Pacer {
    pub fn new(now: Instant) -> Self {
        Self {
            tokens: BURST,
            at: now,
        }
    }

    /// Whether one more write may be made now.
    pub fn take(&mut self, now: Instant) -> bool {
        let passed = now.duration_since(self.at).as_secs_f64();
        self.at = now;
        self.tokens = (self.tokens + passed * RATE).min(BURST);
        if self.tokens < 1.0 {
            return false;
        }
        self.tokens -= 1.0;
        true
    }
}

#[cfg(test)]
mod tests {
    use mesh_api::manifest::FieldProblem;

    use super::*;
    use crate::{credentials::NodeName, kube::objects::Own};

    const T1: &str = "2026-01-01T00:00:00Z";
    const T2: &str = "2026-01-02T00:00:00Z";

    fn report(problems: usize, instead: Instead) -> Report {
        let problem = |index| FieldProblem {
            field: format!("spec.rules[{index}]"),
            message: "is wrong".into(),
        };
        Report {
            own: Own {
                uid: "u".into(),
                generation: 4,
                conditions: Vec::new(),
            },
            problems: (0..problems).map(problem).collect(),
            instead,
            applied_in: Some(1),
        }
    }

    fn spread(applied: usize, agents: usize) -> Option<Spread> {
        let lacking = (applied..agents).map(|index| NodeName(format!("n{index}").into()));
        Some(Spread {
            agents,
            applied,
            lacking: lacking.collect(),
        })
    }

    fn summary(conditions: &[Condition]) -> Vec<(&str, &str)> {
        conditions
            .iter()
            .map(|it| (it.status.as_str(), it.reason.as_str()))
            .collect()
    }

    #[test]
    fn a_good_object_is_programmed_when_every_agent_has_applied_it() {
        let good = report(0, Instead::Nothing);
        let of = |spread| conditions(&good, spread, T1);
        assert_eq!(
            summary(&of(None)),
            [("True", "Accepted"), ("False", "Pending")]
        );
        assert_eq!(summary(&of(spread(0, 0)))[1], ("Unknown", "NoAgents"));
        let partly = of(spread(2, 3));
        assert_eq!(summary(&partly)[1], ("False", "Pending"));
        assert_eq!(partly[1].message, "applied by 2 of 3 agents; not yet by n2");
        assert_eq!(summary(&of(spread(3, 3)))[1], ("True", "Applied"));
        assert_eq!(partly[0].observed_generation, Some(4));
    }

    #[test]
    fn a_bad_object_says_what_is_wrong_and_what_is_in_force() {
        let bad = conditions(&report(12, Instead::StandIn), spread(3, 3), T1);
        assert_eq!(summary(&bad), [("False", "Invalid"), ("False", "Invalid")]);
        assert!(
            bad[0].message.starts_with("spec.rules[0]: is wrong; "),
            "{bad:?}"
        );
        assert!(
            bad[0].message.contains("and 2 more. No good version"),
            "{bad:?}"
        );
        let kept = conditions(&report(1, Instead::LastGood), None, T1);
        assert!(kept[0].message.contains("last good version"), "{kept:?}");
    }

    #[test]
    fn the_time_is_that_of_the_last_change_of_status() {
        let mut object = report(0, Instead::Nothing);
        object.own.conditions = conditions(&object, spread(1, 2), T1);
        let counted_on = conditions(&object, spread(2, 2), T2);
        assert_eq!(counted_on[0].last_transition_time, T1);
        assert_eq!(counted_on[1].last_transition_time, T2);
    }

    #[test]
    fn only_changes_are_written_and_counts_alone_are_not_urgent() {
        let object = report(0, Instead::Nothing);
        let is = conditions(&object, spread(1, 3), T1);
        assert_eq!(difference(&is, &is), Difference::None);
        assert_eq!(difference(&[], &is), Difference::Meaning);
        let two = conditions(&object, spread(2, 3), T1);
        assert_eq!(difference(&is, &two), Difference::Counts);
        let all = conditions(&object, spread(3, 3), T1);
        assert_eq!(difference(&is, &all), Difference::Meaning);
    }

    #[test]
    fn an_event_tells_of_a_refusal_and_of_its_end() {
        let good = conditions(&report(0, Instead::Nothing), None, T1);
        let bad = conditions(&report(1, Instead::LastGood), None, T1);
        let worse = conditions(&report(2, Instead::LastGood), None, T1);
        let kind = |is: &[Condition], should: &[Condition]| event(is, should).map(|(kind, _)| kind);
        assert_eq!(kind(&[], &good), None, "no news");
        assert_eq!(kind(&[], &bad), Some("Warning"));
        assert_eq!(kind(&good, &bad), Some("Warning"));
        assert_eq!(kind(&bad, &bad), None, "said already");
        assert_eq!(kind(&bad, &worse), Some("Warning"));
        assert_eq!(kind(&bad, &good), Some("Normal"));
    }

    #[test]
    fn writes_are_paced() {
        let start = Instant::now();
        let mut pacer = Pacer::new(start);
        let at_once = (0..100).filter(|_| pacer.take(start)).count();
        assert_eq!(at_once, 20);
        let second = start + Duration::from_secs(1);
        assert_eq!((0..100).filter(|_| pacer.take(second)).count(), 5);
    }
}
