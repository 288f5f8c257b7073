//! Policies in the form in which they are evaluated: parsed ranges, sorted ports, borrowed strings.

use std::sync::Arc;

use ipnet::IpNet;
use mesh_api::proto::security as wire;

use super::Subject;
use crate::discovery::convert::{Fault, ip_range};

/// Most values in one policy, over all its rules. The largest generated policies name some thousand ranges; the limit
/// bounds the time of one decision.
pub use mesh_api::limits::VALUES_PER_POLICY_MAX;

/// Why a policy cannot be enforced. The policy has to be changed where it was written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// A match of a DENY policy without any condition that this engine knows. It matches nothing, so the policy would
    /// silently allow what its author wanted to deny.
    #[error(
        "rule {rule} of this DENY policy has a match without any L4 condition, so it would deny nothing; \
         until it is corrected, every connection in its scope is denied"
    )]
    EmptyMatch {
        /// Which rule, counted from zero.
        rule: usize,
    },
    /// A string match that says neither exact, prefix, suffix nor presence.
    #[error("{field} holds a string match of an unknown kind")]
    UnknownStringMatch {
        /// The field.
        field: &'static str,
    },
    /// A service account that lacks its name or its namespace can match nobody.
    #[error("{field} holds the incomplete service account {namespace:?}/{account:?}")]
    IncompleteAccount {
        /// The field.
        field: &'static str,
        /// Its namespace.
        namespace: String,
        /// Its name.
        account: String,
    },
    /// More than [`VALUES_PER_POLICY_MAX`] values.
    #[error("it holds more than {VALUES_PER_POLICY_MAX} values")]
    TooLarge,
}

/// What a match of the policy means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    Allow,
    Deny,
}

/// To whom the policy applies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reach {
    Global,
    Namespace,
    Selected,
}

/// A policy ready for evaluation.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Compiled {
    pub(crate) action: Action,
    pub(crate) reach: Reach,
    pub(crate) dry_run: bool,
    /// It stands in for a refused policy.
    pub(crate) stand_in: bool,
    /// Joined by OR; each is a list of clauses joined by AND, each of which is a list of matches joined by OR.
    rules: Vec<Vec<Vec<CompiledMatch>>>,
}

impl Compiled {
    /// Whether one of the rules matches. No rules: nothing matches. A rule without clauses matches everything.
    pub(crate) fn matches(&self, subject: &Subject<'_>) -> bool {
        self.rules.iter().any(|clauses| {
            clauses
                .iter()
                .all(|matches| matches.is_empty() || matches.iter().any(|m| m.matches(subject)))
        })
    }

    /// The stand-in for a refused policy: an ALLOW policy that matches nothing or a DENY policy that matches
    /// everything, so that nothing becomes allowed because of the fault. A refused audit policy stays without effect.
    pub(crate) fn stand_in(frame: Frame) -> Self {
        let Frame {
            action,
            reach,
            dry_run,
        } = frame;
        let rules = match action {
            Action::Allow => Vec::new(),
            Action::Deny if dry_run => Vec::new(),
            Action::Deny => vec![Vec::new()],
        };
        Self {
            action,
            reach,
            dry_run,
            stand_in: true,
            rules,
        }
    }
}

#[derive(Debug, Clone, PartialEq)]
struct CompiledMatch {
    namespaces: Kind<StringMatcher>,
    principals: Kind<StringMatcher>,
    source_ips: Kind<IpNet>,
    destination_ips: Kind<IpNet>,
    destination_ports: Kind<u16>,
    service_accounts: Kind<Account>,
}

impl CompiledMatch {
    fn is_empty(&self) -> bool {
        self.namespaces.is_empty()
            && self.principals.is_empty()
            && self.source_ips.is_empty()
            && self.destination_ips.is_empty()
            && self.destination_ports.is_empty()
            && self.service_accounts.is_empty()
    }

