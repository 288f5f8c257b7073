//! Removing what an agent left, without an agent.

use super::{AgentError, handover::draining, records::Records, run_dir::RunDir};
use crate::{
    capture::{
        kernel::{KernelConfig, remove_agent_cgroup, remove_node_pins},
        undo_record,
    },
    config::AgentConfig,
};

/// Removes programs, maps, links, rules, routes, sysctls, the agent's cgroup and the files in the run directory.
///
/// # Errors
/// When an agent is running or draining, or the records cannot be read. What cannot be removed in a namespace is logged, and the
/// rest goes on.
pub fn uninstall(config: &AgentConfig) -> Result<(), AgentError> {
    let run_dir = RunDir::open(&config.node.run_dir)?;
    let draining = draining::list(run_dir.path());
    if !draining.is_empty() {
        let pids: Vec<String> = draining.iter().map(|one| one.pid.to_string()).collect();
        return Err(AgentError::Draining(pids.join(", ")));
    }
    let records = Records::new(&config.node.run_dir);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| AgentError::System {
            what: "a runtime",
            source,
        })?;
    // Programs first: while they are there, a namespace without its routes would refuse everything.
    remove_kernel_side(config);
    let known = records.load().unwrap_or_else(|error| {
        tracing::error!(%error, "rules and routes of unknown workloads stay in their namespaces");
        Vec::new()
    });
    for record in known {
        let workload = format!("{}/{}", record.enrolment.namespace, record.enrolment.name);
        match runtime.block_on(undo_record(&record)) {
            Ok(()) => tracing::info!(%workload, "un-enrolled"),
            Err(error) => tracing::error!(%workload, %error, "something stays behind"),
        }
    }
    records.remove()?;
    run_dir.remove_all();
    tracing::info!(node = %config.node.name, "uninstalled");
    Ok(())
}

/// Removes pins and the agent's cgroup.
pub(super) fn remove_kernel_side(config: &AgentConfig) {
    let kernel = kernel_config(config);
    remove_node_pins(&kernel);
    remove_agent_cgroup(&kernel);
}

/// Where the kernel objects of this agent live.
pub(super) fn kernel_config(config: &AgentConfig) -> KernelConfig {
    KernelConfig {
        cgroup_root: config.kernel.cgroup_root.clone(),
        bpffs_root: config.kernel.bpffs_root.clone(),
        node: config.node.name.clone(),
        abi: config.kernel.abi,
        flows_max: config.kernel.flows_max,
    }
}
