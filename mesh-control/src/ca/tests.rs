use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use rcgen::{KeyPair, PKCS_ECDSA_P384_SHA384, PKCS_ED25519, PKCS_RSA_SHA256};
use x509_parser::{
    extensions::GeneralName,
    prelude::{FromDer, X509Certificate},
};

use super::*;

const DOMAIN: &str = "cluster.local";
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

fn now() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(1_800_000_000)
}

fn identity() -> Identity {
    Identity::new(DOMAIN, "shop", "web").expect("valid")
}

fn csr(key: &KeyPair, names: &[&str]) -> String {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = names
        .iter()
        .map(|name| SanType::URI((*name).try_into().expect("ascii")))
        .collect();
    params
        .serialize_request(key)
        .expect("request")
        .pem()
        .expect("pem")
}

fn p256() -> KeyPair {
    KeyPair::generate().expect("key")
}

fn authority() -> Authority {
    Authority::ephemeral(DOMAIN, DAY, now()).expect("made")
}

#[test]
fn signs_a_leaf_for_exactly_the_identity() {
    for key in [
        p256(),
        KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384).expect("key"),
    ] {
        let authority = authority();
        let request = SigningRequest::from_pem(&csr(&key, &[])).expect("accepted");
        let hour = Duration::from_secs(3600);
        let signed = authority
            .sign(&request, &identity(), Some(hour), now())
            .expect("signed");
        assert_eq!(signed.chain.len(), 2);
        assert_eq!(signed.chain[1], authority.roots_pem());

        let leaf = files::certificates(&signed.chain[0]).expect("pem");
        let root = files::certificates(&signed.chain[1]).expect("pem");
        let (_, leaf) = X509Certificate::from_der(&leaf[0]).expect("leaf");
        let (_, root) = X509Certificate::from_der(&root[0]).expect("root");
        leaf.verify_signature(Some(root.public_key()))
            .expect("signed by the root");
        assert_eq!(*leaf.public_key().subject_public_key.data, *key.der_bytes());
        let names = &leaf
            .subject_alternative_name()
            .expect("one")
            .expect("there")
            .value
            .general_names;
        assert!(
            matches!(
                names[..],
                [GeneralName::URI("spiffe://cluster.local/ns/shop/sa/web")]
            ),
            "{names:?}"
        );
        let usage = leaf
            .extended_key_usage()
            .expect("one")
            .expect("there")
            .value;
        assert!(usage.server_auth && usage.client_auth && !usage.any);
        assert!(!leaf.is_ca());
        assert_eq!(
            leaf.validity().not_before.timestamp(),
            1_800_000_000 - BACKDATE.as_secs() as i64
        );
        assert_eq!(leaf.validity().not_after.timestamp(), 1_800_000_000 + 3600);
    }
}

#[test]
fn the_shortest_of_three_lifetimes_counts() {
    let authority = authority();
    let request = SigningRequest::from_pem(&csr(&p256(), &[])).expect("accepted");
    let ends = |requested, now| {
        let signed = authority.sign(&request, &identity(), requested, now);
        signed.map(|signed| signed.not_after.duration_since(now).expect("later"))
    };
    assert_eq!(ends(None, now()).expect("signed"), DAY);
    assert_eq!(ends(Some(DAY * 30), now()).expect("signed"), DAY);
    assert_eq!(ends(Some(DAY / 2), now()).expect("signed"), DAY / 2);
    let last_hour = authority.not_after() - Duration::from_secs(3600);
    assert_eq!(
        ends(None, last_hour).expect("signed"),
        Duration::from_secs(3600)
    );
    assert!(matches!(
        ends(None, authority.not_after()),
        Err(SignError::AuthorityExpired)
    ));
}

#[test]
fn refuses_requests_that_are_malformed_or_use_other_keys() {
    let good = csr(&p256(), &[]);
    let tampered = {
        let mut der = x509_parser::pem::parse_x509_pem(good.as_bytes())
            .expect("pem")
            .1
            .contents;
        *der.last_mut().expect("bytes") ^= 1;
        use rustls::pki_types::CertificateSigningRequestDer;
        let der = CertificateSigningRequestDer::from(der);
        pem_of(&der)
    };
    let other = |algorithm| csr(&KeyPair::generate_for(algorithm).expect("key"), &[]);
    for (text, expected) in [
        (String::new(), CsrError::Malformed),
        ("garbage".into(), CsrError::Malformed),
        (
            good.replace("CERTIFICATE REQUEST", "CERTIFICATE"),
            CsrError::Malformed,
        ),
        (good[..good.len() / 2].to_owned(), CsrError::Malformed),
        (
            "x".repeat(CSR_MAX_BYTES + 1),
            CsrError::TooLarge(CSR_MAX_BYTES + 1),
        ),
        (tampered, CsrError::Signature),
        (other(&PKCS_RSA_SHA256), CsrError::Algorithm),
        (other(&PKCS_ED25519), CsrError::Algorithm),
    ] {
        assert_eq!(
            SigningRequest::from_pem(&text).err(),
            Some(expected),
            "{text}"
        );
    }
}

fn pem_of(der: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::from("-----BEGIN CERTIFICATE REQUEST-----\n");
    for chunk in der.chunks(3) {
        let padded = [
            chunk[0],
            *chunk.get(1).unwrap_or(&0),
            *chunk.get(2).unwrap_or(&0),
        ];
        let bits = u32::from_be_bytes([0, padded[0], padded[1], padded[2]]);
        for position in 0..4 {
            let symbol = ALPHABET[(bits >> (18 - 6 * position)) as usize & 63] as char;
            text.push(if position > chunk.len() { '=' } else { symbol });
        }
    }
    text + "\n-----END CERTIFICATE REQUEST-----\n"
}

