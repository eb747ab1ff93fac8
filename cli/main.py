"""`cotune`: the command line. A failure that the user can fix is one sentence and an exit code; --debug shows more."""

from __future__ import annotations

import json
import logging
import os
import sys
from importlib.metadata import version as installed_version
from typing import Annotated, NoReturn

import click
import typer

from cotune.cli.lazy_commands import LazyCommand, lazy_group
from cotune.cli.preparation_progress import Waiting
from cotune.errors import CotuneError, DeviceError
from cotune.models.local_events import observe_models
from cotune.printable import clean_output, printable

COMMANDS = {
    "simulate": ("cotune.cli.simulate:simulate", "Simulate a federation on this machine, and show whether joining pays off."),
    "compare": ("cotune.cli.compare:compare", "Run a grid of plans over several seeds and compare them. Resumable."),
    "audit": (
        "cotune.cli.audit:audit",
        "Measure a lower bound on the ε that training really spends; exits with 1 if it is above the claim.",
    ),
    "predict": (
        "cotune.cli.models.predict:predict",
        "Predict classes, labels or numbers, or write texts, with a fine-tuned model. Nothing is sent.",
    ),
    "evaluate": (
        "cotune.cli.models.evaluate:evaluate",
        "Evaluate a fine-tuned model on labeled records: metrics by class, calibration, entities. Nothing is sent.",
    ),
    "fuse": (
        "cotune.cli.models.fuse:fuse",
        "Fuse the predictions of several models, and compare the result with each of them. Nothing is sent.",
    ),
    "distill": (
        "cotune.cli.models.distill:distill",
        "Train a model to predict what others predict: big into small, or several into one. An interrupted one goes on.",
    ),
    "onnx": (
        "cotune.cli.models.onnx:onnx",
        "Write the head of a model on frozen layers as an ONNX file, which needs neither PyTorch nor cotune.",
    ),
    "strategies": (
        "cotune.cli.strategies:app",
        "List strategies and their parts, explain one by NAME, start and check one of your own.",
    ),
}
PLAN = {
    "new": ("cotune.cli.plans.plan:new", "Print a preset plan: `cotune plan new tweets > my.toml`."),
    "list": ("cotune.cli.plans.plan:names", "List the preset plans and what each is for."),
    "check": (
        "cotune.cli.plans.plan:check",
        "Forecast a plan: organizations, rounds, steps, noise, ε, bytes and time. Trains nothing.",
    ),
    "pin": (
        "cotune.cli.plans.plan:pin",
        "Print a plan with its base model's hashes: `cotune plan pin my.toml > pinned.toml`.",
    ),
    "keys": ("cotune.cli.plans.plan:keys", "List every key of a plan: its type, default, bounds and meaning."),
    "explain": ("cotune.cli.plans.plan:explain", "Explain what a key of a plan means and how to set it."),
}
CLIENT = {
    "init": (
        "cotune.cli.client.commands:init",
        "Create an organization's site: a key pair, a strict policy and an empty ledger, readable by you alone.",
    ),
    "check": (
        "cotune.cli.client.commands:check",
        "Show what joining means here: policy, noise, ε, cost of one step, and whether the server admits you.",
    ),
    "join": (
        "cotune.cli.client.commands:join",
        "Approve the plan in a federation.toml, connect, and train when asked, until Ctrl-C or SIGTERM.",
    ),
    "approve": (
        "cotune.cli.client.commands:approve",
        "Show a plan that arrived, or how it differs from the last approved one, and approve it.",
    ),
    "sent": (
        "cotune.cli.client.commands:sent",
        "Show what was requested and what has left this organization; verify that the list was not altered.",
    ),
    "ledger": (
        "cotune.cli.client.commands:ledger",
        "Show the privacy budget that was spent, in total and by run, and what is left.",
    ),
    "policy": (
        "cotune.cli.client.policy:policy",
        "Print a policy as TOML: the strict default or a site's own. With --set, change the site's.",
    ),
    "renew-key": (
        "cotune.cli.client.commands:renew_key",
        "Create a new key for the node; it replaces the present one once the coordinator accepts it.",
    ),
    "trust": (
        "cotune.cli.client.commands:trust",
        "Trust the server's new keys by a statement signed with the old ones, if no request brought one.",
    ),
    "adapt": (
        "cotune.cli.client.commands:adapt",
        "Adapt the received model to the site's own records. Sends nothing and spends no ε.",
    ),
    "distill": (
        "cotune.cli.client.commands:distill",
        "Distill a model on the site's own records, by DP-SGD, charged to the ledger. Sends nothing.",
    ),
    "evaluate": (
        "cotune.cli.client.commands:evaluate",
        "Compare the received model with training alone on own records. Sends nothing and spends no ε.",
    ),
}
SERVER = {
    "init": (
        "cotune.cli.server.federation:init",
        "Create a federation: certificates, a fully resolved plan, and the files to hand to organizations.",
    ),
    "start": (
        "cotune.cli.server.federation:start",
        "Serve organizations until Ctrl-C: Flower's SuperLink, the TLS proxy in front of it, an executor for runs.",
    ),
    "invite": ("cotune.cli.server.members:invite", "Admit an organization by its public key."),
    "revoke": ("cotune.cli.server.members:revoke", "Shut an organization out. Its key is never admitted again."),
    "accept-key": (
        "cotune.cli.server.members:accept_key",
        "Replace an organization's key with its new one; the old key is never admitted again. Runs continue.",
    ),
    "list": ("cotune.cli.server.members:members", "List the invited organizations and their keys."),
    "run": ("cotune.cli.server.run:run", "Run the plan with the invited organizations."),
    "status": (
        "cotune.cli.server.status:status",
        "Show the organizations, the newest run and the certificate, whether or not anything runs.",
    ),
    "renew": (
        "cotune.cli.server.federation:renew",
        "Issue a new certificate for the same key. Organizations need to act only if the first host changes.",
    ),
    "renew-keys": (
        "cotune.cli.server.federation:renew_keys",
        "Renew the signing key and the certificate authority: announce new ones, then use them (--switch).",
    ),
    "verify-trail": (
        "cotune.cli.server.federation:verify_trail",
        "Compare a run's trail with an organization's log: check signatures, list what either side lacks.",
    ),
}
PRIVACY = {
    "verify": (
        "cotune.cli.privacy:verify",
        "Recompute an exported ledger: hash chain, charges, and ε by several accountants. Exits with 1 if it is wrong.",
    )
}

