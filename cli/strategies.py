"""`cotune strategies`: list and describe components and recipes, and create and check custom rules.

This module also generates the tables of docs/strategies.md from the declarations of cotune's components.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from cotune.cli.console import open_console, print_json
from cotune.cli.options import AsJson
from cotune.errors import PlanError
from cotune.plan.load import parse_value
from cotune.reporting.pages import render_text
from cotune.storage.files import atomic_write
from cotune.strategies import catalog as catalog
from cotune.strategies import plugins
from cotune.strategies.own_rule_hints import find_own_name
from cotune.strategies.plugins import is_code
from cotune.strategies.registry import FOLDERS, get_kind_label

if TYPE_CHECKING:
    import click

    from cotune.strategies.conformance.checks import Finding
    from cotune.strategies.registry import ComponentInfo, Kind


_MARK = "<!-- From here on the page is written by `cotune strategies --page docs/strategies.md`. -->"
_HEADINGS = {
    "weighting": "Weightings",
    "fusion": "Fusions",
    "server_optimizer": "Server optimizers",
    "client_term": "Client terms",
}


def renewed(page: str) -> str:
    """The page with new tables below its mark; what stands above it is kept."""
    return "\n".join([page.partition(_MARK)[0].rstrip(), "", _MARK, "", *_tables()]).rstrip() + "\n"


def _tables() -> Iterator[str]:
    yield from ("## Strategies by name", "")
    yield from _table(
        ("name", "parts", "adapters", "the server sees", "record-level ε", "client-level ε", "source"),
        [_recipe(recipe) for recipe in catalog.list_recipes()],
    )
    parts = catalog.list_components(installed=False)
    for kind, heading in _HEADINGS.items():
        found = [part for part in parts if part["kind"] == kind]
        if found:
            yield from ("", f"## {heading}", "")
            columns = ("name", "what it does", "parameters", "the server sees", "organizations send", "they keep")
            yield from _table((*columns, "record-level ε", "client-level ε", "source"), [_part(part) for part in found])


def _recipe(recipe: dict[str, Any]) -> Sequence[str]:
    adapters = ", ".join(f"{key} = {value}" for key, value in recipe["lora"].items())
    return (f"`{recipe['name']}`", recipe["summary"], adapters, recipe["sees"], *_privacy(recipe), "; ".join(recipe["cite"]))


def _part(part: dict[str, Any]) -> Sequence[str]:
    parameters = "; ".join(_parameter(p) for p in part["parameters"])
    sends = ", ".join(part["sends"])
    return (f"`{part['name']}`", part["summary"], parameters, part["sees"], sends, part["state"], *_privacy(part), part["cite"])


def _parameter(parameter: dict[str, Any]) -> str:
    default = "" if parameter["required"] else f" = {json.dumps(parameter['default'], ensure_ascii=False)}"
    bounds = f", {parameter['bounds']}" if parameter["bounds"] else ""
    return f"`{parameter['name']}{default}` ({parameter['type']}{bounds})"


def _privacy(part: dict[str, Any]) -> Sequence[str]:
    return part["record_privacy"].partition(":")[0], part["client_privacy"].partition(":")[0]


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for row in (headings, ["---"] * len(headings), *rows):
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"


_PAGE_HEADINGS = {
    "recipe": "strategies",
    "weighting": "weightings",
    "fusion": "fusions",
    "server_optimizer": "server optimizers",
    "client_term": "client terms",
}


class _Named(TyperGroup):
    """`cotune strategies fedavg` is `cotune strategies show fedavg`."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        return super().resolve_command(ctx, args if args[0] in self.commands else ["show", *args])


app = typer.Typer(
    add_completion=False,
    cls=_Named,
    subcommand_metavar="[NAME | COMMAND]",
    help="List strategies and their parts, explain one by NAME, start and check one of your own.",
)


