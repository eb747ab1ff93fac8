from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from cotune.errors import PlanError
from cotune.privacy.policy import BudgetRules, DisclosureRules, Policy, TrainingRules, change_policy, dump_policy, read_policy


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "policy.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_the_defaults_are_strict() -> None:
    policy = Policy()
    assert policy.training.record_privacy
    assert policy.training.base_models == ()
    assert "full" not in policy.training.train_modes
    assert policy.budget.epsilon_per_run <= 3 < policy.budget.epsilon_total <= 8
    assert policy.disclosures.example_count == "noised"
    assert policy.disclosures.declared_examples is None
    assert policy.budget.largest_delta(1000) == pytest.approx(1e-4)
    assert (policy.disclosures.local_metrics, policy.disclosures.label_histogram, policy.disclosures.local_loss) == (
        "none",
        "none",
        "none",
    )
    assert not policy.disclosures.statistics
    assert (policy.training.fusions, policy.training.client_terms) == (("mean", "robust"), ())


def test_an_empty_file_is_the_strict_default(tmp_path: Path) -> None:
    assert read_policy(written(tmp_path, "")) == Policy()


@pytest.mark.parametrize(
    "policy",
    [
        Policy(),
        Policy.permissive(),
        Policy.permissive(0.5),
        Policy(
            budget=BudgetRules(own_epsilon=1.5, delta_total=1e-6),
            training=TrainingRules(base_models=("ab" * 32,), max_gpu_memory_gib=11.5),
            disclosures=DisclosureRules(example_count="noised", noise_multiplier=7.0),
        ),
    ],
)
def test_a_dumped_policy_reads_the_same(tmp_path: Path, policy: Policy) -> None:
    assert read_policy(written(tmp_path, dump_policy(policy))) == policy


def test_every_rule_is_explained() -> None:
    text = dump_policy(Policy())
    rules: dict[str, Any] = Policy().model_dump()
    for table, entries in rules.items():
        assert f"[{table}]" in text
        for rule in entries:
            line = next(line for line in text.splitlines() if line.removeprefix("# ").startswith(f"{rule} ="))
            assert len(line.split("  # ")[1]) > 10
    assert tomllib.loads(text)["training"]["fusions"] == ["mean", "robust"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[budget]\nepsilom_total = 3", "unknown key \"budget.epsilom_total\"; did you mean 'epsilon_total'?"),
        ("[bugdet]\nepsilon_total = 3", "unknown key \"bugdet\"; did you mean 'budget'?"),
        ("[budget]\nepsilon_total = 0", "budget.epsilon_total = 0"),
        ("[budget]\nepsilon_total = true", "expected a number, got true"),
        ('[budget]\ndelta_total = "1/n^0.5"', 'expected a number or "1/n^p" with p >= 1'),
        ('[disclosures]\nexample_count = "all"', "disclosures.example_count"),
        ("[disclosures]\nnoise_multiplier = 0.1", "disclosures.noise_multiplier = 0.1"),
        ("budget = ", "cannot be read"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(PlanError) as raised:
        read_policy(written(tmp_path, text))
    assert said in str(raised.value)
    assert "policy" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("rule", "never", "possible"),
    [
        ("base_models", ["478fceba…"], ["0123456789abcdef" * 4]),
        ("base_models", ["478fceba"], ["*"]),
        ("tasks", ["seq"], ["sequence-classification"]),
        ("train_modes", ["heads"], ["head", "lora", "full"]),
    ],
)
def test_a_rule_that_no_plan_can_match_is_refused(rule: str, never: list[str], possible: list[str]) -> None:
    with pytest.raises(PlanError, match="can never match"):
        change_policy(Policy(), {f"training.{rule}": never})
    assert getattr(change_policy(Policy(), {f"training.{rule}": possible}).training, rule) == tuple(possible)


@pytest.mark.parametrize("examples", [1, 3, 7, 1000])
def test_a_delta_at_the_limit_is_allowed_in_any_rounding(examples: int) -> None:
    limit = 0.1 / examples
    assert limit < BudgetRules(delta_times_records=0.1).largest_delta(examples) < limit * (1 + 1e-8)
