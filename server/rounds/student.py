"""The model of a run whose organizations share predictions alone: a student of what they predict together.

Ensemble distillation (Lin et al., NeurIPS 2020, https://arxiv.org/abs/2006.07242, algorithm 3) without the organizations' models:
the server has their predictions for the public inputs, fused, and trains the plan's model to give them, round by round from where
it was. It is post-processing of what was shared.
"""

from __future__ import annotations

from torch import Tensor

from cotune.ensembles.public_inputs import PublicPredictions, learning_config, to_taught
from cotune.models.trainable import State, TrainableModel, strip_prefix
from cotune.plan.parameters import trained_names
from cotune.plan.plan import Plan
from cotune.server.runs.run_model import STUDENT


def teach_student(
    plan: Plan, model: TrainableModel, public: PublicPredictions, memory: State, fused: Tensor, round: int
) -> State:
    """Return what a run remembers of its student after a round.

    Args:
        plan: The plan.
        model: Of the plan; it is left in the student's state.
        public: The plan's public inputs.
        memory: What the run remembered before.
        fused: (answers, classes), what the organizations predict together.
        round: Its number.
    """
    before = strip_prefix(STUDENT, memory)
    names = trained_names(plan, model, round)
    learned = public.distill(round, before, names, to_taught(fused, plan.public), learning_config(plan.public))
    return {f"{STUDENT}{name}": tensor for name, tensor in {**before, **learned}.items()}
