"""Client-level privacy from a plan to a report."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cotune.cli.plans.forecast import show_forecast
from cotune.cli.simulate import show
from cotune.privacy.accounting.composition import Steps, epsilon
from cotune.server.runs.events import observe_run
from cotune.simulations.forecast.forecast import forecast
from cotune.simulations.run import resume, simulate
from tests.support.matrix import crossed
from tests.support.simulations import COMPARED, UNADAPTED, NewPlan, final_model

CENTRAL = {"epsilon": 6.0, "clip_norm": 0.5}
UNIFORM = {"weighting": "uniform"}


def printed(write: Any, what: Any) -> str:
    stream = io.StringIO()
    write(Console(file=stream, width=10_000), what)
    return stream.getvalue()


@pytest.mark.parametrize(("record", "clipping"), crossed([False, True], ["fixed", "adaptive"]))
def test_a_whole_run_states_both_kinds_of_privacy(toy_plan: NewPlan, tmp_path: Path, clipping: str, record: bool) -> None:
    plan = toy_plan(
        client_privacy={**CENTRAL, "clipping": clipping},
        strategy=UNIFORM,
        privacy={"epsilon": 3.0} if record else "none",
        simulation={"clients": 3, "baselines": []},
    )
    result = simulate(plan, tmp_path / "run", device="cpu")
    summary = result.summary
    central = result.summary["client_privacy"]
    assert (summary["status"], summary["stopped"]) == ("finished", None)
    z = central["noise_multiplier"]
    assert central["epsilon_spent"] == epsilon([Steps(z, 1.0, 3)], 1e-5) <= 6.0
    assert epsilon([Steps(z, 1.0, 4)], 1e-5) > 6.0
    assert (central["rounds_charged"], central["expected_organizations"], central["amplification"]) == (3, 3, False)
    assert (central["clip_norm"] == 0.5) == (clipping == "fixed")
    assert [r["client_privacy"]["epsilon"] for r in summary["rounds"]][-1] == central["epsilon_spent"]
    page = (result.folder / "report.html").read_text(encoding="utf-8")
    for paragraph in central["statement"]:
        assert paragraph in page.replace("&#39;", "'")
    assert ("Record-level differential privacy: for adding" in page) == record
    assert ("No record-level differential privacy" in page) != record
    assert final_model(result.folder)
    text = printed(show, result)
    assert f"client-level privacy: ε {6.0:.2f} of 6" in text or "client-level privacy: ε 5.9" in text
    json.dumps(summary.as_json(), allow_nan=False)


def test_who_trains_alone_or_on_pooled_data_has_no_central_noise(toy_plan: NewPlan, tmp_path: Path) -> None:
    """Nor is it asked by chance: the baselines are those of the same plan without either, bit for bit."""
    given: dict[str, Any] = {"strategy": UNIFORM, "rounds": 1, "train": "full", "simulation": COMPARED, "personalize": UNADAPTED}
    given["local"] = {"learning_rate": 0.02, "momentum": 0.0, "steps": 2}
    with_it = toy_plan(client_privacy=CENTRAL, server={"sample_rate": 0.5, "quorum": 0.01}, **given)
    without = toy_plan(**given)
    one, other = (simulate(p, tmp_path / str(i), device="cpu").summary for i, p in enumerate((with_it, without)))
    assert one["test"]["alone"] == other["test"]["alone"]
    assert one["test"]["pooled"] == other["test"]["pooled"]


def test_the_statement_says_what_holds_against_whom(toy_plan: NewPlan) -> None:
    seen = forecast(toy_plan(client_privacy=CENTRAL, strategy=UNIFORM), "cpu")
    assert seen.client_privacy is not None
    text = " ".join(seen.client_privacy.statement)
    for part in (
        "any single organization",
        "all its records",
        "does not protect against the server",
        "norm C over all its parameters = 0.5",
        "divided by 2",
        "composed over 3 rounds",
        "as if every organization had taken part in every round.",
        "floating-point",
    ):
        assert part in text
    shown = printed(show_forecast, seen)
    assert "No record-level differential privacy" in shown
    assert "client-level privacy: ε" in shown
    assert "the noise has the norm" in shown
    z = seen.client_privacy.noise_multiplier
    assert seen.client_privacy.noise == pytest.approx(z * 0.5 / 2 * 51**0.5)  # a head of 3 · 16 + 3 parameters
    assert seen.client_privacy.signal == 0.5


def test_amplification_says_against_whom_it_does_not_hold(toy_plan: NewPlan) -> None:
    changes: dict[str, Any] = {"strategy": UNIFORM, "server": {"sample_rate": 0.5}}
    plain = forecast(toy_plan(client_privacy=CENTRAL, **changes), "cpu").client_privacy
    amplified = forecast(toy_plan(client_privacy={**CENTRAL, "amplification": True}, **changes), "cpu").client_privacy
    assert plain is not None
    assert amplified is not None
    assert "They were asked by chance (rate 0.5), but for that nothing is taken off." in plain.statement[2]
    assert "do not learn who took part" in amplified.statement[2]
    assert "The server knows" in amplified.statement[2]
    assert amplified.noise_multiplier < plain.noise_multiplier
    full = epsilon([Steps(amplified.noise_multiplier, 1.0, 3)], 1e-5)
    assert full > 6.0
    assert f"ε = {full:.1f}"[:6] in amplified.statement[2]


def test_a_run_that_its_budget_stops_is_finished_and_says_so(toy_plan: NewPlan, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def dies(event: str, fields: dict[str, Any]) -> None:
        if event == "round_finished" and fields["round"] == 2:  # as if before the checkpoint
            (run / "checkpoints" / "round-00002.safetensors").unlink()
            raise KeyboardInterrupt

    plan = toy_plan(client_privacy=CENTRAL, strategy=UNIFORM, simulation={"baselines": []})
    with pytest.raises(KeyboardInterrupt), observe_run(dies):
        simulate(plan, run, device="cpu")
    result = resume(run)
    summary = result.summary
    assert (summary["status"], [r["round"] for r in summary["rounds"]]) == ("stopped", [1, 2])
    assert "round 3 would exceed the client-level ε = 6" in summary["stopped"]
    assert summary["client_privacy"]["rounds_charged"] == 3
    assert summary["client_privacy"]["epsilon_spent"] <= 6.0
    assert final_model(run)
    assert "This run ended before its last round." in (run / "report.html").read_text(encoding="utf-8")
    assert "The run was stopped: round 3" in printed(show, result)
    assert resume(run).summary["status"] == "stopped"  # reported again, not trained again


def test_noise_aware_weighting_in_a_whole_run(toy_plan: NewPlan, tmp_path: Path) -> None:
    plan = toy_plan(privacy={"epsilon": 8.0}, strategy={"weighting": "noise_aware"}, simulation={"baselines": ["pooled"]})
    summary = simulate(plan, tmp_path / "run", device="cpu").summary
    assert all(entry["participants"] == ["org-1", "org-2"] for entry in summary["rounds"])
    assert summary["test"]["pooled"]["accuracy"] > 0.6  # without privacy no noise is stated, and none is asked for
