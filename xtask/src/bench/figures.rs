//! The figures by name, and what was promised of them. Names and units are a contract: other tools read them.

/// The variant without any mesh.
pub const DIRECT: &str = "direct";

/// The variant with Weft.
pub const WEFT: &str = "weft";

/// Weft with tunnels by its own codec.
pub const WEFT_NATIVE: &str = "weft-native";

/// Weft with tunnels by the `h2` crate.
pub const WEFT_H2: &str = "weft-h2";

/// Selects all figures of [`Audience::Scale`].
pub const SCALE: &str = "scale";

/// For which variants a figure exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Audience {
    /// For all.
    All,
    /// For those with proxies.
    Meshes,
    /// For Weft alone: the others have no such action that this bench could time.
    Weft,
    /// For Weft alone, on a node and a mesh that are large; measured only when asked for.
    Scale,
}

/// How large or small something shall be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Bound {
    /// This or more.
    AtLeast(f64),
    /// This or less.
    AtMost(f64),
}

impl Bound {
    /// Whether a value is within it.
    pub fn holds(self, value: f64) -> bool {
        match self {
            Self::AtLeast(bound) => value >= bound,
            Self::AtMost(bound) => value <= bound,
        }
    }

    /// The same direction of a ratio, without any advantage.
    pub fn no_worse(self) -> Self {
        match self {
            Self::AtLeast(_) => Self::AtLeast(1.0),
            Self::AtMost(_) => Self::AtMost(1.0),
        }
    }
}

impl std::fmt::Display for Bound {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::AtLeast(bound) => write!(f, "≥ {bound}"),
            Self::AtMost(bound) => write!(f, "≤ {bound}"),
        }
    }
}

/// A figure.
#[derive(Debug, PartialEq)]
pub struct Figure {
    /// Its name.
    pub name: &'static str,
    /// Its unit.
    pub unit: &'static str,
    /// For which variants it exists.
    pub audience: Audience,
    /// What Weft shall reach.
    pub value: Option<Bound>,
    /// What Weft shall reach in relation to no mesh.
    pub to_direct: Option<Bound>,
    /// What Weft shall reach in relation to another mesh.
    pub to_peer: Option<Bound>,
}

const fn figure(name: &'static str, unit: &'static str, audience: Audience) -> Figure {
    Figure {
        name,
        unit,
        audience,
        value: None,
        to_direct: None,
        to_peer: None,
    }
}

impl Figure {
    const fn shall_be(mut self, bound: Bound) -> Self {
        self.value = Some(bound);
        self
    }

    const fn by_direct(mut self, bound: Bound) -> Self {
        self.to_direct = Some(bound);
        self
    }

    const fn by_peer(mut self, bound: Bound) -> Self {
        self.to_peer = Some(bound);
        self
    }
}

/// The figure that is the difference of another one to `direct`, and that other one.
pub const ADDED: (&str, &str) = ("added-p50-1", "http-p50-1");

