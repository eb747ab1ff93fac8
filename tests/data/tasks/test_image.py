from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import torch
import transformers
from safetensors.torch import load_file

from cotune.client.training.checks.gradient_checks import check_stages
from cotune.data.config import DataConfig
from cotune.data.readers.images import Image
from cotune.data.record_reading import organization_files, read_records
from cotune.data.records import Records
from cotune.data.tasks.classes import logits
from cotune.data.tasks.task import get_task
from cotune.models.base.load import load_model
from cotune.models.config import LoraConfig, ModelConfig
from cotune.models.features.cached import get_features
from cotune.models.features.head import feature_head
from cotune.models.trainable import TrainableModel
from cotune.plan.load import parse_plan
from cotune.plan.trained_parameters import get_plan_model
from tests.support.datasets import COLORS, write_images
from tests.support.failures import fails_with
from tests.support.tiny_models import PROCESSOR

TASK = get_task("image-classification")
LABELS = tuple(COLORS)


def read(path: Path, **config: Any) -> Records:
    return read_records(DataConfig(source=str(path), **config), task="image-classification")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images", 9)


def listing(images: Path, suffix: str) -> Path:
    """A file beside the folder that names every image in it."""
    files = sorted(f for f in images.rglob("*") if f.is_file())
    rows = [(f"{images.name}/{f.relative_to(images)}", f.parent.name) for f in files]
    out = images.parent / f"list.{suffix}"
    if suffix == "csv":
        out.write_text("image,label\n" + "".join(f"{path},{label}\n" for path, label in rows))
    else:
        pq.write_table(pa.table({"image": [f.read_bytes() for f in files], "label": [label for _, label in rows]}), out)
    return out


# --- records


def test_a_folder_a_list_and_bytes_are_the_same_records(images: Path) -> None:
    found = [read(images), read(listing(images, "csv")), read(listing(images, "parquet"))]
    assert [len(records) for records in found] == [9, 9, 9]
    assert found[0].label_counts() == {"blue": 3, "green": 3, "red": 3}
    assert len({records.fingerprint for records in found}) == 1
    assert len(set(found[0].identities)) == 9
    assert found[0].identities == found[1].identities == found[2].identities


def test_images_as_hugging_face_keeps_them(images: Path, tmp_path: Path) -> None:
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    file = next(f for f in images.rglob("*.png"))
    features = Features({"image": ImageFeature(), "label": Value("string")})
    made = Dataset.from_dict({"image": [{"bytes": file.read_bytes(), "path": None}], "label": ["red"]}, features=features)
    made.to_parquet(str(tmp_path / "hf.parquet"))
    assert read(tmp_path / "hf.parquet").inputs == tuple(image for image in read(images).inputs if image == opened_as(file))


def opened_as(file: Path) -> Image:
    from cotune.data.readers.images import open_image

    return open_image(file)


def test_the_column_has_a_name(images: Path) -> None:
    file = listing(images, "csv")
    file.write_text(file.read_text().replace("image,label", "scan,finding"))
    assert len(read(file, image="scan", label="finding")) == 9
    with fails_with("data.missing_column", "image", "image=COLUMN"):
        read(file, label="finding")


def test_organizations_are_folders_of_folders(tmp_path: Path) -> None:
    for name in ("north", "south.b"):
        write_images(tmp_path / "orgs" / name, 3)
    (tmp_path / "orgs" / ".cache" / "x").mkdir(parents=True)
    (tmp_path / "orgs" / "notes").mkdir()
    shutil.copy(listing(write_images(tmp_path / "orgs" / "images", 3), "csv"), tmp_path / "orgs" / "east.csv")
    files = organization_files(tmp_path / "orgs", "image-classification")
    assert list(files) == ["east", "images", "list", "north", "south.b"]
    with fails_with("data.not_a_file"):
        read_records(DataConfig(source=str(tmp_path / "orgs" / "north")))  # of texts


def test_a_folder_is_read_again_when_an_image_changes(images: Path) -> None:
    first = read(images)
    assert read(images) is first
    next(images.rglob("*.png")).unlink()
    assert len(read(images)) == 8


@pytest.mark.parametrize("path", ["../outside.png", "/etc/passwd", "images/../../outside.png"])
def test_a_path_that_leads_out_of_the_folder_is_refused(images: Path, path: str) -> None:
    (images.parent / "list.csv").write_text(f"image,label\n{path},red\n")
    with fails_with("data.path_outside_folder", "1", "image"):
        read(images.parent / "list.csv")


def test_a_bad_image_is_named_by_its_number(images: Path) -> None:
    file = listing(images, "csv")
    (images / "red" / "bad.png").write_bytes(b"no image")
    file.write_text(file.read_text() + "images/red/bad.png,red\nimages/red/none.png,red\n")
    with fails_with("data.unusable_image", "10"):
        read(file)
    with fails_with("data.unusable_image", "bad.png"):
        read(images)


def test_blank_paths_and_labels_are_counted(images: Path) -> None:
    file = listing(images, "csv")
    file.write_text(file.read_text() + " ,red\nimages/red/0.jpg,\n")
    assert read(file).skipped == {"blank image": 1, "missing label": 1}


