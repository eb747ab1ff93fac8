from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from cotune.cli.strategies import renewed
from cotune.client.site import Site
from cotune.client.training.round import train_round
from cotune.plan.load import load_plan, parse_plan
from cotune.strategies import plugins
from cotune.strategies.config import RECIPES
from cotune.strategies.registry import FOLDERS, get_builtin_components
from tests.support.console import Cotune

KINDS = ("fusion", "weighting", "server_optimizer")
PAGE = Path(__file__).parents[2] / "docs" / "strategies.md"
QUICK = ("--set", "simulation.baselines=[]")


# --- list and explain


def test_everything_is_listed(cotune: Cotune, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    shown = cotune("strategies")
    assert (shown.code, shown.err) == (0, "")
    for name in (*RECIPES, *(name for kind in FOLDERS for name in get_builtin_components(kind))):
        assert re.search(rf"^{name} ", shown.out, re.MULTILINE)
    found = json.loads(cotune("strategies", "--json").out)
    assert {part["name"] for part in found if part["kind"] == "recipe"} == set(RECIPES)
    assert {part["name"] for part in found if part["kind"] == "fusion"} == set(get_builtin_components("fusion"))


def test_names_are_whole_on_a_narrow_terminal(cotune: Cotune, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    listed = cotune("strategies").out
    for name in (*RECIPES, *(name for kind in FOLDERS for name in get_builtin_components(kind))):
        assert re.search(rf"^{name} ", listed, re.MULTILINE), name


def test_a_part_is_explained(cotune: Cotune) -> None:
    shown = cotune("strategies", "sgd")
    assert (shown.code, shown.err) == (0, "")
    assert "sgd, a server optimizer" in shown.out
    assert "θ += lr·v with v = momentum·v + D" in shown.out
    assert "https://arxiv.org/abs/1909.06335" in shown.out
    assert re.search(r"momentum +number +0.0 +at least 0, below 1", shown.out)
    [part] = json.loads(cotune("strategies", "sgd", "--json").out)
    [lr] = [p for p in part["parameters"] if p["name"] == "lr"]
    assert lr == {"name": "lr", "type": "number", "default": 1.0, "required": False, "bounds": "above 0, at most 1000"}


def test_a_recipe_is_explained(cotune: Cotune) -> None:
    shown = cotune("strategies", "fedavgm")
    assert "fedavgm, a strategy" in shown.out
    assert "examples → mean → sgd (momentum = 0.9)" in shown.out
    [recipe] = json.loads(cotune("strategies", "fedavgm", "--json").out)
    assert (recipe["sees"], recipe["sends"], recipe["state"]) == ("one sum", ["its delta"], "")
    assert recipe["client_privacy"] == 'yes: with strategy.weighting = "uniform"'


@pytest.mark.parametrize(
    ("recipe", "source"),
    [
        ("rolora", "https://arxiv.org/abs/2502.01755"),  # of no part
        ("bulyan", "https://arxiv.org/abs/1802.07927"),  # its fusion's: equal weights are not what it is known for
        ("soup", "https://arxiv.org/abs/1907.02189"),  # here they are
    ],
)
def test_where_a_recipe_comes_from(cotune: Cotune, recipe: str, source: str) -> None:
    [cite] = json.loads(cotune("strategies", recipe, "--json").out)[0]["cite"]
    assert source in cite


def test_every_recipe_says_where_it_comes_from(cotune: Cotune) -> None:
    found = json.loads(cotune("strategies", "--json").out)
    assert [part["name"] for part in found if part["kind"] == "recipe" and not part["cite"]] == []


def test_what_a_part_means_for_privacy(cotune: Cotune) -> None:
    [part] = json.loads(cotune("strategies", "noise_aware", "--json").out)
    assert part["sees"] == "each update"
    assert "how much privacy noise its delta carries" in part["sends"]
    assert part["record_privacy"].startswith("free: ")
    assert part["client_privacy"].startswith("no: it would undo client_privacy")


def test_an_unknown_name(cotune: Cotune) -> None:
    shown = cotune("strategies", "fedavgg")
    assert (shown.code, shown.out) == (2, "")
    assert 'there is neither a strategy nor a part "fedavgg"; did you mean \'fedavg' in shown.err
    assert shown.err.count("\n") == 1


OWN = 'import torch\nfrom cotune.strategies import *\n\n\n@fusion("mine", cite="none")\ndef mine(*, step: float = 1.0):\n'
OWN += '    """D: the mean."""\n    sums = yield weighted\n    return weighted_mean(sums)\n'


@pytest.mark.parametrize("file", ["mine.py", "rules.py"])
def test_a_rule_of_ones_own_that_is_named_without_its_file(cotune: Cotune, folder: Path, file: str) -> None:
    """Wherever an unknown name is refused, it is said how it is named; under that name it is explained."""
    (folder / file).write_text(OWN, encoding="utf-8")
    for arguments in (
        ("strategies", "mine"),
        ("strategies", "test", "mine"),
        ("plan", "check", "toy.toml", "--set", "strategy=mine"),
        ("plan", "check", "toy.toml", "--set", "strategy.fusion=mine"),
        ("simulate", "toy.toml", "--set", 'strategy.fusion={name="mine",step=2}'),
        ("simulate", "toy.toml", "--set", "strategy.server_optimizer=mine"),
        ("compare", "toy.toml", "--vary", "strategy=fedavg,mine"),
        ("compare", "toy.toml", "--vary", "strategy.fusion=mean,mine"),
        ("server", "init", "fed", "--plan", "named.toml", "--host", "localhost"),
    ):
        (folder / "named.toml").write_text('strategy = "mine"\n' + (folder / "toy.toml").read_text("utf-8"), encoding="utf-8")
        shown = cotune(*arguments)
        assert shown.code == 2, arguments
        assert f'"{file}:mine"' in shown.err, arguments
        assert shown.err.count("\n") == 1
    [part] = json.loads(cotune("strategies", f"{file}:mine", "--json").out)
    assert (part["kind"], part["summary"], part["parameters"][0]["name"]) == ("fusion", "D: the mean.", "step")


def test_the_page_of_the_documentation_is_up_to_date() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == renewed(text), "run `cotune strategies --page docs/strategies.md`"


def test_the_page_is_renewed_below_its_mark(cotune: Cotune, folder: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    (folder / "page.md").write_text(text[: text.index("## Strategies by name")] + "old tables\n", encoding="utf-8")
    assert cotune("strategies", "--page", "page.md").code == 0
    assert (folder / "page.md").read_text(encoding="utf-8") == text


def test_the_rule_of_the_page_conforms(cotune: Cotune, folder: Path) -> None:
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[0]
    (folder / "my_rules.py").write_text(code, encoding="utf-8")
    checked = cotune("strategies", "test", "my_rules.py:signs", "--set", "step=0.01")
    assert checked.code == 0, checked.out


# --- one's own


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_rule_conforms_and_is_short(cotune: Cotune, folder: Path, kind: str) -> None:
    begun = cotune("strategies", "new", "my_rule", "--kind", kind)
    assert (begun.code, begun.err) == (0, "")
    assert "my_rule.py:my_rule" in begun.out
    rule = (folder / "my_rule.py").read_text(encoding="utf-8")
    [body] = [n for n in ast.parse(rule).body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    assert (body.end_lineno or 0) - min(d.lineno for d in body.decorator_list) < 30
    checked = cotune("strategies", "test", "my_rule.py:my_rule")
    assert checked.code == 0, checked.out
    assert re.search(r"all \d+ checks passed", checked.out)


def test_the_test_of_a_new_rule_runs(cotune: Cotune, folder: Path) -> None:
    for name, file in (("my_rule", "mine.py"), ("other_rule", "wrong.py")):
        assert cotune("strategies", "new", name, "--out", file).code == 0
    rule = (folder / "wrong.py").read_text(encoding="utf-8")
    (folder / "wrong.py").write_text(rule.replace(", idempotent=False", ""), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", "test_mine.py", "test_wrong.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.findall(r"^FAILED (test_\w+\.py)", done.stdout, re.MULTILINE) == ["test_wrong.py"], done.stdout
    assert re.search(r"^PASSED test_mine\.py", done.stdout, re.MULTILINE)
    assert "identical deltas do not give that delta" in done.stdout


def test_nothing_is_overwritten(cotune: Cotune, folder: Path) -> None:
    (folder / "test_my_rule.py").write_text("mine")
    refused = cotune("strategies", "new", "my_rule")
    assert (refused.code, refused.out) == (2, "")
    assert "test_my_rule.py exists already" in refused.err
    assert not (folder / "my_rule.py").exists()
    assert (folder / "test_my_rule.py").read_text() == "mine"


@pytest.mark.parametrize("arguments", [("my-rule",), ("my_rule", "--out", "rules.txt"), ("my_rule", "--out", "my-rules.py")])
def test_a_name_that_python_cannot_use(cotune: Cotune, arguments: tuple[str, ...]) -> None:
    refused = cotune("strategies", "new", *arguments)
    assert refused.code == 2
    assert "expected a Python name and a file such as my_rules.py" in refused.err


def test_a_rule_that_does_not_conform(cotune: Cotune, folder: Path) -> None:
    (folder / "my_rules.py").write_text(
        "def first(updates, scale: float = 1.0):\n    return {n: scale * d for n, d in updates[0].delta.items()}\n"
    )
    checked = cotune("strategies", "test", "my_rules.py:first")
    assert checked.code == 1
    assert re.search(r"✗ +does not depend on the order +the result depends on the order", checked.out)
    assert re.search(r"✓ +gives the same again", checked.out)
    found = json.loads(cotune("strategies", "test", "my_rules.py:first", "--json").out)
    assert {f["name"] for f in found if not f["passed"]} == {"does not depend on the order"}
    doubled = json.loads(cotune("strategies", "test", "my_rules.py:first", "--set", "scale=2", "--json").out)
    assert "keeps what all agree on" in {f["name"] for f in doubled if not f["passed"]}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("meen",), "unknown fusion \"meen\"; did you mean 'mean'?"),
        (("nowhere.py:rule",), "nowhere.py cannot be read"),
        (("mean", "--set", "density=0.3"), 'fusion "mean" has no parameter "density"'),
        (("sgd", "--set", "lr=-1"), 'server optimizer "sgd" has lr = -1: input should be greater than 0'),
        (("flwr.serverapp.strategy:FedProx",), 'expected the strategy "fedprox"'),
    ],
)
def test_what_cannot_be_checked_is_one_sentence(cotune: Cotune, arguments: tuple[str, ...], words: str) -> None:
    refused = cotune("strategies", "test", *arguments)
    assert (refused.code, refused.out) == (2, "")
    assert words in refused.err
    assert refused.err.count("\n") == 1


def test_parts_of_any_origin_are_checked(cotune: Cotune) -> None:
    assert cotune("strategies", "test", "uniform").code == 0
    assert cotune("strategies", "test", "flwr.serverapp.strategy:FedAvg").code == 0


# --- in a run

RULE = """
import torch
from cotune.strategies import Aggregate, Needs, Visibility, fusion

@fusion("heavy", cite="", needs=Needs(visibility=Visibility.PER_CLIENT, weights=False), idempotent=False)
def heavy(updates, context, *, beta: float = 0.5):
    mean = {n: torch.stack([u.delta[n] for u in updates]).mean(0) for n in updates[0].delta}
    moving = {n: d + beta * context.memory.get(n, torch.zeros(())) for n, d in mean.items()}
    return Aggregate(moving, memory=moving)
"""


def test_a_run_with_a_rule_of_ones_own_goes_on_and_is_repeated(
    cotune: Cotune, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "my_rules.py").write_text(RULE)
    asked = ("toy.toml", *QUICK, "--set", "strategy.fusion=my_rules.py:heavy", "--set", "rounds=3")
    assert cotune("simulate", *asked, "--out", "run").code == 0
    assert (folder / "run" / "my_rules.py").read_text() == RULE  # beside its plan
    final = load_file(folder / "run" / "model" / "model.safetensors")
    (folder / "run" / "checkpoints" / "round-00003.safetensors").unlink()
    (folder / "my_rules.py").write_text("raise RuntimeError('the run has its own copy')")
    monkeypatch.setattr(plugins, "_read", {})  # as in another process
    resumed = cotune("simulate", "--resume", "run")
    assert resumed.code == 0, resumed.err
    again = cotune("simulate", "run/plan.toml", "--out", "again")
    assert again.code == 0, again.err
    for run in ("run", "again"):
        found = load_file(folder / run / "model" / "model.safetensors")
        assert all(found[name].equal(tensor) for name, tensor in final.items())
    monkeypatch.setattr(plugins, "_read", {})
    (folder / "run" / "my_rules.py").write_text(RULE + "# changed")
    (folder / "run" / "checkpoints" / "round-00003.safetensors").unlink()
    refused = cotune("simulate", "--resume", "run")
    assert refused.code == 2
    assert "my_rules.py is not the file that the plan was made with" in refused.err


def test_organization_needs_no_files_of_the_plan(cotune: Cotune, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "my_rules.py").write_text(RULE)
    assert cotune("simulate", "toy.toml", *QUICK, "--set", "strategy.fusion=my_rules.py:heavy", "--out", "run").code == 0
    plan = folder / "next.toml"
    plan.write_text((folder / "run" / "plan.toml").read_text().replace("seed = 7", "seed = 8"))
    (folder / "my_rules.py").unlink()
    (folder / "run" / "my_rules.py").unlink()
    monkeypatch.setattr(plugins, "_read", {})
    monkeypatch.setattr(plugins, "_run", lambda *_: pytest.fail("an organization ran a file"))
    shown = cotune("client", "check", "run/sites/org-1", plan)
    assert shown.code == 0, shown.err
    assert "the policy allows this plan" in shown.out
    checkpoint = load_file(folder / "run" / "checkpoints" / "round-00001.safetensors")
    state = {name.removeprefix("state/"): tensor for name, tensor in checkpoint.items() if name.startswith("state/")}
    received = parse_plan(json.loads(load_plan(plan, own_code=False).canonical()))
    update = train_round(received, Site(folder / "run" / "sites" / "org-1"), 1, state)
    assert update.delta.keys() == state.keys()


def test_own_rules_are_compared_in_parallel_processes(cotune: Cotune, folder: Path) -> None:
    (folder / "my_rules.py").write_text(RULE)
    vary = "strategy=fedavg,my_rules.py:heavy"
    done = cotune("compare", "toy.toml", "--vary", vary, "--set", "rounds=1", "--seeds", "1", "--jobs", "2", "--out", "side")
    assert done.code == 0, done.out + done.err
    assert len(list((folder / "side").rglob("my_rules.py"))) == 1


@pytest.mark.parametrize("name", ["FedAdam", "FedAvgM"])
def test_a_run_with_a_strategy_of_flower_goes_on(cotune: Cotune, folder: Path, name: str) -> None:
    asked = ("toy.toml", *QUICK, "--set", f"strategy=flwr.serverapp.strategy:{name}", "--set", "rounds=3")
    done = cotune("simulate", *asked, "--out", "run")
    assert (done.code, "Sampled" in done.err) == (0, False), done.err
    final = load_file(folder / "run" / "model" / "model.safetensors")
    (folder / "run" / "checkpoints" / "round-00003.safetensors").unlink()
    assert cotune("simulate", "--resume", "run").code == 0
    found = load_file(folder / "run" / "model" / "model.safetensors")
    assert all(found[key].equal(tensor) for key, tensor in final.items())
