"""What `flwr run .` runs: the server's own ServerApp, with a simulation prepared around it.

The run configuration in pyproject.toml names the plan: `flwr run . --run-config 'plan="my.toml"'`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flwr.app import Context

from cotune.plan.load import load_plan
from cotune.printable import clean_output
from cotune.server.app import app as server_app
from cotune.server.rounds.registered_evaluator import register_evaluator
from cotune.server.runs.events import observe_run
from cotune.server.runs.run_folder import RunFolder, pick_run_folder
from cotune.simulations.baselines import build_personal_evaluate
from cotune.simulations.prepare import prepare
from cotune.simulations.run import complete, start

app = server_app


@app.lifespan()
def simulation(context: Context) -> Iterator[None]:
    """Around the ServerApp: makes the run's folder from the plan before, and reports after. Does nothing for a prepared run."""
    if context.run_config.get("run"):
        yield
        return
    clean_output()
    began = time.monotonic()
    config = {key: str(value) for key, value in context.run_config.items()}
    overrides = [line.strip() for line in config.get("set", "").replace(";", "\n").splitlines() if line.strip()]
    prepared = prepare(load_plan(config.get("plan") or "tweets", overrides))
    root = Path(config.get("root") or ".")
    out = Path(config["out"]) if config.get("out") else root / pick_run_folder(prepared.plan.name)
    folder = start(prepared, out, "flower", "auto")
    context.run_config["run"] = str(folder.path)
    with folder.locked(), observe_run(_print), register_evaluator(build_personal_evaluate(folder)):
        yield
        if RunFolder(folder.path).finished:
            result = complete(folder, prepared, time.monotonic() - began)
            print(f"cotune: the run is in {result.folder}", flush=True)


def _print(event: str, fields: dict[str, Any]) -> None:
    """The lines that Flower's log of the run shows."""
    if event == "round_finished":
        accuracy = f", test accuracy {fields['metrics']['accuracy']:.3f}" if fields["metrics"] else ""
        print(
            f"cotune: round {fields['round']} ({fields['stage']}), {len(fields['participants'])} organizations{accuracy}",
            flush=True,
        )
    elif event == "run_stopped":
        print(f"cotune: the run was stopped: {fields['reason']}", flush=True)
    elif event in ("update_dropped", "update_quarantined", "run_failed"):
        print(f"cotune: round {fields['round']}: {fields.get('organization', 'failed')}: {fields['reason']}", flush=True)
