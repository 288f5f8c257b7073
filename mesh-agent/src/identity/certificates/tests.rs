//! The whole of it with a scripted authority and paused time.

use std::sync::atomic::Ordering;

use futures::future::BoxFuture;
use rand::SeedableRng;

use super::*;
use crate::identity::testing::{NOW, TestCa, certify, handshake, identity};

/// The control plane's `BACKDATE`, seconds.
const BACKDATE_S: i64 = 300;

/// Both clocks follow tokio's paused time; the wall clock can be set.
#[derive(Debug)]
struct PausedClock {
    start: tokio::time::Instant,
    step: std::sync::atomic::AtomicI64,
}

impl PausedClock {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            start: tokio::time::Instant::now(),
            step: 0.into(),
        })
    }
}

impl Clock for PausedClock {
    fn monotonic(&self) -> Duration {
        self.start.elapsed()
    }

    fn unix(&self) -> i64 {
        self.right() + self.step.load(Ordering::Relaxed)
    }
}

impl PausedClock {
    /// What the clocks of everybody else show.
    fn right(&self) -> i64 {
        NOW + i64::try_from(self.start.elapsed().as_secs()).expect("small")
    }

    fn set_wrong_by(&self, seconds: i64) {
        self.step.store(seconds, Ordering::Relaxed);
    }
}

/// Answers after a second; what it does can be changed.
struct Script {
    clock: Arc<PausedClock>,
    behaviour: Mutex<Behaviour>,
    asked: Mutex<Vec<Identity>>,
}

#[derive(Clone)]
enum Behaviour {
    Sign(Arc<TestCa>, i64),
    /// By a clock that is right, backdated.
    SignRight(Arc<TestCa>, i64),
    Fail(CertificateError),
    Panic,
    Hang,
}

impl Script {
    fn set(&self, behaviour: Behaviour) {
        *self.behaviour.lock().expect("not poisoned") = behaviour;
    }

    fn asked(&self) -> usize {
        self.asked.lock().expect("not poisoned").len()
    }
}

impl Authority for Script {
    fn sign<'a>(
        &'a self,
        identity: &'a Identity,
        request: String,
    ) -> BoxFuture<'a, Result<Vec<String>, CertificateError>> {
        Box::pin(async move {
            self.asked
                .lock()
                .expect("not poisoned")
                .push(identity.clone());
            tokio::time::sleep(Duration::from_secs(1)).await;
            let behaviour = self.behaviour.lock().expect("not poisoned").clone();
            match behaviour {
                Behaviour::Sign(ca, life) => {
                    Ok(ca.sign(&request, self.clock.unix() - 60, self.clock.unix() + life))
                }
                Behaviour::SignRight(ca, life) => {
                    let right = self.clock.right();
                    Ok(ca.sign(&request, right - BACKDATE_S, right + life))
                }
                Behaviour::Fail(error) => Err(error),
                Behaviour::Panic => panic!("scripted"),
                Behaviour::Hang => std::future::pending().await,
            }
        })
    }
}

struct Node {
    certificates: Certificates,
    script: Arc<Script>,
    clock: Arc<PausedClock>,
    telemetry: Arc<Telemetry>,
}

fn node(behaviour: Behaviour) -> Node {
    let (clock, telemetry) = (PausedClock::new(), Telemetry::new("test"));
    let script = Script {
        clock: clock.clone(),
        behaviour: Mutex::new(behaviour),
        asked: Mutex::default(),
    };
    let script = Arc::new(script);
    let parts = Parts {
        authority: script.clone(),
        trust_domain: "cluster.local".into(),
        clock: clock.clone(),
        random: StdRng::seed_from_u64(7),
        telemetry: telemetry.clone(),
    };
    Node {
        certificates: Certificates::spawn(parts, &Handle::current()),
        script,
        clock,
        telemetry,
    }
}

fn signing(life: i64) -> (Node, Arc<TestCa>) {
    let ca = Arc::new(TestCa::new("mesh"));
    (node(Behaviour::Sign(ca.clone(), life)), ca)
}

