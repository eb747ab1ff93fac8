"""One record more changes the sum of clipped gradients by at most the clip norm C, whatever record, state and arithmetic.

What the audit found, in clip norms where 1 is promised: 46 for a head that was picked by a linear system (126 equations in 385
unknowns) to amplify how a long record's padding moves the features of others; 1.017 for LoRA under bfloat16 autocast with honest
states; 1.32 for FNet, which reads its padding, with an honest random head; 56,843 (LayerNorm weight 1e12) and 26 (1e7) for a
record of as many X as O tags, whose positions cancel, under ghost clipping in float32.

The same on commit a605cba, of the models of this file: BERT's head under bfloat16 3.95 at the amplifying head (1.002 at an honest
one), its LoRA 2.98, Llama's head 1.23 and LoRA 1.002; full fine-tuning at LayerNorm weights of 1e4 1.39 (BERT) and 31.5 (Llama);
a record whose positions cancel to zero took away all that three others contributed, 3.0 (at 1e4, 1e7 and 1e12). Of images,
LoRA under bfloat16 gave 1.00004.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cotune.client.training.stage_setup.from_records import build_setup
from cotune.client.training.stage_setup.training_setup import TrainingSetup
from cotune.data.dataset import Dataset
from cotune.data.record_reading import read_records
from cotune.models.encoding import encoded_examples
from cotune.models.features.head import encode_vectors
from cotune.models.trainable import State, TrainableModel
from cotune.plan.load import parse_plan
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import get_plan_model
from cotune.privacy.mechanisms.clipped_sum import ClippedSum
from cotune.privacy.mechanisms.per_example import per_example, unit_gradients
from tests.support.datasets import COLORS, write_csv, write_images
from tests.support.matrix import crossed
from tests.support.tiny_models import VOCABULARY, config_of, write_model

LONGEST = 128
WORDS = [word for word in VOCABULARY if not word.startswith("[")]
CLASSES = ("bad", "good", "so")
OTHERS = 12
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """kind -> a tiny model that reads 128 tokens, wide enough for kernels to choose by shape."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            config = config_of(kind)
            wide = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.2, "head_dim": 32}
            config.update(wide if kind == "vit" else {**wide, "max_position_embeddings": LONGEST})
            made[kind] = write_model(kind, tmp_path_factory.mktemp(f"long-{kind}"), config)
        return made[kind]

    return make


def plan_of(base: Path, source: Path, task: str, mode: str, precision: str, labels: tuple[str, ...]) -> Plan:
    return parse_plan(
        {
            "task": task,
            "labels": labels,
            "rounds": 1,
            "train": mode,
            "model": {"base": str(base), "max_length": LONGEST, "precision": precision},
            "data": {"source": str(source)},
            "lora": {"rank": 2},
            "local": {"physical_batch_size": 5},
            "privacy": {"epsilon": 1.0, "delta": 1e-3},
        }
    )


def prepared(plan: Plan) -> tuple[TrainableModel, Dataset, State]:
    """The model at an honest state, trained parameters chosen; all records; the state."""
    model = get_plan_model(plan, "cpu")
    stage = plan.get_stage(1)
    model.load({})
    names = model.names(stage.mode, freeze_embeddings=stage.freeze_embeddings)
    model.train_only(names)
    records = read_records(plan.data, task=plan.task)
    return model, Dataset(((records, np.arange(len(records))),), plan.labels, plan.task), model.state(names)


def setting_at(plan: Plan, model: TrainableModel, dataset: Dataset, state: State) -> TrainingSetup:
    """The setting as a client makes it at a state, without the checks that refuse some of these: the engine alone must bound."""
    model.load(state)
    return build_setup(plan, plan.get_stage(1), model, dataset, state, "clinic", expected_batch=float(OTHERS))


def clipped_sum(setting: TrainingSetup, rows: range, clip: float) -> list[Tensor]:
    """Of one step on these rows before its noise, to the bit."""
    with per_example(setting.module, setting.loss) as of:
        total = ClippedSum(of.parameters, clip, 1.0, "flat")
        for gradients, _ in unit_gradients(of, [[row] for row in rows], setting.batches):
            total.add(gradients)
    return total.totals()


def norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float(t.double().pow(2).sum()) for t in tensors))


def sensitivity(plan: Plan, model: TrainableModel, dataset: Dataset, state: State, clip: float) -> float:
    """‖sum(D) − sum(D∖i)‖ / C, where i is the last record; in the second world nothing was computed with it."""
    setting = setting_at(plan, model, dataset, state)
    whole = clipped_sum(setting, range(setting.rows), clip)
    without = setting_at(plan, model, shortened(dataset), state)
    rest = clipped_sum(without, range(without.rows), clip)
    assert without.rows == setting.rows - 1
    return norm([w - r for w, r in zip(whole, rest, strict=True)]) / clip


