"""The run's surroundings: folder, signals, monitor, cost, and the launcher with real processes and real signals."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from metadist.config import Config, NetConfig
from metadist.errors import RunError, UserError
from metadist.exchange.allreduce import Alone
from metadist.run import local, trainer
from metadist.run.compose import compose
from metadist.run.cost import disk_mb, duration, estimate, megabytes, peak_memory_mb
from metadist.run.environment import cores
from metadist.run.folder import RunFolder, config_from_dict
from metadist.run.monitor import NAMES, Monitor, tag
from metadist.run.signals import Stop, stop_status
from metadist.run.worker import describe, execute, threads

ROOT = Path(__file__).resolve().parents[1]
DEADLINE_S = 60.0  # only reached by a defect


def config(tmp_path: Path, **keys: Any) -> Config:
    return Config(run_dir=str(tmp_path / "run"), **keys)


def until(condition: Callable[[], object], process: subprocess.Popen[str] | None = None) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def start(path: Path, code: str, *arguments: str, **kwargs: Any) -> subprocess.Popen[str]:
    path.write_text(textwrap.dedent(code))
    return subprocess.Popen(
        [sys.executable, str(path), *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


# --- the folder


def test_config_survives_its_record() -> None:
    given = Config(steps=7, net=NetConfig(name="custom", target="a.b.C", kwargs={"width": 3, "deep": {"x": [1, 2]}}), seed=5)
    given.inner.learn_momentum, given.meta.lr_rate = True, 0.25
    assert config_from_dict(json.loads(json.dumps(dataclasses.asdict(given)))) == given
    assert config_from_dict({"inner": {"steps": 3}}).inner.epochs == Config().inner.epochs
    with pytest.raises(UserError, match=r"inner\.stepz"):
        config_from_dict({"inner": {"stepz": 3}})


def test_first_start_leaves_the_whole_record(tmp_path: Path) -> None:
    given = config(tmp_path, steps=5)
    before = copy.deepcopy(given)
    folder = RunFolder.open(given)
    assert given == before and folder.config == given and folder.writes and folder.incarnation == 1
    assert RunFolder.attach(folder.path).config == given
    assert "steps: 5" in (folder.path / "config.yaml").read_text()
    start = json.loads((folder.path / "starts" / "0001.json").read_text())
    assert start["environment"]["torch"] == torch.__version__ and start["environment"]["cores"] == cores()
    assert not RunFolder.attach(folder.path).writes and not RunFolder.attach(folder.path, 1, rank=1).writes
    assert RunFolder.attach(folder.path, 1, rank=0).writes
    with pytest.raises(UserError, match="no run folder"):
        RunFolder.attach(tmp_path)


def test_default_folder_is_named_by_the_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = RunFolder.open(Config())
    assert first.path.parent == tmp_path / "runs" and first.path.name.startswith("dd_random_init-digits-lenet-")
    assert RunFolder.open(Config(workers=2)).path == first.path != RunFolder.open(Config(seed=1)).path


def test_another_identity_is_refused_with_the_difference(tmp_path: Path) -> None:
    RunFolder.open(config(tmp_path)).checkpoints.save(1, {"x": torch.zeros(1)}, {})
    other = config(tmp_path, seed=3)
    other.inner.lr = 0.5
    with pytest.raises(UserError) as caught:
        RunFolder.open(other)
    assert "inner.lr: 0.02 -> 0.5, seed: 0 -> 3" in str(caught.value) and "\n" not in str(caught.value)
    assert RunFolder.attach(tmp_path / "run").config == config(tmp_path)
    assert RunFolder.open(config(tmp_path)).incarnation == 2  # the refused one claimed nothing


def test_a_start_that_came_to_nothing_does_not_keep_the_folder(tmp_path: Path) -> None:
    RunFolder.open(config(tmp_path)).resolve("horizon", lambda: 7)
    second = RunFolder.open(config(tmp_path, seed=3))
    assert RunFolder.attach(tmp_path / "run").config.seed == 3
    assert second.resolve("horizon", lambda: 8) == 8  # what the first one resolved was for another run


def test_circumstance_and_raised_steps_are_rewritten(tmp_path: Path) -> None:
    old = RunFolder.open(config(tmp_path, steps=10))
    new = RunFolder.open(config(tmp_path, steps=20, workers=2, threads=1))
    seen = RunFolder.attach(old.path).config
    assert (seen.steps, seen.workers, seen.threads) == (20, 2, 1) == (new.config.steps, new.config.workers, new.config.threads)
    assert RunFolder.attach(old.path, 1, rank=1).config.steps == 10  # a rank sees its own start's


def test_a_file_in_the_way_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="can't be made"):
        RunFolder.open(config(tmp_path))


def test_resolved_once_and_for_all_starts(tmp_path: Path) -> None:
    first = RunFolder.open(config(tmp_path))
    assert first.resolve("group", lambda: {"size": (8, 2)}) == {"size": [8, 2]}  # as a resumed run will read it
    second = RunFolder.open(config(tmp_path))
    assert second.resolve("group", lambda: pytest.fail("computed again")) == {"size": [8, 2]}
    # A forgotten first process resolves late: the value the second one used stands.
    assert second.resolve("compile", lambda: True) is True
    assert first.resolve("compile", lambda: False) is True
    # A kill between draft and record leaves a draft, which is no value.
    (first.path / "resolved" / ".late.json.host.1.0.tmp").write_text("{")
    assert second.resolved == {"compile": True, "group": {"size": [8, 2]}}


def test_both_write_at_once_and_one_value_stands(tmp_path: Path) -> None:
    first, second = RunFolder.open(config(tmp_path)), RunFolder.open(config(tmp_path))
    assert first.resolve("x", lambda: [second.resolve("x", lambda: 2), 1]) == 2  # both found nothing, the second was faster


def test_other_ranks_wait_for_the_record(tmp_path: Path) -> None:
    given = config(tmp_path)
    given.exchange.timeout_s = 0.2
    RunFolder.open(given)
    rank = RunFolder.attach(tmp_path / "run", 1, rank=1)
    with pytest.raises(RunError, match="rank 0 has not resolved group"):
        rank.resolve("group", lambda: 4)
    RunFolder.attach(tmp_path / "run", 1, rank=0).resolve("group", lambda: 8)
    assert rank.resolve("group", lambda: 4) == 8


def test_an_older_start_is_fenced(tmp_path: Path) -> None:
    old = RunFolder.open(config(tmp_path))
    old.write("a.txt", b"old")
    new = RunFolder.open(config(tmp_path))
    for attempt in (old.fence, lambda: old.write("a.txt", b"x"), lambda: old.write_summary({"steps": 400})):
        with pytest.raises(RunError, match=r"newer start \(2\)"):
            attempt()
    assert (old.path / "a.txt").read_bytes() == b"old" and new.finished is None
    new.fence()
    assert old.checkpoints.path(3) != new.checkpoints.path(3)


def test_a_finished_run_is_only_read(tmp_path: Path) -> None:
    folder = RunFolder.open(config(tmp_path, steps=10))
    assert folder.finished is None
    folder.write_summary({"steps": 10, "accuracy": 80.5})
    again = RunFolder.open(config(tmp_path, steps=4))  # lowered: still the result
    assert again.finished == {"steps": 10, "accuracy": 80.5} and not again.writes
    assert [p.name for p in (folder.path / "incarnations").iterdir()] == ["0001"]
    assert RunFolder.attach(folder.path).config.steps == 10
    with pytest.raises(RuntimeError, match="only rank 0"):
        again.write("a.txt", b"")
    raised = RunFolder.open(config(tmp_path, steps=11))
    assert raised.finished is None and raised.incarnation == 2


def test_newest_step_is_read_from_names(tmp_path: Path) -> None:
    folder = RunFolder.open(config(tmp_path))
    assert folder.newest_step == 0
    for step in (5, 12):
        folder.checkpoints.save(step, {"x": torch.zeros(1)}, {})
    assert RunFolder.open(config(tmp_path)).newest_step == 12


def test_threads_share_the_cores_and_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder.open(config(tmp_path))
    monkeypatch.setattr("metadist.run.worker.cores", lambda: 7)
    assert (threads(folder, 1), threads(folder, 3), threads(folder, 9)) == (7, 2, 1)
    monkeypatch.setattr("metadist.run.worker.cores", lambda: 64)  # resumed on another machine
    assert threads(RunFolder.open(config(tmp_path)), 3) == 2
    assert threads(RunFolder.open(config(tmp_path, threads=5)), 3) == 5


# --- cost


def test_cost_in_words() -> None:
    assert [duration(s) for s in (0.4, 59, 59.6, 200, 7500, 273600)] == ["0s", "59s", "1m00s", "3m20s", "2h05m", "3d04h"]
    assert (megabytes(1.234), megabytes(45600)) == ("1.23 MB", "45.6 GB")
    assert disk_mb(10, 1, keep=3, anchors=2, scalars=10**6, pictures_mb=5) == 10 * 6 + 2 + 60 + 5
    text = estimate(0.5, 7200, 512, 62.8, evaluation_s=1800, workers=2, tasks=8)
    assert text.splitlines() == [
        "this run: 7200 meta-steps x 0.5 s (8 tasks a step, 2 workers) = 1h00m, evaluation 30m00s; in all 1.5 h",
        "peak memory 512 MB a worker, disk 62.8 MB",
    ]
    assert "= 20s; in all less than 0.01 h\n" in estimate(2, 10, 1, 1)


def test_peak_memory_is_in_megabytes() -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("no /proc to compare with")
    kernel = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    assert peak_memory_mb("cpu") == pytest.approx(kernel * 1024 / 1e6, rel=0.1)


# --- the monitor


def events(path: Path) -> EventAccumulator:
    return EventAccumulator(str(path), size_guidance={"scalars": 0, "images": 0}).Reload()


def test_resume_purges_what_the_killed_start_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = Monitor(tmp_path, 0, 30, incarnation=1)
    for step in (0, 10, 20, 25):
        first.log(step, {"meta_loss": float(step), "rate/03": 0.5})
    first._writer.flush()  # killed here: not closed
    time.sleep(1.1)  # TensorBoard reads files in the order of their names, which hold whole seconds
    second = Monitor(tmp_path, 20, 30, incarnation=2)  # the checkpoint of step 20 holds
    second.log(30, {"meta_loss": 99.0})
    second.close()
    second.close()
    first.close()
    seen = events(tmp_path)
    assert [(s.step, s.value) for s in seen.Scalars("learning/meta_loss")] == [(0, 0.0), (10, 10.0), (20, 20.0), (30, 99.0)]
    assert [s.step for s in seen.Scalars("rate/03")] == [0, 10, 20]
    assert len(list(tmp_path.glob("events.out.tfevents.*.0002"))) == 1
    assert "step 30/30  loss 99.000  left 0s" in capsys.readouterr().out


def test_lines_pictures_and_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monitor = Monitor(tmp_path, 100, 400)
    monitor._since -= 20 * 0.75  # as if 20 steps had taken 15 s
    monitor.log(110, {"valid_accuracy": 78.44})  # makes no line, shows in the next
    monitor.log(120, {"meta_loss": 0.5123, "grad_norm": 0.1234, "step_s": 0.714, "skipped": 2.0})
    grid = np.zeros((4, 6, 3), np.uint8)
    grid[1, 2] = (255, 10, 0)
    monitor.image(120, "images", grid)
    monitor.say("hello")
    monitor.close()
    out = capsys.readouterr().out.splitlines()
    assert out == ["step 120/400  loss 0.512  grad 1.2e-1  valid 78.4  0.714 s/step  left 3m30s  skipped 2", "hello"]
    assert (tmp_path / "log.txt").read_text().splitlines() == out
    seen = events(tmp_path)
    (picture,) = seen.Images("images")
    assert (picture.step, picture.height, picture.width) == (120, 4, 6)
    assert seen.Scalars("learning/valid_accuracy")[0].value == pytest.approx(78.44)


def test_every_name_is_defined_and_others_are_refused(tmp_path: Path) -> None:
    needed = """meta_loss grad_norm meta_rate valid_accuracy valid_accuracy_sd step_s compute_s exchange_s data_s tasks_per_s
    peak_memory_mb skipped rollbacks images rate/ momentum/ staleness accepted stale duplicate lost refused
    workers_alive queue_length pull_ms push_ms utilisation/ residual inner_gradient_norm"""
    assert set(NAMES) == set(needed.split()) and all(len(words) > 20 for words in NAMES.values())
    for monitor in (Monitor(None, 0, 10), Monitor(tmp_path, 0, 10)):
        monitor.log(1, {n + "00" * n.endswith("/"): 1.0 for n in NAMES})
        for bad in ("meta_los", "rate", "rate/", "other/01", "meta_loss/1"):
            with pytest.raises(UserError, match=f"logged name={bad} "):
                monitor.log(1, {bad: 1.0})
        monitor.close()
    assert set(events(tmp_path).Tags()["scalars"]) == {tag(n + "00" * n.endswith("/")) for n in NAMES}


def test_other_ranks_stay_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    silent = Monitor(None, 0, 10)
    silent.log(1, {"meta_loss": 1.0})
    silent.say("x")
    silent.advance(2)
    silent.image(1, "images", np.zeros((2, 2, 3), np.uint8))
    silent.close()
    assert capsys.readouterr().out == "" and list(tmp_path.iterdir()) == []


def test_a_terminal_gets_a_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monitor = Monitor(tmp_path, 5, 10)
    monitor.advance(6)
    monitor.log(8, {"meta_loss": 0.25, "valid_accuracy": 50.0})
    monitor.close()
    captured = capsys.readouterr()
    assert captured.out == "" and "8/10" in captured.err and "loss=0.250, valid=50.0" in captured.err
    assert (tmp_path / "log.txt").read_text().startswith("step 8/10  loss 0.250  valid 50.0")


def test_progress_is_published_for_other_programs(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, 10, 40, incarnation=3)
    monitor.log(20, {"meta_loss": 1.0, "valid_accuracy": 62.5})
    found = json.loads((tmp_path / "progress" / "0003.json").read_text())
    assert (found["step"], found["steps"], found["valid_accuracy"]) == (20, 40, 0.625)
    assert found["left_s"] >= 0 and abs(found["time"] - time.time()) < 60
    monitor.log(21, {"meta_loss": 1.0})  # too soon after the last
    monitor.close()
    assert json.loads((tmp_path / "progress" / "0003.json").read_text()) == found


# --- signals


def test_the_first_signal_is_the_request_and_handlers_come_back() -> None:
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)]
    heard: list[int] = []
    with Stop(on_request=heard.append) as stop:
        assert stop.requested is None
        os.kill(os.getpid(), signal.SIGUSR2)
        until(lambda: stop.requested)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # the first Ctrl-C: no more than a request
        until(lambda: stop._interrupts)
    assert stop.requested == "SIGUSR2" and heard == [signal.SIGUSR2]
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)] == before
    assert signal.set_wakeup_fd(-1) == -1
    assert [stop_status(s) for s in ("SIGINT", "SIGTERM", "SIGUSR2")] == [130, 143, 140]


def test_where_nothing_is_to_be_saved_a_request_ends_at_once() -> None:
    heard: list[str] = []
    with Stop(at_once=heard.append) as stop, stop.agreeing():
        os.kill(os.getpid(), signal.SIGUSR2)
        until(lambda: stop.requested)
        assert heard == []  # the loop agrees on its end
    with Stop(at_once=heard.append) as stop:
        with stop.agreeing():
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: heard)
    assert heard == ["SIGTERM"]


def test_a_second_interrupt_leaves_at_once(tmp_path: Path) -> None:
    code = """
        import sys, time, pathlib
        from metadist.run.signals import Stop
        with Stop(on_abort=lambda: print("aborted", flush=True)) as stop:
            print("ready", flush=True)
            while not stop.requested:
                time.sleep(0.01)
            print("one", flush=True)
            time.sleep(100)
    """
    process = start(tmp_path / "sleeper.py", code)
    assert process.stdout is not None
    for word in ("ready", "one"):
        assert process.stdout.readline() == word + "\n"
        process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=DEADLINE_S)[0] == "aborted\n" and process.returncode == 130


def test_a_stop_is_seen_inside_a_collective(tmp_path: Path) -> None:
    code = """
        import pathlib, sys, threading, time
        import torch, torch.distributed as dist
        from metadist.run.signals import Stop
        rank, here = int(sys.argv[1]), pathlib.Path(sys.argv[2])
        dist.init_process_group("gloo", store=dist.FileStore(str(here / "store"), 2), rank=rank, world_size=2)
        total = torch.ones(1)
        with Stop(on_request=lambda s: (here / "seen").touch()) as stop:
            if rank == 1:
                while not (here / "go").exists():
                    time.sleep(0.01)
            else:
                (here / "blocked").touch()
            dist.all_reduce(total)
            print(int(total), stop.requested)
        dist.destroy_process_group()
    """
    ranks = [start(tmp_path / f"rank{r}.py", code, str(r), str(tmp_path)) for r in range(2)]
    until((tmp_path / "blocked").exists, ranks[0])
    ranks[0].send_signal(signal.SIGTERM)
    until((tmp_path / "seen").exists, ranks[0])  # while the other rank keeps the collective open
    (tmp_path / "go").touch()
    assert [r.communicate(timeout=DEADLINE_S)[0] for r in ranks] == ["2 SIGTERM\n", "2 None\n"]


# --- one worker, in this process


def test_outcomes_of_one_worker(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder.open(config(tmp_path, threads=1, steps=9))
    before = torch.get_num_threads()
    seen: list[Any] = []

    def body(folder: RunFolder, rank: int, world: int, store: str | None, stop: Stop) -> dict[str, Any]:
        seen.append((rank, world, store, torch.get_num_threads()))
        return {"steps": 4, "stopped": stop.requested} if stop.requested else {"steps": 9, "text": "accuracy 80"}

    stop = Stop()
    assert execute(folder, 0, 1, None, stop, body) == 0
    stop.request("SIGTERM")
    assert execute(folder, 0, 1, None, stop, body) == 143
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["accuracy 80", "stopped by SIGTERM at step 4 of 9; run the same command again to resume"]
    assert seen == [(0, 1, None, 1)] * 2 and torch.get_num_threads() == before


def test_a_finished_run_prints_its_result_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RunFolder.open(config(tmp_path, steps=3)).write_summary({"steps": 3, "text": "mean 81.2"})
    assert local.run(config(tmp_path, steps=3)) == 0
    assert capsys.readouterr().out == "mean 81.2\n"


def test_mistakes_are_one_line_and_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert local.run(config(tmp_path, workers=3, tasks=2)) == 2
    RunFolder.open(config(tmp_path))
    assert local.run(config(tmp_path, seed=1)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("error: ") for line in lines)
    assert describe(OSError(28, "No space left on device", "/x")) == (
        1,
        "error: /x: No space left on device; mend that and run the same command again to resume",
    )
    assert describe(BrokenPipeError())[0] == 141 and describe(RunError("lost"))[0] == 1
    assert describe(ZeroDivisionError("z"))[1].endswith("ZeroDivisionError: z")


# --- several workers


@pytest.fixture
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_GRACE_S", 0.1)


RANK = """
import os, pathlib, signal, sys, time
here = pathlib.Path(__file__).parent
(here / f"born{os.environ['RANK']}").write_text(str(os.getpid()))
from metadist.errors import RunError, UserError
from metadist.run.worker import leave, main
def body(folder, rank, world, store, stop):
    (here / f"ready{rank}").touch()
