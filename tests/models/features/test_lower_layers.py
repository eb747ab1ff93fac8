"""What is below the trained layers is computed once, and nothing else changes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch

from cotune.client.training.checks.gradient_checks import check_gradients
from cotune.client.training.stage_setup.from_records import build_setup
from cotune.data.dataset import Dataset
from cotune.data.record_reading import read_records
from cotune.data.tasks.classes import IGNORED
from cotune.models import physical_batch
from cotune.models.evaluation.test_set import evaluate, predict
from cotune.models.features import kept_states
from cotune.models.features.kept_states import StateReader
from cotune.models.features.lower_layers import STATES, find_lower_layers
from cotune.models.trainable import TrainableModel
from cotune.plan.load import load_plan
from cotune.plan.local_training import LocalTraining
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import get_plan_model
from cotune.privacy.mechanisms.per_example import per_example
from tests.support.language_models import write_dialogs
from tests.support.multi_task import NewPlan

KINDS = ("llama", "qwen2", "gpt2")
RECORDS = 23


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COTUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def plan_of(language_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Plan]:
    def make(kind: str = "llama", *more: str, privacy: str = '{ epsilon = 8.0, delta = "1/n^1.5" }') -> Plan:
        file = write_dialogs(tmp_path / "dialogs.jsonl", RECORDS)
        document = f"""
        task = "causal-lm"
        train = "lora"
        privacy = {privacy}
        [model]
        base = "{language_model(kind)}"
        max_length = 16
        max_target_length = 5
        [data]
        source = "{file}"
        prompt = "prompt"
        target = "target"
        [lora]
        layers = 1
        factors = "ab"
        rank = 2
        [local]
        batch_size = 8
        steps = 1
        physical_batch_size = 4
        """
        path = tmp_path / "plan.toml"
        path.write_text(document)
        return load_plan(path, list(more))

    return make


def everything(plan: Plan) -> Dataset:
    records = read_records(plan.data, task=plan.task)
    return Dataset(((records, range(len(records))),), plan.labels or (), plan.task)


def prepared(plan: Plan) -> tuple[TrainableModel, Dataset]:
    model = get_plan_model(plan, "cpu")
    model.load({})
    names = model.names("lora")
    model.train_only(names)
    generator = torch.Generator().manual_seed(3)
    state = {name: torch.randn(tensor.shape, generator=generator) / 4 for name, tensor in model.state(names).items()}
    model.load(state)
    return model, everything(plan)


def answer_of(predicted: Any) -> Any:
    """Without what a language model's prediction holds of losses: their last bits follow from the batch."""
    return predicted[1] if isinstance(predicted, tuple) else predicted