app = typer.Typer(
    name="cotune",
    help="Collaborative fine-tuning without sharing data.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def build_command() -> click.Group:
    """Build the command `cotune`. The modules of its commands are imported when they are called."""
    root = typer.main.get_command(app)
    assert isinstance(root, click.Group)
    commands = {name: LazyCommand(name, *about) for name, about in COMMANDS.items()}
    groups = [
        lazy_group("plan", "Create plans, look up their keys, and forecast what they will do.", PLAN),
        lazy_group("client", "Manage an organization's site, policy and ledger, and join a federation.", CLIENT),
        lazy_group("server", "Coordinate a federation: create it, serve it, invite organizations, run its plan.", SERVER),
        lazy_group("privacy", "Verify an exported privacy ledger.", PRIVACY),
    ]
    strategies = commands.pop("strategies")
    for command in (*commands.values(), *groups, strategies):
        root.add_command(command)
    return root


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cotune {installed_version('cotune')}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback and the code of a failure; anywhere on the line.")
    ] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Organizations that cannot pool their data fine-tune one model together, with record-level differential privacy."""


def run() -> None:
    """Run the console script: parse, call, and turn a failure into one sentence and an exit code."""
    clean_output()
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    _leave_telemetry_off()
    if not debug:
        logging.getLogger("cotune").setLevel(logging.CRITICAL)  # what the user can fix is reported once, below
    try:
        with observe_models(Waiting()):
            code = build_command()(standalone_mode=False)  # typer would end an interrupt without a word, and draw boxes
        if code == 130:
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.NoSuchOption as error:
        from cotune.cli.plans.plan_options import meant_option  # loads the tables of plans and policies

        _fail(f"{meant_option(error, sys.argv)}; see --help", "usage.invalid", error.exit_code)
    except click.ClickException as error:
        _fail(f"{error.format_message().removesuffix('.')}; see --help", "usage.invalid", error.exit_code)
    except CotuneError as error:
        if debug:
            error.add_note(f"error code: {error.code}")
            raise
        _fail(str(error), error.code, error.exit_code)
    except typer.Abort:
        _fail("stopped, as the question was not answered; --yes answers it beforehand", "usage.not_confirmed", 1)
    except KeyboardInterrupt:
        print(f"cotune: stopped{_describe_kept_work()}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        if type(error).__name__ == "OutOfMemoryError":  # of torch, which few commands load
            _fail(
                "the GPU has no memory left: expected room for the model and one batch; free it, or use --device cpu",
                "device.out_of_memory",
                DeviceError.exit_code,
            )
        about = f"{type(error).__name__}: {error}"
        _fail(f"unexpected error ({about}); run it again with --debug for a traceback", "internal.unexpected", 70)


def _leave_telemetry_off() -> None:
    for key, value in (
        ("FLWR_TELEMETRY_ENABLED", "0"),
        ("HF_HUB_DISABLE_TELEMETRY", "1"),
        ("FLWR_DISABLE_UPDATE_CHECK", "1"),
    ):
        os.environ.setdefault(key, value)


def _fail(message: str, code: str, exit_code: int) -> NoReturn:
    """Print one sentence on standard error and, with --json, the error as JSON on standard output; exit."""
    if "--json" in sys.argv:
        print(json.dumps({"error": {"code": code, "message": message}}, ensure_ascii=False))
    print(f"cotune: {printable(message)}", file=sys.stderr)
    sys.exit(exit_code)


def _describe_kept_work() -> str:
    """Return what an interrupted command leaves, and how it is continued."""
    match [word for word in sys.argv[1:] if not word.startswith("-")]:
        case ["simulate", *_]:
            return "; finished rounds are kept: `cotune simulate --resume` with the run's folder goes on after them"
        case ["compare", *_]:
            return "; finished runs are kept: the same command again goes on from there"
        case ["server", "run", *_]:
            return "; finished rounds are kept: the same command with --resume goes on after them"
        case _:
            return ""


if __name__ == "__main__":
    run()
