//! A peer's certificate after the handshake: tunnels may outlive certificates, and roots may be withdrawn meanwhile.

use rustls::pki_types::CertificateDer;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::{
    Certified,
    tls::{PeerRejection, Usage, verify_path},
};

/// What a client proved when its tunnel was set up, to be judged again as long as the tunnel lives.
#[derive(Debug)]
pub struct ClientProof {
    /// Leaf first.
    chain: Vec<CertificateDer<'static>>,
    /// End of the leaf's validity, seconds since 1970.
    not_after: i64,
    /// The roots by which it was last found good.
    roots: [u8; 32],
}

impl ClientProof {
    /// Keeps a chain that `judge` has just accepted; nothing if it holds no certificate.
    #[must_use]
    pub fn new(chain: &[CertificateDer<'_>], judge: &Certified) -> Option<Self> {
        let (_, leaf) = X509Certificate::from_der(chain.first()?).ok()?;
        Some(Self {
            chain: chain
                .iter()
                .map(|certificate| certificate.clone().into_owned())
                .collect(),
            not_after: leaf.validity().not_after.timestamp(),
            roots: judge.roots_fingerprint,
        })
    }

    /// Whether a handshake would still succeed with the present roots and clock of `judge`. Costs a comparison unless
    /// the roots have changed.
    ///
    /// # Errors
    /// What the handshake would say.
    pub fn judge_again(&mut self, judge: &Certified) -> Result<(), PeerRejection> {
        let Some(now) = judge.parameters.time.current_time() else {
            return Ok(());
        };
        let lasts = i64::try_from(now.as_secs()).is_ok_and(|now| now < self.not_after);
        if lasts && self.roots == judge.roots_fingerprint {
            return Ok(());
        }
        let Some((leaf, intermediates)) = self.chain.split_first() else {
            return Ok(());
        };
        let roots = &judge.parameters.roots;
        verify_path(roots, leaf, intermediates, now, Usage::Client).map_err(PeerRejection::from)?;
        self.roots = judge.roots_fingerprint;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use rustls::time_provider::TimeProvider;

    use super::*;
    use crate::identity::{
        response::Material,
        roots::TrustRoots,
        testing::{FixedTime, NOW, TestCa, certify, identity},
    };

    fn material(ca: &TestCa, account: &str) -> Material {
        let uri = identity(account).to_string();
        ca.material(&[&uri], NOW - 1800, NOW + 1800)
    }

    /// A judge that believes these authorities.
    fn believing(own: &Material, authorities: &[&TestCa]) -> Certified {
        let roots = authorities.iter().map(|ca| ca.root()).collect();
        let roots = Arc::new(TrustRoots::new(roots).expect("roots"));
        let clock = Arc::new(FixedTime(NOW)) as Arc<dyn TimeProvider>;
        Certified::new(own, &roots, &clock).expect("configurations")
    }

    #[test]
    fn a_client_holds_as_long_as_its_certificate_and_no_longer() {
        let ca = TestCa::new("root");
        let (own, client) = (material(&ca, "cart"), material(&ca, "web"));
        let mut proof = ClientProof::new(&client.chain, &certify(&own, NOW)).expect("a leaf");
        proof.judge_again(&certify(&own, NOW)).expect("now");
        proof
            .judge_again(&certify(&own, NOW + 1799))
            .expect("still");
        let over = proof.judge_again(&certify(&own, NOW + 1801));
        let error = over.expect_err("it is over").to_string();
        assert!(error.contains("2030"), "both times are told: {error}");
    }

    #[test]
    fn a_client_under_a_withdrawn_root_holds_until_the_overlap_ends() {
        let (old, new) = (TestCa::new("old"), TestCa::new("new"));
        let (own, client) = (material(&new, "cart"), material(&old, "web"));
        let below = old.intermediate("below");
        for client in [client, material(&below, "web")] {
            let overlap = believing(&own, &[&old, &new]);
            let mut proof = ClientProof::new(&client.chain, &overlap).expect("a leaf");
            proof.judge_again(&overlap).expect("both are believed");
            let only_old = believing(&own, &[&old]);
            proof.judge_again(&only_old).expect("its own root is there");
            assert!(
                proof.judge_again(&believing(&own, &[&new])).is_err(),
                "its root is gone"
            );
        }
    }

    #[test]
    fn nothing_is_kept_of_what_is_no_certificate() {
        let judge = TestCa::new("root").certified("cart");
        assert!(ClientProof::new(&[], &judge).is_none());
        assert!(ClientProof::new(&[b"noise".to_vec().into()], &judge).is_none());
    }
}
