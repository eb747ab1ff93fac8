from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotune.errors import PlanError
from cotune.plan.load import dump_plan, load_plan, parse_plan, preset_names, preset_text
from cotune.plan.plan import Plan
from cotune.privacy.config import RecordPrivacy
from tests.support.failures import fails_with

STAGED = """
[[train]]
mode = "head"
rounds = 2
[[train]]
mode = "lora"
rounds = 3
local = { steps = 4 }
[model]
base = "some/encoder"
[data]
source = "records.csv"
"""


@pytest.fixture
def staged(tmp_path: Path) -> Path:
    file = tmp_path / "staged.toml"
    file.write_text(STAGED)
    return file


def refusal(*overrides: str, source: str | Path = "text") -> str:
    """The one sentence with which a plan is refused."""
    with pytest.raises(PlanError) as caught:
        load_plan(source, overrides)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert "pydantic" not in sentence
    return sentence


def at(plan: Plan, key: str) -> Any:
    here: Any = plan
    for part in key.split("."):
        here = here[int(part)] if isinstance(here, tuple) else getattr(here, part)
    return here


# --- where a plan comes from


def test_there_are_presets() -> None:
    assert {"text", "tweets"} <= set(preset_names())


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_a_plan_under_its_own_name(name: str) -> None:
    plan = load_plan(name)
    assert plan.name == name
    assert isinstance(plan.privacy, RecordPrivacy)  # nobody loses privacy by starting from an example
    assert parse_plan(tomllib.loads(preset_text(name))) == plan
    assert "#" in preset_text(name)


def test_the_default_is_tweets() -> None:
    assert load_plan() == load_plan("tweets")


def test_a_file_is_named_after_itself_unless_it_has_a_name(tmp_path: Path, staged: Path) -> None:
    assert load_plan(staged).name == load_plan(str(staged)).name == "staged"
    named = tmp_path / "other.toml"
    named.write_text(f'name = "mine"\n{STAGED}')
    assert load_plan(named).name == "mine"


def test_an_unknown_preset() -> None:
    known = ", ".join(preset_names())
    assert refusal(source="tweet") == f"there is neither a preset nor a file \"tweet\"; did you mean 'tweets'? Known: {known}"
    with fails_with("plan.unknown_preset"):
        preset_text("../presets/tweets")


def test_a_missing_file(tmp_path: Path) -> None:
    assert f"the plan {tmp_path / 'gone.toml'} does not exist: expected a TOML file" in refusal(source=tmp_path / "gone.toml")


