from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from cotune.errors import ModelError
from cotune.models.base import folder as base_files
from cotune.models.base.load import load_model
from cotune.models.base.load_checks import make_deterministic
from cotune.models.base.lookup import find_base
from cotune.models.config import ModelConfig
from tests.support.failures import fails_with
from tests.support.fork_server import preloaded
from tests.support.processes import forked

__all__ = ["forked"]  # fixture

LABELS = ("bad", "good", "so")
ARCHITECTURES = ("bert", "distilbert", "gpt2", "llama", "qwen2")


@pytest.fixture
def folder(base_model: Callable[[str], Path], tmp_path: Path) -> Path:
    """An own copy of the tiny bert, to spoil."""
    return Path(shutil.copytree(base_model("bert"), tmp_path / "base"))


def load(base: Path | str, labels: tuple[str, ...] = LABELS, seed: int = 1, **config: Any) -> Any:
    return load_model(ModelConfig(base=str(base), **config), labels, seed)


def refusal(base: Path | str, **config: Any) -> str:
    """The one sentence with which a base model is refused."""
    with pytest.raises(ModelError) as caught:
        load(base, **config)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert not sentence.endswith(".")
    assert ". " not in re.sub(r"\(.*\)", "", sentence)  # in parentheses stands what a library said
    return sentence


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


class Trap:
    """Unpickling it leaves a file behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


# --- what is refused


def test_a_folder_without_configuration(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "no config.json" in refusal(folder)


def test_a_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "no weights: expected *.safetensors" in refusal(folder)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.ckpt", "tf_model.h5"])
def test_pickled_weights_are_named_and_not_opened(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / name)  # opening it would never return
    sentence = refusal(folder)
    assert f"only as {name}" in sentence
    assert "convert it" in sentence


def test_a_pickle_beside_safetensors_is_ignored(folder: Path, tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin"):
        (folder / name).write_bytes(pickle.dumps(Trap(tmp_path / "executed")))
    load(folder)
    assert not (tmp_path / "executed").exists()
    with (folder / "model.pt").open("rb") as stream:
        pickle.load(stream)  # noqa: S301 - the trap works when it is opened
    assert (tmp_path / "executed").exists()


def test_a_missing_folder(tmp_path: Path) -> None:
    assert "is not a folder" in refusal(tmp_path / "nowhere")
    assert "is not a folder" in refusal("./nowhere")


def test_a_file_in_place_of_a_folder(folder: Path) -> None:
    assert "is not a folder" in refusal(folder / "model.safetensors")


@pytest.mark.parametrize("package", ["no_such_encoder", "../etc", "os.path", ""])
def test_an_unknown_package(package: str) -> None:
    assert f"package:{package} is not installed" in refusal(f"package:{package}")


@pytest.mark.parametrize("name", ["nobody/nothing-of-the-kind", "three/part/name", "with space"])
def test_an_unknown_hub_id(name: str) -> None:
    assert f"{name} was found neither as a folder nor on the Hugging Face hub" in refusal(name)


def test_a_wrong_hash(folder: Path) -> None:
    right = find_base(ModelConfig(base=str(folder))).content_hash
    sentence = refusal(folder, base_hash="0" * 64)
    assert right[:16] in sentence
    assert "0" * 16 in sentence
    assert load(folder, base_hash=right).folder.content_hash == right


@pytest.mark.parametrize("kind", ["vit", "no_such_architecture"])
def test_an_architecture_without_a_classifier(folder: Path, kind: str) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    assert "cannot be loaded as a sequence classifier" in refusal(folder)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"\xff" * 100, lambda b: b""])
def test_corrupt_safetensors(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    assert "model.safetensors, which holds no tensors" in refusal(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"\xef\xbb\xbf" + b, lambda b: b"[" * 100_000])
def test_a_damaged_file_is_named(folder: Path, name: str, damage: Callable[[bytes], bytes]) -> None:
    """What a library says of it is about lines and brackets, and would be told as if the architecture were at fault."""
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    sentence = refusal(folder)
    assert f"{name}, which is not JSON" in sentence
    assert "architecture" not in sentence


def test_an_index_of_shards_that_are_not_there(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "names 1 files that are not there, such as model-00002-of-00002.safetensors" in refusal(folder)
    (folder / "model.safetensors.index.json").write_text("[]")
    assert "names no weights" in refusal(folder)


@pytest.mark.parametrize("pad", [None, -1, 10**6])
def test_the_padding_token_of_the_configuration(folder: Path, pad: int | None) -> None:
    """None (and -1 in its place) is the tokenizer's business; a number without a row in the table is refused as that."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": pad}))
    if pad == 10**6:
        assert "pad_token_id = 1000000" in refusal(folder)
    else:
        loaded = load(folder)
        assert loaded.module.config.pad_token_id == loaded.reader.pad_token_id


