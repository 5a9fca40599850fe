"""Trajectory matching: the one-graph loop of published code against ``Inner.unroll``; memory, time, and how well they agree.

    python benchmarks/trajectory.py                              # ipc10: 10 images a class, 30 steps, ConvNet-3 of width 128
    python benchmarks/trajectory.py ipc1 ipc1x8 --width 32       # 1 image a class, 50 steps; one segment, and eight
    python benchmarks/trajectory.py --device cuda                # the same on a GPU, CUDA graphs included
    python benchmarks/trajectory.py --quick --out /tmp/x.json    # does it run? Figures mean nothing

Design choices
- The loop is written as plainly as it is written elsewhere and no slower: ``torch.func.functional_call`` on the module, one
  ``torch.autograd.grad(..., create_graph=True)`` a step, one backward pass through all steps, one segment after another.
- The ways of a case take turns within one run after a warm-up each (compilation happens there); a ratio is one of medians.
  Beside the wall's seconds stand those of this process on all cores: a machine that is busy otherwise blurs these less.
- Memory is measured in a process of its own for each way: the peak of live tensors, and the rise of resident memory above what
  the process held before. A compiled function allocates behind the meter of tensors: there the second counts.
- float32 at full size says little of agreement (two right orders of summation part at ReLU's kinks): that is measured in
  float64 at small width.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from engine import machine, timed
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from metadist import draw
from metadist.config import NetConfig
from metadist.metagrad import Inner, LiveBytes, Optimizer
from metadist.metagrad.execution import Captured, compiler_at_hand
from metadist.nets import Learner, build
from metadist.nets.loss import cross_entropy_loss

CLASSES, PIXELS, CHANNELS = 10, 32, 3
LOOP = "plain loop, one graph"
MEMORY_BAR, TIME_BAR = 1 / 8, 1.3  # of the loop's, at ipc10 on a CPU
Work = Callable[[int], tuple[Tensor, ...]]  # of a number of inner steps


@dataclass(frozen=True)
class Size:
    """images a class, inner steps, segments of a meta-step; ConvNet-3 of this width."""

    ipc: int
    steps: int
    segments: int
    width: int = 128
    pixels: int = PIXELS


CASES = {"ipc10": Size(10, 30, 1), "ipc1": Size(1, 50, 1), "ipc1x8": Size(1, 50, 8)}


@dataclass(frozen=True)
class Problem:
    """theta0, target: [J, P], ends of the expert's segments; x [B, C, H, W], y [B]: all distilled images, each step's batch."""

    size: Size
    learner: Learner
    theta0: Tensor
    target: Tensor
    x: Tensor
    y: Tensor
    rate: Tensor


def problem(size: Size, device: str, dtype: torch.dtype = torch.float32) -> Problem:
    """Drawn numbers: the time of a step does not depend on what the images show."""
    learner = build(NetConfig(name="convnet", width=size.width, init="default"), CHANNELS, size.pixels, CLASSES, dtype, device)
    tasks = torch.arange(size.segments, device=device)
    theta0 = learner.init(draw.key(0, "theta0", 0, tasks))
    target = theta0 + 0.01 * draw.normal(draw.key(0, "target", 0, tasks), (learner.size,), dtype)
    images = draw.normal(draw.key(0, "images").to(device), (size.ipc * CLASSES, CHANNELS, size.pixels, size.pixels), dtype)
    labels = torch.arange(size.ipc * CLASSES, device=device) % CLASSES
    return Problem(size, learner, theta0, target, images, labels, torch.tensor(0.01, dtype=dtype, device=device))


def loop(p: Problem, steps: int) -> tuple[Tensor, ...]:
    """Gradient in images and rate of |theta_N - target|^2 / |theta_0 - target|^2, mean over segments: one autograd graph."""
    module, names, total = p.learner.template, p.learner.names, [torch.zeros_like(p.x), torch.zeros_like(p.rate)]
    for start, target in zip(p.theta0, p.target):
        x, rate = p.x.detach().requires_grad_(), p.rate.detach().requires_grad_()
        weights = {name: part.detach().requires_grad_() for name, part in p.learner.views(start).items()}
        for _ in range(steps):
            loss = cross_entropy(functional_call(module, weights, (x,)), p.y)
            gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            weights = {name: w - rate * g for (name, w), g in zip(weights.items(), gradients)}
        end = torch.cat([weights[name].flatten() for name in names])
        distance = (end - target).square().sum() / (start - target).square().sum()
        for whole, part in zip(total, torch.autograd.grad(distance, (x, rate))):
            whole.add_(part)
    return tuple(t / len(p.theta0) for t in total)


def engine(p: Problem, form: str, compile: bool = False, graph: bool = False, group: int = 0) -> Work:
    """The same by ``Inner.unroll``, ``group`` segments at once (0: all)."""
    optimizer = Optimizer("sgd")
    inner = Inner(cross_entropy_loss(p.learner), optimizer, form, compile)
    y = p.y[None]

    def some(steps: int, theta0: Tensor, target: Tensor, images: Tensor, lr: Tensor) -> tuple[Tensor, ...]:
        order = (0,) * steps
        x, rate = images.detach().requires_grad_(), lr.detach().requires_grad_()
        end = inner.unroll(theta0, (x[None], y), order, optimizer.schedule(rate.expand(len(order))))[0]
        distance = (end - target).square().sum(1) / (theta0 - target).square().sum(1)
        return torch.autograd.grad(distance.sum() / len(p.theta0), (x, rate))

    captured = Captured(functools.partial(some, p.size.steps)) if graph else None
    pieces = list(zip(torch.split(p.theta0, group or len(p.theta0)), torch.split(p.target, group or len(p.theta0))))

    def work(steps: int) -> tuple[Tensor, ...]:
        run: Any = captured or functools.partial(some, steps)
        parts = [run(theta0, target, p.x, p.rate) for theta0, target in pieces]
        return tuple(torch.stack(part).sum(0) for part in zip(*parts))

    return work


def ways(p: Problem, device: str, compiled: bool) -> dict[str, Work]:
    """Every way of a case; those that this machine can't do are left out."""
    found: dict[str, Work] = {LOOP: functools.partial(loop, p)}
    groups = (0,) if len(p.theta0) == 1 else (0, 1)
    for compile in (False, True) if compiled and compiler_at_hand(device) else (False,):
        for graph in (False, True) if device == "cuda" else (False,):
            for form in ("reverse", "forward"):
                for group in groups:
                    words = ("engine", form, *["compiled"] * compile, *["CUDA graph"] * graph, *["one at a time"] * bool(group))
                    found[", ".join(words)] = engine(p, form, compile, graph, group)
    return found


