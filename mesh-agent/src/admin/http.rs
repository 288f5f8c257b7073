//! The HTTP servers: metrics, readiness, admin. One request per connection, small and in bounded time.

use std::{
    convert::Infallible,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Body, Incoming},
    header::{ALLOW, CONTENT_TYPE, HOST, HeaderValue, ORIGIN},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use socket2::{Domain, Socket, Type};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    sync::Semaphore,
};
use tokio_util::sync::CancellationToken;

use super::{AdminAddresses, AdminState};
use crate::sys::netns::duplicate;

/// Connections of one server at a time; a scraper needs one, some probes another. Others wait in the backlog.
pub const CONNECTIONS_MAX: usize = 32;
/// Connections that wait to be accepted, per server.
pub const LISTEN_BACKLOG: i32 = 128;
/// From accepting to the end of the request's head.
pub const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// From accepting to the end of the answer: a scrape over a slow link must fit.
pub const CONNECTION_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest request head, bytes. hyper's own minimum.
pub const HEAD_MAX_BYTES: usize = 8 * 1024;
/// Most header lines.
pub const HEADERS_MAX: usize = 64;
/// Pause after a failed accept (out of descriptors): the failure does not go away by asking at once.
pub const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A server whose port could not be had.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot listen on {address} for {purpose}: {source}; is another agent running, or the port taken?"
)]
pub struct BindError {
    purpose: &'static str,
    address: SocketAddr,
    source: io::Error,
}

/// Which pages a server has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Site {
    /// `/metrics`, for everybody.
    Metrics,
    /// `/healthz/ready`, for everybody.
    Readiness,
    /// State and log level, for this machine.
    Admin,
}

/// The three servers, bound and not yet serving.
#[derive(Debug)]
pub struct AdminServers {
    sites: [(Site, TcpListener); 3],
}

impl AdminServers {
    /// Binds all three ports, or none.
    ///
    /// # Errors
    /// When a port is taken or the address is not this node's.
    pub async fn bind(addresses: AdminAddresses) -> Result<Self, BindError> {
        Ok(Self {
            sites: [
                (Site::Metrics, bind("metrics", addresses.metrics)?),
                (Site::Readiness, bind("readiness", addresses.readiness)?),
                (Site::Admin, bind("admin", addresses.admin)?),
            ],
        })
    }

    /// Where they listen: useful when port 0 was asked for.
    ///
    /// # Errors
    /// Those of `getsockname(2)`.
    pub fn addresses(&self) -> io::Result<AdminAddresses> {
        let [metrics, readiness, admin] = &self.sites;
        Ok(AdminAddresses {
            metrics: metrics.1.local_addr()?,
            readiness: readiness.1.local_addr()?,
            admin: admin.1.local_addr()?,
        })
    }

    /// Takes over the listeners of an agent that serves `theirs` (in the order metrics, readiness, admin), where `ours`
    /// are the same; the others are bound.
    ///
    /// # Errors
    /// As for [`AdminServers::bind`].
    pub async fn inherit(
        ours: AdminAddresses,
        theirs: [SocketAddr; 3],
        listeners: [OwnedFd; 3],
    ) -> Result<Self, BindError> {
        let inherit = |purpose, address, their_address, listener: OwnedFd| {
            if address != their_address {
                return bind(purpose, address);
            }
            let listener = std::net::TcpListener::from(listener);
            TcpListener::from_std(listener).map_err(|source| BindError {
                purpose,
                address,
                source,
            })
        };
        let [metrics, readiness, admin] = listeners;
        let metrics = inherit("metrics", ours.metrics, theirs[0], metrics)?;
        let readiness = inherit("readiness", ours.readiness, theirs[1], readiness)?;
        let admin = inherit("admin", ours.admin, theirs[2], admin)?;
        Ok(Self {
            sites: [
                (Site::Metrics, metrics),
                (Site::Readiness, readiness),
                (Site::Admin, admin),
            ],
        })
    }

    /// Copies of the listeners of metrics, readiness and admin, for an agent that takes over.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn copies(&self) -> io::Result<[OwnedFd; 3]> {
        let [metrics, readiness, admin] = &self.sites;
        Ok([
            duplicate(metrics.1.as_fd())?,
            duplicate(readiness.1.as_fd())?,
            duplicate(admin.1.as_fd())?,
        ])
    }

    /// Serves until another agent does, which `handed_over` says; what was accepted is still answered.
    pub async fn serve(self, state: Arc<dyn AdminState>, handed_over: CancellationToken) {
        let [a, b, c] = self
            .sites
            .map(|(site, listener)| serve(site, listener, state.clone(), handed_over.clone()));
        tokio::join!(a, b, c);
    }
}

