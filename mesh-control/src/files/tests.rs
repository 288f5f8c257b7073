use std::{
    os::unix::fs::symlink,
    sync::atomic::{AtomicU64, Ordering},
};

use mesh_api::manifest::Kind;
use prometheus::Registry;
use tokio::task::JoinHandle;

use super::*;
use crate::{config::MeshConfig, index::ResourceType};

const ROOT: &str = "weft-system";

fn pod(name: &str, ip: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop}}\n\
         spec: {{nodeName: a}}\nstatus: {{podIPs: [{{ip: {ip}}}]}}\n---\n"
    )
}

/// A clock that a test moves, in seconds from now.
fn moved(clock: &Arc<AtomicU64>) -> Clock {
    let (clock, start) = (clock.clone(), SystemTime::now());
    Clock(Arc::new(move || {
        start + Duration::from_secs(clock.load(Ordering::Relaxed))
    }))
}

/// A clock that goes on by a second whenever it is read.
fn eager() -> Clock {
    let (seconds, start) = (AtomicU64::new(0), SystemTime::now());
    Clock(Arc::new(move || {
        start + Duration::from_secs(seconds.fetch_add(1, Ordering::Relaxed))
    }))
}

/// A source that is being followed.
struct Followed {
    folder: tempfile::TempDir,
    hub: Hub,
    generation: channel::Receiver<u64>,
    _stop: channel::Sender<bool>,
    task: JoinHandle<()>,
}

impl Followed {
    fn start(files: &[(&str, String)]) -> Self {
        Self::start_at("", files)
    }

    /// Follows what `link` in the folder leads to: the folder itself.
    fn start_at(link: &str, files: &[(&str, String)]) -> Self {
        let folder = tempfile::tempdir().expect("tempdir");
        let path = folder.path().join(link);
        if !link.is_empty() {
            symlink(folder.path(), &path).expect("link");
        }
        for (name, text) in files {
            fs::write(folder.path().join(name), text).expect("write");
        }
        let hub = Hub::new(MeshConfig::default());
        let metrics = Metrics::new(&Registry::new()).expect("new registry");
        let watch = FolderWatch::open(&path).expect("inotify");
        let (mut source, changes) = FilesSource::open(&path, ROOT, None).expect("readable");
        source.clock = eager();
        hub.apply(changes);
        let generation = hub.generation();
        let (stop, stopped) = channel::channel(false);
        let task = tokio::spawn(source.run(Some(watch), hub.clone(), metrics, stopped));
        Self {
            folder,
            hub,
            generation,
            _stop: stop,
            task,
        }
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.folder.path().join(name), text).expect("write");
    }

    fn replace(&self, name: &str, text: &str) {
        let staged = self.folder.path().join(".staged");
        fs::write(&staged, text).expect("write");
        fs::rename(staged, self.folder.path().join(name)).expect("rename");
    }

    /// Waits for the next change, and gives the workloads.
    async fn changed(&mut self) -> Vec<String> {
        self.generation.changed().await.expect("the source runs");
        self.workloads()
    }

    fn workloads(&self) -> Vec<String> {
        let index = self.hub.read();
        let short = |name: &str| name.rsplit('/').next().unwrap_or_default().to_owned();
        index
            .store()
            .all(ResourceType::Address)
            .map(|resource| format!("{}{}", short(&resource.name), resource.aliases.concat()))
            .collect()
    }
}

trait Concat {
    fn concat(&self) -> String;
}

impl Concat for Vec<Arc<str>> {
    fn concat(&self) -> String {
        self.iter().map(|text| &**text).collect()
    }
}

#[tokio::test]
async fn files_that_come_change_and_go_are_noticed() {
    let mut source = Followed::start(&[("a.yaml", pod("web", "10.0.0.1"))]);
    assert_eq!(source.workloads(), ["web/10.0.0.1"]);
    source.write("b.yml", &pod("cart", "10.0.0.2"));
    assert_eq!(source.changed().await, ["cart/10.0.0.2", "web/10.0.0.1"]);
    source.replace("a.yaml", &pod("web", "10.0.0.9"));
    assert_eq!(
        source.changed().await,
        ["cart/10.0.0.2", "web/10.0.0.9"],
        "replaced by rename"
    );
    fs::rename(
        source.folder.path().join("b.yml"),
        source.folder.path().join("b.bak"),
    )
    .expect("rename");
    assert_eq!(source.changed().await, ["web/10.0.0.9"], "renamed away");
    fs::remove_file(source.folder.path().join("a.yaml")).expect("remove");
    assert!(source.changed().await.is_empty());
    source.task.abort();
}

