"""The account of client-level privacy that a run is charged to, and the noise of its rounds."""

from __future__ import annotations

from pathlib import Path

from cotune.plan.plan import Plan
from cotune.privacy.client_dp import RoundNoise, calibrate_round_noise
from cotune.privacy.client_dp_account import ClientLevelAccount
from cotune.privacy.config import ClientPrivacy
from cotune.server.runs.run_folder import RunFolder


def open_client_account(folder: RunFolder, privacy: ClientPrivacy) -> ClientLevelAccount:
    """Return the account of the run: the federation's, or its own where it is a simulation.

    A run of before runs had an id goes on with the account in its own folder.
    """
    shared = bool(folder.file.federation and folder.file.id)
    home = Path(folder.file.federation) if shared else folder.path
    total = max(privacy.epsilon, privacy.epsilon_total or privacy.epsilon)
    run = folder.file.id if shared else ""
    return ClientLevelAccount(home / "client-privacy.jsonl", privacy.epsilon, privacy.delta, run, total)


def compute_round_noise(plan: Plan, organizations: int) -> RoundNoise:
    """Return the noise of each round of a plan with client-level privacy. Raises PrivacyError where it cannot be given."""
    assert plan.client_privacy is not None
    rounds = plan.rounds
    return calibrate_round_noise(
        plan.client_privacy, rounds=rounds, organizations=organizations, sample_rate=plan.server.sample_rate
    )
