//! Manifests: the Kubernetes-shaped objects that users write and that the control plane is built from.
//!
//! [`parse`] reads a text of one or more YAML (or JSON) documents. It never gives up on the whole text because of
//! one bad object: what is good is returned, and every [`Problem`] says in which document, at which line, of which
//! object and in which field it is.

mod check;
mod crds;
mod definitions;
mod stand_in;

use std::{
    collections::{HashMap, hash_map::Entry},
    fmt,
    str::FromStr,
};

use k8s_openapi::{
    api::{
        core::v1::{Namespace, Node, Pod, Service, ServiceAccount},
        discovery::v1::EndpointSlice,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

pub use check::{FieldProblem, parse_address, parse_block};
pub use crds::{
    Action, AuthorizationPolicy, AuthorizationPolicySpec, ExternalLocality, ExternalWorkload,
    ExternalWorkloadSpec, FailureMode, MeshPolicy, MeshPolicySpec, Mtls, MtlsMode, Operation, Rule,
    SameNode, Source, StringPattern, StringPatternError, Toggle, WorkloadSelector,
};
pub use definitions::definitions;
pub use stand_in::RefusedPolicy;

/// Label on a pod, an `ExternalWorkload` or a namespace that enrols it: `enabled` or `disabled`.
pub const ENROL_LABEL: &str = "weft.dev/mesh";
/// Istio's enrolment label; the value `ambient` enrols, any other value does not.
pub const ISTIO_ENROL_LABEL: &str = "istio.io/dataplane-mode";
/// Namespace of an object that names none.
pub const DEFAULT_NAMESPACE: &str = "default";
/// API version of Weft's own kinds.
pub const WEFT_API_VERSION: &str = "weft.dev/v1alpha1";

/// The kinds that the control plane understands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Kind {
    /// `v1` Namespace: its labels enrol what is in it.
    Namespace,
    /// `v1` Node: its topology labels are the locality of its pods.
    Node,
    /// `v1` ServiceAccount.
    ServiceAccount,
    /// `v1` Pod.
    Pod,
    /// `v1` Service.
    Service,
    /// `discovery.k8s.io/v1` EndpointSlice.
    EndpointSlice,
    /// `weft.dev/v1alpha1` AuthorizationPolicy.
    AuthorizationPolicy,
    /// `weft.dev/v1alpha1` MeshPolicy.
    MeshPolicy,
    /// `weft.dev/v1alpha1` ExternalWorkload.
    ExternalWorkload,
}

impl Kind {
    /// Every kind, in the order in which documentation lists them.
    pub const ALL: [Self; 9] = [
        Self::Namespace,
        Self::Node,
        Self::ServiceAccount,
        Self::Pod,
        Self::Service,
        Self::EndpointSlice,
        Self::AuthorizationPolicy,
        Self::MeshPolicy,
        Self::ExternalWorkload,
    ];

    /// The kind as manifests spell it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Namespace => "Namespace",
            Self::Node => "Node",
            Self::ServiceAccount => "ServiceAccount",
            Self::Pod => "Pod",
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::AuthorizationPolicy => "AuthorizationPolicy",
            Self::MeshPolicy => "MeshPolicy",
            Self::ExternalWorkload => "ExternalWorkload",
        }
    }

    /// The `apiVersion` that goes with the kind.
    #[must_use]
    pub fn api_version(self) -> &'static str {
        match self {
            Self::Namespace | Self::Node | Self::ServiceAccount | Self::Pod | Self::Service => "v1",
            Self::EndpointSlice => "discovery.k8s.io/v1",
            Self::AuthorizationPolicy | Self::MeshPolicy | Self::ExternalWorkload => {
                WEFT_API_VERSION
            }
        }
    }

    /// Whether objects of this kind live in a namespace.
    #[must_use]
    pub fn namespaced(self) -> bool {
        !matches!(self, Self::Namespace | Self::Node)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What names an object: kind, namespace (empty for cluster-wide kinds) and name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectKey {
    /// Kind.
    pub kind: Kind,
    /// Namespace; empty for Namespaces and Nodes.
    pub namespace: String,
    /// Name.
    pub name: String,
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            write!(f, "{} {}", self.kind, self.name)
        } else {
            write!(f, "{} {}/{}", self.kind, self.namespace, self.name)
        }
    }
}

