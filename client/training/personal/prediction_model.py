"""An organization's own model, of whatever architecture, where predictions for public inputs travel instead of parameters.

A round goes as in FedMD (Li & Wang, 2019, https://arxiv.org/abs/1910.03581, algorithm 1): the model learns what all predicted
together in the round before (*digest*), which touches no record, then trains on the organization's own records (*revisit*), under
the plan's privacy; and its predictions for the public inputs leave. These are post-processing of what DP-SGD gave, and cost no ε.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from cotune.client.site import Site
from cotune.client.site_setup import load_site_model
from cotune.client.training.personal.parameters import PersonalParameters
from cotune.data.config import TaskName
from cotune.data.types import Input
from cotune.ensembles.public_inputs import PublicPredictions, learning_config, read_inputs, to_shared, to_taught
from cotune.errors import DataError, RunError
from cotune.models.export import export_model
from cotune.models.trainable import State, TrainableModel
from cotune.plan.plan import Plan
from cotune.plan.public import SCORES, PublicConfig
from cotune.plan.trained_parameters import get_own_model
from cotune.privacy.config import RecordPrivacy
from cotune.reporting.model_card import CARD, model_card, promised
from cotune.storage.files import atomic_write
from cotune.strategies.types import Delta


def load_trained_model(plan: Plan, site: Site) -> TrainableModel:
    """Return the model that the organization trains: its own where predictions alone are shared. Raises ModelError."""
    own = site.file.own_base
    if own is None or not plan.shares_predictions:
        return load_site_model(plan, site)
    return get_own_model(plan, site.file.device, own)


def read_public(plan: Plan, site: Site) -> tuple[Input, ...]:
    """Return the public inputs that a plan shares predictions for, from this machine.

    Raises:
        DataError: The plan does not state which they are, they are not here, or they are others than the plan's.
    """
    if not plan.public.sha256 or not plan.public.answers:
        raise DataError(
            "the plan shares predictions for public inputs and does not state which: expected public.sha256 and public.answers;"
            " ask the coordinator for the plan of a run",
            code="data.unstated_inputs",
        )
    own = site.file.public
    if own is None and not site.file.simulated:
        raise DataError(
            f"the plan shares predictions for public inputs ({plan.public.source}), and this site has none: get them from the"
            " coordinator, and name them with --public FILE",
            code="data.no_public_inputs",
        )
    return _read(plan.public, plan.task, own or Path(plan.public.source))


@lru_cache(maxsize=2)
def _read(public: PublicConfig, task: TaskName, path: Path) -> tuple[Input, ...]:
    """Once in a process: simulated organizations have the same ones."""
    return read_inputs(public, task, path)


def export_own_model(plan: Plan, site: Site, state: State, folder: Path) -> None:
    """Write an organization's own model as a Hugging Face folder.

    Args:
        plan: The plan that it was trained by.
        site: Of the organization.
        state: What was trained of it.
        folder: A new one, or one that was written so before.
    """
    model = load_trained_model(plan, site)
    model.load(state)
    export_model(model, folder, {CARD: model_card(plan, privacy=promised(plan), length=model.loaded.text_length)})


class OwnModel(PersonalParameters):
    """An organization's own model in one round: all that is trained stays here, tied to admitted rounds as personal parts are.

    Raises:
        RunError: What was kept is lost, or goes on from another base model (`run.lost_state`).
        DataError: The public inputs are not here, or are others than the plan's.
    """

    def __init__(self, plan: Plan, site: Site, model: TrainableModel, round: int, admitted: int) -> None:
        super().__init__(plan, site, model, round, admitted)
        self._check_base()
        self.public = _open(model, read_public(plan, site), plan.model.precision, plan.seed)

    def join(self, state: State) -> State:
        """Return what the round trains from: the own model, after it has learned what all predicted together.

        Args:
            state: The fused predictions of the round before; zeros before the first.
        """
        own = self.own_model({})
        taught = to_taught(state[SCORES], self.plan.public)
        if taught.isnan().all():
            return own
        config = learning_config(self.plan.public)
        learned = self.public.distill(self.round, own, self._trained(), taught, config)
        joined = {**own, **learned}
        self.model.load(joined)
        return joined

    def keep(self) -> None:
        """Keep the own model; of teachers, which have no noise, none."""
        if not (isinstance(self.plan.privacy, RecordPrivacy) and self.plan.privacy.pate):
            super().keep()

    def predict(self, received: State) -> Delta:
        """Return the predictions of the trained model, less those that were received."""
        names = self._trained()
        scores = self.public.predict({**self.kept, **self.model.state(names)}, names)
        return {SCORES: to_shared(scores, self.plan.public) - received[SCORES]}

    def _check_base(self) -> None:
        """Its base model is decided by the first round."""
        file = self.site.kept_folder(self.plan.plan_id) / "own_base"
        used = self.model.loaded.folder.content_hash
        if not file.exists():
            atomic_write(file, used.encode(), durable=not self.site.file.simulated)
        elif file.read_text(encoding="utf-8", errors="replace") != used:
            raise RunError(
                "the own model goes on from another base model than this run began with: expected the same; name it again, or"
                " start a new run",
                code="run.lost_state",
            )


@lru_cache(maxsize=4)
def _open(model: TrainableModel, inputs: tuple[Input, ...], precision: str, seed: int) -> PublicPredictions:
    """Once for a model: its features of the inputs are kept, see `PublicPredictions`."""
    return PublicPredictions(model, inputs, precision, seed)
