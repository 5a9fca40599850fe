"""From a configuration to what a worker computes with, and to what it makes."""

from __future__ import annotations

from metadist.config import Config
from metadist.run import setup, training
from metadist.run.networks import Networks
from metadist.run.product import Job, Product, Sets


def build(config: Config) -> Job:
    """Everything built, not compiled yet. Raises UserError as ``setup.build`` and ``training.build`` do."""
    return training.build(config) if config.method.synthetic == "network" else setup.build(config)


def product(job: Job) -> Product:
    """What the job makes."""
    if isinstance(job, training.TrainingSetup):
        return Networks(job)
    assert isinstance(job, setup.Setup)
    return Sets(job)
