//! `weft check`: can this machine run an agent, and what to do where it cannot.
//!
//! [`read`] looks at the machine, [`judge`] turns what it saw into findings without touching anything.

mod judge;
mod mounts;
mod read;

use std::path::Path;

use serde::Serialize;

use crate::{cli::CheckArgs, client::Client, table::Table};

/// How one requirement fares.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// Holds.
    Ok,
    /// Works, with less, or could not be looked at.
    Warn,
    /// No agent can run here until it is fixed.
    Fail,
}

/// What was found for one requirement.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Name of the requirement.
    pub check: &'static str,
    /// How it fares.
    pub outcome: Outcome,
    /// What was found.
    pub found: String,
    /// What to do; absent when all is well.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
}

impl Finding {
    fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self {
            check,
            outcome: Outcome::Ok,
            found: found.into(),
            fix: None,
        }
    }

    fn warn(check: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            check,
            outcome: Outcome::Warn,
            found: found.into(),
            fix: Some(fix.into()),
        }
    }

    fn fail(check: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            check,
            outcome: Outcome::Fail,
            found: found.into(),
            fix: Some(fix.into()),
        }
    }
}

/// Looks at everything an agent with these options needs.
pub fn run(args: &CheckArgs, run_dir: &Path, client: &Client) -> Vec<Finding> {
    let mounts = read::mounts();
    let cgroup = read::cgroup(args.cgroup_root.as_deref(), &mounts);
    vec![
        judge::kernel(read::kernel_release()),
        judge::btf(read::exists("/sys/kernel/btf/vmlinux")),
        judge::program_types(read::btf_names(&judge::PROGRAM_TYPE_FUNCTIONS)),
        judge::jit(read::text("/proc/sys/net/core/bpf_jit_enable")),
        judge::cgroup(&cgroup),
        judge::bpffs(&args.bpffs_root, &mounts),
        judge::capabilities(read::text("/proc/self/status")),
        judge::descriptors(read::descriptor_limits()),
        judge::port_range(read::text("/proc/sys/net/ipv4/ip_local_port_range")),
        judge::fwmark_accept(read::exists("/proc/sys/net/ipv4/tcp_fwmark_accept")),
        judge::ipv6(
            read::exists("/proc/net/if_inet6"),
            read::text("/proc/sys/net/ipv6/conf/all/disable_ipv6"),
        ),
        judge::space(run_dir, read::free_bytes(run_dir)),
        judge::agent(client.ask(&mesh_api::local::Request::Status)),
    ]
}

/// Whether an agent can run.
pub fn passed(findings: &[Finding]) -> bool {
    findings
        .iter()
        .all(|finding| finding.outcome != Outcome::Fail)
}

/// A line per requirement, its fix below it where there is one, and a summary.
pub fn table(findings: &[Finding]) -> String {
    let mut table = Table::new(&["CHECK", "RESULT", "FOUND"]);
    for finding in findings {
        let result = match finding.outcome {
            Outcome::Ok => "ok",
            Outcome::Warn => "warn",
            Outcome::Fail => "FAIL",
        };
        table.row([
            finding.check.to_owned(),
            result.to_owned(),
            finding.found.clone(),
        ]);
        if let Some(fix) = &finding.fix {
            table.row([" ".to_owned(), " ".to_owned(), format!("fix: {fix}")]);
        }
    }
    let count = |outcome| {
        findings
            .iter()
            .filter(|finding| finding.outcome == outcome)
            .count()
    };
    let (failed, warned) = (count(Outcome::Fail), count(Outcome::Warn));
    let summary = match (failed, warned) {
        (0, 0) => "This machine can run an agent.".to_owned(),
        (0, _) => format!("This machine can run an agent ({warned} to look at)."),
        _ => format!("An agent cannot run here yet: {failed} to fix, {warned} to look at."),
    };
    format!("{}\n{summary}\n", table.render())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fixes_stand_below_their_finding() {
        let findings = [
            Finding::ok("kernel", "6.18.0"),
            Finding::warn("ipv6", "off", "turn it on"),
            Finding::fail("bpffs", "not mounted", "mount it"),
        ];
        let expected = "\
CHECK   RESULT  FOUND
kernel  ok      6.18.0
ipv6    warn    off
                fix: turn it on
bpffs   FAIL    not mounted
                fix: mount it

An agent cannot run here yet: 1 to fix, 1 to look at.
";
        assert_eq!(table(&findings), expected);
        assert!(!passed(&findings));
        assert!(passed(&findings[..2]), "warnings do not fail");
        assert!(table(&findings[..1]).ends_with("\nThis machine can run an agent.\n"));
    }
}
