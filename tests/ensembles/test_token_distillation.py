"""The loss of tokens: against one record at a time in float64, in parts against at once, and what never stands in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config

from cotune.data.tasks.token_losses import has_plain_output
from cotune.data.types import Passage
from cotune.ensembles.config import DistillationConfig
from cotune.ensembles.sequence_lessons import SequenceLessons
from cotune.ensembles.token_distillation import TokenStates, add_token_gradients, compare_tokens, mean_logs
from cotune.errors import CotuneError
from cotune.models.evaluation.language_model import open_language_model
from tests.support.language_models import dialogs, language_model, write_louder
from tests.support.tiny_models import VOCABULARY, tokenizer

__all__ = ["language_model"]  # fixtures

RECORDS = [Passage(record["prompt"] + "\n", record["target"]) for record in dialogs(7)]
LENGTH = 12
CONFIGS = (
    DistillationConfig(temperature=1.0),
    DistillationConfig(temperature=3.0, label_weight=0.3),
    DistillationConfig(label_weight=1.0),
    DistillationConfig(loss="mse", label_weight=0.5),
)


def opened(folder: Path) -> Any:
    return open_language_model(str(folder), "causal-lm", "cpu", LENGTH)


def lessons_of(student: Path, teachers: Sequence[Path], config: DistillationConfig) -> tuple[Any, SequenceLessons]:
    model = opened(student)
    examples = model.loaded.encode_unlabeled(RECORDS)
    return model, SequenceLessons(model, [opened(teacher) for teacher in teachers], examples, config)


def tokens_of(folder: Path, record: Passage) -> tuple[list[int], int]:
    """Prompt and target with its end, as far as a model reads them, and how many of them are the prompt."""
    reader = AutoTokenizer.from_pretrained(folder)
    prompt = reader(record.prompt).input_ids
    target = [*reader(record.target, add_special_tokens=False).input_ids, reader.eos_token_id]
    return [*prompt, *target][: LENGTH + 1], len(prompt)


def loss_by_hand(
    student: nn.Module, teachers: list[nn.Module], ids: list[int], prompt: int, config: DistillationConfig
) -> Tensor:
    """Of one record, token by token, as the papers write it."""
    read = torch.tensor([ids[:-1]])
    own = student(read).logits[0]
    with torch.no_grad():
        size = min(model(read).logits.shape[2] for model in (student, *teachers))  # rows behind mean no token
        taught = torch.stack([torch.softmax(teacher(read).logits[0, :, :size], dim=1) for teacher in teachers]).mean(dim=0)
    losses = []
    for place in range(prompt - 1, len(ids) - 1):
        crossed = -torch.log_softmax(own[place], dim=0)[ids[place + 1]]
        p = taught[place]
        if config.loss == "mse":
            q = own[place][: len(p)]
            matched = ((q - q.mean()) - (p.log() - p.log().mean())).square().mean()
        else:
            t = config.temperature
            p = p ** (1 / t) / (p ** (1 / t)).sum()
            matched = t * t * sum(p[v] * (p[v].log() - torch.log_softmax(own[place] / t, dim=0)[v]) for v in range(len(p)))
        losses.append(config.label_weight * crossed + (1 - config.label_weight) * matched)
    return torch.stack(losses).mean()


def gradients_by_hand(student: Path, teachers: Sequence[Path], config: DistillationConfig) -> dict[str, Tensor]:
    model, *others = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float64).eval() for f in (student, *teachers))
    losses = [loss_by_hand(model, others, *tokens_of(student, record), config) for record in RECORDS]
    torch.stack(losses).mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def check_gradients(model: Any, expected: dict[str, Tensor]) -> None:
    got = {name: parameter.grad for name, parameter in model.parameters()}
    assert {name for name, grad in got.items() if grad is not None} == expected.keys()
    for name, grad in expected.items():
        assert torch.allclose(got[name].double(), grad, rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("config", CONFIGS, ids=("kl", "mixed", "targets", "mse"))
def test_gradients_are_those_of_one_record_at_a_time(
    language_model: Callable[..., Path], tmp_path: Path, config: DistillationConfig
) -> None:
    teacher = write_louder(language_model("llama"), tmp_path / "teacher")
    model, lessons = lessons_of(language_model("gpt2"), [teacher], config)
    model.train_only([name for name, _ in model.parameters()])
    assert lessons.add_gradients(range(len(RECORDS)))
    check_gradients(model, gradients_by_hand(language_model("gpt2"), [teacher], config))


@pytest.mark.parametrize("tied", [False, True])
def test_several_teachers_are_the_mean_of_their_probabilities(
    language_model: Callable[..., Path], tmp_path: Path, tied: bool
) -> None:
    """Also of tables that are padded, of the student or of a teacher, and of 16 bits."""
    teachers = [
        write_louder(language_model("llama"), tmp_path / "wide", rows=len(VOCABULARY) + 9),
        write_louder(language_model("gpt2"), tmp_path / "narrow"),
    ]
    student = write_louder(language_model("llama", tied=tied), tmp_path / "student", factor=2, rows=len(VOCABULARY) + 3)
    config = DistillationConfig(label_weight=0.5, temperature=2.0)
    model, lessons = lessons_of(student, teachers, config)
    model.train_only([name for name, _ in model.parameters()])
    lessons.add_gradients(range(len(RECORDS)))
    check_gradients(model, gradients_by_hand(student, teachers, config))


def test_a_base_of_16_bits_is_trained_in_float32(language_model: Callable[..., Path], tmp_path: Path) -> None:
    """The numbers are those of the same weights in float32."""
    student = write_louder(language_model("llama", tied=True), tmp_path / "student", dtype=torch.bfloat16)
    teacher = write_louder(language_model("llama"), tmp_path / "teacher", dtype=torch.bfloat16)
    config = DistillationConfig(label_weight=0.5)
    model, lessons = lessons_of(student, [teacher], config)
    model.train_only([name for name, _ in model.parameters()])
    lessons.add_gradients(range(len(RECORDS)))
    check_gradients(model, gradients_by_hand(student, [teacher], config))


def random_states(sizes: tuple[int, ...], count: int = 11) -> tuple[TokenStates, list[TokenStates], nn.Linear, Tensor]:
    """A student with a trained output layer of the first size, teachers of the others, and target tokens."""
    generator = torch.Generator().manual_seed(0)
    states = []
    for size in sizes:
        layer = nn.Linear(6, size)
        with torch.no_grad():
            layer.weight.copy_(3 * torch.randn(size, 6, generator=generator))
            layer.bias.copy_(torch.randn(size, generator=generator))
        states.append((TokenStates(torch.randn(count, 6, generator=generator), layer), layer))
    tokens = torch.randint(0, min(sizes), (count,), generator=generator)
    return states[0][0], [each for each, _ in states[1:]], states[0][1], tokens


@pytest.mark.parametrize("config", CONFIGS, ids=("kl", "mixed", "targets", "mse"))
@pytest.mark.parametrize("most", [1, 40, 100])
def test_parts_give_what_all_tokens_at_once_give(config: DistillationConfig, most: int) -> None:
    found = []
    for limit in (most, 10**6):
        student, teachers, layer, tokens = random_states((17, 17, 19))
        leaf = student.rows.requires_grad_()
        loss = add_token_gradients(student, teachers, tokens, torch.linspace(0.1, 1, 11), config, most=limit)
        assert leaf.grad is not None
        assert layer.weight.grad is not None
        figures = compare_tokens(student, teachers, tokens, most=limit)
        found.append((loss, leaf.grad, layer.weight.grad, *figures.values()))
    for part, whole in zip(*found, strict=True):  # small entries are sums of large ones, which processors add in other orders
        assert torch.allclose(part, whole, rtol=1e-5, atol=1e-6 * float(1 + whole.abs().max()))


class _Largest(TorchDispatchMode):
    """Notes the entries of the largest tensor that any operation gives."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for each in found if isinstance(found, tuple | list) else (found,):
            if isinstance(each, Tensor):
                self.most = max(self.most, each.numel())
        return found


