//! Load for the bench: servers and clients small enough that the mesh, not they, is what is measured, and the same
//! for every variant. Only the standard library, epoll and a timer; each runs until it is told or killed.

pub mod bulk;
pub mod connect;
pub mod echo;
pub mod hold;
pub mod http;

mod epoll;

use std::time::Duration;

/// Longest wait for a connection to be made or for one answer: beyond it the path is broken, not slow.
pub const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// Bytes of a ping and of a pong.
pub const PING_BYTES: usize = 64;