fn bind(purpose: &'static str, address: SocketAddr) -> Result<TcpListener, BindError> {
    listen(address).map_err(|source| BindError {
        purpose,
        address,
        source,
    })
}

/// Listens on `address`. `[::]` is both families, and IPv4 alone where the node has no IPv6.
fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let everywhere = address.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED);
    match listen_on(address, everywhere) {
        Err(error) if everywhere && without_ipv6(&error) => {
            listen_on((Ipv4Addr::UNSPECIFIED, address.port()).into(), false)
        }
        result => result,
    }
}

/// IPv6 is not in the kernel, or switched off (`net.ipv6.conf.all.disable_ipv6`).
fn without_ipv6(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)
    )
}

fn listen_on(address: SocketAddr, both_families: bool) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    if both_families {
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(LISTEN_BACKLOG)?;
    TcpListener::from_std(socket.into())
}

async fn serve(
    site: Site,
    listener: TcpListener,
    state: Arc<dyn AdminState>,
    handed_over: CancellationToken,
) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let next = async {
            // A slot first: what is not accepted waits in the kernel's bounded backlog.
            let slot = slots.clone().acquire_owned().await;
            (slot, listener.accept().await)
        };
        let Some((Ok(slot), accepted)) = handed_over.run_until_cancelled(next).await else {
            break;
        };
        while connections.try_join_next().is_some() {}
        match accepted {
            Ok((stream, _)) => {
                let state = state.clone();
                connections.spawn(async move {
                    connection(site, stream, state).await;
                    drop(slot);
                });
            }
            Err(error) => {
                tracing::warn!(?site, %error, "cannot accept");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

/// Answers the one request of a connection, within [`CONNECTION_TIMEOUT`].
pub async fn connection(
    site: Site,
    stream: impl AsyncRead + AsyncWrite + Unpin + Send,
    state: Arc<dyn AdminState>,
) {
    let service = service_fn(|request| {
        let answer = answer(site, &request, &*state);
        async move { Ok::<_, Infallible>(answer) }
    });
    let serving = http1::Builder::new()
        .keep_alive(false)
        .max_buf_size(HEAD_MAX_BYTES)
        .max_headers(HEADERS_MAX)
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service);
    match tokio::time::timeout(CONNECTION_TIMEOUT, serving).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(?site, %error, "request broke off"),
        Err(_) => tracing::debug!(?site, "request took too long"),
    }
}

type Answer = Response<Full<Bytes>>;

fn answer(site: Site, request: &Request<Incoming>, state: &dyn AdminState) -> Answer {
    if !request.body().is_end_stream() {
        return text(
            StatusCode::PAYLOAD_TOO_LARGE,
            "no request here has a body\n",
        );
    }
    if site == Site::Admin && !is_asked_by_this_machine(request) {
        return text(
            StatusCode::FORBIDDEN,
            "admin is asked by a loopback address or localhost, and not by web pages\n",
        );
    }
    let (path, query) = (
        request.uri().path(),
        request.uri().query().unwrap_or_default(),
    );
    let get = matches!(*request.method(), Method::GET | Method::HEAD);
    match (site, path) {
        (Site::Metrics, "/metrics" | "/stats/prometheus") if get => metrics(state),
        (Site::Readiness, "/healthz/ready") if get => readiness(state),
        (Site::Admin, "/healthz/live") if get => text(StatusCode::OK, "live\n"),
        (Site::Admin, "/config_dump") if get => json(&state.config()),
        (Site::Admin, "/dump") if get => json(&state.dump()),
        (Site::Admin, "/logging") if *request.method() == Method::POST => set_filter(query, state),
        // A query on GET is a change asked for with the wrong method: it must not look as if it had worked.
        (Site::Admin, "/logging") if get && query.is_empty() => {
            text(StatusCode::OK, &(state.log_filter() + "\n"))
        }
        (Site::Admin, "/logging") => not_allowed("GET without a query, POST"),
        (Site::Metrics, "/metrics" | "/stats/prometheus")
        | (Site::Readiness, "/healthz/ready")
        | (Site::Admin, "/healthz/live" | "/config_dump" | "/dump") => not_allowed("GET"),
        (Site::Metrics, _) => text(StatusCode::NOT_FOUND, "there is /metrics here\n"),
        (Site::Readiness, _) => text(StatusCode::NOT_FOUND, "there is /healthz/ready here\n"),
        (Site::Admin, _) => text(
            StatusCode::NOT_FOUND,
            "there are /config_dump, /dump, /logging, /healthz/live here\n",
        ),
    }
}

