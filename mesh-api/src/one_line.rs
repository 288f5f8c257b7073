//! Log lines that stay one line each.

use std::io::{self, Write};

/// Begins a colour sequence (ECMA-48 section 5.4).
const ESCAPE: u8 = 0x1b;

/// Writes each event as one line. Names and messages of others (peers, applications, manifests) are in it, and a newline
/// in one of them would begin a line that looks like ours. Colour sequences pass: the formatter of log lines makes them,
/// and escapes those in values.
#[derive(Debug)]
pub struct OneLine<W>(pub W);

impl<W: Write> Write for OneLine<W> {
    /// `event` is a whole event: the formatter of log lines hands over one at a time.
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let (line, end) = match event.strip_suffix(b"\n") {
            Some(line) => (line, "\n"),
            None => (event, ""),
        };
        let is_plain = |byte: &u8| !byte.is_ascii_control() || *byte == ESCAPE;
        if line.iter().all(is_plain) {
            self.0.write_all(event)?;
            return Ok(event.len());
        }
        let mut escaped = Vec::with_capacity(line.len() + 16);
        for byte in line {
            if is_plain(byte) {
                escaped.push(*byte);
            } else {
                escaped.extend(byte.escape_ascii());
            }
        }
        escaped.extend(end.as_bytes());
        self.0.write_all(&escaped)?;
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_newline_ends_a_line() {
        for (event, expected) in [
            ("plain\n", "plain\n"),
            ("a\nb\r\n", "a\\nb\\r\n"),
            (
                "\x1b[32mINFO\x1b[0m a\tb\x07",
                "\x1b[32mINFO\x1b[0m a\\tb\\x07",
            ),
            ("wéb\n", "wéb\n"),
        ] {
            let mut lines = OneLine(Vec::new());
            lines
                .write_all(event.as_bytes())
                .expect("a vector takes all");
            assert_eq!(String::from_utf8_lossy(&lines.0), expected, "{event:?}");
        }
    }
}