fn outage() -> CertificateError {
    CertificateError::Unreachable {
        address: "ca".to_owned(),
        detail: "down".to_owned(),
    }
}

async fn pass(seconds: u64) {
    tokio::time::sleep(Duration::from_secs(seconds)).await;
}

#[tokio::test(start_paused = true)]
async fn fifty_connections_share_one_request() {
    let (node, _) = signing(3600);
    let get = || {
        let certificates = node.certificates.clone();
        tokio::spawn(async move { certificates.get(&identity("web")).await })
    };
    let waiting: Vec<_> = (0..50).map(|_| get()).collect();
    let mut fingerprints = HashSet::new();
    for task in waiting {
        let certified = task.await.expect("no panic").expect("a certificate");
        fingerprints.insert(Arc::as_ptr(&certified));
    }
    assert_eq!((fingerprints.len(), node.script.asked()), (1, 1));
    assert!(node.certificates.current(&identity("web")).is_some());
}

#[tokio::test(start_paused = true)]
async fn prefetch_renews_at_half_life_without_anybody_asking() {
    let (node, _) = signing(3600);
    node.certificates.retain(&[identity("web"), identity("db")]);
    pass(2).await;
    let first = node
        .certificates
        .current(&identity("web"))
        .expect("prefetched");
    pass(2100).await;
    let second = node
        .certificates
        .current(&identity("web"))
        .expect("renewed");
    assert!(second.not_after > first.not_after);
    assert_eq!(
        node.script.asked(),
        4,
        "two identities, once each and one renewal each"
    );
}

#[tokio::test(start_paused = true)]
async fn authority_down_keeps_the_certificate_and_after_its_end_refuses() {
    let (node, ca) = signing(3600);
    let first = node
        .certificates
        .get(&identity("web"))
        .await
        .expect("a certificate");
    node.script.set(Behaviour::Fail(outage()));
    pass(3240).await;
    assert!(Arc::ptr_eq(
        &first,
        &node.certificates.get(&identity("web")).await.expect("kept")
    ));
    let status = node.certificates.status().remove(0);
    assert_eq!(status.state, CertificateState::RenewalFailing);
    assert!(
        status
            .last_error
            .expect("named")
            .contains("is the control plane running?")
    );
    pass(400).await;
    assert!(node.certificates.current(&identity("web")).is_none());
    assert!(node.certificates.get(&identity("web")).await.is_err());
    assert_eq!(
        node.certificates.status()[0].state,
        CertificateState::Expired
    );
    node.script.set(Behaviour::Sign(ca, 3600));
    pass(30).await;
    assert!(
        node.certificates.current(&identity("web")).is_some(),
        "back within 30 s"
    );
}

