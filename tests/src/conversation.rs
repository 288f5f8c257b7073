//! Short conversations between pods, and what each end saw of them.
//!
//! Clients are programs in a pod's own cgroup, never sockets of the test's process: those are not captured.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

use crate::{
    firewall::nft,
    lab::{Lab, Place, Pod},
    process::{Program, Running},
    programs,
    seqecho::{report::Report, server::ServedConnection},
    wait,
};

/// Longest life of a conversation, and longest wait for what it causes.
pub const LIMIT: Duration = Duration::from_secs(30);

/// A seqecho server in a pod that logs every connection that ends.
#[derive(Debug)]
pub struct Server {
    /// Where it listens.
    pub address: SocketAddr,
    running: Running,
}

impl Server {
    /// Starts it on the pod's first address.
    ///
    /// # Errors
    /// It does not listen within [`LIMIT`].
    pub fn start(lab: &Lab, pod: &Pod, port: u16) -> Result<Self> {
        Self::start_with(lab, pod, port, &[])
    }

    /// Starts it so that it speaks first, with [`crate::seqecho::BANNER`].
    ///
    /// # Errors
    /// It does not listen within [`LIMIT`].
    pub fn start_with_banner(lab: &Lab, pod: &Pod, port: u16) -> Result<Self> {
        Self::start_with(lab, pod, port, &["--banner"])
    }

    fn start_with(lab: &Lab, pod: &Pod, port: u16, arguments: &[&str]) -> Result<Self> {
        let address = pod.at(port);
        let program = Program::new(programs::own("seqecho")?)
            .named(&format!("server-{}-{port}", pod.spec.name))
            .args(["server", "--log", "--listen", &address.to_string()])
            .args(arguments);
        let running = lab.serve(pod, &program, address, LIMIT)?;
        Ok(Self { address, running })
    }

    /// The connections that have ended and came from somebody else than the pod itself.
    ///
    /// # Errors
    /// Its log makes no sense.
    pub fn served(&self) -> Result<Vec<ServedConnection>> {
        let log = self.running.stdout();
        // The last line may be half written.
        let whole = log.rfind('\n').map_or("", |end| &log[..end]);
        let mut served = Vec::new();
        for line in whole.lines() {
            let connection: ServedConnection =
                serde_json::from_str(line).with_context(|| format!("log line {line:?}"))?;
            if connection.peer.ip() != self.address.ip() {
                served.push(connection);
            }
        }
        Ok(served)
    }
}

/// A seqecho client to this address; more arguments may follow.
///
/// # Errors
/// seqecho is not built.
pub fn client(to: SocketAddr) -> Result<Program> {
    Ok(Program::new(programs::own("seqecho")?).args(["client", "--to", &to.to_string()]))
}

/// A seqecho client to this address with arguments that are separated by spaces.
///
/// # Errors
/// seqecho is not built.
pub fn client_with(to: SocketAddr, arguments: &str) -> Result<Program> {
    Ok(client(to)?.args(arguments.split_whitespace()))
}

/// Makes sure that several connections with several records each lose nothing.
///
/// # Errors
/// The report, if anything was lost.
pub fn require_service(lab: &Lab, place: &impl Place, to: SocketAddr) -> Result<()> {
    let report = talk(lab, place, &client_with(to, "--connections 5 --records 5")?)?;
    if report.lost() > 0 || report.records != 25 {
        bail!("{to}: something was lost: {report:?}");
    }
    Ok(())
}

/// Tries until a connection is served, for at most `limit`.
///
/// # Errors
/// None is.
pub fn wait_for_service(
    lab: &Lab,
    place: &impl Place,
    to: SocketAddr,
    limit: Duration,
) -> Result<()> {
    wait::until(&format!("service at {to}"), limit, || {
        let report = talk(lab, place, &client(to)?)?;
        Ok((report.lost() == 0).then_some(()))
    })
}

/// Runs a client to its end and reads its report, whatever it says.
///
/// # Errors
/// It does not end within twice [`LIMIT`], or prints no report.
pub fn talk(lab: &Lab, place: &impl Place, program: &Program) -> Result<Report> {
    let finished = lab.run(place, program, 2 * LIMIT)?;
    Report::parse(&finished.stdout)
        .with_context(|| format!("{}{}", finished.stdout, finished.stderr))
}

/// Reads the report of a client that was started with [`Lab::spawn`], after its end.
///
/// # Errors
/// It does not end within twice [`LIMIT`], or prints no report.
pub fn report(running: Running) -> Result<Report> {
    let finished = running.wait(2 * LIMIT)?;
    Report::parse(&finished.stdout)
        .with_context(|| format!("{}{}", finished.stdout, finished.stderr))
}

/// Tries one connection with one record: whether it is served.
///
/// # Errors
/// Neither served nor refused: it hangs, ends with FIN as if it had been served, or loses data.
pub fn reaches(lab: &Lab, place: &impl Place, to: SocketAddr) -> Result<bool> {
    let report = talk(lab, place, &client(to)?)?;
    if report.complete == 1 && report.lost() == 0 {
        return Ok(true);
    }
    let refused = report.connect_errors.values().sum::<u64>() + report.resets;
    if refused == 1 && report.lost() == 1 && report.records == 0 {
        return Ok(false);
    }
    bail!("a connection to {to} was neither served nor refused: {report:?}")
}

/// Counts the SYNs that reach one port of a pod over `lo`, by source address: the agent dials the application there,
/// so a connection that policy refuses must never be counted. Needs nft.
#[derive(Debug)]
pub struct AppSyns {
    sources: Vec<IpAddr>,
}

impl AppSyns {
    /// Installs the counters. IPv4 only.
    ///
    /// # Errors
    /// nft is missing or refuses.
    pub fn install(lab: &Lab, pod: &Pod, sources: &[IpAddr]) -> Result<Self> {
        let mut rules = String::from("table ip door {\n");
        for number in 0..sources.len() {
            rules.push_str(&format!("counter from{number} {{ }}\n"));
        }
        rules.push_str("chain arrivals { type filter hook input priority 0;\n");
        for (number, source) in sources.iter().enumerate() {
            rules.push_str(&format!(
                "iifname \"lo\" ip saddr {source} tcp flags & (syn | ack) == syn counter name from{number}\n"
            ));
        }
        rules.push_str("}\n}\n");
        let file = lab.directory().join(format!("door-{}.nft", pod.spec.name));
        fs::write(&file, rules).with_context(|| format!("cannot write {}", file.display()))?;
        nft(lab, pod, &["-f", &file.to_string_lossy()])?;
        Ok(Self {
            sources: sources.to_vec(),
        })
    }

    /// SYNs from this source since the installation.
    ///
    /// # Errors
    /// The source is not counted, or nft fails.
    pub fn count(&self, lab: &Lab, pod: &Pod, source: IpAddr) -> Result<u64> {
        let number = self
            .sources
            .iter()
            .position(|known| *known == source)
            .with_context(|| format!("{source} is not counted"))?;
        let name = format!("from{number}");
        let text = nft(lab, pod, &["list", "counter", "ip", "door", &name])?;
        let mut words = text.split_whitespace();
        words
            .find(|word| *word == "packets")
            .and_then(|_| words.next()?.parse().ok())
            .with_context(|| format!("nft printed {text:?}"))
    }
}
