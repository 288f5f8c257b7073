//! OCI image archives out of files of this machine, without a container engine. The same input gives the same bytes: entries
//! are sorted, and nothing of the machine (times, owners, names) gets in.
//!
//! Layout: image-spec v1.1, `image-layout.md`, in an uncompressed tar. `manifest.json` beside it is the older form
//! (`docker load`), which names the same blobs.

mod tar;

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use self::tar::{Entry, Kind};

/// What an image is made of.
#[derive(Debug, Clone, Default)]
pub struct Image {
    /// `name:tag`.
    reference: String,
    entries: BTreeMap<String, Entry>,
    entrypoint: Vec<String>,
    user: String,
    environment: Vec<String>,
    labels: BTreeMap<String, String>,
}

/// A written image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// The archive.
    pub path: PathBuf,
    /// Its size, bytes.
    pub bytes: u64,
    /// Digest of the manifest, by which registries name the image.
    pub digest: String,
}

impl Image {
    /// An image without files that runs as root.
    #[must_use]
    pub fn new(reference: &str) -> Self {
        Self {
            reference: reference.to_owned(),
            user: "0:0".to_owned(),
            ..Self::default()
        }
    }

    /// Adds a file of this machine, with the execution bits that it has.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn file(mut self, source: &Path, target: &str) -> Result<Self> {
        use std::os::unix::fs::PermissionsExt as _;
        let data = fs::read(source).with_context(|| format!("cannot read {}", source.display()))?;
        let mode = fs::metadata(source)?.permissions().mode();
        let mode = if mode & 0o100 == 0 { 0o644 } else { 0o755 };
        self.add(target, mode, Kind::File(data))?;
        Ok(self)
    }

    /// Adds a program of this machine with the shared libraries that it needs, at the places where it looks for them.
    ///
    /// # Errors
    /// It cannot be read, or a library is missing.
    pub fn program(mut self, source: &Path, target: &str) -> Result<Self> {
        for library in libraries(source)? {
            let place = library.display().to_string();
            if !self.entries.contains_key(place.trim_start_matches('/')) {
                // Libraries are links to their versions; a copy under the linked name serves as well.
                self = self.file(&fs::canonicalize(&library)?, &place)?;
            }
        }
        self.file(source, target)
    }

    /// Adds a small file.
    ///
    /// # Errors
    /// The path is taken.
    pub fn text(mut self, target: &str, text: &str) -> Result<Self> {
        self.add(target, 0o644, Kind::File(text.as_bytes().to_vec()))?;
        Ok(self)
    }

    /// Adds a folder.
    ///
    /// # Errors
    /// The path is taken.
    pub fn folder(mut self, target: &str, mode: u32) -> Result<Self> {
        self.add(target, mode, Kind::Folder)?;
        Ok(self)
    }

    /// Adds a symbolic link.
    ///
    /// # Errors
    /// The path is taken.
    pub fn link(mut self, target: &str, to: &str) -> Result<Self> {
        self.add(target, 0o777, Kind::Link(to.to_owned()))?;
        Ok(self)
    }

    /// The program that a container runs.
    #[must_use]
    pub fn entrypoint(mut self, words: &[&str]) -> Self {
        self.entrypoint = words.iter().map(|word| (*word).to_owned()).collect();
        self
    }

    /// The user and group that it runs as, by number.
    #[must_use]
    pub fn user(mut self, user: &str) -> Self {
        user.clone_into(&mut self.user);
        self
    }

    /// A variable of its environment.
    #[must_use]
    pub fn environment(mut self, name: &str, value: &str) -> Self {
        self.environment.push(format!("{name}={value}"));
        self
    }

    /// An annotation (`org.opencontainers.image.…`).
    #[must_use]
    pub fn label(mut self, name: &str, value: &str) -> Self {
        self.labels.insert(name.to_owned(), value.to_owned());
        self
    }

    fn add(&mut self, target: &str, mode: u32, kind: Kind) -> Result<()> {
        let path = target.trim_start_matches('/').to_owned();
        let folders: Vec<usize> = path.match_indices('/').map(|(at, _)| at).collect();
        for end in folders {
            let folder = path[..end].to_owned();
            self.entries.entry(folder).or_insert(Entry {
                mode: 0o755,
                kind: Kind::Folder,
            });
        }
        if self.entries.insert(path, Entry { mode, kind }).is_some() {
            bail!("the image has two of {target}");
        }
        Ok(())
    }

    /// Writes the archive.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(&self, path: &Path) -> Result<Written> {
        let layer = tar::archive(&self.entries)?;
        let layer_digest = digest(&layer);
        let config = self.config(&layer_digest).to_string().into_bytes();
        let config_digest = digest(&config);
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": descriptor("application/vnd.oci.image.config.v1+json", &config_digest, config.len()),
            "layers": [descriptor("application/vnd.oci.image.layer.v1.tar", &layer_digest, layer.len())],
        });
        let manifest = manifest.to_string().into_bytes();
        let manifest_digest = digest(&manifest);
        let mut entry = descriptor(
            "application/vnd.oci.image.manifest.v1+json",
            &manifest_digest,
            manifest.len(),
        );
        // containerd names an imported image by the first, other tools by the second.
        let (_, tag) = self
            .reference
            .rsplit_once(':')
            .context("an image is named name:tag")?;
        entry["annotations"] = json!({
            "io.containerd.image.name": self.reference,
            "org.opencontainers.image.ref.name": tag,
        });
        let index = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [entry],
        });
        let older = json!([{
            "Config": blob(&config_digest),
            "RepoTags": [self.reference],
            "Layers": [blob(&layer_digest)],
        }]);

        let mut files = BTreeMap::new();
        let mut put = |name: String, data: Vec<u8>| {
            let kind = Kind::File(data);
            files.insert(name, Entry { mode: 0o644, kind });
        };
        put(
            "oci-layout".into(),
            br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec(),
        );
        put("index.json".into(), index.to_string().into_bytes());
        put("manifest.json".into(), older.to_string().into_bytes());
        put(blob(&layer_digest), layer);
        put(blob(&config_digest), config);
        put(blob(&manifest_digest), manifest);
        for folder in ["blobs", "blobs/sha256"] {
            let kind = Kind::Folder;
            files.insert(folder.into(), Entry { mode: 0o755, kind });
        }
        let archive = tar::archive(&files)?;
        let failed = || format!("cannot write {}", path.display());
        File::create(path)
            .and_then(|mut file| file.write_all(&archive))
            .with_context(failed)?;
        Ok(Written {
            path: path.to_owned(),
            bytes: archive.len() as u64,
            digest: manifest_digest,
        })
    }

    fn config(&self, layer_digest: &str) -> Value {
        json!({
            "architecture": architecture(),
            "os": "linux",
            "config": {
                "User": self.user,
                "Entrypoint": self.entrypoint,
                "Env": self.environment,
                "Labels": self.labels,
            },
            "rootfs": {"type": "layers", "diff_ids": [layer_digest]},
        })
    }
}

