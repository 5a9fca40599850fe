"""Which address and interface the ranks of several machines meet on."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
import struct

from metadist.errors import UserError
from metadist.run.cluster import scheduler

_SIOCGIFADDR = 0x8915


def interfaces() -> dict[str, str]:
    """IPv4 address of every network interface that has one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                packed = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found[name] = socket.inet_ntoa(packed[20:24])
    return found


def hostnames() -> list[str]:
    """The job's nodes; empty outside of a job."""
    from submitit.slurm.slurm import SlurmJobEnvironment

    return list(SlurmJobEnvironment().hostnames) if "SLURM_JOB_NODELIST" in os.environ else []


def own_address(interface: str | None) -> str:
    """The address under which the job's other nodes reach this one; loopback if there are none.

    interface: its name, or null: the one that leads to the other nodes. UserError for a name that is none.
    """
    if interface is not None:
        known = interfaces()
        if interface not in known:
            raise UserError(f"exchange.interface={interface} is no network interface of {socket.gethostname()} with an IPv4 "
                            f"address; allowed there: {', '.join(sorted(known))}")  # fmt: skip
        return known[interface]
    me = {socket.gethostname(), os.environ.get("SLURMD_NODENAME", "")}
    for other in (h for h in hostnames() if h not in me):
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((other, 9))  # sends nothing: asks the routing table
            return str(probe.getsockname()[0])
    return "127.0.0.1"


def server_address(interface: str | None) -> str:
    """The address under which jobs on other nodes reach this one: as the scheduler itself does.

    interface: its name, or null. UserError for a name that is none.
    """
    if interface is not None:
        return own_address(interface)
    known = interfaces()
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    _, text = scheduler.run("scontrol", "show", "node", "-o", node)
    found = re.search(r"\bNodeAddr=(\S+)", text)
    with contextlib.suppress(OSError):
        if found and (address := socket.gethostbyname(found[1])) in known.values():
            return address
    return next((address for name, address in known.items() if not name.startswith("lo")), "127.0.0.1")


def choose_interface(interface: str | None) -> None:
    """Tell gloo (and NCCL, where it is given) which interface to use; what the user's environment says goes first."""
    address = own_address(interface)
    name = interface or next((n for n, a in interfaces().items() if a == address), None)
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    if interface is not None:
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
