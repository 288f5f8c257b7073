//! What this process holds in its writable memory.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt as _,
};

use anyhow::{Context as _, Result};

/// Bytes read at a time.
const PIECE: usize = 1 << 20;

/// Bytes to look for, kept so that looking for them does not find this copy.
#[derive(Debug)]
pub struct Masked(Vec<u8>);

impl Masked {
    /// Keeps a masked copy.
    #[must_use]
    pub fn new(bytes: &[u8]) -> Self {
        Self(bytes.iter().map(|byte| !byte).collect())
    }

    /// How often the bytes are in the writable memory of this process.
    ///
    /// # Errors
    /// The memory cannot be read.
    pub fn count(&self) -> Result<usize> {
        let memory = File::open("/proc/self/mem").context("/proc/self/mem")?;
        let mut piece = vec![0; PIECE];
        // Reading the buffer into itself would find what it holds of its surroundings again and again.
        let own = piece.as_ptr() as u64;
        let own = own..own + piece.len() as u64;
        let mut found = 0;
        for line in fs::read_to_string("/proc/self/maps")?.lines() {
            let mut words = line.split_whitespace();
            let (range, rights) = (words.next(), words.next());
            let (Some((from, to)), Some(true)) = (
                range.and_then(|range| range.split_once('-')),
                rights.map(|rights| rights.starts_with("rw")),
            ) else {
                continue;
            };
            let (mut at, to) = (u64::from_str_radix(from, 16)?, u64::from_str_radix(to, 16)?);
            while at < to {
                if own.contains(&at) {
                    at = own.end;
                    continue;
                }
                let end = if at < own.start {
                    to.min(own.start)
                } else {
                    to
                };
                let length = PIECE.min(usize::try_from(end - at)?);
                // What is unmapped meanwhile, or of the kernel, cannot be read.
                let read = memory.read_at(&mut piece[..length], at).unwrap_or(0);
                found += self.count_in(&piece[..read]);
                // Pieces overlap, so that nothing is cut in two.
                let overlap = if at + (length as u64) < end {
                    self.0.len()
                } else {
                    0
                };
                at += (length - overlap) as u64;
                // What was read must not be found in the buffer.
                piece.fill(0);
            }
        }
        Ok(found)
    }

    fn count_in(&self, bytes: &[u8]) -> usize {
        let first = self.0.first().map(|mask| !mask);
        let starts = bytes
            .iter()
            .enumerate()
            .filter(|(_, byte)| Some(**byte) == first);
        let is_it = |start: &usize| {
            let there = bytes.get(*start..start + self.0.len());
            there.is_some_and(|there| there.iter().zip(&self.0).all(|(is, mask)| *is == !mask))
        };
        starts.map(|(start, _)| start).filter(is_it).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_is_found_and_what_is_gone_is_not() {
        let mut secret = vec![0_u8; 64];
        for (number, byte) in (11_u8..).zip(&mut secret) {
            *byte = number.wrapping_mul(37);
        }
        let masked = Masked::new(&secret);
        assert_eq!(masked.count().expect("readable"), 1);
        secret.fill(0);
        std::hint::black_box(&secret);
        assert_eq!(masked.count().expect("readable"), 0);
    }
}
