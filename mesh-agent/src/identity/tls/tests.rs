//! Handshakes in memory.

use rustls::{
    AlertDescription, ClientConnection, NamedGroup, ServerConnection, pki_types::CertificateDer,
};

use super::*;
use crate::identity::{
    Certified,
    response::Material,
    testing::{Ended, FixedTime, NOW, TestCa, certify, handshake, identity},
};

fn only(account: &str) -> Arc<[Identity]> {
    Arc::from([identity(account)])
}

fn dial(client: &Certified, expected: Arc<[Identity]>, server: &Certified) -> Ended {
    handshake(client.client(expected), server.server.clone())
}

fn uris(ca: &TestCa, uris: &[&str]) -> Certified {
    certify(&ca.material(uris, NOW - 1800, NOW + 1800), NOW)
}

#[test]
fn both_sides_learn_who_the_other_is_over_hybrid_key_exchange_and_aes_128() {
    let ca = TestCa::new("mesh");
    let ended = dial(&ca.certified("web"), only("db"), &ca.certified("db"));
    assert_eq!(
        (ended.client, ended.server),
        (Ok(identity("db")), Ok(identity("web")))
    );
    assert_eq!(ended.group, Some(NamedGroup::X25519MLKEM768));
    assert_eq!(
        ended.suite,
        Some(rustls::CipherSuite::TLS13_AES_128_GCM_SHA256)
    );
}

#[test]
fn one_of_several_expected_identities_is_enough() {
    let ca = TestCa::new("mesh");
    let expected = Arc::from([identity("cache"), identity("db")]);
    assert_eq!(
        dial(&ca.certified("web"), expected, &ca.certified("db")).client,
        Ok(identity("db"))
    );
}

#[test]
fn a_server_that_is_somebody_else_is_refused_by_name() {
    let ca = TestCa::new("mesh");
    let error = dial(&ca.certified("web"), only("db"), &ca.certified("cache"))
        .client
        .expect_err("refused");
    let expected = PeerRejection::WrongIdentity {
        expected: only("db"),
        presented: vec![identity("cache")],
    };
    assert_eq!(error, expected);
    let text = error.to_string();
    assert!(
        text.contains("/sa/db") && text.contains("/sa/cache"),
        "{text}"
    );
}

#[test]
fn no_expected_identity_means_that_nobody_is_believed() {
    let ca = TestCa::new("mesh");
    let ended = dial(&ca.certified("web"), Arc::from([]), &ca.certified("db"));
    assert!(matches!(
        ended.client,
        Err(PeerRejection::WrongIdentity { .. })
    ));
}

#[test]
fn certificates_under_foreign_roots_are_refused_on_either_side() {
    let (ours, theirs) = (TestCa::new("mesh"), TestCa::new("mesh"));
    assert_eq!(
        dial(&ours.certified("web"), only("db"), &theirs.certified("db")).client,
        Err(PeerRejection::UnknownRoot)
    );
    // A client that believes the server, but is not believed by it.
    let mut material = theirs.material(
        &["spiffe://cluster.local/ns/shop/sa/web"],
        NOW - 1800,
        NOW + 1800,
    );
    material.roots = vec![ours.root()];
    let ended = dial(&certify(&material, NOW), only("db"), &ours.certified("db"));
    assert_eq!(ended.server, Err(PeerRejection::UnknownRoot));
    assert!(
        matches!(
            ended.client,
            Err(PeerRejection::Tls(rustls::Error::AlertReceived(
                AlertDescription::UnknownCA
            )))
        ),
        "the client is told"
    );
}

#[test]
fn old_and_new_roots_overlap() {
    let (old, new) = (TestCa::new("old"), TestCa::new("new"));
    let both = |ca: &TestCa, account: &str| {
        let uri = identity(account).to_string();
        let mut material = ca.material(&[&uri], NOW - 1800, NOW + 1800);
        material.roots = vec![old.root(), new.root()];
        certify(&material, NOW)
    };
    let ended = dial(&both(&old, "web"), only("db"), &both(&new, "db"));
    assert_eq!(
        (ended.client, ended.server),
        (Ok(identity("db")), Ok(identity("web")))
    );
    // After the overlap an old-root peer is refused.
    let ended = dial(&both(&old, "web"), only("db"), &new.certified("db"));
    assert_eq!(ended.server, Err(PeerRejection::UnknownRoot));
}

