//! Room for connections: what is counted against the limits of a workload and of the node before anything is begun.

use std::sync::{Arc, atomic::Ordering};

use super::{
    limits::Limits,
    share::{Budget, Held, Scarce},
};
use crate::{
    capture::{Holdings, LocalWorkload},
    telemetry::{Limit, Telemetry},
};

/// A limit was reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("limit {} is reached", .0.name())]
pub struct Refused(pub Limit);

/// What asks for room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// A captured connection: its socket and the one that is dialled for it.
    Connection,
    /// A stream of an inbound tunnel: the application's socket.
    Stream,
    /// A tunnel from a peer: its socket, and a copy for measurements.
    InboundTunnel,
    /// A tunnel to a peer, likewise.
    OutboundTunnel,
}

impl Need {
    /// Descriptors that it needs.
    #[must_use]
    pub const fn descriptors(self) -> u64 {
        match self {
            Self::Stream => 1,
            Self::Connection | Self::InboundTunnel | Self::OutboundTunnel => 2,
        }
    }
}

/// Descriptors that an enrolled workload needs: three listeners and its namespace.
const DESCRIPTORS_PER_WORKLOAD: u64 = 4;

/// The node's room. Shared by all workers.
#[derive(Debug)]
pub struct Room {
    limits: Arc<Limits>,
    telemetry: Arc<Telemetry>,
    descriptors: Arc<Budget>,
    connections: Arc<Budget>,
}

impl Room {
    /// As much as `limits` say.
    #[must_use]
    pub fn new(limits: Arc<Limits>, telemetry: Arc<Telemetry>) -> Self {
        let descriptors = Budget::new(limits.descriptors, |holder| &holder.descriptors);
        let connections = Budget::new(limits.connections_per_node, |holder| &holder.connections);
        let total = i64::try_from(limits.descriptors).unwrap_or(i64::MAX);
        telemetry.limits.descriptors.set(total);
        Self {
            limits,
            telemetry,
            descriptors,
            connections,
        }
    }

    /// Counts that `limit` was reached because of a workload.
    pub fn refuse(&self, local: &LocalWorkload, limit: Limit) -> Refused {
        self.telemetry.limits.reached(limit);
        self.telemetry.limits.refused(&local.namespace, &local.name);
        Refused(limit)
    }

    /// Room for one more.
    ///
    /// # Errors
    /// Which limit leaves none.
    pub fn enter(self: &Arc<Self>, local: &LocalWorkload, need: Need) -> Result<Place, Refused> {
        let connection = match need {
            Need::Connection | Need::Stream => Some(self.connection(local)?),
            Need::InboundTunnel | Need::OutboundTunnel => None,
        };
        let tunnel = match need {
            Need::OutboundTunnel => Some(self.outbound_tunnel(local)?),
            Need::Connection | Need::Stream | Need::InboundTunnel => None,
        };
        match self.descriptors.take(&local.holds, need.descriptors()) {
            Ok(held) => Ok(self.place(held, connection, tunnel)),
            Err(Scarce::Exhausted) => Err(self.refuse(local, Limit::Descriptors)),
            Err(Scarce::OverShare) => Err(self.refuse(local, Limit::DescriptorShare)),
        }
    }

    fn connection(&self, local: &LocalWorkload) -> Result<Held, Refused> {
        let held = self.connections.take(&local.holds, 1);
        let held = held.map_err(|_| self.refuse(local, Limit::ConnectionsPerNode))?;
        let open = local.holds.connections.load(Ordering::Relaxed);
        if open > self.limits.connections_per_workload {
            return Err(self.refuse(local, Limit::ConnectionsPerWorkload));
        }
        Ok(held)
    }

    fn outbound_tunnel(&self, local: &LocalWorkload) -> Result<OutboundTunnel, Refused> {
        let one = OutboundTunnel::new(&local.holds);
        let open = local.holds.outbound_tunnels.load(Ordering::Relaxed);
        if open > self.limits.tunnel.outbound_per_workload {
            return Err(self.refuse(local, Limit::TunnelsPerWorkload));
        }
        Ok(one)
    }

    /// What an enrolled workload holds whether or not it has connections.
    #[must_use]
    pub fn enrol(self: &Arc<Self>, local: &LocalWorkload) -> Place {
        let held = self
            .descriptors
            .take_anyway(&local.holds, DESCRIPTORS_PER_WORKLOAD);
        self.place(held, None, None)
    }

    fn place(
        self: &Arc<Self>,
        descriptors: Held,
        connection: Option<Held>,
        tunnel: Option<OutboundTunnel>,
    ) -> Place {
        self.publish();
        Place {
            descriptors: Some(descriptors),
            _connection: connection,
            _tunnel: tunnel,
            room: self.clone(),
        }
    }

    fn publish(&self) {
        let used = i64::try_from(self.descriptors.used()).unwrap_or(i64::MAX);
        self.telemetry.limits.descriptors_used.set(used);
    }
}

/// One of a workload's tunnels to peers.
#[derive(Debug)]
struct OutboundTunnel(Arc<Holdings>);

impl OutboundTunnel {
    fn new(holder: &Arc<Holdings>) -> Self {
        holder.outbound_tunnels.fetch_add(1, Ordering::Relaxed);
        Self(holder.clone())
    }
}

