"""A real SLURM cluster on one machine, for tests: Debian's slurmctld, munged and slurmd, and slurmdbd with a private MariaDB.

All processes live below one pid namespace whose pid 1, the guard, reads a pipe that the test process holds: when the pipe ends
the kernel takes everything with it. A node is a set of namespaces (net, pid, mount, uts, ipc) within, on a bridge of its own.
No pid is written down: processes are found again by the guard's arguments, from any process, so nothing can be stale.

    eval "$(python tests/slurm/cluster.py up)"; srun -N4 hostname; python tests/slurm/cluster.py down
"""

import argparse
import os
import re
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self, TypeVar, final

from machine import NAMESPACES, child, find, why_not

T = TypeVar("T")
ETC = Path(__file__).resolve().with_name("etc")
STATE = ("state", "spool", "mysql", "dev")  # what a later cluster in this place must not find

# pid 1 of all: $1 what it waits for, $2 place, $3 bridge; its end is the end of every process in it
GUARD = f"""$1 > /dev/null; kill -9 -1; ip link del "$3"; cd "$2" && rm -rf {" ".join(STATE)}"""
SLEEP = "while :; do sleep 3600; done"  # pid 1 of a node: bash reaps what is orphaned


@final
class Cluster:
    """A SLURM cluster; `name`, a letter, sets its bridge, subnet and ports, so that clusters can run side by side."""

    def __init__(
        self,
        place: Path,
        name: str = "a",
        nodes: int = 4,
        cpus: int = 4,
        gpus: int = 2,
        accounting: bool = True,
        user_signal: bool = True,
    ) -> None:
        """Plan a cluster that keeps everything in `place`."""
        if not re.fullmatch("[a-z]", name):
            raise ValueError(f"the name of a cluster is a letter from a to z, not {name!r}")
        self.place, self.name, self.cpus, self.gpus = place.resolve(), name, cpus, gpus
        self.accounting, self.user_signal = accounting, user_signal
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        index = ord(name) - ord("a")
        self.bridge, self.net, self.port = f"mdsl-{name}", f"198.18.{60 + index}", 270 + index  # port: all but two digits
        self._guardian: subprocess.Popen[bytes] | None = None
        self._hidden: set[tuple[str, str]] = set()

    def __enter__(self) -> Self:
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    def environ(self) -> dict[str, str]:
        """The environment in which SLURM's commands speak to this cluster."""
        return {**os.environ, "SLURM_CONF": f"{self.place}/slurm.conf"}

    def up(self, tied: bool = True) -> None:
        """Start everything, after cleaning up, and wait until all nodes are idle; if `tied`, it ends with this process."""
        self.down()
        self.wait_until(lambda: find("unshare", self.bridge) is None, 5, f"the end of another cluster {self.name}")
        try:
            self._write()
            self._start(tied)
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """Stop every process, remove links and state; the logs stay. Right at any time, in any state, and twice."""
        if guard := self._guard():
            os.kill(child(guard, "bash") or guard, signal.SIGKILL)
        if self._guardian is not None:
            self._guardian.communicate(timeout=30)  # closes the pipe
            self._guardian = None
        self.wait_until(lambda: self._guard() is None, 30)
        if find("unshare", self.bridge) is None:  # else the links belong to a cluster elsewhere
            self.wait_until(self._no_links, 10)
        self._hidden.clear()
        for name in STATE:
            shutil.rmtree(self.place / name, ignore_errors=True)

    def _no_links(self) -> bool:
        links = list(Path("/sys/class/net").glob(f"{self.bridge}*"))
        for link in links:
            self._run("ip", "link", "del", link.name, check=False)
        return not links

    def _write(self) -> None:
        for name in ("log", "run", "state", "dev", *(f"spool/{node}" for node in self.nodes)):
            (self.place / name).mkdir(parents=True, exist_ok=True)
        host = socket.gethostname().split(".")[0]
        known = {"place": self.place, "name": self.name, "net": self.net, "port": self.port, "host": host}
        known["first_job"] = (int(time.time()) + 100_003 * ord(self.name)) % 10_000_000 + 1000
        texts = {file.name: file.read_text().format(**known) for file in ETC.glob("*.conf")}
        conf = texts["slurm.conf"] + texts.pop("accounting.conf") * self.accounting
        conf += "SlurmctldParameters=preempt_send_user_signal\n" * self.user_signal
        gres = f"Gres=gpu:{self.gpus}" if self.gpus else ""
        for node in self.nodes:
            conf += f"NodeName={node} NodeAddr={self._address(node)} CPUs={self.cpus} RealMemory=16000 {gres} State=UNKNOWN\n"
        devices = [self.place / f"dev/fakegpu{number}" for number in range(self.gpus)]
        for device in devices:  # with a plain file in its place jobs would get no CUDA_VISIBLE_DEVICES
            os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        hosts = re.sub(rf"(?m)^.*\b(n\d+|{host})\b.*\n?", "", Path("/etc/hosts").read_text())
        texts |= {
            "slurm.conf": conf,
            "gres.conf": "".join(f"Name=gpu File={device}\n" for device in devices),
            "hosts": f"{hosts}\n{self.net}.1 {host} login\n" + "".join(f"{self._address(n)} {n}\n" for n in self.nodes),
            "nsswitch.conf": re.sub(r"(?m)^hosts:.*", "", Path("/etc/nsswitch.conf").read_text()) + "\nhosts: files\n",
            "resolv.conf": "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n",
            "munge.key": secrets.token_hex(512),
        }
        for name, text in texts.items():
            (self.place / name).write_text(text)
            (self.place / name).chmod(0o600 if name in ("slurmdbd.conf", "munge.key") else 0o644)

    def _start(self, tied: bool) -> None:
        waits = "cat" if tied else "sleep infinity"
        guard = ["unshare", "--pid", "--mount", "--fork", "--mount-proc", "--kill-child", "bash", "-c", GUARD, "guard", waits]
        guard += [str(self.place), self.bridge]
        with (self.place / "log/guard.log").open("a") as log:
            self._guardian = subprocess.Popen(guard, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True)
        self.wait_until(lambda: child(self._guard(), "bash"), 10, "the guard")
        bridge = "ip link add $0 type bridge; ip addr add $1 dev $0; ip link set $0 up"
        self._run("bash", "-ec", bridge, self.bridge, f"{self.net}.1/24")
        options = {"key-file": "munge.key", "socket": "munge.sock", "seed-file": "munge.seed"}
        options |= {"pid-file": "run/munged.pid", "log-file": "log/munged.log"}
        self._inside("munged", "--force", "--num-threads=4", *(f"--{key}={self.place}/{to}" for key, to in options.items()))
        if self.accounting:
            self._start_database()
        self.start_controller()
        for node in self.nodes:
            self.boot(node)
        self.wait_until(self._all_idle, 30, "idle nodes")

    def _start_database(self) -> None:
        data = f"--datadir={self.place}/mysql"
        self._run("mariadb-install-db", "--no-defaults", "--user=root", data, "--skip-test-db", log="mariadb-install.log")
        options = f"--skip-grant-tables --skip-log-bin --bind-address=127.0.0.1 --skip-networking=0 --port={self.port}30"
        options += " --innodb-buffer-pool-size=64M --innodb-flush-log-at-trx-commit=0 --innodb-lock-wait-timeout=900"
        files = (data, f"--socket={self.place}/mysql.sock", f"--pid-file={self.place}/run/mariadbd.pid")
        server = ("mariadbd", "--no-defaults", "--user=root", *options.split(), *files)
        self._inside("setsid", "-f", *server, log="mariadbd.log")
        self.wait_until(lambda: self._answers(30), 30, "mariadbd")
        self._inside("slurmdbd")
        self.wait_until(lambda: self._answers(19), 30, "slurmdbd")
        self.wait_until(lambda: self._succeeds("sacctmgr", "-n", "show", "cluster"), 30, "slurmdbd's answer")

    def _answers(self, last_digits: int) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port * 100 + last_digits)) == 0

    def stop_controller(self) -> None:
        """End slurmctld by SIGTERM, so that it writes its state; jobs run on."""
        if (pid := child(self._init(), "slurmctld")) is not None:
            os.kill(pid, signal.SIGTERM)
            self.wait_until(lambda: child(self._init(), "slurmctld") is None, 20, "slurmctld's end")

    def start_controller(self) -> None:
        """Start slurmctld and wait until it answers."""
        self._inside("slurmctld")
        self.wait_until(lambda: self._succeeds("scontrol", "ping"), 20, "slurmctld")

    def boot(self, node: str) -> None:
        """Switch a node on; if only its slurmd is gone, start that again."""
        if self._node(node) is None:
            self._inside("setsid", "-f", "unshare", *NAMESPACES, "bash", "-c", SLEEP, self.bridge, node, log=f"node.{node}.log")
            pid = self.wait_until(lambda: self._node(node), 10, f"node {node}")
            self._run("ip", "link", "add", self._link(node), "type", "veth", "peer", "name", "eth0", "netns", str(pid))
            self._run("ip", "link", "set", self._link(node), "master", self.bridge, "up")
            self.execute(node, "bash", str(ETC / "node.sh"), node, self._address(node), f"{self.net}.1", str(self.place))
        (self.place / f"run/slurmd.{node}.pid").unlink(missing_ok=True)
        self.execute(node, "slurmd", "-N", node)

    def crash(self, node: str) -> None:
        """Cut a node's power. The cable goes first: its peers must see silence, not the resets of dying sockets."""
        self._run("ip", "link", "del", self._link(node), check=False)
        if (pid := self._node(node)) is not None:
            os.kill(pid, signal.SIGKILL)
            self.wait_until(lambda: child(self._init(), "unshare", self.bridge, node) is None, 10, f"the end of {node}")
        self._hidden = {(where, path) for where, path in self._hidden if where != node}

    def kill_procs(self, node: str) -> None:
        """SIGKILL every process of a node; the machine and its network stay, so that peers get resets at once."""
        self.execute(node, "bash", "-c", "kill -9 -1 || true")

    def kill_slurmd(self, node: str) -> None:
        """SIGKILL a node's slurmd alone; its steps go on."""
        if (pid := child(self._node(node), "slurmd")) is not None:
            os.kill(pid, signal.SIGKILL)

    def cut(self, node: str) -> None:
        """Unplug a node's network cable."""
        self._run("ip", "link", "set", self._link(node), "down")

    def heal(self, node: str) -> None:
        """Plug it in again."""
        self._run("ip", "link", "set", self._link(node), "up")

    def hide(self, node: str, path: Path) -> None:
        """Let a node, its jobs included, see an empty folder in the place of `path`."""
        self.execute(node, "mount", "-t", "tmpfs", "tmpfs", str(path))
        self._hidden.add((node, str(path)))

    def unhide(self, node: str, path: Path) -> None:
        """Undo `hide`."""
        self.execute(node, "umount", "--lazy", str(path))
        self._hidden.discard((node, str(path)))

    def execute(self, node: str, *command: str) -> str:
        """Run a command in a node's namespaces, in its root folder; what it printed, or an error if it fails."""
        if (pid := self._node(node)) is None:
            raise RuntimeError(f"{node} is down")
        return self._run("nsenter", f"--target={pid}", "--net", "--pid", "--mount", "--uts", "--ipc", "--", *command)

    def job(self, job_id: int | str) -> dict[str, str]:
        """What `scontrol show job` says, or nothing if it doesn't know the job."""
        text = self._run("scontrol", "show", "job", "-o", str(job_id), check=False)
        return dict(re.findall(r"(\S+?)=(.*?)(?=\s+[\w:/]+=|\s*$)", text))

    def wait_until(self, predicate: Callable[[], T], seconds: float, what: str = "it") -> T:
        """Wait until `predicate` holds and return what it says; TimeoutError after so many seconds."""
        end = time.monotonic() + seconds
        while not (value := predicate()):
            if time.monotonic() > end:
                raise TimeoutError(f"waited {seconds:g} s in vain for {what}; see {self.place}/log")
            time.sleep(0.05)
        return value

    def idle(self, seconds: float = 60) -> None:
        """Repair what is broken, cancel what is queued, and wait until all nodes are idle."""
        if child(self._init(), "slurmctld") is None:
            self.start_controller()
        for node, path in list(self._hidden):
            self.unhide(node, Path(path))
        for node in self.nodes:
            if child(self._node(node), "slurmd") is None:
                self.boot(node)
            self.heal(node)
        self.wait_until(self._nothing_left, seconds, "idle nodes")

    def _nothing_left(self) -> bool:
        if jobs := self._run("squeue", "-h", "-o", "%A", check=False).split():
            steps = re.findall(r"\S+\.\d+", self._run("squeue", "-h", "--steps", "-o", "%i", check=False))
            # a mere scancel takes KillWait where TERM is ignored
            for whom in (["-s", "KILL", *steps], ["-s", "KILL", "--batch", *jobs], jobs):
                self._run("scancel", *whom, check=False)
            return False
        for node, state in self.states().items():
            if "drain" in state:  # what could not be killed in time
                self._run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
        return self._all_idle()

    def states(self) -> dict[str, str]:
        """Each node's state in sinfo's words; with a star: it doesn't answer."""
        lines = self._run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T", check=False).splitlines()
        return dict(line.split() for line in lines)

    def _all_idle(self) -> bool:
        return self.states() == dict.fromkeys(self.nodes, "idle")

    def _guard(self) -> int | None:
        return find("unshare", str(self.place), self.bridge)

    def _init(self) -> int:
        if (guard := self._guard()) is None or (pid := child(guard, "bash")) is None:
            raise RuntimeError(f"the cluster at {self.place} is down")
        return pid

    def _node(self, node: str) -> int | None:
        return child(child(self._init(), "unshare", self.bridge, node), "bash")

    def _address(self, node: str) -> str:
        return f"{self.net}.{10 + int(node[1:])}"

    def _link(self, node: str) -> str:
        return f"{self.bridge}-{node}"

    def _inside(self, *command: str, log: str | None = None) -> None:
        self._run("nsenter", f"--target={self._init()}", "--pid", "--mount", "--", *command, log=log)

    def _succeeds(self, *command: str) -> bool:
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, env=self.environ()).returncode == 0

    def _run(self, *command: str, check: bool = True, log: str | None = None) -> str:
        with (self.place / "log" / log if log else Path(os.devnull)).open("a") as file:
            out = file if log else subprocess.PIPE
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, text=True, env=self.environ())
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr or done.stdout or self.place / 'log'}")
        return done.stdout or ""


def main() -> None:
    """By hand: a cluster that stays up until it is taken down."""
    parser = argparse.ArgumentParser(description="A real SLURM cluster on this machine.")
    parser.add_argument("action", choices=["up", "down", "crash", "kill_procs", "kill_slurmd", "boot", "cut", "heal"])
    parser.add_argument("node", nargs="?", help="for all but up and down")
    parser.add_argument("--name", default="a", help="a letter; clusters with different ones can run side by side")
    parser.add_argument("--dir", type=Path, help="where it keeps everything")
    parser.add_argument("--no-accounting", action="store_true", help="without slurmdbd: sacct is disabled")
    given = parser.parse_args()
    if reason := why_not(not given.no_accounting):
        raise SystemExit(reason)
    place = given.dir or Path(tempfile.gettempdir()) / f"metadist-slurm-{given.name}"
    cluster = Cluster(place, given.name, accounting=not given.no_accounting)
    if given.action == "up":
        cluster.up(tied=False)
        print(f"export SLURM_CONF={cluster.place}/slurm.conf")
    else:
        getattr(cluster, given.action)(*[given.node] * (given.node is not None))


if __name__ == "__main__":
    main()