#[test]
fn validity_is_judged_by_the_injected_clock_and_both_times_are_named() {
    let ca = TestCa::new("mesh");
    let (uri, web) = (identity("db").to_string(), ca.certified("web"));
    let over = certify(&ca.material(&[&uri], NOW - 3600, NOW - 1), NOW);
    let error = dial(&web, only("db"), &over).client.expect_err("refused");
    assert_eq!(
        error,
        PeerRejection::Expired {
            now: NOW,
            not_after: NOW - 1
        }
    );
    let early = certify(&ca.material(&[&uri], NOW + 60, NOW + 3600), NOW);
    let error = dial(&web, only("db"), &early).client.expect_err("refused");
    assert_eq!(
        error,
        PeerRejection::NotYetValid {
            now: NOW,
            not_before: NOW + 60
        }
    );
    assert!(
        error.to_string().contains("00:01:00") && error.to_string().contains("00:00:00"),
        "{error}"
    );
    let ended = dial(&over, only("web"), &web);
    assert_eq!(
        ended.server,
        Err(PeerRejection::Expired {
            now: NOW,
            not_after: NOW - 1
        })
    );
}

#[test]
fn a_client_of_another_trust_domain_is_refused() {
    let ca = TestCa::new("mesh");
    let foreign: Identity = "spiffe://elsewhere/ns/shop/sa/web".parse().expect("valid");
    let ended = dial(
        &uris(&ca, &[&foreign.to_string()]),
        only("db"),
        &ca.certified("db"),
    );
    let expected = PeerRejection::ForeignTrustDomain {
        expected: "cluster.local".into(),
        presented: vec![foreign],
    };
    assert_eq!(ended.server, Err(expected));
}

#[test]
fn names_of_other_kinds_are_ignored_and_the_first_identity_counts() {
    let ca = TestCa::new("mesh");
    let several = [
        "https://example.test/",
        "spiffe://short",
        "spiffe://cluster.local/ns/shop/sa/web",
        "spiffe://cluster.local/ns/shop/sa/alias",
    ];
    let ended = dial(&uris(&ca, &several), only("db"), &ca.certified("db"));
    assert_eq!(ended.server, Ok(identity("web")));
    // As a server it is accepted under each of its identities.
    for name in ["web", "alias"] {
        let ended = dial(&ca.certified("db"), only(name), &uris(&ca, &several));
        assert_eq!(ended.client, Ok(identity("web")));
    }
}

#[test]
fn a_certificate_without_an_identity_of_the_mesh_is_refused() {
    let ca = TestCa::new("mesh");
    let ended = dial(
        &uris(&ca, &["https://example.test/"]),
        only("db"),
        &ca.certified("db"),
    );
    assert_eq!(ended.server, Err(PeerRejection::NoIdentity));
}

/// The client's configuration of `web`, changed.
fn changed(ca: &TestCa, change: impl FnOnce(&mut ClientConfig)) -> Arc<ClientConfig> {
    let mut config = ClientConfig::clone(&ca.certified("web").client(only("db")));
    change(&mut config);
    Arc::new(config)
}

#[test]
fn a_client_without_a_certificate_is_refused() {
    let ca = TestCa::new("mesh");
    let bare = changed(&ca, |config| {
        let builder = ClientConfig::builder_with_details(provider(), Arc::new(FixedTime(NOW)));
        let roots = Arc::new(TrustRoots::new(vec![ca.root()]).expect("a root"));
        let mut bare = builder
            .with_protocol_versions(&[&TLS13])
            .expect("TLS 1.3")
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Verifier::new(
                roots,
                Believed::Servers(only("db")),
            )))
            .with_no_client_auth();
        bare.alpn_protocols = vec![ALPN_H2.to_vec()];
        *config = bare;
    });
    assert_eq!(
        handshake(bare, ca.certified("db").server.clone()).server,
        Err(PeerRejection::NoCertificate)
    );
}

#[test]
fn a_client_that_does_not_offer_h2_gets_no_certificate() {
    let ca = TestCa::new("mesh");
    let offer = |offered: &[&[u8]]| {
        let config = changed(&ca, |config| {
            config.alpn_protocols = offered.iter().map(|name| name.to_vec()).collect();
        });
        handshake(config, ca.certified("db").server.clone())
    };
    // Not only the look at the finished handshake refuses: the handshake itself does not finish.
    assert!(matches!(offer(&[]).server, Err(PeerRejection::Tls(_))));
    assert!(matches!(
        offer(&[]).client,
        Err(PeerRejection::Tls(rustls::Error::AlertReceived(_)))
    ));
    assert!(matches!(
        offer(&[b"http/1.1"]).server,
        Err(PeerRejection::Tls(_))
    ));
    assert_eq!(offer(&[b"http/1.1", b"h2"]).server, Ok(identity("web")));
}

#[test]
fn a_server_that_ignores_alpn_is_refused() {
    let ca = TestCa::new("mesh");
    let mut server = ServerConfig::clone(&ca.certified("db").server);
    server.alpn_protocols.clear();
    let ended = handshake(ca.certified("web").client(only("db")), Arc::new(server));
    assert_eq!(ended.client, Err(PeerRejection::NoAlpn));
}

