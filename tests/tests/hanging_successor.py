"""An agent that asks to take over, lets the running one stop accepting, and then says nothing more.

Usage: hanging_successor.py HANDOVER_SOCKET NODE CGROUP_ROOT BPFFS_ROOT
Prints `paused` once the running agent has stopped accepting.
"""

import json
import socket
import sys
import threading

PATH, NODE, CGROUP_ROOT, BPFFS_ROOT = sys.argv[1:]

s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
s.connect(PATH)
held = []


def say(**message):
    s.send(json.dumps(message).encode())


def hear_until(what):
    while True:
        text, descriptors, _, _ = socket.recv_fds(s, 65536, 192)
        held.extend(descriptors)
        if json.loads(text)["say"] == what:
            return


place = {"node": NODE, "cgroup_root": CGROUP_ROOT, "bpffs_root": BPFFS_ROOT}
say(say="hello", protocol=1, version="0.0.0", place=place)
hear_until("complete")
say(say="commit", drain_deadline_seconds=60)
hear_until("paused")
print("paused", flush=True)
threading.Event().wait()