/// An object that was read and found valid.
#[derive(Debug, Clone, PartialEq)]
pub enum Object {
    /// `v1` Namespace.
    Namespace(Box<Namespace>),
    /// `v1` Node.
    Node(Box<Node>),
    /// `v1` ServiceAccount.
    ServiceAccount(Box<ServiceAccount>),
    /// `v1` Pod.
    Pod(Box<Pod>),
    /// `v1` Service.
    Service(Box<Service>),
    /// `discovery.k8s.io/v1` EndpointSlice.
    EndpointSlice(Box<EndpointSlice>),
    /// AuthorizationPolicy.
    AuthorizationPolicy(Box<AuthorizationPolicy>),
    /// MeshPolicy.
    MeshPolicy(Box<MeshPolicy>),
    /// ExternalWorkload.
    ExternalWorkload(Box<ExternalWorkload>),
}

impl Object {
    /// Its kind.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Namespace(_) => Kind::Namespace,
            Self::Node(_) => Kind::Node,
            Self::ServiceAccount(_) => Kind::ServiceAccount,
            Self::Pod(_) => Kind::Pod,
            Self::Service(_) => Kind::Service,
            Self::EndpointSlice(_) => Kind::EndpointSlice,
            Self::AuthorizationPolicy(_) => Kind::AuthorizationPolicy,
            Self::MeshPolicy(_) => Kind::MeshPolicy,
            Self::ExternalWorkload(_) => Kind::ExternalWorkload,
        }
    }

    /// Its metadata.
    #[must_use]
    pub fn metadata(&self) -> &ObjectMeta {
        match self {
            Self::Namespace(object) => &object.metadata,
            Self::Node(object) => &object.metadata,
            Self::ServiceAccount(object) => &object.metadata,
            Self::Pod(object) => &object.metadata,
            Self::Service(object) => &object.metadata,
            Self::EndpointSlice(object) => &object.metadata,
            Self::AuthorizationPolicy(object) => &object.metadata,
            Self::MeshPolicy(object) => &object.metadata,
            Self::ExternalWorkload(object) => &object.metadata,
        }
    }

    /// Its key; an object of a namespaced kind without a namespace is in [`DEFAULT_NAMESPACE`].
    #[must_use]
    pub fn key(&self) -> ObjectKey {
        let metadata = self.metadata();
        key_of(
            self.kind(),
            metadata.namespace.as_deref(),
            metadata.name.as_deref(),
        )
    }

    /// A JSON document that [`parse`] reads back as the same object.
    ///
    /// # Errors
    /// When a value has no form in JSON.
    pub fn to_json(&self) -> serde_json::Result<String> {
        match self {
            Self::Namespace(object) => serde_json::to_string(object),
            Self::Node(object) => serde_json::to_string(object),
            Self::ServiceAccount(object) => serde_json::to_string(object),
            Self::Pod(object) => serde_json::to_string(object),
            Self::Service(object) => serde_json::to_string(object),
            Self::EndpointSlice(object) => serde_json::to_string(object),
            Self::AuthorizationPolicy(object) => serde_json::to_string(object),
            Self::MeshPolicy(object) => serde_json::to_string(object),
            Self::ExternalWorkload(object) => serde_json::to_string(object),
        }
    }

    /// Everything that is wrong with its values. The parser calls it; sources that receive typed objects from
    /// elsewhere call it themselves.
    #[must_use]
    pub fn problems(&self) -> Vec<FieldProblem> {
        check::object(self)
    }
}

fn key_of(kind: Kind, namespace: Option<&str>, name: Option<&str>) -> ObjectKey {
    let namespace = match (kind.namespaced(), namespace) {
        (false, _) => "",
        (true, None | Some("")) => DEFAULT_NAMESPACE,
        (true, Some(namespace)) => namespace,
    };
    ObjectKey {
        kind,
        namespace: namespace.into(),
        name: name.unwrap_or_default().into(),
    }
}

/// Why a document, or a field of it, was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Document within the text, from 1.
    pub document: usize,
    /// Line within the text, from 1: of the fault where the parser knows it, else where the document begins.
    pub line: usize,
    /// The object; absent when the document did not even name one.
    pub object: Option<ObjectKey>,
    /// Path of the field, for example `spec.rules[0].to[1].ports[0]`; empty when the whole object is meant.
    pub field: String,
    /// What is wrong, and what would be right.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "document {} (line {})", self.document, self.line)?;
        if let Some(object) = &self.object {
            write!(f, ", {object}")?;
        }
        if !self.field.is_empty() {
            write!(f, ", field {}", self.field)?;
        }
        write!(f, ": {}", self.message)
    }
}

