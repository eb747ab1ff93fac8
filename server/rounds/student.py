"""The model of a run whose organizations share only predictions: a student of their combined predictions.

This is ensemble distillation (Lin et al., NeurIPS 2020, https://arxiv.org/abs/2006.07242, algorithm 3) without the organizations'
models: each round, the server trains the plan's model further to give the fused predictions for the public inputs. It is
post-processing of what was shared.
"""

from __future__ import annotations

from torch import Tensor

from cotune.ensembles.public_inputs import PublicPredictions, learning_config, to_taught
from cotune.models.trainable import State, TrainableModel, strip_prefix
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import trained_names
from cotune.server.runs.run_model import STUDENT


def teach_student(
    plan: Plan, model: TrainableModel, public: PublicPredictions, memory: State, fused: Tensor, round: int
) -> State:
    """Train the student in a round, and return its state for the run's memory.

    Args:
        plan: The plan.
        model: Of the plan; the student's state is loaded into it.
        public: The plan's public inputs.
        memory: The run's memory after the previous round.
        fused: (answers, classes), the organizations' combined predictions.
        round: Its number.
    """
    before = strip_prefix(STUDENT, memory)
    names = trained_names(plan, model, round)
    learned = public.distill(round, before, names, to_taught(fused, plan.public), learning_config(plan.public))
    return {f"{STUDENT}{name}": tensor for name, tensor in {**before, **learned}.items()}
