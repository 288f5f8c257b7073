//! The schedule in virtual time against a scripted authority that answers at once.

use rand::SeedableRng;

use super::*;
use crate::identity::testing::{NOW, identity};

const HOUR: i64 = 3600;
const SEED: u64 = 7;

fn outage() -> CertificateError {
    CertificateError::Unreachable {
        address: "ca".to_owned(),
        detail: "down".to_owned(),
    }
}

fn refusal() -> CertificateError {
    CertificateError::Refused {
        code: "PermissionDenied".to_owned(),
        message: "no".to_owned(),
    }
}

/// A schedule, both clocks, and every request that was started.
struct World {
    schedule: Schedule,
    now: Now,
    requests: Vec<(Duration, Identity)>,
}

impl World {
    fn new() -> Self {
        let schedule = Schedule::new(StdRng::seed_from_u64(SEED));
        Self {
            schedule,
            now: Now {
                monotonic: Duration::ZERO,
                unix: NOW,
            },
            requests: Vec::new(),
        }
    }

    fn with(accounts: &[&str]) -> Self {
        let mut world = Self::new();
        for account in accounts {
            world
                .schedule
                .prefetch(&identity(account), world.now)
                .expect("below the limit");
        }
        world
    }

    /// Lets `seconds` pass; `answer` is the authority.
    fn run(&mut self, seconds: u64, answer: impl Fn(Now) -> Result<Validity, CertificateError>) {
        let end = self.now.monotonic + Duration::from_secs(seconds);
        loop {
            for who in self.schedule.start(self.now) {
                self.requests.push((self.now.monotonic, who.clone()));
                match answer(self.now) {
                    Ok(validity) => self.schedule.succeeded(&who, validity, self.now),
                    Err(error) => self.schedule.failed(&who, error, self.now),
                };
            }
            let step = self
                .schedule
                .idle_for(self.now)
                .max(Duration::from_millis(1));
            if self.now.monotonic + step > end {
                self.pass(end - self.now.monotonic);
                return;
            }
            self.pass(step);
        }
    }

    /// Moves both clocks; the wall clock shows whole seconds since [`NOW`] plus what it was set by.
    fn pass(&mut self, step: Duration) {
        let before = self.now.monotonic.as_secs();
        self.now.monotonic += step;
        self.now.unix += i64::try_from(self.now.monotonic.as_secs() - before).expect("small");
    }

    fn times(&self, account: &str) -> Vec<f64> {
        let who = identity(account);
        self.requests
            .iter()
            .filter(|(_, asked)| *asked == who)
            .map(|(at, _)| at.as_secs_f64())
            .collect()
    }

    fn row(&self, account: &str) -> Row {
        let rows = self.schedule.rows(self.now);
        rows.into_iter()
            .find(|row| row.identity == identity(account))
            .expect("known")
    }
}

/// An authority that grants an hour, backdated by a minute.
fn grant_hour(now: Now) -> Result<Validity, CertificateError> {
    Ok(Validity {
        not_before: now.unix - 60,
        not_after: now.unix + HOUR,
    })
}

#[test]
fn renewal_is_at_half_life_with_jitter() {
    let mut world = World::with(&["web"]);
    world.run(2 * 3600, grant_hour);
    let times = world.times("web");
    assert!(times.len() >= 4, "{times:?}");
    for gap in times.windows(2).map(|pair| pair[1] - pair[0]) {
        assert!(
            (0.9 * 1800.0..=1.1 * 1800.0 + 1.0).contains(&gap),
            "{gap} s is not half of an hour, seed {SEED}"
        );
    }
    let gaps: HashSet<u64> = times
        .windows(2)
        .map(|pair| (pair[1] - pair[0]).to_bits())
        .collect();
    assert!(gaps.len() > 1, "jitter must vary");
}

#[test]
fn authority_down_from_half_life_to_ninety_percent() {
    let mut world = World::with(&["web"]);
    world.run(1000, grant_hour);
    // Down until 90 % of the certificate's hour.
    world.run(2240, |_| Err(outage()));
    let (row, asked_while_down) = (world.row("web"), world.requests.len() - 1);
    let validity = row.validity.expect("the valid certificate is kept");
    assert!(!validity.is_off(world.now));
    assert!(
        row.failures > 5 && asked_while_down < 100,
        "{asked_while_down} requests while down"
    );
    world.run(30, grant_hour);
    let renewed = world.row("web").validity.expect("renewed");
    assert!(
        renewed.not_after > validity.not_after,
        "renewed within 30 s of the authority's return"
    );
}

