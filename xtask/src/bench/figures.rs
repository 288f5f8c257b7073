//! The figures by name. Names and units are a contract: other tools read them.

/// The variant without any mesh.
pub const DIRECT: &str = "direct";

/// The variant with Weft.
pub const WEFT: &str = "weft";

/// Weft with tunnels by its own codec.
pub const WEFT_NATIVE: &str = "weft-native";

/// Weft with tunnels by the `h2` crate.
pub const WEFT_H2: &str = "weft-h2";

/// For which variants a figure exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Audience {
    /// For all.
    All,
    /// For those with proxies.
    Meshes,
    /// For Weft alone: the others have no such action that this bench could time.
    Weft,
}

/// A figure.
#[derive(Debug, PartialEq, Eq)]
pub struct Figure {
    /// Its name.
    pub name: &'static str,
    /// Its unit.
    pub unit: &'static str,
    /// For which variants it exists.
    pub audience: Audience,
}

const fn figure(name: &'static str, unit: &'static str, audience: Audience) -> Figure {
    Figure {
        name,
        unit,
        audience,
    }
}

/// Every figure, in the order of the table.
pub static FIGURES: [Figure; 23] = [
    figure("bulk-1", "Gbit/s", Audience::All),
    figure("bulk-8", "Gbit/s", Audience::All),
    figure("http-rps-1", "/s", Audience::All),
    figure("http-rps-32", "/s", Audience::All),
    figure("http-p50-1", "µs", Audience::All),
    figure("http-p99-1", "µs", Audience::All),
    figure("http-p50-32", "µs", Audience::All),
    figure("http-p99-32", "µs", Audience::All),
    figure("rate2000-p50", "µs", Audience::All),
    figure("rate2000-p99", "µs", Audience::All),
    figure("rate2000-p999", "µs", Audience::All),
    figure("connect-rate", "/s", Audience::All),
    figure("neighbour-p99-quiet", "µs", Audience::All),
    figure("neighbour-p99-storm", "µs", Audience::All),
    figure("cpu-s-per-gb", "s", Audience::All),
    figure("cpu-s-per-10k-req", "s", Audience::All),
    figure("rss-idle-mb", "MB", Audience::Meshes),
    figure("rss-per-idle-conn-kb", "kB", Audience::Meshes),
    figure("same-node-bulk-1", "Gbit/s", Audience::All),
    figure("same-node-http-rps-32", "/s", Audience::All),
    figure("unenrolled-connect-us", "µs", Audience::All),
    figure("cold-start-ms", "ms", Audience::Weft),
    figure("enrol-ms", "ms", Audience::Weft),
];

/// The figure with this name.
///
/// # Errors
/// There is none; the text lists those that are.
pub fn parse(name: &str) -> Result<&'static Figure, String> {
    FIGURES
        .iter()
        .find(|figure| figure.name == name)
        .ok_or_else(|| {
            let names: Vec<&str> = FIGURES.iter().map(|figure| figure.name).collect();
            format!("no such figure; there are {}", names.join(", "))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_found() {
        for known in &FIGURES {
            assert_eq!(parse(known.name), Ok(known));
        }
        assert!(
            parse("bulk-2")
                .expect_err("unknown")
                .contains("bulk-1, bulk-8")
        );
    }
}
