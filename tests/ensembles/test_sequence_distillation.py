"""Distilled language models: students that learn, kills that change nothing, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from cotune.data.records import Records
from cotune.data.types import Chat, Passage
from cotune.ensembles.config import DistillationConfig
from cotune.ensembles.sequence_distillation import RECORD, SequenceDistillation, distill_sequences
from cotune.errors import CotuneError
from cotune.models.config import ModelConfig
from cotune.models.evaluation.language_model import evaluate_language_model, open_language_model
from tests.support.chats import chats, word_tokenizer, write_chat_model
from tests.support.kills import killed_before_each_change
from tests.support.language_models import dialogs, language_model, write_language_model, write_louder
from tests.support.paired_models import paired_model
from tests.support.tiny_models import VOCABULARY, tokenizer

__all__ = ["language_model", "paired_model"]  # fixtures

LENGTH = 16


def passages(count: int, seed: int = 0) -> list[Passage]:
    return [Passage(record["prompt"] + "\n", record["target"]) for record in dialogs(count, seed)]


def make_work(teachers: list[Path], student: Path, out: Path, **changed: Any) -> SequenceDistillation:
    task = changed.get("task", "causal-lm")
    chatting = isinstance(changed.get("inputs", [None])[0], Chat)
    length = changed.pop("max_length", LENGTH)
    opened = [open_language_model(str(teacher), task, "cpu", length, chats=chatting) for teacher in teachers]
    config = DistillationConfig(epochs=2, learning_rate=1e-2, batch_size=16, label_weight=0.5)
    base = ModelConfig(base=str(student), max_length=length)
    given = {"task": task, "config": config, "inputs": passages(60), **changed}
    return SequenceDistillation(opened, [str(t) for t in teachers], student=base, out=out, device="cpu", **given)


@pytest.fixture(scope="module")
def teacher(language_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that has learned to repeat the word that means something, and to end."""
    folder = tmp_path_factory.mktemp("teacher") / "model"
    alone = DistillationConfig(epochs=12, learning_rate=2e-2, batch_size=16, label_weight=1.0)
    distill_sequences(make_work([language_model()], language_model(), folder, config=alone, inputs=passages(150, seed=3)))
    return folder


def held_out_loss(folder: Path, records: list[Passage]) -> float:
    """By plain transformers, in nats per target token."""
    reader, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    losses, tokens = 0.0, 0
    for record in records:
        prompt = reader(record.prompt).input_ids
        target = [*reader(record.target, add_special_tokens=False).input_ids, reader.eos_token_id]
        with torch.no_grad():
            labels = torch.tensor([[-100] * len(prompt) + target])
            losses += float(model(torch.tensor([prompt + target]), labels=labels).loss) * len(target)
        tokens += len(target)
    return losses / tokens


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_student_learns_and_is_a_plain_model(
    teacher: Path, language_model: Callable[..., Path], tmp_path: Path, mode: str
) -> None:
    config = DistillationConfig(train=mode, epochs=4, learning_rate=2e-2, batch_size=16, label_weight=0.5)  # type: ignore[arg-type]
    work = make_work([teacher], language_model(tied=True), tmp_path / "student", config=config)
    found = distill_sequences(work)
    held = found["held_out"]
    gain = {"full": 0.5, "lora": 0.02}[mode]
    assert held["student"]["loss"] < held["before"]["student"]["loss"] - gain
    assert held["kl"] < held["before"]["kl"] - gain
    records = list(work.inputs)[::10]
    assert held["student"]["loss"] == pytest.approx(held_out_loss(work.out, records), rel=1e-4)
    assert held["teacher"]["loss"] == pytest.approx(held_out_loss(teacher, records), rel=1e-4)
    assert held["before"]["student"]["loss"] == pytest.approx(held_out_loss(Path(work.student.base), records), rel=1e-4)
    assert json.loads((work.out / RECORD).read_text()) == found
    assert (work.out / "adapter").exists() == (mode == "lora")
    assert not work.part.exists()