@app.callback(invoke_without_command=True)
def overview(
    context: typer.Context,
    as_json: AsJson = False,
    page: Annotated[Path | None, typer.Option(help="Renew the tables in this page of the documentation.")] = None,
) -> None:
    """List all strategies and parts; with a NAME, explain it."""
    if context.invoked_subcommand is not None:
        return
    found = [*catalog.list_recipes(), *catalog.list_components()]
    if page is not None:
        _renew(page)
    elif as_json:
        print_json(found)
    else:
        _list(open_console(), found)


def _renew(page: Path) -> None:
    atomic_write(page, renewed(page.read_text(encoding="utf-8")).encode())


def _list(console: Console, found: list[dict[str, Any]]) -> None:
    for kind, heading in _PAGE_HEADINGS.items():
        of_kind = [part for part in found if part["kind"] == kind]
        if not of_kind:
            continue
        table = Table(box=None, header_style="bold", pad_edge=False)
        table.add_column(heading, no_wrap=True, min_width=max(len(part["name"]) for part in of_kind))  # it can be copied
        for column in ("", "the server sees", "record-level ε", "client-level ε"):
            table.add_column(column)
        for part in of_kind:
            privacy = (part["record_privacy"].partition(":")[0], part["client_privacy"].partition(":")[0])
            table.add_row(escape(part["name"]), escape(part["summary"]), part["sees"], *privacy)
        console.print(table, "", sep="\n")
    console.print(
        "record-level ε: free, it works on what is noised already; at a price, one more number is disclosed, with noise;"
    )
    console.print("no: it needs statistics without noise. client-level ε: whether [client_privacy] can be had with it")
    console.print("`cotune strategies NAME` explains one; `cotune strategies new my_rule` begins one of your own")


@app.command("show", hidden=True)
def show(
    name: Annotated[str, typer.Argument(help="A strategy or a part; my_rules.py:my_fusion.")], as_json: AsJson = False
) -> None:
    """Explain a strategy or a part, or a rule of your own such as my_rules.py:my_fusion."""
    _check_own_name(name)
    found = [catalog.describe_component(_page_part(name, None))] if is_code(name) else catalog.search(name)
    if as_json:
        print_json(found)
        return
    console = open_console()
    for part in found:
        _explain(console, part)


def _explain(console: Console, part: dict[str, Any]) -> None:
    kind = get_kind_label(part["kind"])
    console.print(f"[bold]{escape(part['name'])}[/bold], a {'strategy' if kind == 'recipe' else kind}", soft_wrap=True)
    for line in (part.get("description") or part["summary"]).splitlines():
        console.print(escape(line), soft_wrap=True)
    rows = {
        "source": "; ".join([part["cite"]] if isinstance(part["cite"], str) else part["cite"]),
        "the server sees": part["sees"],
        "organizations send": ", ".join(part["sends"]),
        "organizations receive": part.get("receives", ""),
        "organizations keep": part["state"],
        "adapters": ", ".join(f"lora.{key} = {value}" for key, value in part.get("lora", {}).items()),
        "record-level privacy": part["record_privacy"],
        "client-level privacy": part["client_privacy"],
        "needs": "; ".join(part.get("needs", ())),
    }
    table = Table(box=None, show_header=False, pad_edge=False)
    for heading, words in rows.items():
        if words:
            table.add_row(heading, escape(words))
    console.print(table)
    if part.get("parameters"):
        console.print(_parameters(part["parameters"]))
    console.print()


def _parameters(parameters: list[dict[str, Any]]) -> Table:
    table = Table("parameter", "type", "default", "bounds", box=None, header_style="bold", pad_edge=False)
    for p in parameters:
        default = "must be given" if p["required"] else json.dumps(p["default"], ensure_ascii=False)
        table.add_row(p["name"], escape(p["type"]), escape(default), p["bounds"])
    return table


