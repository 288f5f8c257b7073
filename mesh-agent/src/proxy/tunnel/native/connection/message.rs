//! Requests and responses as header lists (RFC 9113 sections 8.1 to 8.3 and 8.5).

use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, Uri, request::Parts};

use super::super::hpack::{DecodeError, Decoder, field_size};

/// Headers of HTTP/1 that have no meaning here (section 8.2.2).
const CONNECTION_HEADERS: [&[u8]; 5] = [
    b"connection",
    b"keep-alive",
    b"proxy-connection",
    b"transfer-encoding",
    b"upgrade",
];

/// A decoded header list. It is always decoded to its end, because the decoder's state depends on it.
#[derive(Debug, Default)]
pub struct Message {
    method: Option<Vec<u8>>,
    scheme: bool,
    path: bool,
    authority: Option<Vec<u8>>,
    status: Option<Vec<u8>>,
    headers: HeaderMap,
    size: usize,
    limit: usize,
    malformed: bool,
}

/// What is wrong with a message whose block was decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Malformed (section 8.1.1).
    Malformed,
    /// More header list than we take.
    TooLarge,
}

impl Message {
    /// Decodes a block; fields beyond `limit` bytes are dropped.
    ///
    /// # Errors
    /// When the block cannot be decoded.
    pub fn decode(decoder: &mut Decoder, block: &[u8], limit: usize) -> Result<Self, DecodeError> {
        let mut message = Self {
            limit,
            ..Self::default()
        };
        decoder.decode(block, |name, value| message.add(name, value))?;
        Ok(message)
    }

    fn add(&mut self, name: &[u8], value: &[u8]) {
        self.size = self.size.saturating_add(field_size(name, value));
        if self.size > self.limit || self.malformed {
            return;
        }
        if let Some(pseudo) = name.strip_prefix(b":") {
            // Section 8.3: before all others, each at most once.
            let repeated = match pseudo {
                b"method" => self.method.replace(value.to_vec()).is_some(),
                b"authority" => self.authority.replace(value.to_vec()).is_some(),
                b"status" => self.status.replace(value.to_vec()).is_some(),
                b"scheme" => std::mem::replace(&mut self.scheme, true),
                b"path" => std::mem::replace(&mut self.path, true),
                _ => true,
            };
            self.malformed |= repeated || !self.headers.is_empty();
            return;
        }
        self.malformed |= CONNECTION_HEADERS.contains(&name)
            || (name == b"te" && value != b"trailers")
            || value.first().is_some_and(u8::is_ascii_whitespace)
            || value.last().is_some_and(u8::is_ascii_whitespace);
        match (
            HeaderName::from_lowercase(name),
            HeaderValue::from_bytes(value),
        ) {
            (Ok(name), Ok(value)) => {
                self.malformed |= self.headers.try_append(name, value).is_err()
            }
            _ => self.malformed = true,
        }
    }

    fn fault(&self) -> Option<Fault> {
        if self.size > self.limit {
            Some(Fault::TooLarge)
        } else {
            self.malformed.then_some(Fault::Malformed)
        }
    }

    /// As a request. CONNECT has an authority and nothing else that a request has; other methods are for the caller
    /// to refuse.
    ///
    /// # Errors
    /// When it is none.
    pub fn into_request(self) -> Result<Parts, Fault> {
        if let Some(fault) = self.fault() {
            return Err(fault);
        }
        let method = self.method.as_deref().map(Method::from_bytes);
        let Some(Ok(method)) = method else {
            return Err(Fault::Malformed);
        };
        let connect = method == Method::CONNECT;
        let whole = if connect {
            !self.scheme && !self.path && self.authority.is_some()
        } else {
            self.scheme && self.path
        };
        if !whole || self.status.is_some() {
            return Err(Fault::Malformed);
        }
        let uri = match self.authority {
            Some(authority) => Uri::builder().authority(authority.as_slice()).build(),
            None => Ok(Uri::default()),
        };
        let (mut parts, ()) = Request::new(()).into_parts();
        parts.method = method;
        parts.uri = uri.map_err(|_| Fault::Malformed)?;
        parts.headers = self.headers;
        parts.version = http::Version::HTTP_2;
        Ok(parts)
    }

    /// As a response.
    ///
    /// # Errors
    /// When it is none.
    pub fn into_response(self) -> Result<(StatusCode, HeaderMap), Fault> {
        if let Some(fault) = self.fault() {
            return Err(fault);
        }
        let request = self.method.is_some() || self.authority.is_some() || self.scheme || self.path;
        let status = self.status.as_deref().map(StatusCode::from_bytes);
        match status {
            Some(Ok(status)) if !request => Ok((status, self.headers)),
            _ => Err(Fault::Malformed),
        }
    }
}