@pytest.mark.parametrize("content", [b"rounds = ", b"[model\n", b"rounds = 1\nrounds = 2\n", b'{"rounds": 1}'])
def test_a_file_that_is_no_toml(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "plan.toml"
    file.write_bytes(content)
    assert f"{file} is not valid TOML (" in refusal(source=file)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_bytes(b'name = "\xff"')
    assert "cannot be read" in refusal(source=tmp_path / "plan.toml")
    assert "cannot be read" in refusal(source=tmp_path)


def test_a_plan_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text("")
    assert refusal(source=tmp_path / "plan.toml") == 'the plan lacks "model": expected it to be given'


# --- overrides


def test_overrides_of_every_kind() -> None:
    plan = load_plan(
        "text",
        [
            "privacy.epsilon=3",
            "local.optimizer = adamw",
            "model.base=./my model",
            'labels=["so", "good"]',
            "strategy.fusion=mean",
            "strategy.server_optimizer={name='sgd', lr=0.5}",
            "data.deduplicate=true",
            'data.text="7"',
            "data.label=a=b",
        ],
    )
    assert isinstance(plan.privacy, RecordPrivacy)
    assert plan.privacy.epsilon == 3
    assert plan.local.optimizer == "adamw"
    assert plan.model.base == "./my model"
    assert plan.labels == ("so", "good")
    assert plan.strategy.server_optimizer.parameters["lr"] == 0.5
    assert plan.data.deduplicate
    assert plan.data.text == "7"
    assert plan.data.label == "a=b"


def test_the_last_override_counts() -> None:
    assert load_plan("text", ["rounds=3", "rounds=4"]).rounds == 4


def test_privacy_can_be_left_out_and_taken_up_again() -> None:
    assert load_plan("text", ["privacy=none"]).privacy == "none"
    assert load_plan("text", ["privacy=none", "privacy.epsilon=2"]).privacy == RecordPrivacy(epsilon=2)


def test_a_stage_is_overridden_by_its_number(staged: Path) -> None:
    plan = load_plan(staged, ["train.1.local.steps=9", "train.0.rounds=5", "local.learning_rate=0.125"])
    assert [(s.rounds, s.local.steps, s.local.learning_rate) for s in plan.stages] == [(5, 20, 0.125), (3, 9, 0.125)]
    assert plan.rounds == 8
    assert load_plan(staged, ["train=full", "rounds=2"]).stages[0].mode == "full"
    assert load_plan(staged, ["train.0={mode='full', rounds=1}"]).stages[0].mode == "full"


@pytest.mark.parametrize("text", ["privacy.epsilon", "=3", "privacy..epsilon=3", ".seed=3", " =3", ""])
def test_an_override_without_key_or_value(text: str) -> None:
    assert refusal(text).startswith(f'the override "{text}" is not understood: expected key=value')


@pytest.mark.parametrize("text", ["train.2.rounds=1", "train.-1.rounds=1", "train.first.rounds=1", "train.2=head"])
def test_a_stage_that_is_not_there(staged: Path, text: str) -> None:
    assert "expected a number from 0 to 1" in refusal(text, source=staged)


def test_a_stage_of_a_plan_without_stages() -> None:
    assert "train" in refusal("train.0.rounds=3")


NUMBERS: dict[str, st.SearchStrategy[Any]] = {
    "seed": st.integers(0, 2**31 - 1),
    "rounds": st.integers(1, 100_000),
    "validation_fraction": st.floats(0, 1, exclude_max=True),
    "strategy.weighting.cap": st.integers(0, 10**6),
    "strategy.server_optimizer.lr": st.floats(0, 1e3, exclude_min=True),
    "strategy.server_optimizer.warmup": st.integers(0, 10**6),
    "strategy.server_optimizer.momentum": st.floats(0, 1, exclude_max=True),
    "test_fraction": st.floats(0, 1, exclude_min=True, exclude_max=True),
    "keep_checkpoints": st.integers(0, 10**5),
    "model.max_length": st.integers(2, 32768),
    "lora.rank": st.integers(1, 512),
    "lora.alpha": st.floats(0, 4096, exclude_min=True),
    "lora.layers": st.integers(1, 1000),
    "local.learning_rate": st.floats(0, 1e3, exclude_min=True),
    "local.head_learning_rate": st.floats(0, 1e3, exclude_min=True),
    "local.momentum": st.floats(0, 1, exclude_max=True),
    "local.weight_decay": st.floats(0, 10),
    "local.base_decay": st.floats(0, 10),
    "local.dropout": st.just(0.0),  # above that not with train = head, as here
    "local.batch_size": st.one_of(st.floats(0, 1, exclude_min=True, exclude_max=True), st.integers(1, 10**6)),
    "local.steps": st.integers(1, 10**5),
    "local.physical_batch_size": st.one_of(st.integers(1, 65_536), st.just("auto")),
    "privacy.epsilon": st.floats(0, 100, exclude_min=True),
    "privacy.delta": st.floats(0, 1, exclude_min=True, exclude_max=True),
    "privacy.clip_norm": st.floats(1e-6, 1e3),
    "server.sample_rate": st.floats(0, 1, exclude_min=True),
    "server.sample_size": st.integers(0, 10**6),
    "server.quorum": st.floats(0, 1, exclude_min=True),
    "server.over_selection": st.just(0.0),  # more of it needs sample_size: test_schema
    "server.timeout_factor": st.floats(0, 1e6),
    "server.min_timeout_seconds": st.floats(0, 2e6, exclude_min=True),
    "server.absent_seconds": st.floats(0, 2e6),
    "server.wait_seconds": st.floats(0, 2e6),
    "server.approval_seconds": st.floats(0, 2e6),
    "server.max_staleness": st.integers(1, 100),
    "server.max_examples": st.integers(1, 10**9),
    "server.strikes": st.integers(0, 10**5),
    "server.deadline_seconds": st.floats(0, 2e6, exclude_min=True),
    "server.max_accuracy_drop": st.floats(0, 1, exclude_min=True),
    "server.max_update_norm": st.floats(0, 1e6, exclude_min=True),
    "personal.pull": st.floats(0, 1e3),
    "personal.inner_steps": st.integers(1, 100_000),
    "personal.move": st.floats(0, 1, exclude_min=True),
    "public.answers": st.integers(0, 10**7),
    "public.max_score": st.floats(0, 100, exclude_min=True),
    "public.temperature": st.floats(0, 100, exclude_min=True),
    "public.learning_rate": st.floats(0, 10, exclude_min=True),
    "public.epochs": st.integers(1, 1000),
    "public.batch_size": st.integers(1, 65_536),
    "personalize.folds": st.integers(2, 20),
    "simulation.clients": st.integers(1, 10_000),
    "simulation.min_examples": st.integers(1, 10**6),
}


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(NUMBERS)).flatmap(lambda key: st.tuples(st.just(key), NUMBERS[key])))
def test_any_number_that_is_allowed_comes_through(chosen: tuple[str, Any]) -> None:
    """Through the override, the dump, and back: the same value and the same plan."""
    key, value = chosen
    plan = load_plan("text", [f"{key}={value!r}"])
    assert at(plan, key) == value
    again = parse_plan(tomllib.loads(dump_plan(plan)))
    assert at(again, key) == value
    assert again.plan_id == plan.plan_id
    default = load_plan("text")
    assert (plan.plan_id == default.plan_id) == (at(default, key) == value)


