"""A fused language model: what it writes and how it is judged, against its members read by hand, one token at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cotune.data.config import DataConfig
from cotune.data.record_reading import read_records
from cotune.data.records import Records
from cotune.data.tasks.causal import prompt_tokens
from cotune.data.types import Passage
from cotune.ensembles.fused_language_model import FusedLanguageModel, open_fused_language_model
from cotune.models.base.folder import FUSION_FILE, content_hash, member_folder
from cotune.models.trainable import TrainableModel
from tests.support.console import Cotune, _logging_as_it_was, cotune, folder
from tests.support.failures import fails_with
from tests.support.language_models import dialogs, language_model, write_dialogs, write_language_model
from tests.support.loud_writers import FOLLOWERS, OTHERS, PROMPTS, open_model, write_other
from tests.support.paired_models import paired_model

__all__ = ["_logging_as_it_was", "cotune", "folder", "language_model", "paired_model"]  # fixtures
WEIGHTS = (0.6, 0.4)
HELD = ("--data", "held.jsonl", "--prompt", "prompt", "--target", "target")
Make = Callable[[str], TrainableModel]


@pytest.fixture
def member(language_model: Callable[..., Path], tmp_path: Path) -> Make:
    """kind -> a model that writes."""
    return lambda kind: open_model(
        write_other(tmp_path / kind, kind) if kind in {**OTHERS, **FOLLOWERS} else language_model(kind)
    )


def mixed(scores: list[torch.Tensor]) -> torch.Tensor:
    """Logarithms of the weighted mean of probabilities, of the tokens that are in all tables."""
    size = min(each.shape[-1] for each in scores)
    shares = [weight * each[..., :size].double().softmax(-1) for weight, each in zip(WEIGHTS, scores, strict=True)]
    return torch.stack(shares).sum(0).log()


@torch.no_grad()
def written_by_hand(members: list[TrainableModel], prompt: Passage, most: int) -> str:
    """Without a cache and without padding."""
    reader = members[0].loaded.reader
    has_encoder = members[0].module.config.is_encoder_decoder  # type: ignore[union-attr]
    [given] = [reader(prompt.prompt)["input_ids"]] if has_encoder else prompt_tokens(reader, [prompt.prompt], 16)
    new: list[int] = []
    while len(new) < most:
        said = []
        for member in members:
            start = getattr(member.module.config, "decoder_start_token_id", None)
            paired = (
                {"input_ids": torch.tensor([given]), "decoder_input_ids": torch.tensor([[start, *new]])} if has_encoder else {}
            )
            read = paired or {"input_ids": torch.tensor([[*given, *new]])}
            said.append(member.module(**read, use_cache=False).logits[0, -1])
        best = int(mixed(said).argmax())
        if best == reader.eos_token_id:
            break
        new.append(best)
    return str(reader.decode(new, skip_special_tokens=True)).strip()


@pytest.mark.parametrize(
    "kinds",
    [("llama", "gpt2"), ("opt", "bloom"), ("mistral", "gemma"), ("phi", "mamba"), ("mamba", "gpt_neox"), ("llama", "roberta")],
)
def test_it_writes_the_most_probable_tokens_of_all_members(member: Make, kinds: tuple[str, str]) -> None:
    """After prompts of unequal length."""
    members = [member(kind) for kind in kinds]
    written = FusedLanguageModel(tuple(members), WEIGHTS, "causal-lm").write(PROMPTS, 6)
    assert written == [written_by_hand(members, prompt, 6) for prompt in PROMPTS]
    assert len(set(written)) > 3, "else nothing was tried"
    assert any(written != FusedLanguageModel((each,), (1.0,), "causal-lm").write(PROMPTS, 6) for each in members)


def test_encoders_and_decoders_write_together(paired_model: Callable[[str], Path]) -> None:
    members = [open_model(paired_model(kind), task="seq2seq") for kind in ("t5", "bart")]
    written = FusedLanguageModel(tuple(members), WEIGHTS, "seq2seq").write(PROMPTS, 6)
    assert written == [written_by_hand(members, prompt, 6) for prompt in PROMPTS]


def test_each_decoder_begins_as_in_its_training(paired_model: Callable[[str], Path], tmp_path: Path) -> None:
    """With a start token of its own, as it is judged."""
    shutil.copytree(paired_model("t5"), tmp_path / "t5")
    file = tmp_path / "t5" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"decoder_start_token_id": 7}))
    members = [open_model(paired_model("bart"), task="seq2seq"), open_model(tmp_path / "t5", task="seq2seq")]
    written = FusedLanguageModel(tuple(members), WEIGHTS, "seq2seq").write(PROMPTS, 6)
    assert written == [written_by_hand(members, prompt, 6) for prompt in PROMPTS]


def test_it_writes_no_more_than_the_shortest_member_reads(language_model: Callable[..., Path]) -> None:
    members = (open_model(language_model("llama"), 16), open_model(language_model("gpt2"), 6))
    fused = FusedLanguageModel(members, WEIGHTS, "causal-lm")
    assert fused.max_length == 6
    short, long = Passage("great day\n", ""), Passage("the day is great and very good\n", "")
    written = fused.write([short, long], 3)
    assert written[0] is not None
    assert written[1] is None


def test_it_is_judged_by_the_mean_of_probabilities(member: Make) -> None:
    members = [member("llama"), member("gpt2")]
    passages = [Passage(record["prompt"] + "\n", record["target"]) for record in dialogs(23)]
    held = Records(tuple(passages), ("",) * 23, "held")
    found = FusedLanguageModel(tuple(members), WEIGHTS, "causal-lm").evaluate(held)
    reader = members[0].loaded.reader
    losses, hits, count = 0.0, 0, 0
    for passage in passages:
        prompt = reader(passage.prompt).input_ids
        target = torch.tensor([*reader(passage.target, add_special_tokens=False).input_ids, reader.eos_token_id])
        whole = torch.tensor([[*prompt, *target.tolist()]])
        with torch.no_grad():
            logs = mixed([each.module(whole).logits[0, len(prompt) - 1 : -1] for each in members])
        losses -= float(logs.gather(1, target[:, None]).sum())
        hits += int((logs.argmax(1) == target).sum())
        count += len(target)
    assert found["figures"]["loss"] == pytest.approx(losses / count, rel=1e-5)
    assert found["figures"]["accuracy"] == pytest.approx(hits / count)
    assert (found["records"], found["not_predicted"], found["max_length"]) == (23, 0, 16)


def test_nothing_to_judge_by_is_a_sentence(language_model: Callable[..., Path]) -> None:
    fused = FusedLanguageModel((open_model(language_model("llama"), 4),), (1.0,), "causal-lm")
    with fails_with("data.no_targets"):
        fused.evaluate(Records((Passage("the very good great day\n", "great"),), ("",), "held"))


# --- as a folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first test that needs it keeps a bundle for the others."""
    return tmp_path_factory.mktemp("whole") / "bundle"


