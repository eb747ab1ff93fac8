from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cotune.data.tasks.classes import logits
from cotune.data.tasks.text import collator, encode
from cotune.models.base.load import load_model
from cotune.models.config import LoraConfig, ModelConfig
from cotune.models.export import export_model
from cotune.models.trainable import State, TrainableModel

LABELS = ("so so", "good", "bad")
CASES = [
    ("bert", "native", "lora"),
    ("bert", "mean", "head"),
    ("bert", "mean", "lora"),
    ("bert", "mean", "full"),
    ("distilbert", "mean", "full"),
    ("gpt2", "native", "lora"),
    ("llama", "native", "head"),
    ("llama", "native", "lora"),
    ("llama", "native", "full"),
]

READER = """
import json, sys
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
folders, texts = json.loads(sys.stdin.read())
found = {}
for folder in folders:
    module, report = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    module.eval()
    rows = [tokenizer(text, return_tensors="pt") for text in texts]
    with torch.no_grad():
        scores = [module(input_ids=r["input_ids"], attention_mask=r["attention_mask"]).logits[0].tolist() for r in rows]
    found[folder] = {
        "logits": scores,
        "labels": [module.config.id2label[i] for i in range(module.config.num_labels)],
        "numbers": module.config.label2id,
        "class": type(module).__module__,
        "not in the file": sorted(map(str, report["missing_keys"])),
        "only in the file": sorted(map(str, report["unexpected_keys"])),
    }
assert not any(name.split(".")[0] in ("cotune", "peft") for name in sys.modules), "a plain installation"
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Exported:
    """A fine-tuned model, what it says, and the folder that it was written to."""

    model: TrainableModel
    before: State
    logits: Tensor
    folder: Path


def make(base: Path, kind: str, pooling: str, mode: Any) -> TrainableModel:
    """The model in some state of a stage."""
    config = ModelConfig.model_validate({"base": str(base), "pooling": pooling, "max_length": 32})
    lora = LoraConfig(rank=2) if mode == "lora" else None
    model = TrainableModel(load_model(config, LABELS, 1), lora, 1, torch.device("cpu"))
    generator = torch.Generator().manual_seed(2)
    names = model.names(mode)
    model.load({n: t + 0.2 * torch.randn(t.shape, generator=generator) for n, t in model.state(names).items()})
    return model


@torch.no_grad()
def scores(model: TrainableModel, texts: tuple[str, ...]) -> Tensor:
    collate = collator(model.module, model.loaded.reader, model.device)
    rows = encode(model.loaded.reader, texts, 32)
    return torch.cat([logits(model.module, collate([{"input_ids": row, "labels": 0}])) for row in rows])


@pytest.fixture(scope="module")
def exported(
    base_model: Callable[[str], Path], texts: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str, str], Exported]:
    root = tmp_path_factory.mktemp("exported")
    made = {}
    for kind, pooling, mode in CASES:
        model = make(base_model(kind), kind, pooling, mode)
        before = model.state(name for name, _ in model.parameters())
        said = scores(model, texts)
        folder = root / "models" / f"{kind}-{pooling}-{mode}"
        export_model(model, folder)
        made[kind, pooling, mode] = Exported(model, before, said, folder)
    return made


@pytest.fixture(scope="module")
def read(exported: dict[tuple[str, str, str], Exported], texts: tuple[str, ...]) -> dict[str, Any]:
    """What another process, which has transformers only, finds in the folders."""
    question = json.dumps([[str(e.folder) for e in exported.values()], texts])
    answer = subprocess.run([sys.executable, "-c", READER], input=question, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    found: dict[str, Any] = json.loads(answer.stdout)
    return found


@pytest.mark.parametrize("case", CASES)
def test_transformers_alone_reads_the_same_model(
    exported: dict[tuple[str, str, str], Exported], read: dict[str, Any], case: tuple[str, str, str]
) -> None:
    made = exported[case]
    found = read[str(made.folder)]
    torch.testing.assert_close(torch.tensor(found["logits"]), made.logits, atol=1e-4, rtol=1e-4)
    assert found["labels"] == list(LABELS)
    assert found["numbers"] == {"so so": 0, "good": 1, "bad": 2}
    assert found["class"].startswith("transformers.models.")
    assert found["not in the file"] == found["only in the file"] == []


@pytest.mark.parametrize("case", CASES)
def test_the_model_itself_is_left_alone(
    exported: dict[tuple[str, str, str], Exported], texts: tuple[str, ...], case: tuple[str, str, str]
) -> None:
    made = exported[case]
    after = made.model.state(name for name, _ in made.model.parameters())
    assert after.keys() == made.before.keys()
    assert all(torch.equal(after[name], made.before[name]) for name in after)
    assert any(".lora_" in name for name in after) == (case[2] == "lora")
    assert torch.equal(scores(made.model, texts), made.logits)
    assert any(layer.training for layer in made.model.loaded.module.modules())
    config = made.model.loaded.module.config.to_dict()
    assert not any(value for key, value in config.items() if "dropout" in key or "pdrop" in key)


def test_no_tensor_is_copied_where_the_model_is(
    base_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy on the device of a model that fills half of it would not fit."""
    loaded = load_model(ModelConfig(base=str(base_model("bert"))), LABELS, 3)

    def refuse(tensor: Tensor, memo: object) -> Tensor:
        raise AssertionError("a tensor was copied on its device")

    monkeypatch.setattr(Tensor, "__deepcopy__", refuse)
    monkeypatch.setattr(torch.nn.Parameter, "__deepcopy__", refuse)
    export_model(TrainableModel(loaded, None, 3, torch.device("cpu")), tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_the_states_say_something_else_than_the_base(
    exported: dict[tuple[str, str, str], Exported], texts: tuple[str, ...]
) -> None:
    for made in exported.values():
        state = dict(made.before)
        made.model.load({})
        assert not torch.allclose(scores(made.model, texts), made.logits, atol=1e-2)
        made.model.load(state)


@pytest.mark.parametrize("case", CASES)
def test_a_folder_holds_weights_configuration_and_tokenizer_only(
    exported: dict[tuple[str, str, str], Exported], base_model: Callable[[str], Path], case: tuple[str, str, str]
) -> None:
    made = exported[case]
    names = {file.name for file in made.folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    assert not any(name.endswith((".py", ".bin", ".pt", ".part")) for name in names)
    assert not any("lora" in name for name in load_file(made.folder / "model.safetensors"))
    written, base = (json.loads((f / "config.json").read_text()) for f in (made.folder, base_model(case[0])))
    dropouts = {key: value for key, value in base.items() if "dropout" in key or key.endswith("pdrop")}
    assert {key: written[key] for key in dropouts} == dropouts
    if case[0] != "llama":
        assert 0.1 in dropouts.values()
    assert not [f for f in made.folder.parent.iterdir() if f.name.startswith(".")]


def test_an_older_export_is_replaced(base_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "left-over.safetensors").write_bytes(b"old")
    model = make(base_model("bert"), "bert", "native", "head")
    export_model(model, folder)
    assert not (folder / "left-over.safetensors").exists()
    assert torch.equal(
        load_file(folder / "model.safetensors")["classifier.weight"],
        model.state(["classifier.weight"])["classifier.weight"],
    )
    assert [f.name for f in tmp_path.iterdir()] == ["model"]


def test_a_failed_export_leaves_the_older_one(base_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("old")
    model = make(base_model("bert"), "bert", "native", "head")

    class Full:
        def save_pretrained(self, _: Path) -> None:
            raise OSError("No space left on device")

    object.__setattr__(model.loaded, "reader", Full())
    with pytest.raises(OSError, match="No space left"):
        export_model(model, folder)
    assert (folder / "config.json").read_text() == "old"
    assert [f.name for f in tmp_path.iterdir()] == ["model"]
