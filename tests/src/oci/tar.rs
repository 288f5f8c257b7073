//! Just enough of tar: POSIX ustar headers, and a PAX header where a name or link is too long for one.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};

/// Everything in a tar comes in blocks of this size (POSIX.1-2017, pax, "ustar Interchange Format").
const BLOCK_BYTES: usize = 512;
/// Longest name and longest link in a header without an extension.
const NAME_MAX_BYTES: usize = 100;

/// A file, folder or link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    /// Permission bits.
    pub mode: u32,
    pub kind: Kind,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Kind {
    File(Vec<u8>),
    Folder,
    Link(String),
}

/// The entries in the order of their paths, all of them of root and of 1970.
///
/// # Errors
/// A path or size that the format cannot hold.
pub(super) fn archive(entries: &BTreeMap<String, Entry>) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    for (path, entry) in entries {
        append(&mut out, path, entry).with_context(|| format!("cannot archive {path}"))?;
    }
    // Two empty blocks end an archive.
    out.resize(out.len() + 2 * BLOCK_BYTES, 0);
    Ok(out)
}

fn append(out: &mut Vec<u8>, path: &str, entry: &Entry) -> Result<()> {
    let (flag, data, link, name) = match &entry.kind {
        Kind::File(data) => (b'0', data.as_slice(), "", path.to_owned()),
        Kind::Link(to) => (b'2', &[][..], to.as_str(), path.to_owned()),
        Kind::Folder => (b'5', &[][..], "", format!("{path}/")),
    };
    let mut records = Vec::new();
    for (key, value) in [("path", name.as_str()), ("linkpath", link)] {
        if value.len() > NAME_MAX_BYTES {
            records.extend(record(key, value));
        }
    }
    if !records.is_empty() {
        header(out, "pax", "", 0o644, b'x', records.len())?;
        body(out, &records);
    }
    header(out, cut(&name), cut(link), entry.mode, flag, data.len())?;
    body(out, data);
    Ok(())
}

/// A line of a PAX header: its own length in decimal, the key, the value.
fn record(key: &str, value: &str) -> Vec<u8> {
    let rest = format!(" {key}={value}\n");
    let mut length = rest.len();
    // The number counts its own digits.
    while length != rest.len() + length.to_string().len() {
        length = rest.len() + length.to_string().len();
    }
    format!("{length}{rest}").into_bytes()
}

fn cut(text: &str) -> &str {
    let mut end = text.len().min(NAME_MAX_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

fn header(
    out: &mut Vec<u8>,
    name: &str,
    link: &str,
    mode: u32,
    flag: u8,
    bytes: usize,
) -> Result<()> {
    let mut block = [0_u8; BLOCK_BYTES];
    let mut put = |offset: usize, value: &[u8]| {
        block[offset..offset + value.len()].copy_from_slice(value);
    };
    let size = format!("{bytes:011o}");
    ensure!(size.len() == 11, "{bytes} bytes are too many");
    put(0, name.as_bytes());
    put(100, format!("{mode:07o}").as_bytes());
    put(108, b"0000000");
    put(116, b"0000000");
    put(124, size.as_bytes());
    put(136, b"00000000000");
    // The checksum counts its own field as blanks.
    put(148, b"        ");
    put(156, &[flag]);
    put(157, link.as_bytes());
    put(257, b"ustar\x0000");
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    out.extend(block);
    Ok(())
}

fn body(out: &mut Vec<u8>, data: &[u8]) {
    out.extend(data);
    out.resize(out.len().next_multiple_of(BLOCK_BYTES), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_count_their_own_length() {
        assert_eq!(record("path", "a"), b"10 path=a\n");
        let long = record("path", &"x".repeat(990));
        assert!(long.starts_with(b"1001 path="));
        assert_eq!(long.len(), 1001);
    }

    #[test]
    fn long_names_are_kept_whole() {
        let name = "d/".repeat(120) + "f";
        let file = Entry {
            mode: 0o644,
            kind: Kind::File(b"x".to_vec()),
        };
        let out = archive(&BTreeMap::from([(name.clone(), file)])).expect("archived");
        let text = String::from_utf8_lossy(&out);
        assert!(text.contains(&format!(" path={name}\n")));
        assert_eq!(out.len() % BLOCK_BYTES, 0);
    }
}
