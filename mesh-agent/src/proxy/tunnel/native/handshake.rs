//! The TLS handshake, which is over before HTTP/2 begins.

use std::{io, sync::Arc};

use rustls::{
    ClientConfig, ServerConfig,
    client::UnbufferedClientConnection,
    pki_types::{CertificateDer, ServerName},
    server::UnbufferedServerConnection,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{
    channel::Socket,
    records::{Plain, RecordError, Records},
};

/// Received and not yet understood: more than any chain of certificates.
const RECEIVED_MAX_BYTES: usize = 128 << 10;
/// One read: the other side's messages in one piece.
const READ_BYTES: usize = 4 << 10;

/// A connection whose peer is known.
pub struct Session {
    pub(super) socket: Box<dyn Socket>,
    pub(super) records: Records,
    /// Received and not yet complete.
    pub(super) held: Vec<u8>,
    /// Application data that came with the end of the handshake.
    pub(super) plain: Vec<u8>,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Session")
    }
}

impl Session {
    /// The client's handshake.
    ///
    /// # Errors
    /// When the server is not who it should be, or refuses.
    pub async fn connect(
        config: Arc<ClientConfig>,
        name: ServerName<'static>,
        socket: Box<dyn Socket>,
    ) -> io::Result<Self> {
        let connection = UnbufferedClientConnection::new(config, name).map_err(invalid)?;
        shake(socket, Records::Client(Box::new(connection))).await
    }

    /// The server's handshake.
    ///
    /// # Errors
    /// When the client has no certificate that `config` accepts, or breaks off.
    pub async fn accept(config: Arc<ServerConfig>, socket: Box<dyn Socket>) -> io::Result<Self> {
        let connection = UnbufferedServerConnection::new(config).map_err(invalid)?;
        shake(socket, Records::Server(Box::new(connection))).await
    }

    /// The peer's certificates, leaf first.
    #[must_use]
    pub fn peer_certificates(&self) -> Option<&[CertificateDer<'static>]> {
        self.records.peer_certificates()
    }
}

async fn shake(socket: Box<dyn Socket>, records: Records) -> io::Result<Session> {
    let mut session = Session {
        socket,
        records,
        held: Vec::new(),
        plain: Vec::new(),
    };
    let mut out = Vec::new();
    loop {
        let opened = session.open(&mut out);
        // On failure these bytes are the alert.
        let told = session.socket.write_all(&out).await;
        out.clear();
        let (closed, ready) = opened.map_err(invalid)?;
        told?;
        if ready && !session.records.is_handshaking() {
            return Ok(session);
        }
        if session.held.len() > RECEIVED_MAX_BYTES {
            return Err(invalid(RecordError::TooLong));
        }
        session.held.reserve(READ_BYTES);
        if closed || session.socket.read_buf(&mut session.held).await? == 0 {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                RecordError::Closed,
            ));
        }
    }
}

impl Session {
    /// Opens what was received; says whether the peer has closed and whether we may send.
    fn open(&mut self, out: &mut Vec<u8>) -> Result<(bool, bool), RecordError> {
        let before = self.plain.len();
        self.plain.resize(before + self.held.len(), 0);
        let mut plain = Plain::new(self.plain.get_mut(before..).unwrap_or_default());
        let opened = self.records.open(&mut self.held, &mut plain, out);
        let filled = before + plain.filled();
        self.plain.truncate(filled);
        let opened = opened?;
        self.held.drain(..opened.discard);
        Ok((opened.closed, opened.ready))
    }
}

fn invalid(error: impl std::error::Error + Send + Sync + 'static) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}
