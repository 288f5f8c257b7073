use serde_json::{Value, json};

use super::*;
use crate::kube::{api::Deadlines, fake::FakeApi, objects::KubePod};

const PODS: &str = KubePod::RESOURCE.path;

fn pod(name: &str, ip: &str) -> Value {
    json!({
        "metadata": {"name": name, "namespace": "shop"},
        "spec": {"nodeName": "n1", "containers": []},
        "status": {"phase": "Running", "podIP": ip},
    })
}

/// A reflector of pods, and what it says.
struct Following {
    fake: FakeApi,
    events: mpsc::Receiver<(Kind, Event)>,
    metrics: KubeMetrics,
    _stop: watch::Sender<bool>,
}

impl Following {
    fn begin(fake: &FakeApi, api: Api) -> Self {
        let (events, received) = mpsc::channel(64);
        let (stop, on_stop) = watch::channel(false);
        let metrics = KubeMetrics::new(&prometheus::Registry::new()).expect("registered");
        let dice = Dice::fixed(0.0);
        tokio::spawn(reflect::<KubePod>(
            api,
            events,
            metrics.clone(),
            dice,
            on_stop,
        ));
        Self {
            fake: fake.clone(),
            events: received,
            metrics,
            _stop: stop,
        }
    }

    /// The next `count` events: `begin`, `=name` (listed), `end`, `+name`, `-name`.
    async fn next(&mut self, count: usize) -> Vec<String> {
        let mut said = Vec::new();
        for _ in 0..count {
            let event = tokio::time::timeout(Duration::from_secs(30), self.events.recv());
            let (_, event) = event.await.expect("in time").expect("it runs");
            said.push(match event {
                Event::Begin => "begin".to_owned(),
                Event::Listed(item) => format!("={}", item.key.name),
                Event::End => "end".to_owned(),
                Event::Upsert(item) => format!("+{}", item.key.name),
                Event::Delete(key) => format!("-{}", key.name),
            });
        }
        said
    }

    /// Waits until the server has seen a watch begin after the `seen` ones.
    async fn watching(&self, seen: usize) {
        self.fake.until(|fake| fake.requests("watch") > seen).await;
    }
}

#[tokio::test]
async fn a_list_comes_in_pages_and_changes_follow_it() {
    let fake = FakeApi::start().await;
    for name in ["a", "b", "c"] {
        fake.put(PODS, pod(name, "10.0.0.1"));
    }
    fake.set_page_max(2);
    let mut following = Following::begin(&fake, fake.api());
    assert_eq!(following.next(5).await, ["begin", "=a", "=b", "=c", "end"]);
    assert_eq!(fake.requests("continue"), 1);
    assert_eq!(
        fake.requests("status.phase"),
        2,
        "ended pods are not asked for"
    );
    fake.put(PODS, pod("d", "10.0.0.4"));
    fake.put(PODS, pod("a", "10.0.0.9"));
    fake.delete(PODS, "shop", "b");
    assert_eq!(following.next(3).await, ["+d", "+a", "-b"]);
}

#[tokio::test]
async fn a_watch_that_breaks_is_resumed_where_it_was() {
    let fake = FakeApi::start().await;
    fake.put(PODS, pod("a", "10.0.0.1"));
    let mut following = Following::begin(&fake, fake.api());
    following.next(3).await;
    following.watching(0).await;
    fake.put(PODS, pod("b", "10.0.0.2"));
    assert_eq!(following.next(1).await, ["+b"]);
    fake.cut();
    fake.put(PODS, pod("c", "10.0.0.3"));
    assert_eq!(
        following.next(1).await,
        ["+c"],
        "neither lost nor told twice"
    );
    assert_eq!(fake.requests("limit"), 1, "nothing was listed again");
}

#[tokio::test]
async fn a_bookmark_moves_the_place_to_resume_from() {
    let fake = FakeApi::start().await;
    let mut following = Following::begin(&fake, fake.api());
    following.next(2).await;
    following.watching(0).await;
    fake.bookmark(PODS);
    fake.put(PODS, pod("a", "10.0.0.1"));
    assert_eq!(following.next(1).await, ["+a"]);
    fake.forget();
    fake.bookmark(PODS);
    // After the bookmark the watch can be resumed although earlier versions are forgotten.
    fake.put(PODS, pod("b", "10.0.0.2"));
    following.next(1).await;
    fake.cut();
    following.watching(1).await;
    fake.put(PODS, pod("c", "10.0.0.3"));
    assert_eq!(following.next(1).await, ["+c"]);
    assert_eq!(
        following.metrics.relists.with_label_values(&["Pod"]).get(),
        0
    );
}

