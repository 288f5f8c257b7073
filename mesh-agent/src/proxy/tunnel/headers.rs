//! What a CONNECT request and its answer say: the authority, and the headers `baggage`, `forwarded` and
//! `traceparent`. Everything here is read from a peer and may be hostile: parsing is strict, and never panics.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use http::{HeaderMap, HeaderValue, header::HeaderName};
use rand::RngCore;

use crate::discovery::model::Workload;

/// Labels of the source (request) or of the destination (response).
pub const BAGGAGE: HeaderName = HeaderName::from_static("baggage");
/// Who asked, for telemetry only (RFC 7239).
pub const FORWARDED: HeaderName = HeaderName::from_static("forwarded");
/// Names the connection in logs (W3C Trace Context).
pub const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// Longest host name (RFC 1035 section 2.3.4, without the root's dot).
const HOST_MAX_BYTES: usize = 253;
/// Longest label of a host name (RFC 1035 section 2.3.4).
const LABEL_MAX_BYTES: usize = 63;
/// Longest authority: a host name, a colon and a port.
const AUTHORITY_MAX_BYTES: usize = HOST_MAX_BYTES + 6;
/// Length of a version 00 traceparent.
const TRACEPARENT_BYTES: usize = 55;
/// Longest `forwarded` value that is looked at.
const FORWARDED_MAX_BYTES: usize = 1024;

/// The target that a CONNECT request names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Authority {
    /// An address, IPv4-mapped ones in IPv4 form.
    Address(SocketAddr),
    /// A host name in lower case, and a port.
    Host(String, u16),
}

/// Why an authority is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AuthorityError {
    /// Longer than any address or host name.
    #[error("authority is too long")]
    TooLong,
    /// No port, or not a decimal number from 1 to 65535 without sign or leading zero.
    #[error("authority has no usable port")]
    Port,
    /// Neither an address in canonical notation nor a host name.
    #[error("authority has no usable host")]
    Host,
}

/// Reads `ip:port`, `[ipv6]:port` or `hostname:port`.
///
/// # Errors
/// For everything else, in particular other notations of addresses, which two parsers could read differently.
pub fn parse_authority(text: &str) -> Result<Authority, AuthorityError> {
    if text.len() > AUTHORITY_MAX_BYTES {
        return Err(AuthorityError::TooLong);
    }
    if let Some(rest) = text.strip_prefix('[') {
        let (host, port) = rest.split_once("]:").ok_or(AuthorityError::Port)?;
        let address: Ipv6Addr = host.parse().map_err(|_| AuthorityError::Host)?;
        return Ok(Authority::Address(SocketAddr::new(
            IpAddr::V6(address).to_canonical(),
            parse_port(port)?,
        )));
    }
    let (host, port) = text.rsplit_once(':').ok_or(AuthorityError::Port)?;
    let port = parse_port(port)?;
    if let Ok(address) = host.parse::<Ipv4Addr>() {
        return Ok(Authority::Address(SocketAddr::new(address.into(), port)));
    }
    check_host(host)?;
    Ok(Authority::Host(host.to_ascii_lowercase(), port))
}

fn parse_port(text: &str) -> Result<u16, AuthorityError> {
    if text.is_empty() || text.starts_with('0') || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(AuthorityError::Port);
    }
    text.parse().map_err(|_| AuthorityError::Port)
}

/// A host name of letters, digits, dashes and underscores whose last label cannot be taken for a number: `0x7f.1`,
/// `127.1`, `2130706433` and the like are addresses to some resolvers (inet_aton), so they are no host names here.
fn check_host(host: &str) -> Result<(), AuthorityError> {
    let usable = |label: &str| {
        !label.is_empty()
            && label.len() <= LABEL_MAX_BYTES
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
    };
    let last = host.rsplit('.').next().unwrap_or_default();
    let numeric =
        last.bytes().all(|byte| byte.is_ascii_digit()) || last.get(..2).is_some_and(is_hex_prefix);
    if host.len() > HOST_MAX_BYTES || numeric || !host.split('.').all(usable) {
        return Err(AuthorityError::Host);
    }
    Ok(())
}

fn is_hex_prefix(text: &str) -> bool {
    text.eq_ignore_ascii_case("0x")
}