@pytest.fixture
def bundle(cotune: Cotune, language_model: Callable[..., Path], folder: Path, whole: Path) -> Path:
    """In the present folder, beside held.jsonl; the test may change it."""
    write_dialogs(folder / "held.jsonl", 30)
    if not whole.exists():
        shown = cotune("fuse", language_model("llama"), language_model("gpt2"), *HELD, "--out", "bundle", "--json")
        assert (shown.code, shown.err) == (0, "")
        assert json.loads(shown.out)["out"] == "bundle"
        (folder / "bundle").rename(whole)
    return Path(shutil.copytree(whole, folder / "bundle"))


def test_commands_judge_the_folder_and_write_with_it(cotune: Cotune, bundle: Path) -> None:
    found = json.loads(cotune("evaluate", "bundle", *HELD, "--json").out)
    opened = open_fused_language_model("bundle", "cpu")
    records = read_records(DataConfig(source="held.jsonl", prompt="prompt", target="target"), None, "causal-lm")
    assert found["figures"]["loss"] == pytest.approx(opened.evaluate(records)["figures"]["loss"])
    written = json.loads(cotune("predict", "bundle", "great day", " ", "--max-new-tokens", "4", "--json").out)
    [expected] = opened.write([Passage("great day\n", "")], 4)
    assert [(each["text"], each["reason"]) for each in written] == [(expected, ""), (None, "blank prompt")]


