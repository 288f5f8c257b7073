//! The Huffman code of HPACK (RFC 7541 section 5.2 and appendix B). It is canonical: the number of codes of each length
//! and the symbols in the order of their codes say everything.

use super::DecodeError;

/// Longest code, that of the end-of-string symbol, which must not appear.
const MAX_BITS: usize = 30;
/// Number of codes by length; the last one of 30 bits is the end of string.
const COUNTS: [u16; MAX_BITS + 1] = [
    0, 0, 0, 0, 0, 10, 26, 32, 6, 0, 5, 3, 2, 6, 2, 3, 0, 0, 0, 3, 8, 13, 26, 29, 12, 4, 15, 19,
    29, 0, 4,
];
/// Longest padding, of ones (section 5.2).
const MAX_PADDING_BITS: usize = 7;
/// Symbols in the order of their codes.
const SYMBOLS: [u8; 256] = [
    48, 49, 50, 97, 99, 101, 105, 111, 115, 116, 32, 37, 45, 46, 47, 51, 52, 53, 54, 55, 56, 57,
    61, 65, 95, 98, 100, 102, 103, 104, 108, 109, 110, 112, 114, 117, 58, 66, 67, 68, 69, 70, 71,
    72, 73, 74, 75, 76, 77, 78, 79, 80, 81, 82, 83, 84, 85, 86, 87, 89, 106, 107, 113, 118, 119,
    120, 121, 122, 38, 42, 44, 59, 88, 90, 33, 34, 40, 41, 63, 39, 43, 124, 35, 62, 0, 36, 64, 91,
    93, 126, 94, 125, 60, 96, 123, 92, 195, 208, 128, 130, 131, 162, 184, 194, 224, 226, 153, 161,
    167, 172, 176, 177, 179, 209, 216, 217, 227, 229, 230, 129, 132, 133, 134, 136, 146, 154, 156,
    160, 163, 164, 169, 170, 173, 178, 181, 185, 186, 187, 189, 190, 196, 198, 228, 232, 233, 1,
    135, 137, 138, 139, 140, 141, 143, 147, 149, 150, 151, 152, 155, 157, 158, 165, 166, 168, 174,
    175, 180, 182, 183, 188, 191, 197, 231, 239, 9, 142, 144, 145, 148, 159, 171, 206, 215, 225,
    236, 237, 199, 207, 234, 235, 192, 193, 200, 201, 202, 205, 210, 213, 218, 219, 238, 240, 242,
    243, 255, 203, 204, 211, 212, 214, 221, 222, 223, 241, 244, 245, 246, 247, 248, 250, 251, 252,
    253, 254, 2, 3, 4, 5, 6, 7, 8, 11, 12, 14, 15, 16, 17, 18, 19, 20, 21, 23, 24, 25, 26, 27, 28,
    29, 30, 31, 127, 220, 249, 10, 13, 22,
];

/// Decodes a string onto the end of `out`.
///
/// # Errors
/// For the end-of-string symbol, padding of a whole byte, and padding that is not all ones.
pub fn decode(encoded: &[u8], out: &mut Vec<u8>) -> Result<(), DecodeError> {
    let mut walk = Walk::default();
    let (mut bits, mut ones) = (0, true);
    for byte in encoded {
        for shift in (0..8).rev() {
            let bit = u32::from(byte >> shift) & 1;
            bits += 1;
            ones &= bit == 1;
            if let Some(symbol) = walk.step(bit)? {
                out.push(symbol);
                (bits, ones) = (0, true);
            }
        }
    }
    if bits > MAX_PADDING_BITS || !ones {
        return Err(DecodeError::Huffman);
    }
    Ok(())
}

/// A walk down the canonical code, one bit at a time.
#[derive(Default)]
struct Walk {
    length: usize,
    code: u32,
    /// First code of this length, and how many symbols have shorter ones.
    first: u32,
    before: usize,
}

impl Walk {
    fn step(&mut self, bit: u32) -> Result<Option<u8>, DecodeError> {
        self.length += 1;
        self.code = self.code << 1 | bit;
        self.first <<= 1;
        let count = u32::from(*COUNTS.get(self.length).ok_or(DecodeError::Huffman)?);
        let offset = self.code.wrapping_sub(self.first);
        if self.code >= self.first && offset < count {
            let symbol = SYMBOLS.get(self.before + offset as usize);
            *self = Self::default();
            // Behind the last symbol is the end of string.
            return symbol.copied().map(Some).ok_or(DecodeError::Huffman);
        }
        self.first += count;
        self.before += count as usize;
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(encoded: &[u8]) -> Result<Vec<u8>, DecodeError> {
        let mut out = Vec::new();
        decode(encoded, &mut out).map(|()| out)
    }

    #[test]
    fn every_symbol_has_its_place() {
        let mut sorted = SYMBOLS;
        sorted.sort_unstable();
        assert!(
            sorted
                .iter()
                .enumerate()
                .all(|(at, symbol)| at == usize::from(*symbol))
        );
        assert_eq!(COUNTS.iter().sum::<u16>(), 257);
        // A complete code fills the space of codes (Kraft).
        let filled: u64 = COUNTS
            .iter()
            .enumerate()
            .map(|(length, count)| u64::from(*count) << (MAX_BITS - length))
            .sum();
        assert_eq!(filled, 1 << MAX_BITS);
    }

    #[test]
    fn words_of_the_standard() {
        // RFC 7541 appendix C.4 and C.6.
        let www = [
            0xf1, 0xe3, 0xc2, 0xe5, 0xf2, 0x3a, 0x6b, 0xa0, 0xab, 0x90, 0xf4, 0xff,
        ];
        assert_eq!(decoded(&www), Ok(b"www.example.com".to_vec()));
        assert_eq!(
            decoded(&[0xa8, 0xeb, 0x10, 0x64, 0x9c, 0xbf]),
            Ok(b"no-cache".to_vec())
        );
        assert_eq!(decoded(&[0x64, 0x02]), Ok(b"302".to_vec()));
        assert_eq!(decoded(&[]), Ok(Vec::new()));
    }

    #[test]
    fn wrong_padding_is_refused() {
        assert_eq!(
            decoded(&[0x64, 0x02, 0xff]),
            Err(DecodeError::Huffman),
            "a whole byte"
        );
        assert_eq!(
            decoded(&[0xff; 4]),
            Err(DecodeError::Huffman),
            "the end of string"
        );
        assert_eq!(decoded(&[0x00]), Err(DecodeError::Huffman), "zeros");
    }
}
