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
        let folder = tempfile::tempdir().expect("tempdir");
        for (name, text) in files {
            fs::write(folder.path().join(name), text).expect("write");
        }
        let hub = Hub::new(MeshConfig::default());
        let metrics = Metrics::new(&Registry::new()).expect("new registry");
        let watch = FolderWatch::open(folder.path()).expect("inotify");
        let (source, changes) = FilesSource::open(folder.path(), ROOT).expect("readable");
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

impl Concat for Vec<std::sync::Arc<str>> {
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
    let (source, changes) = FilesSource::open(folder.path(), ROOT).expect("readable");
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
    assert!(FilesSource::open(Path::new("/nonexistent/manifests"), ROOT).is_err());
}

#[test]
fn a_file_that_changed_a_moment_ago_waits_for_its_event() {
    let folder = tempfile::tempdir().expect("tempdir");
    let (mut source, _) = FilesSource::open(folder.path(), ROOT).expect("readable");
    fs::write(folder.path().join("a.yaml"), pod("web", "10.0.0.1")).expect("write");
    assert!(source.scan(&Scope::Settled).is_empty());
    assert_eq!(
        source
            .scan(&Scope::Files(["a.yaml".to_owned()].into()))
            .len(),
        1
    );
}
