"""A base model in 4 bits: it computes, to the bit, what plain layers with the widened weights compute."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional

from cotune.data.config import TaskName
from cotune.models.architecture import AlignedRows
from cotune.models.base import quantized_layers
from cotune.models.base.lookup import find_base
from cotune.models.base.quantized_layers import QUANTIZABLE, QuantizedLinear, check_bitsandbytes, quantized_blocks
from cotune.models.checkpointing import checkpointing
from cotune.models.config import LoraConfig, ModelConfig
from cotune.models.export import ADAPTERS, export_model
from cotune.models.record_independence import check_independence, in_float64
from cotune.models.trainable import TrainableModel, open_model
from cotune.plan.load import parse_plan
from cotune.privacy.mechanisms.per_example import per_example
from cotune.reporting.model_card import model_card
from tests.support.failures import fails_with
from tests.support.frozen_weights import SIZE, TARGETS, Watched, batch_of, check_equal, gradients, write_base, write_causal
from tests.support.tiny_models import copy_without_weights, write_model

NF4 = (  # Dettmers et al., NeurIPS 2023, appendix E
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
TABLE = np.array(NF4, dtype=np.float32)
ENCODERS = ("bert", "distilbert", "roberta", "xlm-roberta")
SHORT = ("llama", "qwen2", "gemma", "bert")
KINDS = [kind if kind in SHORT else pytest.param(kind, marks=pytest.mark.long) for kind in sorted(QUANTIZABLE)]
LABELS = ("bad", "good")
Make = Callable[..., TrainableModel]


def write(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> Path:
    if kind not in ENCODERS:
        return write_base(folder, kind, dtype)
    return write_model(kind.removeprefix("xlm-"), folder)


def opened(folder: Path, quantization: str, lora: LoraConfig | None, **more: Any) -> TrainableModel:
    task = more.pop("task", "causal-lm")
    needs_weights = more.pop("needs_weights", True)
    config = ModelConfig.model_validate({"base": str(folder), "max_length": 16, "quantization": quantization, **more})
    labels = () if task == "causal-lm" else LABELS
    return open_model(config, labels, lora, 1, "cpu", task, needs_weights=needs_weights)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """(kind, quantization=, lora=) -> a model with adapters; bases are in float32."""

    def make(kind: str, quantization: str = "nf4", lora: LoraConfig | None = None, **more: Any) -> TrainableModel:
        folder = tmp_path / kind
        if not folder.exists():
            write(folder, kind)
        task: TaskName = more.pop("task", "sequence-classification" if kind in ENCODERS else "causal-lm")
        lora = lora or LoraConfig(
            rank=2, factors="ab", targets="auto" if kind in ENCODERS else TARGETS.get(kind, ["q_proj", "down_proj"])
        )
        return opened(folder, quantization, lora, task=task, **more)

    return make


def quantized(model: TrainableModel) -> dict[str, QuantizedLinear]:
    return {name: layer for name, layer in model.layers if isinstance(layer, QuantizedLinear)}


def widened_by_table(packed: Tensor, weight: Tensor) -> Tensor:
    """What bytes stand for: entries of the table times the largest magnitude of their block, without bitsandbytes."""
    pairs = packed.flatten().numpy()
    numbers = np.stack([pairs >> 4, pairs & 15], axis=1).reshape(-1, 64)
    maxima = weight.reshape(-1, 64).abs().amax(dim=1).numpy()
    return torch.from_numpy(TABLE[numbers] * maxima[:, None]).reshape(weight.shape)


def plainly_quantized(model: TrainableModel, names: list[str]) -> TrainableModel:
    """A model in float32 whose weights of these layers are what bitsandbytes makes of them."""
    for name in names:
        layer: Any = model.module.get_submodule(name)
        packed, _ = quantize_4bit(layer.weight.data, blocksize=64, quant_type="nf4")
        layer.weight.data = widened_by_table(packed, layer.weight.data)
    return model


def trained_gradients(model: TrainableModel, dtype: torch.dtype) -> dict[str, Tensor]:
    names = model.names("lora")
    with model.with_random_weights(model.adapter_names()):
        return gradients(model, names, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_the_widened_weights(make: Make, kind: str, dtype: torch.dtype) -> None:
    small, full = make(kind), make(kind, "none")
    names = list(quantized(small))
    linear = [name for name, layer in full.layers if isinstance(layer, nn.Linear) and ".lora_" not in name]
    assert names == [name for name in linear if any(part.isdigit() for part in name.split("."))], (
        "all of the blocks, nothing else"
    )
    untouched = trained_gradients(full, dtype)
    expected = trained_gradients(plainly_quantized(full, names), dtype)
    check_equal(trained_gradients(small, dtype), expected)
    assert any(not torch.equal(untouched[name], expected[name]) for name in expected)
    assert small.parameter_count() == full.parameter_count()


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma", pytest.param("phi3", marks=pytest.mark.long)])
def test_gradients_are_those_of_single_records(make: Make, kind: str, again: bool) -> None:
    model = make(kind)
    model.load({n: t + 0.1 for n, t in model.state(model.adapter_names()).items()})
    trained = model.train_only(model.names("lora"))
    batch = batch_of(model)

    def losses(given: Any, again: bool = False) -> Tensor:
        with AlignedRows(), checkpointing(model.module, enabled=again):
            return model.loaded.task.losses(model.module, given, None)

    alone = [torch.autograd.grad(losses({k: v[row : row + 1] for k, v in batch.items()}).sum(), trained) for row in range(2)]
    with per_example(model.module, partial(losses, again=again)) as of:
        _, found = of.gradients(batch)
    for row, expected in enumerate(alone):
        assert any(gradient.any() for gradient in expected)
        for each, gradient in zip(found, expected, strict=True):
            torch.testing.assert_close(each[row], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_entries_of_the_table_times_the_maximum_of_their_block(tmp_path: Path, dtype: torch.dtype) -> None:
    """Rows are shorter than a block, for which bitsandbytes itself gives other numbers on a CPU."""
    folder = write(tmp_path / "base", "llama", dtype)
    name = "model.layers.0.self_attn.q_proj"
    layer = quantized(opened(folder, "nf4", None))[name]
    weight = load_file(folder / "model.safetensors")[f"{name}.weight"].float()
    found = layer.widened()
    assert torch.equal(found, widened_by_table(layer.weight, weight))
    scaled, blocks = (t.reshape(-1, 64) / weight.reshape(-1, 64).abs().amax(dim=1, keepdim=True) for t in (weight, found))
    nearest = (scaled[:, :, None] - torch.from_numpy(TABLE)).abs().amin(dim=2)
    torch.testing.assert_close((blocks - scaled).abs(), nearest, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("rows", "width"), [(6, 32), (6, 64), (6, 100), (6, 192), (6, 33), (5, 33), (1, 1), (9, 7)])
def test_rows_of_any_length(rows: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of real models are whole blocks; a weight that is none has one that is shorter. No compiler is asked for."""
    monkeypatch.setattr("bitsandbytes.backends.default.ops._dequantize_4bit_compute", None)
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    packed, maxima = quantized_layers._quantize(weight)
    found = quantized_layers._widen(packed, maxima, (rows, width))
    whole = functional.pad(weight.flatten(), (0, -weight.numel() % 64))
    more = functional.pad(packed.flatten(), (0, len(whole) // 2 - len(packed)))
    assert torch.equal(found.flatten(), widened_by_table(more, whole)[: weight.numel()])
    if width % 64 == 0:
        assert torch.equal(found, dequantize_4bit(*quantize_4bit(weight, blocksize=64, quant_type="nf4")))


def test_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    """Whatever type the files have that holds the weights, and however many threads there are."""
    found = []
    threads = torch.get_num_threads()
    for number, dtype in enumerate((torch.float32, torch.bfloat16)):
        torch.set_num_threads(number + 1)
        try:
            layers = quantized(opened(write(tmp_path / str(dtype), "llama", dtype), "nf4", None))
        finally:
            torch.set_num_threads(threads)
        found.append([(name, layer.weight.numpy().tobytes(), layer.maxima.numpy().tobytes()) for name, layer in layers.items()])
    assert found[0] == found[1]
    assert len(found[0]) == 14


def test_a_weight_is_quantized_before_the_next_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By transformers' own switch: its threads would read all of a file that is quantized more slowly."""
    from transformers import AutoConfig, core_model_loading

    wide: list[StorageWeakRef] = []
    quantize = quantized_layers._quantize

    def watched(weight: Tensor) -> Any:
        assert all(weight.expired() for weight in wide)
        wide.append(StorageWeakRef(weight.untyped_storage()))
        return quantize(weight)

    def no_threads(**_: Any) -> Any:
        raise AssertionError("threads read ahead")

    config = AutoConfig.for_model("llama", **{**SIZE, "intermediate_size": 96})  # of which no test has read a model
    folder = write_causal(tmp_path / "base", config)
    monkeypatch.setattr(quantized_layers, "_quantize", watched)
    monkeypatch.setattr(core_model_loading, "ThreadPoolExecutor", no_threads)
    before = dict(os.environ)
    assert len(quantized(opened(folder, "nf4", None))) == 14
    assert len(wide) >= 14
    assert dict(os.environ) == before
    with fails_with("model.not_loadable"):
        opened(folder, "none", None)


def test_a_bitsandbytes_that_gives_other_bytes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_bitsandbytes.cache_clear()
    check_bitsandbytes()
    check_bitsandbytes.cache_clear()
    monkeypatch.setattr(quantized_layers, "BLOCK", 128)
    with fails_with("model.other_bitsandbytes"):
        check_bitsandbytes()


def test_what_another_thread_loads_meanwhile_is_not_quantized(tmp_path: Path) -> None:
    folder = write(tmp_path / "base", "llama")
    with quantized_blocks("nf4"), ThreadPoolExecutor(1) as other:
        full = other.submit(opened, folder, "none", None).result()
    assert quantized(full) == {}


def quantized_otherwise(weight: Tensor, blocksize: int, quant_type: str, *, divides: bool, upward: bool) -> Any:
    """What bitsandbytes computes, but for a rounding: quotients in place of products, or halves to the upper number."""
    whole = len(weight) // blocksize * blocksize
    blocks = weight[:whole].reshape(-1, blocksize)
    maxima = blocks.abs().amax(dim=1, keepdim=True).clamp(min=1e-38)
    scaled = (blocks / maxima if divides else blocks * (1 / maxima)).flatten()
    last = weight[whole:].abs().amax().clamp(min=1e-38)
    scaled = torch.cat([scaled, weight[whole:] / last]).clamp(-1, 1)
    bounds = torch.from_numpy((TABLE[1:] + TABLE[:-1]) / 2)
    numbers = torch.bucketize(scaled, bounds, right=upward).to(torch.uint8)
    _, state = quantize_4bit(weight, blocksize=blocksize, quant_type=quant_type)
    return ((numbers[::2] << 4) | numbers[1::2]).unsqueeze(1), state


@pytest.mark.parametrize(("divides", "upward"), [(False, False), (True, False), (False, True)])
def test_a_bitsandbytes_that_rounds_a_little_otherwise_is_refused(
    monkeypatch: pytest.MonkeyPatch, divides: bool, upward: bool
) -> None:
    """Of sixteen million random weights one has other bytes with quotients in place of products."""
    monkeypatch.setattr("bitsandbytes.functional.quantize_4bit", partial(quantized_otherwise, divides=divides, upward=upward))
    check_bitsandbytes.cache_clear()
    with fails_with("model.other_bitsandbytes") if divides or upward else nullcontext():
        check_bitsandbytes()
    check_bitsandbytes.cache_clear()


def test_without_bitsandbytes(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    check_bitsandbytes.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with fails_with("model.no_bitsandbytes", "cotune[qlora]"):
        make("llama")
    assert make("llama", "none").parameter_count()
    check_bitsandbytes.cache_clear()


@pytest.mark.parametrize("kind", ["gpt2", "vit"])
def test_other_architectures_are_refused(base_model: Callable[[str], Path], kind: str) -> None:
    task: TaskName = "image-classification" if kind == "vit" else "sequence-classification"
    with fails_with("model.not_quantizable", kind, "llama"):
        opened(base_model(kind), "nf4", None, task=task)


def test_a_layer_for_mean_pooling_is_exact(make: Make) -> None:
    model = make("bert", pooling="mean")
    assert not any(f"{name}.".startswith(model.loaded.frozen) for name in quantized(model))
    assert len(quantized(model)) == 12


@pytest.mark.parametrize("low", [False, True])
def test_autograd_keeps_no_wide_copy_of_a_weight(make: Make, low: bool) -> None:
    layer = next(iter(quantized(make("llama")).values()))
    given = torch.randn(3, layer.in_features, requires_grad=True)
    with Watched() as watched, torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
        out = layer(given)
    assert [weight.expired() for weight in watched.weights] == [True]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
        expected = functional.linear(given, layer.widened(), layer.bias)
    assert torch.equal(out, expected)
    slope = torch.randn_like(out)
    assert torch.equal(*(torch.autograd.grad(each, given, slope)[0] for each in (out, expected)))


def test_weights_take_four_bits_and_a_half(make: Make) -> None:
    for layer in quantized(make("llama")).values():
        held = sum(t.numel() * t.element_size() for t in (*layer.parameters(), *layer.buffers()))
        assert held * 8 == 4.5 * layer.in_features * layer.out_features


def test_in_float64_weights_are_the_same(make: Make) -> None:
    model = make("llama")
    layer = next(iter(quantized(model).values()))
    before = layer.widened()
    with in_float64(model.module):
        found = layer(torch.eye(layer.in_features, dtype=torch.float64))
    assert found.dtype == torch.float64
    assert torch.equal(found.T, before.double())


def test_no_record_reaches_another(make: Make) -> None:
    model = make("llama")
    model.train_only(model.names("lora"))
    assert check_independence(model, "lora", "float32", slots=4, lengths=[16]) == torch.float32


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(tmp_path: Path, value: float) -> None:
    folder = write(tmp_path / "base", "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with fails_with("model.not_finite", "1"):
        opened(folder, "nf4", None)


@pytest.mark.parametrize(
    "given",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"load_in_8bit": True},  # which transformers reads as bitsandbytes' own 8 bits
        {"quant_method": "bitsandbytes_8bit"},
        {"quant_method": "fp8"},  # whose layers are of one kind on a GPU and of another without
        {"quant_method": "bitnet"},
        {},
        [1],
    ],
    ids=str,
)
def test_files_that_are_quantized_already(tmp_path: Path, given: Any) -> None:
    """Whatever library did it: its layers would be in the place of those whose hash the plan has."""
    folder = write(tmp_path / "base", "llama")
    settings = json.loads((folder / "config.json").read_bytes())
    settings["quantization_config"] = given
    (folder / "config.json").write_text(json.dumps(settings))
    for quantization in ("none", "nf4"):
        with fails_with("model.quantized_files"):
            opened(folder, quantization, None)


def test_a_configuration_may_say_that_nothing_is_quantized(tmp_path: Path) -> None:
    folder = write(tmp_path / "base", "llama")
    settings = json.loads((folder / "config.json").read_bytes())
    settings["quantization_config"] = None
    (folder / "config.json").write_text(json.dumps(settings))
    assert len(quantized(opened(folder, "nf4", None))) == 14


@pytest.mark.parametrize("mode", ["full", "blocks"])
def test_what_has_four_bits_is_never_trained(make: Make, mode: Any) -> None:
    model = make("llama")
    with fails_with("model.quantized_parameter", "4"):
        model.train_only(model.names(mode, layers=1))


def test_a_state_cannot_change_what_has_four_bits(make: Make) -> None:
    model = make("llama")
    name = "model.layers.0.self_attn.k_proj.weight"
    own = dict(model.parameters())[name]
    before = own.clone()
    for shape, code in (((32, 32), "model.foreign_state"), (own.shape, "model.quantized_parameter")):
        with fails_with(code):
            model.load({name: torch.ones(shape)})
        with fails_with("model.quantized_parameter"):
            model.state([name])
    assert torch.equal(own, before)


def test_a_server_without_weights_needs_no_bitsandbytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "base", "llama")
    lora = LoraConfig(rank=2)
    whole = opened(folder, "nf4", lora)
    small = copy_without_weights(folder, tmp_path / "small")
    check_bitsandbytes.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    pins = {key: value for key, value in whole.loaded.folder.pins.items() if key != "revision"}
    found = opened(small, "nf4", lora, needs_weights=False, **pins)
    assert [name for name, _ in found.parameters()] == [name for name, _ in whole.parameters()]
    assert found.parameter_count() == whole.parameter_count()
    names = found.adapter_names()
    check_equal(found.state(names), whole.state(names))
    assert found.loaded.folder.content_hash == whole.loaded.folder.content_hash
    check_bitsandbytes.cache_clear()


def test_settings_are_part_of_the_hash(tmp_path: Path) -> None:
    folder = str(write(tmp_path / "base", "llama"))
    plain, small = (find_base(ModelConfig(base=folder, quantization=each)) for each in ("none", "nf4"))
    assert plain.content_hash != small.content_hash
    assert plain.config_hash == small.config_hash
    for mine, theirs in ((plain, small), (small, plain)):
        assert find_base(ModelConfig(base=folder, base_hash=mine.content_hash, quantization=mine.quantization)) == mine
        with fails_with("model.other_quantization", theirs.quantization, mine.quantization):
            find_base(ModelConfig(base=folder, base_hash=theirs.content_hash, quantization=mine.quantization))
    with fails_with("model.other_hash"):
        find_base(ModelConfig(base=folder, base_hash="0" * 64, quantization="nf4"))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", [*KINDS, "opt with projections"])
def test_the_card_tells_transformers_to_quantize_the_same_layers(tmp_path: Path, kind: str) -> None:
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, BitsAndBytesConfig

    if kind == "opt with projections":
        config = AutoConfig.for_model("opt", **{**SIZE, "ffn_dim": 64, "word_embed_proj_dim": 16})
        folder = write_causal(tmp_path / "base", config)
    else:
        folder = write(tmp_path / "base", kind)
    task: TaskName = "sequence-classification" if kind in ENCODERS else "causal-lm"
    model = opened(folder, "nf4", None, task=task)
    prefix = model.prefix[0] if kind in ENCODERS else ""  # adapters of encoders are for the encoder alone
    data = {"source": "x.csv", "prompt": "p", "target": "t"}
    base = {"base": "base", "quantization": "nf4"}
    plan = parse_plan({"name": "toy", "task": "causal-lm", "train": "lora", "model": base, "data": data})
    card = model_card(plan, privacy=["p"], length=64, adapters=True)
    [told] = re.findall("^quantization = .*$", card, re.MULTILINE)
    said: dict[str, Any] = {"BitsAndBytesConfig": BitsAndBytesConfig}
    exec(told, said)
    loaded = (AutoModel if kind in ENCODERS else AutoModelForCausalLM).from_pretrained(
        folder, quantization_config=said["quantization"], dtype=torch.float32, device_map="cpu"
    )
    found = {name for name, layer in loaded.named_modules() if isinstance(layer, Linear4bit)}
    assert found == {name.removeprefix(prefix) for name in quantized(model)}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")  # of peft and others
def test_exported_model_and_adapters_say_what_was_trained(tmp_path: Path) -> None:
    """The merged one as plain transformers reads it, and the adapters on the base that transformers quantizes."""
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    config = AutoConfig.for_model("llama", **{**SIZE, "hidden_size": 64})  # for transformers rows must be whole blocks
    model = opened(write_causal(tmp_path / "base", config), "nf4", LoraConfig(rank=2, factors="ab"))
    ids = torch.arange(SIZE["vocab_size"] - 4, SIZE["vocab_size"])[None]
    with model.with_random_weights(model.adapter_names()), torch.no_grad():
        expected = model.module(input_ids=ids).logits
        export_model(model, tmp_path / "model")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=settings, dtype=torch.float32, device_map="cpu"
    )
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "model" / ADAPTERS)).train()  # else it computes in bfloat16
    full = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(tmp_path / "model" / ADAPTERS))
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(adapted(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(full(input_ids=ids).logits, expected, atol=1e-2)
    assert quantized(model), "the model itself is left as it is"
    with safe_open(tmp_path / "model" / ADAPTERS / "adapter_model.safetensors", framework="pt") as opened_file:
        assert opened_file.metadata()["base_quantization"] == "nf4"