/// Every request while the authority is away hangs for as long as one call may take, and then fails.
#[test]
fn an_authority_that_hangs_is_asked_again_within_thirty_seconds_of_its_return() {
    const CALL: Duration = crate::identity::ca_client::CALL_TIMEOUT;
    const TICK: Duration = Duration::from_millis(100);
    for returns in (300..340).map(Duration::from_secs) {
        let mut world = World::with(&["web", "db", "cache"]);
        let mut hanging: Vec<(Duration, Identity)> = Vec::new();
        let limit = returns + Duration::from_secs(30);
        while world.now.monotonic < limit {
            let (now, back) = (world.now, world.now.monotonic >= returns);
            hanging.extend(
                world
                    .schedule
                    .start(now)
                    .into_iter()
                    .filter_map(|who| match back {
                        true => {
                            let granted = grant_hour(now).expect("it is back");
                            world.schedule.succeeded(&who, granted, now);
                            None
                        }
                        false => Some((now.monotonic + CALL, who)),
                    })
                    .collect::<Vec<_>>(),
            );
            hanging.retain(|(until, who)| {
                let over = *until <= now.monotonic;
                if over {
                    world.schedule.failed(who, outage(), now);
                }
                !over
            });
            world.pass(TICK);
        }
        let rows = world.schedule.rows(world.now);
        assert!(
            rows.iter().all(|row| row.validity.is_some()),
            "back after {returns:?}: {rows:?}"
        );
    }
}

#[test]
fn backoff_doubles_from_half_a_second_to_its_limit() {
    let mut world = World::with(&["web"]);
    world.run(1000, |_| Err(refusal()));
    let times = world.times("web");
    let mut expected = BACKOFF_FIRST;
    for gap in times
        .windows(2)
        .map(|pair| Duration::from_secs_f64(pair[1] - pair[0]))
    {
        assert!(
            gap <= expected + Duration::from_millis(2) && gap >= expected.mul_f64(0.74),
            "{gap:?} of {expected:?}"
        );
        expected = (expected * 2).min(BACKOFF_MAX);
    }
    assert_eq!(expected, BACKOFF_MAX, "the limit was reached");
}

#[test]
fn backoff_never_sleeps_past_the_end_of_the_certificate() {
    let mut world = World::with(&["web"]);
    world.run(1, grant_hour);
    world.run(3590, |_| Err(refusal()));
    let end = Duration::from_secs(3600);
    assert!(
        world.now.monotonic + world.row("web").next_in <= end + RENEWAL_MIN,
        "asks again before it ends"
    );
    // Past the end the authority is still asked, at the long interval.
    let before = world.requests.len();
    world.run(3600, |_| Err(refusal()));
    let after = world.requests.len() - before;
    assert!((20..60).contains(&after), "{after} requests in an hour");
}

#[test]
fn steps_of_the_wall_clock_make_no_renewal_loop() {
    // The authority's clock is right and ours is not: what it grants is refused here until ours is right again.
    for step in [300, -300, 48 * HOUR, -HOUR] {
        let mut world = World::with(&["web"]);
        world.run(100, grant_hour);
        world.now.unix += step;
        let before = world.requests.len();
        world.run(600, |now| {
            let granted = grant_hour(Now {
                unix: now.unix - step,
                ..now
            })?;
            if granted.is_off(now) {
                Err(refusal())
            } else {
                Ok(granted)
            }
        });
        let asked = world.requests.len() - before;
        let most = if step.abs() <= 300 { 1 } else { 20 };
        assert!(
            asked <= most,
            "{asked} requests in 600 s after a step of {step} s"
        );
    }
}

#[test]
fn a_forward_step_past_the_planned_renewal_renews_at_once() {
    let mut world = World::with(&["web"]);
    world.run(100, grant_hour);
    world.now.unix += 3000;
    world.run(20, grant_hour);
    assert_eq!(
        world.requests.len(),
        2,
        "the certificate would have ended before its planned renewal"
    );
    let validity = world.row("web").validity.expect("renewed");
    assert!(validity.remaining(world.now) > Duration::from_secs(3500));
}

#[test]
fn absurdly_short_lives_are_renewed_at_most_once_a_second() {
    let mut world = World::with(&["web"]);
    world.run(60, |now| {
        Ok(Validity {
            not_before: now.unix,
            not_after: now.unix + 1,
        })
    });
    assert!(
        world.requests.len() <= 61,
        "{} requests in 60 s",
        world.requests.len()
    );
}