#[test]
fn tls_1_2_is_refused() {
    let ca = TestCa::new("mesh");
    let old = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS12])
        .expect("TLS 1.2")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Verifier::new(
            Arc::new(TrustRoots::new(vec![ca.root()]).expect("a root")),
            Believed::Servers(only("db")),
        )))
        .with_no_client_auth();
    let ended = handshake(Arc::new(old), ca.certified("db").server.clone());
    assert!(matches!(
        ended.server,
        Err(PeerRejection::Tls(rustls::Error::PeerIncompatible(_)))
    ));
}

#[test]
fn chacha20_is_not_spoken() {
    let ca = TestCa::new("mesh");
    let config = changed(&ca, |config| {
        let mut only_chacha = aws_lc_rs::default_provider();
        only_chacha.cipher_suites = vec![aws_lc_rs::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256];
        let mut other = ClientConfig::builder_with_provider(Arc::new(only_chacha))
            .with_protocol_versions(&[&TLS13])
            .expect("TLS 1.3")
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Verifier::new(
                Arc::new(TrustRoots::new(vec![ca.root()]).expect("a root")),
                Believed::Servers(only("db")),
            )))
            .with_no_client_auth();
        other.alpn_protocols = vec![ALPN_H2.to_vec()];
        *config = other;
    });
    let ended = handshake(config, ca.certified("db").server.clone());
    assert!(matches!(
        ended.server,
        Err(PeerRejection::Tls(rustls::Error::PeerIncompatible(_)))
    ));
}

#[test]
fn no_server_name_is_sent_and_nothing_is_resumed() {
    let ca = TestCa::new("mesh");
    let (web, db) = (ca.certified("web"), ca.certified("db"));
    let client = web.client(only("db"));
    assert!(!client.enable_sni && !client.enable_early_data);
    assert_eq!(
        (db.server.send_tls13_tickets, db.server.max_early_data_size),
        (0, 0)
    );
    for _ in 0..2 {
        let mut first =
            ClientConnection::new(client.clone(), dummy_server_name()).expect("a client");
        let mut server = ServerConnection::new(db.server.clone()).expect("a server");
        let mut wire = Vec::new();
        first.write_tls(&mut wire).expect("memory");
        server.read_tls(&mut &wire[..]).expect("memory");
        server.process_new_packets().expect("a hello");
        assert_eq!(server.server_name(), None);
        assert_ne!(
            server.handshake_kind(),
            Some(rustls::HandshakeKind::Resumed)
        );
    }
}

#[test]
fn client_configurations_are_shared_and_their_number_is_bounded() {
    let web = TestCa::new("mesh").certified("web");
    assert!(Arc::ptr_eq(
        &web.client(only("db")),
        &web.client(only("db"))
    ));
    assert!(!Arc::ptr_eq(
        &web.client(only("db")),
        &web.client(only("cache"))
    ));
    for n in 0..1000 {
        let _ = web.client(only(&format!("app-{n}")));
    }
    let kept = web.clients.lock().expect("not poisoned").len();
    assert!(kept <= 256, "{kept} configurations kept");
}

#[test]
fn garbage_instead_of_a_leaf_has_no_identity() {
    assert_eq!(peer_identity(None), None);
    assert_eq!(peer_identity(Some(&[])), None);
    assert_eq!(
        peer_identity(Some(&[CertificateDer::from(b"garbage".to_vec())])),
        None
    );
}

#[test]
fn the_reason_survives_the_way_through_an_io_error() {
    let rejection = PeerRejection::NoIdentity;
    let error = std::io::Error::new(
        std::io::ErrorKind::InvalidData,
        rejection.clone().into_tls(),
    );
    assert_eq!(PeerRejection::of_io(&error), Some(rejection));
    assert_eq!(
        PeerRejection::of_io(&std::io::Error::from(std::io::ErrorKind::ConnectionReset)),
        None
    );
}

#[test]
fn material_of_one_certificate_serves_and_dials_through_an_intermediate() {
    let ca = TestCa::new("mesh");
    let below = ca.intermediate("below");
    let material: Material = below.material(
        &["spiffe://cluster.local/ns/shop/sa/db"],
        NOW - 60,
        NOW + 60,
    );
    assert_eq!(
        dial(&ca.certified("web"), only("db"), &certify(&material, NOW)).client,
        Ok(identity("db"))
    );
}

#[test]
fn the_control_channel_prefers_hybrid_key_exchange_and_goes_on_without() {
    let groups: Vec<_> = control_provider()
        .kx_groups
        .iter()
        .map(|group| group.name())
        .collect();
    assert_eq!(groups.first(), Some(&NamedGroup::X25519MLKEM768));
    assert!(
        groups.contains(&NamedGroup::X25519) && groups.len() > 2,
        "{groups:?}"
    );
}