def test_every_number_of_a_plan_is_among_them() -> None:
    """A new knob is not forgotten above."""

    def numbers(value: Any, prefix: str = "") -> set[str]:
        if isinstance(value, dict):
            return {key for name, v in value.items() for key in numbers(v, f"{prefix}{name}.")}
        return {prefix[:-1]} if isinstance(value, int | float) and not isinstance(value, bool) else set()

    found = numbers(load_plan("text").model_dump())
    assert {key.replace("simulation.pooled.", "local.") for key in found} <= set(NUMBERS)


# --- mistakes


@pytest.mark.parametrize(
    ("override", "key", "meant"),
    [
        ("round=3", "round", "rounds"),
        ("privcy.epsilon=3", "privcy", "privacy"),
        ("privacy.epsilom=3", "privacy.epsilom", "epsilon"),
        ("local.lerning_rate=1", "local.lerning_rate", "learning_rate"),
        ("lora.rnk=2", "lora.rnk", "rank"),
        ("data.texts=a", "data.texts", "text"),
        ("model.bas=a", "model.bas", "base"),
        ("server.qorum=1", "server.qorum", "quorum"),
        ("strategy.fusin=mean", "strategy.fusin", "fusion"),
        ("simulation.client=3", "simulation.client", "clients"),
        ("simulation.pooled.step=3", "simulation.pooled.step", "steps"),
    ],
)
def test_an_unknown_key_names_the_nearest(override: str, key: str, meant: str) -> None:
    assert f"unknown key \"{key}\"; did you mean '{meant}'? Known: " in refusal(override)


@pytest.mark.parametrize(
    ("override", "key", "meant"),
    [
        ("train.1.mod=head", "train.1.mod", "mode"),
        ("train.1.local.step=3", "train.1.local.step", "steps"),
        ("train.0.freeze_embedding=true", "train.0.freeze_embedding", "freeze_embeddings"),
        ("local.step=3", "local.step", "steps"),
    ],
)
def test_an_unknown_key_in_a_stage_names_the_nearest(staged: Path, override: str, key: str, meant: str) -> None:
    assert f"unknown key \"{key}\"; did you mean '{meant}'? Known: " in refusal(override, source=staged)


def test_an_unknown_key_like_no_other() -> None:
    sentence = refusal("zzz=3")
    assert 'unknown key "zzz". Known: ' in sentence
    assert "privacy" in sentence


@pytest.mark.parametrize(
    ("override", "shown", "expected"),
    [
        ("rounds=0", "rounds = 0", "greater than or equal to 1"),
        ("rounds=many", 'rounds = "many"', "integer"),
        ("rounds=2.5", "rounds = 2.5", "integer"),
        ("seed=-1", "seed = -1", "greater than or equal to 0"),
        ("train=heads", 'train = "heads"', "'head', 'lora', 'blocks' or 'full'"),
        ("name=with space", 'name = "with space"', "pattern"),
        (
            "task=clustering",
            'task = "clustering"',
            "'sequence-classification', 'token-classification', 'image-classification', 'multi-label', 'regression'",
        ),
        ("labels=3", "labels = 3", "expected a list"),
        ("test_fraction=1", "test_fraction = 1", "less than 1"),
        ("privacy=nne", 'privacy = "nne"', "'none'"),
        ("privacy.epsilon=0", "privacy.epsilon = 0", "greater than 0"),
        ("privacy.epsilon=101", "privacy.epsilon = 101", "less than or equal to 100"),
        ("privacy.epsilon=lots", 'privacy.epsilon = "lots"', "number"),
        ("privacy.delta=1/n^0.5", 'privacy.delta = "1/n^0.5"', '"1/n^p" with p >= 1'),
        ("privacy.delta=2", "privacy.delta = 2", "0 < delta < 1"),
        ("privacy.mode=user", 'privacy.mode = "user"', "'record'"),
        ("local.optimizer=sdg", 'local.optimizer = "sdg"', "'sgd', 'adam' or 'adamw'"),
        ("local.batch_size=1.5", "local.batch_size = 1.5", "a whole number of records, or a fraction below 1"),
        ("local.physical_batch_size=0", "local.physical_batch_size = 0", 'a whole number from 1 to 65,536, or "auto"'),
        ("local.physical_batch_size=1.5", "local.physical_batch_size = 1.5", 'a whole number from 1 to 65,536, or "auto"'),
        ("local.physical_batch_size=atuo", 'local.physical_batch_size = "atuo"', 'a whole number from 1 to 65,536, or "auto"'),
        ("local.physical_batch_size=true", "local.physical_batch_size = true", 'a whole number from 1 to 65,536, or "auto"'),
        ("local=3", "local = 3", "expected a table"),
        ("model.pooling=max", 'model.pooling = "max"', "'auto', 'mean' or 'native'"),
        ("lora.targets=all", 'lora.targets = "all"', "auto"),
        ("lora.method=dora", 'lora.method = "dora"', "expected lora or rslora: DoRA divides by the norm of the adapted weight"),
        ("lora.method=AdaLoRA", 'lora.method = "AdaLoRA"', "expected lora or rslora: AdaLoRA prunes ranks"),
        ("lora.method=lorra", 'lora.method = "lorra"', "'lora' or 'rslora'"),
        ("lora.layers=0", "lora.layers = 0", "greater than or equal to 1"),
        ("data.encoding=utf-88", 'data.encoding = "utf-88"', "expected one such as utf-8"),
        ("data.deduplicate=perhaps", 'data.deduplicate = "perhaps"', "boolean"),
        ("data.source=''", 'data.source = ""', "at least 1 character"),
        ('simulation.baselines=["alone", "joint"]', 'simulation.baselines.1 = "joint"', "'alone', 'pooled', 'plain' or 'single'"),
        ("server.quorum=2", "server.quorum = 2", "less than or equal to 1"),
    ],
)
def test_wrong_value_is_shown_with_key_and_expectation(override: str, shown: str, expected: str) -> None:
    sentence = refusal(override)
    assert f"the plan has {shown}: " in sentence
    assert expected in sentence


