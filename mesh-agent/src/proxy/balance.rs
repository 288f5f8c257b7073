//! Which endpoint a connection goes to. Sans-IO and unshared: one instance per worker, so there is no lock; each worker
//! learns from its own connections.
//!
//! Of the nearest rank with a usable endpoint, two are drawn by weight and the one with the lower cost is taken; cost is
//! latency × (1 + connections in flight per unit of weight). Latency is a peak-EWMA of connect times: it jumps to a
//! peak at once and forgets it exponentially. An endpoint whose connect failed is put aside for a time that doubles
//! with each failure in a row; never so many that nothing is left.

use std::{
    collections::HashMap,
    net::SocketAddr,
    time::{Duration, Instant},
};

use rand::{Rng, SeedableRng, rngs::SmallRng};

use crate::discovery::model::Endpoint;

/// The limits of a [`Balancer`]. The defaults are for connections inside a data centre.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BalanceLimits {
    /// Most endpoints remembered. One costs some 100 bytes; an endpoint that is not remembered counts as idle and
    /// near, so a too small number costs balance and nothing else.
    pub tracked_max: usize,
    /// Time in which an old latency loses two thirds of its weight. Ten seconds outlast a garbage collection and
    /// forget a rollout.
    pub latency_decay: Duration,
    /// Latencies below this are equal: between two endpoints of one rack the difference is noise, and following it
    /// would send everything to one of them.
    pub latency_floor: Duration,
    /// How long the first failed connect puts an endpoint aside.
    pub aside_min: Duration,
    /// The longest that it is put aside.
    pub aside_max: Duration,
    /// Most endpoints of a service put aside at once, in percent, rounded down. Above this it is more likely that the
    /// fault is near us.
    pub aside_share_percent: usize,
}

impl Default for BalanceLimits {
    fn default() -> Self {
        Self {
            tracked_max: 4_096,
            latency_decay: Duration::from_secs(10),
            latency_floor: Duration::from_millis(1),
            aside_min: Duration::from_secs(1),
            aside_max: Duration::from_secs(30),
            aside_share_percent: 80,
        }
    }
}

/// Chooses endpoints and remembers how they did.
#[derive(Debug)]
pub struct Balancer {
    rng: SmallRng,
    limits: BalanceLimits,
    tracked: HashMap<SocketAddr, Track>,
    /// Until when an endpoint is not used. Apart from `tracked`, because it is usually empty and then costs nothing.
    aside: HashMap<SocketAddr, Instant>,
}

#[derive(Debug, Clone, Copy)]
struct Track {
    in_flight: u32,
    /// Peak-EWMA of connect times, in seconds, as of `observed`.
    latency_secs: f64,
    observed: Instant,
    /// Connects that failed since the last that succeeded.
    failures: u32,
}

impl Balancer {
    /// A balancer that knows nothing yet. Give every worker its own seed.
    #[must_use]
    pub fn new(seed: u64, limits: BalanceLimits) -> Self {
        Self {
            rng: SmallRng::seed_from_u64(seed),
            limits,
            tracked: HashMap::new(),
            aside: HashMap::new(),
        }
    }

    /// The index of the endpoint to dial, or `None` if there is none but `exclude` (the one that just failed).
    pub fn choose(
        &mut self,
        now: Instant,
        endpoints: &[Endpoint],
        exclude: Option<SocketAddr>,
    ) -> Option<usize> {
        self.aside.retain(|_, until| *until > now);
        let spared = self.spared(endpoints);
        let may = |e: &Endpoint| Some(e.address) != exclude;
        let usable = |e: &Endpoint| {
            may(e) && (!self.aside.contains_key(&e.address) || spared.contains(&e.address))
        };
        let candidates = nearest(endpoints, usable);
        // Everything but the excluded one is aside: dialling one of those is better than giving up.
        let candidates = if candidates.is_empty() {
            nearest(endpoints, may)
        } else {
            candidates
        };
        let first = self.draw(endpoints, &candidates, None)?;
        let Some(second) = self.draw(endpoints, &candidates, Some(first)) else {
            return Some(first);
        };
        let cost = |index: usize| endpoints.get(index).map_or(f64::MAX, |e| self.cost(now, e));
        Some(if cost(second) < cost(first) {
            second
        } else {
            first
        })
    }

