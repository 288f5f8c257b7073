//! TLS records of one connection, both directions in one object (rustls's unbuffered API). No I/O.
//!
//! Two traps of that API are dealt with here. A post-handshake message that is split over two records stays in the
//! *reader's* buffer, and rustls slices that buffer by remembered positions: so every call, also one that only wants to
//! write, gets the bytes that were received and not yet discarded. And should rustls panic all the same, the panic
//! ends this connection and nothing else.

use std::panic::{AssertUnwindSafe, catch_unwind};

use rustls::{
    client::UnbufferedClientConnection,
    pki_types::CertificateDer,
    server::UnbufferedServerConnection,
    unbuffered::{ConnectionState, EncodeError, EncryptError, UnbufferedStatus},
};

/// Largest plaintext of a record (RFC 8446 section 5.1).
pub const RECORD_PLAINTEXT_BYTES: usize = 16 << 10;
/// What a record adds to its plaintext in TLS 1.3: head, content type, tag.
pub const RECORD_OVERHEAD_BYTES: usize = 5 + 1 + 16;
/// Largest record on the wire (section 5.2); a peer may pad.
pub const RECORD_MAX_BYTES: usize = 5 + RECORD_PLAINTEXT_BYTES + 256;
/// Handshake messages that are sent at once: chains of certificates fit.
const HANDSHAKE_MAX_BYTES: usize = 128 << 10;

/// Why the records of a connection end. Nothing can be sent or received any more.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// TLS failed; an alert is among the bytes to send.
    #[error(transparent)]
    Tls(#[from] rustls::Error),
    /// The record layer broke down.
    #[error("the TLS library broke down")]
    Broken,
    /// The traffic keys are used up, or a buffer is too small.
    #[error("cannot encrypt: {0}")]
    Encrypt(String),
    /// The handshake sends more than any certificate needs.
    #[error("the handshake is too long")]
    TooLong,
    /// The peer closed, cleanly or not, before the handshake was over.
    #[error("the peer closed during the handshake")]
    Closed,
}

/// One connection.
pub enum Records {
    /// The client's end.
    Client(Box<UnbufferedClientConnection>),
    /// The server's end.
    Server(Box<UnbufferedServerConnection>),
}

/// What came of received bytes.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Opened {
    /// Bytes at the front that are no longer needed.
    pub discard: usize,
    /// The peer sends no more (close_notify).
    pub closed: bool,
    /// Application data may be sent.
    pub ready: bool,
}

/// What one call of rustls came to.
enum Step {
    Again,
    Idle { closed: bool, ready: bool },
}

impl Records {
    /// The peer's certificates, leaf first.
    #[must_use]
    pub fn peer_certificates(&self) -> Option<&[CertificateDer<'static>]> {
        match self {
            Self::Client(connection) => connection.peer_certificates(),
            Self::Server(connection) => connection.peer_certificates(),
        }
    }

    /// Whether the handshake is still going on.
    #[must_use]
    pub fn is_handshaking(&self) -> bool {
        match self {
            Self::Client(connection) => connection.is_handshaking(),
            Self::Server(connection) => connection.is_handshaking(),
        }
    }

    /// Opens every complete record of `received`, which begins where the last [`Opened::discard`] ended. Plaintext goes
    /// to `plain`, records that TLS itself wants to send are appended to `out`, before whatever is sealed later.
    ///
    /// # Errors
    /// [`RecordError`]; `out` may then hold an alert.
    pub fn open(
        &mut self,
        received: &mut [u8],
        plain: &mut Plain<'_>,
        out: &mut Vec<u8>,
    ) -> Result<Opened, RecordError> {
        let mut opened = Opened::default();
        loop {
            let rest = received.get_mut(opened.discard..).unwrap_or_default();
            let (discard, step) = self.step(rest, plain, out)?;
            opened.discard += discard;
            match step {
                Ok(Step::Again) => {}
                Ok(Step::Idle { closed, ready }) => {
                    opened.closed |= closed;
                    opened.ready = ready;
                    if !closed {
                        return Ok(opened);
                    }
                }
                Err(error) => {
                    // Once more, for the alert that it queued, which comes before anything that was received.
                    let rest = received.get_mut(opened.discard..).unwrap_or_default();
                    self.step(rest, plain, out)?.1.ok();
                    return Err(error);
                }
            }
        }
    }

    fn step(
        &mut self,
        received: &mut [u8],
        plain: &mut Plain<'_>,
        out: &mut Vec<u8>,
    ) -> Result<(usize, Result<Step, RecordError>), RecordError> {
        guarded(|| match self {
            Self::Client(c) => open_step(c.process_tls_records(received), plain, out),
            Self::Server(c) => open_step(c.process_tls_records(received), plain, out),
        })
    }

    /// Seals `plain` into records at the front of `out`, and returns how many bytes they take. `received` is what has
    /// been received and not discarded.
    ///
    /// # Errors
    /// [`RecordError`]; the connection is over then.
    pub fn seal(
        &mut self,
        received: &mut [u8],
        plain: &[u8],
        out: &mut [u8],
    ) -> Result<usize, RecordError> {
        self.write(received, &Write::Seal(plain), out)
    }

    /// Writes close_notify: everything before it was meant to be everything.
    ///
    /// # Errors
    /// [`RecordError`]; the connection is over either way.
    pub fn close(&mut self, received: &mut [u8], out: &mut [u8]) -> Result<usize, RecordError> {
        self.write(received, &Write::Close, out)
    }