/// An object together with where it was found.
#[derive(Debug, Clone, PartialEq)]
pub struct Located {
    /// Line on which its document begins, from 1.
    pub line: usize,
    /// The object.
    pub object: Object,
}

/// What [`parse`] found.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Parsed {
    /// The valid objects, in the order of the text. No key occurs twice.
    pub objects: Vec<Located>,
    /// What was refused, and why.
    pub problems: Vec<Problem>,
    /// What could be read of the policies among it.
    pub refused_policies: Vec<RefusedPolicy>,
}

/// Reads every document of `text`. Empty documents are skipped.
#[must_use]
pub fn parse(text: &str) -> Parsed {
    let mut parsed = Parsed::default();
    let mut lines = HashMap::new();
    for document in split_documents(text) {
        match read_document(&document) {
            Ok(None) => {}
            Ok(Some(object)) => keep(&mut parsed, &mut lines, &document, object),
            Err(problems) => {
                parsed.problems.extend(problems);
                parsed
                    .refused_policies
                    .extend(stand_in::refused_policy(document.body));
            }
        }
    }
    parsed
}

/// `lines` says where every object of the text was first defined.
fn keep(
    parsed: &mut Parsed,
    lines: &mut HashMap<ObjectKey, usize>,
    document: &Document<'_>,
    object: Object,
) {
    match lines.entry(object.key()) {
        Entry::Occupied(earlier) => {
            let (key, line) = (earlier.key(), earlier.get());
            let message = format!("the same object is already defined at line {line} of this text");
            let problem = document.problem(Some(key), String::new(), message);
            return parsed.problems.push(problem);
        }
        Entry::Vacant(free) => free.insert(document.line),
    };
    parsed.objects.push(Located {
        line: document.line,
        object,
    });
}

/// One document of a text, and where it lies.
struct Document<'a> {
    number: usize,
    /// Line on which its content begins, from 1.
    line: usize,
    /// Lines of the text before `body`.
    lines_before: usize,
    body: &'a str,
}

impl Document<'_> {
    fn problem(&self, object: Option<&ObjectKey>, field: String, message: String) -> Problem {
        Problem {
            document: self.number,
            line: self.line,
            object: object.cloned(),
            field,
            message,
        }
    }

    /// A problem that the YAML reader found: it knows the line, and puts the path of the field before the message.
    fn reader_problem(&self, object: Option<&ObjectKey>, error: &serde_norway::Error) -> Problem {
        let text = error.to_string();
        let text = text.split(" at line ").next().unwrap_or(&text);
        let (field, message) = match text.split_once(": ") {
            Some((path, message)) if is_field_path(path) => (path.to_owned(), message),
            _ => (String::new(), text),
        };
        let mut problem = self.problem(object, field, message.to_owned());
        if let Some(location) = error.location() {
            problem.line = self.lines_before + location.line().max(1);
        }
        problem
    }
}

/// Whether the words before a colon are a path such as `spec.rules[0].from`.
fn is_field_path(text: &str) -> bool {
    !text.is_empty()
        && !text.contains(' ')
        && text
            .bytes()
            .next()
            .is_some_and(|b| b.is_ascii_lowercase() || b == b'[')
}

/// Splits at lines that begin with `---`. YAML 1.2 (section 9.1.2) forbids such a line inside any node, so one
/// malformed document cannot swallow the next.
fn split_documents(text: &str) -> Vec<Document<'_>> {
    let mut documents = Vec::new();
    let (mut start, mut lines_before, mut offset, mut line) = (0, 0, 0, 0);
    for text_line in text.split_inclusive('\n') {
        let marker = text_line
            .strip_prefix("---")
            .is_some_and(|rest| rest.is_empty() || rest.starts_with(char::is_whitespace));
        if marker && offset > start {
            documents.push((lines_before, &text[start..offset]));
            (start, lines_before) = (offset, line);
        }
        offset += text_line.len();
        line += 1;
    }
    documents.push((lines_before, &text[start..]));
    documents
        .into_iter()
        .filter(|(_, body)| body.lines().any(is_content))
        .enumerate()
        .map(|(index, (lines_before, body))| {
            let skipped = body.lines().take_while(|line| !is_content(line)).count();
            Document {
                number: index + 1,
                line: lines_before + skipped + 1,
                lines_before,
                body,
            }
        })
        .collect()
}

fn is_content(line: &str) -> bool {
    let line = line.strip_prefix("---").unwrap_or(line).trim();
    !line.is_empty() && !line.starts_with('#') && line != "..."
}