    /// Those that are aside beyond the share allowed, the ones that come back soonest first.
    fn spared(&self, endpoints: &[Endpoint]) -> Vec<SocketAddr> {
        if self.aside.is_empty() {
            return Vec::new();
        }
        let until = |e: &Endpoint| self.aside.get(&e.address).map(|until| (*until, e.address));
        let mut aside: Vec<_> = endpoints.iter().filter_map(until).collect();
        let allowed = endpoints.len() * self.limits.aside_share_percent.min(100) / 100;
        aside.sort_unstable();
        aside.truncate(aside.len().saturating_sub(allowed));
        aside.into_iter().map(|(_, address)| address).collect()
    }

    /// Draws one of the candidates by weight, other than `except`.
    fn draw(
        &mut self,
        endpoints: &[Endpoint],
        candidates: &[usize],
        except: Option<usize>,
    ) -> Option<usize> {
        let weights = candidates
            .iter()
            .filter(|index| Some(**index) != except)
            .filter_map(|index| {
                endpoints
                    .get(*index)
                    .map(|endpoint| (*index, u64::from(endpoint.workload.capacity.max(1))))
            });
        let total: u64 = weights.clone().map(|(_, weight)| weight).sum();
        if total == 0 {
            return None;
        }
        let mut ticket = self.rng.random_range(0..total);
        for (index, weight) in weights {
            match ticket.checked_sub(weight) {
                Some(rest) => ticket = rest,
                None => return Some(index),
            }
        }
        None
    }

    fn cost(&self, now: Instant, endpoint: &Endpoint) -> f64 {
        let weight = f64::from(endpoint.workload.capacity.max(1));
        let floor = self.limits.latency_floor.as_secs_f64();
        let Some(track) = self.tracked.get(&endpoint.address) else {
            return floor;
        };
        let latency = track.latency_at(now, self.limits.latency_decay).max(floor);
        latency * (1.0 + f64::from(track.in_flight) / weight)
    }

    /// A connection to `address` is being opened.
    pub fn started(&mut self, now: Instant, address: SocketAddr) {
        if let Some(track) = self.track(now, address) {
            track.in_flight = track.in_flight.saturating_add(1);
        }
    }

    /// The connection stands, after `latency`. It stays in flight until [`Balancer::finished`].
    pub fn connected(&mut self, now: Instant, address: SocketAddr, latency: Duration) {
        self.aside.remove(&address);
        self.observe(now, address, latency);
        if let Some(track) = self.tracked.get_mut(&address) {
            track.failures = 0;
        }
    }

    fn observe(&mut self, now: Instant, address: SocketAddr, latency: Duration) {
        let decay = self.limits.latency_decay;
        if let Some(track) = self.tracked.get_mut(&address) {
            let (old, new) = (track.latency_at(now, decay), latency.as_secs_f64());
            // A peak counts at once; what is lower pulls the average down as time passes.
            let kept = track.weight_of_past(now, decay);
            track.latency_secs = if new > old {
                new
            } else {
                track.latency_secs * kept + new * (1.0 - kept)
            };
            track.observed = now;
        }
    }

    /// The connection could not be opened, which took `latency`; it is not in flight any more, and the endpoint is put
    /// aside. Time lost counts like the time of a slow connect: an endpoint that vanished without a word is then
    /// avoided for longer than one that refuses at once.
    pub fn failed(&mut self, now: Instant, address: SocketAddr, latency: Duration) {
        self.finished(address);
        self.observe(now, address, latency);
        let BalanceLimits {
            aside_min,
            aside_max,
            tracked_max,
            ..
        } = self.limits;
        let failures = self.track(now, address).map_or(1, |track| {
            track.failures = track.failures.saturating_add(1);
            track.failures
        });
        let doubled = aside_min.saturating_mul(1u32.checked_shl(failures - 1).unwrap_or(u32::MAX));
        // Jitter keeps the workers from all returning to a recovering endpoint at once.
        let time = doubled
            .min(aside_max)
            .mul_f64(self.rng.random_range(0.5..=1.0));
        if self.aside.len() >= tracked_max {
            self.aside.retain(|_, until| *until > now);
        }
        if self.aside.len() < tracked_max || self.aside.contains_key(&address) {
            self.aside.insert(address, now + time);
        }
    }

