//! Figures as humans read them.

/// Bytes with a decimal unit: `0 B`, `1.5 kB`, `23 MB`.
pub fn bytes(value: f64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    let mut scaled = value;
    let mut unit = 0;
    // 999.5 prints as "1000": move on before that.
    while scaled >= 999.5 && unit + 1 < UNITS.len() {
        scaled /= 1000.0;
        unit += 1;
    }
    let name = UNITS.get(unit).copied().unwrap_or("TB");
    if unit > 0 && scaled < 9.95 {
        format!("{scaled:.1} {name}")
    } else {
        format!("{scaled:.0} {name}")
    }
}

/// A rate per second: small ones with a decimal, so that a slow edge does not look dead.
pub fn rate(value: f64) -> String {
    if value == 0.0 || value >= 9.95 {
        format!("{value:.0}")
    } else {
        format!("{value:.1}")
    }
}

/// Microseconds: `85 µs`, `1.2 ms`, `3.4 s`.
pub fn micros(value: u64) -> String {
    match value {
        0..=999 => format!("{value} µs"),
        1_000..=999_999 => format!("{:.1} ms", value as f64 / 1e3),
        _ => format!("{:.1} s", value as f64 / 1e6),
    }
}

/// A span of seconds in its two largest units: `42s`, `3m5s`, `2h10m`, `9d4h`.
pub fn span(seconds: u64) -> String {
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3_600 % 24, seconds / 60 % 60);
    if days > 0 {
        format!("{days}d{hours}h")
    } else if hours > 0 {
        format!("{hours}h{minutes}m")
    } else if minutes > 0 {
        format!("{minutes}m{}s", seconds % 60)
    } else {
        format!("{seconds}s")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_choose_a_unit() {
        for (value, shown) in [
            (0.0, "0 B"),
            (999.0, "999 B"),
            (999.6, "1.0 kB"),
            (1_500.0, "1.5 kB"),
            (23_400_000.0, "23 MB"),
            (2e15, "2000 TB"),
        ] {
            assert_eq!(bytes(value), shown);
        }
    }

    #[test]
    fn times_choose_a_unit() {
        assert_eq!(
            [85, 1_234, 3_400_000].map(micros),
            ["85 µs", "1.2 ms", "3.4 s"]
        );
        assert_eq!(
            [42, 185, 7_800, 792_000].map(span),
            ["42s", "3m5s", "2h10m", "9d4h"]
        );
    }

    #[test]
    fn slow_rates_are_not_shown_as_zero() {
        assert_eq!([0.0, 0.2, 9.9, 10.4].map(rate), ["0", "0.2", "9.9", "10"]);
    }
}