# --- features


@pytest.fixture
def vit(base_model: Callable[[str], Path]) -> Callable[..., TrainableModel]:
    def make(lora: LoraConfig | None = None) -> TrainableModel:
        config = ModelConfig(base=str(base_model("vit")), precision="float32")
        return TrainableModel(load_model(config, LABELS, 3, "image-classification"), lora, 3, torch.device("cpu"))

    return make


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
def test_the_head_on_features_gives_the_models_logits(
    vit: Callable[..., TrainableModel], images: Path, lora: LoraConfig | None
) -> None:
    model = vit(lora)
    inputs = read(images).inputs
    generator = torch.Generator().manual_seed(1)
    names = model.names("lora" if lora else "head")
    state = {n: t + 0.3 * torch.randn(t.shape, generator=generator) for n, t in model.state(names).items()}
    model.load(state)
    head = feature_head(model)
    assert head is not None
    vectors = get_features(model, inputs, state, "float32")
    collate = TASK.collator(model.module, model.loaded.reader, model.device)
    rows = TASK.examples(model.loaded.reader, 0, inputs, [0] * 9)
    with torch.no_grad():
        whole = torch.cat([logits(model.module, collate([row])) for row in rows])
        torch.testing.assert_close(head(vectors).logits, whole, atol=1e-4, rtol=1e-4)
    assert len({tuple(row) for row in whole.tolist()}) == 9
    again = [8, 0, 3]
    assert torch.equal(get_features(model, [inputs[i] for i in again], state, "float32"), vectors[again])


def test_the_embeddings_of_a_vit_are_frozen_unless_asked_for(vit: Callable[..., TrainableModel]) -> None:
    """Its class token and its position embeddings, which are parameters of no layer, among them."""
    inside = {"cls_token", "position_embeddings", "patch_embeddings.projection.weight", "patch_embeddings.projection.bias"}
    embeddings = {f"vit.embeddings.{name}" for name in inside}
    assert not embeddings & set(vit().names("full"))
    assert set(vit().names("full", freeze_embeddings=False)) == embeddings | set(vit().names("full"))


def test_a_base_model_without_an_image_processor(base_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(base_model("vit"), tmp_path / "base"))
    (folder / "preprocessor_config.json").unlink()
    with fails_with("model.missing_image_processor", "preprocessor_config.json"):
        load_model(ModelConfig(base=str(folder)), LABELS, 1, "image-classification")


def test_a_processor_for_other_sizes(base_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(base_model("vit"), tmp_path / "base"))
    (folder / "preprocessor_config.json").write_text(json.dumps({**PROCESSOR, "size": {"height": 32, "width": 16}}))
    with fails_with("model.image_size", "16", "16", "preprocessor_config.json", "32", "16"):
        load_model(ModelConfig(base=str(folder)), LABELS, 1, "image-classification")


def test_a_text_model_is_no_image_classifier(base_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(base_model("bert"), tmp_path / "base"))
    shutil.copy(base_model("vit") / "preprocessor_config.json", folder)
    with fails_with("model.not_loadable"):
        load_model(ModelConfig(base=str(folder)), LABELS, 1, "image-classification")


@pytest.fixture(params=["CLIP", "Siglip"])
def two_halves(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model of images and texts, whose classifier of images is called by one name and keeps its encoder under another."""
    text = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    image = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = getattr(transformers, f"{request.param}Config")(
        text_config={**text, "max_position_embeddings": 20}, vision_config={**image, "image_size": 16, "patch_size": 4}
    )
    torch.manual_seed(0)
    getattr(transformers, f"{request.param}Model")(config).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return tmp_path / "base"


def test_head_of_an_image_text_model_is_trained_alone(two_halves: Path) -> None:
    """It was taken for the head: redrawn, and trained as a whole by train = head."""
    config = ModelConfig(base=str(two_halves), precision="float32")
    model = TrainableModel(load_model(config, LABELS, 3, "image-classification"), None, 3, torch.device("cpu"))
    assert set(model.names("head")) == {"classifier.weight", "classifier.bias"}
    base = load_file(two_halves / "model.safetensors")
    encoder = {name: tensor for name, tensor in model.module.state_dict().items() if name.startswith("vision_model.")}
    assert len(encoder) > 20
    for name, tensor in encoder.items():
        torch.testing.assert_close(tensor, base[name], rtol=0, atol=0)


def test_image_text_model_trains_privately_or_names_a_reason(two_halves: Path) -> None:
    """Of the whole encoder some parameters have no part in an answer, and so no gradient of a record."""
    table = {"task": "image-classification", "labels": LABELS, "data": {"source": "x"}, "model": {"base": str(two_halves)}}
    plan = parse_plan({**table, "train": "head"})
    check_stages(plan, get_plan_model(plan, "cpu"))
    with fails_with("privacy.no_per_example_gradients", "vision_model"):
        plan = parse_plan({**table, "train": "full"})
        check_stages(plan, get_plan_model(plan, "cpu"))
