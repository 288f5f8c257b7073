//! Capturing on the links between nodes with tcpdump.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::Signal;

use super::verdict::{Judge, Verdict};
use crate::{
    lab::{LINK, Lab},
    netns,
    process::{Program, Running},
    wait,
};

/// How long tcpdump may take to begin, to write what it has, and to end.
const TCPDUMP_LIMIT: Duration = Duration::from_secs(20);

/// Kernel buffer of each capture, in KiB: more than a second of what this kind of machine can send.
const BUFFER_KIB: &str = "131072";

/// Port "discard" (RFC 863): nobody answers.
const DISCARD_PORT: u16 = 9;

/// A capture on the link of every node, outgoing frames only, so that each frame is seen once.
#[derive(Debug)]
pub struct LinkCapture {
    taps: Vec<Tap>,
    pods: Vec<IpAddr>,
}

#[derive(Debug)]
struct Tap {
    tcpdump: Running,
    file: PathBuf,
    netns: PathBuf,
    neighbour: IpAddr,
}

impl LinkCapture {
    /// Begins to capture; when this returns, no frame between the nodes of the lab goes unseen.
    ///
    /// # Errors
    /// tcpdump is missing or cannot capture, or the lab has only one node.
    pub fn start(lab: &Lab) -> Result<Self> {
        let mut taps = Vec::new();
        for node in lab.nodes() {
            let neighbour = lab.nodes().iter().find(|other| other.index != node.index);
            let neighbour = neighbour
                .context("a lab of one node has no link to capture on")?
                .address();
            let file = lab.logs().join(format!("{}-{}.pcap", node.name, unique()));
            let program = Program::line("tcpdump -n -i")
                .arg(LINK)
                .args(["-Q", "out", "-s", "262144", "-B", BUFFER_KIB]);
            let program = program
                .args(["--immediate-mode", "-U", "-Z", "root", "-w"])
                .arg(&file);
            let mut tcpdump = lab.spawn(node, &program)?;
            tcpdump.wait_for_output("listening on", TCPDUMP_LIMIT)?;
            taps.push(Tap {
                tcpdump,
                file,
                netns: node.netns.clone(),
                neighbour,
            });
        }
        Ok(Self {
            taps,
            pods: lab.pods().flat_map(|pod| pod.addresses.clone()).collect(),
        })
    }

    /// Ends the capture and judges it. `markers` are texts that must not be seen in any payload.
    ///
    /// # Errors
    /// Frames were lost, so there is no verdict.
    pub fn finish(self, markers: &[&str]) -> Result<Verdict> {
        let mut judge = Judge::new(self.pods, markers);
        for tap in self.taps {
            judge.file(&tap.finish()?)?;
        }
        Ok(judge.finish())
    }
}

impl Tap {
    /// Sends a datagram of our own and waits until it is in the file: everything before it is there, too.
    fn finish(mut self) -> Result<Vec<u8>> {
        let sentinel = format!("weft-lab-sentinel-{}", unique());
        netns::within(&self.netns, || -> Result<()> {
            let any: IpAddr = if self.neighbour.is_ipv4() {
                Ipv4Addr::UNSPECIFIED.into()
            } else {
                Ipv6Addr::UNSPECIFIED.into()
            };
            let socket = UdpSocket::bind(SocketAddr::new(any, 0))?;
            socket.send_to(sentinel.as_bytes(), (self.neighbour, DISCARD_PORT))?;
            Ok(())
        })?
        .context("cannot mark the end of the capture")?;
        wait::until(
            "the end of the capture to be written",
            TCPDUMP_LIMIT,
            || {
                self.tcpdump.check_running()?;
                Ok(self.ends_with(&sentinel)?.then_some(()))
            },
        )?;
        let finished = self.tcpdump.stop(Signal::SIGINT, TCPDUMP_LIMIT)?;
        let lost = finished
            .stderr
            .lines()
            .find(|line| line.ends_with("dropped by kernel"));
        if !lost.is_some_and(|line| line.starts_with("0 ")) {
            bail!("the capture is not complete: {}", finished.stderr.trim());
        }
        fs::read(&self.file).with_context(|| format!("cannot read {}", self.file.display()))
    }

    fn ends_with(&self, sentinel: &str) -> Result<bool> {
        use std::os::unix::fs::FileExt as _;
        /// Frames may follow the sentinel while the lab is busy.
        const WINDOW_BYTES: u64 = 4 << 20;
        let file = fs::File::open(&self.file)?;
        let length = file.metadata()?.len();
        let start = length.saturating_sub(WINDOW_BYTES);
        let mut window = vec![0; usize::try_from(length - start)?];
        // A file that grows or is being flushed reads short: look again.
        if file.read_exact_at(&mut window, start).is_err() {
            return Ok(false);
        }
        Ok(window
            .windows(sentinel.len())
            .any(|bytes| bytes == sentinel.as_bytes()))
    }
}

fn unique() -> u64 {
    use std::sync::atomic::{AtomicU64, Ordering};
    static COUNT: AtomicU64 = AtomicU64::new(0);
    COUNT.fetch_add(1, Ordering::Relaxed)
}
