from __future__ import annotations

import io
import json
import math
import re
import tomllib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from rich.console import Console
from scipy.optimize import brentq
from scipy.stats import norm

from cotune.cli.progress import showing_progress
from cotune.plan.load import load_plan, preset_names
from cotune.simulations.run import simulate
from tests.support.console import Cotune, Started
from tests.support.datasets import sentences, write_csv, write_images, write_tagged


def model_bytes(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


def test_version_and_help(cotune: Cotune) -> None:
    shown = cotune("--version")
    assert (shown.code, shown.out, shown.err) == (0, f"cotune {version('cotune')}\n", "")
    for arguments in (("--help",), ("-h",), ("simulate", "--help"), ("plan", "--help"), ("plan", "check", "-h")):
        shown = cotune(*arguments)
        assert (shown.code, shown.err) == (0, "")
        assert "Usage: " in shown.out
    for option in (
        "--data",
        "--text",
        "--label",
        "--model",
        "--clients",
        "--partition",
        "--set",
        "--out",
        "--resume",
        "--engine",
        "--workers",
    ):
        assert option in cotune("simulate", "--help").out


# --- plans


def test_a_new_plan_is_a_plan(cotune: Cotune, folder: Path) -> None:
    listed = [line.split(maxsplit=1) for line in cotune("plan", "list").out.splitlines()]
    presets = ["debian", "debian-personal", "debian-tasks", "text", "tweets", "tweets-blocks", "tweets-lora"]
    assert [name for name, _ in listed] == preset_names() == presets
    assert all(len(about.split()) > 3 for _, about in listed)
    for name in preset_names():
        printed = cotune("plan", "new", name)
        assert (printed.code, printed.err) == (0, "")
        (folder / "my.toml").write_text(printed.out, encoding="utf-8")
        assert load_plan(folder / "my.toml").plan_id == load_plan(name).plan_id
    assert cotune("plan", "new").out == cotune("plan", "new", "tweets").out


def test_check_says_what_a_plan_will_do_and_does_nothing(cotune: Cotune, folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    shown = cotune("plan", "check", "toy.toml", "--set", "privacy={epsilon=3}", "--set", "local.steps=7")
    assert (shown.code, shown.err) == (0, "")
    lines = [line.split() for line in shown.out.splitlines()]
    (stage,) = [line for line in lines if line[:1] == ["head"]]
    assert stage[:4] == ["head", "2", "7", "51"]  # rounds, steps, parameters
    assert re.search(r"head +2 +7 +51 +\d+(\.\d)? k?B +\d+(\.\d)? k?B", shown.out)
    for name in ("org-1", "org-2"):
        (row,) = [line for line in lines if line[:1] == [name]]
        _, examples, batch, steps, sigma, planned, allowed, delta = row
        assert (examples, batch, steps, allowed) == ("102" if name == "org-1" else "101", "50", "14", "3")
        assert 0.3 < float(sigma) < 100
        assert 2.9 < float(planned) <= 3.0
        assert float(delta) == pytest.approx(100**-1.5, rel=0.05)
    assert re.search(
        r"about .*\d (s|min|h)\b.* on this machine, as timed on \d+ of [\d,]+ records; nothing was trained", shown.out
    )
    assert "3 classes (bad, good, so), 36 test examples" in shown.out
    assert "No differential privacy" not in shown.out
    assert sorted(folder.rglob("*")) == before


def test_check_states_the_largest_claim(cotune: Cotune) -> None:
    """Without sampling (a batch of all) the steps are one Gaussian mechanism of μ = √steps/σ, whose figures have closed forms."""
    private = ("--set", "privacy={epsilon=3}", "--set", "local.batch_size=100", "--set", "simulation.epsilons=[1.5, 3.0]")
    shown = cotune("plan", "check", "toy.toml", *private)
    assert (shown.code, shown.err) == (0, "")
    rows = {line.split()[0]: line.split() for line in shown.out.splitlines() if line.startswith("org-")}
    assert float(rows["org-1"][4]) > 1.5 * float(rows["org-2"][4])  # half the ε: more noise
    mu = math.sqrt(2 * 3) / float(rows["org-2"][4])
    (line,) = [line for line in shown.out.splitlines() if "1e-06" in line]
    stated = [float(number) for number in re.findall(r"\d+(?:\.\d+)?(?:e-\d+)?", line)]

    def delta(eps: float) -> float:  # Balle & Wang, ICML 2018, theorem 8
        return float(norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu))

    at_small_delta = brentq(lambda eps: delta(eps) - 1e-6, 0, 50)
    found = 100 * norm.cdf(norm.ppf(0.01) + mu)  # % of the members that the best test at 1 % false alarms finds
    assert stated == [
        pytest.approx(at_small_delta, rel=0.01),
        1e-6,
        pytest.approx(mu, rel=0.01),
        1.0,
        pytest.approx(found, rel=0.03),
    ]
    without = cotune("plan", "check", "toy.toml")
    assert "1e-06" not in without.out


def test_check_says_when_there_is_no_privacy(cotune: Cotune) -> None:
    shown = cotune("plan", "check", "toy.toml")
    assert "No differential privacy: the plan says privacy = none." in shown.out
    assert "σ" not in shown.out


# --- simulate


def test_simulate_shows_lines_then_the_answer(cotune: Cotune, folder: Path) -> None:
    shown = cotune("simulate", "toy.toml", "--out", "run", "--set", "rounds=3")
    assert (shown.code, shown.err) == (0, "")
    summary = json.loads((folder / "run" / "summary.json").read_text(encoding="utf-8"))
    lines = shown.out.splitlines()
    assert any(re.fullmatch(rf"plan toy \({summary['plan_id'][:12]}…\): 3 rounds", line) for line in lines)
    for r in summary["rounds"]:
        accuracy = f"{r['metrics']['accuracy']:.3f}"
        start = rf"round {r['round']}/3 \(head\), 2 organizations, test accuracy {accuracy}, [\d.]+ k?B up, [\d.]+ k?B down"
        (line,) = [line for line in lines if re.match(start, line)]
        assert line.endswith(" left") == (r["round"] == 2)  # the first round, which encodes the texts, says nothing of the others
    assert "No differential privacy: the plan says privacy = none." in shown.out
    test = summary["test"]
    for name, metrics in {
        "majority class": test["majority"],
        "each organization alone, mean": test["alone"]["mean"],
        r"federated \(this run\)": test["federated"],
        r"all data pooled, without privacy \(the bound\)": test["pooled"],
    }.items():
        figures = " +".join(f"{metrics[key]:.3f}" for key in ("accuracy", "precision", "recall", "f1"))
        assert re.search(rf"{name} +{figures}", shown.out)
    for o in summary["organizations"]:
        columns = ("majority", "alone", "alone_without_privacy", "federated", "adapted")
        own = " +".join(f"{o['own'][key]['accuracy']:.3f}" for key in columns)
        gain = re.escape(f"{o['gain']:+.3f}")
        assert re.search(rf"{o['name']} +{own} +{gain} +{o['own']['records']} +{o['worth']['answer'][:3]}", shown.out)
    for file in ("report.html", "summary.json", "model"):
        assert f"{folder / 'run' / file}" in shown.out
    assert "\x1b" not in shown.out
    assert "baseline pooled: accuracy" in shown.out
    for o in summary["organizations"]:
        assert f"{o['name']} has adapted the model to its own records: {o['adaptation']['method']}" in shown.out


def test_it_is_said_whose_records_are_encoded_and_how_many(cotune: Cotune, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a file at once, no matter who holds them, and none twice: 240 texts, of which some are the same."""
    monkeypatch.setenv("COTUNE_CACHE", str(folder / "cache"))
    distinct = len({text for text, _ in sentences(240)})
    shown = cotune("simulate", "toy.toml", "--out", "run", "--set", "rounds=1", "--set", "simulation.baselines=[]")
    told = [line for line in shown.out.splitlines() if line.startswith("encoding ")]
    assert told
    assert all(f"the {distinct} distinct records of reviews.csv once" in line for line in told)
    assert told[-1].endswith(f": {distinct} done")


def test_with_privacy_the_epsilon_of_each_organization_is_shown(cotune: Cotune, folder: Path) -> None:
    shown = cotune("simulate", "toy.toml", "--out", "run", "--set", "privacy={epsilon=3}", "--set", "simulation.baselines=[]")
    assert (shown.code, shown.err) == (0, "")
    assert "No differential privacy" not in shown.out
    summary = json.loads((folder / "run" / "summary.json").read_text(encoding="utf-8"))
    for o in summary["organizations"]:
        found = re.search(rf"{o['name']} +{o['examples']} +{o['rounds']} +([\d.]+) +3\b", shown.out)
        assert found
        assert o["epsilon_spent"] <= float(found[1]) <= 3.0  # never shown smaller than it is
    assert re.search(r"round 2/2 .*ε [23]\.\d", shown.out)


def test_a_kept_plan_repeats_its_run_bit_for_bit(cotune: Cotune, folder: Path) -> None:
    assert cotune("simulate", "toy.toml", "--out", "runs/a", "--set", "seed=11", "--set", "simulation.baselines=[]").code == 0
    assert cotune("simulate", "runs/a/plan.toml", "--out", "runs/b").code == 0
    assert model_bytes(folder / "runs" / "a") == model_bytes(folder / "runs" / "b")
    first, second = (json.loads((folder / "runs" / name / "summary.json").read_text(encoding="utf-8")) for name in "ab")
    assert first["test"] == second["test"]
    assert first["plan_id"] == second["plan_id"]
    assert first["reproduce"] == [f"cotune simulate {folder / 'runs' / 'a' / 'plan.toml'}"]


def test_without_out_the_run_is_in_a_new_folder_under_runs(cotune: Cotune, folder: Path) -> None:
    for count in (1, 2):
        assert cotune("simulate", "toy.toml", "--set", "rounds=1", "--set", "simulation.baselines=[]").code == 0
        runs = list((folder / "runs").iterdir())
        assert len(runs) == count
        assert all(re.fullmatch(r"\d{8}-\d{6}-toy(-\d+)?", run.name) for run in runs)


def test_options_are_short_for_keys_and_set_wins(cotune: Cotune, folder: Path) -> None:
    write_csv(
        folder / "stars.csv",
        [(text, {"good": "5", "so": "3", "bad": "1"}[label]) for text, label in sentences(200)],
        ("review", "9"),
    )
    options = [
        "--data",
        "stars.csv",
        "--text",
        "review",
        "--label",
        "9",
        "--model",
        "base",
        "--clients",
        "3",
        "--partition",
        "shards:2",
    ]
    keys = {"rounds": "1", "privacy": "none", "simulation.baselines": "[]", "model.max_length": "16", "simulation.clients": "4"}
    overrides = [f"--set={key}={value}" for key, value in keys.items()]
    shown = cotune("simulate", *options, *overrides, "--out", "run")
    assert (shown.code, shown.err) == (0, "")
    plan = tomllib.loads((folder / "run" / "plan.toml").read_text(encoding="utf-8"))
    assert plan["name"] == "text"  # the preset for one's own file
    assert (plan["data"]["text"], plan["data"]["label"]) == ("review", "9")
    assert Path(plan["data"]["source"]) == folder / "stars.csv"
    assert (plan["simulation"]["clients"], plan["simulation"]["partition"]) == (4, "shards:2")
    summary = json.loads((folder / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["labels"] == ["1", "3", "5"]
    assert all(sum(count > 0 for count in o["labels"].values()) <= 2 for o in summary["organizations"])


def test_resume_goes_on_and_says_so(cotune: Cotune, folder: Path) -> None:
    no_baselines = ("--set", "simulation.baselines=[]")
    assert cotune("simulate", "toy.toml", "--out", "whole", *no_baselines).code == 0
    assert cotune("simulate", "toy.toml", "--out", "run", *no_baselines).code == 0
    (folder / "run" / "checkpoints" / "round-00002.safetensors").unlink()
    (folder / "run" / "summary.json").unlink()
    shown = cotune("simulate", "--resume", "run")
    assert (shown.code, shown.err) == (0, "")
    assert "2 rounds, going on after round 1" in shown.out
    assert "round 2/2" in shown.out
    assert "round 1/2" not in shown.out
    assert model_bytes(folder / "run") == model_bytes(folder / "whole")
    assert cotune("simulate", "--resume", "run").code == 0  # a finished run is reported again


def test_an_organization_that_is_left_out_is_shown(cotune: Cotune, folder: Path) -> None:
    (folder / "organizations").mkdir()
    for i, name in enumerate(("[bold]a", "b", "c")):
        write_csv(folder / "organizations" / f"{name}.csv", sentences(60, seed=i))
    arguments = ["--data", "organizations", "--out", "run", "--set", "simulation.baselines=[]", "--set", "rounds=2"]
    assert cotune("simulate", "toy.toml", *arguments).code == 0
    (folder / "run" / "checkpoints" / "round-00002.safetensors").unlink()
    site = folder / "run" / "sites" / "[bold]a"
    (site / "outbox" / "update.safetensors").write_bytes(b"damaged")
    shown = cotune("simulate", "--resume", "run")
    assert shown.code == 0
    assert "round 2: [bold]a left out: the outbox file" in shown.out
    assert re.search(r"^\[bold\]a +\d+", shown.out, re.MULTILINE)


@pytest.mark.parametrize("task", ["token-classification", "image-classification"])
def test_other_tasks_are_checked_and_simulated(
    cotune: Cotune, folder: Path, base_model: Callable[[str], Path], task: str
) -> None:
    kind, data = ("bert", write_tagged(folder / "tags.jsonl")) if "token" in task else ("vit", write_images(folder / "scans"))
    common = ["--set", "simulation.min_examples=10", "--set", "model.pooling=auto", "--set", f"task={task}"]
    source = ["--set", f"data.source={data}", "--set", f"model.base={base_model(kind)}"]
    checked = cotune("plan", "check", "toy.toml", *common, *source, "--set", "privacy={epsilon=3}")
    assert (checked.code, checked.err) == (0, "")
    assert "4 classes (B-BAD, B-GOOD, B-SO, O)" in checked.out or "3 classes (blue, green, red)" in checked.out
    options = ["--task", task, "--data", data, "--model", base_model(kind)]
    shown = cotune("simulate", "toy.toml", *common[:4], *options, "--out", "run", "--set", "rounds=1")
    assert (shown.code, shown.err) == (0, "")
    assert "is it worth joining?" in shown.out
    assert json.loads((folder / "run" / "model" / "config.json").read_text())["architectures"][0].startswith(("Bert", "ViT"))


def test_the_live_display_on_a_terminal(folder: Path) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=140)
    with showing_progress(console):
        simulate(load_plan("toy.toml", ["privacy={epsilon=3}"]), folder / "run", device="cpu")
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    assert re.search(r"round 2/2 \(head\), 2 organizations, test accuracy", shown)
    assert "baseline pooled: accuracy" in shown
    assert "rounds" in shown


def test_a_process_writes_lines_and_nothing_on_stderr(started: Started, folder: Path) -> None:
    """In short: forked, so that nothing is imported, which is where libraries warn."""
    changes = ("privacy={epsilon=3}", "local.steps=1", "simulation.baselines=[]")
    words = ("simulate", "toy.toml", "--out", "run", *(word for change in changes for word in ("--set", change)))
    with started(*words) as process:
        out, err = process.communicate(600)
    assert (process.wait(), err) == (0, "")
    assert "\x1b" not in out
    assert "round 1/2 (head), 2 organizations" in out
    assert (folder / "run" / "report.html").exists()


@pytest.mark.long
@pytest.mark.parametrize(("train", "baselines"), [("head", ""), ("full", '"pooled"')])
def test_the_script_writes_lines_and_nothing_on_stderr(script: Cotune, folder: Path, train: str, baselines: str) -> None:
    changes = ("privacy={epsilon=3}", f"train={train}", "local.steps=1", f"simulation.baselines=[{baselines}]")
    shown = script("simulate", "toy.toml", "--out", "run", *(word for change in changes for word in ("--set", change)))
    assert shown.code == 0
    assert shown.err == ""
    assert "\x1b" not in shown.out
    assert f"round 1/2 ({train}), 2 organizations" in shown.out
    assert (folder / "run" / "report.html").exists()
