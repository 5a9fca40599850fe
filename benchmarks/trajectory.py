"""Trajectory matching: the one-graph loop of published code against ``Inner.unroll``; memory, time, and how well they agree.

    python benchmarks/trajectory.py                              # ipc10: 10 images a class, 30 steps, ConvNet-3 of width 128
    python benchmarks/trajectory.py ipc1 ipc1x8 --width 32       # 1 image a class, 50 steps; one segment, and eight
    python benchmarks/trajectory.py --device cuda                # the same on a GPU, CUDA graphs included
    python benchmarks/trajectory.py --quick --out x.json    # does it run? Figures mean nothing

Design choices
- The loop is written as plainly as it is written elsewhere and no slower: ``torch.func.functional_call`` on the module, one
  ``torch.autograd.grad(..., create_graph=True)`` a step, one backward pass through all steps, one segment after another.
- The ways of a case take turns within one run after a warm-up each (compilation happens there); a ratio is one of medians.
  Beside the wall's seconds stand those of this process on all cores: a machine that is busy otherwise blurs these less.
- Memory is the peak of live tensors; --resident adds the rise of resident memory, each way in a process of its own. Compiled
  code on a CPU allocates behind the meter of tensors: the uncompiled way's figure is an upper bound for it.
- float32 at full size says little of agreement (two right orders of summation part at ReLU's kinks): that is measured in
  float64 at small width.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from engine import machine, timed
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from trajectory_cases import CASES, LOOP, Problem, Size, Work, loop, problem, ways

from metadist.metagrad import LiveBytes

MEMORY_BAR, TIME_BAR = 1 / 8, 1.3  # of the loop's, at ipc10 on a CPU


def resident(what: str) -> int:
    """Bytes of resident memory of this process: VmRSS, now, or VmHWM, the most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{what}:")))


def tensors(p: Problem, way: str, device: str) -> int:
    """Peak bytes of live tensors; what is compiled allocates behind the meter on a CPU: there the plain way's.

    On a CPU tensors without memory go through the same operations: the same count (``--quick`` compares) in seconds, even where
    the loop would not fit.
    """
    if device == "cuda":
        work = ways(p, device, True)[way]
        work(p.size.steps)  # library workspaces are allocated once
        return peak(work, p.size.steps, device)
    way = way.replace(", compiled", "")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        given = {k: mode.from_tensor(v) for k, v in vars(p).items() if isinstance(v, Tensor)}
        return peak(ways(replace(p, **given), device, False)[way], p.size.steps, device)


def peak(work: Work, steps: int, device: str) -> int:
    """Peak bytes of live tensors, above what was there before."""
    gc.collect()
    with LiveBytes(device) as live:
        work(steps)
    return live.peak


def rise(size: Size, way: str) -> int:
    """How far resident memory rises above what this process holds when it begins; compilation is over by then."""
    work = ways(problem(size, "cpu"), "cpu", True)[way]
    work(1)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident("VmRSS")
    work(size.steps)
    return resident("VmHWM") - before


def memory(case: str, way: str, args: argparse.Namespace) -> int:
    """``rise`` in a process of its own."""
    words = [sys.executable, __file__, case, "--width", str(args.width), "--steps", str(args.steps), "--measure", way]
    words += ["--threads", str(args.threads), *["--quick"] * args.quick]
    return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


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
    # Without memory the count of all steps takes seconds, whatever --steps the clock is given.
    whole = p if args.quick or args.device == "cuda" else replace(p, size=replace(size, steps=CASES[name].steps))
    times = seconds(found, size.steps, args.repeats, args.device)
    medians = {k: [statistics.median(part) for part in zip(*t)] for k, t in times.items()}
    rows = []
    for k, t in times.items():
        (wall, cpu), (loops_wall, loops_cpu) = medians[k], medians[LOOP]
        row = {"way": k, "median_s": wall, "cpu_s": cpu, "time_ratio": wall / loops_wall, "cpu_ratio": cpu / loops_cpu}
        row |= {"seconds": t, "tensor_bytes": tensors(whole, k, args.device)}
        rows.append(row | {"resident_bytes": memory(name, k, args) if args.resident else None})
        if args.quick and args.device == "cpu" and "compiled" not in k:
            assert row["tensor_bytes"] == peak(found[k], size.steps, "cpu"), "tensors without memory are counted otherwise"
    base = rows[0]
    for row in rows:
        for key in ("tensor", "resident"):
            given, loops = row[f"{key}_bytes"], base[f"{key}_bytes"]
            row[f"{key}_ratio"] = given / loops if given and loops else None
    return {
        "size": vars(size),
        "counted_steps": whole.size.steps,
        "repeats": args.repeats,
        "machine": machine(args.device),
        "rows": rows,
    }


def show(name: str, found: dict[str, Any]) -> None:
    """One case as a table; at 10 images a class, which ways meet both bars."""
    size, columns = (
        found["size"],
        ("median s", "of loop", "CPU s", "of loop", "tensors MB", "of loop", "resident MB", "of loop"),
    )
    steps = f"{size['steps']} steps timed, tensors of {found['counted_steps']}"
    print(f"\n{name}: {size['ipc']} images a class, {steps}, segments: {size['segments']}, width {size['width']}")
    print(f"  {'way':<44}" + "".join(f"{c:>12}" for c in columns))
    met = []
    for r in found["rows"]:
        cells = [f"{r['median_s']:.3f}", f"{r['time_ratio']:.2f}", f"{r['cpu_s']:.3f}", f"{r['cpu_ratio']:.2f}"]
        for key in ("tensor", "resident"):
            mb, ratio = r[f"{key}_bytes"], r[f"{key}_ratio"]
            cells += ["-" if mb is None else f"{mb / 1e6:.0f}", "-" if ratio is None else f"{ratio:.3f}"]
        print(f"  {r['way']:<44}" + "".join(f"{c:>12}" for c in cells))
        met += [r["way"]] if r["tensor_ratio"] <= MEMORY_BAR and r["time_ratio"] <= TIME_BAR else []
    if name == "ipc10" and found["machine"]["gpu"] is None:
        print(f"  memory at most 1/8 and time at most {TIME_BAR} of the loop's: {'; '.join(met) or 'MISSED by all'}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the cases asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="case", help=f"of {', '.join(CASES)}; none: ipc10")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--width", type=int, default=128, help="of the ConvNet")
    parser.add_argument("--steps", type=int, default=0, help="inner steps that are timed; 0: all of the case's")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each way")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--plain", action="store_true", help="leave out what is compiled")
    parser.add_argument("--way", action="append", help="only this way beside the loop (may be repeated)")
    parser.add_argument("--resident", action="store_true", help="measure resident memory too, on a CPU (the loop's is 12 GB)")
    parser.add_argument("--quick", action="store_true", help="tiny: only to see that everything runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"), help="figures are added to this file")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # the process that measures one way's memory
    args = parser.parse_args(argv)
    names = args.cases or ["ipc10"]
    if unknown := set(names) - set(CASES):
        parser.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    torch.set_num_threads(args.threads)
    small = {"steps": 3, "ipc": 1, "pixels": 16} if args.quick else {"steps": args.steps} if args.steps else {}
    sizes = {n: replace(CASES[n], width=4 if args.quick else args.width, **small) for n in names}
    if args.measure:
        print(rise(sizes[names[0]], args.measure))
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
