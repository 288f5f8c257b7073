//! Just enough of Rust's lexical grammar to tell code from comments and literals.

/// Replaces every character inside comments, strings and character literals by a space; newlines stay, so lines and
/// columns of what remains are those of the file.
pub fn code_of(text: &str) -> String {
    let mut lexer = Lexer {
        input: text.chars().collect(),
        at: 0,
        output: String::with_capacity(text.len()),
    };
    lexer.run();
    lexer.output
}

struct Lexer {
    input: Vec<char>,
    at: usize,
    output: String,
}

impl Lexer {
    fn run(&mut self) {
        while let Some(current) = self.peek(0) {
            let begins_word = !self.peek_back().is_some_and(is_word);
            match (current, self.peek(1)) {
                ('/', Some('/')) => self.blank_while(|lexer| lexer.peek(0) != Some('\n')),
                ('/', Some('*')) => self.block_comment(),
                ('"', _) => self.string(),
                ('r' | 'b' | 'c', _) if begins_word && self.raw_hashes().is_some() => {
                    self.raw_string()
                }
                ('\'', _) => self.quote(),
                _ => self.keep(),
            }
        }
    }

    fn peek(&self, ahead: usize) -> Option<char> {
        self.input.get(self.at + ahead).copied()
    }

    fn peek_back(&self) -> Option<char> {
        self.at
            .checked_sub(1)
            .and_then(|before| self.input.get(before))
            .copied()
    }

    fn keep(&mut self) {
        self.output.extend(self.peek(0));
        self.at += 1;
    }

    fn blank(&mut self) {
        self.output
            .extend(self.peek(0).map(|c| if c == '\n' { '\n' } else { ' ' }));
        self.at += 1;
    }

    fn blank_while(&mut self, condition: impl Fn(&Self) -> bool) {
        while self.at < self.input.len() && condition(self) {
            self.blank();
        }
    }

    fn block_comment(&mut self) {
        let mut depth = 0;
        while self.at < self.input.len() {
            match (self.peek(0), self.peek(1)) {
                (Some('/'), Some('*')) => depth += 1,
                (Some('*'), Some('/')) => depth -= 1,
                _ => {
                    self.blank();
                    continue;
                }
            }
            self.blank();
            self.blank();
            if depth == 0 {
                return;
            }
        }
    }

    /// The quotes stay, so that `"` and `""` remain visible as literals.
    fn string(&mut self) {
        self.keep();
        while let Some(current) = self.peek(0) {
            match current {
                '"' => return self.keep(),
                '\\' => {
                    self.blank();
                    self.blank();
                }
                _ => self.blank(),
            }
        }
    }

    /// How many `#` open a raw string here, if one begins here (`r"`, `r#"`, `br"`, `cr#"`).
    fn raw_hashes(&self) -> Option<usize> {
        let prefix = match (self.peek(0)?, self.peek(1)) {
            ('r', _) => 1,
            ('b' | 'c', Some('r')) => 2,
            _ => return None,
        };
        let hashes = (prefix..)
            .take_while(|ahead| self.peek(*ahead) == Some('#'))
            .count();
        (self.peek(prefix + hashes) == Some('"')).then_some(hashes)
    }

    fn raw_string(&mut self) {
        let hashes = self.raw_hashes().unwrap_or(0);
        self.blank_while(|lexer| lexer.peek(0) != Some('"'));
        self.blank();
        while self.at < self.input.len() {
            let closes = self.peek(0) == Some('"')
                && (1..=hashes).all(|ahead| self.peek(ahead) == Some('#'));
            self.blank();
            if closes {
                (0..hashes).for_each(|_| self.blank());
                return;
            }
        }
    }

    /// A character literal, or a lifetime (which is code).
    fn quote(&mut self) {
        let is_literal = self.peek(1) == Some('\\') || self.peek(2) == Some('\'');
        self.keep();
        if !is_literal {
            return;
        }
        if self.peek(0) == Some('\\') {
            self.blank();
        }
        self.blank();
        self.blank_while(|lexer| lexer.peek(0) != Some('\''));
        self.keep();
    }
}

/// Whether a character can be part of a name.
pub fn is_word(character: char) -> bool {
    character.is_alphanumeric() || character == '_'
}

/// The byte offsets at which a whole word stands in code.
pub fn words<'a>(code: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    code.match_indices(word)
        .map(|(at, _)| at)
        .filter(move |at| {
            let before = code[..*at].chars().next_back();
            let after = code[at + word.len()..].chars().next();
            !before.is_some_and(is_word) && !after.is_some_and(is_word)
        })
}

/// The line of a byte offset, from 1.
pub fn line_of(text: &str, offset: usize) -> usize {
    text[..offset].matches('\n').count() + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_literals_are_blanked() {
        for (text, code) in [
            ("a // b\nc", "a     \nc"),
            ("a /* x /* y */ z */ b", "a                   b"),
            (r#"f("dbg!()", x)"#, r#"f("      ", x)"#),
            (r#"f("\"x", y)"#, r#"f("   ", y)"#),
            ("let c = '\"'; d", "let c = ' '; d"),
            ("let c = '\\''; d", "let c = '  '; d"),
            ("fn f<'a>(x: &'a str)", "fn f<'a>(x: &'a str)"),
            ("for b in x", "for b in x"),
        ] {
            assert_eq!(code_of(text), code, "{text}");
        }
        let raw = "r#\"a \" b\"# + c";
        assert_eq!(code_of(raw).trim(), "+ c");
        assert_eq!(code_of(raw).len(), raw.len());
    }

    #[test]
    fn words_are_whole() {
        let code = "unsafe_code unsafe { } not_unsafe (unsafe)";
        assert_eq!(words(code, "unsafe").collect::<Vec<_>>(), [12, 35]);
    }
}
