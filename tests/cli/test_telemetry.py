"""No dependency reports home from a process that cotune starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys

PROGRAM = """
import json, os, sys
import cotune.cli.main as main

early = sorted({"flwr", "huggingface_hub", "transformers", "ray"} & sys.modules.keys())  # they would have read the switches already
sys.argv = ["cotune", "--version"]
try:
    main.run()
except SystemExit:
    pass


def switches():
    from flwr.supercore import telemetry
    from huggingface_hub import constants

    return [telemetry.FLWR_TELEMETRY_ENABLED, os.environ["FLWR_DISABLE_UPDATE_CHECK"], constants.HF_HUB_DISABLE_TELEMETRY]


print(json.dumps([early, switches()]))
"""


def test_what_a_command_imports_finds_its_telemetry_switched_off() -> None:
    """As a dependency reads the switches itself, and it is imported after they were set."""
    names = ("FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK", "HF_HUB_DISABLE_TELEMETRY")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True, timeout=600
    )
    early, (flower, updates, hub) = json.loads(done.stdout.splitlines()[-1])
    assert early == []
    assert (flower, updates, hub) == ("0", "1", True)
