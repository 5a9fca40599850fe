"""A comparison of networks on a real cluster: a wave that fails ends those behind it, and the same command goes on."""

from __future__ import annotations

import json
import re
import subprocess

from cluster import Cluster
from launcher import Launcher

WORDS = ["preset=early_stop", "smoke=true", "data=digits", "data.size=8", "threads=1", "device=cpu", "engine.compile=off"]
WORDS += ["cluster=slurm", "check_mount=false", "out=out"]


def test_waves_wait_end_with_the_one_before_and_go_on(launch: Launcher, cluster: Cluster) -> None:
    def sent() -> list[str]:
        return re.findall(r"submitted array (\d+)", launch(*WORDS, program="compare").stdout)

    busy = ["sbatch", "--parsable", f"-N{len(cluster.nodes)}", "--exclusive", "--wrap", "sleep 120"]
    filler = subprocess.run(busy, env=cluster.environ(), cwd=launch.place, check=True, capture_output=True, text=True).stdout
    first = sent()
    assert len(first) == 2 and cluster.job(first[1])["Dependency"].startswith("afterok:")
    subprocess.run(["scancel", f"{first[0]}_0"], env=cluster.environ(), check=True)
    subprocess.run(["scancel", filler.strip()], env=cluster.environ(), check=True)
    launch.until(lambda: launch.state(first[1]) in ("CANCELLED", ""), 90, "the end of the wave that waits in vain")
    assert launch.ended(f"{first[0]}_1", 120) == "COMPLETED", launch.logs(launch.place / "out" / "alone")

    second = sent()
    assert len(second) == 2
    for number in range(7):
        assert launch.ended(f"{second[1]}_{number}", 240) == "COMPLETED", logs(launch)
    done = launch(*WORDS, program="compare")
    assert "submitted" not in done.stdout and "Early stopping" in done.stdout
    rows = json.loads((launch.place / "out" / "comparison.json").read_text())["rows"]
    assert len(rows) == 9 and all(row["steps"] == 10 and len(row["errors"]) == 2 for row in rows)


def logs(launch: Launcher) -> str:
    return "\n".join(launch.logs(path.parent) for path in (launch.place / "out").glob("*/cluster"))
