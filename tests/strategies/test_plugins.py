from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cotune.errors import PlanError
from cotune.plan.load import dump_plan, load_plan, parse_plan
from cotune.plan.plan import Plan
from cotune.strategies import plugins
from cotune.strategies.aggregator import build_aggregator, build_client_term
from cotune.strategies.flower import FlowerFusion
from cotune.strategies.plugins import get_component, get_components, load_installed
from cotune.strategies.registry import Visibility
from cotune.strategies.types import RoundContext
from tests.support.failures import fails_with

RULES = '''
import pathlib
pathlib.Path(__file__).with_name("ran").touch()

from typing import Annotated
from pydantic import Field
from cotune.strategies import Needs, Visibility, fusion, weighting

@fusion("loudest", cite="", needs=Needs(visibility=Visibility.PER_CLIENT, weights=False, sends=("loss",)), min_updates=lambda factor: 2)
def loudest(updates, *, factor: Annotated[float, Field(gt=0)] = 1.0):
    """The delta of the organization with the largest loss."""
    return {name: factor * delta for name, delta in max(updates, key=lambda u: u.update.disclosures["loss"]).delta.items()}

def plain(updates, factor: float = 2.0):
    return {name: factor * delta for name, delta in updates[0].delta.items()}

def in_sums():
    sums = yield lambda update: update.delta
    return sums

@weighting("rank", cite="")
def rank(update):
    return 1.0

NUMBER = 3
'''
STRATEGY = """
from flwr.serverapp.strategy import FedAvg

class Mine(FedAvg):
    def __init__(self, temperature: float = 1.0, **others) -> None:
        super().__init__(**others)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rules").mkdir()
    (tmp_path / "rules" / "my_rules.py").write_text(RULES)
    (tmp_path / "my_strategy.py").write_text(STRATEGY)
    return tmp_path


def plan_of(folder: Path, strategy: str, **others: str) -> Plan:
    lines = [f"{key} = {value}" for key, value in others.items()]
    text = "\n".join(['privacy = "none"', f"strategy = {strategy}", *lines, '[model]\nbase = "x"', '[data]\nsource = "y.csv"'])
    (folder / "plan.toml").write_text(text)
    return load_plan(folder / "plan.toml")


def refusal(folder: Path, strategy: str, **others: str) -> str:
    with pytest.raises(PlanError) as error:
        plan_of(folder, strategy, **others)
    return str(error.value)


# --- files


def test_a_file_beside_the_plan(folder: Path) -> None:
    plan = plan_of(folder, '{ fusion = { name = "rules/my_rules.py:loudest", factor = 0.5 } }')
    fusion = plan.strategy.fusion
    assert (fusion.name, fusion.parameters) == ("my_rules.py:loudest", {"factor": 0.5})
    assert fusion.sha256 == hashlib.sha256(RULES.encode()).hexdigest()
    assert plan.strategy.weighting.name == "uniform"  # it uses no weights
    assert plan.strategy.sends == ("loss",)
    assert plan.strategy.files == {"my_rules.py:loudest": fusion.sha256}
    assert fusion.info("fusion").needs.visibility == Visibility.PER_CLIENT
    assert parse_plan(json.loads(plan.canonical())) == plan


def test_the_plan_is_the_same_wherever_the_file_lies(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("elsewhere")
    (other / "my_rules.py").write_text(RULES)
    here = plan_of(folder, '{ fusion = "rules/my_rules.py:plain" }')
    there = plan_of(other, '{ fusion = "my_rules.py:plain" }')
    assert here.plan_id == there.plan_id
    assert str(folder) not in here.canonical()  # nobody else's business


def test_defaults_are_filled_in_and_what_says_nothing_sees_all(folder: Path) -> None:
    plan = plan_of(folder, '{ fusion = "rules/my_rules.py:plain" }')
    assert plan.strategy.fusion.parameters == {"factor": 2.0}
    assert plan.strategy.fusion.info("fusion").needs.visibility == Visibility.PER_CLIENT
    sums = plan_of(folder, '{ fusion = "rules/my_rules.py:in_sums" }')
    assert sums.strategy.fusion.info("fusion").needs.visibility == Visibility.SUM


def test_clients_read_the_plan_without_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(folder, '{ fusion = "rules/my_rules.py:loudest" }')
    text = plan.canonical()
    written = folder / "received.toml"
    written.write_text(dump_plan(plan))
    monkeypatch.setattr(plugins, "_read", {})  # as in another process
    monkeypatch.setattr(plugins, "_run", lambda *_: pytest.fail("a client ran a file"))
    (folder / "rules" / "my_rules.py").unlink()
    for received in (parse_plan(json.loads(text)), load_plan(written, own_code=False)):
        assert received.plan_id == plan.plan_id
        assert received.strategy.sends == ("loss",)
        assert build_client_term(received.strategy) is not None
        assert received.strategy.keeps_state is False


def test_nothing_runs_where_own_code_is_not_wanted(folder: Path) -> None:
    (folder / "plan.toml").write_text(
        'privacy = "none"\nstrategy = { fusion = "rules/my_rules.py:plain" }\n[model]\nbase = "x"\n[data]\nsource = "y.csv"'
    )
    with fails_with("plan.invalid", "SHA-256"):
        load_plan(folder / "plan.toml", own_code=False)
    assert not (folder / "rules" / "ran").exists()


def test_a_changed_file_is_refused(folder: Path) -> None:
    plan = plan_of(folder, '{ fusion = "rules/my_rules.py:plain" }')
    repeated = folder / "rules" / "again.toml"
    repeated.write_text(dump_plan(plan))
    assert load_plan(repeated) == plan
    (folder / "rules" / "my_rules.py").write_text(RULES + "\n")
    with fails_with("plan.code_changed", "my_rules.py"):
        load_plan(repeated)


def test_what_runs_is_what_was_hashed(folder: Path) -> None:
    """A file that changes between reading and running changes nothing."""
    digest = plugins.register_file("my_strategy.py:Mine", folder)
    (folder / "my_strategy.py").write_text("raise RuntimeError")
    assert plugins.load_object("my_strategy.py:Mine", digest).__name__ == "Mine"


def test_a_file_that_this_process_has_not_read(folder: Path) -> None:
    with fails_with("plan.code_changed"):
        plugins.load_code("fusion", "my_rules.py:plain", "0" * 64)


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        (
            '{ fusion = "rules/my_rules.py:loudes" }',
            "has no \"loudes\"; did you mean 'loudest'? Known: in_sums, loudest, plain, rank",
        ),
        ('{ fusion = "rules/my_rules.py:NUMBER" }', 'has no "NUMBER"'),
        ('{ fusion = "rules/my_rules.py:rank" }', '"my_rules.py:rank" is a weighting: expected a fusion in its place'),
        ('{ fusion = "nowhere.py:rank" }', "nowhere.py cannot be read (No such file or directory)"),
        ('{ fusion = { name = "rules/my_rules.py:loudest", factr = 1 } }', "has no parameter \"factr\"; did you mean 'factor'?"),
        ('{ fusion = { name = "rules/my_rules.py:loudest", factor = 0 } }', "has factor = 0: input should be greater than 0"),
        ('{ fusion = "rules/my_rules.py:loudest", weighting = "examples" }', "uses no weights"),
        ('{ client_term = "rules/my_rules.py:plain" }', "as no client runs code that a plan brings"),
        ('{ client_term = "flwr.serverapp.strategy:FedProx" }', "as no client runs code that a plan brings"),
        ('{ server_optimizer = "rules/my_rules.py:plain" }', "expected a class with @server_optimizer on it"),
    ],
)
def test_mistakes_are_one_sentence(folder: Path, strategy: str, words: str) -> None:
    found = refusal(folder, strategy)
    assert words in found
    assert "\n" not in found


def test_two_files_of_one_name(folder: Path) -> None:
    (folder / "my_rules.py").write_text(RULES)
    strategy = '{ fusion = "rules/my_rules.py:plain", weighting = "my_rules.py:rank" }'
    assert len(plan_of(folder, strategy).strategy.files) == 2
    (folder / "my_rules.py").write_text(RULES + "# another")
    assert "names two files my_rules.py with different content" in refusal(folder, strategy)


def test_a_file_that_fails(folder: Path) -> None:
    (folder / "broken.py").write_text("import no_such_module")
    assert "broken.py cannot be run (ModuleNotFoundError: No module named 'no_such_module')" in refusal(
        folder, '{ fusion = "broken.py:x" }'
    )


def test_a_rule_in_a_file_is_held_to_what_it_says(folder: Path) -> None:
    assert "must see each update, and server.visibility allows one sum" in refusal(
        folder, '{ fusion = "rules/my_rules.py:loudest" }', server='{ visibility = "sum" }'
    )


# --- strategies of Flower's


def test_a_strategy_of_flower_in_a_plan(folder: Path) -> None:
    plan = plan_of(folder, '"flwr.serverapp.strategy:Krum"')
    assert plan.strategy.fusion.parameters["num_malicious_nodes"] == 0
    plan = plan_of(folder, '{ recipe = "flwr.serverapp.strategy:Krum", fusion = { num_malicious_nodes = 1 } }')
    assert plan.strategy.fusion.parameters["num_malicious_nodes"] == 1
    assert parse_plan(json.loads(plan.canonical())) == plan


def test_a_strategy_of_ones_own_in_a_file(folder: Path) -> None:
    plan = plan_of(folder, '"my_strategy.py:Mine"')
    info = plan.strategy.fusion.info("fusion")
    assert isinstance(info.build, FlowerFusion)
    assert plan.strategy.fusion.parameters == {"temperature": 1.0, "min_train_nodes": 1, "min_available_nodes": 1}
    assert build_aggregator(plan.strategy, RoundContext()) is not None


def test_clients_do_not_import_a_strategy_of_flower(folder: Path) -> None:
    plan = plan_of(folder, '"flwr.serverapp.strategy:Krum"')
    code = (
        "import sys, json; from cotune.plan.load import parse_plan; parse_plan(json.load(sys.stdin))"
        '; assert "flwr.serverapp.strategy" not in sys.modules; assert "cotune.strategies.flower" not in sys.modules'
    )
    done = subprocess.run([sys.executable, "-c", code], input=plan.canonical(), text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        ('"flwr.serverapp.strategy:FedProx"', 'expected the strategy "fedprox"'),
        ('"flwr.serverapp.strategy:Krumm"', "did you mean 'Krum'?"),
        ('"os:system"', 'unknown fusion "os:system"'),
        ('{ weighting = "flwr.serverapp.strategy:Krum" }', 'which is whole: expected strategy = "flwr.serverapp.strategy:Krum"'),
        (
            '{ recipe = "flwr.serverapp.strategy:FedAdam", server_optimizer = { name = "sgd", momentum = 0.9 } }',
            "gives a new model rather than a direction",
        ),
    ],
)
def test_mistakes_with_flower_are_one_sentence(folder: Path, strategy: str, words: str) -> None:
    assert words in refusal(folder, strategy)


# --- installed packages

PACKAGE = '''
from cotune.strategies import ClientTerm, Sums, client_term, fusion
from cotune.strategies.sums import weighted, weighted_mean
from dataclasses import dataclass

@fusion("tripled", cite="A package, 2026", idempotent=False)
def tripled(*, factor: float = 3.0) -> Sums:
    """Three times the mean."""
    sums = yield weighted
    return {name: factor * tensor for name, tensor in weighted_mean(sums).items()}

@client_term("still", cite="")
@dataclass(frozen=True)
class Still(ClientTerm):
    """Does nothing."""
'''
PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "cotune-example"
version = "1.0"
[tool.setuptools]
py-modules = ["cotune_example"]
[project.entry-points."cotune.fusions"]
tripled = "cotune_example:tripled"
mean = "cotune_example:tripled"
missing = "cotune_example:nothing"
[project.entry-points."cotune.client_terms"]
still = "cotune_example:Still"
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package with entry points, installed by pip into a folder of its own."""
    source = tmp_path_factory.mktemp("package")
    target = tmp_path_factory.mktemp("site-packages")
    (source / "pyproject.toml").write_text(PROJECT)
    (source / "cotune_example.py").write_text(PACKAGE)
    offline = ["--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check", "--quiet"]
    subprocess.run([sys.executable, "-m", "pip", "install", *offline, "--target", str(target), str(source)], check=True)
    return target