def test_shares_weigh_the_teachers_probabilities() -> None:
    scores = [torch.randn(4, 5), torch.randn(4, 7)]
    expected = 0.8 * torch.softmax(scores[0], dim=1) + 0.2 * torch.softmax(scores[1][:, :5], dim=1)
    assert torch.allclose(mean_logs(scores, 6, [0.8, 0.2]).exp(), expected, atol=1e-6)
    assert torch.allclose(mean_logs(scores, 6, [1.0, 0.0]), torch.log_softmax(scores[0], dim=1), atol=1e-6)


def test_scores_of_all_tokens_are_never_in_memory() -> None:
    student, teachers, _, tokens = random_states((50, 50), count=400)
    student.rows.requires_grad_()
    with _Largest() as seen:
        add_token_gradients(student, teachers, tokens, torch.full((400,), 1 / 400), DistillationConfig(), most=1000)
        compare_tokens(student, teachers, tokens, most=1000)
    assert 1000 <= seen.most <= 400 * 6, "hidden states of all tokens, scores of some"


def test_scores_that_are_bounded_afterwards_are_learned_too(language_model: Callable[..., Path], tmp_path: Path) -> None:
    """Gemma 2 bounds its scores: they are no linear function of its hidden states."""
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "head_dim": 8}
    config = Gemma2Config(vocab_size=len(VOCABULARY), num_key_value_heads=2, pad_token_id=0, final_logit_softcapping=1.0, **size)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "plain")
    tokenizer().save_pretrained(tmp_path / "plain")
    folder = write_louder(tmp_path / "plain", tmp_path / "bounded", factor=20)
    mixed = DistillationConfig(label_weight=0.5)
    model, lessons = lessons_of(folder, [language_model("llama")], mixed)
    assert not has_plain_output(model.module)
    model.train_only([name for name, _ in model.parameters()])
    lessons.add_gradients(range(len(RECORDS)))
    check_gradients(model, gradients_by_hand(folder, [language_model("llama")], mixed))


