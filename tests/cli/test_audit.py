"""`cotune audit`: the table, the verdict and its exit code, and what cannot be audited."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cotune.privacy.mechanisms.dp_sgd import DPSGD, DPSGDConfig
from cotune.simulations.auditing import training as audited_training
from tests.support.console import Cotune

PRIVATE = ("--set", "privacy={epsilon=3}", "--set", "simulation.baselines=[]")
FEW = ("--canaries", "64", "--confidence", "0.9999999")  # a right engine is not accused by bad luck


def sentence(err: str) -> str:
    assert err.startswith("cotune: ")
    assert err.count("\n") == 1
    return err


def test_the_bounds_stand_beside_the_claim(cotune: Cotune, folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    shown = cotune("audit", "toy.toml", *PRIVATE, *FEW)
    assert (shown.code, shown.err) == (0, "")
    assert re.search(r"^toy: org-1, 102 examples, all rounds, 6 steps, σ = \d\.\d{3}, ", shown.out, re.MULTILINE)
    for attack in ("canaries", "records"):
        row = re.search(rf"^{attack} +64 +(0\.\d+) +(\d\.\d\d) +(\d\.\d\d) +(\d\.\d\d)$", shown.out, re.MULTILINE)
        assert row, shown.out
        assert float(row[3]) <= float(row[4])
    assert re.search(r"claim: ε = (2\.9\d|3\.00) at δ = \d\.\d+", shown.out)
    assert "no contradiction: ε is " in shown.out
    assert "(99.99999 % confidence for all bounds together)" in shown.out
    assert "Nothing was released and no ledger was touched." in " ".join(shown.out.split())
    assert sorted(folder.rglob("*")) == before


def test_json_is_all_that_is_printed(cotune: Cotune) -> None:
    options = ("--organization", "org-2", "--rounds", "1", "--json")
    shown = cotune("audit", "toy.toml", *PRIVATE, *FEW, *options)
    found = json.loads(shown.out)
    assert (shown.code, found["schema"], found["broken"], found["memorization"]) == (0, 3, False, None)
    assert (found["organization"], found["rounds"], found["steps"], found["confidence"]) == ("org-2", 1, 3, 0.9999999)
    assert [attack["name"] for attack in found["attacks"]] == ["canaries", "records", "canaries, every step"]
    assert not found["tight"]
    assert found["at_least"] == max(max(a["at_least"], a["at_least_any"]) for a in found["attacks"])
    assert found["at_least"] <= found["epsilon"] < 3


def test_tight_audits_one_step_of_all_records(cotune: Cotune) -> None:
    shown = cotune("audit", "toy.toml", *PRIVATE, *FEW, "--tight", "--json")
    found = json.loads(shown.out)
    assert (shown.code, found["tight"], found["steps"], found["rounds"]) == (0, True, 1, 1)
    assert 2.9 < found["epsilon"] <= 3


def test_a_broken_claim_is_exit_code_1(cotune: Cotune, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_noise(config: DPSGDConfig) -> DPSGD:
        return DPSGD(replace(config, noise_multiplier=0.0))

    monkeypatch.setattr(audited_training, "DPSGD", without_noise)
    options = ("--set", "privacy={epsilon=1}", "--set", "rounds=1", "--canaries", "500")
    shown = cotune("audit", "toy.toml", *options)
    assert (shown.code, shown.err) == (1, "")
    said = " ".join(shown.out.split())
    assert re.search(r"The claim is broken: this training spends ε of \d+\.\d\d at least", said)
    assert "no contradiction" not in said
    assert cotune("audit", "toy.toml", *options, "--json").code == 1


def test_a_run_is_audited_as_it_was(cotune: Cotune) -> None:
    assert cotune("simulate", "toy.toml", *PRIVATE, "--out", "run").code == 0
    shown = cotune("audit", "run", "--organization", "org-2", *FEW)
    assert (shown.code, shown.err) == (0, "")
    assert "toy: org-2, 101 examples, all rounds, 6 steps" in shown.out
    assert "a run is audited as it was: --set is for plans" in sentence(cotune("audit", "run", "--set", "rounds=1").err)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["toy.toml"], "the plan says privacy = none: expected one that claims an ε"),
        (["toy.toml", *PRIVATE, "--organization", "org-9"], 'there is no organization "org-9"'),
        (["toy.toml", *PRIVATE, "--rounds", "3"], "expected 1 to 2 rounds to audit, as many as the plan has, got 3"),
        (["toy.toml", *PRIVATE, "--confidence", "1"], "expected a confidence below 1"),
        (["toy.toml", *PRIVATE, "--confidence", "nan"], "expected a confidence below 1"),
        (["toy.toml", *PRIVATE, "--sentences", "31"], "expected --sentences 0, or at least 32, got 31"),
        (["toy.toml", *PRIVATE, "--tight", "--rounds", "1"], "--tight audits one step in each stage of the plan"),
        (["tweet"], "did you mean 'tweets'?"),
        ([".", *PRIVATE], "holds records and is no plan"),
    ],
)
def test_what_cannot_be_audited_is_one_sentence(cotune: Cotune, arguments: list[str], words: str) -> None:
    shown = cotune("audit", *arguments)
    assert shown.code == 2
    assert words in sentence(shown.err)


def test_without_the_extra_it_says_what_to_install(cotune: Cotune, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jax_privacy", None)
    shown = cotune("audit", "toy.toml", *PRIVATE)
    assert shown.code == 2
    assert 'install it by pip install "cotune[audit]"' in sentence(shown.err)
