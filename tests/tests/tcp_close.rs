//! How connections end: in every order of FIN and RST, and by the death of an agent, applications see what they would
//! see without the mesh.

use std::{io::Write as _, net::TcpStream};

use anyhow::{Context as _, Result};
use mesh_tests::{
    paths::{self, DIRECT, MESH, Path},
    sockets::{Seen, finish, look, reset},
};
use nix::sys::signal::Signal;

/// Who does something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Who {
    Client,
    Server,
}

/// What one end does; the other end then looks.
#[derive(Debug, Clone, Copy)]
enum Act {
    Send,
    /// The other end sees that bytes came, and leaves them unread.
    SendUnread,
    Fin,
    Rst,
    /// `close(2)`, whatever is unread: the kernel then makes it RST.
    Close,
}

use Act::{Close, Fin, Rst, Send, SendUnread};
use Who::{Client, Server};

/// Every order in which two ends can close, after bytes went both ways.
const ORDERS: [&[(Who, Act)]; 10] = [
    &[(Client, Fin), (Server, Fin)],
    &[(Server, Fin), (Client, Fin)],
    &[(Client, Fin), (Server, Send), (Server, Fin)],
    &[(Server, Fin), (Client, Send), (Client, Fin)],
    &[(Client, Rst)],
    &[(Server, Rst)],
    &[(Client, Fin), (Server, Send), (Server, Rst)],
    &[(Server, Fin), (Client, Send), (Client, Rst)],
    &[(Client, SendUnread), (Server, Close)],
    &[(Server, SendUnread), (Client, Close)],
];

const WORDS: &[u8] = b"words";

#[test]
fn every_order_of_closing_looks_as_without_the_mesh() -> Result<()> {
    /// Rounds per order and path: the table has 500; races that one round in ten shows are found by 5 × 20.
    const ROUNDS: usize = 20;
    let world = paths::start()?;
    let expected: Vec<Vec<Seen>> = {
        let listener = DIRECT.listen(&world)?;
        let once = |order: &&[(Who, Act)]| play(order, DIRECT.pair(&world, &listener)?);
        ORDERS.iter().map(once).collect::<Result<_>>()?
    };
    // The comparison can fail: the orders differ in what is seen.
    assert!(expected.iter().any(|seen| seen.contains(&Seen::Rst)));
    assert!(expected.iter().any(|seen| seen.contains(&Seen::Fin)));
    let mut wrong = Vec::new();
    for path in &MESH {
        let listener = path.listen(&world)?;
        for (order, expected) in ORDERS.iter().zip(&expected) {
            for round in 0..ROUNDS {
                let seen = play(order, path.pair(&world, &listener)?)?;
                if seen != *expected {
                    wrong.push(format!(
                        "{}, {order:?}, round {round}: {seen:?} instead of {expected:?}",
                        path.name
                    ));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}\n{}", wrong.len(), wrong.join("\n"));
    assert!(
        world.kernel_count("n1", "same_node")? >= (ORDERS.len() * ROUNDS - 1) as f64,
        "within the node the kernel carried all but the first"
    );
    world.wait_nothing_open()
}

/// Sends words both ways, then plays an order; returns what was seen after each step.
fn play(order: &[(Who, Act)], (client, server): (TcpStream, TcpStream)) -> Result<Vec<Seen>> {
    let mut ends = [Some(client), Some(server)];
    let mut seen = Vec::new();
    let beginning = [(Client, Send), (Server, Send)];
    for (who, act) in beginning.iter().chain(order) {
        let (actor, other) = match who {
            Client => (0, 1),
            Server => (1, 0),
        };
        let acting = ends[actor].take().context("an end acts after its close")?;
        match act {
            Send | SendUnread => (&acting).write_all(WORDS)?,
            Fin => finish(&acting)?,
            Rst | Close => {}
        }
        match act {
            Rst => reset(acting)?,
            Close => drop(acting),
            Send | SendUnread | Fin => ends[actor] = Some(acting),
        }
        let looking = ends[other]
            .as_ref()
            .context("an end looks after its close")?;
        seen.push(match act {
            SendUnread => {
                let mut bytes = [0; WORDS.len()];
                let peeked = looking.peek(&mut bytes);
                peeked.map_or_else(
                    |error| Seen::of(&error),
                    |_| Seen::Bytes(bytes[..1].to_vec()),
                )
            }
            _ => look(looking, WORDS.len()),
        });
    }
    Ok(seen)
}

#[test]
fn a_killed_agent_ends_its_connections_with_reset_and_touches_no_others() -> Result<()> {
    let mut world = paths::start()?;
    let established = |path: &Path| -> Result<(TcpStream, TcpStream)> {
        let pair = path.pair(&world, &path.listen(&world)?)?;
        converse(&pair)?;
        Ok(pair)
    };
    let [tunnel, within, kernel, plain_out, plain_in] = &MESH;
    let first_by_tunnel = established(kernel)?;
    let in_kernel = established(kernel)?;
    let by_both = established(tunnel)?;
    let by_first = [
        first_by_tunnel,
        established(within)?,
        established(plain_out)?,
    ];
    let by_second = established(plain_in)?;

    // Ends that the killed process itself held, and ends of the other agent, which lost the tunnel.
    let n1 = world.lab.node("n1")?;
    world.mesh.stop_agent(n1, Signal::SIGKILL)?;
    for (client, server) in by_first.iter().chain([&by_both]) {
        assert_eq!(look(client, 1), Seen::Rst, "client of {client:?}");
        assert_eq!(look(server, 1), Seen::Rst, "server of {server:?}");
    }
    converse(&in_kernel).context("the kernel carries it without an agent")?;
    converse(&by_second).context("another node's agent carries it")?;

    let n2 = world.lab.node("n2")?;
    world.mesh.stop_agent(n2, Signal::SIGKILL)?;
    assert_eq!(look(&by_second.0, 1), Seen::Rst, "plaintext client");
    assert_eq!(
        look(&by_second.1, 1),
        Seen::Rst,
        "server of a plaintext client"
    );
    Ok(())
}

/// Says something both ways.
fn converse((client, server): &(TcpStream, TcpStream)) -> Result<()> {
    for (mut from, to) in [(client, server), (server, client)] {
        from.write_all(WORDS)?;
        assert_eq!(look(to, WORDS.len()), Seen::Bytes(WORDS.into()));
    }
    Ok(())
}
