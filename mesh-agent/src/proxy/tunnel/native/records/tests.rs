//! Peers that have a good certificate and yet send records that no library would.

use std::task::Waker;

use rustls::{
    ClientConfig, ClientConnection, ConnectionTrafficSecrets, ContentType, ProtocolVersion,
    crypto::cipher::{MessageEncrypter, OutboundChunks, OutboundPlainMessage},
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};

use super::{super::channel::Channel, *};
use crate::proxy::testing::{server_name, tls};

/// KeyUpdate, update_not_requested (RFC 8446 section 4.6.3).
const KEY_UPDATE: [u8; 5] = [24, 0, 0, 1, 0];

/// A client that was taken apart after its handshake, so that it can seal whatever it likes.
struct Offender {
    encrypter: Box<dyn MessageEncrypter>,
    sequence: u64,
}

impl Offender {
    /// An offender and the server that it has shaken hands with.
    fn and_server() -> (Self, Records) {
        let (client, server) = tls();
        let mut config = ClientConfig::clone(&client);
        config.enable_secret_extraction = true;
        let mut client = ClientConnection::new(config.into(), server_name()).expect("a client");
        let server = UnbufferedServerConnection::new(server).expect("a server");
        let mut server = Records::Server(Box::new(server));
        let mut held = Vec::new();
        while client.is_handshaking() || server.is_handshaking() || client.wants_write() {
            while client.wants_write() {
                client.write_tls(&mut held).expect("memory");
            }
            let (mut plain, mut out) = (vec![0; held.len()], Vec::new());
            let opened = server
                .open(&mut held, &mut Plain::new(&mut plain), &mut out)
                .expect("a handshake");
            held.drain(..opened.discard);
            let mut said = out.as_slice();
            while !said.is_empty() {
                client.read_tls(&mut said).expect("memory");
                client.process_new_packets().expect("a handshake");
            }
        }
        let suite = client.negotiated_cipher_suite().expect("negotiated");
        let suite = suite.tls13().expect("TLS 1.3");
        let secrets = client.dangerous_extract_secrets().expect("allowed");
        let (sequence, keys) = secrets.tx;
        let (ConnectionTrafficSecrets::Aes128Gcm { key, iv }
        | ConnectionTrafficSecrets::Aes256Gcm { key, iv }
        | ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv }) = keys
        else {
            panic!("a suite of this test's future");
        };
        let encrypter = suite.aead_alg.encrypter(key, iv);
        let offender = Self {
            encrypter,
            sequence,
        };
        (offender, server)
    }

    fn record(&mut self, typ: ContentType, payload: &[u8]) -> Vec<u8> {
        let message = OutboundPlainMessage {
            typ,
            version: ProtocolVersion::TLSv1_2,
            payload: OutboundChunks::Single(payload),
        };
        let sealed = self.encrypter.encrypt(message, self.sequence);
        self.sequence += 1;
        sealed.expect("it fits").encode()
    }
}

fn open(records: &mut Records, received: &mut [u8]) -> Result<Opened, RecordError> {
    let mut plain = vec![0; received.len()];
    records.open(received, &mut Plain::new(&mut plain), &mut Vec::new())
}

#[test]
fn a_message_that_has_come_by_half_does_not_stand_in_the_way_of_writing() {
    let (mut offender, mut server) = Offender::and_server();
    let mut held = offender.record(ContentType::Handshake, &KEY_UPDATE[..2]);
    let opened = open(&mut server, &mut held).expect("half a message is none yet");
    assert!(opened.ready);
    held.drain(..opened.discard);
    let mut out = vec![0; 1024];
    for text in [b"one", b"two"] {
        let sealed = server.seal(&mut held, text, &mut out).expect("sealed");
        assert_eq!(sealed, text.len() + RECORD_OVERHEAD_BYTES);
    }
    held.extend(offender.record(ContentType::Handshake, &KEY_UPDATE[2..]));
    let opened = open(&mut server, &mut held).expect("the other half");
    assert_eq!(opened.discard, held.len());
    server.seal(&mut [], b"three", &mut out).expect("sealed");
}

/// The same through the buffers of a tunnel, which must keep what rustls points into.
#[tokio::test]
async fn a_channel_goes_on_writing_while_half_a_message_is_held() {
    let (mut offender, server) = Offender::and_server();
    let (mut far, near): (DuplexStream, _) = duplex(64 << 10);
    let mut channel = Channel::new(Box::new(near), server, Vec::new());
    let mut cx = std::task::Context::from_waker(Waker::noop());
    let half = offender.record(ContentType::Handshake, &KEY_UPDATE[..2]);
    far.write_all(&half).await.expect("fits");
    let received = channel.poll_receive(&mut cx);
    assert!(matches!(received, std::task::Poll::Ready(Ok(_))));
    let mut said = b"hello".to_vec();
    let flushed = channel.poll_flush(&mut cx, &mut said);
    assert!(matches!(flushed, std::task::Poll::Ready(Ok(()))));
    let mut sealed = vec![0; 5 + RECORD_OVERHEAD_BYTES];
    far.read_exact(&mut sealed).await.expect("written");
}

#[test]
fn a_forged_record_is_an_error_of_tls() {
    let (mut offender, mut server) = Offender::and_server();
    let mut record = offender.record(ContentType::ApplicationData, b"hello");
    *record.last_mut().expect("a tag") ^= 1;
    let error = open(&mut server, &mut record).expect_err("forged");
    assert!(matches!(
        error,
        RecordError::Tls(rustls::Error::DecryptError)
    ));
}

#[test]
fn a_panic_of_the_library_is_an_error_of_one_connection() {
    let broken = guarded(|| panic!("a slice out of range"));
    assert!(matches!(broken, Err::<(), _>(RecordError::Broken)));
}
