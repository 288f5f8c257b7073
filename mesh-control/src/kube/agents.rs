//! The pods of the agents: with them a token is tied to a node.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, PoisonError, RwLock},
};

use k8s_openapi::api::core::v1::Pod;
use mesh_api::manifest::ObjectKey;

use crate::credentials::NodeName;

/// A service account.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceAccount {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// A pod that runs an agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct AgentPod {
    /// Unique identifier of the pod: another pod of the same name is another pod.
    pub uid: String,
    /// Where it runs.
    pub node: NodeName,
}

/// Every pod that runs an agent now. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct AgentPods {
    accounts: Arc<BTreeSet<ServiceAccount>>,
    /// By namespace and name.
    pods: Arc<RwLock<HashMap<(String, String), AgentPod>>>,
}

impl AgentPods {
    /// Agents are the pods of these service accounts.
    pub fn new(accounts: BTreeSet<ServiceAccount>) -> Self {
        Self {
            accounts: Arc::new(accounts),
            pods: Arc::default(),
        }
    }

    /// Whether an agent has that service account.
    pub fn is_agent(&self, account: &ServiceAccount) -> bool {
        self.accounts.contains(account)
    }

    /// The pod of that name, if it runs an agent.
    pub fn get(&self, namespace: &str, name: &str) -> Option<AgentPod> {
        let pods = self.pods.read().unwrap_or_else(PoisonError::into_inner);
        pods.get(&(namespace.to_owned(), name.to_owned())).cloned()
    }

    /// Takes a pod in its present form; `None` when it is gone.
    pub fn set(&self, key: &ObjectKey, pod: Option<&Pod>) {
        let agent = pod.and_then(|pod| self.agent(key, pod));
        let mut pods = self.pods.write().unwrap_or_else(PoisonError::into_inner);
        let name = (key.namespace.clone(), key.name.clone());
        match agent {
            Some(agent) => pods.insert(name, agent),
            None => pods.remove(&name),
        };
    }

    fn agent(&self, key: &ObjectKey, pod: &Pod) -> Option<AgentPod> {
        let spec = pod.spec.as_ref()?;
        let account = ServiceAccount {
            namespace: key.namespace.clone(),
            name: spec.service_account_name.clone()?,
        };
        let node = spec.node_name.as_deref().filter(|node| !node.is_empty())?;
        self.is_agent(&account).then_some(AgentPod {
            uid: pod.metadata.uid.clone()?,
            node: NodeName(node.into()),
        })
    }
}