/// Whether the request names this machine the way a program on it does. A browser on this machine may be made to ask
/// loopback under a name of somebody else's (DNS rebinding: the name is then in `Host`, RFC 9110 section 7.2) or for a
/// page of somebody else (`Origin`, RFC 6454 section 7).
fn is_asked_by_this_machine<B>(request: &Request<B>) -> bool {
    let headers = request.headers();
    let target = request
        .uri()
        .authority()
        .is_none_or(|authority| names_this_machine(authority.as_str()));
    let hosts = headers
        .get_all(HOST)
        .iter()
        .all(|host| host.to_str().is_ok_and(names_this_machine));
    target && hosts && !headers.contains_key(ORIGIN)
}

/// `localhost` or a loopback address, with or without a port.
fn names_this_machine(authority: &str) -> bool {
    let host = match authority.strip_prefix('[') {
        Some(rest) => rest.split_once(']').map_or(rest, |(host, _)| host),
        None => authority
            .split_once(':')
            .map_or(authority, |(host, _)| host),
    };
    host.eq_ignore_ascii_case("localhost")
        || host
            .parse::<IpAddr>()
            .is_ok_and(|address| address.to_canonical().is_loopback())
}

fn metrics(state: &dyn AdminState) -> Answer {
    let mut answer = text(StatusCode::OK, &state.metrics());
    let format = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    answer.headers_mut().insert(CONTENT_TYPE, format);
    answer
}

fn readiness(state: &dyn AdminState) -> Answer {
    let pending = state.pending();
    if pending.is_empty() {
        return text(StatusCode::OK, "ready\n");
    }
    text(
        StatusCode::SERVICE_UNAVAILABLE,
        &format!("waiting for: {}\n", pending.join(", ")),
    )
}

/// `level=<filter>`. Filters hold `=` and `,`, which may stand unescaped in a query (RFC 3986 section 3.4).
fn set_filter(query: &str, state: &dyn AdminState) -> Answer {
    let Some(filter) = query
        .strip_prefix("level=")
        .filter(|filter| !filter.is_empty())
    else {
        return text(
            StatusCode::BAD_REQUEST,
            "say POST /logging?level=FILTER, for example level=info,access=off\n",
        );
    };
    let Some(filter) = percent_decode(filter) else {
        return text(
            StatusCode::BAD_REQUEST,
            "the filter is not well-formed percent-encoded UTF-8\n",
        );
    };
    match state.set_log_filter(&filter) {
        Ok(()) => text(StatusCode::OK, &(state.log_filter() + "\n")),
        Err(message) => text(StatusCode::BAD_REQUEST, &(message + "\n")),
    }
}

/// RFC 3986 section 2.1.
fn percent_decode(text: &str) -> Option<String> {
    let mut bytes = text.bytes();
    let mut decoded = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            decoded.push(byte);
            continue;
        }
        let (high, low) = (
            char::from(bytes.next()?).to_digit(16)?,
            char::from(bytes.next()?).to_digit(16)?,
        );
        decoded.push(u8::try_from(high * 16 + low).ok()?);
    }
    String::from_utf8(decoded).ok()
}

fn json(value: &serde_json::Value) -> Answer {
    let mut answer = text(StatusCode::OK, &format!("{value:#}\n"));
    answer
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    answer
}

fn not_allowed(methods: &'static str) -> Answer {
    let mut answer = text(StatusCode::METHOD_NOT_ALLOWED, &format!("only {methods}\n"));
    let allow = if methods == "GET" { "GET" } else { "GET, POST" };
    answer
        .headers_mut()
        .insert(ALLOW, HeaderValue::from_static(allow));
    answer
}

fn text(status: StatusCode, body: &str) -> Answer {
    let mut answer = Response::new(Full::new(Bytes::copy_from_slice(body.as_bytes())));
    *answer.status_mut() = status;
    answer.headers_mut().insert(
        CONTENT_TYPE,
        HeaderValue::from_static("text/plain; charset=utf-8"),
    );
    answer
}

#[cfg(test)]
mod tests;