def test_equal_weights_need_no_records(cotune: Cotune, language_model: Callable[..., Path], folder: Path) -> None:
    call = ("fuse", language_model("llama"), language_model("gpt2"), "--method", "average")
    assert cotune(*call, "--out", "even").code == 0
    opened = open_fused_language_model("even", "cpu")
    assert opened.weights == (0.5, 0.5)
    write_dialogs(folder / "held.jsonl", 30)
    fused = json.loads(cotune(*call, *HELD, "--json").out)["fused"]
    judged = json.loads(cotune("evaluate", "even", *HELD, "--json").out)["figures"]
    assert judged["loss"] == pytest.approx(fused["loss"], rel=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"labels": ["bad", "good"]},
        {"method": "vote"},
        {"method": "stacking"},
        {"temperatures": [2.0, 1.0]},
        {"weights": [0.5, 0.6]},
        {"weights": [float("nan"), 0.5]},
        {"task": "sequence-classification"},
        {"task": "regression"},
    ],
    ids=str,
)
def test_a_document_that_says_anything_else_is_refused(cotune: Cotune, bundle: Path, change: dict[str, Any]) -> None:
    file = bundle / FUSION_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with fails_with("model.fusion_damaged"):
        open_fused_language_model("bundle", "cpu")
    shown = cotune("predict", "bundle", "great day")
    assert shown.code == 2
    assert "Traceback" not in shown.err


def test_a_place_that_cannot_be_written_is_a_sentence(cotune: Cotune, language_model: Callable[..., Path], folder: Path) -> None:
    (folder / "file").touch()
    members = (language_model("llama"), language_model("gpt2"))
    shown = cotune("fuse", *members, "--method", "average", "--out", "file/bundle")
    assert (shown.code, "file/bundle cannot be written" in shown.err) == (1, True)


def test_a_member_that_was_changed_is_refused(bundle: Path) -> None:
    (member_folder(bundle, 2) / "tokenizer_config.json").write_text("{}")
    with fails_with("model.member_changed"):
        open_fused_language_model("bundle", "cpu")


def test_a_model_inside_a_member_does_not_stand_in_for_it(bundle: Path, language_model: Callable[..., Path]) -> None:
    """A member without files of its own has a hash, too, which holds for whatever lies in its model/."""
    member = member_folder(bundle, 2)
    shutil.rmtree(member)
    shutil.copytree(language_model("gpt2"), member / "model")
    file = bundle / FUSION_FILE
    document = json.loads(file.read_text())
    file.write_text(json.dumps(document | {"members": [document["members"][0], content_hash(member)]}))
    with fails_with("model.member_changed"):
        open_fused_language_model("bundle", "cpu")


def test_a_member_may_say_how_its_answers_are_packed(bundle: Path) -> None:
    expected = open_fused_language_model("bundle", "cpu").write(PROMPTS, 3)
    member = member_folder(bundle, 2)
    file = member / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"return_dict": False}))
    document = json.loads((bundle / FUSION_FILE).read_text())
    (bundle / FUSION_FILE).write_text(json.dumps(document | {"members": [document["members"][0], content_hash(member)]}))
    assert open_fused_language_model("bundle", "cpu").write(PROMPTS, 3) == expected


def test_members_of_other_tokenizers_are_refused(cotune: Cotune, folder: Path) -> None:
    """Also where nothing is measured."""
    write_language_model(folder / "first")
    write_language_model(folder / "second")
    file = folder / "second" / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    first, second = [word for word in vocabulary if word.isalpha()][:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(content), encoding="utf-8")
    shown = cotune("fuse", "first", "second", "--method", "average", "--out", "bundle")
    assert shown.code == 2
    assert not Path("bundle").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("fuse", "bundle", "bundle", "--method", "average", "--out", "nested"),
        ("distill", "bundle", "--student", "bundle/models/1", *HELD, "--out", "student"),
        ("evaluate", "bundle", "--data", "held.jsonl", "--text", "prompt", "--threshold", "good=0.5"),
    ],
    ids=lambda words: words[0],
)
def test_where_a_single_model_is_expected_it_is_refused(cotune: Cotune, bundle: Path, words: tuple[str, ...]) -> None:
    shown = cotune(*words)
    assert shown.code == 2
    assert "Traceback" not in shown.err
    assert not Path("nested").exists()
    assert not Path("student").exists()


def test_fitted_weights_are_those_that_were_printed(cotune: Cotune, bundle: Path, language_model: Callable[..., Path]) -> None:
    found = json.loads(cotune("fuse", language_model("llama"), language_model("gpt2"), *HELD, "--json").out)
    assert np.allclose(open_fused_language_model("bundle", "cpu").weights, found["fused"]["weights"])
