"""The engine against the loops of published code: the same work, in one run, on one machine.

    python benchmarks/engine.py                      # every case on the CPU
    python benchmarks/engine.py --device cuda        # GPU sizes, CUDA graphs included
    python benchmarks/engine.py --case lenet --threads 2 --json lenet.json
    python benchmarks/engine.py --quick              # does it run? Figures mean nothing

Design choices
- All ways of a case take turns within one run, after a warm-up each (compilation and capture happen there): a machine that
  slows down slows all of them. Median and range of the turns are printed; a ratio is reference / engine, above 1 is a win.
- Losses are printed beside wins, and how far each way's result lies from the first reference's (float32: two correct
  orders of summation part by 1e-6 after one step and by 1e-2 after 30, at kinks; the tests compare in float64).
- Memory is the peak above what was there before: on a CPU of live tensors (plain execution only), on a GPU the allocator's.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from cases import CASES, Problem, Size, Work, meta_gradient, ours, problem, references

from metadist.metagrad import KINDS, LiveBytes, Optimizer


@dataclass
class Row:
    """One way of doing one case."""

    case: str
    way: str
    median_ms: float
    min_ms: float
    max_ms: float
    peak_mb: float | None
    distance: float
    ratios: dict[str, float]


def timed(work: Work, device: str) -> float:
    """Seconds of one call, the device's queue drained before and after."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(work: Work, device: str) -> int:
    """Peak of live memory in one call, above what was there before it."""
    gc.collect()
    with LiveBytes(device) as live:
        work()
    return live.peak


def compare(p: Problem, evaluation: bool, device: str, quick: bool) -> list[Row]:
    """Every way of one case, in turns."""
    base = references(p, evaluation)
    ways = base | ours(p, evaluation, device, quick)
    results = {name: work() for name, work in ways.items()}
    for work in ways.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(p.size.repeats):
        for name, work in ways.items():
            times[name].append(1e3 * timed(work, device))
    medians = {name: statistics.median(t) for name, t in times.items()}
    first = next(iter(results.values()))[0]
    rows = []
    for name, work in ways.items():
        measurable = device == "cuda" or "compiled" not in name
        mb = peak_bytes(work, device) / 1e6 if measurable else None
        apart = float((results[name][0] - first).norm() / first.norm())
        ratios = {b: medians[b] / medians[name] for b in base} if name not in base else {}
        rows.append(Row(p.title, name, medians[name], min(times[name]), max(times[name]), mb, apart, ratios))
    return rows


def memory(size: Size, device: str) -> list[dict[str, Any]]:
    """Peak against T of the engine and of the plain graph, and growth per step in units of the weights' size."""
    out = []
    for kind in KINDS:
        for way in ("engine", "one graph"):
            peaks, weights = {}, 0
            for steps in (10, 20, 40):
                p = problem(replace(size, optimizer=kind, passes=steps // size.batches), device)
                weights = p.theta0.nbytes
                work = meta_gradient(p) if way == "engine" else references(p, False)["one network after another, one graph"]
                if device == "cuda":
                    work()  # library workspaces are allocated once, at the first call
                peaks[steps] = peak_bytes(work, device)
            growth = (peaks[40] - peaks[10]) / 30 / weights
            states = 1 + Optimizer(kind).buffers
            out.append({"kind": kind, "way": way, "peak_bytes": peaks, "growth_in_weights": growth, "states": states})
    return out


def commit() -> str:
    """The commit this was measured at."""
    try:
        ask = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10"]
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine(device: str) -> dict[str, Any]:
    """What a reader must know to judge the figures."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    versions = {"torch": torch.__version__, "python": platform.python_version(), "commit": commit()}
    return {"cpu": cpu, "threads": torch.get_num_threads(), "gpu": gpu, **versions}


def show(rows: list[Row]) -> None:
    """One case as a table."""
    print(f"\n{rows[0].case}")
    print(f"  {'way':<48}{'median ms':>11}{'range':>19}{'peak MB':>9}{'apart':>9}  times faster than")
    for r in rows:
        mb = "-" if r.peak_mb is None else f"{r.peak_mb:.1f}"
        ratios = "  ".join(f"{v:.2f}x {k.rsplit(', ', 1)[-1]}" for k, v in r.ratios.items())
        span = f"{r.min_ms:.1f}-{r.max_ms:.1f}"
        print(f"  {r.way:<48}{r.median_ms:>11.2f}{span:>19}{mb:>9}{r.distance:>9.0e}  {ratios}")


def show_memory(title: str, rows: list[dict[str, Any]]) -> None:
    """Peak memory against T."""
    print(f"\n{title}")
    print(
        f"  {'optimizer':<12}{'way':<12}{'T=10 MB':>10}{'T=20 MB':>10}{'T=40 MB':>10}  growth per step / weights (states kept)"
    )
    for r in rows:
        peaks = "".join(f"{b / 1e6:>10.2f}" for b in r["peak_bytes"].values())
        print(f"  {r['kind']:<12}{r['way']:<12}{peaks}  {r['growth_in_weights']:.2f} ({r['states']})")


def main() -> None:
    """Run the cases asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: only to see that everything runs")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--case", choices=list(CASES), action="append", help="only this case (may be repeated)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: PyTorch's own choice")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    report: dict[str, Any] = {"machine": machine(args.device), "quick": args.quick, "cases": {}}
    print("  ".join(f"{k}: {v}" for k, v in report["machine"].items() if v is not None))
    for name in args.case or CASES:
        cpu, gpu, quick = CASES[name]
        size = quick if args.quick else gpu if args.device == "cuda" else cpu
        if name == "memory":
            found = memory(size, args.device)
            show_memory(f"peak memory against T, ConvNet-3 width {size.net.width}", found)
            report["cases"][name] = found
        else:
            rows = compare(problem(size, args.device), name == "evaluation", args.device, args.quick)
            show(rows)
            report["cases"][name] = [vars(r) for r in rows]
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
