//! Starting, following the mesh, enrolling on request, draining and uninstalling: what ties the other modules together.

mod agent;
mod credentials;
mod enrolment;
mod error;
mod follow;
mod handover;
mod harden;
mod kernel_metrics;
pub mod records;
mod requests;
mod run_dir;
mod same_node;
mod standalone;
mod uninstall;

pub use agent::{report_failed_start, run};
pub use error::AgentError;
pub use handover::HandoverError;
pub use harden::{Confined, confine};
pub use uninstall::uninstall;