def gradients(plan: Plan) -> list[torch.Tensor]:
    """Losses and gradients of single records, batch by batch."""
    model, held = prepared(plan)
    setup = build_setup(plan, plan.stages[0], model, held, {}, "clinic", expected_batch=8)
    found = []
    for positions, batch in setup.batches(range(setup.rows)):
        with per_example(setup.module, setup.loss) as of:
            losses, each = of.gradients(batch)
        found += [part[: len(positions)] for part in (losses, *each)]
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("low", ["float32", "bfloat16"])
def test_gradients_are_the_same_to_the_bit(plan_of: Callable[..., Plan], kind: str, low: str) -> None:
    kept, whole = (gradients(plan_of(kind, f"model.precision={low}", f"local.keep_lower_layers={how}")) for how in ("on", "off"))
    assert len(kept) == len(whole) > 0
    assert all(torch.equal(one, other) for one, other in zip(kept, whole, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_lower_layers_are_not_computed_again(plan_of: Callable[..., Plan], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(kind)
    model, held = prepared(plan)
    setup = build_setup(plan, plan.stages[0], model, held, {}, "clinic", expected_batch=8)
    lower = find_lower_layers(model, model.names("lora"))
    assert lower is not None
    passes = []
    hooks = [part.register_forward_hook(lambda *_: passes.append(1)) for part in lower.layers[0].children()]
    for _, batch in setup.batches(range(setup.rows)):
        setup.loss(batch)
    for hook in hooks:
        hook.remove()
    assert passes == []


def test_gradients_with_kept_states_are_checked(plan_of: Callable[..., Plan]) -> None:
    plan = plan_of()
    model, held = prepared(plan)
    setup = build_setup(plan, plan.stages[0], model, held, {}, "clinic", expected_batch=8)
    samples = setup.samples()
    assert all(STATES in batch for _, batch in samples.batches(range(samples.rows)))
    assert STATES not in samples.alone(0)  # so that the check compares with whole passes
    assert check_gradients(setup, plan.privacy, "lora") < 1e-5  # type: ignore[arg-type]


def test_files_are_read_again(plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of()
    first = gradients(plan)
    kept_states._held.clear()
    monkeypatch.setattr(kept_states, "_write", None)  # would raise
    assert all(torch.equal(one, other) for one, other in zip(first, gradients(plan), strict=True))


@pytest.mark.parametrize("damage", ["cut", "public"])
def test_a_damaged_file_is_made_again(plan_of: Callable[..., Plan], tmp_path: Path, damage: str) -> None:
    plan = plan_of()
    first = gradients(plan)
    kept_states._held.clear()
    (file,) = (path for path in (tmp_path / "cache" / "states").iterdir() if path.suffix != ".lock")
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-4])
    else:
        file.write_bytes(bytes(file.stat().st_size))
        file.chmod(0o666)
    assert all(torch.equal(one, other) for one, other in zip(first, gradients(plan), strict=True))


def test_what_a_killed_process_has_left_is_overwritten(plan_of: Callable[..., Plan], tmp_path: Path) -> None:
    """Every attempt that was killed had left a file of its own, of hundreds of megabytes for a language model."""
    plan = plan_of()
    child = os.fork()
    if not child:
        Path.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment, method-assign, return-value]
        try:
            gradients(plan)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    folder = tmp_path / "cache" / "states"
    assert [path.suffix for path in folder.iterdir() if path.suffix != ".lock"] == [".part"]
    first = gradients(plan)
    assert [path.suffix for path in folder.iterdir() if path.suffix != ".lock"] == [""]
    kept_states._held.clear()
    assert all(torch.equal(one, other) for one, other in zip(first, gradients(plan), strict=True))


def test_without_room_states_are_held_in_memory(plan_of: Callable[..., Plan], tmp_path: Path) -> None:
    plan = plan_of()
    first = gradients(plan)
    kept_states._held.clear()
    folder = tmp_path / "cache" / "states"
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    folder.write_text("no folder")
    assert all(torch.equal(one, other) for one, other in zip(first, gradients(plan), strict=True))


def test_a_state_below_is_other_states(plan_of: Callable[..., Plan]) -> None:
    plan = plan_of()
    model, _ = prepared(plan)
    lower = find_lower_layers(model, model.names("lora"))
    assert lower is not None
    state = {name: tensor.detach() for name, tensor in model.parameters()}
    below = lower.trained_below(state)
    assert any(".layers.0." in name for name in below)
    assert not any(".layers.1." in name for name in below)
    assert "model.embed_tokens.weight" in below


def test_all_layers_adapted_leave_nothing_below(plan_of: Callable[..., Plan]) -> None:
    plan = plan_of("llama", "lora.layers=2")
    model, _ = prepared(plan)
    assert find_lower_layers(model, model.names("lora")) is None


def test_trained_embeddings_leave_nothing_below(plan_of: Callable[..., Plan]) -> None:
    model, _ = prepared(plan_of())
    assert find_lower_layers(model, [*model.names("lora"), "model.embed_tokens.weight"]) is None


def test_the_module_is_left_as_it_was(plan_of: Callable[..., Plan]) -> None:
    model, _ = prepared(plan_of())
    lower = find_lower_layers(model, model.names("lora"))
    assert lower is not None
    loaded = model.loaded
    batch = loaded.task.collator(model.module, loaded.reader, model.device)(loaded.task.samples(loaded.reader))
    before = loaded.task.scores(model.module, batch)
    states = StateReader(model, lower, 4, False).read_batch(batch)
    with pytest.raises(RuntimeError), lower.skipped({**batch, STATES: states[:, :1]}) as rest:  # of another length
        loaded.task.scores(model.module, rest)
    assert torch.equal(loaded.task.scores(model.module, batch), before)


@pytest.mark.parametrize("tasks", ["one", "several"])
def test_evaluation_begins_with_kept_states(
    plan_of: Callable[..., Plan], multi_plan: NewPlan, monkeypatch: pytest.MonkeyPatch, tasks: str
) -> None:
    plan = plan_of() if tasks == "one" else multi_plan("bert", lora={"layers": 1})
    model, held = prepared(plan)
    assert find_lower_layers(model, model.adapter_names()) is not None, "else nothing is kept"
    state = model.state(model.names("lora"))
    kept = evaluate(model, state, held, "float32").as_dict()
    told = predict(model, state, held, "float32")
    monkeypatch.setattr("cotune.models.evaluation.test_set.is_small", lambda *_: False)
    whole = evaluate(model, state, held, "float32").as_dict()
    assert kept == pytest.approx(whole, rel=1e-6)
    assert [answer_of(each) for each in told] == [answer_of(each) for each in predict(model, state, held, "float32")]


def test_where_the_rows_of_the_plan_do_not_fit_fewer_are_judged_at_a_time(
    plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a server, which may have less memory than those who train."""
    model, held = prepared(plan_of())
    state = model.state(model.names("lora"))
    expected = predict(model, state, held, "float32")
    read = StateReader.read_batch

    def read_few(self: StateReader, batch: Any) -> torch.Tensor:
        if self.slots > 8:
            raise torch.OutOfMemoryError("out of memory")
        return read(self, batch)

    monkeypatch.setattr(StateReader, "read_batch", read_few)
    monkeypatch.setattr(physical_batch, "_found", WeakKeyDictionary())  # other tests have the same model
    told = predict(model, state, held, "float32", 64)
    assert [answer_of(each) for each in told] == [answer_of(each) for each in expected]


@pytest.mark.parametrize("rows", [LocalTraining().physical_batch_size, 5, 1])
def test_evaluation_reads_what_training_has_kept(plan_of: Callable[..., Plan], tmp_path: Path, rows: int) -> None:
    plan = plan_of("llama", f"local.physical_batch_size={rows}")
    model, held = prepared(plan)
    build_setup(plan, plan.stages[0], model, held, {}, "clinic", expected_batch=8)
    predict(model, model.state(model.names("lora")), held, "float32", plan.physical_rows)
    assert len([file for file in (tmp_path / "cache" / "states").iterdir() if file.suffix != ".lock"]) == 1


def test_records_with_about_as_many_targets_share_a_batch(plan_of: Callable[..., Plan]) -> None:
    plan = plan_of()
    model, held = prepared(plan)
    setup = build_setup(plan, plan.stages[0], model, held, {}, "clinic", expected_batch=8)
    batches = [
        (batch["input_ids"].shape, *(batch["labels"] != IGNORED).sum(dim=1).tolist()) for _, batch in setup.batches(range(23))
    ]
    for shape in {shape for shape, *_ in batches}:
        counts = [count for other, *held in batches if other == shape for count in held[:-1] if count]
        assert counts == sorted(counts)
    assert len({count for _, *counts in batches for count in counts}) > 2, "else there is nothing to sort"
