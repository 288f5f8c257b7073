//! Reading the classic pcap format that `tcpdump -w` writes.

use anyhow::{Context as _, Result, bail};

/// Microsecond and nanosecond magic of a file written on a little-endian machine.
const MAGICS: [u32; 2] = [0xa1b2_c3d4, 0xa1b2_3c4d];

/// Bytes of the header of the file.
const FILE_HEADER_BYTES: usize = 24;

/// Bytes of the header of each packet.
const PACKET_HEADER_BYTES: usize = 16;

/// Link type Ethernet.
const LINKTYPE_ETHERNET: u32 = 1;

/// One captured frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame<'a> {
    /// The bytes, from the Ethernet header on.
    pub bytes: &'a [u8],
    /// Whether the capture cut it short.
    pub truncated: bool,
}

/// The frames of a file. A last frame that is not complete (the writer was stopped in the middle) is an error,
/// because an oracle must not judge on half of the evidence.
///
/// # Errors
/// Not a pcap file of Ethernet frames, or cut off.
pub fn frames(file: &[u8]) -> Result<Vec<Frame<'_>>> {
    let magic = word(file, 0)?;
    if !MAGICS.contains(&magic) {
        bail!("not a little-endian pcap file (magic {magic:#x})");
    }
    let link_type = word(file, 20)? & 0xffff;
    if link_type != LINKTYPE_ETHERNET {
        bail!("link type {link_type} in the capture, expected Ethernet");
    }
    let mut frames = Vec::new();
    let mut at = FILE_HEADER_BYTES;
    while at < file.len() {
        let captured = word(file, at + 8)? as usize;
        let original = word(file, at + 12)? as usize;
        let start = at + PACKET_HEADER_BYTES;
        let bytes = file
            .get(start..start + captured)
            .context("the capture ends in the middle of a packet")?;
        frames.push(Frame {
            bytes,
            truncated: captured < original,
        });
        at = start + captured;
    }
    Ok(frames)
}

fn word(file: &[u8], at: usize) -> Result<u32> {
    let bytes = file
        .get(at..at + 4)
        .context("the capture ends in the middle of a header")?;
    Ok(u32::from_le_bytes(bytes.try_into()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(frames: &[(&[u8], usize)]) -> Vec<u8> {
        let mut file = MAGICS[0].to_le_bytes().to_vec();
        file.extend([0; 16]);
        file.extend(LINKTYPE_ETHERNET.to_le_bytes());
        for (bytes, original) in frames {
            file.extend([0; 8]);
            file.extend(u32::try_from(bytes.len()).unwrap_or_default().to_le_bytes());
            file.extend(u32::try_from(*original).unwrap_or_default().to_le_bytes());
            file.extend(*bytes);
        }
        file
    }

    #[test]
    fn frames_and_their_truncation_are_read() -> Result<()> {
        let file = file(&[(b"abc", 3), (b"de", 9)]);
        let frames = frames(&file)?;
        assert_eq!(
            frames,
            [
                Frame {
                    bytes: b"abc",
                    truncated: false
                },
                Frame {
                    bytes: b"de",
                    truncated: true
                }
            ]
        );
        Ok(())
    }

    #[test]
    fn half_a_capture_is_no_evidence() {
        let whole = file(&[(b"abcdef", 6)]);
        for end in [0, 3, 23, 30, whole.len() - 1] {
            assert!(frames(&whole[..end]).is_err(), "{end} bytes were accepted");
        }
    }
}