/// The part of every object that says what it is.
#[derive(Deserialize)]
struct Header {
    #[serde(default, rename = "apiVersion")]
    api_version: String,
    #[serde(default)]
    kind: String,
    #[serde(default)]
    metadata: HeaderMetadata,
}

#[derive(Deserialize, Default)]
struct HeaderMetadata {
    #[serde(default)]
    name: String,
    #[serde(default)]
    namespace: Option<String>,
}

impl FromStr for Kind {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.name() == text)
            .ok_or(())
    }
}

fn read_document(document: &Document<'_>) -> Result<Option<Object>, Vec<Problem>> {
    // Reading into a generic value first finds syntax errors and keys that occur twice, which typed readers accept.
    let value: serde_norway::Value = serde_norway::from_str(document.body)
        .map_err(|error| vec![document.reader_problem(None, &error)])?;
    if value.is_null() {
        return Ok(None);
    }
    let header: Header = serde_norway::from_str(document.body)
        .map_err(|error| vec![document.reader_problem(None, &error)])?;
    let refuse = |key: Option<&ObjectKey>, field: &str, message: String| {
        vec![document.problem(key, field.to_owned(), message)]
    };
    let Ok(kind) = header.kind.parse::<Kind>() else {
        let known: Vec<_> = Kind::ALL.iter().map(|kind| kind.name()).collect();
        let message = format!(
            "{:?} is not a known kind; known: {}",
            header.kind,
            known.join(", ")
        );
        return Err(refuse(None, "kind", message));
    };
    let key = key_of(
        kind,
        header.metadata.namespace.as_deref(),
        Some(&header.metadata.name),
    );
    if header.api_version != kind.api_version() {
        let message = format!("{:?} must be {:?}", header.api_version, kind.api_version());
        return Err(refuse(Some(&key), "apiVersion", message));
    }
    if header.metadata.name.is_empty() {
        return Err(refuse(Some(&key), "metadata.name", "is required".into()));
    }
    let object = match kind {
        Kind::Namespace => Object::Namespace(read_typed(document, &key)?),
        Kind::Node => Object::Node(read_typed(document, &key)?),
        Kind::ServiceAccount => Object::ServiceAccount(read_typed(document, &key)?),
        Kind::Pod => Object::Pod(read_typed(document, &key)?),
        Kind::Service => Object::Service(read_typed(document, &key)?),
        Kind::EndpointSlice => Object::EndpointSlice(read_typed(document, &key)?),
        Kind::AuthorizationPolicy => Object::AuthorizationPolicy(read_typed(document, &key)?),
        Kind::MeshPolicy => Object::MeshPolicy(read_typed(document, &key)?),
        Kind::ExternalWorkload => Object::ExternalWorkload(read_typed(document, &key)?),
    };
    let problems = object.problems();
    if problems.is_empty() {
        return Ok(Some(object));
    }
    Err(problems
        .into_iter()
        .map(|problem| document.problem(Some(&key), problem.field, problem.message))
        .collect())
}

/// Reads a typed object; every field that its type does not know is a problem of its own.
fn read_typed<T: DeserializeOwned>(
    document: &Document<'_>,
    key: &ObjectKey,
) -> Result<Box<T>, Vec<Problem>> {
    let mut unknown = Vec::new();
    let deserializer = serde_norway::Deserializer::from_str(document.body);
    let object: T = serde_ignored::deserialize(deserializer, |path| {
        let path = field_path(&path);
        // Types made by kube's derive carry these two in their type, not in a field.
        if path != "apiVersion" && path != "kind" {
            unknown.push(path);
        }
    })
    .map_err(|error| vec![document.reader_problem(Some(key), &error)])?;
    if unknown.is_empty() {
        return Ok(Box::new(object));
    }
    Err(unknown
        .into_iter()
        .map(|field| document.problem(Some(key), field, "unknown field".into()))
        .collect())
}

/// A path as people write it; `serde_ignored` itself would print a question mark for every optional field.
fn field_path(path: &serde_ignored::Path<'_>) -> String {
    use serde_ignored::Path;
    match path {
        Path::Root => String::new(),
        Path::Seq { parent, index } => format!("{}[{index}]", field_path(parent)),
        Path::Map { parent, key } => {
            let parent = field_path(parent);
            if parent.is_empty() {
                key.clone()
            } else {
                format!("{parent}.{key}")
            }
        }
        Path::Some { parent }
        | Path::NewtypeStruct { parent }
        | Path::NewtypeVariant { parent } => field_path(parent),
    }
}

#[cfg(test)]
mod tests;
