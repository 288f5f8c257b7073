//! Log lines that stay one line each.

use std::io::{self, Write};

/// Begins a colour sequence (ECMA-48 section 5.4).
const ESCAPE: u8 = 0x1b;

/// Writes each event as one line. Names and messages of others (peers, applications, manifests) are in it: a newline in
/// one of them would begin a line that looks like ours, an escape sequence would move a terminal's cursor. Colours pass:
/// the formatter of log lines makes them, and it does not escape those in every kind of value.
#[derive(Debug)]
pub struct OneLine<W>(pub W);

impl<W: Write> Write for OneLine<W> {
    /// `event` is a whole event: the formatter of log lines hands over one at a time.
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let (line, end) = match event.strip_suffix(b"\n") {
            Some(line) => (line, "\n"),
            None => (event, ""),
        };
        if !line.iter().any(u8::is_ascii_control) {
            self.0.write_all(event)?;
            return Ok(event.len());
        }
        let mut escaped = Vec::with_capacity(line.len() + 16);
        let mut rest = line;
        while let Some((byte, after)) = rest.split_first() {
            if let Some((colour, after)) = rest
                .split_at_checked(colour_length(rest))
                .filter(|(colour, _)| !colour.is_empty())
            {
                escaped.extend(colour);
                rest = after;
                continue;
            }
            if byte.is_ascii_control() {
                escaped.extend(byte.escape_ascii());
            } else {
                escaped.push(*byte);
            }
            rest = after;
        }
        escaped.extend(end.as_bytes());
        self.0.write_all(&escaped)?;
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// Length of the colour sequence that `bytes` begin with; 0 if there is none. `ESC [`, digits and semicolons, `m` (ECMA-48
/// section 8.3.117).
fn colour_length(bytes: &[u8]) -> usize {
    let Some(parameters) = bytes.strip_prefix(&[ESCAPE, b'[']) else {
        return 0;
    };
    let end = parameters
        .iter()
        .position(|byte| !(byte.is_ascii_digit() || *byte == b';'));
    match end {
        Some(end) if parameters.get(end) == Some(&b'm') => 2 + end + 1,
        _ => 0,
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
            ("\x1b[2J\x1b[1;31mred\x1b[", "\\x1b[2J\x1b[1;31mred\\x1b["),
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
