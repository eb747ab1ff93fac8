"""How a run is named to the SuperLink, whose every member can ask for a run's configuration: by its name, and no place.

The processes that play runs are told where the federation's folder is by their environment, which does not leave this machine.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from cotune.models.errors import RunError

HOME = "COTUNE_FEDERATION"  # the federation's folder, in the environment of what `cotune server start` has started


def name_of(run: Path) -> str:
    """What the SuperLink is told of the folder of a run."""
    return run.name


def place_of(told: str, environment: Mapping[str, str] = os.environ) -> Path:
    """The folder of the run that a run configuration names; in a simulation, where no federation is, it names the folder itself.

    Raises RunError for what is neither.
    """
    if not told:
        raise RunError('the run configuration has no "run": expected the folder of a run')
    home = environment.get(HOME)
    if not home:
        return Path(told)
    if told in (".", "..") or Path(told).name != told:
        raise RunError(f"the run configuration names {told[:100]!r}: expected the name of a run of the federation")
    return Path(home) / "runs" / told
