"""Everything a pod with NET_RAW and NET_ADMIN in its own namespace may try to get past its node's agent.

Usage: hostile_pod.py OWN TARGET ALLOWED_PORT FORBIDDEN_PORT TRICK...
Prints one line per trick: its name, a space, and how many tries got a byte of the application.
"""

import errno
import os
import random
import socket
import struct
import sys
import time

OWN, TARGET = sys.argv[1], sys.argv[2]
ALLOWED, FORBIDDEN = int(sys.argv[3]), int(sys.argv[4])
CAPTURE_MARK = 0x08000000
SO_MARK, SO_BINDTODEVICE, IP_TRANSPARENT, MSG_FASTOPEN = 36, 25, 19, 0x20000000
TCP_FASTOPEN_CONNECT, TCP_FASTOPEN_NO_COOKIE = 30, 34
IPPROTO_MPTCP = 262
WAIT = 3
SYN, RST, ACK = 2, 4, 16


def dial(prepare=lambda s: None, port=ALLOWED, protocol=0, connect=None):
    """One connection; whether a byte of the application came (it speaks first)."""
    s = socket.socket(socket.AF_INET, socket.SOCK_STREAM, protocol)
    s.settimeout(WAIT)
    try:
        prepare(s)
        (connect or (lambda s: s.connect((TARGET, port))))(s)
        return len(s.recv(64)) > 0
    except OSError:
        return False
    finally:
        s.close()


def plain():
    return int(dial())


def marks():
    """Every single bit, all bits, and the marks of well-known proxies."""
    values = [1 << bit for bit in range(32)] + [0xFFFFFFFF, 0x539, 0x1337, CAPTURE_MARK | 0x539]
    return sum(dial(lambda s: s.setsockopt(socket.SOL_SOCKET, SO_MARK, struct.pack("I", v))) for v in values)


def kinds():
    """Sockets and calls that a hook may forget."""
    device = lambda s: s.setsockopt(socket.SOL_SOCKET, SO_BINDTODEVICE, b"eth0")
    transparent = lambda s: s.setsockopt(socket.SOL_IP, IP_TRANSPARENT, 1)
    fast = lambda s: s.sendto(b"x", MSG_FASTOPEN, (TARGET, ALLOWED))
    return sum([dial(device), dial(transparent), dial(protocol=IPPROTO_MPTCP), dial(connect=fast)])


def checksum(data):
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack("!%dH" % (len(data) // 2), data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def segment(source, sport, dport, seq, ack, flags, payload=b""):
    a, b = socket.inet_aton(source), socket.inet_aton(TARGET)
    tcp = struct.pack("!HHIIBBHHH", sport, dport, seq, ack, 5 << 4, flags, 65535, 0, 0)
    pseudo = a + b + struct.pack("!BBH", 0, 6, len(tcp) + len(payload))
    total = checksum(pseudo + tcp + payload)
    tcp = tcp[:16] + struct.pack("!H", total) + tcp[18:]
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(tcp) + len(payload), 0, 0, 64, 6, 0, a, b)
    return ip + tcp + payload


def handshakes(source, count, mark):
    """TCP by hand: SYN, and for every SYN-ACK an ACK; counts connections on which a byte came."""
    out = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    out.setsockopt(socket.SOL_SOCKET, SO_MARK, struct.pack("I", mark))
    inside = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)
    inside.settimeout(0.5)
    ports = random.sample(range(1024, 32768), count)
    for port in ports:
        out.sendto(segment(source, port, ALLOWED, 1000, 0, SYN), (TARGET, 0))
    got = set()
    until = time.monotonic() + 1
    while time.monotonic() < until:
        try:
            packet = inside.recv(4096)
        except OSError:
            break
        head = (packet[0] & 15) * 4
        sport, dport, seq, ack, offset, flags = struct.unpack("!HHIIBB", packet[head : head + 14])
        if sport != ALLOWED or dport not in ports:
            continue
        if flags & SYN and flags & ACK:
            out.sendto(segment(source, dport, ALLOWED, 1001, (seq + 1) & 0xFFFFFFFF, ACK), (TARGET, 0))
        elif len(packet) > head + (offset >> 4) * 4:
            got.add(dport)
    for port in ports:
        try:
            out.sendto(segment(source, port, ALLOWED, 1001, 0, RST), (TARGET, 0))
        except PermissionError:
            break  # nft drops ours, too
    return len(got)


def raw():
    """As itself, as somebody else, without and with the capture's mark. The kernel's own RSTs are dropped by nft."""
    other = os.environ["FOREIGN"]
    return sum(handshakes(source, 250, mark) for source in (OWN, other) for mark in (0, CAPTURE_MARK))


def second_wind():
    """A socket that was let through to the allowed port and failed before its SYN dials the forbidden one."""
    hits = 0
    for port in range(21000, 21020):
        first, second = socket.socket(), socket.socket()
        for s in (first, second):
            s.settimeout(WAIT)
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            s.bind((OWN, port))
        try:
            first.connect((TARGET, ALLOWED))
        except OSError as error:
            sys.exit("the first connection failed: %s" % error)
        try:
            second.connect((TARGET, ALLOWED))
            sys.exit("two connections had one tuple")
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                sys.exit("the second connection failed otherwise: %s" % error)
        try:
            second.connect((TARGET, FORBIDDEN))
            hits += len(second.recv(64)) > 0
        except OSError:
            pass
        first.close()
        second.close()
    return hits


def late_word():
    """A connection whose SYN waits for the first byte (TCP Fast Open), sent when the test says so."""
    s = socket.socket()
    s.settimeout(WAIT)
    s.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)
    s.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_NO_COOKIE, 1)
    try:
        s.connect((TARGET, ALLOWED))
        print("connected", flush=True)
        sys.stdin.readline()
        s.send(b"x")
        return int(len(s.recv(64)) > 0)
    except OSError:
        return 0
    finally:
        s.close()


for trick in sys.argv[5:]:
    print(trick, globals()[trick](), flush=True)
