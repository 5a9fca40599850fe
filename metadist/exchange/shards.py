"""The server's hold on its shards (see ``shard``)."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from dataclasses import asdict
from typing import Any

import torch
import zmq
from torch import Tensor

from metadist.errors import Lost, RunError
from metadist.exchange import wire
from metadist.exchange.keys import Secret
from metadist.exchange.line import Line
from metadist.exchange.wire import Layout

AT_ONCE = 400  # leases named in one message
_START_S = 120.0
_ANSWER_S = 60.0


class Shards:
    """The server's hold on its shards. Use it in one thread.

    addresses: where they listen.
    """

    def __init__(
        self, count: int, ip: str, secret: Secret, encrypt: bool, facts: dict[str, Any], layout: Layout, most: int
    ) -> None:
        """Start them. RunError if one does not come up."""
        self._ip, self._secret, self._encrypt, self._facts, self._layout, self._most = ip, secret, encrypt, facts, layout, most
        self._context: zmq.Context[Any] = zmq.Context()
        self.ranges = layout.ranges(count)
        self._programs: list[subprocess.Popen[str]] = []
        self._lines: list[Line] = []
        self._newest: tuple[int, Tensor] | None = None
        try:
            for number in range(count):
                self._programs.append(self._start(number))
            self.addresses = [self._address(program) for program in self._programs]
            self._lines = [self._line(number) for number in range(count)]
        except BaseException:
            self.close()
            raise

    def _start(self, number: int) -> subprocess.Popen[str]:
        part = self.ranges[number]
        order = {
            "number": number, "ip": self._ip, "secret": asdict(self._secret), "encrypt": self._encrypt, "facts": self._facts,
            "size": part.stop - part.start, "most": self._most,
            "narrow": str(self._layout.wire).removeprefix("torch."), "full": str(self._layout.dtype).removeprefix("torch."),
        }  # fmt: skip
        command = [sys.executable, "-m", "metadist.exchange.shard"]
        program = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )  # not the terminal's to interrupt: it ends with its server
        assert program.stdin is not None
        program.stdin.write(json.dumps(order) + "\n")
        program.stdin.flush()
        return program

    def _address(self, program: subprocess.Popen[str]) -> str:
        assert program.stdout is not None
        if not (line := program.stdout.readline().strip()):
            raise RunError(f"a shard of the server ended with status {program.wait()} before it listened")
        return line

    def _line(self, number: int) -> Line:
        said = {**self._facts, "name": f"server@shard-{number}", "role": "server"}
        longest = self._layout.size * self._layout.dtype.itemsize
        line = Line(self._context, self.addresses[number], self._secret, self._encrypt, said, longest)
        until = time.monotonic() + _START_S
        while not line.open:
            line.hello()
            if line.refused or time.monotonic() > until:
                raise RunError(f"shard {number} does not answer its server {line.refused}")
            line.socket.poll(100)
            for _ in line.messages():
                pass
        return line

    def publish(self, version: int, flat: Tensor) -> None:
        """Give every shard its range of a new version: flat [P] as on the wire, not to be changed any more."""
        self._newest = version, flat
        for line, part in zip(self._lines, self.ranges):
            line.send({"k": "publish", "key": version}, wire.block(flat[part]))

    def drop(self, leases: list[int]) -> None:
        """Nobody will ask for these gradients."""
        for line in self._lines:
            for i in range(0, len(leases), AT_ONCE):
                line.send({"k": "drop", "leases": leases[i : i + AT_ONCE]})

    def sum(self, leases: list[int], weights: list[float]) -> Tensor:
        """The weighted sum [P] of kept gradients, in this order. Raises Lost if a shard has lost one, or is lost itself."""
        for line in self._lines:
            for i in range(0, len(leases), AT_ONCE):
                part = slice(i, i + AT_ONCE)
                line.send({"k": "add", "leases": leases[part], "weights": weights[part]})
            line.send({"k": "collect"})
        return torch.cat([self._collect(number) for number in range(len(self._lines))])

    def _collect(self, number: int) -> Tensor:
        line, part = self._lines[number], self.ranges[number]
        until = time.monotonic() + _ANSWER_S
        while True:
            for header, content in line.messages():
                if header["k"] == "sum":
                    if header["missing"]:
                        raise Lost(f"shard {number} has lost gradients")
                    return wire.values(content or b"", self._layout.dtype, part.stop - part.start)
            if self._programs[number].poll() is not None or time.monotonic() > until:
                raise Lost(f"shard {number} of the server is lost")
            line.socket.poll(50)

    def mend(self) -> list[int]:
        """Start dead shards anew, with the newest version; their numbers. All of them forget what they were asked to sum."""
        dead = [n for n, program in enumerate(self._programs) if program.poll() is not None]
        for number in dead:
            self._lines[number].close()
            for pipe in (self._programs[number].stdin, self._programs[number].stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):  # what was still to be written to it
                        pipe.close()
            self._programs[number] = self._start(number)
            self.addresses[number] = self._address(self._programs[number])
        for number in range(len(self._lines)):
            if number not in dead:
                self._lines[number].close()  # whatever it was still to answer
            self._lines[number] = self._line(number)
            self._lines[number].send({"k": "collect"})
            with contextlib.suppress(Lost):
                self._collect(number)
        if self._newest is not None:
            self.publish(*self._newest)
        return dead

    @property
    def alive(self) -> bool:
        """Whether all are."""
        return all(program.poll() is None for program in self._programs)

    def close(self) -> None:
        """End them."""
        for line in self._lines:
            line.close()
        for program in self._programs:
            if program.stdin is not None:
                program.stdin.close()
        for program in self._programs:
            try:
                program.wait(10)
            except subprocess.TimeoutExpired:
                program.kill()
                program.wait()
            if program.stdout is not None:
                program.stdout.close()
        self._context.term()