    /// Sends a KeyUpdate before the next record.
    #[cfg(test)]
    pub fn refresh_keys(
        &mut self,
        received: &mut [u8],
        out: &mut [u8],
    ) -> Result<usize, RecordError> {
        self.write(received, &Write::Refresh, out)?;
        self.write(received, &Write::Seal(&[]), out)
    }

    fn write(
        &mut self,
        received: &mut [u8],
        write: &Write<'_>,
        out: &mut [u8],
    ) -> Result<usize, RecordError> {
        let mut written = 0;
        loop {
            let into = out.get_mut(written..).unwrap_or_default();
            let (count, done) = guarded(|| match self {
                Self::Client(c) => write_step(c.process_tls_records(received), write, into),
                Self::Server(c) => write_step(c.process_tls_records(received), write, into),
            })??;
            written += count;
            if done {
                return Ok(written);
            }
        }
    }
}

/// What is to be written once TLS lets us.
enum Write<'a> {
    Seal(&'a [u8]),
    Close,
    #[cfg(test)]
    Refresh,
}

/// Where plaintext goes: the front of a buffer that is as large as what was received, so that it always fits.
#[derive(Debug)]
pub struct Plain<'a> {
    memory: &'a mut [u8],
    filled: usize,
}

impl<'a> Plain<'a> {
    /// An empty one.
    pub fn new(memory: &'a mut [u8]) -> Self {
        Self { memory, filled: 0 }
    }

    /// How much there is.
    #[must_use]
    pub fn filled(&self) -> usize {
        self.filled
    }

    fn push(&mut self, bytes: &[u8]) -> Result<(), RecordError> {
        let end = self.filled + bytes.len();
        let into = self.memory.get_mut(self.filled..end);
        into.ok_or(RecordError::Broken)?.copy_from_slice(bytes);
        self.filled = end;
        Ok(())
    }
}

/// Calls into rustls so that its panic is an error.
fn guarded<T>(call: impl FnOnce() -> T) -> Result<T, RecordError> {
    catch_unwind(AssertUnwindSafe(call)).map_err(|_| RecordError::Broken)
}

fn open_step<D>(
    status: UnbufferedStatus<'_, '_, D>,
    plain: &mut Plain<'_>,
    out: &mut Vec<u8>,
) -> (usize, Result<Step, RecordError>) {
    let UnbufferedStatus { mut discard, state } = status;
    let step = match state {
        Err(error) => Err(error.into()),
        Ok(ConnectionState::ReadTraffic(mut traffic)) => {
            let mut step = Ok(Step::Again);
            while let Some(record) = traffic.next_record() {
                let pushed = record.map_err(RecordError::from).and_then(|record| {
                    discard += record.discard;
                    plain.push(record.payload)
                });
                if let Err(error) = pushed {
                    step = Err(error);
                    break;
                }
            }
            step
        }
        Ok(ConnectionState::EncodeTlsData(mut message)) => append(out, |into| message.encode(into)),
        Ok(ConnectionState::TransmitTlsData(sent)) => {
            sent.done();
            Ok(Step::Again)
        }
        Ok(ConnectionState::PeerClosed) => Ok(Step::Idle {
            closed: true,
            ready: false,
        }),
        Ok(ConnectionState::WriteTraffic(_)) => Ok(Step::Idle {
            closed: false,
            ready: true,
        }),
        // Blocked, closed, and early data, which we never offer.
        Ok(_) => Ok(Step::Idle {
            closed: false,
            ready: false,
        }),
    };
    (discard, step)
}

/// Appends what needs an unknown amount of room.
fn append(
    out: &mut Vec<u8>,
    mut encode: impl FnMut(&mut [u8]) -> Result<usize, EncodeError>,
) -> Result<Step, RecordError> {
    let before = out.len();
    let mut room = 1024;
    loop {
        out.resize(before + room, 0);
        match encode(out.get_mut(before..).unwrap_or_default()) {
            Ok(written) => {
                out.truncate(before + written);
                return Ok(Step::Again);
            }
            Err(EncodeError::InsufficientSize(size))
                if before + size.required_size <= HANDSHAKE_MAX_BYTES =>
            {
                room = size.required_size;
            }
            Err(_) => {
                out.truncate(before);
                return Err(RecordError::TooLong);
            }
        }
    }
}

/// Returns the bytes written and whether it is all.
fn write_step<D>(
    status: UnbufferedStatus<'_, '_, D>,
    write: &Write<'_>,
    into: &mut [u8],
) -> Result<(usize, bool), RecordError> {
    if status.discard > 0 {
        // Every complete record was opened when it came; the caller's positions would be wrong from here on.
        return Err(RecordError::Broken);
    }
    match status.state? {
        ConnectionState::WriteTraffic(mut traffic) => {
            let written = match write {
                Write::Seal(plain) => traffic.encrypt(plain, into),
                Write::Close => traffic.queue_close_notify(into),
                #[cfg(test)]
                Write::Refresh => {
                    traffic.refresh_traffic_keys()?;
                    Ok(0)
                }
            };
            written
                .map(|written| (written, true))
                .map_err(|error: EncryptError| RecordError::Encrypt(error.to_string()))
        }
        ConnectionState::EncodeTlsData(mut message) => message
            .encode(into)
            .map(|written| (written, false))
            .map_err(|error| RecordError::Encrypt(error.to_string())),
        ConnectionState::TransmitTlsData(sent) => {
            sent.done();
            Ok((0, false))
        }
        // Nothing is left unprocessed between reads, so the peer has closed, or TLS has failed.
        _ => Err(RecordError::Closed),
    }
}

#[cfg(test)]
mod tests;
