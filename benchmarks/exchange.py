"""The two exchanges: what a message costs, what stragglers cost, and from how many workers on which of them pays.

    python benchmarks/exchange.py                        # all sections, JSON and picture beside this file
    python benchmarks/exchange.py wire steps             # only these; the others' results are kept in the JSON
    python benchmarks/exchange.py simulate --link 100    # machines on cards of 100 Gbit/s
    python benchmarks/exchange.py --quick --out /tmp/x   # does it run? Figures mean nothing

wire: pull and push of 0.004 to 40 MB through the real server and worker, beside bare sockets and bare ZeroMQ in the same run.
steps: four workers, equal, with one four times slower, with tasks of random length; all-reduce against the server.
simulate: 8 to 4,096 workers in virtual time, made of what wire measured and checked against steps.

Every figure of speed is a ratio within one run; "others" says how many cores other programs kept busy meanwhile.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import time
from pathlib import Path
from typing import Any

import exchange_simulate
import exchange_steps
import exchange_wire
import zmq
from engine import machine
from exchange_plot import draw

SECTIONS = ("wire", "steps", "simulate")


def about() -> dict[str, Any]:
    """Where and when this was measured."""
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    cores = Path("/proc/cpuinfo").read_text().count("processor\t")
    return machine("cpu") | {"cores": cores, "pyzmq": zmq.__version__, "libzmq": zmq.zmq_version(), "date": date}


def plain(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return None if not math.isfinite(value) else float(f"{value:.6g}")
    return value


def main() -> None:
    """Run the sections asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="section", help=f"of {', '.join(SECTIONS)}; none: all")
    parser.add_argument("--quick", action="store_true", help="tiny: only to see that everything runs")
    parser.add_argument("--link", type=float, default=25.0, help="simulate: each machine's network card, Gbit/s")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(""), help="where .json and .png go")
    args = parser.parse_args()
    wanted = args.sections or list(SECTIONS)
    if unknown := set(wanted) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    file = args.out.with_suffix(".json")
    report: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for name in wanted:
        began = time.monotonic()
        report[name] = {"machine": about(), "quick": args.quick} | section(name, report, args.link, args.quick)
        report[name]["minutes"] = (time.monotonic() - began) / 60
        report = plain(report)
        file.write_text(json.dumps(report) + "\n")
    if "simulate" in wanted:
        draw(report["simulate"], args.out.with_suffix(".png"))


def section(name: str, report: dict[str, Any], link: float, quick: bool) -> dict[str, Any]:
    """Run one; the simulation needs what ``wire`` found, and is checked against ``steps`` if that is there."""
    if name == "wire":
        return exchange_wire.run(quick)
    if name == "steps":
        return exchange_steps.run(quick)
    if "wire" not in report:
        raise SystemExit("simulate is made of what wire measures; run that first")
    return exchange_simulate.run(report["wire"], report.get("steps"), link, quick)


if __name__ == "__main__":
    main()