def test_figures_are_those_of_plain_softmax() -> None:
    student, [teacher], _, tokens = random_states((17, 17))
    figures = compare_tokens(student, [teacher], tokens)
    with torch.no_grad():
        own, taught = (torch.log_softmax(each.scores(slice(None)), dim=1).double() for each in (student, teacher))
    assert torch.allclose(figures["student"], functional.nll_loss(own, tokens, reduction="none"))
    assert torch.allclose(figures["teacher"], functional.nll_loss(taught, tokens, reduction="none"))
    assert torch.allclose(figures["kl"], (taught.exp() * (taught - own)).sum(dim=1), atol=1e-5)
    assert figures["agreement"].tolist() == (own.argmax(dim=1) == taught.argmax(dim=1)).double().tolist()


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_scores_of_a_teacher_that_are_no_numbers_are_refused(broken: float) -> None:
    scores = torch.zeros(2, 3)
    scores[1, 1] = broken
    with pytest.raises(CotuneError) as caught:
        mean_logs([torch.zeros(2, 3), scores], 3)
    assert caught.value.code == "model.teacher_not_finite"


def test_a_student_that_is_no_number_stops() -> None:
    student, teachers, layer, tokens = random_states((5, 5))
    with torch.no_grad():
        layer.weight[0] = torch.nan
    with pytest.raises(CotuneError) as caught:
        add_token_gradients(student, teachers, tokens, torch.ones(11), DistillationConfig())
    assert caught.value.code == "run.diverged"