def resident(what: str) -> int:
    """Bytes of resident memory of this process: VmRSS, now, or VmHWM, the most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{what}:")))


def measure(size: Size, way: str, device: str) -> dict[str, Any]:
    """Peak bytes of one way in this process: of live tensors (None if compiled, on a CPU), and of resident memory (CPU)."""
    work, behind = ways(problem(size, device), device, True)[way], "compiled" in way and device == "cpu"
    with contextlib.nullcontext() if behind else LiveBytes(device):
        work(1 if device == "cpu" else size.steps)  # compilation and library workspaces
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before, live = resident("VmRSS"), LiveBytes(device)
    with contextlib.nullcontext() if behind else live:
        work(size.steps)
    rise = resident("VmHWM") - before if device == "cpu" else None
    return {"tensor_bytes": None if behind else live.peak, "resident_bytes": rise}


def memory(case: str, size: Size, way: str, args: argparse.Namespace) -> dict[str, Any]:
    """``measure`` in a process of its own."""
    words = [sys.executable, __file__, case, "--width", str(size.width), "--device", args.device, "--measure", way]
    words += ["--threads", str(args.threads), *["--quick"] * args.quick]
    out = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def seconds(found: dict[str, Work], steps: int, repeats: int, device: str) -> dict[str, list[tuple[float, float]]]:
    """(wall, CPU) seconds of each way, in turns, after a warm-up of one step (a GPU captures whole meta-steps: of all)."""
    for work in found.values():
        work(1 if device == "cpu" else steps)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in found}
    for turn in range(repeats):
        # Every other turn backwards: what a way leaves behind for the next (heat, freed pages) is shared out.
        for name in list(found)[:: 1 if turn % 2 == 0 else -1]:
            began = time.process_time()
            wall = timed(functools.partial(found[name], steps), device)
            times[name].append((wall, time.process_time() - began))
            print(f"    {wall:8.2f} s, {times[name][-1][1]:.2f} s of CPU: {name}", file=sys.stderr, flush=True)
    return times


def agreement(device: str) -> list[dict[str, Any]]:
    """Cosine and relative error of the engine's gradients against the loop's, float64, ConvNet-3 of width 8."""
    out = []
    for size in (Size(2, 30, 1, 8, 16), Size(1, 50, 2, 8, 16)):
        p = problem(size, device, torch.float64)
        wants = loop(p, size.steps)
        for name, work in list(ways(p, device, False).items())[1:]:
            for part, got, want in zip(("images", "rate"), work(size.steps), wants):
                cosine = float((got * want).sum() / (got.norm() * want.norm()))
                error = float((got - want).norm() / want.norm())
                out.append({"steps": size.steps, "way": name, "of": part, "cosine": cosine, "relative_error": error})
    return out


def case(name: str, size: Size, args: argparse.Namespace) -> dict[str, Any]:
    """One case: rows of all ways."""
    p = problem(size, args.device)
    found = {k: w for k, w in ways(p, args.device, not args.plain).items() if k == LOOP or not args.way or k in args.way}
    times = seconds(found, size.steps, args.repeats, args.device)
    medians = {k: [statistics.median(part) for part in zip(*t)] for k, t in times.items()}
    rows = []
    for k, t in times.items():
        (wall, cpu), (loops_wall, loops_cpu) = medians[k], medians[LOOP]
        row = {"way": k, "median_s": wall, "cpu_s": cpu, "time_ratio": wall / loops_wall, "cpu_ratio": cpu / loops_cpu}
        rows.append(row | {"seconds": t} | memory(name, size, k, args))
    base = rows[0]
    for row in rows:
        for key in ("tensor", "resident"):
            given, loops = row[f"{key}_bytes"], base[f"{key}_bytes"]
            row[f"{key}_ratio"] = given / loops if given and loops else None
    return {"size": vars(size), "repeats": args.repeats, "machine": machine(args.device), "rows": rows}


def show(name: str, found: dict[str, Any]) -> None:
    """One case as a table; at 10 images a class, which ways meet both bars."""
    size, columns = (
        found["size"],
        ("median s", "of loop", "CPU s", "of loop", "tensors MB", "of loop", "resident MB", "of loop"),
    )
    print(f"\n{name}: {size['ipc']} images a class, {size['steps']} steps, segments: {size['segments']}, width {size['width']}")
    print(f"  {'way':<44}" + "".join(f"{c:>12}" for c in columns))
    met = []
    for r in found["rows"]:
        cells = [f"{r['median_s']:.3f}", f"{r['time_ratio']:.2f}", f"{r['cpu_s']:.3f}", f"{r['cpu_ratio']:.2f}"]
        for key in ("tensor", "resident"):
            mb, ratio = r[f"{key}_bytes"], r[f"{key}_ratio"]
            cells += ["-" if mb is None else f"{mb / 1e6:.0f}", "-" if ratio is None else f"{ratio:.3f}"]
        print(f"  {r['way']:<44}" + "".join(f"{c:>12}" for c in cells))
        # Tensors are the better measure of memory; the resident one also holds what the allocator keeps back.
        least = r["resident_ratio"] if r["tensor_ratio"] is None else r["tensor_ratio"]
        met += [r["way"]] if least is not None and least <= MEMORY_BAR and r["time_ratio"] <= TIME_BAR else []
    if name == "ipc10" and found["machine"]["gpu"] is None:
        print(f"  memory at most 1/8 and time at most {TIME_BAR} of the loop's: {'; '.join(met) or 'MISSED by all'}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the cases asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="case", help=f"of {', '.join(CASES)}; none: ipc10")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--width", type=int, default=128, help="of the ConvNet")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each way")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--plain", action="store_true", help="leave out what is compiled")
    parser.add_argument("--way", action="append", help="only this way beside the loop (may be repeated)")
    parser.add_argument("--quick", action="store_true", help="tiny: only to see that everything runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"), help="figures are added to this file")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # the process that measures one way's memory
    args = parser.parse_args(argv)
    names = args.cases or ["ipc10"]
    if unknown := set(names) - set(CASES):
        parser.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    torch.set_num_threads(args.threads)
    small = {"steps": 3, "ipc": 1, "pixels": 16} if args.quick else {}
    sizes = {n: replace(CASES[n], width=4 if args.quick else args.width, **small) for n in names}
    if args.measure:
        print(json.dumps(measure(sizes[names[0]], args.measure, args.device)))
        return
    report: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    report["agreement"] = {"machine": machine(args.device), "rows": agreement(args.device)}
    worst = max(report["agreement"]["rows"], key=lambda r: r["relative_error"])
    print(f"float64, width 8: relative error at most {worst['relative_error']:.1e}, cosine {worst['cosine']:.15f}")
    for name, size in sizes.items():
        began = time.monotonic()
        found = case(name, size, args)
        show(name, found)
        key = f"{name}, width {size.width}, {args.device}"
        runs = [*report.get(key, []), found | {"quick": args.quick, "minutes": (time.monotonic() - began) / 60}]
        report[key] = runs
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