def test_full_training_moves_the_table_of_tokens(teacher: Path, language_model: Callable[..., Path], tmp_path: Path) -> None:
    distill_sequences(make_work([teacher], language_model(tied=True), tmp_path / "student"))
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (language_model(tied=True), tmp_path / "student"))
    assert not torch.equal(before.get_input_embeddings().weight, after.get_input_embeddings().weight)
    assert torch.equal(after.get_input_embeddings().weight, after.get_output_embeddings().weight)


@pytest.mark.crash
@pytest.mark.parametrize("write", [None, 8])
def test_killed_distillation_goes_on_to_the_same_student(
    teacher: Path, language_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: int | None
) -> None:
    work = make_work([teacher], language_model("gpt2"), tmp_path / "student", write=write, inputs=passages(30))
    whole = replace(work, out=tmp_path / "whole")
    found = distill_sequences(whole)
    kills = 0
    for made in killed_before_each_change(monkeypatch, lambda: distill_sequences(work)):
        kills = made
        if not work.out.exists():
            assert distill_sequences(work) == found
        assert (work.out / "model.safetensors").read_bytes() == (whole.out / "model.safetensors").read_bytes()
        assert not work.part.exists()
        shutil.rmtree(work.out)
    assert kills == 4 + (write is not None), "settings, texts, two passes, and the folder"


