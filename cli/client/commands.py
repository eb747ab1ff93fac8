"""The commands of `cotune client`: options, checks before PyTorch is loaded, and an early message of progress."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cotune.cli.console import announce
from cotune.cli.options import AsJson, SiteOptions, SitePath, with_options
from cotune.data.readers.sources import check_new, check_source

WantedPlan = Annotated[str, typer.Option("--plan", metavar="ID", help="First digits of a plan's id; default: the newest model.")]


def init(
    site: Annotated[Path, typer.Argument(help="The folder to make.")],
    name: Annotated[str, typer.Option(help="Of the organization, such as hospital-a.")],
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    key: Annotated[
        Path | None, typer.Option(help="A private key as `ssh-keygen -t ecdsa -b 384` makes it, to be copied.")
    ] = None,
) -> None:
    """Create an organization's site: a key pair, a strict policy and an empty ledger, readable by you alone."""
    announce(f"making {site}")
    from cotune.cli.client.join import create_site  # loads PyTorch

    create_site(site.expanduser(), name, device=device, key=None if key is None else key.expanduser())


@with_options(SiteOptions)
def check(
    site: SitePath,
    federation: Annotated[str, typer.Argument(help="The federation.toml that the coordinator gave you; or a plan, or a run.")],
    options: SiteOptions,
    offline: Annotated[bool, typer.Option("--offline", help="Do not try to connect.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what joining means here: policy, noise, ε, cost of one step, and whether the server admits you."""
    check_source(options.data)
    announce("loading PyTorch, then policy, records and base model; then one step on made-up records", quiet=as_json)
    from cotune.cli.client.check import check_site  # loads PyTorch

    check_site(site, federation, options, offline=offline, as_json=as_json)


@with_options(SiteOptions)
def join(
    site: SitePath,
    federation: Annotated[Path, typer.Argument(help="The federation.toml that the coordinator gave you.")],
    options: SiteOptions,
) -> None:
    """Approve the plan in a federation.toml, connect, and train when asked, until Ctrl-C or SIGTERM."""
    check_source(options.data)
    announce("loading PyTorch, then records and base model")
    from cotune.cli.client.join import join_federation  # loads PyTorch

    join_federation(site, federation, options)


def approve(
    site: SitePath,
    plan_id: Annotated[str, typer.Argument(help="The beginning of the plan's id; without it, the only plan that waits.")] = "",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Show a plan that arrived, or how it differs from the last approved one, and approve it."""
    from cotune.cli.client.approve import approve_plan  # loads PyTorch

    approve_plan(site, plan_id, asks=not yes)


def sent(
    site: SitePath,
    as_json: AsJson = False,
    verify: Annotated[bool, typer.Option("--verify", help="Check the signatures of requests and answers.")] = False,
    trail: Annotated[Path | None, typer.Option(help="Compare it with a run's trail.jsonl, from the coordinator.")] = None,
) -> None:
    """Show what was requested and what has left this organization; verify that the list was not altered."""
    from cotune.cli.client.sent import show_sent  # loads PyTorch

    show_sent(site, trail, verify=verify, as_json=as_json)


def ledger(
    site: SitePath,
    as_json: AsJson = False,
    export: Annotated[Path | None, typer.Option(help="Write everything that an auditor needs to this file, as JSON.")] = None,
) -> None:
    """Show the privacy budget that was spent, in total and by run, and what is left."""
    from cotune.cli.client.ledger import show_ledger  # loads PyTorch

    show_ledger(site, export, as_json=as_json)


def renew_key(site: SitePath) -> None:
    """Create a new key for the node; it replaces the present one once the coordinator accepts it."""
    from cotune.cli.client import keys  # loads PyTorch

    keys.renew_key(site)


def trust(
    site: SitePath,
    renewal: Annotated[Path, typer.Argument(metavar="FILE", help="The server-renewals.jsonl that the coordinator gave you.")],
) -> None:
    """Trust the server's new keys by a statement signed with the old ones, if no request brought one."""
    from cotune.cli.client.keys import trust_renewal  # loads PyTorch

    trust_renewal(site, renewal)


def adapt(
    site: SitePath,
    out: Annotated[Path | None, typer.Option(help="Folder of the adapted model; default: adapted/<plan> in the site.")] = None,
    plan: WantedPlan = "",
    as_json: AsJson = False,
) -> None:
    """Adapt the received model to the site's own records. Sends nothing and spends no ε."""
    announce("loading PyTorch, then the received model and own records", quiet=as_json)
    from cotune.cli.client.model import adapt_model  # loads PyTorch

    adapt_model(site, out, plan, as_json=as_json)


def evaluate(
    site: SitePath,
    data: Annotated[
        str | None,
        typer.Option(help="Labeled records that were in no run, in the columns of the site's own; default: a fifth of those."),
    ] = None,
    plan: WantedPlan = "",
    as_json: AsJson = False,
) -> None:
    """Compare the received model with training alone on own records. Sends nothing and spends no ε."""
    check_source(data)
    announce("loading PyTorch, then the received model and own records", quiet=as_json)
    from cotune.cli.client.model import evaluate_model  # loads PyTorch

    evaluate_model(site, data, plan, as_json=as_json)


def distill(
    site: SitePath,
    plan: Annotated[str, typer.Argument(help="A plan whose base model is the student: rounds, steps, rates, ε and δ.")],
    teachers: Annotated[list[str], typer.Argument(metavar="TEACHER...", help="Finished models with the plan's classes.")],
    out: Annotated[Path, typer.Option(help="Write the student to this new folder.")],
    teachers_released: Annotated[
        bool,
        typer.Option(
            "--teachers-released",
            help="Needed: you confirm that each teacher was trained with privacy and released, or on none of these records.",
        ),
    ] = False,
    label_weight: Annotated[float, typer.Option(min=0, max=1, help="Of the records' labels; the rest is the teachers'.")] = 0.5,
    as_json: AsJson = False,
) -> None:
    """Distill a model on the site's own records, by DP-SGD, charged to the ledger. Sends nothing."""
    if not teachers_released:
        raise typer.BadParameter(
            "what a teacher remembers of these records passes to the student, which ε does not cover: expected"
            " --teachers-released where each was trained with privacy and released, or on none of these records"
        )
    check_new(out.expanduser())
    announce("loading PyTorch, then records, student and teachers", quiet=as_json)
    from cotune.cli.client.distill import distill_on_site  # loads PyTorch

    distill_on_site(site, plan, teachers, out.expanduser(), label_weight, as_json=as_json)