@
leave(main(body=body))
"""
LAUNCHER = """
import pathlib, sys
from metadist.config import Config
from metadist.run.folder import RunFolder
from metadist.run.local import launch
here = pathlib.Path(__file__).parent
folder = RunFolder.open(Config(run_dir=str(here / "run"), workers=2, threads=1))
sys.exit(launch(folder, [sys.executable, str(here / "rank.py")]))
"""
UNTIL_STOPPED = """
    while not stop.requested:
        time.sleep(0.01)
    time.sleep(0.3)  # a signal that came twice would end us here
    (here / f"stopped{rank}").touch()
    return {"steps": 3, "stopped": stop.requested}
"""


def write_rank(tmp_path: Path, body: str) -> list[str]:
    code = textwrap.indent(textwrap.dedent(body).strip("\n"), "    ")
    (tmp_path / "rank.py").write_text(RANK.replace("@", code))
    return [sys.executable, str(tmp_path / "rank.py")]


def launch(tmp_path: Path, body: str) -> int:
    command = write_rank(tmp_path, body)
    return local.launch(RunFolder.open(config(tmp_path, workers=2, threads=1)), command)


def launched(tmp_path: Path, body: str, ready: str = "ready") -> subprocess.Popen[str]:
    write_rank(tmp_path, body)
    process = start(tmp_path / "launcher.py", LAUNCHER, start_new_session=True)
    until(lambda: all((tmp_path / f"{ready}{r}").exists() for r in range(2)), process)
    return process


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_ranks_meet_on_loopback(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = """
        import torch
        from torch.distributed import TCPStore
        host, port = store.split(":")
        meeting = TCPStore(host, int(port), is_master=False)
        if rank == 1:
            meeting.set("word", f"{folder.incarnation} {world} {torch.get_num_threads()} {folder.writes}")
            print("from rank 1")
        mine = f" {folder.writes} {os.environ['GLOO_SOCKET_IFNAME']}"
        tables = [p for p in map(pathlib.Path, ("/proc/net/tcp", "/proc/net/tcp6")) if p.exists()]
        rows = [row.split() for table in tables for row in table.read_text().splitlines()[1:]]
        listening = {row[1].split(":")[0] for row in rows if row[3] == "0A" and int(row[1].split(":")[1], 16) == int(port)}
        meeting.set(f"done{rank}", "")
        meeting.wait(["done0", "done1"])
        return {"steps": 9, "text": meeting.get("word").decode() + mine + f" {listening}"}
    """
    assert launch(tmp_path, body) == 0
    out, err = capfd.readouterr()
    assert out == "1 2 1 False True lo {'0100007F'}\n" and err == ""
    assert (tmp_path / "run" / "log-rank1.txt").read_text() == "from rank 1\n"


@pytest.mark.usefixtures("short_grace")
def test_a_ranks_mistake_ends_the_others(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = """
        if rank == 1:
            raise UserError("data.root=x is missing; give a folder")
        time.sleep(100)
    """
    assert launch(tmp_path, body) == 2
    assert capfd.readouterr().err == "error: data.root=x is missing; give a folder\n"
    assert not alive(int((tmp_path / "born0").read_text()))


def test_the_first_fault_is_shown_and_not_what_it_caused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = """
        if rank == 1:
            (here / "failing").touch()
            raise ZeroDivisionError("the cause")
        while not (here / "failing").exists():
            time.sleep(0.01)
        time.sleep(0.3)
        raise RunError("worker 0 lost another worker")
    """
    assert launch(tmp_path, body) == 1
    err = capfd.readouterr().err
    assert err.startswith("Traceback") and err.endswith("ZeroDivisionError: the cause\n") and "lost" not in err
    assert "the cause" in (tmp_path / "run" / "log-rank1.txt").read_text()


def test_a_killed_rank_is_told_with_the_way_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = """
        import torch
        if rank == 0:
            folder.checkpoints.save(7, {"x": torch.zeros(1)}, {})
            (here / "saved").touch()
            time.sleep(0.2)
            raise RunError("worker 0 lost another worker")
        while not (here / "saved").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    with pytest.raises(RunError) as caught:
        launch(tmp_path, body)
    assert str(caught.value) == "worker 1 was killed (signal 9); run the same command again to resume from step 7"
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("short_grace")
def test_a_rank_that_ends_without_a_word(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = """
        if rank == 1:
            print("last words", file=sys.stderr, flush=True)
            os._exit(3)
        time.sleep(100)
    """
    assert launch(tmp_path, body) == 1
    assert capfd.readouterr().err == "last words\n"


def test_one_interrupt_reaches_each_rank_once(tmp_path: Path) -> None:
    process = launched(tmp_path, UNTIL_STOPPED)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the whole group
    out, err = process.communicate(timeout=DEADLINE_S)
    assert out == "stopped by SIGINT at step 3 of 400; run the same command again to resume\n" and err == ""
    assert process.returncode == 130
    assert (tmp_path / "stopped0").exists() and (tmp_path / "stopped1").exists()


def test_a_signal_before_the_ranks_are_ready_is_kept(tmp_path: Path) -> None:
    process = launched(tmp_path, UNTIL_STOPPED, ready="born")  # torch is not imported yet, no handler stands
    process.send_signal(signal.SIGUSR2)
    out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 140 and out.startswith("stopped by SIGUSR2") and err == ""


def test_a_second_interrupt_takes_all_along(tmp_path: Path) -> None:
    process = launched(tmp_path, "(here / f'deaf{rank}').touch()\ntime.sleep(100)", ready="deaf")
    ranks = [int((tmp_path / f"born{r}").read_text()) for r in range(2)]
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None and all(map(alive, ranks))
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=DEADLINE_S) == 130
    until(lambda: not any(map(alive, ranks)))
    process.communicate()


@pytest.mark.slow
def test_ranks_die_with_their_launcher(tmp_path: Path) -> None:
    process = launched(tmp_path, "time.sleep(100)")
    ranks = [int((tmp_path / f"born{r}").read_text()) for r in range(2)]
    assert all(map(alive, ranks))
    process.kill()
    process.wait()
    until(lambda: not any(map(alive, ranks)))
    process.communicate()


def test_without_a_report_a_run_ends_at_its_test_accuracy(tmp_path: Path) -> None:
    words = ["smoke=true", "threads=1", "device=cpu", "engine.compile=off", f"cache_dir={tmp_path / 'cache'}"]
    found = []
    for name, more in (("with", []), ("without", ["eval.report=false"])):
        folder = RunFolder.open(compose([*words, *more, f"run_dir={tmp_path / name}"]))
        found.append(trainer.train(folder.config, folder, Alone(), Stop()))
        assert (folder.path / "report.png").exists() == (name == "with") and (folder.path / "distilled.safetensors").exists()
    full, short = found
    assert short["test"] == full["test"] and short["baselines"] == {} and full["baselines"]
    assert "report.png" in full["text"] and "report.png" not in short["text"]