#[tokio::test]
async fn a_malformed_file_keeps_its_last_good_objects() {
    let mut source =
        Followed::start(&[("a.yaml", pod("web", "10.0.0.1") + &pod("cart", "10.0.0.2"))]);
    let spoilt = pod("web", "10.0.0.7").replace("nodeName", "nodeNam");
    source.write("a.yaml", &(spoilt + &pod("cart", "10.0.0.3")));
    assert_eq!(source.changed().await, ["cart/10.0.0.3", "web/10.0.0.1"]);
    source.write(
        "a.yaml",
        &("{".to_owned() + "\n---\n" + &pod("cart", "10.0.0.4")),
    );
    assert_eq!(source.changed().await, ["cart/10.0.0.4", "web/10.0.0.1"]);
    source.write("a.yaml", &pod("cart", "10.0.0.5"));
    assert_eq!(
        source.changed().await,
        ["cart/10.0.0.5"],
        "repaired: what is gone is gone"
    );
    source.task.abort();
}

#[tokio::test]
async fn a_folder_that_vanishes_keeps_its_state_and_is_followed_when_it_is_back() {
    tokio::time::pause();
    let mut source = Followed::start(&[("a.yaml", pod("web", "10.0.0.1"))]);
    let path = source.folder.path().to_owned();
    let away = path.with_extension("away");
    fs::rename(&path, &away).expect("rename");
    fs::create_dir(&path).expect("folder");
    fs::write(path.join("a.yaml"), pod("web", "10.0.0.2")).expect("write");
    // However the events fall, the new folder's content is what counts in the end.
    while source.workloads() != ["web/10.0.0.2"] {
        source.changed().await;
    }
    assert_eq!(source.hub.read().objects(Kind::Pod), 1);
    fs::remove_dir_all(away).expect("remove");
    source.task.abort();
}

#[test]
fn files_over_the_limit_or_not_text_are_problems_of_that_file_only() {
    let folder = tempfile::tempdir().expect("tempdir");
    let path = |name: &str| folder.path().join(name);
    fs::write(path("good.yaml"), pod("web", "10.0.0.1")).expect("write");
    let over = fs::File::create(path("over.yaml")).expect("create");
    over.set_len(FILE_MAX_BYTES + 1).expect("a sparse file");
    fs::write(path("binary.yaml"), [0xff, 0xfe]).expect("write");
    fs::create_dir(path("folder.yaml")).expect("folder");
    fs::write(path(".hidden.yaml"), "{").expect("write");
    fs::write(path("notes.txt"), "{").expect("write");
    let (source, changes) = FilesSource::open(folder.path(), ROOT, None).expect("readable");
    assert_eq!(changes.len(), 1);
    let problems: Vec<_> = source.problems().iter().map(ToString::to_string).collect();
    assert_eq!(
        problems,
        [
            "binary.yaml: is not UTF-8 (from byte 0 on)".to_owned(),
            format!("over.yaml: is larger than {FILE_MAX_BYTES} bytes; split it"),
        ]
    );
}

#[test]
fn a_file_of_exactly_the_limit_is_read() {
    let folder = tempfile::tempdir().expect("tempdir");
    let path = folder.path().join("a.yaml");
    fs::write(&path, "12345").expect("write");
    assert_eq!(read_limited(&path, 5).as_deref(), Ok("12345"));
    assert!(read_limited(&path, 4).is_err());
}

#[test]
fn a_missing_folder_is_an_error() {
    assert!(FilesSource::open(Path::new("/nonexistent/manifests"), ROOT, None).is_err());
}

#[test]
fn a_file_that_changed_a_moment_ago_waits_for_its_event() {
    let folder = tempfile::tempdir().expect("tempdir");
    let (mut source, _) = FilesSource::open(folder.path(), ROOT, None).expect("readable");
    fs::write(folder.path().join("a.yaml"), pod("web", "10.0.0.1")).expect("write");
    assert!(source.scan(&Scope::Settled).is_empty());
    assert_eq!(
        source
            .scan(&Scope::Files(["a.yaml".to_owned()].into()))
            .len(),
        1
    );
}

