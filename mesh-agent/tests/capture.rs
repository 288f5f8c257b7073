//! Capture in real network namespaces: which connections the kernel gives to the agent, and what the agent's own
//! connections look like. The test plays the proxy. Needs root.

use std::{
    io::Read,
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use mesh_agent::{
    capture::{
        Capture, DialOptions, Enrolled, Listeners,
        kernel::{Kernel, KernelConfig},
    },
    discovery::model::{CaptureSettings, FailureMode},
    sys::netns,
};
use mesh_api::local::Enrolment;
use mesh_tests::{
    lab::{Families, Lab, LabSpec, Node, Pod, PodSpec},
    process::Program,
    wait,
};

const LIMIT: Duration = Duration::from_secs(10);
/// Nothing listens on this port anywhere: whoever gets an answer got it from the test.
const PORT: u16 = 7777;

/// The lab ends every process below its cgroups, and the test has become one of them by playing the agent.
struct Scene(Option<Lab>);

impl std::ops::Deref for Scene {
    type Target = Lab;

    fn deref(&self) -> &Lab {
        self.0.as_ref().expect("there until it is dropped")
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        let root = mesh_tests::cgroup::mount_point().expect("cgroup v2 is mounted");
        std::fs::write(root.join("cgroup.procs"), std::process::id().to_string())
            .expect("back to the root cgroup");
        self.0.take();
    }
}

fn lab(families: Families) -> Result<Scene> {
    netns::remember_home()?;
    let spec = LabSpec::new(families)
        .node(
            "n1",
            [PodSpec::new("web"), PodSpec::new("plain").unmeshed()],
        )
        .node("n2", [PodSpec::new("cart")]);
    Lab::build(spec).map(|lab| Scene(Some(lab)))
}

fn start(node: &Node) -> Result<Capture> {
    let config = KernelConfig {
        cgroup_root: node.cgroup_root.clone(),
        bpffs_root: node.bpffs_root.clone(),
        node: node.name.clone(),
        abi: mesh_ebpf::ABI_VERSION,
        flows_max: mesh_ebpf::FLOWS_MAX,
    };
    Ok(Capture::new(Kernel::start(config)?.0)?)
}

fn enrolment(pod: &Pod) -> Enrolment {
    Enrolment {
        namespace: pod.spec.namespace.clone(),
        name: pod.spec.name.clone(),
        netns: pod.netns.display().to_string(),
        cgroup: Some(pod.cgroup.display().to_string()),
    }
}

/// Runs `capture` code that needs a runtime.
fn block_on<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime.expect("a runtime can be built").block_on(work)
}

fn enrol(capture: &Capture, pod: &Pod, settings: CaptureSettings) -> Result<(Enrolled, Listeners)> {
    block_on(capture.enrol(&enrolment(pod), settings, None)).context("enrol")
}

/// Accepts what is there within the limit.
fn accept(listener: &TcpListener) -> Result<TcpStream> {
    let accepted = wait::until("a captured connection", LIMIT, || match listener.accept() {
        Ok((stream, _)) => Ok(Some(stream)),
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error.into()),
    })?;
    accepted.set_nonblocking(false)?;
    accepted.set_read_timeout(Some(LIMIT))?;
    Ok(accepted)
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

fn first(pod: &Pod, v6: bool) -> IpAddr {
    *pod.addresses
        .iter()
        .find(|a| a.is_ipv6() == v6)
        .expect("the lab has both families")
}

/// A client in Python: `setup` may use `s`, `A` (destination address) and `P` (port), and must connect and send `hi`.
fn client(destination: IpAddr, setup: &str) -> Program {
    let code = format!(
        "import socket\nA='{destination}'\nP={PORT}\n{setup}\ns.settimeout(10)\nprint(s.recv(10))\n"
    );
    Program::new("python3").args(["-c", &code])
}

