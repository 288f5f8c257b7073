//! Rules about single Rust files.

use super::{
    Finding, Source,
    lexer::{code_of, line_of, words},
};

/// Lines of a file; about 500 are meant.
const FILE_MAX_LINES: usize = 700;

/// Lines of a function, from `fn` to its last brace; about 70 are meant.
const FUNCTION_MAX_LINES: usize = 100;

/// Where unsafe code may be: the kernel's side, and system calls.
const UNSAFE_PLACES: [&str; 2] = ["mesh-ebpf/", "mesh-agent/src/sys/"];

/// The one file of the tests that lets time pass.
const WAITING_PLACE: &str = "tests/src/wait.rs";

/// How far above an unsafe block its SAFETY comment may begin, in lines.
const SAFETY_DISTANCE_LINES: usize = 8;

/// Libraries, which log instead of printing.
const LIBRARIES: [&str; 4] = [
    "mesh-api/src/",
    "mesh-ebpf/src/",
    "mesh-agent/src/",
    "mesh-control/src/",
];

/// Applies every rule to a file.
pub fn check(source: &Source) -> Vec<Finding> {
    let code = code_of(&source.text);
    [
        lengths(source, &code),
        leftovers(source, &code),
        waiting(source, &code),
        unsafety(source, &code),
        header(source),
    ]
    .concat()
}

/// Files of unit tests beside the code: their tables of cases may be long, and the module tested says what it is for.
fn is_unit_test(source: &Source) -> bool {
    let name = source.name();
    name.contains("/src/")
        && (name.ends_with("/tests.rs") || name.ends_with("_tests.rs") || name.contains("/tests/"))
}

fn lengths(source: &Source, code: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    let lines = source.text.lines().count();
    if lines > FILE_MAX_LINES {
        findings.push(source.finding(
            0,
            format!("{lines} lines, at most {FILE_MAX_LINES}: split it"),
        ));
    }
    if is_unit_test(source) {
        return findings;
    }
    for start in words(code, "fn") {
        let Some(end) = end_of_body(code, start) else {
            continue;
        };
        let lines = code[start..end].matches('\n').count() + 1;
        if lines > FUNCTION_MAX_LINES {
            let message =
                format!("a function of {lines} lines, at most {FUNCTION_MAX_LINES}: split it");
            findings.push(source.finding(line_of(code, start), message));
        }
    }
    findings
}

/// Offset behind the closing brace of the function that begins here; `None` if it has no body.
fn end_of_body(code: &str, start: usize) -> Option<usize> {
    let mut depth = 0_u32;
    let mut nested = 0_u32;
    for (offset, character) in code[start..].char_indices() {
        match character {
            '(' | '[' if depth == 0 => nested += 1,
            ')' | ']' if depth == 0 => nested = nested.checked_sub(1)?,
            ';' | ',' | '}' if depth == 0 && nested == 0 => return None,
            '{' => depth += 1,
            '}' if depth > 0 => {
                depth -= 1;
                if depth == 0 {
                    return Some(start + offset + 1);
                }
            }
            _ => {}
        }
    }
    None
}

fn leftovers(source: &Source, code: &str) -> Vec<Finding> {
    let name = source.name();
    let mut findings = Vec::new();
    for leftover in ["dbg!", "todo!", "unimplemented!"] {
        for at in code.match_indices(leftover).map(|(at, _)| at) {
            findings.push(source.finding(line_of(code, at), format!("{leftover} left over")));
        }
    }
    let is_program = name.ends_with("/main.rs") || name.contains("/bin/");
    if LIBRARIES.iter().any(|library| name.starts_with(library)) && !is_program {
        for macro_name in ["println", "eprintln", "print", "eprint"] {
            let calls =
                words(code, macro_name).filter(|at| code[at + macro_name.len()..].starts_with('!'));
            findings.extend(calls.map(|at| {
                source.finding(
                    line_of(code, at),
                    format!("{macro_name}! in a library: log it"),
                )
            }));
        }
    }
    for at in code.match_indices("#[ignore").map(|(at, _)| at) {
        let message = "an ignored test proves nothing: make it run, or note a skip with its reason";
        findings.push(source.finding(line_of(code, at), message));
    }
    findings
}

/// Elsewhere clippy knows: `std::thread::sleep` is disallowed, and tokio's is fine under paused time.
fn waiting(source: &Source, code: &str) -> Vec<Finding> {
    let name = source.name();
    if name == WAITING_PLACE || !name.starts_with("tests/") {
        return Vec::new();
    }
    words(code, "sleep")
        .filter(|at| code[at + "sleep".len()..].starts_with('('))
        .map(|at| {
            source.finding(
                line_of(code, at),
                format!("a sleep: wait for an event, with {WAITING_PLACE}"),
            )
        })
        .collect()
}