def shortened(dataset: Dataset) -> Dataset:
    """The same, from a file that lacks the last record."""
    records = dataset.parts[0][0]
    fewer = replace(records, inputs=records.inputs[:-1], labels=records.labels[:-1])
    return Dataset(((fewer, np.arange(len(fewer))),), dataset.labels, dataset.task)


def amplified(model: TrainableModel, dataset: Dataset, state: State) -> State:
    """A head that shows how company moves the features of others, as the audit's did.

    For each record i with feature f_i alone, and f'_i in a bfloat16 batch padded to the longest: one row w of the head's last
    layer with w·f_i = 0 and w·(f'_i − f_i) = 10³, by least squares; where nothing moves, a row of noise.
    """
    examples = encoded_examples(dataset, model)
    collate = model.loaded.task.collator(model.module, model.loaded.reader, model.device)
    together = encode_vectors(model, collate(examples), torch.bfloat16)[:-1].double()
    alone = torch.cat([encode_vectors(model, collate([e]), torch.bfloat16) for e in examples[:-1]]).double()
    equations = torch.cat([alone, together - alone])
    wanted = torch.cat([torch.zeros(len(alone)), torch.full((len(alone),), 1e3)]).double()
    row = torch.linalg.lstsq(equations, wanted[:, None], driver="gelsd").solution[:, 0]
    weight = next(name for name, tensor in state.items() if name.endswith(".weight") and len(tensor) == len(CLASSES))
    picked = {name: tensor.clone() for name, tensor in state.items()}
    picked[weight][0] = row.float()
    picked[weight][1:] = 0.0
    return picked


def steep(state: State, weight: float) -> State:
    """The state with all LayerNorm weights of the encoder at `weight`."""
    return {n: torch.full_like(t, weight) if "norm" in n.lower() and n.endswith("weight") else t for n, t in state.items()}


def one_long_record(tmp_path: Path) -> Path:
    """Texts of ten tokens, and as the last record one of 128."""
    rng = random.Random(0)
    rows = [(" ".join(rng.choices(WORDS, k=10)), CLASSES[i % 3]) for i in range(OTHERS)]
    return write_csv(tmp_path / "texts.csv", [*rows, (" ".join(rng.choices(WORDS, k=LONGEST)), "good")])


@pytest.mark.parametrize(
    ("kind", "mode", "precision"), crossed(["bert", "llama", "vit"], ["head", "lora", "full"], ["float32", "bfloat16"])
)
def test_a_record_contributes_the_clip_norm_at_most(
    long_model: Callable[[str], Path], kind: str, mode: str, precision: str, tmp_path: Path
) -> None:
    """At an honest state, at the head that amplifies, and with steep norms."""
    images = kind == "vit"
    source = write_images(tmp_path / "images", OTHERS + 1) if images else one_long_record(tmp_path)
    task = "image-classification" if images else "sequence-classification"
    plan = plan_of(long_model(kind), source, task, mode, precision, tuple(COLORS) if images else CLASSES)
    model, dataset, honest = prepared(plan)
    for state in (honest, amplified(model, dataset, honest), steep(honest, 1e4)):
        assert sensitivity(plan, model, dataset, state, 1.0) <= 1 + 1e-6


@pytest.mark.parametrize(("steepness", "mode", "precision"), crossed([1e4, 1e7, 1e12], ["lora", "full"], ["float32", "bfloat16"]))
def test_record_of_canceling_positions_contributes_clip_norm(
    long_model: Callable[[str], Path], mode: str, steepness: float, precision: str, tmp_path: Path
) -> None:
    """As many X as O tags, all X first, at a state in which every position has the same features, and p(X) = p(O) = 1/2."""
    half = LONGEST // 2
    rows = [{"text": ["day"] * 4, "label": ["X", "O", "X", "X"]} for _ in range(3)]
    rows.append({"text": ["day"] * LONGEST, "label": ["X"] * half + ["O"] * half})
    source = tmp_path / "tags.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    plan = plan_of(long_model("bert"), source, "token-classification", mode, precision, ("O", "X"))
    model, dataset, honest = prepared(plan)
    state = alike(steep(honest, steepness))
    assert sensitivity(plan, model, dataset, state, 1.0) <= 1 + 1e-6


def alike(state: State) -> State:
    """What comes before the last LayerNorm says the same of every position; the head is undecided."""
    silent: dict[str, Any] = {}
    for name, tensor in state.items():
        if name.startswith("classifier"):
            silent[name] = torch.zeros_like(tensor)
        elif "layer.1.attention.output.LayerNorm" in name:
            silent[name] = torch.zeros_like(tensor) if name.endswith("weight") else torch.linspace(-1, 1, len(tensor))
        else:
            silent[name] = tensor
    return silent
