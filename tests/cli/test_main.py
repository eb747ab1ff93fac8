"""An option or a key that does not exist: what may have been meant is looked for among all keys, in every command with --set."""

from __future__ import annotations

from typing import Any

import click
import pytest

from cotune.cli.main import build_command
from tests.support.console import Cotune


def commands(command: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], click.Command]]:
    if hasattr(command, "commands"):
        return [each for name, inner in command.commands.items() for each in commands(inner, (*path, name))]
    return [(path, command.load())]


TAKE_SET = [
    path
    for path, command in commands(build_command())
    if any("--set" in option.opts and "KEY=VALUE" in str(option.metavar) for option in command.params)
]


def test_there_are_such_commands() -> None:
    assert {("simulate",), ("plan", "check"), ("compare",), ("audit",), ("server", "init"), ("server", "run")} <= set(TAKE_SET)


@pytest.mark.parametrize("path", TAKE_SET, ids=" ".join)
@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (("--epsilon", "3"), "--set privacy.epsilon=3"),
        (("--epsilon=3",), "--set privacy.epsilon=3"),
        (("--privacy.epsilon", "3"), "--set privacy.epsilon=3"),
        (("--clip-norm", "0.5"), "--set privacy.clip_norm=0.5"),
        (("--learning-rat", "2"), "--set local.learning_rate=2"),
    ],
    ids=" ".join,
)
def test_an_option_that_is_a_key_is_written_out(cotune: Cotune, path: tuple[str, ...], given: Any, meant: str) -> None:
    shown = cotune(*path, *given)
    assert (shown.code, shown.out) == (2, "")
    assert meant in shown.err
    assert "--partition" not in shown.err


def test_options_that_are_alike_come_before_keys_that_are_alike(cotune: Cotune) -> None:
    shown = cotune("simulate", "--client", "3")
    assert "did you mean --clients" in shown.err
    assert "--set" not in shown.err


def test_a_rule_of_the_policy_is_looked_for_where_rules_are_set(cotune: Cotune) -> None:
    assert "--set budget.epsilon_per_run=5" in cotune("client", "policy", "site", "--epsilon-per-run", "5").err


def test_nothing_is_meant_where_nothing_is_alike(cotune: Cotune) -> None:
    for path in (("simulate",), ("strategies", "test", "mean"), ("client", "status", "site")):
        shown = cotune(*path, "--qwertz", "3")
        assert shown.code == 2
        assert "did you mean" not in shown.err


def test_a_key_with_a_slip_is_looked_for_in_all_tables(cotune: Cotune) -> None:
    assert "'privacy.epsilon'" in cotune("plan", "check", "toy.toml", "--set", "epsilom=3").err
    assert "'local.learning_rate'" in cotune("plan", "check", "toy.toml", "--set", "learnin_rate=3").err


def test_keys_and_what_they_mean_are_shown(cotune: Cotune) -> None:
    import json

    listed = json.loads(cotune("plan", "keys", "--json").out)
    shown = cotune("plan", "keys").out
    first_words = {line.split()[0] for line in shown.splitlines() if line.strip()}
    assert {key["name"] for key in listed} <= first_words
    explained = json.loads(cotune("plan", "explain", "epsilon", "--json").out)
    assert {"privacy.epsilon", "model.members.epsilon"} <= {key["name"] for key in explained}
    assert "--set privacy.epsilon=" in cotune("plan", "explain", "privacy.epsilon").out
    few = json.loads(cotune("plan", "keys", "privacy.epsilon", "--json").out)
    assert 0 < len(few) < 5
    assert cotune("plan", "keys", "qwertz").code == cotune("plan", "explain", "qwertz").code == 2
