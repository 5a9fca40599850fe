"""What a job would refuse hours later, refused before it is submitted."""

from __future__ import annotations

import dataclasses
import sys

from metadist.config import Config
from metadist.errors import UserError


def precheck(config: Config) -> None:
    """Build the learner once, here, on a few images: what the job would refuse hours later is refused now. Raises UserError.

    Data that this machine has not may be on the nodes: then it says so and goes on.
    """
    import torch

    from metadist import data, nets
    from metadist.run.setup import DTYPES
    from metadist.run.validate import validate_with_data

    dtype, cpu = DTYPES[config.engine.dtype], torch.device("cpu")
    if config.method.synthetic == "network":
        from metadist.run import training

        training.build(dataclasses.replace(config, smoke=True, real_batch=1, device="cpu"))
        return
    try:
        few = data.load(config.data, cpu, dtype, config.cache_dir, smoke=True)
    except UserError as e:
        print(f"note: data={config.data.name} can't be read here, the nodes must have it ({e})", file=sys.stderr)
        return
    validate_with_data(config, len(few.classes))
    nets.build(config.net, few.channels, few.size, len(few.classes), dtype, cpu)
