//! libFuzzer on the target that `WEFT_FUZZ_TARGET` names; `cargo xtask fuzz` builds and runs it.

#![no_main]

use std::sync::OnceLock;

use mesh_fuzz::{Target, target};

/// Names the target.
const VARIABLE: &str = "WEFT_FUZZ_TARGET";

fn chosen() -> &'static Target {
    static CHOSEN: OnceLock<&'static Target> = OnceLock::new();
    CHOSEN.get_or_init(|| {
        let name = std::env::var(VARIABLE).unwrap_or_default();
        target(&name).unwrap_or_else(|| {
            eprintln!("{VARIABLE}={name:?} names no target");
            std::process::exit(2);
        })
    })
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let target = chosen();
    (target.run)(bytes.get(..target.max_bytes).unwrap_or(bytes));
});
