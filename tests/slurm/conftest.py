"""The tests in this folder run on a real SLURM cluster, one for each worker; they are skipped where none can be brought up."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, why_not
from launcher import Launcher


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("slurm")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(reason)
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    with Cluster(tmp_path_factory.mktemp("cluster"), chr(ord("a") + worker)) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def _leave_it_idle(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "cluster" in request.fixturenames:
        request.getfixturevalue("cluster").idle()


@pytest.fixture
def launch(cluster: Cluster, tmp_path: Path) -> Launcher:
    return Launcher(cluster, tmp_path)
