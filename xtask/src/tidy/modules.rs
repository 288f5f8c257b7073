//! Files that no `mod` line reaches are dead.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use super::{
    Finding, Source,
    lexer::{code_of, is_word, words},
};

/// Rust files that the compiler never sees.
pub fn unreachable(sources: &[Source]) -> Vec<Finding> {
    let files: BTreeMap<&Path, &Source> = sources
        .iter()
        .filter(|source| source.is("rs"))
        .map(|source| (source.path.as_path(), source))
        .collect();
    let mut reached = BTreeSet::new();
    let mut waiting: Vec<&Source> = files
        .values()
        .copied()
        .filter(|source| is_root(&source.path))
        .collect();
    while let Some(source) = waiting.pop() {
        if !reached.insert(source.path.clone()) {
            continue;
        }
        let parent = source.path.parent().unwrap_or(Path::new(""));
        waiting.extend(
            paths_of(&source.text).filter_map(|path| files.get(parent.join(path).as_path())),
        );
        for name in modules_of(&source.text) {
            let folder = folder_of_modules(&source.path);
            let candidates = [
                folder.join(format!("{name}.rs")),
                folder.join(name).join("mod.rs"),
            ];
            waiting.extend(
                candidates
                    .iter()
                    .filter_map(|path| files.get(path.as_path())),
            );
        }
    }
    files
        .into_iter()
        .filter(|(path, _)| !reached.contains(*path))
        .map(|(_, source)| source.finding(0, "a dead file: no mod line reaches it"))
        .collect()
}

/// Files that cargo hands to the compiler itself.
fn is_root(path: &Path) -> bool {
    let name = path
        .file_name()
        .and_then(|name| name.to_str())
        .unwrap_or_default();
    let parent = path
        .parent()
        .and_then(Path::file_name)
        .and_then(|name| name.to_str())
        .unwrap_or_default();
    let is_own_folder = matches!(
        parent,
        "bin" | "tests" | "benches" | "examples" | "fuzz_targets"
    );
    matches!(name, "lib.rs" | "main.rs" | "build.rs") || (is_own_folder && name != "mod.rs")
}

/// The folder in which the modules that a file declares lie.
fn folder_of_modules(path: &Path) -> PathBuf {
    let parent = path.parent().unwrap_or(Path::new("")).to_owned();
    let stem = path
        .file_stem()
        .and_then(|stem| stem.to_str())
        .unwrap_or_default();
    if stem == "mod" || is_root(path) {
        parent
    } else {
        parent.join(stem)
    }
}

fn modules_of(text: &str) -> Vec<String> {
    let code = code_of(text);
    words(&code, "mod")
        .filter_map(|at| {
            let rest = code[at + "mod".len()..].trim_start();
            let name: String = rest
                .chars()
                .take_while(|character| is_word(*character))
                .collect();
            rest[name.len()..]
                .trim_start()
                .starts_with(';')
                .then_some(name)
        })
        .collect()
}

/// Files that `#[path = "…"]` names.
fn paths_of(text: &str) -> impl Iterator<Item = &str> {
    text.lines()
        .filter_map(|line| line.trim().strip_prefix("#[path = \"")?.strip_suffix("\"]"))
}

#[cfg(test)]
mod tests {
    use super::{super::testing::*, *};

    #[test]
    fn a_file_without_a_mod_line_is_dead() {
        let sources = [
            source(
                "a/src/lib.rs",
                "mod one;\npub mod two { fn x() {} }\n// mod three;\n",
            ),
            source("a/src/one.rs", "pub(crate) mod inner;"),
            source("a/src/one/inner.rs", ""),
            source("a/src/three.rs", ""),
            source("a/src/bin/tool.rs", "mod four;"),
            source("a/src/four/mod.rs", ""),
            source("a/src/bin/four.rs", ""),
            source("a/tests/whole.rs", "mod common;"),
            source("a/tests/common/mod.rs", ""),
            source("a/build.rs", ""),
        ];
        let dead: Vec<String> = unreachable(&sources)
            .iter()
            .map(|finding| finding.file.display().to_string())
            .collect();
        assert_eq!(dead, ["a/src/four/mod.rs", "a/src/three.rs"]);
    }
}