#[tokio::test]
async fn a_link_is_read_when_it_is_made_and_a_folder_when_its_link_is_changed() {
    tokio::time::pause();
    let mut source = Followed::start_at("link", &[("a.yaml", pod("web", "10.0.0.1"))]);
    let elsewhere = tempfile::tempdir().expect("tempdir");
    let target = elsewhere.path().join("b.yaml");
    fs::write(&target, pod("cart", "10.0.0.2")).expect("write");
    symlink(&target, source.folder.path().join("b.yaml")).expect("link");
    assert_eq!(source.changed().await, ["cart/10.0.0.2", "web/10.0.0.1"]);

    let staged = source.folder.path().join("staged");
    symlink(elsewhere.path(), &staged).expect("link");
    fs::rename(&staged, source.folder.path().join("link")).expect("rename");
    assert_eq!(source.changed().await, ["cart/10.0.0.2"]);
    source.task.abort();
}

#[test]
fn a_replaced_folder_counts_when_it_is_complete() {
    let folder = tempfile::tempdir().expect("tempdir");
    let path = folder.path().join("manifests");
    fs::create_dir(&path).expect("folder");
    let write = |name: &str, ip: &str| {
        fs::write(path.join(format!("{name}.yaml")), pod(name, ip)).expect("write");
    };
    write("a", "10.0.0.1");
    write("b", "10.0.0.2");
    let (mut source, changes) = FilesSource::open(&path, ROOT, None).expect("readable");
    assert_eq!(changes.len(), 2);
    let seconds = Arc::new(AtomicU64::new(0));
    source.clock = moved(&seconds);
    let later = |source: &mut FilesSource| {
        seconds.fetch_add(SETTLE.as_secs(), Ordering::Relaxed);
        source.scan(&Scope::Settled).len()
    };

    let old = folder.path().join("old");
    fs::rename(&path, &old).expect("rename");
    assert_eq!(later(&mut source), 0, "the folder is gone");
    fs::create_dir(&path).expect("folder");
    for _ in 0..5 {
        assert_eq!(later(&mut source), 0, "it is empty, as a mount point is");
    }
    assert_eq!(source.problems().len(), 1);
    write("a", "10.0.0.7");
    assert_eq!(later(&mut source), 0);
    write("c", "10.0.0.8");
    assert_eq!(later(&mut source), 0, "it was still being filled");
    assert!(source.is_waiting());
    assert_eq!(later(&mut source), 3, "a changed, b went, c came");
    assert!(source.problems().is_empty() && !source.is_waiting());
}

#[test]
fn a_file_that_is_missing_from_a_listing_is_gone_when_it_is_missing_again() {
    let folder = tempfile::tempdir().expect("tempdir");
    let path = folder.path().join("a.yaml");
    fs::write(&path, pod("web", "10.0.0.1")).expect("write");
    let (mut source, _) = FilesSource::open(folder.path(), ROOT, None).expect("readable");
    let seconds = Arc::new(AtomicU64::new(0));
    source.clock = moved(&seconds);
    fs::remove_file(&path).expect("remove");
    assert!(source.scan(&Scope::All).is_empty());
    assert!(source.is_waiting(), "it is looked for again soon");
    seconds.store(SETTLE.as_secs(), Ordering::Relaxed);
    assert_eq!(source.scan(&Scope::All).len(), 1);
}

#[test]
fn a_link_that_leads_nowhere_keeps_what_it_led_to() {
    let folder = tempfile::tempdir().expect("tempdir");
    let (target, link) = (folder.path().join("target"), folder.path().join("a.yaml"));
    fs::write(&target, pod("web", "10.0.0.1")).expect("write");
    symlink(&target, &link).expect("link");
    let (mut source, _) = FilesSource::open(folder.path(), ROOT, None).expect("readable");
    fs::remove_file(&target).expect("remove");
    assert!(
        source
            .scan(&Scope::Files(["a.yaml".to_owned()].into()))
            .is_empty()
    );
    assert_eq!(source.problems().len(), 1);
    assert!(source.require_read().is_ok());
    let (source, _) = FilesSource::open(folder.path(), ROOT, None).expect("readable");
    let refused = source.require_read();
    assert!(
        matches!(refused, Err(SourceError::Unread { .. })),
        "{refused:?}"
    );
}
