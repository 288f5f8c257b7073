//! Idle connections: opened, used once, and kept.

use std::{
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    thread,
};

use anyhow::{Result, anyhow, bail};

use super::{ANSWER_LIMIT, connect::ping};
use crate::{cgroup, netns};

/// Threads that open connections from several namespaces: enough to keep a mesh busy while tunnels are made.
const THREADS: usize = 8;

/// From where connections are opened.
#[derive(Debug, Clone, Default)]
pub struct Places {
    /// These network namespaces, so many connections from each; none: the caller's own.
    pub netns: Vec<PathBuf>,
    /// The cgroup that the process joins for the sockets of each of them; none: it stays where it is.
    pub cgroups: Vec<PathBuf>,
}

/// Connections that are open and have played one ping-pong each: `connections` from every place.
///
/// # Errors
/// One cannot be made, or a place cannot be entered.
pub fn hold(address: SocketAddr, connections: usize, places: &Places) -> Result<Vec<TcpStream>> {
    let Places { netns, cgroups } = places;
    if netns.is_empty() {
        return open(address, connections);
    }
    if cgroups.is_empty() {
        return hold_in_parallel(address, connections, netns);
    }
    if cgroups.len() != netns.len() {
        bail!("there must be as many cgroups as namespaces");
    }
    let mut held = Vec::new();
    for (netns, cgroup) in netns.iter().zip(cgroups) {
        cgroup::join(cgroup)?;
        held.append(&mut open_in(netns, address, connections)?);
    }
    Ok(held)
}

fn hold_in_parallel(
    address: SocketAddr,
    connections: usize,
    netns: &[PathBuf],
) -> Result<Vec<TcpStream>> {
    let from_each = |share: &[PathBuf]| {
        let mut held = Vec::new();
        for netns in share {
            held.append(&mut open_in(netns, address, connections)?);
        }
        Ok(held)
    };
    thread::scope(|scope| {
        let threads: Vec<_> = netns
            .chunks(netns.len().div_ceil(THREADS))
            .map(|share| scope.spawn(move || from_each(share)))
            .collect();
        let mut held = Vec::new();
        for thread in threads {
            let opened: Result<Vec<TcpStream>> =
                thread.join().map_err(|_| anyhow!("a thread panicked"))?;
            held.append(&mut opened?);
        }
        Ok(held)
    })
}

fn open_in(netns: &Path, address: SocketAddr, connections: usize) -> Result<Vec<TcpStream>> {
    netns::within(netns, || open(address, connections))?
}

fn open(address: SocketAddr, connections: usize) -> Result<Vec<TcpStream>> {
    (0..connections)
        .map(|_| ping(address, ANSWER_LIMIT))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        net::TcpListener,
    };

    use super::*;
    use crate::load::{
        PING_BYTES,
        echo::{self, Echo},
    };

    fn server() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("bound");
        thread::spawn(move || echo::serve::<Echo>(&[listener]));
        address
    }

    #[test]
    fn held_connections_stay_open() {
        let mut held = hold(server(), 5, &Places::default()).expect("five connections");
        assert_eq!(held.len(), 5);
        for stream in &mut held {
            stream.write_all(&[1; PING_BYTES]).expect("still open");
            stream
                .read_exact(&mut [0; PING_BYTES])
                .expect("still answered");
        }
    }

    #[test]
    fn a_namespace_that_does_not_exist_is_named() {
        let mut places = Places {
            netns: vec!["/nowhere/netns".into()],
            cgroups: Vec::new(),
        };
        let error = hold(server(), 1, &places).expect_err("no namespace");
        assert!(format!("{error:#}").contains("/nowhere/netns"), "{error:#}");
        places.cgroups.push("/nowhere/cgroup".into());
        let error = hold(server(), 1, &places).expect_err("no cgroup");
        assert!(
            format!("{error:#}").contains("/nowhere/cgroup"),
            "{error:#}"
        );
    }
}
