"""Mean pooling as one more encoder layer, so that the fine-tuned model stays a plain architecture that anybody can load.

Sentence encoders are trained to be read by the mean of their token vectors; BertForSequenceClassification reads the first
token. A layer whose queries and keys are zero attends to all tokens evenly: with values s·I and a large s, its residual stream
holds s times the mean, and its LayerNorm brings it to unit variance. Its feed-forward part is zero. The result is
tanh(LayerNorm(mean)/8): nothing but weights, no code of ours is needed to load it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

_SCALE = 1024.0  # s: exact in bfloat16, and large enough that the first token's own vector does not count
_SQUASH = 0.125  # the pooler's tanh stays close to linear: LayerNorm'd entries are rarely above 5


def wants_mean_pooling(path: Path) -> bool:
    """Whether the folder says, as sentence-transformers folders do, that token vectors are to be averaged."""
    file = path / "1_Pooling" / "config.json"
    if not file.is_file():
        return False
    declared = json.loads(file.read_bytes())
    return bool(declared.get("pooling_mode_mean_tokens") or declared.get("pooling_mode") == "mean")


def can_pool_mean(config: Any) -> bool:
    """Whether the architecture has encoder layers that can be written as a mean."""
    return config.model_type in ("bert", "distilbert")


@torch.no_grad()
def add_mean_pooling(config: Any, module: nn.Module | None) -> tuple[str, ...]:
    """With module None: makes room for the layer in the configuration. Then: writes the layer into the loaded module.

    Returns the prefixes of the parameters that must stay frozen.
    """
    if config.model_type == "bert":
        return _bert(config, module)
    return _distilbert(config, module)


def _bert(config: Any, module: Any) -> tuple[str, ...]:
    if module is None:
        config.num_hidden_layers += 1
        return ()
    last = config.num_hidden_layers - 1
    layer = module.bert.encoder.layer[last]
    attention = layer.attention
    _uniform_attention(attention.self.query, attention.self.key, attention.self.value, attention.output.dense)
    _identity_norm(attention.output.LayerNorm)
    _no_feed_forward(layer.intermediate.dense, layer.output.dense)
    _identity_norm(layer.output.LayerNorm)
    _scaled_identity(module.bert.pooler.dense, _SQUASH)
    return (f"bert.encoder.layer.{last}.", "bert.pooler.")


def _distilbert(config: Any, module: Any) -> tuple[str, ...]:
    if module is None:
        config.n_layers += 1
        return ()
    last = config.n_layers - 1
    layer = module.distilbert.transformer.layer[last]
    _uniform_attention(layer.attention.q_lin, layer.attention.k_lin, layer.attention.v_lin, layer.attention.out_lin)
    _identity_norm(layer.sa_layer_norm)
    _no_feed_forward(layer.ffn.lin1, layer.ffn.lin2)
    _identity_norm(layer.output_layer_norm)
    return (f"distilbert.transformer.layer.{last}.",)


def _uniform_attention(query: nn.Linear, key: nn.Linear, value: nn.Linear, out: nn.Linear) -> None:
    for linear in (query, key):
        _scaled_identity(linear, 0.0)
    _scaled_identity(value, _SCALE)
    _scaled_identity(out, 1.0)


def _scaled_identity(linear: nn.Linear, scale: float) -> None:
    linear.weight.copy_(torch.eye(linear.out_features, linear.in_features) * scale)
    linear.bias.zero_()


def _no_feed_forward(first: nn.Linear, second: nn.Linear) -> None:
    for linear in (first, second):
        linear.weight.zero_()
        linear.bias.zero_()


def _identity_norm(norm: nn.LayerNorm) -> None:
    norm.weight.fill_(1.0)
    norm.bias.zero_()