#[test]
fn every_kind_of_client_socket_is_captured_with_its_destination() -> Result<()> {
    let lab = lab(Families::Dual)?;
    let capture = start(lab.node("n1")?)?;
    let web = lab.pod("web")?;
    let (_enrolled, listeners) = enrol(&capture, web, CaptureSettings::default())?;
    let v4 = "s=socket.socket()\n";
    let v6 = "s=socket.socket(socket.AF_INET6)\n";
    let cases = [
        (
            "plain IPv4",
            false,
            format!("{v4}s.connect((A,P))\ns.send(b'hi')"),
        ),
        (
            "plain IPv6",
            true,
            format!("{v6}s.connect((A,P))\ns.send(b'hi')"),
        ),
        (
            "IPv4-mapped",
            false,
            format!("{v6}s.connect(('::ffff:'+A,P))\ns.send(b'hi')"),
        ),
        (
            "bound source port",
            false,
            format!("{v4}s.bind(('',4321))\ns.connect((A,P))\ns.send(b'hi')"),
        ),
        (
            "bound to a device",
            false,
            format!("{v4}s.setsockopt(1,25,b'eth0')\ns.connect((A,P))\ns.send(b'hi')"),
        ),
        (
            "bound to a device, IPv6",
            true,
            format!("{v6}s.setsockopt(1,25,b'eth0')\ns.connect((A,P))\ns.send(b'hi')"),
        ),
        (
            "MPTCP",
            false,
            "s=socket.socket(2,1,262)\ns.connect((A,P))\ns.send(b'hi')".to_owned(),
        ),
        (
            "TCP Fast Open connect",
            false,
            format!("{v4}s.setsockopt(6,30,1)\ns.connect((A,P))\ns.send(b'hi')"),
        ),
        (
            "TCP Fast Open sendto",
            false,
            format!("{v4}s.sendto(b'hi',0x20000000,(A,P))"),
        ),
        (
            "non-blocking",
            false,
            format!(
                "import select\n{v4}s.setblocking(False)\ns.connect_ex((A,P))\nselect.select([],[s],[])\ns.send(b'hi')"
            ),
        ),
        (
            "own mark kept",
            false,
            format!(
                "{v4}s.setsockopt(1,36,7)\ns.connect((A,P))\nassert s.getsockopt(1,36)&0xff==7\ns.send(b'hi')"
            ),
        ),
    ];
    for (name, is_v6, setup) in cases {
        let destination = first(lab.pod("cart")?, is_v6);
        let program = client(
            destination,
            &format!("{setup}\nassert s.getpeername()[1]==P, s.getpeername()"),
        );
        let running = lab.spawn(web, &program)?;
        let mut stream = accept(&listeners.outbound).with_context(|| name.to_owned())?;
        assert_eq!(
            canonical(stream.local_addr()?),
            SocketAddr::new(destination, PORT),
            "{name}: original destination"
        );
        assert_eq!(
            canonical(stream.peer_addr()?).ip(),
            first(web, is_v6),
            "{name}: source"
        );
        let mut greeting = [0; 2];
        stream
            .read_exact(&mut greeting)
            .with_context(|| name.to_owned())?;
        assert_eq!(&greeting, b"hi", "{name}");
        drop(stream);
        running.wait(LIMIT)?.ok().with_context(|| name.to_owned())?;
    }
    Ok(())
}

#[test]
fn a_connection_of_a_namespace_that_is_not_enrolled_is_left_alone() -> Result<()> {
    let lab = lab(Families::V4)?;
    let capture = start(lab.node("n1")?)?;
    let (_enrolled, listeners) = enrol(&capture, lab.pod("web")?, CaptureSettings::default())?;
    let program = client(
        lab.pod("cart")?.address(),
        "s=socket.socket()\ns.connect((A,P))",
    );
    let finished = lab.run(lab.pod("plain")?, &program, LIMIT)?;
    let error = finished.ok().expect_err("nobody listens there").to_string();
    assert!(error.contains("ConnectionRefusedError"), "{error}");
    let nobody = listeners
        .outbound
        .accept()
        .expect_err("nothing was captured");
    assert_eq!(nobody.kind(), std::io::ErrorKind::WouldBlock);
    Ok(())
}

#[test]
fn foreign_connections_reach_the_inbound_listeners() -> Result<()> {
    let lab = lab(Families::Dual)?;
    let capture = start(lab.node("n1")?)?;
    let web = lab.pod("web")?;
    let (_enrolled, listeners) = enrol(&capture, web, CaptureSettings::default())?;
    let cart = lab.pod("cart")?;
    for is_v6 in [false, true] {
        let family = if is_v6 {
            "socket.AF_INET6"
        } else {
            "socket.AF_INET"
        };
        for (port, listener) in [(PORT, &listeners.plaintext), (15008, &listeners.tunnel)] {
            let target = first(web, is_v6);
            let code = format!(
                "import socket\ns=socket.socket({family})\ns.connect(('{target}',{port}))\ns.settimeout(10)\ns.recv(1)"
            );
            let running = lab.spawn(cart, &Program::new("python3").args(["-c", &code]))?;
            let stream = accept(listener)?;
            assert_eq!(
                canonical(stream.local_addr()?),
                SocketAddr::new(target, port)
            );
            assert_eq!(canonical(stream.peer_addr()?).ip(), first(cart, is_v6));
            drop(stream);
            running.wait(LIMIT)?.ok()?;
        }
    }
    Ok(())
}

