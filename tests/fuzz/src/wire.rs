//! Hostile messages made by hand: no library sends them. RFC 8446 sections 4 and 5.1, RFC 9113 sections 3.4, 4.1 and 6,
//! RFC 7541 section 6.

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
/// Largest TLS record, and largest handshake message that TLS libraries take.
const RECORD_BYTES: usize = 16 << 10;
const HANDSHAKE_BYTES: usize = 0xffff;
/// Index of the newest entry of HPACK's dynamic table.
const NEWEST: u8 = 0x80 | 62;

/// A ClientHello that says to be as long as one may be, without its last bytes.
#[must_use]
pub fn endless_client_hello() -> Vec<u8> {
    let mut message = vec![1, 0, 0xff, 0xff, 3, 3];
    message.resize(HANDSHAKE_BYTES - 64, 0);
    let mut records = Vec::new();
    for part in message.chunks(RECORD_BYTES) {
        records.extend([22, 3, 1]);
        records.extend(u16::try_from(part.len()).unwrap_or_default().to_be_bytes());
        records.extend(part);
    }
    records
}

/// The beginning of a tunnel, and so many requests.
#[must_use]
pub fn connects(count: usize) -> Vec<u8> {
    let mut bytes = beginning();
    let block = connect_fields();
    for number in 0..count {
        let stream = u32::try_from(number * 2 + 1).unwrap_or(u32::MAX);
        frame(&mut bytes, HEADERS, END_HEADERS, stream, &block);
    }
    bytes
}

/// The beginning of a tunnel, and one request whose header block names a field of 4,000 bytes a million times.
#[must_use]
pub fn header_bomb() -> Vec<u8> {
    let mut bytes = beginning();
    let mut block = connect_fields();
    // With incremental indexing: kept in the dynamic table.
    block.push(0x40);
    text(&mut block, b"x");
    text(&mut block, &[b'y'; 4000]);
    block.resize((1 << 20) - 64, NEWEST);
    frame(&mut bytes, HEADERS, END_HEADERS, 1, &block);
    bytes
}

/// Whether a server's frames in `bytes` refuse a stream or end the tunnel. A frame that begins before `bytes` is not
/// understood: good enough for servers that answer with small frames.
#[must_use]
pub fn holds_an_end(bytes: &[u8]) -> bool {
    let mut rest = bytes;
    while let Some((head, after)) = rest.split_first_chunk::<9>() {
        let [a, b, c, kind, flags, ..] = *head;
        let ends = kind == HEADERS && flags & END_STREAM != 0;
        if ends || kind == RST_STREAM || kind == GOAWAY {
            return true;
        }
        let length = u32::from_be_bytes([0, a, b, c]) as usize;
        rest = after.get(length..).unwrap_or_default();
    }
    false
}

fn beginning() -> Vec<u8> {
    let mut bytes = PREFACE.to_vec();
    frame(&mut bytes, SETTINGS, 0, 0, &[]);
    bytes
}

fn connect_fields() -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in [
        (&b":method"[..], &b"CONNECT"[..]),
        (b":authority", b"10.1.0.5:8080"),
    ] {
        // Literals without indexing.
        block.push(0);
        text(&mut block, name);
        text(&mut block, value);
    }
    block
}

/// A string with its length, an integer with a prefix of seven bits (RFC 7541 section 5.1), up to 16,510 bytes.
fn text(block: &mut Vec<u8>, value: &[u8]) {
    match value.len() {
        short @ 0..=126 => block.push(u8::try_from(short).unwrap_or_default()),
        long => {
            let rest = long - 127;
            let low = u8::try_from(rest % 128).unwrap_or_default();
            let high = u8::try_from(rest / 128).unwrap_or_default();
            block.extend([127, low | 0x80, high]);
        }
    }
    block.extend(value);
}

fn frame(bytes: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    bytes.extend(length.to_be_bytes().get(1..).unwrap_or_default());
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
}
