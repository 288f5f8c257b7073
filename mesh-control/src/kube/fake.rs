//! A small API server in this process: enough of lists, watches, writes and failures to test the client against.

use std::{
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::stream::{self, StreamExt as _};
use http_body_util::{BodyExt as _, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Frame, Incoming},
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::{
    net::TcpListener,
    sync::{broadcast, watch},
};

use super::api::{Api, Deadlines};

type Body = UnsyncBoxBody<Bytes, std::io::Error>;

/// Collection (`/api/v1/pods`), namespace and name.
type Place = (String, String, String);

#[derive(Debug, Clone)]
struct Logged {
    version: u64,
    collection: String,
    event: Value,
}

#[derive(Default)]
struct State {
    objects: BTreeMap<Place, Value>,
    version: u64,
    log: Vec<Logged>,
    /// Versions up to this one cannot be watched from.
    forgotten: u64,
    /// Objects per page, where the client asks for more.
    page_max: Option<usize>,
    /// Answers to give instead of the right one, by what the path begins with.
    faults: Vec<(String, u16)>,
    /// Requests so far, `METHOD path?query`.
    requests: Vec<String>,
    /// What reviews of tokens say, by token.
    tokens: BTreeMap<String, Value>,
    /// Collections that do not exist.
    absent: BTreeSet<String>,
}

/// The server. Cheap to clone; it runs as long as the test's runtime.
#[derive(Clone)]
pub(super) struct FakeApi {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
    events: broadcast::Sender<Logged>,
    /// Grows when every watch is to be cut.
    cuts: Arc<watch::Sender<u64>>,
    /// Connections are closed at once.
    down: Arc<watch::Sender<bool>>,
    /// Grows with every request.
    served: Arc<watch::Sender<u64>>,
    /// Connections that are open.
    open: Arc<AtomicUsize>,
}

impl FakeApi {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let fake = Self {
            address: listener.local_addr().expect("bound"),
            state: Arc::default(),
            events: broadcast::Sender::new(1024),
            cuts: Arc::new(watch::Sender::new(0)),
            down: Arc::new(watch::Sender::new(false)),
            served: Arc::new(watch::Sender::new(0)),
            open: Arc::default(),
        };
        let server = fake.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                if *server.down.borrow() {
                    continue;
                }
                let server = server.clone();
                server.open.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(async move {
                    let mut down = server.down.subscribe();
                    let answering = server.clone();
                    let service = service_fn(move |request| {
                        let server = answering.clone();
                        async move { Ok::<_, Infallible>(server.answer(request).await) }
                    });
                    let serving = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service);
                    tokio::select! {
                        _ = serving => {}
                        _ = down.wait_for(|down| *down) => {}
                    }
                    server.open.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        fake
    }

    /// A client of it with short deadlines.
    pub fn api(&self) -> Api {
        self.api_with(Deadlines {
            answer: Duration::from_secs(5),
            watch_idle: Duration::from_secs(30),
        })
    }

    pub fn api_with(&self, deadlines: Deadlines) -> Api {
        let url = format!("http://{}", self.address).parse().expect("a URL");
        Api::of_config(kube::Config::new(url), deadlines).expect("a client")
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Creates or replaces an object.
    pub fn put(&self, collection: &str, mut object: Value) {
        let place = place_of(collection, &object);
        let mut state = self.lock();
        state.version += 1;
        let version = state.version;
        object["metadata"]["resourceVersion"] = json!(version.to_string());
        if object["metadata"]["uid"].is_null() {
            let uid = format!("uid-{}-{}", place.1, place.2);
            object["metadata"]["uid"] = json!(uid);
        }
        let old = state.objects.insert(place, object.clone());
        let kind = if old.is_some() { "MODIFIED" } else { "ADDED" };
        self.log(
            &mut state,
            collection,
            json!({"type": kind, "object": object}),
        );
    }

    /// Deletes an object.
    pub fn delete(&self, collection: &str, namespace: &str, name: &str) {
        let place = (collection.to_owned(), namespace.to_owned(), name.to_owned());
        let mut state = self.lock();
        let Some(mut object) = state.objects.remove(&place) else {
            return;
        };
        state.version += 1;
        object["metadata"]["resourceVersion"] = json!(state.version.to_string());
        self.log(
            &mut state,
            collection,
            json!({"type": "DELETED", "object": object}),
        );
    }

    /// Sends a bookmark on every watch of a collection.
    pub fn bookmark(&self, collection: &str) {
        let mut state = self.lock();
        state.version += 1;
        let object = json!({"kind": "Pod", "apiVersion": "v1", "metadata": {"resourceVersion": state.version.to_string()}});
        self.log(
            &mut state,
            collection,
            json!({"type": "BOOKMARK", "object": object}),
        );
    }

    fn log(&self, state: &mut State, collection: &str, event: Value) {
        let logged = Logged {
            version: state.version,
            collection: collection.to_owned(),
            event,
        };
        state.log.push(logged.clone());
        // Nobody may be watching.
        let _ = self.events.send(logged);
    }

    /// An object as it is now.
    pub fn get(&self, collection: &str, namespace: &str, name: &str) -> Option<Value> {
        let place = (collection.to_owned(), namespace.to_owned(), name.to_owned());
        self.lock().objects.get(&place).cloned()
    }

    /// Number of objects of a collection.
    pub fn count(&self, collection: &str) -> usize {
        let state = self.lock();
        state
            .objects
            .keys()
            .filter(|place| place.0 == collection)
            .count()
    }

    /// No earlier version can be watched from any more.
    pub fn forget(&self) {
        let mut state = self.lock();
        state.version += 1;
        state.forgotten = state.version;
    }

    pub fn set_page_max(&self, page_max: usize) {
        self.lock().page_max = Some(page_max);
    }

    /// Answers the next request whose path begins with `path` with `code`.
    pub fn fail(&self, path: &str, code: u16) {
        self.lock().faults.push((path.to_owned(), code));
    }

    /// Breaks every connection that watches.
    pub fn cut(&self) {
        self.cuts.send_modify(|cuts| *cuts += 1);
    }

    /// Closes every connection, and each that comes from now on.
    pub async fn go_down(&self) {
        self.down.send_replace(true);
        let open = self.open.clone();
        self.until(|_| open.load(Ordering::SeqCst) == 0).await;
    }

    pub fn come_back(&self) {
        self.down.send_replace(false);
    }

    /// Whether a collection exists.
    pub fn set_absent(&self, collection: &str, absent: bool) {
        let mut state = self.lock();
        if absent {
            state.absent.insert(collection.to_owned());
        } else {
            state.absent.remove(collection);
        }
    }

    pub fn set_token(&self, token: &str, status: Value) {
        self.lock().tokens.insert(token.to_owned(), status);
    }

    /// Requests so far that contain `text`.
    pub fn requests(&self, text: &str) -> usize {
        let state = self.lock();
        state.requests.iter().filter(|it| it.contains(text)).count()
    }

    /// Waits until `done` holds, which is looked at after every request and every 10 ms of the test's clock.
    pub async fn until(&self, mut done: impl FnMut(&Self) -> bool) {
        let mut served = self.served.subscribe();
        let all = async {
            while !done(self) {
                let look = tokio::time::timeout(Duration::from_millis(10), served.changed());
                let _ = look.await;
            }
        };
        let deadline = Duration::from_secs(60);
        tokio::time::timeout(deadline, all)
            .await
            .expect("it happens");
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<Body> {
        let method = request.method().clone();
        let path = request.uri().path().to_owned();
        let query: BTreeMap<String, String> = request
            .uri()
            .query()
            .unwrap_or_default()
            .split('&')
            .filter_map(|pair| pair.split_once('='))
            .map(|(key, value)| (key.to_owned(), value.replace("%3A", ":")))
            .collect();
        let body = request
            .into_body()
            .collect()
            .await
            .map(|body| body.to_bytes());
        let body: Value = body
            .ok()
            .and_then(|body| serde_json::from_slice(&body).ok())
            .unwrap_or_default();
        let response = self.respond(&method, &path, &query, body);
        self.served.send_modify(|served| *served += 1);
        response
    }

    fn respond(
        &self,
        method: &Method,
        path: &str,
        query: &BTreeMap<String, String>,
        body: Value,
    ) -> Response<Body> {
        let target = Target::of(path);
        {
            let mut state = self.lock();
            state.requests.push(format!("{method} {path}?{query:?}"));
            let fault = state
                .faults
                .iter()
                .position(|(prefix, _)| path.starts_with(prefix.as_str()));
            if let Some(index) = fault {
                let (_, code) = state.faults.remove(index);
                return refused(code, "as the test wants it");
            }
            if state.absent.contains(&target.collection) {
                return refused(404, "the server could not find the requested resource");
            }
        }
        match (method, &target.name) {
            (&Method::GET, None) if query.contains_key("watch") => {
                self.watch(&target.collection, query)
            }
            (&Method::GET, None) => self.list(&target.collection, query),
            (&Method::GET, Some(name)) => {
                match self.get(&target.collection, &target.namespace, name) {
                    Some(object) => json_body(200, &object),
                    None => refused(404, name),
                }
            }
            (&Method::POST, _) if path.ends_with("/tokenreviews") => self.review(body),
            (&Method::POST, _) => self.create(&target, body),
            (&Method::PUT, Some(name)) => self.replace(&target, name, body),
            (&Method::PATCH, Some(name)) => self.patch(&target, name, body),
            (&Method::DELETE, Some(name)) => {
                self.delete(&target.collection, &target.namespace, name);
                json_body(200, &json!({"kind": "Status", "status": "Success"}))
            }
            _ => refused(405, path),
        }
    }

    fn list(&self, collection: &str, query: &BTreeMap<String, String>) -> Response<Body> {
        let state = self.lock();
        let asked = query.get("limit").and_then(|limit| limit.parse().ok());
        let limit: usize = state.page_max.or(asked).unwrap_or(usize::MAX);
        let (version, start) = match query.get("continue").and_then(|it| it.split_once(':')) {
            None => (state.version, 0),
            Some((version, start)) => {
                let version: u64 = version.parse().expect("ours");
                if version < state.forgotten {
                    return refused(410, "the provided continue parameter is too old");
                }
                (version, start.parse().expect("ours"))
            }
        };
        let all = state
            .objects
            .iter()
            .filter(|(place, _)| place.0 == collection);
        let all: Vec<_> = all.map(|(_, object)| object.clone()).collect();
        let end = all.len().min(start + limit);
        let more = (end < all.len()).then(|| format!("{version}:{end}"));
        let page = json!({
            "kind": "List", "apiVersion": "v1",
            "metadata": {"resourceVersion": version.to_string(), "continue": more.unwrap_or_default()},
            "items": all.get(start..end).unwrap_or_default(),
        });
        json_body(200, &page)
    }

    fn watch(&self, collection: &str, query: &BTreeMap<String, String>) -> Response<Body> {
        let state = self.lock();
        let from: u64 = query["resourceVersion"].parse().expect("a version of ours");
        if from < state.forgotten {
            let status = json!({"kind": "Status", "status": "Failure", "code": 410, "reason": "Expired", "message": "too old"});
            return json_body(200, &json!({"type": "ERROR", "object": status}));
        }
        let past: Vec<_> = state
            .log
            .iter()
            .filter(|it| it.version > from)
            .cloned()
            .collect();
        let (events, mut cuts) = (self.events.subscribe(), self.cuts.subscribe());
        cuts.mark_unchanged();
        let wanted = collection.to_owned();
        let future = stream::unfold(events, |mut events| async {
            events.recv().await.ok().map(|event| (event, events))
        });
        let lines = stream::iter(past)
            .chain(future)
            .filter(move |it| std::future::ready(it.collection == wanted))
            .map(|it| Ok(Frame::data(Bytes::from(format!("{}\n", it.event)))));
        let cut = stream::once(async move {
            let _ = cuts.changed().await;
            Err(std::io::Error::other("cut"))
        });
        let body = stream::select(lines, cut);
        Response::new(StreamBody::new(Box::pin(body)).boxed_unsync())
    }

    fn create(&self, target: &Target, object: Value) -> Response<Body> {
        let place = place_of(&target.collection, &object);
        if self.lock().objects.contains_key(&place) {
            return refused(409, "already exists");
        }
        self.put(&target.collection, object);
        let made = self.get(&place.0, &place.1, &place.2);
        json_body(201, &made.unwrap_or_default())
    }

    fn replace(&self, target: &Target, name: &str, object: Value) -> Response<Body> {
        let Some(present) = self.get(&target.collection, &target.namespace, name) else {
            return refused(404, name);
        };
        let version = &object["metadata"]["resourceVersion"];
        if !version.is_null() && *version != present["metadata"]["resourceVersion"] {
            return refused(409, "the object has been modified");
        }
        self.put(&target.collection, object);
        let now = self.get(&target.collection, &target.namespace, name);
        json_body(200, &now.unwrap_or_default())
    }

    fn patch(&self, target: &Target, name: &str, patch: Value) -> Response<Body> {
        let Some(mut object) = self.get(&target.collection, &target.namespace, name) else {
            return refused(404, name);
        };
        for (field, value) in patch.as_object().into_iter().flatten() {
            object[field] = value.clone();
        }
        self.put(&target.collection, object.clone());
        json_body(200, &object)
    }

    fn review(&self, mut review: Value) -> Response<Body> {
        let token = review["spec"]["token"].as_str().unwrap_or_default();
        let status = self.lock().tokens.get(token).cloned();
        review["status"] =
            status.unwrap_or_else(|| json!({"authenticated": false, "error": "unknown"}));
        json_body(201, &review)
    }
}

/// What a path means.
struct Target {
    collection: String,
    namespace: String,
    name: Option<String>,
}

impl Target {
    fn of(path: &str) -> Self {
        let parts: Vec<_> = path.trim_matches('/').split('/').collect();
        let prefix = if parts[0] == "api" { 2 } else { 3 };
        let (prefix, rest) = parts.split_at(prefix.min(parts.len()));
        let (namespace, rest) = match rest {
            ["namespaces", namespace, rest @ ..] if !rest.is_empty() => (*namespace, rest),
            rest => ("", rest),
        };
        Self {
            collection: format!("/{}/{}", prefix.join("/"), rest.first().unwrap_or(&"")),
            namespace: namespace.to_owned(),
            name: rest.get(1).map(ToString::to_string),
        }
    }
}

fn place_of(collection: &str, object: &Value) -> Place {
    let text = |field: &str| {
        object["metadata"][field]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    };
    (collection.to_owned(), text("namespace"), text("name"))
}

fn json_body(code: u16, value: &Value) -> Response<Body> {
    let body = Full::new(Bytes::from(format!("{value}\n"))).map_err(|never| match never {});
    let mut response = Response::new(body.boxed_unsync());
    *response.status_mut() = StatusCode::from_u16(code).expect("a status");
    response
}

fn refused(code: u16, message: &str) -> Response<Body> {
    let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "message": message, "reason": ""});
    json_body(code, &status)
}
