//! The access log: one line per finished or failed connection, target `access`.

use std::{fmt::Display, time::Duration};

use super::{CloseReason, ConnectionInfo, KernelFlow, Party};

/// Optional text for a log field.
struct Or<T>(Option<T>);

impl<T: Display> Display for Or<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.0 {
            Some(value) => value.fmt(f),
            None => f.write_str("-"),
        }
    }
}

fn workload(party: &Party) -> Or<&str> {
    Or(party.workload.as_ref().map(|workload| &*workload.name))
}

fn namespace(party: &Party) -> Or<&str> {
    let known = party.workload.as_ref().map(|workload| &*workload.namespace);
    Or(known.or(party
        .identity
        .as_ref()
        .map(mesh_api::identity::Identity::namespace)))
}

macro_rules! line {
    ($info:expr, $($field:tt)*) => {
        tracing::info!(
            target: "access",
            direction = $info.direction.name(),
            security = $info.security.name(),
            src.addr = %Or($info.source.address),
            src.workload = %workload(&$info.source),
            src.namespace = %namespace(&$info.source),
            src.identity = %Or($info.source.identity.as_ref()),
            dst.addr = %Or($info.destination.address),
            dst.workload = %workload(&$info.destination),
            dst.namespace = %namespace(&$info.destination),
            dst.identity = %Or($info.destination.identity.as_ref()),
            dst.service = %Or($info.service.as_deref()),
            $($field)*
        )
    };
}

fn milliseconds(took: Duration) -> u64 {
    u64::try_from(took.as_millis()).unwrap_or(u64::MAX)
}

/// A connection that was established and has ended. `bytes` are sent and received; an RTT of 0 was not measured.
pub(super) fn closed(
    info: &ConnectionInfo,
    reason: CloseReason,
    took: Duration,
    bytes: (u64, u64),
    rtt_us: u32,
) {
    line!(
        info,
        bytes_sent = bytes.0,
        bytes_received = bytes.1,
        duration_ms = milliseconds(took),
        rtt_us,
        reason = reason.name(),
        "connection closed"
    );
}

/// A connection that was never established.
pub(super) fn failed(info: &ConnectionInfo, reason: CloseReason, error: &dyn Display) {
    line!(info, reason = reason.name(), error = %error, "connection failed");
}

/// Connections that the kernel carried; one line for all that ended since the last report.
pub(super) fn kernel(info: &ConnectionInfo, flow: KernelFlow) {
    line!(
        info,
        connections = flow.closed,
        bytes_sent = flow.bytes_sent,
        bytes_received = flow.bytes_received,
        rtt_us = flow.rtt_us.unwrap_or(0),
        reason = CloseReason::Finished.name(),
        "kernel connections closed"
    );
}