/// The `baggage` of a workload: Istio's keys, in Istio's order, empty values left out.
#[must_use]
pub fn baggage(workload: &Workload) -> Option<HeaderValue> {
    let name_key = format!("k8s.{}.name", workload.workload_type);
    let pairs = [
        ("k8s.cluster.name", &*workload.cluster),
        ("k8s.namespace.name", &*workload.namespace),
        (name_key.as_str(), &*workload.workload_name),
        ("service.name", &*workload.canonical_name),
        ("service.version", &*workload.canonical_revision),
        ("cloud.region", &*workload.locality.region),
        ("cloud.availability_zone", &*workload.locality.zone),
    ];
    let mut text = String::with_capacity(160);
    for (key, value) in pairs {
        // Values are not escaped on the wire, so one that would need it is left out.
        let plain = value
            .bytes()
            .all(|byte| byte.is_ascii_graphic() && !matches!(byte, b',' | b';' | b'='));
        if value.is_empty() || !plain {
            continue;
        }
        if !text.is_empty() {
            text.push(',');
        }
        text.push_str(key);
        text.push('=');
        text.push_str(value);
    }
    if text.is_empty() {
        None
    } else {
        HeaderValue::try_from(text).ok()
    }
}

/// The `forwarded` header: the client's address, and the service that it dialled, if it was one.
#[must_use]
pub fn forwarded(client: SocketAddr, service: Option<&str>) -> Option<HeaderValue> {
    let text = match service {
        Some(host) => format!("for=\"{client}\";host={host}"),
        None => format!("for=\"{client}\""),
    };
    HeaderValue::try_from(text).ok()
}

/// The `host=` element of a `forwarded` header: a host name that telemetry may show, nothing more.
#[must_use]
pub fn forwarded_host(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(FORWARDED)?.to_str().ok()?;
    if value.len() > FORWARDED_MAX_BYTES {
        return None;
    }
    let host = value.split([';', ',']).find_map(|element| {
        let (key, value) = element.trim().split_once('=')?;
        key.eq_ignore_ascii_case("host").then_some(value)
    })?;
    let host = host
        .strip_prefix('"')
        .and_then(|host| host.strip_suffix('"'))
        .unwrap_or(host);
    check_host(host).is_ok().then_some(host)
}

/// A connection's name in logs across nodes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct TraceParent {
    trace: u128,
    parent: u64,
}

impl TraceParent {
    /// A new one; neither part is zero (W3C Trace Context section 3.2.2).
    pub fn random(random: &mut impl RngCore) -> Self {
        let trace = (u128::from(random.next_u64()) << 64) | u128::from(random.next_u64());
        Self {
            trace: trace.max(1),
            parent: random.next_u64().max(1),
        }
    }

    /// The one of a request, if it is well formed.
    #[must_use]
    pub fn from_headers(headers: &HeaderMap) -> Option<Self> {
        Self::parse(headers.get(TRACEPARENT)?.to_str().ok()?)
    }

    fn parse(text: &str) -> Option<Self> {
        if text.len() != TRACEPARENT_BYTES {
            return None;
        }
        let mut parts = text.split('-');
        let (version, trace, parent, flags) =
            (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let lower_hex = |text: &str| {
            text.bytes()
                .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
        };
        let shaped = version == "00" && trace.len() == 32 && parent.len() == 16 && flags.len() == 2;
        if !shaped
            || parts.next().is_some()
            || !lower_hex(trace)
            || !lower_hex(parent)
            || !lower_hex(flags)
        {
            return None;
        }
        let trace = u128::from_str_radix(trace, 16)
            .ok()
            .filter(|trace| *trace != 0)?;
        let parent = u64::from_str_radix(parent, 16)
            .ok()
            .filter(|parent| *parent != 0)?;
        Some(Self { trace, parent })
    }

    /// As a header.
    #[must_use]
    pub fn header(&self) -> Option<HeaderValue> {
        HeaderValue::try_from(self.to_string()).ok()
    }
}

impl fmt::Display for TraceParent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{:032x}-{:016x}-00", self.trace, self.parent)
    }
}

