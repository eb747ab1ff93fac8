"""`cotune`: the command line. A failure that is the user's to mend is one sentence and an exit code; --debug shows more."""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated

import click
import typer

from cotune.cli import audit as audit_command
from cotune.cli import compare as compare_command
from cotune.cli import distill as distill_command
from cotune.cli import evaluate as evaluate_command
from cotune.cli import fuse as fuse_command
from cotune.cli import plan as plan_commands
from cotune.cli import predict as predict_command
from cotune.cli import privacy as privacy_commands
from cotune.cli import simulate as simulate_command
from cotune.cli import strategies as strategy_commands
from cotune.cli.client import commands as client_commands
from cotune.cli.plan_options import meant_option
from cotune.cli.server import commands as server_commands
from cotune.cli.server import run as server_run
from cotune.errors import CotuneError
from cotune.printable import clean_output, printable

app = typer.Typer(
    name="cotune",
    help="Collaborative fine-tuning without sharing data.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(plan_commands.app, name="plan")
app.add_typer(client_commands.app, name="client")
server_commands.app.command("run")(server_run.run)
server_commands.app.command("status")(server_run.status)
app.add_typer(server_commands.app, name="server")
app.add_typer(privacy_commands.app, name="privacy")
app.add_typer(strategy_commands.app, name="strategies")
app.command("simulate")(simulate_command.simulate)
app.command("compare")(compare_command.compare)
app.command("audit")(audit_command.audit)
app.command("predict")(predict_command.predict)
app.command("evaluate")(evaluate_command.evaluate)
app.command("fuse")(fuse_command.fuse)
app.command("distill")(distill_command.distill)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"cotune {version('cotune')}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure; anywhere on the line.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Organizations that cannot pool their data fine-tune one model together, with record-level differential privacy."""


def run() -> None:
    """The console script."""
    clean_output()
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    for key, value in (
        ("FLWR_TELEMETRY_ENABLED", "0"),
        ("HF_HUB_DISABLE_TELEMETRY", "1"),
        ("FLWR_DISABLE_UPDATE_CHECK", "1"),
    ):
        os.environ.setdefault(key, value)
    if not debug:
        logging.getLogger("cotune").setLevel(logging.CRITICAL)  # what the user can mend is said once, below
    try:
        code = app(standalone_mode=False)  # typer would end an interrupt without a word, and draw boxes
        if code == 130:
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.NoSuchOption as error:
        print(f"cotune: {meant_option(error, sys.argv)}; see --help", file=sys.stderr)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        print(f"cotune: {printable(error.format_message().removesuffix('.'))}; see --help", file=sys.stderr)
        sys.exit(error.exit_code)
    except CotuneError as error:
        if debug:
            raise
        print(f"cotune: {printable(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except typer.Abort:
        print("cotune: stopped, as the question was not answered; --yes answers it beforehand", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"cotune: stopped{_kept()}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        print(
            f"cotune: something unforeseen failed ({type(error).__name__}: {printable(str(error))}); --debug shows where",
            file=sys.stderr,
        )
        sys.exit(70)


def _kept() -> str:
    """What an interrupted command leaves, and how it is continued."""
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