#[tokio::test]
async fn what_the_server_has_forgotten_is_listed_again() {
    let fake = FakeApi::start().await;
    fake.put(PODS, pod("a", "10.0.0.1"));
    let mut following = Following::begin(&fake, fake.api());
    following.next(3).await;
    following.watching(0).await;
    fake.delete(PODS, "shop", "a");
    fake.put(PODS, pod("b", "10.0.0.2"));
    assert_eq!(following.next(2).await, ["-a", "+b"]);
    fake.forget();
    fake.cut();
    assert_eq!(following.next(3).await, ["begin", "=b", "end"]);
    assert_eq!(
        following.metrics.relists.with_label_values(&["Pod"]).get(),
        1
    );
}

#[tokio::test]
async fn a_list_that_expires_between_pages_begins_anew() {
    let fake = FakeApi::start().await;
    fake.set_page_max(1);
    fake.put(PODS, pod("a", "10.0.0.1"));
    fake.put(PODS, pod("b", "10.0.0.2"));
    let (events, received) = mpsc::channel(1);
    let (_stop, on_stop) = watch::channel(false);
    let metrics = KubeMetrics::new(&prometheus::Registry::new()).expect("registered");
    let api = fake.api();
    // The queue takes one event: the second page is asked for only when the first was taken.
    tokio::spawn(reflect::<KubePod>(
        api,
        events,
        metrics.clone(),
        Dice::fixed(0.0),
        on_stop,
    ));
    let mut following = Following {
        fake: fake.clone(),
        events: received,
        metrics,
        _stop: watch::channel(false).0,
    };
    fake.until(|fake| fake.requests("limit") == 1).await;
    fake.forget();
    let said = following.next(6).await;
    assert_eq!(said, ["begin", "=a", "begin", "=a", "=b", "end"]);
}

#[tokio::test]
async fn failures_are_retried_and_counted() {
    let fake = FakeApi::start().await;
    fake.put(PODS, pod("a", "10.0.0.1"));
    for code in [500, 429, 403] {
        fake.fail(PODS, code);
    }
    let mut following = Following::begin(&fake, fake.api());
    let said = following.next(6).await;
    assert_eq!(said, ["begin", "begin", "begin", "begin", "=a", "end"]);
    let errors = following.metrics.errors.with_label_values(&["Pod"]);
    assert_eq!(errors.get(), 3);
}

#[tokio::test]
async fn a_version_that_the_server_never_reaches_is_given_up() {
    let fake = FakeApi::start().await;
    fake.put(PODS, pod("a", "10.0.0.1"));
    let mut following = Following::begin(&fake, fake.api());
    following.next(3).await;
    following.watching(0).await;
    for code in [429, 504, 500, 504, 504] {
        fake.fail(PODS, code);
    }
    fake.cut();
    assert_eq!(following.next(3).await, ["begin", "=a", "end"]);
    assert_eq!(
        fake.requests("watch"),
        6,
        "an overloaded server is not listed"
    );
}

#[tokio::test]
async fn a_server_that_was_away_is_followed_on() {
    let fake = FakeApi::start().await;
    fake.put(PODS, pod("a", "10.0.0.1"));
    let mut following = Following::begin(&fake, fake.api());
    following.next(3).await;
    following.watching(0).await;
    fake.go_down().await;
    fake.put(PODS, pod("b", "10.0.0.2"));
    fake.come_back();
    assert_eq!(following.next(1).await, ["+b"]);
    assert_eq!(fake.requests("limit"), 1);
}

#[tokio::test]
async fn a_silent_watch_is_taken_up_again() {
    let fake = FakeApi::start().await;
    let api = fake.api_with(Deadlines {
        answer: Duration::from_secs(5),
        watch_idle: Duration::from_millis(50),
    });
    let mut following = Following::begin(&fake, api);
    following.next(2).await;
    following.watching(2).await;
    fake.put(PODS, pod("a", "10.0.0.1"));
    assert_eq!(following.next(1).await, ["+a"]);
    assert_eq!(
        following.metrics.errors.with_label_values(&["Pod"]).get(),
        0
    );
}

#[test]
fn what_is_missing_is_said() {
    use crate::kube::objects::KubeMeshPolicy;
    let absent = ApiError::NotFound("page not found".into());
    let text = complaint::<KubeMeshPolicy>("list", &absent);
    assert!(text.contains("CustomResourceDefinitions"), "{text}");
    let forbidden = ApiError::Forbidden("cannot list resource \"pods\"".into());
    let text = complaint::<KubePod>("list", &forbidden);
    assert!(
        text.contains("ClusterRole") && text.contains("pods"),
        "{text}"
    );
}
