"""What one round at an organization works on; its records and its model are read when they are first needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from cotune.client.consent.policy_check import limit_gpu_memory
from cotune.client.run_account import Account
from cotune.client.site import Site
from cotune.client.training.personal.prediction_model import load_trained_model
from cotune.models.trainable import State, TrainableModel
from cotune.plan.local_training import Stage
from cotune.plan.plan import Plan
from cotune.privacy.policy import Policy
from cotune.protocol.messages import received_digest


@dataclass(frozen=True)
class RequestContext:
    """A request to train one round, with the plan and the site that it concerns.

    Attributes:
        round: Which round is asked for.
        state: The shared parameters as the server has sent them.
        admitted: The last round whose update of this organization is in the model; 0: none.
        sent: What the server sends beside the state, by parameter.
        declarable: Between which numbers of records the public one has to be; None: whatever the plan takes.
    """

    plan: Plan
    site: Site
    policy: Policy
    round: int
    state: State
    admitted: int = 0
    sent: Mapping[str, Tensor] = field(default_factory=dict)
    declarable: tuple[int, int] | None = None

    @cached_property
    def stage(self) -> Stage:
        """The stage of the plan that the round is in."""
        return self.plan.get_stage(self.round)

    @cached_property
    def received(self) -> str:
        """The digest of what the server has sent: the same request again has the same."""
        return received_digest(self.state, self.sent)

    @cached_property
    def account(self) -> Account:
        """The run's account. Reads which records there are."""
        return Account(self.plan, self.policy, self.site, self.site.counted_dataset(self.plan), round=self.round)

    @property
    def examples(self) -> int:
        """The public number of records: all that the server can see is decided by this number alone."""
        return self.account.public_examples

    @cached_property
    def expected_batch(self) -> float:
        """How many units a step is expected to have: B, a public number."""
        return self.stage.local.sample_rate(self.examples) * self.examples

    @cached_property
    def model(self) -> TrainableModel:
        """The model that is trained on this machine, within the memory that the policy allows."""
        model = load_trained_model(self.plan, self.site)
        limit_gpu_memory(self.policy, model.device)
        return model

    @cached_property
    def noise_multiplier(self) -> float:
        """σ of the round. Raises PolicyError or PrivacyError where the budget does not suffice; charges nothing."""
        return self.account.plan_noise(self.round)