    /// A connection that stood has ended, or its opening was given up.
    pub fn finished(&mut self, address: SocketAddr) {
        if let Some(track) = self.tracked.get_mut(&address) {
            track.in_flight = track.in_flight.saturating_sub(1);
        }
    }

    /// How many endpoints are remembered.
    #[must_use]
    pub fn tracked(&self) -> usize {
        self.tracked.len()
    }

    /// How many endpoints are aside at `now`.
    #[must_use]
    pub fn aside(&self, now: Instant) -> usize {
        self.aside.values().filter(|until| **until > now).count()
    }

    /// The memory of an endpoint; `None` when all places are taken by endpoints with connections.
    fn track(&mut self, now: Instant, address: SocketAddr) -> Option<&mut Track> {
        if self.tracked.len() >= self.limits.tracked_max && !self.tracked.contains_key(&address) {
            self.forget_idle();
            if self.tracked.len() >= self.limits.tracked_max {
                return None;
            }
        }
        let fresh = Track {
            in_flight: 0,
            latency_secs: 0.0,
            observed: now,
            failures: 0,
        };
        Some(self.tracked.entry(address).or_insert(fresh))
    }

    /// Forgets the older half of the idle endpoints, so that the walk is paid once per many insertions.
    fn forget_idle(&mut self) {
        let idle = self
            .tracked
            .iter()
            .filter(|(_, track)| track.in_flight == 0);
        let mut idle: Vec<(Instant, SocketAddr)> = idle
            .map(|(address, track)| (track.observed, *address))
            .collect();
        idle.sort_unstable();
        for (_, address) in idle.iter().take(idle.len().div_ceil(2)) {
            self.tracked.remove(address);
        }
    }
}

impl Track {
    fn weight_of_past(&self, now: Instant, decay: Duration) -> f64 {
        let elapsed = now.saturating_duration_since(self.observed).as_secs_f64();
        (-elapsed / decay.as_secs_f64().max(f64::EPSILON)).exp()
    }

    /// An endpoint that is avoided for its latency is not measured again; forgetting gives it another chance.
    fn latency_at(&self, now: Instant, decay: Duration) -> f64 {
        self.latency_secs * self.weight_of_past(now, decay)
    }
}