    fn matches(&self, s: &Subject<'_>) -> bool {
        // A match without conditions matches nothing (wire.md section 8); in DENY policies it is refused before.
        !self.is_empty()
            && self.destination_ports.accepts(|port| *port == s.port)
            && self.source_ips.accepts(|range| range.contains(&s.source))
            && self
                .destination_ips
                .accepts(|range| range.contains(&s.destination))
            && self
                .namespaces
                .accepts(|m| s.peer.is_some_and(|peer| m.matches(peer.namespace())))
            && self.principals.accepts(|m| {
                s.principal
                    .as_deref()
                    .is_some_and(|principal| m.matches(principal))
            })
            && self.service_accounts.accepts(|account| {
                s.peer.is_some_and(|peer| {
                    *account.namespace == *peer.namespace()
                        && *account.name == *peer.service_account()
                })
            })
    }
}

/// One kind of condition: some value has to match (if there are any), and no excluded value may.
#[derive(Debug, Clone, PartialEq)]
struct Kind<T> {
    any_of: Vec<T>,
    none_of: Vec<T>,
}

impl<T> Kind<T> {
    fn is_empty(&self) -> bool {
        self.any_of.is_empty() && self.none_of.is_empty()
    }

    fn accepts(&self, matches: impl Fn(&T) -> bool) -> bool {
        (self.any_of.is_empty() || self.any_of.iter().any(&matches))
            && !self.none_of.iter().any(matches)
    }
}

#[derive(Debug, Clone, PartialEq)]
enum StringMatcher {
    Exact(Arc<str>),
    Prefix(Arc<str>),
    Suffix(Arc<str>),
    Presence,
}

impl StringMatcher {
    fn matches(&self, value: &str) -> bool {
        match self {
            Self::Exact(text) => value == &**text,
            Self::Prefix(text) => value.starts_with(&**text),
            Self::Suffix(text) => value.ends_with(&**text),
            Self::Presence => !value.is_empty(),
        }
    }
}

#[derive(Debug, Clone, PartialEq)]
struct Account {
    namespace: Arc<str>,
    name: Arc<str>,
}

/// What a policy is apart from its rules; known even for a policy whose rules are refused.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Frame {
    pub(crate) action: Action,
    pub(crate) reach: Reach,
    pub(crate) dry_run: bool,
}

/// Reads the action, the scope and the mode of a policy.
pub(crate) fn frame(policy: &wire::Authorization) -> Result<Frame, Fault> {
    let action = match wire::Action::try_from(policy.action) {
        Ok(wire::Action::Allow) => Action::Allow,
        Ok(wire::Action::Deny) => Action::Deny,
        Err(_) => {
            return Err(Fault::UnknownValue {
                field: "action",
                value: policy.action,
            });
        }
    };
    let reach = match wire::Scope::try_from(policy.scope) {
        Ok(wire::Scope::Global) => Reach::Global,
        Ok(wire::Scope::Namespace) => Reach::Namespace,
        Ok(wire::Scope::WorkloadSelector) => Reach::Selected,
        Err(_) => {
            return Err(Fault::UnknownValue {
                field: "scope",
                value: policy.scope,
            });
        }
    };
    Ok(Frame {
        action,
        reach,
        dry_run: policy.dry_run,
    })
}

/// Checks and compiles a policy.
///
/// # Errors
/// A [`Fault`] that names the field; see [`PolicyError`] for what is particular to policies.
pub(crate) fn compile(policy: &wire::Authorization) -> Result<Compiled, Fault> {
    let Frame {
        action,
        reach,
        dry_run,
    } = frame(policy)?;
    let mut budget = VALUES_PER_POLICY_MAX;
    let mut rules = Vec::with_capacity(policy.rules.len());
    for (index, rule) in policy.rules.iter().enumerate() {
        spend(&mut budget, 1)?;
        let mut clauses = Vec::with_capacity(rule.clauses.len());
        for clause in &rule.clauses {
            spend(&mut budget, 1)?;
            let mut matches = Vec::with_capacity(clause.matches.len());
            for m in &clause.matches {
                spend(&mut budget, 1)?;
                let compiled = compile_match(m, &mut budget)?;
                if action == Action::Deny && compiled.is_empty() {
                    return Err(PolicyError::EmptyMatch { rule: index }.into());
                }
                matches.push(compiled);
            }
            clauses.push(matches);
        }
        rules.push(clauses);
    }
    Ok(Compiled {
        action,
        reach,
        dry_run,
        stand_in: false,
        rules,
    })
}

