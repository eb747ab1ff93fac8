"""What a worker of a simulation does: it answers messages to organizations, and trains baselines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cotune.client.app import app as client_app
from cotune.client.local_events import observe_client
from cotune.errors import RunError
from cotune.flower.inprocess_grid import InProcessGrid
from cotune.flower.message_pipe import receive_message, send_message
from cotune.models.device import peak_gpu_memory_bytes, peak_memory_bytes
from cotune.models.local_events import observe_models
from cotune.observers import Observer
from cotune.server.app import train
from cotune.server.runs.run_folder import RunFolder
from cotune.simulations.garbage_collection import rare_garbage_collection
from cotune.simulations.workers.pool import DONE, EVENT
from cotune.simulations.workers.start import CLIENT, MODELS
from cotune.worker_process import receive_all


class Trained(NamedTuple):
    """What became of a baseline.

    Attributes:
        reason: Why it could not be trained; "": it was.
        ends_run: Whether that ends the run, as it would in one process.
    """

    reason: str = ""
    ends_run: bool = False


def do_tasks(pipe: Connection, run: Path, threads: int) -> None:
    """Do what the parent asks for: "" and then a message to answer, or the folder of a baseline to train.

    Args:
        pipe: To the parent.
        run: The folder of the run.
        threads: With which PyTorch computes.
    """
    torch.set_num_threads(threads)
    folder = RunFolder(run)  # from here on the files of the plan's own rules are known
    grid = InProcessGrid(client_app, len(folder.file.participants))
    with rare_garbage_collection():
        for baseline in receive_all(pipe):
            if baseline:
                _train_baseline(pipe, RunFolder(Path(baseline)))
            else:
                _answer(pipe, grid)


def _answer(pipe: Connection, grid: InProcessGrid) -> None:
    message = receive_message(pipe)
    with _telling(pipe):
        reply = grid.answer(message)
    _say_done(pipe)
    send_message(pipe, reply)


def _train_baseline(pipe: Connection, folder: RunFolder) -> None:
    with _telling(pipe, baseline=folder.file.run):
        trained = _train(folder)
    _say_done(pipe)
    pipe.send(trained)


def _train(folder: RunFolder) -> Trained:
    try:
        train(InProcessGrid(client_app), folder)
    except RunError as error:
        return Trained(str(error))
    except Exception as error:
        return Trained(f"{type(error).__name__}: {error}", ends_run=True)
    return Trained()


@contextmanager
def _telling(pipe: Connection, **about: Any) -> Iterator[None]:
    """Tell the parent of all events in the block, with further fields."""

    def forward(who: str) -> Observer:
        return lambda event, fields: pipe.send((EVENT, who, event, {**fields, **about}))

    with observe_client(forward(CLIENT)), observe_models(forward(MODELS)):
        yield


def _say_done(pipe: Connection) -> None:
    pipe.send((DONE, peak_memory_bytes(), peak_gpu_memory_bytes() or 0))
