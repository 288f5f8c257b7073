//! The record: 64 bytes, numbered and checksummed.
//!
//! ```text
//! 0..8    "WEFTSEQ" and the kind
//! 8..16   connection id
//! 16..24  number
//! 24..32  argument
//! 32..56  filler made from the rest, so that every record differs everywhere
//! 56..64  checksum (FNV-1a) of bytes 0..56
//! ```

use std::io::{self, Read, Write};

/// Bytes of a record.
pub const RECORD_BYTES: usize = 64;

const MAGIC: &[u8; 7] = b"WEFTSEQ";

/// What a record is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecordKind {
    /// Request: echo every record that follows.
    Echo,
    /// Request: read to the end, then answer with as many records as the argument says, then close with FIN.
    Answer,
    /// Request: answer with as many records as the argument says and close at once with FIN.
    AnswerAndFin,
    /// Request: close with RST after echoing as many records as the argument says.
    EchoAndRst,
    /// Request: close with FIN after echoing as many records as the argument says.
    EchoAndFin,
    /// Request: read to the end without answering.
    Sink,
    /// A numbered record from the client.
    Data,
    /// A numbered record from the server.
    Reply,
}

const KINDS: [(RecordKind, u8); 8] = [
    (RecordKind::Echo, b'e'),
    (RecordKind::Answer, b'a'),
    (RecordKind::AnswerAndFin, b'f'),
    (RecordKind::EchoAndRst, b'r'),
    (RecordKind::EchoAndFin, b'c'),
    (RecordKind::Sink, b's'),
    (RecordKind::Data, b'd'),
    (RecordKind::Reply, b'R'),
];

/// A record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record {
    /// What it is.
    pub kind: RecordKind,
    /// Connection it belongs to.
    pub connection: u64,
    /// Its number within the connection and direction.
    pub number: u64,
    /// Argument of a request; 0 otherwise.
    pub argument: u64,
}

impl Record {
    /// The bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; RECORD_BYTES] {
        let mut bytes = [0; RECORD_BYTES];
        let kind = KINDS
            .iter()
            .find(|(kind, _)| *kind == self.kind)
            .map_or(0, |(_, byte)| *byte);
        bytes[..7].copy_from_slice(MAGIC);
        bytes[7] = kind;
        bytes[8..16].copy_from_slice(&self.connection.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.number.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.argument.to_le_bytes());
        let seed = fnv(&bytes[..32]);
        for (position, chunk) in bytes[32..56].chunks_exact_mut(8).enumerate() {
            chunk.copy_from_slice(&seed.rotate_left(7 * position as u32).to_le_bytes());
        }
        let checksum = fnv(&bytes[..56]);
        bytes[56..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Reads a record back; `None` if a single bit is wrong.
    #[must_use]
    pub fn decode(bytes: &[u8; RECORD_BYTES]) -> Option<Self> {
        let word = |at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
        let kind = KINDS
            .iter()
            .find(|(_, byte)| *byte == bytes[7])
            .map(|(kind, _)| *kind)?;
        let record = Self {
            kind,
            connection: word(8)?,
            number: word(16)?,
            argument: word(24)?,
        };
        (record.encode() == *bytes).then_some(record)
    }

    /// Writes it.
    ///
    /// # Errors
    /// The connection's.
    pub fn write(&self, stream: &mut impl Write) -> io::Result<()> {
        stream.write_all(&self.encode())
    }

    /// Reads one; `Ok(None)` at a clean end between records.
    ///
    /// # Errors
    /// The connection's; `UnexpectedEof` in the middle of a record, `InvalidData` for a damaged one.
    pub fn read(stream: &mut impl Read) -> io::Result<Option<Self>> {
        let mut bytes = [0; RECORD_BYTES];
        let mut filled = 0;
        while filled < RECORD_BYTES {
            match stream.read(&mut bytes[filled..]) {
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Self::decode(&bytes)
            .map(Some)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "damaged record"))
    }
}

/// FNV-1a, 64 bits.
fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECORD: Record = Record {
        kind: RecordKind::Data,
        connection: 7,
        number: 1 << 40,
        argument: 3,
    };

    #[test]
    fn a_record_survives_the_wire() -> io::Result<()> {
        let mut wire = Vec::new();
        RECORD.write(&mut wire)?;
        assert_eq!(Record::read(&mut wire.as_slice())?, Some(RECORD));
        assert_eq!(Record::read(&mut io::empty())?, None);
        Ok(())
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        for bit in 0..RECORD_BYTES * 8 {
            let mut bytes = RECORD.encode();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Record::decode(&bytes), None, "bit {bit}");
        }
    }

    #[test]
    fn half_a_record_is_an_early_end() {
        let bytes = RECORD.encode();
        let error = Record::read(&mut &bytes[..63]).expect_err("half a record was accepted");
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
