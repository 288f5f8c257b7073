//! Every committed input, and variations of it, through every target: what once broke something never does again.

use std::{
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use mesh_fuzz::{TARGETS, Target};
use rand::{Rng as _, RngCore as _, SeedableRng as _, rngs::StdRng};

/// Variations of each input.
const VARIATIONS: usize = 24;

/// What one input may take, debug build and busy machine included: more is a way to keep a core busy.
const INPUT_TIME_MAX: Duration = Duration::from_secs(20);

#[test]
fn every_committed_input_is_read_without_a_panic() {
    let mut broken = Vec::new();
    for target in &TARGETS {
        let inputs = inputs(target);
        assert!(inputs.len() >= 3, "{} has no seeds", target.name);
        for (path, bytes) in inputs {
            assert!(
                bytes.len() <= target.max_bytes,
                "{} is longer than its target tries",
                path.display()
            );
            if let Err(what) = read(target, &bytes) {
                broken.push(format!("{}: {what}", path.display()));
            }
        }
    }
    assert_eq!(broken, [""; 0]);
}

#[test]
fn variations_of_committed_inputs_are_read_without_a_panic() {
    for target in TARGETS.iter().filter(|target| target.name != "relay") {
        for (index, (path, bytes)) in inputs(target).into_iter().enumerate() {
            let mut random = StdRng::seed_from_u64(index as u64);
            for round in 0..VARIATIONS {
                let varied = vary(&bytes, target.max_bytes, &mut random);
                if let Err(what) = read(target, &varied) {
                    panic!("{}, round {round}: {what}\n{varied:?}", path.display());
                }
            }
        }
    }
}

/// `cargo xtask fuzz` knows the targets by their folders.
#[test]
fn every_target_has_a_folder_and_every_folder_a_target() {
    let mut names: Vec<String> = TARGETS.iter().map(|it| it.name.to_owned()).collect();
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    let mut folders: Vec<String> = fs::read_dir(corpus)
        .expect("the corpus is there")
        .map(|entry| {
            entry
                .expect("readable")
                .file_name()
                .to_string_lossy()
                .into_owned()
        })
        .collect();
    names.sort();
    folders.sort();
    assert_eq!(names, folders);
}

#[test]
fn a_panic_is_seen() {
    let target = Target {
        name: "panics",
        boundary: "none",
        max_bytes: 1,
        run: |bytes| assert!(bytes.is_empty()),
    };
    read(&target, b"").expect("no panic");
    read(&target, b"x").expect_err("a panic");
}

fn read(target: &Target, bytes: &[u8]) -> Result<(), String> {
    let began = Instant::now();
    let outcome = catch_unwind(AssertUnwindSafe(|| (target.run)(bytes)));
    let took = began.elapsed();
    if outcome.is_err() {
        return Err("panicked, see above".to_owned());
    }
    if took > INPUT_TIME_MAX {
        return Err(format!("took {took:?}"));
    }
    Ok(())
}

fn inputs(target: &Target) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(target.name);
    let mut paths: Vec<PathBuf> = fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| entry.expect("readable").path())
        .collect();
    paths.sort();
    paths
        .into_iter()
        .map(|path| {
            let bytes = fs::read(&path).expect("readable");
            (path, bytes)
        })
        .collect()
}

/// Cuts, flips, repeats, or overwrites: what a careless peer or a bad cable does.
fn vary(bytes: &[u8], max_bytes: usize, random: &mut StdRng) -> Vec<u8> {
    let mut varied = bytes.to_vec();
    if varied.is_empty() {
        return vec![random.random()];
    }
    for _ in 0..random.random_range(1..4) {
        let at = random.random_range(0..varied.len());
        match random.random_range(0..4) {
            0 => varied.truncate(at.max(1)),
            1 => varied[at] ^= 1 << random.random_range(0..8),
            2 => {
                let piece = varied[at..].to_vec();
                varied.extend(piece);
            }
            _ => {
                let end = (at + 4).min(varied.len());
                random.fill_bytes(&mut varied[at..end]);
            }
        }
    }
    varied.truncate(max_bytes);
    varied
}
