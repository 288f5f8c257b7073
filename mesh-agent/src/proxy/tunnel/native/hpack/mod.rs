//! HPACK (RFC 7541): decoding in full, because peers choose what they send; encoding without Huffman and without the
//! dynamic table, because our headers differ from one stream to the next.

use std::collections::VecDeque;

mod huffman;
mod table;

/// Dynamic table that a peer may use before it has acknowledged our settings (RFC 9113 section 6.5.2).
const DEFAULT_TABLE_BYTES: usize = 4096;
/// What an entry counts beyond its bytes (RFC 7541 section 4.1, RFC 9113 section 6.5.2).
const ENTRY_OVERHEAD_BYTES: usize = 32;
/// Largest integer: more than any length or index that could be valid.
const MAX_INTEGER: usize = 1 << 24;

/// Why a header block cannot be decoded. The state of the decoder is lost then, so the connection must end
/// (RFC 9113 section 4.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The block ends within a field.
    #[error("header block is truncated")]
    Truncated,
    /// An integer is absurdly large.
    #[error("integer in a header block is too large")]
    Integer,
    /// An index names no entry.
    #[error("index in a header block names no entry")]
    Index,
    /// A Huffman string is wrong.
    #[error("Huffman string in a header block is wrong")]
    Huffman,
    /// The dynamic table shall be larger than we allow, or changes its size behind the first field.
    #[error("header table size is wrong")]
    TableSize,
}

/// A name and a value.
type Entry = (Box<[u8]>, Box<[u8]>);

/// Decodes the header blocks of one connection, in order.
#[derive(Debug)]
pub struct Decoder {
    entries: VecDeque<Entry>,
    /// Bytes of all entries, with their overhead.
    used: usize,
    /// Chosen by the peer, at most `allowed`.
    limit: usize,
    allowed: usize,
    /// Decoded strings of one field; kept for their memory.
    name: Vec<u8>,
    value: Vec<u8>,
}

impl Default for Decoder {
    fn default() -> Self {
        Self {
            entries: VecDeque::new(),
            used: 0,
            limit: DEFAULT_TABLE_BYTES,
            allowed: DEFAULT_TABLE_BYTES,
            name: Vec::new(),
            value: Vec::new(),
        }
    }
}

impl Decoder {
    /// The peer has acknowledged the table size that we announced.
    pub fn allow(&mut self, bytes: usize) {
        self.allowed = bytes;
        self.resize(self.limit.min(bytes));
    }

    /// Decodes a whole block; gives each field to `field`.
    ///
    /// # Errors
    /// When the block is malformed; fields before the mistake have been given out then.
    pub fn decode(
        &mut self,
        mut block: &[u8],
        mut field: impl FnMut(&[u8], &[u8]),
    ) -> Result<(), DecodeError> {
        let mut at_start = true;
        while let Some(first) = block.first().copied() {
            // RFC 7541 section 6: the leading bits say what follows.
            if first & 0xe0 == 0x20 {
                let size = integer(&mut block, 5)?;
                if !at_start || size > self.allowed {
                    return Err(DecodeError::TableSize);
                }
                self.resize(size);
                continue;
            }
            at_start = false;
            if first & 0x80 != 0 {
                let index = integer(&mut block, 7)?;
                let (name, value) = self.entry(index)?;
                field(name, value);
                continue;
            }
            let remember = first & 0x40 != 0;
            let index = integer(&mut block, if remember { 6 } else { 4 })?;
            let (mut name, mut value) = (
                std::mem::take(&mut self.name),
                std::mem::take(&mut self.value),
            );
            let read = self.literal(index, &mut block, &mut name, &mut value);
            if read.is_ok() {
                field(&name, &value);
                if remember {
                    self.insert(&name, &value);
                }
            }
            (self.name, self.value) = (name, value);
            read?;
        }
        Ok(())
    }

    fn literal(
        &self,
        index: usize,
        block: &mut &[u8],
        name: &mut Vec<u8>,
        value: &mut Vec<u8>,
    ) -> Result<(), DecodeError> {
        if index == 0 {
            string(block, name)?;
        } else {
            name.clear();
            name.extend_from_slice(self.entry(index)?.0);
        }
        string(block, value)
    }

