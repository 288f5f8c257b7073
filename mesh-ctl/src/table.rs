//! Aligned columns of text.

/// Rows under a header, columns two spaces apart, as wide as their widest cell. Lines are never wrapped or cut: a
/// human can widen the terminal, `less -S` or `grep` work on whole rows.
#[derive(Debug)]
pub struct Table {
    rows: Vec<Vec<String>>,
    right: Vec<bool>,
}

/// Spaces between two columns.
const GAP: &str = "  ";

impl Table {
    /// A table with these column titles. A title that starts with `>` makes its column right-aligned.
    pub fn new(titles: &[&str]) -> Self {
        Self {
            right: titles.iter().map(|title| title.starts_with('>')).collect(),
            rows: vec![
                titles
                    .iter()
                    .map(|title| title.trim_start_matches('>').to_owned())
                    .collect(),
            ],
        }
    }

    /// Adds a row. Control characters are shown escaped: names come from manifests and must not drive the terminal.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows
            .push(cells.into_iter().map(|cell| printable(&cell)).collect());
    }

    /// The lines, each ended by a newline, without trailing spaces.
    pub fn render(&self) -> String {
        let widths: Vec<usize> = (0..self.right.len())
            .map(|column| {
                self.rows
                    .iter()
                    .filter_map(|row| row.get(column))
                    .map(|cell| width(cell))
                    .max()
                    .unwrap_or(0)
            })
            .collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for ((cell, width_of_column), right) in row.iter().zip(&widths).zip(&self.right) {
                let padding = " ".repeat(width_of_column.saturating_sub(width(cell)));
                if !line.is_empty() {
                    line.push_str(GAP);
                }
                line.push_str(&if *right {
                    padding.clone() + cell
                } else {
                    cell.clone() + &padding
                });
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// `text` with control characters escaped and nothing empty.
pub fn printable(text: &str) -> String {
    if text.is_empty() {
        return "-".to_owned();
    }
    text.chars()
        .flat_map(|c| {
            if c.is_control() {
                c.escape_default().collect::<Vec<_>>()
            } else {
                vec![c]
            }
        })
        .collect()
}

/// Columns on a terminal. Names in Kubernetes are ASCII, so counting characters is exact for them.
fn width(text: &str) -> usize {
    text.chars().count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table = Table::new(&["NAME", ">OPEN", "NOTE"]);
        table.row(["web".to_owned(), "7".to_owned(), "".to_owned()]);
        table.row([
            "a-long-name".to_owned(),
            "12345".to_owned(),
            "µs count as one".to_owned(),
        ]);
        assert_eq!(
            table.render(),
            "NAME          OPEN  NOTE\n\
             web              7  -\n\
             a-long-name  12345  µs count as one\n"
        );
    }

    #[test]
    fn names_cannot_drive_the_terminal() {
        let mut table = Table::new(&["NAME"]);
        table.row(["\u{1b}[2Jweb\n".to_owned()]);
        assert_eq!(table.render(), "NAME\n\\u{1b}[2Jweb\\n\n");
    }
}
