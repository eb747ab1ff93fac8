"""A federation whose rounds cost milliseconds: scikit-learn's 1,797 handwritten digits, and a small MLP to tell them apart.

    python examples/digits.py FOLDER     # writes model/, digits.parquet and digits.toml

The model is an architecture of its own, registered with transformers by importing this module: nothing is loaded from the folder
but configuration and safetensors. Its encoder only flattens the pixels and its head is the MLP, so that `train = "head"` trains
all of it on features that are computed once.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput

SIDE = 8  # pixels
PLAN = """\
# FedAvg on 10 organizations with very unequal classes reaches about .92 after 20 rounds.
task = "image-classification"
train = "head"
rounds = 20
privacy = "none"
test_fraction = 0.2
keep_checkpoints = 1

[model]
base = {model}
precision = "float32"

[data]
source = {data}

[local]
optimizer = "sgd"
learning_rate = 0.3
batch_size = 0.2
steps = 10

[simulation]
clients = 10
partition = "dirichlet:0.1"
min_examples = 10
baselines = []
"""


class DigitsConfig(PretrainedConfig):  # type: ignore[misc]
    """hidden_size: of the head's one hidden layer."""

    model_type = "digits-mlp"

    def __init__(self, hidden_size: int = 64, num_channels: int = 3, **rest: Any) -> None:
        super().__init__(**rest)
        self.hidden_size = hidden_size
        self.num_channels = num_channels


class _Digits(PreTrainedModel):  # type: ignore[misc]
    config_class = DigitsConfig
    base_model_prefix = "encoder"
    main_input_name = "pixel_values"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.reset_parameters()


class DigitsModel(_Digits):
    """The encoder: the mean over the channels, one number for each pixel. `scale` is all that its safetensors hold."""

    def __init__(self, config: DigitsConfig) -> None:
        super().__init__(config)
        self.scale = nn.Parameter(torch.ones(1))
        self.post_init()

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        flat = pixel_values.mean(dim=1).flatten(1) * self.scale
        return BaseModelOutputWithPooling(last_hidden_state=flat[:, None], pooler_output=flat)


class DigitsForImageClassification(_Digits):
    """(b, 3, 8, 8) -> (b, classes): 64 pixels, `hidden_size` rectified units, the classes."""

    def __init__(self, config: DigitsConfig) -> None:
        super().__init__(config)
        self.encoder = DigitsModel(config)
        self.hidden = nn.Linear(SIDE * SIDE, config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, pixel_values: Tensor, **_: Any) -> ImageClassifierOutput:
        pooled = self.encoder(pixel_values).pooler_output
        return ImageClassifierOutput(logits=self.classifier(torch.relu(self.hidden(pooled))))


AutoConfig.register("digits-mlp", DigitsConfig, exist_ok=True)
AutoModel.register(DigitsConfig, DigitsModel, exist_ok=True)
AutoModelForImageClassification.register(DigitsConfig, DigitsForImageClassification, exist_ok=True)


def write_digits(folder: Path) -> Path:
    """Writes the encoder, the images and a plan, and returns the plan's file. What is there already is written again."""
    folder = folder.expanduser().resolve()
    model = folder / "model"
    data = folder / "digits.parquet"
    plan = folder / "digits.toml"
    model.mkdir(parents=True, exist_ok=True)
    DigitsModel(DigitsConfig()).save_pretrained(model)
    processor = {"image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": SIDE, "width": SIDE}}
    processor |= {"do_rescale": True, "do_normalize": False}
    (model / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    images, targets = load_digits(return_X_y=True)
    table = {"image": [_png(image) for image in images], "label": [str(target) for target in targets]}
    pandas.DataFrame(table).to_parquet(data)
    plan.write_text(PLAN.format(model=json.dumps(str(model)), data=json.dumps(str(data))), encoding="utf-8")
    return plan


def _png(image: np.ndarray[Any, Any]) -> bytes:
    """An image of 64 numbers from 0 to 16."""
    pixels = np.round(image.reshape(SIDE, SIDE) * (255 / 16)).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/digits.py FOLDER")
    print(write_digits(Path(sys.argv[1])))