@app.command("new")
def new(
    name: Annotated[str, typer.Argument(help="Of the rule: a Python name, such as my_fusion.")],
    kind: Annotated[Literal["fusion", "weighting", "server_optimizer"], typer.Option(help="What the rule is.")] = "fusion",
    out: Annotated[Path | None, typer.Option(help="The file to write; default: NAME.py.")] = None,
) -> None:
    """Start a rule of your own: a file with the rule, and a test that runs the conformance checks."""
    file = out or Path(f"{name}.py")
    test = file.with_name(f"test_{file.stem}.py")
    if not name.isidentifier() or not file.stem.isidentifier() or file.suffix != ".py":
        raise PlanError(
            f'expected a Python name and a file such as my_rules.py, got "{name}" and {file}', code="plan.invalid_rule_name"
        )
    taken = [path for path in (file, test) if path.exists()]
    if taken:
        raise PlanError(f"{taken[0]} exists already: expected another --out, as nothing is overwritten", code="plan.file_exists")
    words = {"name": name, "file": file.name, "module": file.stem, "test": test.name}
    file.write_text(render_text(f"rules/{kind}.py.j2", **words), encoding="utf-8")
    test.write_text(render_text("rules/test.py.j2", **words), encoding="utf-8")
    typer.echo(f"{file}: the rule; name it in a plan as {file.name}:{name}")
    typer.echo(f"{test}: its test; `cotune strategies test {file}:{name}` runs the same checks")


@app.command("test")
def check(
    name: Annotated[str, typer.Argument(help="my_rules.py:my_fusion, or the name of a part.")],
    kind: Annotated[
        Literal["weighting", "fusion", "server_optimizer", "client_term"] | None,
        typer.Option(help="What it is, where it does not say so itself."),
    ] = None,
    given: Annotated[list[str] | None, typer.Option("--set", metavar="PARAMETER=VALUE", help="A parameter; repeatable.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check that a part does what it declares; exits with 1 if it does not."""
    from cotune.strategies.conformance import check_component  # loads PyTorch

    _check_own_name(name)
    info = _page_part(name, kind)
    parameters = {key.strip(): parse_value(value) for key, _, value in (text.partition("=") for text in given or [])}
    try:
        findings = check_component(info, parameters)
    except ValueError as error:
        raise PlanError(str(error), code="plan.invalid_part") from None
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        _show_findings(open_console(), info, findings)
    if not all(finding.passed for finding in findings):
        raise typer.Exit(1)


def _check_own_name(name: str) -> None:
    """Raises PlanError for the name of a rule without that of its file."""
    if found := find_own_name(name, Path()):
        raise PlanError(
            f'there is neither a strategy nor a part "{name}": a rule in a file is named with its file, as "{found}"',
            code="plan.unknown_part",
        )


def _page_part(name: str, kind: Kind | None) -> ComponentInfo:
    """The part of that name, or in that file or package."""
    if plugins.is_file(name):
        found = plugins.load_object(name, plugins.register_file(name, Path()))
        info: ComponentInfo | None = getattr(found, "component", None)
        return plugins.component_from(kind or (info.kind if info else "fusion"), name, found)
    if plugins.is_code(name):
        return plugins.load_code("fusion", name, "")
    if name.endswith(".py"):
        raise PlanError(
            f"{name} is a file: expected the name of the rule in it, too, such as {name}:{Path(name).stem}",
            code="plan.incomplete_rule_name",
        )
    of_name = [k for k in ([kind] if kind else FOLDERS) if name in plugins.get_components(k)]
    try:
        return plugins.get_component(of_name[0] if of_name else kind or "fusion", name)
    except ValueError as error:
        raise PlanError(str(error), code="plan.unknown_part") from None


def _show_findings(console: Console, info: ComponentInfo, findings: list[Finding]) -> None:
    kind = get_kind_label(info.kind)
    console.print(f"[bold]{escape(info.name)}[/bold], a {kind}")
    table = Table("", "check", "what is wrong", box=None, header_style="bold", pad_edge=False)
    for finding in findings:
        table.add_row("[green]✓[/green]" if finding.passed else "[bold red]✗[/bold red]", finding.name, escape(finding.detail))
    console.print(table)
    wrong = sum(not finding.passed for finding in findings)
    console.print(f"{wrong} of {len(findings)} checks failed" if wrong else f"all {len(findings)} checks passed")