impl Drop for OutboundTunnel {
    fn drop(&mut self) {
        self.0.outbound_tunnels.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Room that was given; dropped, it is free again.
#[derive(Debug)]
pub struct Place {
    descriptors: Option<Held>,
    _connection: Option<Held>,
    _tunnel: Option<OutboundTunnel>,
    room: Arc<Room>,
}

impl Place {
    /// The connection goes on as a stream of a tunnel: it needs its own socket only.
    pub fn tunnelled(&mut self) {
        if let Some(held) = &mut self.descriptors {
            held.keep(Need::Stream.descriptors());
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.descriptors = None;
        self.room.publish();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy::testing::local;

    fn room(change: impl FnOnce(&mut Limits)) -> (Arc<Room>, Arc<Telemetry>) {
        let mut limits = Limits::default();
        change(&mut limits);
        let telemetry = Telemetry::new("1");
        let room = Room::new(Arc::new(limits), telemetry.clone());
        (Arc::new(room), telemetry)
    }

    fn reached(telemetry: &Telemetry, limit: Limit) -> bool {
        let line = format!("weft_limit_reached_total{{limit=\"{}\"}} 1", limit.name());
        telemetry.render().lines().any(|other| other == line)
    }

    #[test]
    fn a_workload_at_its_limit_of_connections_is_refused_and_its_neighbour_is_not() {
        let (room, telemetry) = room(|limits| limits.connections_per_workload = 3);
        let (noisy, quiet) = (local("noisy"), local("quiet"));
        let mut held: Vec<_> = [Need::Connection, Need::Stream, Need::Stream]
            .into_iter()
            .map_while(|need| room.enter(&noisy, need).ok())
            .collect();
        assert_eq!(held.len(), 3);
        let refused = room.enter(&noisy, Need::Stream).map(drop);
        assert_eq!(refused, Err(Refused(Limit::ConnectionsPerWorkload)));
        assert!(reached(&telemetry, Limit::ConnectionsPerWorkload));
        assert!(room.enter(&quiet, Need::Stream).is_ok());
        held.pop();
        assert!(room.enter(&noisy, Need::Stream).is_ok(), "room again");
    }

    #[test]
    fn a_workload_at_its_limit_of_tunnels_to_peers_is_refused() {
        let (room, telemetry) = room(|limits| limits.tunnel.outbound_per_workload = 2);
        let noisy = local("noisy");
        let held: Vec<_> = (0..3)
            .map_while(|_| room.enter(&noisy, Need::OutboundTunnel).ok())
            .collect();
        assert_eq!(held.len(), 2);
        assert!(reached(&telemetry, Limit::TunnelsPerWorkload));
        assert!(room.enter(&noisy, Need::Stream).is_ok(), "not of streams");
        drop(held);
        assert!(room.enter(&noisy, Need::OutboundTunnel).is_ok());
    }

    #[test]
    fn a_storm_leaves_descriptors_to_neighbours_also_where_the_node_has_few() {
        let (room, telemetry) = room(|limits| limits.descriptors = 80);
        let (noisy, quiet) = (local("noisy"), local("quiet"));
        let _enrolled = [room.enrol(&noisy), room.enrol(&quiet)];
        let mut held = Vec::new();
        let refused = loop {
            match room.enter(&noisy, Need::Connection) {
                Ok(place) => held.push(place),
                Err(refused) => break refused,
            }
        };
        assert_eq!(refused, Refused(Limit::DescriptorShare));
        assert!(reached(&telemetry, Limit::DescriptorShare));
        let line = "weft_workload_refused_total{workload=\"shop/noisy\"} 1";
        assert!(telemetry.render().contains(line));
        assert_eq!(held.len(), 31, "70 of 80, 8 of them for listeners");
        let neighbours: Vec<_> = (0..10)
            .map_while(|_| room.enter(&quiet, Need::Stream).ok())
            .collect();
        assert!(neighbours.len() >= 3, "{}", neighbours.len());
        assert!(telemetry.render().contains("weft_descriptors 80"));
    }

    #[test]
    fn a_storm_leaves_room_in_the_kernels_records_to_neighbours() {
        let (room, telemetry) = room(|limits| limits.connections_per_node = 80);
        let (noisy, quiet) = (local("noisy"), local("quiet"));
        let held: Vec<_> = (0..80)
            .map_while(|_| room.enter(&noisy, Need::Stream).ok())
            .collect();
        assert_eq!(held.len(), 70);
        assert!(reached(&telemetry, Limit::ConnectionsPerNode));
        assert!(room.enter(&noisy, Need::OutboundTunnel).is_ok());
        assert!(room.enter(&quiet, Need::Stream).is_ok());
    }

    #[test]
    fn a_connection_that_goes_on_in_a_tunnel_gives_a_descriptor_back() {
        let (room, telemetry) = room(|limits| limits.descriptors = 80);
        let mut place = room.enter(&local("web"), Need::Connection).expect("room");
        assert!(telemetry.render().contains("weft_descriptors_used 2"));
        place.tunnelled();
        let other = room.enter(&local("web"), Need::Stream).expect("room");
        assert!(telemetry.render().contains("weft_descriptors_used 2"));
        drop((place, other));
        assert!(telemetry.render().contains("weft_descriptors_used 0"));
    }

    #[test]
    fn without_any_descriptor_left_everybody_is_refused() {
        let (room, telemetry) = room(|limits| limits.descriptors = 3);
        let _all = room.enrol(&local("web"));
        let refused = room.enter(&local("db"), Need::Stream).map(drop);
        assert_eq!(refused, Err(Refused(Limit::Descriptors)));
        assert!(reached(&telemetry, Limit::Descriptors));
    }
}