#[test]
fn while_the_authority_is_away_one_identity_probes_and_all_follow_its_return() {
    let names: Vec<String> = (0..100).map(|n| format!("app-{n}")).collect();
    let mut world = World::with(&names.iter().map(String::as_str).collect::<Vec<_>>());
    world.run(1200, |_| Err(outage()));
    let settled = world.requests.len();
    world.run(600, |_| Err(outage()));
    let asked = world.requests.len() - settled;
    assert!(asked < 600 / 20 + 100 * 7, "{asked} requests in 600 s");
    world.run(30, grant_hour);
    let missing = world
        .schedule
        .rows(world.now)
        .into_iter()
        .filter(|row| row.validity.is_none())
        .count();
    assert_eq!(
        missing, 0,
        "all have a certificate within 30 s, seed {SEED}"
    );
}

#[test]
fn one_refused_identity_does_not_disturb_another() {
    let mut world = World::with(&["web", "db"]);
    let now = world.now;
    let mut started = world.schedule.start(now);
    started.sort();
    assert_eq!(started, [identity("db"), identity("web")]);
    world.schedule.failed(&identity("db"), refusal(), now);
    world
        .schedule
        .succeeded(&identity("web"), grant_hour(now).expect("granted"), now);
    assert_eq!(
        (world.row("web").failures, world.row("db").failures),
        (0, 1)
    );
    assert!(
        world.row("web").next_in > Duration::from_secs(1600)
            && world.row("db").next_in < Duration::from_secs(1)
    );
}

#[test]
fn at_most_eight_requests_at_a_time_and_connections_come_first() {
    let names: Vec<String> = (0..20).map(|n| format!("app-{n}")).collect();
    let mut world = World::with(&names.iter().map(String::as_str).collect::<Vec<_>>());
    let now = world.now;
    assert_eq!(
        world.schedule.demand(&identity("urgent"), now),
        Demand::Wait
    );
    let started = world.schedule.start(now);
    assert_eq!(
        (started.len(), &started[0]),
        (IN_FLIGHT_MAX, &identity("urgent"))
    );
    assert!(
        world.schedule.start(now).is_empty(),
        "the limit holds while they are under way"
    );
    assert_eq!(
        world.schedule.demand(&identity("urgent"), now),
        Demand::Wait,
        "single flight"
    );
    world.schedule.failed(&started[0], refusal(), now);
    assert_eq!(world.schedule.start(now).len(), 1, "a slot is free again");
}

#[test]
fn a_connection_is_refused_during_backoff_and_may_ask_again_after_a_while() {
    let mut world = World::with(&["web"]);
    world.run(400, |_| Err(refusal()));
    let last = Duration::from_secs_f64(*world.times("web").last().expect("asked"));
    let early = Now {
        monotonic: last + Duration::from_secs(1),
        unix: NOW,
    };
    let Demand::Refuse(CertificateError::Waiting { last: reason, .. }) =
        world.schedule.demand(&identity("web"), early)
    else {
        panic!("must be refused at once")
    };
    assert_eq!(*reason, refusal());
    let late = Now {
        monotonic: last + DEMAND_SPACING,
        unix: NOW,
    };
    assert_eq!(world.schedule.demand(&identity("web"), late), Demand::Wait);
    assert_eq!(world.schedule.start(late), [identity("web")]);
}

#[test]
fn forgotten_identities_are_not_asked_for_and_late_answers_are_dropped() {
    let mut world = World::with(&["web", "db"]);
    let now = world.now;
    world.schedule.start(now);
    let gone = world.schedule.retain(&HashSet::from([&identity("web")]));
    assert_eq!(gone, [identity("db")]);
    assert!(
        !world
            .schedule
            .succeeded(&identity("db"), grant_hour(now).expect("granted"), now)
    );
    assert!(
        world
            .schedule
            .succeeded(&identity("web"), grant_hour(now).expect("granted"), now)
    );
    world.run(2000, grant_hour);
    assert!(
        world
            .requests
            .iter()
            .all(|(_, who)| *who == identity("web"))
    );
}

#[test]
fn the_number_of_identities_is_limited() {
    let mut world = World::new();
    let now = world.now;
    for n in 0..IDENTITIES_MAX {
        world
            .schedule
            .prefetch(&identity(&format!("app-{n}")), now)
            .expect("below the limit");
    }
    let full = CertificateError::TooMany(IDENTITIES_MAX);
    assert_eq!(
        world.schedule.prefetch(&identity("more"), now),
        Err(full.clone())
    );
    assert_eq!(
        world.schedule.demand(&identity("more"), now),
        Demand::Refuse(full)
    );
    assert_eq!(
        world.schedule.demand(&identity("app-0"), now),
        Demand::Wait,
        "known ones go on"
    );
}
