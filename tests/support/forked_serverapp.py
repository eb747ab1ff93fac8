"""`flwr-serverapp`, forked from the tests' fork server instead of started as an interpreter that imports PyTorch.

A SuperLink starts the ServerApp of a run by the program's name. In a folder that comes first on its path, `write_program` puts one
that asks the fork server for the process and ends. Nobody waits for that program: a ServerApp itself watches the process that
wanted it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil

from tests.support.fork_server import find_address, preloaded

_PROGRAM = """#!{python}
import sys
sys.path.insert(0, {root!r})
from tests.support.forked_serverapp import fork
if __name__ == "__main__":
    fork(sys.argv, {address!r}, {note!r})
"""
_NAME = "flwr-serverapp"


def write_program(folder: Path) -> None:
    """Write the program into a new folder, beside which it notes the number of the newest ServerApp."""
    folder.mkdir()
    program = folder / _NAME
    places = {"root": str(Path(__file__).parents[2]), "address": find_address(), "note": str(_note_of(folder))}
    program.write_text(_PROGRAM.format(python=sys.executable, **places), encoding="utf-8")
    program.chmod(0o700)


def find_serverapp(folder: Path) -> psutil.Process:
    """Find the newest ServerApp that the program in a folder has started. Raises LookupError, psutil.NoSuchProcess."""
    note = _note_of(folder)
    if not note.exists():
        raise LookupError(f"{folder} has started no ServerApp")
    found = psutil.Process(int(note.read_text(encoding="ascii")))
    if found.create_time() > note.stat().st_mtime + 10:  # seconds: the clocks of the two differ by a little
        raise psutil.NoSuchProcess(found.pid)  # another one has its number now
    return found


def fork(arguments: list[str], server: str, note: str) -> None:
    """Start a ServerApp with the environment of this process, and end this process.

    arguments: The program's, its name first. server: The address of the fork server. note: File for the number of the ServerApp.
    """
    process = preloaded(server).Process(target=_play, args=(arguments, dict(os.environ), os.getcwd()))
    process.start()
    Path(note).write_text(str(process.pid), encoding="ascii")
    os._exit(0)  # multiprocessing would wait for the ServerApp to end


def _play(arguments: list[str], environ: Mapping[str, str], folder: str) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(folder)
    sys.argv = arguments
    import torch
    from flwr.superlink.cli.flwr_serverapp import flwr_serverapp

    torch.set_num_threads(1)
    flwr_serverapp()


def _note_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-newest")