fn unsafety(source: &Source, code: &str) -> Vec<Finding> {
    let name = source.name();
    let is_allowed = UNSAFE_PLACES.iter().any(|place| name.starts_with(place));
    let lines: Vec<&str> = source.text.lines().collect();
    let mut findings = Vec::new();
    for at in words(code, "unsafe") {
        let line = line_of(code, at);
        if !is_allowed {
            findings.push(source.finding(line, "unsafe code outside the places for it"));
            continue;
        }
        let rest = code[at + "unsafe".len()..].trim_start();
        let needs_reason = rest.starts_with('{') || rest.starts_with("impl");
        if needs_reason && !has_reason(&lines[..line]) {
            findings.push(source.finding(line, "unsafe code without a SAFETY comment"));
        }
    }
    findings
}

/// Whether a SAFETY comment stands shortly above the last of these lines, or above the list of unsafe implementations
/// that it ends.
fn has_reason(lines: &[&str]) -> bool {
    let list = lines
        .iter()
        .rev()
        .skip(1)
        .take_while(|text| text.trim_start().starts_with("unsafe impl"))
        .count();
    let above = lines.iter().rev().skip(list).take(SAFETY_DISTANCE_LINES);
    above.into_iter().any(|text| text.contains("SAFETY"))
}

fn header(source: &Source) -> Vec<Finding> {
    let is_documented = source
        .text
        .lines()
        .find(|line| !line.trim().is_empty())
        .is_some_and(|l| l.starts_with("//!"));
    if is_documented || is_unit_test(source) {
        Vec::new()
    } else {
        vec![source.finding(1, "no //! line that says what the file is for")]
    }
}

#[cfg(test)]
mod tests {
    use super::{super::testing::*, *};

    fn findings(path: &str, text: &str) -> Vec<String> {
        told(&check(&source(path, &format!("//! A file.\n{text}"))))
    }

    #[test]
    fn a_good_file_has_no_findings() {
        let text = "/// Says \"todo!\".\nfn f() -> [u8; 2] { [1, 2] }\ntrait T { fn g(&self); }\n";
        assert!(findings("mesh-agent/src/x.rs", text).is_empty());
    }

    #[test]
    fn long_files_and_functions_are_found() {
        let body = "    x();\n".repeat(FUNCTION_MAX_LINES);
        let long = format!("fn short() {{}}\nfn long() {{\n{body}}}\n");
        assert_eq!(
            findings("xtask/src/x.rs", &long),
            ["3: a function of 102 lines, at most 100: split it"]
        );
        let told = findings("xtask/src/x.rs", &"// line\n".repeat(FILE_MAX_LINES));
        assert_eq!(told, ["0: 701 lines, at most 700: split it"]);
    }

    #[test]
    fn leftovers_are_found_where_they_are_code() {
        assert_eq!(
            findings("xtask/src/x.rs", "fn f() { dbg!(1); }\n"),
            ["2: dbg! left over"]
        );
        assert_eq!(
            findings("mesh-agent/src/x.rs", "fn f() { println!(); }\n"),
            ["2: println! in a library: log it"]
        );
        assert!(findings("mesh-agent/src/main.rs", "fn f() { println!(); }\n").is_empty());
        assert!(
            findings(
                "mesh-agent/src/x.rs",
                "fn f() { log(\"println!\"); } // dbg!\n"
            )
            .is_empty()
        );
        assert_eq!(
            findings("tests/tests/x.rs", "#[test]\n#[ignore]\nfn f() {}\n").len(),
            1
        );
    }

    #[test]
    fn sleeps_in_tests_are_found_except_in_their_place() {
        let sleeps = "fn f() { std::thread::sleep(x); }\n";
        assert_eq!(findings("tests/tests/x.rs", sleeps).len(), 1);
        assert_eq!(
            findings("tests/src/x.rs", "fn f() { sleep(x); }\n").len(),
            1
        );
        assert!(findings(WAITING_PLACE, sleeps).is_empty());
        assert!(findings("tests/src/x.rs", "fn f() { g(\"sleep(1)\"); }\n").is_empty());
    }

    #[test]
    fn unsafe_needs_its_place_and_its_reason() {
        let bare = "fn f() { unsafe { g() } }\n";
        assert_eq!(
            findings("mesh-control/src/x.rs", bare),
            ["2: unsafe code outside the places for it"]
        );
        assert_eq!(
            findings("mesh-agent/src/sys/x.rs", bare),
            ["2: unsafe code without a SAFETY comment"]
        );
        let reasoned = "fn f() {\n    // SAFETY: g has no conditions.\n    unsafe { g() }\n}\n";
        assert!(findings("mesh-agent/src/sys/x.rs", reasoned).is_empty());
        assert!(findings("mesh-control/src/x.rs", "#![forbid(unsafe_code)]\n").is_empty());
    }

    #[test]
    fn a_file_says_what_it_is_for() {
        assert_eq!(check(&source("xtask/src/x.rs", "fn f() {}\n")).len(), 1);
    }
}
