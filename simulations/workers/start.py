"""How a worker of a simulation begins: before it loads PyTorch, it watches its parent and knows its GPU."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection
from pathlib import Path

CLIENT = "client"  # who observes an event: `client.local_events`
MODELS = "models"  # or `models.local_events`


def work(pipe: Connection, run: Path, threads: int, gpu: str | None) -> None:
    """Do what the parent asks for, until it ends.

    Args:
        pipe: To the parent.
        run: The folder of the run.
        threads: With which PyTorch computes.
        gpu: The GPU that this process sees, as CUDA_VISIBLE_DEVICES names it; None: all that the parent sees.
    """
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    from cotune.simulations.workers.work import do_tasks  # loads PyTorch

    do_tasks(pipe, run, threads)
