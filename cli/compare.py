"""`cotune compare`: strategies side by side on the same data and seeds, with error bars."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cotune.cli.console import announce
from cotune.cli.options import AsJson, Device, with_options
from cotune.cli.plans.plan_options import PlanOptions


@with_options(PlanOptions)
def compare(
    options: PlanOptions,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=V1,V2", help="A key of the plan and its values; repeatable. The first key is the one compared."
        ),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="How many: the plan's own and those after it; default: 5.", show_default=False)
    ] = None,
    baseline: Annotated[str | None, typer.Option(help="The value that others are compared with; default: the first.")] = None,
    gain: Annotated[
        bool,
        typer.Option("--gain", help="Train each organization alone, too, and show what joining brings it on its own records."),
    ] = False,
    private_selection: Annotated[
        float | None,
        typer.Option(
            metavar="RUNS",
            help="Release the best of a secret number of runs (RUNS on average) and nothing of the others; ε covers the choice.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the comparison; default: compare/<plan>; of a selection: selected/<plan>.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs beside each other; default: as cores and memory allow, 1 on a GPU.")
    ] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Run a grid of plans over several seeds and compare them. Resumable."""
    if private_selection is not None and (seeds not in (None, 1) or baseline is not None):
        raise typer.BadParameter(
            "a private selection takes no --seeds and no --baseline: another seed would test on records that train"
        )
    options.check_files(vary or ())
    announce(f"plan {options.source}: loading PyTorch; every combination is checked, then played", quiet=as_json)
    from cotune.cli import comparison_output  # loads PyTorch

    given = [*options.overrides, *(['simulation.baselines=["alone"]'] if gain else [])]
    grid = comparison_output.Grid(options.source, tuple(vary or ()), given, out, jobs, device)
    if private_selection is None:
        comparison_output.compare_grid(grid, 5 if seeds is None else seeds, baseline, as_json=as_json)
    else:
        comparison_output.select_privately(grid, private_selection, as_json=as_json)