/// The indices of the usable endpoints of the best rank that has any.
fn nearest(endpoints: &[Endpoint], usable: impl Fn(&Endpoint) -> bool) -> Vec<usize> {
    let Some(best) = endpoints.iter().filter(|e| usable(e)).map(|e| e.rank).min() else {
        return Vec::new();
    };
    let of_best = endpoints
        .iter()
        .enumerate()
        .filter(|(_, e)| e.rank == best && usable(e));
    of_best.map(|(index, _)| index).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::discovery::{
        MeshState,
        tests::{pod, put},
    };

    const SEED: u64 = 0xba1a;

    fn address(index: usize) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, u8::try_from(index).expect("few") + 1], 8080))
    }

    /// Endpoints with these (rank, weight), at `address(0)`, `address(1)`, and so on.
    fn endpoints(shape: &[(u8, u32)]) -> Vec<Endpoint> {
        let mut state = MeshState::new("");
        let endpoint = |(index, (rank, capacity)): (usize, &(u8, u32))| {
            let mut w = pod(&format!("p{index}"), &address(index).ip().to_string());
            w.capacity = Some(*capacity);
            put(&mut state, w);
            let workload = state
                .workload_by_address(address(index).ip())
                .expect("just put");
            let identities = Arc::new([workload.identity.clone()]);
            Endpoint {
                workload,
                address: address(index),
                identities,
                rank: *rank,
            }
        };
        shape.iter().enumerate().map(endpoint).collect()
    }

    fn balancer() -> Balancer {
        Balancer::new(SEED, BalanceLimits::default())
    }

    /// How often each endpoint is chosen for connections that end at once.
    fn shares(
        balancer: &mut Balancer,
        now: Instant,
        endpoints: &[Endpoint],
        rounds: usize,
    ) -> Vec<usize> {
        let mut counts = vec![0; endpoints.len()];
        for _ in 0..rounds {
            counts[balancer.choose(now, endpoints, None).expect("an endpoint")] += 1;
        }
        counts
    }

    fn fail(balancer: &mut Balancer, now: Instant, index: usize) {
        balancer.started(now, address(index));
        balancer.failed(now, address(index), Duration::ZERO);
    }

    #[test]
    fn nothing_to_choose_from_is_no_choice() {
        assert_eq!(balancer().choose(Instant::now(), &[], None), None);
    }

    #[test]
    fn idle_equal_endpoints_share_evenly() {
        let counts = shares(
            &mut balancer(),
            Instant::now(),
            &endpoints(&[(0, 1); 4]),
            4_000,
        );
        assert!(
            counts.iter().all(|count| (850..1_150).contains(count)),
            "{counts:?}, seed {SEED:#x}"
        );
    }

    #[test]
    fn idle_endpoints_share_by_weight() {
        let counts = shares(
            &mut balancer(),
            Instant::now(),
            &endpoints(&[(0, 1), (0, 3)]),
            4_000,
        );
        assert!(
            (850..1_150).contains(&counts[0]),
            "one in four: {counts:?}, seed {SEED:#x}"
        );
    }

    #[test]
    fn open_connections_level_out_by_weight() {
        let (now, endpoints, mut balancer) = (
            Instant::now(),
            endpoints(&[(0, 1), (0, 1), (0, 2)]),
            balancer(),
        );
        let mut open = [0u32; 3];
        for _ in 0..400 {
            let index = balancer.choose(now, &endpoints, None).expect("an endpoint");
            balancer.started(now, address(index));
            balancer.connected(now, address(index), Duration::from_micros(100));
            open[index] += 1;
        }
        assert!(
            open[0].abs_diff(100) <= 10 && open[1].abs_diff(100) <= 10,
            "{open:?}, seed {SEED:#x}"
        );
        (0..100).for_each(|_| balancer.finished(address(0)));
        let next = shares(&mut balancer, now, &endpoints[..2], 10);
        assert_eq!(next, [10, 0], "the one that was freed is preferred");
    }

    #[test]
    fn a_slow_endpoint_is_avoided_until_its_peak_is_forgotten() {
        let (now, endpoints, mut balancer) =
            (Instant::now(), endpoints(&[(0, 1), (0, 1)]), balancer());
        for (index, latency_ms) in [(0, 2), (1, 500)] {
            balancer.started(now, address(index));
            balancer.connected(now, address(index), Duration::from_millis(latency_ms));
            balancer.finished(address(index));
        }
        assert_eq!(shares(&mut balancer, now, &endpoints, 100), [100, 0]);
        let counts = shares(
            &mut balancer,
            now + Duration::from_secs(120),
            &endpoints,
            100,
        );
        assert!(counts[1] > 25, "it gets another chance: {counts:?}");
    }

    #[test]
    fn an_endpoint_that_fails_slowly_is_avoided_beyond_its_time_aside() {
        let (now, endpoints, mut balancer) =
            (Instant::now(), endpoints(&[(0, 1), (0, 1)]), balancer());
        balancer.started(now, address(0));
        balancer.failed(now, address(0), Duration::from_secs(2));
        let later = now + BalanceLimits::default().aside_min;
        assert_eq!(shares(&mut balancer, later, &endpoints, 100), [0, 100]);
        let later = now + Duration::from_secs(120);
        let counts = shares(&mut balancer, later, &endpoints, 100);
        assert!(counts[0] > 25, "it gets another chance: {counts:?}");
    }

    #[test]
    fn latencies_below_the_floor_are_equal() {
        let (now, endpoints, mut balancer) =
            (Instant::now(), endpoints(&[(0, 1), (0, 1)]), balancer());
        for (index, latency_us) in [(0, 80), (1, 900)] {
            balancer.started(now, address(index));
            balancer.connected(now, address(index), Duration::from_micros(latency_us));
            balancer.finished(address(index));
        }
        let counts = shares(&mut balancer, now, &endpoints, 1_000);
        assert!(
            (400..600).contains(&counts[0]),
            "{counts:?}, seed {SEED:#x}"
        );
    }

    #[test]
    fn farther_ranks_are_used_only_when_the_nearer_ones_are_aside() {
        let (now, endpoints, mut balancer) = (
            Instant::now(),
            endpoints(&[(0, 1), (1, 1), (2, 1)]),
            balancer(),
        );
        assert_eq!(shares(&mut balancer, now, &endpoints, 50), [50, 0, 0]);
        fail(&mut balancer, now, 0);
        assert_eq!(shares(&mut balancer, now, &endpoints, 50), [0, 50, 0]);
        fail(&mut balancer, now, 1);
        assert_eq!(shares(&mut balancer, now, &endpoints, 50), [0, 0, 50]);
        let later = now + BalanceLimits::default().aside_min;
        assert_eq!(
            shares(&mut balancer, later, &endpoints, 50),
            [50, 0, 0],
            "the nearest is back"
        );
    }

    #[test]
    fn the_excluded_endpoint_is_never_chosen() {
        let (now, endpoints, mut balancer) =
            (Instant::now(), endpoints(&[(0, 1), (1, 1)]), balancer());
        assert_eq!(balancer.choose(now, &endpoints, Some(address(0))), Some(1));
        assert_eq!(
            balancer.choose(now, &endpoints[..1], Some(address(0))),
            None
        );
        fail(&mut balancer, now, 1);
        assert_eq!(
            balancer.choose(now, &endpoints, Some(address(0))),
            Some(1),
            "aside is better than nothing"
        );
    }

    #[test]
    fn never_all_endpoints_are_aside() {
        for (count, usable) in [(1, 1), (2, 1), (5, 1), (10, 2)] {
            let (now, endpoints, mut balancer) =
                (Instant::now(), endpoints(&vec![(0, 1); count]), balancer());
            (0..count).for_each(|index| fail(&mut balancer, now, index));
            assert_eq!(balancer.aside(now), count);
            let chosen = shares(&mut balancer, now, &endpoints, 200);
            assert_eq!(
                chosen.iter().filter(|n| **n > 0).count(),
                usable,
                "of {count}: {chosen:?}"
            );
        }
    }

    #[test]
    fn the_time_aside_doubles_is_bounded_and_ends_with_success() {
        let limits = BalanceLimits::default();
        let (now, mut balancer) = (Instant::now(), balancer());
        for failure in 0..40u32 {
            fail(&mut balancer, now, 0);
            let full = limits
                .aside_min
                .saturating_mul(1 << failure.min(20))
                .min(limits.aside_max);
            let until = balancer.aside[&address(0)] - now;
            assert!(
                until >= full / 2 && until <= full,
                "failure {failure}: {until:?} of {full:?}"
            );
        }
        balancer.started(now, address(0));
        balancer.connected(now, address(0), Duration::from_millis(1));
        assert_eq!(balancer.aside(now), 0);
        balancer.finished(address(0));
        fail(&mut balancer, now, 0);
        assert!(
            balancer.aside[&address(0)] - now <= limits.aside_min,
            "the count starts again"
        );
    }

    #[test]
    fn memory_is_bounded_and_endpoints_in_use_are_kept() {
        let mut balancer = Balancer::new(
            SEED,
            BalanceLimits {
                tracked_max: 8,
                ..BalanceLimits::default()
            },
        );
        let start = Instant::now();
        balancer.started(start, address(0));
        for index in 1..200 {
            let now = start + Duration::from_millis(index as u64);
            fail(&mut balancer, now, index);
            assert!(balancer.tracked() <= 8 && balancer.aside.len() <= 8);
        }
        assert_eq!(
            balancer.tracked[&address(0)].in_flight,
            1,
            "it has a connection"
        );
        (1..8).for_each(|index| balancer.started(start, address(index)));
        balancer.started(start, address(100));
        assert_eq!(
            balancer.tracked(),
            8,
            "all are in use: the new one is not remembered"
        );
        assert!(!balancer.tracked.contains_key(&address(100)));
        balancer.finished(address(100));
    }
}