@pytest.mark.parametrize(
    ("override", "shown", "expected"),
    [
        ("train.0.rounds=0", "train.0.rounds = 0", "greater than or equal to 1"),
        ("train.1.mode=lra", 'train.1.mode = "lra"', "'head', 'lora', 'blocks' or 'full'"),
        ("train.1.local.steps=0", "train.1.local.steps = 0", "greater than or equal to 1"),
        ("local.momentum=1", "local.momentum = 1", "less than 1"),
        ("train.0=head", 'train.0 = "head"', "expected a table"),
    ],
)
def test_a_wrong_value_in_a_stage(staged: Path, override: str, shown: str, expected: str) -> None:
    sentence = refusal(override, source=staged)
    assert f"the plan has {shown}: " in sentence
    assert expected in sentence


def test_a_stage_that_lacks_its_mode(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(STAGED.replace('mode = "head"\n', ""))
    assert refusal(source=tmp_path / "plan.toml") == 'the plan lacks "train.0.mode": expected it to be given'


@pytest.mark.parametrize("key", [key for key in NUMBERS if key not in ("seed", "rounds", "keep_checkpoints")])
@pytest.mark.parametrize("value", ["inf", "nan", "-1"])
def test_no_number_is_infinite_undefined_or_negative(key: str, value: str) -> None:
    sentence = refusal(f"{key}={value}")
    assert key in sentence or (key.startswith("strategy.") and f"has {key.rpartition('.')[2]} = " in sentence)


@pytest.mark.parametrize("key", ["privacy.epsilon", "privacy.clip_norm", "rounds", "local.steps"])
def test_a_truth_value_is_no_number(key: str) -> None:
    assert f"the plan has {key} = " in refusal(f"{key}=true")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("strategy.fusion=men", "unknown fusion \"men\"; did you mean 'mean'?"),
        ("strategy.weighting=example", "unknown weighting \"example\"; did you mean 'examples'?"),
        ("strategy.server_optimizer=sdg", "unknown server optimizer \"sdg\"; did you mean 'sgd'?"),
        ("strategy.server_optimizer={name='sgd', rate=1}", 'server optimizer "sgd" has no parameter "rate"'),
        ("strategy.server_optimizer=3", "strategy.server_optimizer"),
        ("strategy.fusion=[1]", "strategy.fusion"),
    ],
)
def test_parts_of_a_strategy(override: str, expected: str) -> None:
    assert expected in refusal(override)


@pytest.mark.parametrize("short", ['"ditto"', '["head"]'])
def test_a_key_within_a_short_form_leaves_the_rest(short: str) -> None:
    """Else `--set personal.order=…` would make a plan with personal parts one without."""
    whole = load_plan("tweets", ["train=lora", "model.feature=none", f"personal={short}"])
    changed = load_plan("tweets", ["train=lora", "model.feature=none", f"personal={short}", "personal.pull=0.5"])
    assert changed.personal == whole.personal.model_copy(update={"pull": 0.5})
    assert changed.personal.parts == whole.personal.parts
    assert whole.personal != load_plan("tweets").personal
