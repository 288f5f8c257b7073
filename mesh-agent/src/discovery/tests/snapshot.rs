use std::{fs, os::unix::fs::PermissionsExt as _};

use mesh_api::proto::{discovery::Node, workload as wire};
use prost::Message as _;

use super::*;
use crate::discovery::{
    snapshot::{SNAPSHOT_MAX_BYTES, SnapshotError, load, save},
    subscription::{Kind, Record},
};

fn node(id: &str) -> Node {
    Node {
        id: id.to_owned(),
        ..Node::default()
    }
}

fn records(count: usize) -> Vec<Record> {
    let record = |i: usize| {
        let pod = pod(&format!("p{i}"), "10.0.0.1");
        let name = pod.uid.as_str().into();
        let body = wire::Address {
            r#type: Some(wire::address::Type::Workload(pod)),
        }
        .encode_to_vec();
        Record {
            kind: Kind::Address,
            name,
            version: "3".into(),
            body: body.into(),
        }
    };
    (0..count).map(record).collect()
}

#[test]
fn what_was_saved_is_loaded() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("snapshot");
    assert!(
        load(&path, &node("n1"))
            .expect("no file is no error")
            .is_none()
    );
    let mut records = records(3);
    records.push(Record {
        kind: Kind::Authorization,
        name: "shop/p".into(),
        ..records[0].clone()
    });
    save(&path, &node("n1"), &records).expect("saved");
    assert_eq!(load(&path, &node("n1")).expect("loaded"), Some(records));
    let mode = fs::metadata(&path).expect("exists").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert_eq!(
        fs::read_dir(directory.path()).expect("readable").count(),
        1,
        "no temporary file is left"
    );
}

#[test]
fn a_snapshot_cut_anywhere_or_with_any_byte_changed_is_refused() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("snapshot");
    save(&path, &node("n1"), &records(2)).expect("saved");
    let good = fs::read(&path).expect("readable");
    for length in 0..good.len() {
        fs::write(&path, &good[..length]).expect("writable");
        assert!(load(&path, &node("n1")).is_err(), "cut at {length}");
    }
    for index in 0..good.len() {
        let mut damaged = good.clone();
        damaged[index] ^= 0x40;
        fs::write(&path, &damaged).expect("writable");
        assert!(load(&path, &node("n1")).is_err(), "changed at {index}");
    }
    fs::write(&path, [good.as_slice(), b"x"].concat()).expect("writable");
    assert!(matches!(
        load(&path, &node("n1")),
        Err(SnapshotError::Length { .. })
    ));
}

#[test]
fn foreign_files_are_refused_by_what_is_wrong_with_them() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("snapshot");
    fs::write(&path, b"#!/bin/sh\n").expect("writable");
    assert!(matches!(
        load(&path, &node("n1")),
        Err(SnapshotError::Foreign(_))
    ));
    fs::write(&path, b"WEFTSNAP\0\0\0\x02").expect("writable");
    assert!(matches!(
        load(&path, &node("n1")),
        Err(SnapshotError::Version { version: 2, .. })
    ));
    save(&path, &node("n2"), &records(1)).expect("saved");
    assert!(matches!(
        load(&path, &node("n1")),
        Err(SnapshotError::OtherNode { .. })
    ));
    fs::File::create(&path)
        .and_then(|f| f.set_len(SNAPSHOT_MAX_BYTES + 1))
        .expect("a sparse file");
    assert!(matches!(
        load(&path, &node("n1")),
        Err(SnapshotError::TooLarge(_))
    ));
}

#[test]
fn a_failed_write_leaves_the_old_snapshot() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("snapshot");
    save(&path, &node("n1"), &records(1)).expect("saved");
    // A directory in the place of the temporary file makes every write fail, as a full disk does.
    fs::create_dir(directory.path().join("snapshot.tmp")).expect("created");
    assert!(matches!(
        save(&path, &node("n1"), &records(2)),
        Err(SnapshotError::Io { .. })
    ));
    assert_eq!(
        load(&path, &node("n1")).expect("loaded").map(|r| r.len()),
        Some(1)
    );
}

#[test]
fn a_state_larger_than_the_limit_is_not_written() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("snapshot");
    save(&path, &node("n1"), &records(1)).expect("saved");
    let huge = Record {
        body: vec![0; 64 * 1024 * 1024].into(),
        ..records(1).remove(0)
    };
    let outcome = save(&path, &node("n1"), &vec![huge; 5]);
    assert!(matches!(outcome, Err(SnapshotError::TooLarge(_))));
    assert_eq!(
        load(&path, &node("n1")).expect("loaded").map(|r| r.len()),
        Some(1)
    );
}