@pytest.fixture
def package(installed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(str(installed))
    load_installed.cache_clear()
    yield installed
    load_installed.cache_clear()
    sys.modules.pop("cotune_example", None)


def test_an_installed_part_is_named_like_any_other(package: Path, folder: Path) -> None:
    plan = plan_of(folder, '{ fusion = { name = "tripled", factor = 2 }, client_term = "still" }')
    assert plan.strategy.fusion.parameters == {"factor": 2.0}
    assert plan.strategy.fusion.info("fusion").summary == "Three times the mean."
    assert type(build_client_term(plan.strategy)).__name__ == "Still"
    assert build_aggregator(plan.strategy, RoundContext()) is not None
    assert plan.strategy.files == {}


def test_a_package_hides_nothing_of_cotune(package: Path) -> None:
    assert get_component("fusion", "mean").build.__module__ == "cotune.strategies.fusions.averaging.mean"


def test_a_package_is_imported_when_its_part_is_named(package: Path) -> None:
    assert get_component("fusion", "mean") is not None
    with pytest.raises(ValueError, match="unknown fusion \"tripple\"; did you mean 'tripled'"):
        get_component("fusion", "tripple")
    assert "cotune_example" not in sys.modules
    get_component("fusion", "tripled")
    assert "cotune_example" in sys.modules


def test_a_package_that_is_broken_is_one_sentence(package: Path) -> None:
    with fails_with("plan.unusable_component", "missing"):
        get_component("fusion", "missing")
    with fails_with("plan.unusable_component"):
        get_components("fusion")


def test_without_the_package_the_plan_is_refused(folder: Path) -> None:
    assert 'unknown fusion "tripled"' in refusal(folder, '{ fusion = "tripled" }')


def test_names_that_mean_code() -> None:
    def code(name: str) -> tuple[Any, Any]:
        return plugins.is_file(name), plugins.is_code(name)

    assert code("my_rules.py:f") == code("../a b/my_rules.py:f") == (True, True)
    assert code("flwr.serverapp.strategy:Krum") == code("flwr:Krum") == (False, True)
    assert code("mean") == code("flwrx.strategy:Krum") == code("my_rules.py") == code("my_rules.py:") == (False, False)
