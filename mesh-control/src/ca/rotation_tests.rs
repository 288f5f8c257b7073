use std::collections::BTreeMap;

use super::*;
use crate::ca::Authority;

const OVERLAP: Duration = Duration::from_secs(100);
const STEP: Duration = Duration::from_secs(5);

fn root() -> String {
    let made = Authority::ephemeral("cluster.local", OVERLAP, SystemTime::now());
    made.expect("made").roots_pem().to_owned()
}

fn at(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000 + seconds)
}

/// The cluster's memory, and what its one writer does to it.
#[derive(Default)]
struct Cluster {
    present: String,
    bundle: Option<String>,
    /// The outgoing authority, and the root whose key is remembered.
    outgoing: Option<(Outgoing, Option<String>)>,
    /// Root that this process signs with.
    active: Option<String>,
}

impl Cluster {
    fn of(present: &str) -> Self {
        Self {
            present: present.to_owned(),
            ..Self::default()
        }
    }

    fn decide(&self, now: SystemTime) -> Decision {
        let seen = Seen {
            present: &self.present,
            bundle: self.bundle.as_deref(),
            outgoing: self.outgoing.as_ref().map(|(outgoing, _)| outgoing),
            active: self.active.is_some(),
        };
        decide(seen, OVERLAP, now)
    }

    /// Decides and writes until there is nothing to write. Returns the root that signs.
    fn settle(&mut self, now: SystemTime) -> String {
        for _ in 0..5 {
            let decision = self.decide(now);
            let signer = match decision.signer {
                Signer::Present => self.present.clone(),
                Signer::Active => self.active.clone().expect("there is one"),
                Signer::Outgoing => {
                    let (_, key) = self.outgoing.as_ref().expect("there is one");
                    key.clone().expect("its key is remembered")
                }
            };
            match decision.write {
                Some(Write::Remember(outgoing)) => {
                    let key = outgoing.signs.then(|| self.active.clone()).flatten();
                    self.outgoing = Some((outgoing, key));
                }
                Some(Write::Bundle) => self.bundle = Some(decision.roots),
                Some(Write::Forget) => self.outgoing = None,
                None => {
                    self.active = Some(signer.clone());
                    return signer;
                }
            }
            self.active = Some(signer);
        }
        panic!("it never comes to rest");
    }
}

#[test]
fn the_first_start_publishes_its_root() {
    let a = root();
    let mut cluster = Cluster::of(&a);
    assert_eq!(cluster.settle(at(0)), a);
    assert_eq!(cluster.bundle.as_deref(), Some(a.as_str()));
    assert!(cluster.outgoing.is_none());
}

#[test]
fn a_new_root_is_announced_before_it_signs_and_the_old_one_is_trusted_afterwards() {
    let (a, b) = (root(), root());
    let mut cluster = Cluster::of(&a);
    cluster.settle(at(0));
    cluster.present = b.clone();
    assert_eq!(cluster.settle(at(10)), a, "the old one still signs");
    assert!(roots::equal(
        cluster.bundle.as_deref().expect("told"),
        &format!("{a}{b}")
    ));
    assert_eq!(cluster.settle(at(10) + OVERLAP - STEP), a);
    assert_eq!(cluster.settle(at(10) + OVERLAP), b);
    assert!(roots::equal(
        cluster.bundle.as_deref().expect("told"),
        &format!("{a}{b}")
    ));
    assert_eq!(cluster.settle(at(10) + OVERLAP * 2), b);
    assert_eq!(cluster.bundle.as_deref(), Some(b.as_str()));
    assert!(cluster.outgoing.is_none());
}

#[test]
fn a_restart_in_between_changes_nothing() {
    let (a, b) = (root(), root());
    let mut cluster = Cluster::of(&a);
    cluster.settle(at(0));
    cluster.present = b.clone();
    cluster.settle(at(10));
    cluster.active = None;
    assert_eq!(cluster.settle(at(20)), a, "its key was remembered");
}

#[test]
fn a_root_that_changed_while_nobody_ran_signs_at_once_but_the_old_one_stays_trusted() {
    let (a, b) = (root(), root());
    let mut cluster = Cluster::of(&a);
    cluster.settle(at(0));
    cluster.present = b.clone();
    cluster.active = None;
    assert_eq!(cluster.settle(at(10)), b, "the old key is lost");
    assert!(roots::equal(
        cluster.bundle.as_deref().expect("told"),
        &format!("{a}{b}")
    ));
    assert_eq!(cluster.settle(at(10) + OVERLAP * 2), b);
    assert_eq!(cluster.bundle.as_deref(), Some(b.as_str()));
}

#[test]
fn a_root_that_is_only_added_or_only_removed_stays_trusted_for_the_overlap() {
    let (a, b) = (root(), root());
    let both = format!("{a}{b}");
    let mut cluster = Cluster::of(&both);
    cluster.settle(at(0));
    cluster.present = a.clone();
    cluster.settle(at(10));
    let told = |cluster: &Cluster| cluster.bundle.clone().expect("told");
    assert!(
        roots::equal(&told(&cluster), &both),
        "certificates of b still live"
    );
    cluster.settle(at(10) + OVERLAP * 2);
    assert_eq!(told(&cluster), a);
}

#[test]
fn a_clock_that_goes_back_cuts_no_overlap_short() {
    let (a, b) = (root(), root());
    let mut cluster = Cluster::of(&a);
    cluster.settle(at(1000));
    cluster.present = b;
    cluster.settle(at(1000));
    assert_eq!(cluster.settle(at(0)), a);
}

/// Roots change at any time, several at once, with restarts in between. Whoever trusts what was told one overlap ago
/// trusts what signs now (as long as no key was lost), and what signed within the last overlap is trusted now.
#[test]
fn nobody_is_ever_refused() {
    let all: Vec<_> = (0..4).map(|_| root()).collect();
    for gap in [10_u64, 50, 90, 130, 190, 250] {
        let mut cluster = Cluster::of(&all[0]);
        let mut told: BTreeMap<u64, String> = BTreeMap::new();
        let mut signed: BTreeMap<u64, String> = BTreeMap::new();
        for second in (0..1000).step_by(10) {
            let index = usize::try_from(second / gap)
                .expect("small")
                .min(all.len() - 1);
            cluster.present = all[index].clone();
            let signer = cluster.settle(at(second));
            let bundle = cluster.bundle.clone().expect("told");
            let trusts =
                |bundle: &str, root: &str| roots::equal(&roots::union(&[bundle, root]), bundle);
            let oldest = second.saturating_sub(OVERLAP.as_secs());
            if let Some((_, earlier)) = told.range(..=oldest).next_back() {
                assert!(
                    trusts(earlier, &signer),
                    "gap {gap}, second {second}: signer is news"
                );
            }
            for (when, root) in signed.range(oldest + 1..) {
                assert!(
                    trusts(&bundle, root),
                    "gap {gap}, second {second}: {when} is refused"
                );
            }
            told.insert(second, bundle);
            signed.insert(second, signer);
        }
        assert!(
            cluster.outgoing.is_none() || gap > 130,
            "gap {gap}: it came to an end"
        );
    }
}