    /// RFC 7541 section 2.3.3: the static table, then the dynamic one, newest first.
    fn entry(&self, index: usize) -> Result<(&[u8], &[u8]), DecodeError> {
        let at = index.checked_sub(1).ok_or(DecodeError::Index)?;
        if let Some((name, value)) = table::STATIC.get(at) {
            return Ok((name.as_bytes(), value.as_bytes()));
        }
        let (name, value) = self
            .entries
            .get(at - table::STATIC.len())
            .ok_or(DecodeError::Index)?;
        Ok((name, value))
    }

    fn insert(&mut self, name: &[u8], value: &[u8]) {
        let size = name.len() + value.len() + ENTRY_OVERHEAD_BYTES;
        self.evict(self.limit.saturating_sub(size));
        // Section 4.4: an entry larger than the table empties it and is not an error.
        if size <= self.limit {
            self.used += size;
            self.entries.push_front((name.into(), value.into()));
        }
    }

    fn resize(&mut self, limit: usize) {
        self.limit = limit;
        self.evict(limit);
    }

    fn evict(&mut self, until: usize) {
        while self.used > until {
            let Some((name, value)) = self.entries.pop_back() else {
                return;
            };
            self.used -= name.len() + value.len() + ENTRY_OVERHEAD_BYTES;
        }
    }
}

/// What a field counts against a header list limit (RFC 9113 section 6.5.2).
#[must_use]
pub fn field_size(name: &[u8], value: &[u8]) -> usize {
    name.len() + value.len() + ENTRY_OVERHEAD_BYTES
}

/// An integer with a prefix of `bits` bits (RFC 7541 section 5.1).
fn integer(block: &mut &[u8], bits: u32) -> Result<usize, DecodeError> {
    let (first, mut rest) = block.split_first().ok_or(DecodeError::Truncated)?;
    let mask = (1_usize << bits) - 1;
    let mut value = usize::from(*first) & mask;
    if value == mask {
        let mut shift = 0;
        loop {
            let (byte, after) = rest.split_first().ok_or(DecodeError::Truncated)?;
            rest = after;
            // Four bytes of seven bits reach beyond the limit; more could only be zeros, a waste.
            if shift > 21 {
                return Err(DecodeError::Integer);
            }
            value += usize::from(byte & 0x7f) << shift;
            shift += 7;
            if byte & 0x80 == 0 {
                break;
            }
        }
    }
    *block = rest;
    if value > MAX_INTEGER {
        return Err(DecodeError::Integer);
    }
    Ok(value)
}

/// A string (section 5.2), into `out`.
fn string(block: &mut &[u8], out: &mut Vec<u8>) -> Result<(), DecodeError> {
    let huffman = block.first().ok_or(DecodeError::Truncated)? & 0x80 != 0;
    let length = integer(block, 7)?;
    let (encoded, rest) = block
        .split_at_checked(length)
        .ok_or(DecodeError::Truncated)?;
    *block = rest;
    out.clear();
    if huffman {
        return huffman::decode(encoded, out);
    }
    out.extend_from_slice(encoded);
    Ok(())
}

/// Encodes a field without indexing (section 6.2.2).
pub fn put_field(block: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    block.push(0);
    put_string(block, name);
    put_string(block, value);
}

/// Encodes `:method: CONNECT` and `:authority`, all that a request begins with (RFC 9113 section 8.5).
pub fn put_connect(block: &mut Vec<u8>, authority: &[u8]) {
    block.push(table::METHOD);
    put_string(block, b"CONNECT");
    block.push(table::AUTHORITY);
    put_string(block, authority);
}

/// Encodes `:status`.
pub fn put_status(block: &mut Vec<u8>, status: u16) {
    if status == 200 {
        block.push(table::STATUS_200_INDEXED);
        return;
    }
    block.push(table::STATUS);
    put_string(block, status.to_string().as_bytes());
}

fn put_string(block: &mut Vec<u8>, text: &[u8]) {
    let mut length = text.len();
    if length < 0x7f {
        block.push(length.to_le_bytes()[0]);
    } else {
        block.push(0x7f);
        length -= 0x7f;
        while length >= 0x80 {
            block.push(length.to_le_bytes()[0] | 0x80);
            length >>= 7;
        }
        block.push(length.to_le_bytes()[0]);
    }
    block.extend_from_slice(text);
}

#[cfg(test)]
mod tests;