fn spend(budget: &mut usize, count: usize) -> Result<(), Fault> {
    *budget = budget.checked_sub(count).ok_or(PolicyError::TooLarge)?;
    Ok(())
}

fn compile_match(m: &wire::Match, budget: &mut usize) -> Result<CompiledMatch, Fault> {
    let counts = [
        m.namespaces.len(),
        m.not_namespaces.len(),
        m.principals.len(),
        m.not_principals.len(),
        m.source_ips.len(),
        m.not_source_ips.len(),
        m.destination_ips.len(),
        m.not_destination_ips.len(),
        m.destination_ports.len(),
        m.not_destination_ports.len(),
        m.service_accounts.len(),
        m.not_service_accounts.len(),
    ];
    spend(budget, counts.iter().sum())?;
    Ok(CompiledMatch {
        namespaces: kind(&m.namespaces, &m.not_namespaces, |v| {
            string("namespaces", v)
        })?,
        principals: kind(&m.principals, &m.not_principals, |v| {
            principal("principals", v)
        })?,
        source_ips: kind(&m.source_ips, &m.not_source_ips, |v| range("source_ips", v))?,
        destination_ips: kind(&m.destination_ips, &m.not_destination_ips, |v| {
            range("destination_ips", v)
        })?,
        destination_ports: kind(&m.destination_ports, &m.not_destination_ports, |v| port(*v))?,
        service_accounts: kind(&m.service_accounts, &m.not_service_accounts, account)?,
    })
}

fn kind<W, T>(
    any_of: &[W],
    none_of: &[W],
    convert: impl Fn(&W) -> Result<T, Fault>,
) -> Result<Kind<T>, Fault> {
    Ok(Kind {
        any_of: any_of.iter().map(&convert).collect::<Result<_, _>>()?,
        none_of: none_of.iter().map(&convert).collect::<Result<_, _>>()?,
    })
}

fn string(field: &'static str, value: &wire::StringMatch) -> Result<StringMatcher, Fault> {
    use wire::string_match::MatchType;
    Ok(match &value.match_type {
        Some(MatchType::Exact(text)) => StringMatcher::Exact(text.as_str().into()),
        Some(MatchType::Prefix(text)) => StringMatcher::Prefix(text.as_str().into()),
        Some(MatchType::Suffix(text)) => StringMatcher::Suffix(text.as_str().into()),
        Some(MatchType::Presence(())) => StringMatcher::Presence,
        None => return Err(PolicyError::UnknownStringMatch { field }.into()),
    })
}

/// Principals travel without `spiffe://`. A pattern that has it anyway could match nobody, which would disarm a DENY
/// policy, and its meaning is plain: the scheme is dropped.
fn principal(field: &'static str, value: &wire::StringMatch) -> Result<StringMatcher, Fault> {
    let without_scheme = |text: Arc<str>| {
        text.strip_prefix("spiffe://")
            .map_or(Arc::clone(&text), Arc::from)
    };
    Ok(match string(field, value)? {
        StringMatcher::Exact(text) => StringMatcher::Exact(without_scheme(text)),
        StringMatcher::Prefix(text) => StringMatcher::Prefix(without_scheme(text)),
        other => other,
    })
}

fn range(field: &'static str, value: &wire::Address) -> Result<IpNet, Fault> {
    ip_range(field, &value.address, Some(value.length))
}

fn port(value: u32) -> Result<u16, Fault> {
    match u16::try_from(value) {
        Ok(port) if port > 0 => Ok(port),
        _ => Err(Fault::Port {
            field: "destination_ports",
            port: value,
        }),
    }
}

fn account(value: &wire::ServiceAccountMatch) -> Result<Account, Fault> {
    if value.namespace.is_empty() || value.service_account.is_empty() {
        let (namespace, account) = (value.namespace.clone(), value.service_account.clone());
        return Err(PolicyError::IncompleteAccount {
            field: "service_accounts",
            namespace,
            account,
        }
        .into());
    }
    Ok(Account {
        namespace: value.namespace.as_str().into(),
        name: value.service_account.as_str().into(),
    })
}