def test_kept_texts_are_not_written_again(
    teacher: Path, language_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = make_work([teacher], language_model(), tmp_path / "student", write=8)
    with monkeypatch.context() as patch:
        patch.setattr("cotune.ensembles.sequence_distillation.train_in_passes", lambda *given, **more: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            distill_sequences(work)
    monkeypatch.setattr("cotune.ensembles.written_targets.write_after", lambda *given: pytest.fail("written again"))
    assert distill_sequences(work)["records"] > 0


def test_a_damaged_file_of_texts_is_named(teacher: Path, language_model: Callable[..., Path], tmp_path: Path) -> None:
    work = make_work([teacher], language_model(), tmp_path / "student", write=8)
    work.part.mkdir()
    for damaged in (b"", b"[]", b"[[1]]", b'{"a": 1}', b"\xff"):
        (work.part / "written-01-00000000.json").write_bytes(damaged)
        with pytest.raises(CotuneError) as caught:
            distill_sequences(work)
        assert caught.value.code == "run.damaged_file"


def test_teachers_write_what_is_learned(teacher: Path, language_model: Callable[..., Path], tmp_path: Path) -> None:
    """Of public prompts alone: the student comes close to the teacher, which it has seen nothing but texts of."""
    prompts = [Passage(each.prompt, "") for each in passages(100, seed=5)]
    config = DistillationConfig(epochs=8, learning_rate=2e-2, batch_size=16, label_weight=1.0)
    work = make_work([teacher, teacher], language_model("gpt2"), tmp_path / "student", write=8, inputs=prompts, config=config)
    found = distill_sequences(work)
    held = found["held_out"]
    assert held["agreement"] > held["before"]["agreement"] + 0.2
    assert held["student"]["loss"] < held["before"]["student"]["loss"] - 0.5
    assert found["records"] + held["records"] + sum(found["left_out"].values()) == 2 * len(prompts)


def test_texts_that_are_not_ended_are_left_out(teacher: Path, language_model: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(CotuneError) as caught:
        distill_sequences(make_work([teacher], language_model(), tmp_path / "student", write=1))
    assert caught.value.code == "data.too_few_records"


def other_end(source: Path, folder: Path) -> Path:
    """The same model and words, but its texts end with another token."""
    shutil.copytree(source, folder)
    reader = AutoTokenizer.from_pretrained(source)
    reader.eos_token = "[CLS]"
    reader.save_pretrained(folder)
    return folder


def test_another_tokenizer_is_refused(language_model: Callable[..., Path], tmp_path: Path) -> None:
    for student in (language_model("qwen2"), other_end(language_model(), tmp_path / "other")):
        work = make_work([language_model()], student, tmp_path / "student")
        with pytest.raises(CotuneError) as caught:
            distill_sequences(work)
        assert caught.value.code == "model.other_tokenizer"
        assert not work.part.exists()
        assert not work.out.exists()


def test_another_chat_template_is_refused_for_chats(tmp_path: Path) -> None:
    first, same, other = (tmp_path / name for name in ("first", "same", "other"))
    for folder in (first, same, other):
        write_chat_model(folder, reader=word_tokenizer(), positions=64)
    template = (other / "chat_template.jinja").read_text()
    (other / "chat_template.jinja").write_text("{{ '' }}" + template)
    said = [Chat(tuple((each["role"], each["content"]) for each in chat)) for chat in chats(40)]
    work = make_work([first], other, tmp_path / "student", inputs=said, max_length=64)
    with pytest.raises(CotuneError) as caught:
        distill_sequences(work)
    assert caught.value.code == "model.other_tokenizer"
    found = distill_sequences(make_work([first], same, tmp_path / "student", inputs=said, max_length=64))
    assert found["held_out"]["student"]["loss"] < found["held_out"]["before"]["student"]["loss"]
    assert distill_sequences(make_work([first], other, tmp_path / "texts"))["records"] == 54, "texts need no template"


def test_teachers_answer_chats(tmp_path: Path) -> None:
    folder = write_chat_model(tmp_path / "model", reader=word_tokenizer(), positions=64)
    said = [Chat(tuple((each["role"], each["content"]) for each in chat)) for chat in chats(60)]
    config = DistillationConfig(epochs=20, learning_rate=2e-2, batch_size=16, label_weight=1.0)
    distill_sequences(make_work([folder], folder, tmp_path / "teacher", inputs=said, max_length=64, config=config))
    asked = [Chat(chat.asked) for chat in said]
    work = make_work([tmp_path / "teacher"], folder, tmp_path / "student", inputs=asked, max_length=64, write=8)
    found = distill_sequences(work)
    assert found["held_out"]["kl"] < found["held_out"]["before"]["kl"]


@pytest.mark.parametrize("kinds", [("bart", "t5"), ("t5", "marian")])
def test_sequence_to_sequence_models_are_distilled_too(
    paired_model: Callable[[str], Path], tmp_path: Path, kinds: tuple[str, str]
) -> None:
    first, second = map(paired_model, kinds)
    work = make_work([first], second, tmp_path / "student", task="seq2seq")
    held = distill_sequences(work)["held_out"]
    assert held["student"]["loss"] < held["before"]["student"]["loss"]
    records = Records(tuple(work.inputs)[::10], ("",) * 6, "held out")
    for folder, figures in ((work.out, held["student"]), (first, held["teacher"])):
        opened = open_language_model(str(folder), "seq2seq", "cpu", LENGTH)
        assert evaluate_language_model(opened, records, "seq2seq")["figures"]["loss"] == pytest.approx(figures["loss"], rel=1e-4)


def test_the_shortest_model_decides_how_much_is_read(language_model: Callable[..., Path], tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=256,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "long")
    tokenizer().save_pretrained(tmp_path / "long")
    inputs = [*passages(40), Passage("great " * 40, "sad"), Passage("great " * 20, "sad " * 40)]
    work = make_work([language_model("gpt2")], tmp_path / "long", tmp_path / "student", inputs=inputs, max_length=100)
    found = distill_sequences(work)
    assert found["max_length"] == 32
    assert found["left_out"] == {"target not read": 1}
    assert AutoTokenizer.from_pretrained(work.out).model_max_length == 32


def test_a_teacher_that_overflows_is_refused(language_model: Callable[..., Path], tmp_path: Path) -> None:
    """Its weights are numbers, and its scores are none."""
    loud = AutoModelForCausalLM.from_pretrained(language_model())
    with torch.no_grad():
        loud.model.norm.weight.mul_(1e12)
        loud.lm_head.weight.mul_(1e30)
    loud.save_pretrained(tmp_path / "loud")
    tokenizer().save_pretrained(tmp_path / "loud")
    work = make_work([tmp_path / "loud"], language_model(), tmp_path / "student")
    with pytest.raises(CotuneError) as caught:
        distill_sequences(work)
    assert caught.value.code == "model.teacher_not_finite"
    assert not work.out.exists()


def test_a_rate_that_is_too_large_is_refused(language_model: Callable[..., Path], tmp_path: Path) -> None:
    config = DistillationConfig(epochs=30, learning_rate=1e20, batch_size=8)
    with pytest.raises(CotuneError) as caught:
        distill_sequences(make_work([language_model()], language_model(), tmp_path / "student", config=config))
    assert caught.value.code == "run.diverged"


def test_16_bit_models_are_distilled_by_adapters(language_model: Callable[..., Path], tmp_path: Path) -> None:
    teacher = write_louder(language_model(), tmp_path / "teacher", dtype=torch.bfloat16, rows=64)
    student = write_louder(language_model(tied=True), tmp_path / "base", dtype=torch.bfloat16)
    config = DistillationConfig(train="lora", epochs=2, learning_rate=2e-2, label_weight=0.0)
    held = distill_sequences(make_work([teacher], student, tmp_path / "student", config=config))["held_out"]
    assert held["kl"] < held["before"]["kl"]


def test_other_settings_and_finished_folders_are_left_alone(language_model: Callable[..., Path], tmp_path: Path) -> None:
    work = make_work([language_model()], language_model(), tmp_path / "student")
    work.part.mkdir()
    (work.part / "settings.json").write_text("{}")
    codes = []
    for _ in range(2):
        with pytest.raises(CotuneError) as caught:
            distill_sequences(work)
        codes.append(caught.value.code)
        work.out.mkdir(exist_ok=True)
    assert codes == ["run.other_settings", "run.folder_exists"]


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({"inputs": passages(9)}, "data.too_few_records"),
        ({"inputs": [Passage("great " * 40, "sad")] * 30}, "data.too_few_records"),
        ({"config": DistillationConfig(train="head")}, "model.nothing_to_train"),
    ],
)
def test_what_cannot_be_done_is_refused_first(
    language_model: Callable[..., Path], tmp_path: Path, changed: dict[str, Any], code: str
) -> None:
    with pytest.raises(CotuneError) as caught:
        distill_sequences(make_work([language_model()], language_model(), tmp_path / "student", **changed))
    assert caught.value.code == code


def test_records_of_one_prompt_are_never_on_both_sides(
    teacher: Path, language_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Two teachers that write alike: what is held out would be known word by word."""
    seen: dict[str, list[int]] = {}
    work = make_work([teacher, teacher], language_model(), tmp_path / "student", write=8)

    def note(student: Any, count: int, *given: Any, **more: Any) -> Any:
        seen["learned"] = list(range(count))
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cotune.ensembles.sequence_distillation.train_in_passes", note)
        held = distill_sequences(work)["held_out"]["records"]
    assert held % 2 == 0
    assert len(seen["learned"]) % 2 == 0
    assert np.isclose(held / (held + len(seen["learned"])), 0.1, atol=0.05)


def test_a_model_written_for_tests_is_not_a_sure_one(language_model: Callable[..., Path], tmp_path: Path) -> None:
    """Else students would have nothing to learn from `write_louder`."""
    plain = held_out_loss(write_language_model(tmp_path / "plain"), passages(5))
    assert held_out_loss(write_louder(tmp_path / "plain", tmp_path / "loud"), passages(5)) > plain + 0.1