impl fmt::Debug for TraceParent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use rand::{SeedableRng, rngs::StdRng};

    use super::*;

    #[test]
    fn reads_the_three_forms() {
        for (text, expected) in [
            (
                "10.1.0.5:8080",
                Authority::Address("10.1.0.5:8080".parse().expect("literal")),
            ),
            (
                "[fd00::5]:1",
                Authority::Address("[fd00::5]:1".parse().expect("literal")),
            ),
            (
                "[::ffff:10.1.0.5]:65535",
                Authority::Address("10.1.0.5:65535".parse().expect("literal")),
            ),
            (
                "[::ffff:a01:5]:80",
                Authority::Address("10.1.0.5:80".parse().expect("literal")),
            ),
            (
                "Cart.Shop.svc:80",
                Authority::Host("cart.shop.svc".into(), 80),
            ),
            ("cart:80", Authority::Host("cart".into(), 80)),
        ] {
            assert_eq!(parse_authority(text), Ok(expected), "{text:?}");
        }
    }

    #[test]
    fn refuses_hostile_authorities() {
        let long_label = format!("{}.svc:80", "a".repeat(64));
        let long = format!("{}:80", "a.".repeat(400));
        for text in [
            "",
            ":",
            ":80",
            "10.1.0.5",
            "10.1.0.5:",
            "10.1.0.5:0",
            "10.1.0.5:00080",
            "10.1.0.5:080",
            "10.1.0.5:+80",
            "10.1.0.5:-1",
            "10.1.0.5:65536",
            "10.1.0.5:99999999999999999999",
            "10.1.0.5:80 ",
            "10.1.0.5:80:80",
            "10.1.0.5:8o",
            "10.1.0.5.:80",
            "10.1.0.5..:80",
            "010.1.0.5:80",
            "10.1.0.0x5:80",
            "0x0a010005:80",
            "0xA.1.0.5:80",
            "167837701:80",
            "10.1.5:80",
            "10.1.0.256:80",
            "10.1.0.5.6:80",
            "127.1:80",
            "::1:80",
            "fd00::5:80",
            "[fd00::5]",
            "[fd00::5]80",
            "[fd00::5]:",
            "[fd00::5%eth0]:80",
            "[fe80::1%251]:80",
            "[10.1.0.5]:80",
            "[cart]:80",
            "[[fd00::5]]:80",
            "[fd00::5:80",
            "fd00::5]:80",
            "[::ffff:010.1.0.5]:80",
            "cart.:80",
            ".cart:80",
            "cart..shop:80",
            "-cart:80",
            "cart-:80",
            "user@cart:80",
            "http://cart:80",
            "cart/:80",
            "ca rt:80",
            "cart\0:80",
            "cárt:80",
            "*.shop:80",
            long_label.as_str(),
            long.as_str(),
        ] {
            assert!(parse_authority(text).is_err(), "{text:?} must be refused");
        }
    }

    #[test]
    fn a_trace_parent_survives_the_wire() {
        let trace = TraceParent::random(&mut StdRng::seed_from_u64(7));
        let text = trace.to_string();
        assert_eq!(text.len(), TRACEPARENT_BYTES);
        assert_eq!(TraceParent::parse(&text), Some(trace));
    }

    #[test]
    fn malformed_trace_parents_are_not_read() {
        for text in [
            "",
            "00-00000000000000000000000000000000-0000000000000001-00",
            "00-00000000000000000000000000000001-0000000000000000-00",
            "01-00000000000000000000000000000001-0000000000000001-00",
            "00-0000000000000000000000000000000G-0000000000000001-00",
            "00-0000000000000000000000000000000A-0000000000000001-00",
            "00-00000000000000000000000000000001-0000000000000001-0",
            "00-00000000000000000000000000000001-0000000000000001-00-",
            "00_00000000000000000000000000000001-0000000000000001-00",
            "00-+0000000000000000000000000000001-0000000000000001-00",
            "00-0000000000000000000000000000000-00000000000000001-00",
        ] {
            assert_eq!(TraceParent::parse(text), None, "{text:?}");
        }
    }

    #[test]
    fn forwarded_names_the_service_only_when_it_is_a_host_name() {
        let mut headers = HeaderMap::new();
        for (value, expected) in [
            (
                "for=\"10.1.0.5:4\";host=cart.shop.svc",
                Some("cart.shop.svc"),
            ),
            ("for=\"10.1.0.5:4\"; Host=\"cart\"", Some("cart")),
            ("for=\"10.1.0.5:4\"", None),
            ("host=", None),
            ("host=10.1.0.5", None),
            ("host=a b", None),
            ("host", None),
        ] {
            headers.insert(FORWARDED, HeaderValue::from_static(value));
            assert_eq!(forwarded_host(&headers), expected, "{value:?}");
        }
        let client = "[fd00::5]:4".parse().expect("literal");
        headers.insert(
            FORWARDED,
            forwarded(client, Some("cart.shop.svc")).expect("plain"),
        );
        assert_eq!(headers[FORWARDED], "for=\"[fd00::5]:4\";host=cart.shop.svc");
        assert_eq!(forwarded_host(&headers), Some("cart.shop.svc"));
    }

    #[test]
    fn baggage_has_the_keys_in_order_and_no_values_that_would_need_escaping() {
        let mut workload = crate::proxy::testing::workload("cart", "10.1.0.5");
        workload.canonical_revision = "v1,k8s.namespace.name=other".into();
        let value = baggage(&workload).expect("not empty");
        assert_eq!(
            value,
            "k8s.cluster.name=c1,k8s.namespace.name=shop,k8s.deployment.name=cart,service.name=cart"
        );
    }
}
