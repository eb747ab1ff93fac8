"""Client-level privacy in the round loop, between fusion and server optimizer, with a hard stop at its ε."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from cotune.errors import PrivacyError
from cotune.privacy.accounting.display_rounding import round_up
from cotune.privacy.client_dp import PrivateMean, next_clip_norm
from cotune.privacy.config import ClientPrivacy
from cotune.reporting.documents.rounds import ClientPrivacyEntry
from cotune.server.runs.client_privacy import compute_round_noise, open_client_account
from cotune.server.runs.run_folder import Progress, RunFolder


class ClientLevelPrivacy:
    """Client-level privacy of one run: its account, and the noise of its rounds."""

    def __init__(self, folder: RunFolder, privacy: ClientPrivacy) -> None:
        """Open the account of a run.

        Raises:
            PrivacyError: If the plan's client-level privacy is impossible, its account is lost, or the plan asks for another δ or
                a larger total ε than the federation's first run fixed.
        """
        self.privacy = privacy
        self.account = open_client_account(folder, privacy)
        self.account.check()
        self.noise = compute_round_noise(folder.plan, len(folder.file.participants))

    @classmethod
    def of(cls, folder: RunFolder) -> ClientLevelPrivacy | None:
        """Open the account of a run; None if its plan has no client-level privacy."""
        return None if folder.plan.client_privacy is None else cls(folder, folder.plan.client_privacy)

    def reason_to_stop(self, progress: Progress) -> str | None:
        """Return why the next round must not be trained; None if it may. Call it before any organization is asked.

        Raises:
            PrivacyError: If the account lacks the charge of a round that was played.
        """
        charged = {round for round, _ in self.account.charges()}
        missing = [round for round in range(1, progress.round + 1) if round not in charged]
        if missing:
            raise PrivacyError(
                f"the privacy account {self.account.path} has no charge for round {missing[0]}, which was played: expected one"
                " for every round; restore it from a backup",
                code="privacy.account_incomplete",
            )
        if self.account.allows(self.noise.charge):
            return None
        return (
            f"round {progress.round + 1} would exceed the client-level ε = {self.privacy.epsilon:g}, or that of all runs of this"
            f" federation: interrupted rounds count, and ε = {round_up(self.account.spent())} is spent in this run,"
            f" {round_up(self.account.spent_in_all_runs())} in all at δ = {self.account.delta_of_all_runs():g};"
            f" the run ends with the model after round {progress.round}"
        )

    def new_mean(self, shapes: Mapping[str, Tensor], before: Progress) -> PrivateMean:
        """Return an empty noised mean for the parameters of a round."""
        return PrivateMean(shapes, self.clip_norm(before), self.noise)

    def clip_norm(self, before: Progress) -> float:
        """Return C of the round after `before`."""
        return self.privacy.clip_norm if before.clip_norm is None else before.clip_norm

    def next_clip_norm(self, before: Progress, mean: PrivateMean) -> float:
        """Return C of the round after the one with this mean."""
        used = self.clip_norm(before)
        return used if mean.unclipped is None else next_clip_norm(self.privacy, used, mean.unclipped)

    def charge(self, round: int) -> None:
        """Charge a round to the account durably; call it before the round's noise is drawn."""
        self.account.charge(round, self.noise.charge)

    def entry(self, before: Progress, mean: PrivateMean) -> ClientPrivacyEntry:
        """Return the round's entry for summary.json."""
        return ClientPrivacyEntry(epsilon=self.account.spent(), clip_norm=self.clip_norm(before), unclipped=mean.unclipped)
