"""A wide feature of a frozen encoder: means of the token vectors of chosen layers, and the first token's vector, side by side.

What the layers in the middle say of a text is lost in the last one. A linear head on all of it costs no ε that a narrow one does
not cost, as a gradient is clipped as a whole. A fixed affine map (`public_map`) brings all directions of the feature to a
like size, without which a few of them take most of the clip norm.

A record's feature depends on its own row alone: means are over its own tokens, and the map is applied row by row.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions, SequenceClassifierOutput

from cotune.models.architecture import AlignedRows
from cotune.models.features.layer_reading import check_layers, read_layers
from cotune.models.features.public_map import AffineMap


class LayerEncoder(nn.Module):
    """An encoder of transformers whose pooled output is the wide feature, in float32 whatever the encoder computes in.

    Attributes:
        base: The encoder.
        layers: Whose means are read; 0 is the embeddings.
        cls: Whether the first token's vector in the last layer is read, too.
        center: (d,) what is subtracted from what was read.
        matrix: (d, d) what that is multiplied by.
    """

    center: Tensor
    matrix: Tensor

    def __init__(self, base: nn.Module, layers: tuple[int, ...], cls: bool, map: AffineMap | None) -> None:
        super().__init__()
        self.base = base
        self.layers = layers
        self.cls = cls
        self.width = (len(layers) + cls) * int(cast(Any, base).config.hidden_size)
        self.is_mapped = map is not None
        if map is not None:
            self.register_buffer("center", map.center)
            self.register_buffer("matrix", map.matrix)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """Return the features (b, d) as the pooled output; input_ids and attention_mask are (b, t)."""
        feature = read_layers(self.base, self.layers, self.cls, input_ids, attention_mask)
        if self.is_mapped:
            with torch.autocast(feature.device.type, enabled=False), AlignedRows():
                feature = functional.linear(feature - self.center, self.matrix)
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=cast(Any, feature[:, None, :]), pooler_output=cast(Any, feature)
        )


class LayerClassifier(nn.Module):
    """A linear head on the wide feature: what the rest of the program takes for a classifier of transformers.

    Attributes:
        encoder: The base model, read by layers.
        classifier: (classes, d) weights, and the biases: all that is trained.
        config: The base model's configuration, with the label names.
    """

    base_model_prefix = "encoder"

    def __init__(self, encoder: LayerEncoder, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.config = cast(Any, encoder.base).config
        self.classifier = nn.Linear(encoder.width, classes)

    def get_input_embeddings(self) -> Any:
        """Return the table of tokens."""
        return cast(Any, self.encoder.base).get_input_embeddings()

    @torch.no_grad()
    def _init_weights(self, layer: nn.Linear) -> None:
        """Draw a new head, as transformers draws that of BERT."""
        layer.weight.normal_(0.0, 0.02)
        layer.bias.zero_()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SequenceClassifierOutput:
        """Return the scores (b, classes); input_ids and attention_mask are (b, t)."""
        feature = self.encoder(input_ids=input_ids, attention_mask=attention_mask).pooler_output
        return SequenceClassifierOutput(logits=self.classifier(feature))


def build_on_layers(base: Any, layers: tuple[int, ...], cls: bool, map: AffineMap | None, classes: int) -> LayerClassifier:
    """Return a classifier on the layers of an encoder.

    Args:
        base: The encoder.
        layers: Whose means are read.
        cls: Whether the first token's vector is read.
        map: Of the feature; None: it is taken as it is.
        classes: How many there are.

    Raises:
        ModelError: The architecture has no such layers.
    """
    check_layers(base.config, layers)
    return LayerClassifier(LayerEncoder(base, layers, cls, map), classes)
