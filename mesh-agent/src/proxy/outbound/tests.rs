use super::*;
use crate::proxy::testing::workload;

#[test]
fn only_a_tunnelled_workload_of_this_node_that_wants_it_stays_in_the_kernel() {
    let source = workload("web", "10.1.0.4");
    let good = workload("cart", "10.1.0.5");
    assert!(kernel_eligible(&source, &good, "node-a"));
    assert!(!kernel_eligible(&source, &good, "node-b"), "other node");
    let plain = Workload {
        tunnel: Tunnel::None,
        ..good.clone()
    };
    assert!(!kernel_eligible(&source, &plain, "node-a"), "not enrolled");
    let mut wants_tls = good.clone();
    wants_tls.capture.same_node = SameNode::Tunnel;
    assert!(
        !kernel_eligible(&source, &wants_tls, "node-a"),
        "destination wants TLS"
    );
    assert!(
        !kernel_eligible(&wants_tls, &good, "node-a"),
        "source wants TLS"
    );
    let host = Workload {
        host_network: true,
        ..good
    };
    assert!(!kernel_eligible(&source, &host, "node-a"), "host network");
}

#[test]
fn an_endpoint_that_says_nothing_leaves_time_for_another() {
    let now = time::Instant::now();
    let deadline = now + Duration::from_secs(10);
    let first = share_of(now, deadline, 2);
    assert_eq!(first, now + Duration::from_secs(5));
    assert_eq!(
        share_of(first, deadline, 1),
        deadline,
        "the last has the rest"
    );
    let late = deadline + Duration::from_secs(1);
    assert_eq!(share_of(late, deadline, 1), late, "over at once");
}

#[test]
fn a_connections_task_is_small() {
    fn size<A, B, C, D, F>(_: fn(A, B, C, D) -> F) -> usize {
        size_of::<F>()
    }
    let size = size(serve);
    assert!(size <= 2048, "outbound takes {size} bytes per connection");
}

#[test]
fn a_refusal_is_final_and_a_failure_is_tried_elsewhere() {
    let refused = |status| OutboundError::Tunnel(TunnelError::Refused(status));
    assert!(!refused(StatusCode::UNAUTHORIZED).elsewhere());
    assert!(refused(StatusCode::UNAUTHORIZED).denied());
    assert!(!refused(StatusCode::BAD_REQUEST).elsewhere());
    assert!(refused(StatusCode::SERVICE_UNAVAILABLE).elsewhere());
    assert!(!refused(StatusCode::SERVICE_UNAVAILABLE).denied());
    assert!(OutboundError::Tunnel(TunnelError::TimedOut("answer")).elsewhere());
    assert!(!OutboundError::Tunnel(TunnelError::Limit).elsewhere());
}