/// Every figure, in the order of the table.
pub static FIGURES: [Figure; 45] = {
    use Audience::{All, Meshes, Scale, Weft};
    use Bound::{AtLeast, AtMost};
    [
        figure("bulk-1", "Gbit/s", All).by_peer(AtLeast(1.5)),
        figure("bulk-8", "Gbit/s", All).by_peer(AtLeast(1.5)),
        figure("http-rps-1", "/s", All),
        figure("http-rps-32", "/s", All).by_peer(AtLeast(1.4)),
        figure("http-p50-1", "µs", All),
        figure("http-p99-1", "µs", All),
        figure("http-p50-32", "µs", All),
        figure("http-p99-32", "µs", All),
        figure(ADDED.0, "µs", All).by_peer(AtMost(0.8)),
        figure("rate2000-p50", "µs", All),
        figure("rate2000-p99", "µs", All).by_peer(AtMost(1.0)),
        figure("rate2000-p999", "µs", All),
        figure("connect-rate", "/s", All).by_peer(AtLeast(1.5)),
        figure("connect-rate-many", "/s", All).by_peer(AtLeast(1.5)),
        figure("neighbour-p99-quiet", "µs", All),
        figure("neighbour-p99-storm", "µs", All),
        figure("cpu-s-per-gb", "s", All).by_peer(AtMost(0.65)),
        figure("cpu-s-per-10k-req", "s", All).by_peer(AtMost(0.65)),
        figure("rss-idle-mb", "MB", Meshes).shall_be(AtMost(16.0)),
        figure("rss-1k-conns-mb", "MB", Meshes),
        figure("rss-10k-conns-mb", "MB", Meshes),
        figure("rss-per-idle-conn-kb", "kB", Meshes).shall_be(AtMost(3.0)),
        figure("rss-per-idle-conn-10k-kb", "kB", Meshes).shall_be(AtMost(3.0)),
        figure("rss-per-workload-kb", "kB", Weft),
        figure("cpu-idle-50-percent", "%", Weft).shall_be(AtMost(0.1)),
        figure("same-node-bulk-1", "Gbit/s", All).by_direct(AtLeast(0.97)),
        figure("same-node-http-rps-32", "/s", All).by_direct(AtLeast(0.97)),
        figure("unenrolled-connect-us", "µs", All).by_direct(AtMost(1.01)),
        figure("cold-start-ms", "ms", Weft).shall_be(AtMost(300.0)),
        figure("enrol-ms", "ms", Weft),
        figure("scale-control-start-s", "s", Scale),
        figure("scale-sync-s", "s", Scale),
        figure("scale-control-mb", "MB", Scale),
        figure("scale-agent-mesh-mb", "MB", Scale),
        figure("scale-enrol-s", "s", Scale),
        figure("scale-enrol-last-ms", "ms", Scale),
        figure("scale-agent-enrolled-mb", "MB", Scale),
        figure("scale-cpu-idle-percent", "%", Scale),
        figure("scale-tunnelled", "", Scale),
        figure("scale-same-node", "", Scale),
        figure("scale-open-s", "s", Scale),
        figure("scale-agent-open-mb", "MB", Scale),
        figure("scale-far-agent-open-mb", "MB", Scale),
        figure("scale-cpu-open-percent", "%", Scale),
        figure("scale-endpoint-ms", "ms", Scale),
    ]
};

/// One or several figures, by one name.
#[derive(Debug, Clone, PartialEq)]
pub struct Selection(pub Vec<&'static Figure>);

/// The figure with this name, or all that [`SCALE`] stands for.
///
/// # Errors
/// There is none; the text lists those that are.
pub fn parse(name: &str) -> Result<Selection, String> {
    let selected: Vec<&'static Figure> = FIGURES
        .iter()
        .filter(|figure| {
            figure.name == name || (name == SCALE && figure.audience == Audience::Scale)
        })
        .collect();
    if selected.is_empty() {
        let names: Vec<&str> = FIGURES.iter().map(|figure| figure.name).collect();
        return Err(format!(
            "no such figure; there are {}, and {SCALE} for all that begin with it",
            names.join(", ")
        ));
    }
    Ok(Selection(selected))
}

/// What is measured when nothing is asked for.
pub fn default_selection() -> Vec<&'static Figure> {
    FIGURES
        .iter()
        .filter(|figure| figure.audience != Audience::Scale)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_found() {
        for known in &FIGURES {
            assert_eq!(parse(known.name), Ok(Selection(vec![known])));
        }
        assert!(
            parse("bulk-2")
                .expect_err("unknown")
                .contains("bulk-1, bulk-8")
        );
    }

    #[test]
    fn figures_of_scale_are_taken_only_when_asked_for() {
        let scale = parse(SCALE).expect("a group").0;
        assert!(scale.iter().all(|figure| figure.name.starts_with("scale-")));
        let default = default_selection();
        assert_eq!(default.len() + scale.len(), FIGURES.len());
        assert!(!default.iter().any(|figure| scale.contains(figure)));
    }

    #[test]
    fn a_bound_includes_its_value() {
        assert!(Bound::AtLeast(1.5).holds(1.5) && !Bound::AtLeast(1.5).holds(1.49));
        assert!(Bound::AtMost(0.65).holds(0.65) && !Bound::AtMost(0.65).holds(0.66));
        assert_eq!(Bound::AtMost(16.0).to_string(), "≤ 16");
    }
}
