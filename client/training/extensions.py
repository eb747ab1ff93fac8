"""What a plan adds to plain training: client terms and smaller ranks (parameters that stay here: see `personal`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cotune.client.site import Site
from cotune.models.trainable import State, TrainableModel
from cotune.plan.local_training import Stage
from cotune.plan.plan import Plan
from cotune.privacy.policy import Policy
from cotune.strategies.aggregator import build_client_term
from cotune.strategies.types import Delta, LocalSteps


@contextmanager
def adding_to_gradients(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    term: Callable[[str, nn.Parameter], Tensor | None],
) -> Iterator[None]:
    """During the block, add a term to the gradient before every step: under DP-SGD, to the gradient that has its noise.

    Args:
        optimizer: Whose steps they are.
        parameters: By their names.
        term: (name, parameter) -> what is added to its gradient; None: nothing.
    """

    @torch.no_grad()
    def add() -> None:
        for name, p in parameters.items():
            more = term(name, p)
            if more is not None:
                p.grad = more if p.grad is None else p.grad + more

    with _before_steps(optimizer, add):
        yield


@contextmanager
def _before_steps(optimizer: torch.optim.Optimizer, act: Callable[[], None]) -> Iterator[None]:
    """During the block, act before every step of the optimizer."""
    hook = optimizer.register_step_pre_hook(lambda *_: act())
    try:
        yield
    finally:
        hook.remove()


class ClientTermState:
    """The client term of a plan's strategy in one round: added to gradients, with state that is kept from round to round.

    What is kept belongs to the last admitted round: were it of a later one, whose update never entered the model, client and
    server would rely on different states.

    Args:
        admitted: The last round whose update of this organization is in the model; 0: none.
        sent: What the server sends beside the state.

    Raises:
        RunError: What was kept is lost.
    """

    def __init__(self, plan: Plan, site: Site, admitted: int, sent: Mapping[str, Tensor]) -> None:
        self.plan = plan
        self.site = site
        self.admitted = admitted
        self.sent = sent
        self.term = build_client_term(plan.strategy)
        keeps = plan.strategy.keeps_state
        self.kept = site.load_state(plan.plan_id, admitted) if keeps and admitted else {}

    @contextmanager
    def attach(self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """During the block, add the term to the gradient before every step: under DP-SGD, to the gradient that has its noise."""
        if self.plan.strategy.client_term is None:
            yield
            return
        received = {name: p.detach().clone() for name, p in parameters.items()}
        kept, sent = (_on({n: t for n, t in held.items() if n in parameters}, parameters) for held in (self.kept, self.sent))

        def term(name: str, p: nn.Parameter) -> Tensor | None:
            return self.term.correction(name, p.detach(), received[name], kept.get(name), sent.get(name))

        with adding_to_gradients(optimizer, parameters, term):
            yield

    def keep(self, round: int, stage: Stage, delta: Delta) -> None:
        """Keep the term's state after training, before the update is finished.

        Args:
            round: Number of the round, from 1.
            stage: That the round is in.
            delta: As it leaves the organization, clipped and noised.
        """
        if self.plan.strategy.keeps_state:
            assert stage.local.steps is not None, "a plan whose term keeps state gives steps"
            local = LocalSteps(stage.local.learning_rate, stage.local.momentum, stage.local.steps)
            kept = {**self.kept, **self.term.keep(self.kept, delta, self.sent, local)}
            self.site.store_state(self.plan.plan_id, round, kept, since=self.admitted)


def _on(tensors: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: tensor.to(parameters[name].device, parameters[name].dtype) for name, tensor in tensors.items()}


class RankMask:
    """Adapters of a smaller rank than the plan's: the first rows of A and columns of B alone. Does nothing at the plan's rank.

    The other slices are 0 during training, in A and B together: they take no part in the model and get no gradient, so that they
    take nothing of the clip norm either. Noise on them is discarded after it was added, which is post-processing.
    """

    def __init__(self, plan: Plan, stage: Stage, policy: Policy, model: TrainableModel) -> None:
        self.rank = policy.training.rank_for(plan.lora.rank)
        smaller = stage.mode == "lora" and self.rank < plan.lora.rank
        self.adapters = model.adapters() if smaller else ()
        self.columns = {adapter.b for adapter in self.adapters}
        self.names = {adapter.a for adapter in self.adapters} | self.columns

    def mask_state(self, model: TrainableModel, state: State) -> State:
        """Return the state with the other slices set to 0, and set the model to it."""
        if not self.names:
            return state
        held = {**state, **{name: self._masked(name, tensor) for name, tensor in model.state(sorted(self.names)).items()}}
        model.load(held)
        return held

    @contextmanager
    def attach(self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """During the block, set the gradient of the other slices to 0 before every step, after DP-SGD has added its noise."""

        def mask() -> None:
            for name in self.names & parameters.keys():
                gradient = parameters[name].grad
                parameters[name].grad = None if gradient is None else self._masked(name, gradient)

        with _before_steps(optimizer, mask):
            yield

    def trim(self, delta: Delta) -> Delta:
        """Return a delta without the other slices."""
        return {name: self._slices(name, tensor).clone() if name in self.names else tensor for name, tensor in delta.items()}

    def _slices(self, name: str, tensor: Tensor) -> Tensor:
        return tensor[:, : self.rank] if name in self.columns else tensor[: self.rank]

    def _masked(self, name: str, tensor: Tensor) -> Tensor:
        whole = torch.zeros_like(tensor)
        self._slices(name, whole).copy_(self._slices(name, tensor))
        return whole
