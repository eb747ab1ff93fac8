"""`cotune client policy`: the rules of an organization, shown and changed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from cotune.client.site_folder import SiteFolder
from cotune.errors import PlanError
from cotune.plan.load import parse_value
from cotune.privacy.policy import Policy, change_policy, check_rules, dump_policy
from cotune.storage.files import atomic_write
from cotune.storage.toml_edit import edit_toml


def policy(
    site: Annotated[Path | None, typer.Argument(help="Show this site's policy; without one, the strict default.")] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", metavar="RULE=VALUE", help="Change a rule of the site's policy; repeatable.")
    ] = None,
) -> None:
    """Print a policy as TOML: the strict default or a site's own. With --set, change the site's."""
    settings = dict(_setting(text) for text in change or ())
    check_rules(settings)

    opened = None if site is None else SiteFolder(site.expanduser())
    before = Policy() if opened is None else opened.policy()
    if not change:
        typer.echo(dump_policy(before), nl=False)
        return
    if opened is None:
        raise PlanError(
            "--set changes the policy of a site, and none was given: expected its folder before it", code="plan.missing_site"
        )
    after = change_policy(before, {rule: parse_value(text) for rule, text in settings.items()})
    _write_policy(opened.policy_file, after, settings)
    for rule in settings:
        table, _, key = rule.partition(".")
        old, new = (getattr(getattr(one, table), key) for one in (before, after))
        typer.echo(f"{rule}: {_shown(old)} → {_shown(new)}")


def _write_policy(file: Path, policy: Policy, rules: Iterable[str]) -> None:
    """Write the new values of some rules; comments, order and formatting of the file stay."""
    if not file.exists():
        atomic_write(file, dump_policy(policy).encode())
        return
    values = policy.model_dump(mode="json")
    changes: dict[str, dict[str, Any]] = {}
    for name in rules:
        table, _, rule = name.partition(".")
        changes.setdefault(table, {})[rule] = values[table][rule]
    atomic_write(file, edit_toml(file.read_bytes().decode("utf-8-sig"), changes).encode())


def _setting(text: str) -> tuple[str, str]:
    rule, equals, value = text.partition("=")
    if not equals:
        raise PlanError(
            f'the setting "{text}" is not understood: expected rule=value, such as training.max_rounds=50',
            code="plan.malformed_override",
        )
    return rule.strip(), value


def _shown(value: object) -> str:
    return "absent" if value is None else json.dumps(value, ensure_ascii=False)