def test_a_corrupt_configuration(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    assert "is not JSON" in refusal(folder)


def test_a_missing_tokenizer(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()
    assert "tokenizer" in refusal(folder)


def test_a_tokenizer_without_padding_and_end(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for key in ("pad_token", "eos_token"):
        config.pop(key)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert "neither a padding nor an end token" in refusal(folder)


def test_weights_of_another_architecture(folder: Path, base_model: Callable[[str], Path]) -> None:
    """An encoder that is not in the file would silently be a random one."""
    shutil.copy(base_model("llama") / "model.safetensors", folder / "model.safetensors")
    refusal(folder)


def test_weights_that_lack_a_layer(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "layer.1." not in name}
    assert 0 < len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    refusal(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(folder: Path, value: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(tensors) if "layer.1" in name)
    tensors[name].view(-1)[0] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert name.removeprefix("bert.") in refusal(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_pointer_of_git_lfs_in_place_of_a_file(folder: Path, name: str) -> None:
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:aaaa\nsize 438000000\n")
    said = refusal(folder)
    assert name in said
    assert "git lfs pull" in said


def test_encoder_weights_of_another_size(folder: Path) -> None:
    edit(folder / "config.json", intermediate_size=48)
    refusal(folder)


# --- the hash


def test_the_hash_changes_with_one_byte_of_the_weights(folder: Path) -> None:
    config = ModelConfig(base=str(folder))
    before = find_base(config).content_hash
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert find_base(config).content_hash != before
    content[-1] ^= 1
    file.write_bytes(content)
    assert find_base(config).content_hash == before


def hash_of(path: Path) -> str:
    return find_base(ModelConfig(base=str(path))).content_hash


DECIDING = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "bpe.codes",
    "spiece.model",
    "source.spm",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
    "modules.json",
    "1_Pooling/config.json",
    "model.safetensors.index.json",
    "more.safetensors",
)


@pytest.mark.parametrize("name", DECIDING)
def test_the_hash_covers_whatever_decides_what_a_record_becomes(folder: Path, name: str) -> None:
    """Whether such a file is there, and every byte of it."""
    file = folder / name
    file.unlink(missing_ok=True)
    hashes = [hash_of(folder)] if name != "config.json" else []
    file.parent.mkdir(exist_ok=True)
    for content in ("{}", "{ }"):
        file.write_text(content)
        hashes.append(hash_of(folder))
    assert len(set(hashes)) == len(hashes)


def test_hash_covers_every_tokenizer_file() -> None:
    """As its sources name them: classes that need a package more cannot be imported."""
    sources = (Path(transformers.__file__).parent / "models").glob("*/tokenization_*.py")
    tables = [re.search(r"VOCAB_FILES_NAMES = \{(.*?)\}", file.read_text(encoding="utf-8"), re.DOTALL) for file in sources]
    names = {name for table in tables if table for name in re.findall(r":\s*\"([^\"]+)\"", table[1])}
    assert {"tokenizer.json", "vocab.txt", "bpe.codes"} <= names
    assert [name for name in names if not base_files.is_model_file(name)] == []


def _open_tokenizer(folder: str, answer: Connection) -> None:
    """Tell which files under the folder Python itself opens; nobody takes the hook away again."""
    opened: list[str] = []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answer.send((set(tokenizer.chat_template), [name for name in opened if name.startswith(folder)]))


def test_the_hash_covers_every_file_that_a_tokenizer_opens(folder: Path, forked: Callable[..., BaseProcess]) -> None:
    """By the paths that Python itself opens, whatever transformers calls them."""
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    told, answer = preloaded().Pipe(duplex=False)
    forked(_open_tokenizer, str(folder), answer)
    answer.close()
    templates, names = told.recv()
    assert templates == {"default", "tool_use"}
    opened = {Path(name).relative_to(folder).as_posix() for name in names}
    assert {"tokenizer_config.json", "additional_chat_templates/tool_use.jinja"} <= opened
    assert opened <= base_files.list_model_files(folder).keys()


@pytest.mark.parametrize("name", ["README.md", ".gitattributes", "modeling.py", "pytorch_model.bin", "onnx/model.onnx"])
def test_the_hash_leaves_out_what_is_never_opened(folder: Path, name: str) -> None:
    before = hash_of(folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("changed")
    assert hash_of(folder) == before


def test_the_hash_is_that_of_every_copy(folder: Path, tmp_path: Path) -> None:
    """Wherever it is, and also where files are links, as the hub's snapshots have them."""
    before = hash_of(folder)
    moved = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    assert hash_of(moved) == before
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in moved.iterdir():
        (linked / file.name).symlink_to(file)
    assert hash_of(linked) == before
    (moved / "vocab.txt").write_text("a")
    swapped = hash_of(moved)
    (moved / "vocab.txt").rename(moved / "merges.txt")
    assert len({before, swapped, hash_of(moved)}) == 3


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "sub/model.safetensors", "model.bin"])
def test_weights_beyond_the_hash_are_not_loaded(folder: Path, name: str) -> None:
    edit(folder / "config.json", transformers_weights=name)
    assert "the hash covers no others" in refusal(folder)


def test_shards_beyond_the_hash_are_not_loaded(folder: Path) -> None:
    index = {"metadata": {}, "weight_map": {"embeddings.weight": "../one.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "the hash covers no others" in refusal(folder)


def test_a_snapshot_of_the_hub_shows_its_commit(folder: Path, tmp_path: Path) -> None:
    commit = "0123456789abcdef" * 2 + "01234567"
    found = find_base(ModelConfig(base=str(shutil.copytree(folder, tmp_path / "snapshots" / commit))))
    assert found.revision == commit
    both = {"base_hash": found.content_hash, "config_hash": found.config_hash}
    assert found.pins == {**both, "revision": commit}
    assert find_base(ModelConfig(base=str(folder))).pins == both


# --- nothing in the folder is executed

EVIL = "import pathlib\npathlib.Path({marker!r}).touch()\nclass Evil:\n    pass\n"


@pytest.mark.parametrize(
    "setting",
    [
        {"attn_implementation": "somebody/kernel"},
        {"_attn_implementation": "paged|somebody/kernel@main:f"},
        {"text_config": {"attn_implementation": "somebody/kernel"}},
        {"attn_implementation": {"text_config": "somebody/kernel"}},
        {"experts_implementation": "somebody/kernel"},
    ],
)
def test_kernels_of_the_hub_are_not_fetched(folder: Path, setting: dict[str, Any]) -> None:
    """Code that is fetched from elsewhere is covered by no hash."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **setting}))
    assert "names code of the Hugging Face hub" in refusal(folder)


@pytest.mark.parametrize("kind", ["bert", "evil"])
def test_code_in_the_folder_is_not_executed(folder: Path, tmp_path: Path, kind: str) -> None:
    marker = tmp_path / "executed"
    (folder / "evil.py").write_text(EVIL.format(marker=str(marker)))
    classes = ("AutoConfig", "AutoModel", "AutoModelForSequenceClassification")
    edit(folder / "config.json", model_type=kind, auto_map=dict.fromkeys(classes, "evil.Evil"))
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})
    if kind == "bert":
        assert type(load(folder).module).__module__.startswith("transformers.")
    else:
        refusal(folder)
    assert not marker.exists()
    exec(compile((folder / "evil.py").read_text(), "evil.py", "exec"), {})
    assert marker.exists()  # the module does have the side effect


# --- the head


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_new_head_is_drawn_from_the_seed_alone(base_model: Callable[[str], Path], kind: str) -> None:
    first, again, other = (load(base_model(kind), seed=seed).module.state_dict() for seed in (1, 1, 2))
    prefix = load(base_model(kind)).module.base_model_prefix + "."
    assert all(torch.equal(first[name], again[name]) for name in first)
    different = {name for name in first if not torch.equal(first[name], other[name])}
    assert different
    assert not any(name.startswith(prefix) for name in different)


def test_loading_leaves_the_global_generator_alone(base_model: Callable[[str], Path]) -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    load(base_model("bert"), seed=5)
    assert torch.equal(torch.get_rng_state(), before)


def classifier(folder: Path, labels: tuple[str, ...], base: Path) -> torch.Tensor:
    """Writes a fine-tuned classifier on the base model into the folder; returns its head's weights."""
    names = dict(enumerate(labels))
    module = AutoModelForSequenceClassification.from_pretrained(
        str(base), id2label=names, label2id={name: i for i, name in names.items()}
    )
    torch.nn.init.constant_(module.classifier.weight, 0.25)
    module.save_pretrained(folder)
    return torch.full((len(labels), 16), 0.25)


@pytest.mark.parametrize("labels", [LABELS, ("LABEL_0", "LABEL_1", "LABEL_2")])
def test_a_head_for_the_same_labels_is_kept(folder: Path, base_model: Callable[[str], Path], labels: tuple[str, ...]) -> None:
    """So is one for as many that it does not name."""
    weights = classifier(folder, labels, base_model("bert"))
    loaded = load(folder)
    assert torch.equal(loaded.module.classifier.weight, weights)
    assert loaded.module.config.id2label == {0: "bad", 1: "good", 2: "so"}
    assert loaded.module.config.label2id == {"bad": 0, "good": 1, "so": 2}


@pytest.mark.parametrize("labels", [("x", "y"), ("w", "x", "y", "z"), ("x", "y", "z"), ("good", "bad", "so")])
def test_a_head_for_other_labels_is_replaced(folder: Path, labels: tuple[str, ...], base_model: Callable[[str], Path]) -> None:
    classifier(folder, labels, base_model("bert"))
    weight = load(folder).module.classifier.weight
    assert weight.shape == (3, 16)
    assert len(weight.unique()) == 3 * 16  # drawn, not the old constant
    assert torch.equal(weight, load(folder).module.classifier.weight)
    assert not torch.equal(weight, load(folder, seed=2).module.classifier.weight)


def test_a_head_for_another_task_is_replaced(folder: Path, base_model: Callable[[str], Path]) -> None:
    """A text classifier's head has the shape and the names of a token classifier's."""
    weights = classifier(folder, LABELS, base_model("bert"))
    loaded = load_model(ModelConfig(base=str(folder)), LABELS, 1, "token-classification")
    assert loaded.module.classifier.weight.shape == weights.shape
    assert not torch.equal(loaded.module.classifier.weight, weights)


@pytest.mark.parametrize(
    ("content", "named"), [('{"peft_type": "LORA"}', "LORA"), ('{"peft_type": "IA3"}', "IA3"), ("{", "of unknown type")]
)
def test_an_adapter_in_place_of_a_model(folder: Path, content: str, named: str) -> None:
    (folder / "adapter_config.json").write_text(content)
    assert f"is an adapter ({named}) and not a model" in refusal(folder)


def test_mean_pooling_is_not_for_token_classification(folder: Path) -> None:
    with fails_with("model.no_mean_pooling", "model.pooling", "mean", "token"):
        load_model(ModelConfig(base=str(folder), pooling="mean"), LABELS, 1, "token-classification")


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_no_dropout_in_a_token_classifier_either(base_model: Callable[[str], Path], kind: str) -> None:
    """The heads of decoders have one of 0.1 that no setting of theirs names."""
    loaded = load_model(ModelConfig(base=str(base_model(kind))), LABELS, 1, "token-classification")
    assert not any(m.training and m.p for m in loaded.module.modules() if isinstance(m, torch.nn.Dropout))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_loaded_model_is_frozen_float32_without_dropout(base_model: Callable[[str], Path], kind: str) -> None:
    loaded = load(base_model(kind))
    dropouts = [m for m in loaded.module.modules() if isinstance(m, torch.nn.Dropout)]
    assert not any(m.p or m.training for m in dropouts)
    assert all(m.training for m in loaded.module.modules() if isinstance(m, torch.nn.Linear))
    assert {p.dtype for p in loaded.module.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in loaded.module.parameters())
    assert loaded.module.config.pad_token_id == loaded.reader.pad_token_id


def test_the_encoder_is_the_one_in_the_file(base_model: Callable[[str], Path]) -> None:
    loaded = load(base_model("bert"))
    stored = load_file(base_model("bert") / "model.safetensors")
    own = loaded.module.bert.state_dict()
    assert set(stored) == set(own)
    assert all(torch.equal(stored[name], own[name]) for name in stored)


@pytest.mark.parametrize(("asked", "given"), [(8, 8), (32, 32), (500, 32)])
def test_texts_are_not_longer_than_the_positions(base_model: Callable[[str], Path], asked: int, given: int) -> None:
    assert load(base_model("bert"), max_length=asked).max_length == given


def test_a_missing_padding_token_is_the_end_token(base_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(base_model("gpt2"), tmp_path / "base"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("pad_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load(folder)
    assert loaded.reader.pad_token == loaded.reader.eos_token == "[SEP]"
    assert loaded.module.config.pad_token_id == 3


@pytest.mark.parametrize("layer", ["dropout", "drop_path", "layerdrop"])
def test_nothing_in_training_is_left_to_chance(layer: str) -> None:
    """Two passes under different seeds give the same bits, whatever a model calls what it leaves out."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    image = {"image_size": 16, "patch_size": 4}
    config: Any
    match layer:
        case "dropout":
            config = transformers.BertConfig(**sizes, vocab_size=20, hidden_dropout_prob=0.5)
        case "drop_path":
            config = transformers.BeitConfig(**sizes, **image, drop_path_rate=0.5)
        case _:
            config = transformers.OPTConfig(vocab_size=20, hidden_size=16, ffn_dim=32, num_attention_heads=2, layerdrop=0.5)
    images = layer == "drop_path"
    kind = transformers.AutoModelForImageClassification if images else transformers.AutoModelForSequenceClassification
    module = kind.from_config(config)
    make_deterministic(module)
    given = {"pixel_values": torch.randn(3, 3, 16, 16)} if images else {"input_ids": torch.full((1, 4), 5)}
    answers = []
    for seed in range(8):
        torch.manual_seed(seed)
        answers.append(module(**given).logits)
    assert all(torch.equal(answer, answers[0]) for answer in answers)


class _Own(nn.Module):
    """A module with a parameter and a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(3))
        self.inner = nn.Dropout(0.5)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.inner(rows) + self.token


class _Masking(_Own):
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows * torch.rand(3).round() if self.training else super().forward(rows)


class _MaskingToo(_Masking):
    """Its own code does not ask for the mode."""


@pytest.mark.parametrize(
    ("kind", "stays"), [(_Own, True), (_Masking, False), (_MaskingToo, False), (nn.MultiheadAttention, False)]
)
def test_parameters_outside_layers_get_per_row_gradients(kind: Callable[..., nn.Module], stays: bool) -> None:
    module = kind(4, 2) if kind is nn.MultiheadAttention else kind()
    make_deterministic(module)
    assert module.training == stays
    assert not any(m.training for m in module.modules() if isinstance(m, nn.Dropout))


def test_batch_norm_keeps_statistics_of_the_base_model() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    make_deterministic(module)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module(torch.randn(8, 3))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert module[0].training