#[test]
fn the_agent_reaches_the_application_with_the_clients_address() -> Result<()> {
    let lab = lab(Families::Dual)?;
    let capture = start(lab.node("n1")?)?;
    let web = lab.pod("web")?;
    let (enrolled, _listeners) = enrol(&capture, web, CaptureSettings::default())?;
    for is_v6 in [false, true] {
        let family = if is_v6 {
            "socket.AF_INET6"
        } else {
            "socket.AF_INET"
        };
        let code = format!(
            "import socket\nl=socket.socket({family})\nl.setsockopt(1,2,1)\nl.bind(('',{PORT}))\nl.listen()\nprint('up',flush=True)\nc,a=l.accept()\nc.send(a[0].encode())"
        );
        let mut server = lab.spawn(web, &Program::new("python3").args(["-c", &code]))?;
        server.wait_for_output("up", LIMIT)?;
        let client = first(lab.pod("cart")?, is_v6);
        let target = SocketAddr::new(first(web, is_v6), PORT);
        let seen = block_on(async {
            let options = DialOptions {
                source: Some(client),
                ..DialOptions::default()
            };
            let stream = mesh_agent::capture::dial(&enrolled.local, target, options).await?;
            let mut stream = stream.into_std()?;
            stream.set_nonblocking(false)?;
            stream.set_read_timeout(Some(LIMIT))?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok::<_, anyhow::Error>(text)
        })?;
        assert_eq!(seen, client.to_string(), "the application sees the client");
        server.wait(LIMIT)?.ok()?;
    }
    Ok(())
}

#[test]
fn source_ports_run_out_per_destination_and_no_other_address_takes_their_place() -> Result<()> {
    /// What the kernel may choose from, in the dialling pod.
    const PORTS: (&str, usize) = ("40000 40003", 4);
    let lab = lab(Families::V4)?;
    let capture = start(lab.node("n1")?)?;
    let (web, cart) = (lab.pod("web")?, lab.pod("cart")?);
    let (enrolled, _listeners) = enrol(&capture, web, CaptureSettings::default())?;
    mesh_tests::netns::sysctl(&web.netns, &[("ipv4/ip_local_port_range", PORTS.0)])?;
    let listen = |port| {
        let at = cart.at(port);
        mesh_tests::netns::within(&cart.netns, || TcpListener::bind(at))
    };
    let _listening = [listen(PORT)??, listen(PORT + 1)??];
    block_on(async {
        let dial = async |port| {
            let to = cart.at(port);
            mesh_agent::capture::dial(&enrolled.local, to, DialOptions::default()).await
        };
        let mut open = Vec::new();
        for _ in 0..PORTS.1 {
            open.push(dial(PORT).await?);
        }
        let error = dial(PORT).await.expect_err("all ports are in use");
        assert_eq!(error.kind(), std::io::ErrorKind::AddrNotAvailable);
        // Each of them is free towards another destination.
        open.push(dial(PORT + 1).await?);
        for stream in &open {
            assert_eq!(stream.local_addr()?.ip(), web.address());
        }
        Ok(())
    })
}

#[test]
fn without_an_agent_the_kernel_fails_closed_or_open() -> Result<()> {
    for (failure_mode, expected) in [(FailureMode::Closed, "111"), (FailureMode::Open, "0")] {
        let lab = lab(Families::V4)?;
        let capture = start(lab.node("n1")?)?;
        let web = lab.pod("web")?;
        let settings = CaptureSettings {
            failure_mode,
            ..CaptureSettings::default()
        };
        let (_enrolled, listeners) = enrol(&capture, web, settings)?;
        let cart = lab.pod("cart")?;
        let code = format!(
            "import socket\nl=socket.socket()\nl.bind(('',{PORT}))\nl.listen()\nprint('up',flush=True)\nl.accept()"
        );
        let mut server = lab.spawn(cart, &Program::new("python3").args(["-c", &code]))?;
        server.wait_for_output("up", LIMIT)?;
        // The process is gone, and with it its listeners; programs and maps are pinned.
        drop(listeners);
        let code = format!(
            "import socket\nprint(socket.socket().connect_ex(('{}',{PORT})))",
            cart.address()
        );
        let printed = lab
            .run(web, &Program::new("python3").args(["-c", &code]), LIMIT)?
            .ok()?;
        assert_eq!(printed.trim(), expected, "{failure_mode:?}");
    }
    Ok(())
}