fn descriptor(media_type: &str, digest: &str, bytes: usize) -> Value {
    json!({"mediaType": media_type, "digest": digest, "size": bytes})
}

fn blob(digest: &str) -> String {
    format!("blobs/{}", digest.replace(':', "/"))
}

/// `sha256:…`.
fn digest(data: &[u8]) -> String {
    use std::fmt::Write as _;
    let mut text = String::from("sha256:");
    for byte in Sha256::digest(data) {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// As Go, and with it every container tool, names the architecture.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// The shared libraries of a program, the loader included; none for one that is linked statically.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = std::process::Command::new("ldd")
        .arg(program)
        .env("LC_ALL", "C")
        .output()
        .context("cannot run ldd (Debian package libc-bin)")?;
    let text = String::from_utf8_lossy(&output.stdout);
    if let Some(line) = text.lines().find(|line| line.contains("not found")) {
        bail!("{}: {}", program.display(), line.trim());
    }
    let path = |line: &str| {
        line.split_whitespace()
            .find(|word| word.starts_with('/'))
            .map(PathBuf::from)
    };
    // `a static program` has a line without a path, or none at all.
    Ok(text.lines().filter_map(path).collect())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn folder(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("weft-oci-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder");
        folder
    }

    fn image() -> Image {
        Image::new("localhost/x:1")
            .text("etc/passwd", "root:x:0:0::/:/\n")
            .and_then(|image| image.link("bin/b", "a"))
            .and_then(|image| image.text("/bin/a", "content"))
            .and_then(|image| image.folder("tmp", 0o1777))
            .expect("an image")
            .entrypoint(&["/bin/a"])
    }

    #[test]
    fn the_same_input_gives_the_same_bytes() {
        let folder = folder("same");
        let (first, second) = (folder.join("1.tar"), folder.join("2.tar"));
        let written = image().write(&first).expect("written");
        assert_eq!(
            image().write(&second).expect("written").digest,
            written.digest
        );
        assert!(fs::read(&first).expect("read") == fs::read(&second).expect("read"));
        let other = image().label("a", "b").write(&second).expect("written");
        assert_ne!(other.digest, written.digest);
        fs::remove_dir_all(folder).expect("removed");
    }

    #[test]
    fn the_archive_is_an_image_layout() {
        let folder = folder("layout");
        let path = folder.join("image.tar");
        let written = image().write(&path).expect("written");
        let unpacked = Command::new("tar")
            .args(["-xf"])
            .arg(&path)
            .arg("-C")
            .arg(&folder)
            .status();
        assert!(unpacked.expect("tar runs").success());
        let json = |name: &str| -> Value {
            serde_json::from_slice(&fs::read(folder.join(name)).expect(name)).expect("JSON")
        };
        let entry = &json("index.json")["manifests"][0];
        assert_eq!(entry["digest"], written.digest);
        assert_eq!(
            entry["annotations"]["io.containerd.image.name"],
            "localhost/x:1"
        );
        let manifest = json(&blob(&written.digest));
        let layer = manifest["layers"][0]["digest"].as_str().expect("a layer");
        let config = json(&blob(
            manifest["config"]["digest"].as_str().expect("a config"),
        ));
        assert_eq!(config["rootfs"]["diff_ids"][0], layer);
        let listed = Command::new("tar")
            .args(["-tvf"])
            .arg(folder.join(blob(layer)))
            .env("TZ", "UTC")
            .output()
            .expect("tar runs");
        let listed = String::from_utf8_lossy(&listed.stdout);
        let names: Vec<&str> = listed
            .lines()
            .filter_map(|line| line.split("1970-01-01 ").nth(1))
            .map(|rest| &rest[6..])
            .collect();
        assert_eq!(
            names,
            ["bin/", "bin/a", "bin/b -> a", "etc/", "etc/passwd", "tmp/"],
            "{listed}"
        );
        fs::remove_dir_all(folder).expect("removed");
    }

    #[test]
    fn a_path_is_given_once() {
        assert!(image().text("bin/a", "again").is_err());
    }

    #[test]
    fn a_program_brings_its_libraries() {
        let shell = Path::new("/bin/sh");
        let image = Image::new("x:1")
            .program(shell, "/bin/sh")
            .expect("an image");
        assert!(
            image.entries.keys().any(|path| path.contains("libc.so")),
            "{:?}",
            image.entries.keys()
        );
    }
}