#[test]
fn a_request_may_repeat_its_identity_but_not_contradict_it() {
    let web = identity();
    let uri = web.to_string();
    let key = p256();
    let named = |names: &[&str]| SigningRequest::from_pem(&csr(&key, names)).expect("accepted");
    assert_eq!(named(&[]).identity(Some(web.clone())), Ok(web.clone()));
    assert_eq!(named(&[&uri]).identity(Some(web.clone())), Ok(web.clone()));
    assert_eq!(named(&[&uri]).identity(None), Ok(web.clone()));
    assert_eq!(named(&[]).identity(None), Err(CsrError::NoIdentity));
    let other = "spiffe://cluster.local/ns/shop/sa/cart";
    for names in [&[other][..], &[&uri, other][..], &[other, &uri][..]] {
        assert_eq!(
            named(names).identity(Some(web.clone())),
            Err(CsrError::Name(other.into()))
        );
    }
    assert_eq!(
        named(&["https://x"]).identity(None),
        Err(CsrError::Name("https://x".into()))
    );
}

fn open(folder: &Path) -> Result<Authority, CaFilesError> {
    Authority::open(folder, DOMAIN, DAY, now())
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).expect("there").permissions().mode() & 0o777
}

#[test]
fn the_folder_is_made_once_and_then_used() {
    let temporary = tempfile::tempdir().expect("tempdir");
    let folder = temporary.path().join("ca");
    let first = open(&folder).expect("made");
    assert_eq!(
        (mode(&folder), mode(&folder.join("ca-key.pem"))),
        (0o700, 0o600)
    );
    let second = open(&folder).expect("opened");
    assert_eq!(first.roots_pem(), second.roots_pem());
    let bundle = fs::read_to_string(folder.join("root-cert.pem")).expect("bundle");
    assert_eq!(bundle, first.roots_pem());
    assert_eq!(
        fs::read_dir(&folder).expect("folder").count(),
        3,
        "nothing staged is left"
    );
}

#[test]
fn further_roots_are_appended_for_the_overlap() {
    let temporary = tempfile::tempdir().expect("tempdir");
    let folder = temporary.path();
    let own = open(folder).expect("made").roots_pem().to_owned();
    let next = authority().roots_pem().to_owned();
    fs::write(folder.join("roots.pem"), &next).expect("write");
    let both = open(folder).expect("opened");
    assert_eq!(both.roots_pem(), format!("{own}{next}"));
    let request = SigningRequest::from_pem(&csr(&p256(), &[])).expect("accepted");
    let signed = both
        .sign(&request, &identity(), None, now())
        .expect("signed");
    assert_eq!(files::certificates(&signed.chain[1]).expect("pem").len(), 2);
}

#[test]
fn an_intermediate_is_sent_between_leaf_and_roots() {
    let temporary = tempfile::tempdir().expect("tempdir");
    let folder = temporary.path();
    let root_key = p256();
    let root = make_root(DOMAIN, now()).expect("root");
    let root_issuer = Issuer::from_ca_cert_pem(
        &root.certificate,
        KeyPair::from_pem(&root.key).expect("key"),
    )
    .expect("issuer");
    let mut params = CertificateParams::default();
    params
        .distinguished_name
        .push(DnType::CommonName, "intermediate");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    set_validity(&mut params, now(), now() + DAY * 10);
    let intermediate = params
        .signed_by(&root_key, &root_issuer)
        .expect("signed")
        .pem();
    fs::write(folder.join("ca-cert.pem"), &intermediate).expect("write");
    fs::write(folder.join("ca-key.pem"), root_key.serialize_pem()).expect("write");
    fs::set_permissions(folder.join("ca-key.pem"), fs::Permissions::from_mode(0o600))
        .expect("chmod");
    assert!(
        matches!(open(folder), Err(CaFilesError::Certificate(_))),
        "its root is missing"
    );

    fs::write(folder.join("roots.pem"), &root.certificate).expect("write");
    let authority = open(folder).expect("opened");
    let request = SigningRequest::from_pem(&csr(&p256(), &[])).expect("accepted");
    let signed = authority
        .sign(&request, &identity(), None, now())
        .expect("signed");
    assert_eq!(
        signed.chain[1..],
        [intermediate, root.certificate.trim().to_owned() + "\n"]
    );
}

#[test]
fn unusable_files_are_named() {
    let temporary = tempfile::tempdir().expect("tempdir");
    let folder = temporary.path();
    open(folder).expect("made");
    let key = folder.join("ca-key.pem");
    let certificate = folder.join("ca-cert.pem");
    let good = fs::read(&certificate).expect("read");

    fs::set_permissions(&key, fs::Permissions::from_mode(0o640)).expect("chmod");
    assert!(matches!(
        open(folder),
        Err(CaFilesError::Exposed { mode: 0o640, .. })
    ));
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).expect("chmod");

    fs::write(&certificate, authority().roots_pem()).expect("write");
    assert!(matches!(
        open(folder),
        Err(CaFilesError::Certificate("does not belong to the key"))
    ));
    fs::write(&certificate, "no pem").expect("write");
    assert!(matches!(open(folder), Err(CaFilesError::Certificate(_))));
    fs::remove_file(&certificate).expect("remove");
    assert!(matches!(open(folder), Err(CaFilesError::Half(path)) if path == certificate));
    fs::write(&certificate, good).expect("write");

    fs::write(folder.join("roots.pem"), "no pem").expect("write");
    assert!(matches!(open(folder), Err(CaFilesError::ExtraRoots(_))));
    fs::remove_file(folder.join("roots.pem")).expect("remove");
    fs::write(&key, "no key").expect("write");
    assert!(matches!(open(folder), Err(CaFilesError::Key)));
}
