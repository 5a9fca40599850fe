"""What a server and its workers know of each other by the run folder: secrets, mode 0600, and the server's address.

exchange/secret.json   made once a run: CURVE keys of the server and of its workers, and a token
exchange/server.json   where the newest start of the server listens

Design choices
- Who can read the secret belongs to the run: rights on the folder are the rights on the server. It stays the same for all
  starts, so that workers meet a server that came back without being told anything.
- The address is replaced whole, and by the newest start alone (``RunFolder.write`` fences it).
"""

from __future__ import annotations

import json
import os
import secrets
import stat
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import zmq
import zmq.utils.z85

from metadist.errors import RunError
from metadist.store import write_first

PLACE = "exchange"


@dataclass(frozen=True)
class Secret:
    """The keys of one run. CURVE keys are Z85 text, the token is hex."""

    run: str
    token: str
    server_public: str
    server_secret: str
    worker_public: str
    worker_secret: str

    @classmethod
    def make(cls, run_dir: Path) -> Secret:
        """The run's secret; made if there is none."""
        path = run_dir / PLACE / "secret.json"
        if not path.exists():
            server, worker = zmq.curve_keypair(), zmq.curve_keypair()
            words = (k.decode() for k in (*server, *worker))
            made = cls(secrets.token_hex(8), secrets.token_hex(32), *words)
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_first(path, json.dumps(asdict(made)).encode(), 0o600)
        return cls.read(run_dir)

    @classmethod
    def read(cls, run_dir: Path) -> Secret:
        """The run's secret. Raises RunError if it is missing, broken, or others may read it."""
        path = run_dir / PLACE / "secret.json"
        try:
            if stat.S_IMODE(path.stat().st_mode) & 0o077:
                raise RunError(f"{path} can be read by others; chmod 600 it, or remove it and start the server anew")
            found = json.loads(path.read_text())
            secret = cls(**{k: str(v) for k, v in found.items()})
            for key in (secret.server_public, secret.server_secret, secret.worker_public, secret.worker_secret):
                if len(zmq.utils.z85.decode(key.encode())) != 32:
                    raise ValueError("a key of another length")
            bytes.fromhex(secret.token)
        except OSError as e:
            raise RunError(f"{path} can't be read ({e.strerror}); the server makes it, for its owner alone") from None
        except (TypeError, ValueError, AttributeError, KeyError):
            raise RunError(f"{path} is broken; remove it and start the server anew") from None
        return secret


@dataclass(frozen=True)
class Serving:
    """How to reach the newest server: server.json. A resumed run may have other settings than when its workers were started.

    incarnation: of the server, 0: none has come up yet; addresses: its own, and its shards' if there are any.
    """

    incarnation: int = 0
    addresses: tuple[str, ...] = ()
    encrypt: bool = True
    beat_s: float = 2.0

    def record(self) -> bytes:
        """The content of server.json."""
        return (json.dumps({**asdict(self), "pid": os.getpid()}, indent=1) + "\n").encode()


def find_server(run_dir: Path) -> Serving:
    """The newest server, as the run folder says."""
    folder = run_dir / PLACE
    try:
        if folder / "server.json" not in folder.iterdir():  # a listing: network file systems cache absence
            return Serving()
        found: dict[str, Any] = json.loads((folder / "server.json").read_text())
        addresses = tuple(str(a) for a in found["addresses"])
        return Serving(int(found["incarnation"]), addresses, bool(found["encrypt"]), float(found["beat_s"]))
    except (OSError, ValueError, KeyError, TypeError):
        return Serving()