#[test]
fn unenrolment_leaves_the_namespace_as_it_was() -> Result<()> {
    let lab = lab(Families::Dual)?;
    let capture = start(lab.node("n1")?)?;
    let web = lab.pod("web")?;
    let look = || -> Result<String> {
        let script = "ip rule; ip -6 rule; ip route show table all; ip -6 route show table all; cat /proc/sys/net/ipv4/tcp_fwmark_accept /proc/sys/net/ipv*/fwmark_reflect; ss -ltn";
        lab.run(web, &Program::new("sh").args(["-c", script]), LIMIT)?
            .ok()
    };
    let before = look()?;
    let (_enrolled, listeners) = enrol(&capture, web, CaptureSettings::default())?;
    ensure!(
        look()? != before,
        "the enrolment can be seen, else this test sees nothing"
    );
    let released = capture.release("default", "web")?;
    drop(listeners);
    block_on(capture.clean(&released))?;
    assert_eq!(look()?, before);
    assert_eq!(
        std::fs::read_dir(capture.kernel().config().pin_dir())?
            .filter(|entry| {
                entry.as_ref().is_ok_and(|entry| {
                    let name = entry.file_name().to_string_lossy().into_owned();
                    name.contains("lookup-") || name.contains("link-flow-")
                })
            })
            .count(),
        0,
        "no links of the workload are left"
    );
    Ok(())
}

#[test]
fn what_a_pod_takes_apart_is_found_and_put_back_once() -> Result<()> {
    let lab = lab(Families::Dual)?;
    let capture = start(lab.node("n1")?)?;
    let web = lab.pod("web")?;
    let (enrolled, _listeners) = enrol(&capture, web, CaptureSettings::default())?;
    let look = || -> Result<String> {
        let script = "ip rule; ip -6 rule; ip route show table 15001; ip -6 route show table 15001; cat /proc/sys/net/ipv4/tcp_fwmark_accept /proc/sys/net/ipv*/fwmark_reflect";
        lab.run(web, &Program::new("sh").args(["-c", script]), LIMIT)?
            .ok()
    };
    let whole = look()?;
    ensure!(!capture.repair(&enrolled, None)?, "nothing is missing yet");
    for harm in [
        "ip rule del pref 15001",
        "ip -6 rule del pref 15001",
        "ip route flush table 15001",
        "ip -6 route flush table 15001",
    ] {
        lab.run(web, &Program::line(harm), LIMIT)?.ok()?;
        ensure!(look()? != whole, "{harm}: it can be seen");
        ensure!(capture.repair(&enrolled, None)?, "{harm}: not found");
        assert_eq!(look()?, whole, "{harm}");
        ensure!(!capture.repair(&enrolled, None)?, "{harm}: found again");
    }
    mesh_tests::netns::sysctl(&web.netns, &[("ipv4/tcp_fwmark_accept", "0")])?;
    ensure!(capture.repair(&enrolled, None)?, "the sysctl was not found");
    assert_eq!(look()?, whole);
    Ok(())
}

#[test]
fn a_second_agent_takes_over_what_the_first_left() -> Result<()> {
    let lab = lab(Families::V4)?;
    let web = lab.pod("web")?;
    let first_agent = start(lab.node("n1")?)?;
    let (enrolled, listeners) = enrol(&first_agent, web, CaptureSettings::default())?;
    drop(listeners);
    let record = enrolled.record.clone();
    drop((enrolled, first_agent));
    let second_agent = start(lab.node("n1")?)?;
    let (adopted, listeners) =
        block_on(second_agent.enrol(&enrolment(web), CaptureSettings::default(), Some(&record)))?;
    assert_eq!(
        adopted.record.former_sysctls, record.former_sysctls,
        "not what the first agent set"
    );
    let running = lab.spawn(
        web,
        &client(
            lab.pod("cart")?.address(),
            "s=socket.socket()\ns.connect((A,P))\ns.send(b'hi')",
        ),
    )?;
    accept(&listeners.outbound)?;
    running.wait(LIMIT)?;
    Ok(())
}