#[tokio::test(start_paused = true)]
async fn connections_fail_at_once_while_the_authority_refuses() {
    let refusal = CertificateError::Refused {
        code: "PermissionDenied".to_owned(),
        message: "no".to_owned(),
    };
    let node = node(Behaviour::Fail(refusal.clone()));
    assert_eq!(
        node.certificates.get(&identity("web")).await.err(),
        Some(refusal.clone())
    );
    let before = tokio::time::Instant::now();
    let error = node
        .certificates
        .get(&identity("web"))
        .await
        .expect_err("refused");
    assert!(matches!(error, CertificateError::Waiting { last, .. } if *last == refusal));
    assert_eq!(before.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn a_hanging_authority_holds_a_connection_for_a_bounded_time() {
    let node = node(Behaviour::Hang);
    let before = tokio::time::Instant::now();
    assert_eq!(
        node.certificates.get(&identity("web")).await.err(),
        Some(CertificateError::TimedOut(identity("web")))
    );
    assert_eq!(before.elapsed().as_secs(), GET_TIMEOUT.as_secs());
}

#[tokio::test(start_paused = true)]
async fn a_panic_in_a_request_is_a_failure_like_any_other() {
    let node = node(Behaviour::Panic);
    let error = node
        .certificates
        .get(&identity("web"))
        .await
        .expect_err("no certificate");
    assert!(matches!(error, CertificateError::BrokenOff(_)));
    node.script
        .set(Behaviour::Sign(Arc::new(TestCa::new("mesh")), 3600));
    pass(5).await;
    assert!(
        node.certificates.current(&identity("web")).is_some(),
        "the next attempt works"
    );
}

#[tokio::test(start_paused = true)]
async fn a_new_root_is_believed_by_all_at_once_and_the_old_one_until_all_have_renewed() {
    let (node, old) = signing(3600);
    node.certificates.retain(&[identity("web"), identity("db")]);
    pass(2).await;
    let before = node
        .certificates
        .current(&identity("web"))
        .expect("prefetched");
    let new = Arc::new(TestCa::new("new"));
    node.script.set(Behaviour::Sign(new.clone(), 3600));
    node.certificates
        .get(&identity("cache"))
        .await
        .expect("the new authority's");
    let (web, cache) = (
        node.certificates.current(&identity("web")).expect("valid"),
        node.certificates
            .current(&identity("cache"))
            .expect("valid"),
    );
    assert_eq!(web.roots_fingerprint, cache.roots_fingerprint);
    assert_ne!(web.roots_fingerprint, before.roots_fingerprint);
    let roots = |certified: &Certified| certified.parameters.roots.certificates().to_vec();
    assert!(roots(&web).contains(&old.root()) && roots(&web).contains(&new.root()));
    pass(2100).await;
    let web = node
        .certificates
        .current(&identity("web"))
        .expect("renewed");
    assert_eq!(
        roots(&web),
        [new.root()],
        "the old root is gone with the last certificate that came with it"
    );
}

#[tokio::test(start_paused = true)]
async fn forgotten_identities_lose_their_certificate_and_their_metric() {
    let (node, _) = signing(3600);
    node.certificates.retain(&[identity("web"), identity("db")]);
    pass(2).await;
    assert!(node.telemetry.render().contains(
        "weft_certificate_expiry_seconds{identity=\"spiffe://cluster.local/ns/shop/sa/db\"}"
    ));
    node.certificates.retain(&[identity("web")]);
    assert!(node.certificates.current(&identity("db")).is_none());
    assert!(node.certificates.current(&identity("web")).is_some());
    assert_eq!(node.certificates.status().len(), 1);
    assert!(!node.telemetry.render().contains("sa/db"));
}

#[tokio::test(start_paused = true)]
async fn an_identity_of_a_foreign_trust_domain_is_never_asked_for() {
    let (node, _) = signing(3600);
    let foreign: Identity = "spiffe://elsewhere/ns/shop/sa/web".parse().expect("valid");
    node.certificates.retain(std::slice::from_ref(&foreign));
    let error = node.certificates.get(&foreign).await.expect_err("refused");
    assert!(matches!(error, CertificateError::ForeignTrustDomain { .. }) && !error.is_retryable());
    pass(5).await;
    assert_eq!(node.script.asked(), 0);
}

/// Whether the node and a peer whose clock is right believe each other, in both directions.
fn believed_both_ways(node: &Node, ca: &TestCa) -> bool {
    let (right, peer) = (node.clock.right(), identity("peer"));
    let material = ca.material(
        &[&peer.to_string()],
        right - BACKDATE_S,
        right - BACKDATE_S + 3600,
    );
    let peer = certify(&material, right);
    let Some(own) = node.certificates.current(&identity("web")) else {
        return false;
    };
    [(&*own, &peer), (&peer, &*own)]
        .into_iter()
        .all(|(client, server)| {
            let expected = Arc::from([server.identity.clone()]);
            let ended = handshake(client.client(expected), server.server.clone());
            ended.client.is_ok() && ended.server.is_ok()
        })
}

#[tokio::test(start_paused = true)]
async fn clocks_five_minutes_off_are_not_noticed() {
    for wrong_by in [BACKDATE_S, -BACKDATE_S] {
        let ca = Arc::new(TestCa::new("mesh"));
        let node = node(Behaviour::SignRight(ca.clone(), 3600));
        node.clock.set_wrong_by(wrong_by);
        node.certificates.retain(&[identity("web")]);
        pass(2).await;
        for second in (0..3 * 3600).step_by(60) {
            assert!(
                believed_both_ways(&node, &ca),
                "{wrong_by} s off, refused after {second} s: {:?}",
                node.certificates.status()
            );
            pass(60).await;
        }
        let asked = node.script.asked();
        assert!((6..=9).contains(&asked), "{asked} requests in three hours");
    }
}

#[tokio::test(start_paused = true)]
async fn a_clock_that_jumps_refuses_without_a_loop_and_works_again_when_set_right() {
    for wrong_by in [48 * 3600, -3600] {
        let ca = Arc::new(TestCa::new("mesh"));
        let node = node(Behaviour::SignRight(ca.clone(), 6 * 3600));
        node.certificates
            .get(&identity("web"))
            .await
            .expect("a certificate");
        node.clock.set_wrong_by(wrong_by);
        let before = node.script.asked();
        pass(600).await;
        assert!(!believed_both_ways(&node, &ca), "{wrong_by} s off");
        let asked = node.script.asked() - before;
        assert!(
            (1..=20).contains(&asked),
            "{wrong_by} s off: {asked} requests in 600 s"
        );
        let error = node.certificates.status()[0]
            .last_error
            .clone()
            .expect("named");
        assert!(error.contains("check both clocks"), "{error}");
        assert_eq!(
            error.matches("+00:00").count(),
            2,
            "both times are told: {error}"
        );
        node.clock.set_wrong_by(0);
        assert!(believed_both_ways(&node, &ca), "what was valid is valid");
    }
}

#[tokio::test(start_paused = true)]
async fn a_jump_that_the_authority_makes_too_is_answered_by_one_renewal() {
    for jump in [48 * 3600, -3600] {
        let (node, _ca) = signing(3600);
        node.certificates
            .get(&identity("web"))
            .await
            .expect("a certificate");
        node.clock.set_wrong_by(jump);
        pass(15).await;
        let now = node.clock.unix();
        let renewed = node
            .certificates
            .current(&identity("web"))
            .expect("renewed");
        assert!((now - 75..=now).contains(&renewed.not_before), "{jump} s");
        pass(600).await;
        assert_eq!(node.script.asked(), 2, "{jump} s");
    }
}

#[tokio::test(start_paused = true)]
async fn what_the_control_plane_signs_is_accepted_by_clocks_that_are_five_minutes_off() {
    use mesh_control::ca::{Authority, SigningRequest};
    let right = NOW.unsigned_abs();
    let at = SystemTime::UNIX_EPOCH + Duration::from_secs(right);
    let hour = Duration::from_secs(3600);
    let authority = Authority::ephemeral("cluster.local", hour, at).expect("made");
    let (key, web) = (NodeKey::generate().expect("a key"), identity("web"));
    let request = key.certificate_request(&web).expect("a request");
    let request = SigningRequest::from_pem(&request).expect("accepted");
    let signed = authority.sign(&request, &web, None, at).expect("signed");
    let judge = |wrong_by: i64| {
        let accepted = accept(&signed.chain, &key, &web, NOW + wrong_by);
        accepted.map(|_| ()).map_err(|error| error.to_string())
    };
    for wrong_by in [0, BACKDATE_S, -BACKDATE_S] {
        assert_eq!(judge(wrong_by), Ok(()), "{wrong_by} s");
    }
    for (wrong_by, what) in [(48 * 3600, "ends at"), (-3600, "begins at")] {
        let error = judge(wrong_by).expect_err("refused");
        assert!(error.contains(what) && error.contains("here"), "{error}");
    }
}

#[tokio::test(start_paused = true)]
async fn requests_and_failures_are_counted() {
    let node = node(Behaviour::Fail(outage()));
    let _ = node.certificates.get(&identity("web")).await;
    let text = node.telemetry.render();
    assert!(
        text.contains("weft_certificate_requests_total 1\n")
            && text.contains("weft_certificate_failures_total 1\n")
    );
}
