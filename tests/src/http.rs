//! A small HTTP/1.1 client: enough for probes, metrics and load, and no more.

use std::{
    io::{self, BufRead, BufReader, Read, Write as _},
    net::{SocketAddr, TcpStream},
    path::Path,
    time::Duration,
};

use anyhow::{Context as _, Result};

use crate::netns;

/// Largest body that is read into memory; metrics of a busy agent are well below it.
const BODY_MAX_BYTES: u64 = 64 << 20;

/// A response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    /// Status code.
    pub status: u16,
    /// Body, as text.
    pub body: String,
}

/// GETs a path from inside a network namespace, on a connection of its own.
///
/// # Errors
/// The server cannot be reached or does not answer within `limit` (for each step).
pub fn get(netns: &Path, address: SocketAddr, path: &str, limit: Duration) -> Result<Response> {
    netns::within(netns, || {
        let mut connection = Connection::open(address, limit)?;
        let mut body = Vec::new();
        let status = connection.get(&address.to_string(), path, &mut body)?;
        Ok::<_, io::Error>(Response {
            status,
            body: String::from_utf8_lossy(&body).into_owned(),
        })
    })?
    .with_context(|| format!("GET http://{address}{path}"))
}

/// A connection that is kept alive between requests.
#[derive(Debug)]
pub struct Connection {
    stream: BufReader<TcpStream>,
    /// Whether the server keeps the connection open after the last response.
    pub reusable: bool,
}

/// How the end of a body is known (RFC 9112 section 6.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Framing {
    Length(u64),
    Chunked,
    UntilClose,
}

impl Connection {
    /// Connects; `limit` bounds the connect and every read and write.
    ///
    /// # Errors
    /// The connection's.
    pub fn open(address: SocketAddr, limit: Duration) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(&address, limit)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(limit))?;
        stream.set_write_timeout(Some(limit))?;
        Ok(Self {
            stream: BufReader::with_capacity(16 * 1024, stream),
            reusable: true,
        })
    }

    /// GETs a path and appends the body to `body`; returns the status.
    ///
    /// # Errors
    /// The connection's, or `InvalidData` if the response makes no sense.
    pub fn get(&mut self, host: &str, path: &str, body: &mut Vec<u8>) -> io::Result<u16> {
        let request = format!(
            "GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: weft-lab\r\nAccept: */*\r\n\r\n"
        );
        self.stream.get_mut().write_all(request.as_bytes())?;
        read_response(&mut self.stream, &mut self.reusable, body)
    }
}

fn read_response(
    stream: &mut impl BufRead,
    reusable: &mut bool,
    body: &mut Vec<u8>,
) -> io::Result<u16> {
    let mut line = String::new();
    read_line(stream, &mut line)?;
    let mut words = line.split(' ');
    let version = words.next().unwrap_or_default();
    let status: u16 = words
        .next()
        .and_then(|code| code.parse().ok())
        .ok_or_else(|| invalid("status line"))?;
    *reusable = version == "HTTP/1.1";
    let mut framing = Framing::UntilClose;
    loop {
        read_line(stream, &mut line)?;
        if line.is_empty() {
            break;
        }
        let (name, value) = line.split_once(':').ok_or_else(|| invalid("header"))?;
        let value = value.trim();
        if name.eq_ignore_ascii_case("content-length") {
            framing = Framing::Length(value.parse().map_err(|_| invalid("content-length"))?);
        } else if name.eq_ignore_ascii_case("transfer-encoding")
            && value.eq_ignore_ascii_case("chunked")
        {
            framing = Framing::Chunked;
        } else if name.eq_ignore_ascii_case("connection") && value.eq_ignore_ascii_case("close") {
            *reusable = false;
        }
    }
    if status == 204 || status == 304 {
        framing = Framing::Length(0);
    }
    match framing {
        Framing::Length(length) => read_exactly(stream, length, body)?,
        Framing::Chunked => read_chunks(stream, body)?,
        Framing::UntilClose => {
            *reusable = false;
            stream.take(BODY_MAX_BYTES).read_to_end(body)?;
        }
    }
    Ok(status)
}

fn read_chunks(stream: &mut impl BufRead, body: &mut Vec<u8>) -> io::Result<()> {
    let mut line = String::new();
    loop {
        read_line(stream, &mut line)?;
        let digits = line.split(';').next().unwrap_or_default().trim();
        let length = u64::from_str_radix(digits, 16).map_err(|_| invalid("chunk length"))?;
        read_exactly(stream, length, body)?;
        // The line end behind a chunk, or (after the last one) the empty line behind the trailers.
        read_line(stream, &mut line)?;
        if length == 0 {
            while !line.is_empty() {
                read_line(stream, &mut line)?;
            }
            return Ok(());
        }
    }
}

fn read_exactly(stream: &mut impl BufRead, length: u64, body: &mut Vec<u8>) -> io::Result<()> {
    if length.saturating_add(body.len() as u64) > BODY_MAX_BYTES {
        return Err(invalid("body: too long"));
    }
    if stream.take(length).read_to_end(body)? as u64 == length {
        Ok(())
    } else {
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}

fn read_line(stream: &mut impl BufRead, line: &mut String) -> io::Result<()> {
    /// Longest line of a header.
    const LINE_MAX_BYTES: u64 = 16 * 1024;
    line.clear();
    if stream.take(LINE_MAX_BYTES).read_line(line)? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    line.truncate(line.trim_end_matches(['\r', '\n']).len());
    Ok(())
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("the HTTP response has no valid {what}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> io::Result<(u16, String, bool)> {
        let (mut reusable, mut body) = (true, Vec::new());
        let status = read_response(&mut text.as_bytes(), &mut reusable, &mut body)?;
        Ok((
            status,
            String::from_utf8_lossy(&body).into_owned(),
            reusable,
        ))
    }

    #[test]
    fn bodies_are_framed_as_the_headers_say() -> io::Result<()> {
        for (text, expected) in [
            (
                "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabcX",
                (200, "abc", true),
            ),
            (
                "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n1;x\r\nd\r\n0\r\n\r\n",
                (200, "abcd", true),
            ),
            (
                "HTTP/1.1 503 No\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
                (503, "", false),
            ),
            ("HTTP/1.0 200 OK\r\n\r\nall", (200, "all", false)),
            ("HTTP/1.1 204 None\r\n\r\n", (204, "", true)),
        ] {
            let (status, body, reusable) = read(text)?;
            assert_eq!((status, body.as_str(), reusable), expected, "{text}");
        }
        Ok(())
    }

    #[test]
    fn nonsense_and_early_ends_are_errors() {
        for text in [
            "",
            "hello\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabc",
            "HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        ] {
            assert!(read(text).is_err(), "{text:?} was accepted");
        }
    }
}
