"""Architectures: find encoder and head, add mean pooling, and align the rows of linear layers.

**Mean pooling** is one more encoder layer, so that the fine-tuned model remains a plain architecture that anybody can load.
Sentence encoders are trained for the mean of their token vectors, but BertForSequenceClassification reads the first token. A
layer whose queries and keys are zero attends to all tokens evenly: with values s·I and a large s, its residual stream is s
times the mean, which its LayerNorm scales to unit variance. Its feed-forward part is zero. The result is
tanh(LayerNorm(mean)/8), from weights only; loading it needs no code of cotune.

**Aligned rows** make linear layers compute all rows in the same way, whatever their width. A kernel for a product with few
columns, such as the scores of a head, adds up a row in an order that depends on the row's address in memory. Rows of 33 float32
start at every remainder of 16 bytes, so that a record's scores depended on its slot, and thereby on the number of records
before it: in a state with weights of very unequal size, one record moved others by 1.8e-6 clip norms. Rows of a multiple of 64
bytes all start at the same remainder, whichever instructions a processor has. A product with one column (a LoRA factor of rank
1) is a matrix-vector product, whose kernel treats groups of four rows differently from the remaining ones; it gets a second
column.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from cotune.errors import ModelError


def encoder_name(module: Any) -> str:
    """Return the attribute that holds the encoder of a classifier of transformers.

    It is called as the class says, but for some that classify with a part of their base model: of CLIP and SigLIP it is
    `vision_model`, the only part with parameters that is no single layer.

    Raises:
        ModelError: Where nothing, or more than one part, may be the encoder.
    """
    declared = str(module.base_model_prefix)
    if isinstance(getattr(module, declared, None), nn.Module):
        return declared
    parts: list[str] = [name for name, part in module.named_children() if _is_no_single_layer(part)]
    if len(parts) != 1:
        raise ModelError(
            f"the architecture {module.config.model_type} does not say which of its parts ({', '.join(parts) or 'none'}) is the"
            " encoder: expected one beside the head; use another base model",
            code="model.unknown_encoder",
        )
    return parts[0]


def encoder_prefixes(module: Any) -> tuple[str, ...]:
    """Return what the names of the parameters of the encoder begin with; with a decoder beside it (T5), of both.

    Raises:
        ModelError: See `encoder_name`.
    """
    stacks = [name for name in ("encoder", "decoder") if isinstance(getattr(module, name, None), nn.Module)]
    if len(stacks) == 2 and not isinstance(getattr(module, module.base_model_prefix, None), nn.Module):
        return tuple(f"{name}." for name in stacks)
    return (f"{encoder_name(module)}.",)


def _is_no_single_layer(part: nn.Module) -> bool:
    return any(True for _ in part.children()) and any(True for _ in part.parameters())


_SCALE = 1024.0  # s: exact in bfloat16, and large enough that the first token's own vector does not count
_SQUASH = 0.125  # the pooler's tanh stays close to linear: LayerNorm'd entries are rarely above 5


def wants_mean_pooling(path: Path) -> bool:
    """Return whether the folder's configuration asks for averaged token vectors, as those of sentence-transformers do."""
    file = path / "1_Pooling" / "config.json"
    if not file.is_file():
        return False
    declared = json.loads(file.read_bytes())
    return bool(declared.get("pooling_mode_mean_tokens") or declared.get("pooling_mode") == "mean")


def can_pool_mean(config: Any) -> bool:
    """Return whether the architecture has encoder layers that can compute a mean."""
    return config.model_type in ("bert", "distilbert")


@torch.no_grad()
def add_mean_pooling(config: Any, module: nn.Module | None) -> tuple[str, ...]:
    """With module None: makes room for the layer in the configuration. Then: writes the layer into the loaded module.

    Returns the prefixes of the parameters that must stay frozen.
    """
    if config.model_type == "bert":
        return _bert(config, module)
    return _distilbert(config, module)


def apply_mean_layer(layer: nn.Module, hidden: Tensor, mask: Tensor) -> Tensor:
    """Return the first token's vector after the layer that `add_mean_pooling` has added, (b, d), without computing the layer.

    Equal to it up to rounding: even attention is a mean, and what its other matrices multiply by is 0, 1 or s.

    Args:
        layer: The added one, for its two LayerNorms.
        hidden: (b, t, d) what it reads.
        mask: (b, t) 1 where a token counts.
    """
    shown = mask[:, :, None].to(hidden)
    vectors = hidden[:, 0] + _SCALE * ((hidden * shown).sum(dim=1) / shown.sum(dim=1))
    for norm in (part for part in layer.modules() if isinstance(part, nn.LayerNorm)):
        vectors = functional.layer_norm(vectors, norm.normalized_shape, eps=norm.eps)
    return vectors


def apply_mean_pooler(vectors: Tensor) -> Tensor:
    """Return what BERT's pooler makes of these vectors once `add_mean_pooling` has written its weights."""
    return torch.tanh(_SQUASH * vectors)


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


_MULTIPLE = 16  # entries of a row: 64 bytes of float32, a cache line, and more than any vector register's alignment
_COLUMNS = 8  # MKL on Intel's Xeon (AVX-512) adds up products with 1 to 3 columns in an order that goes by the row's place


def fill_rows(tensor: Tensor) -> Tensor:
    """Return (…, n) with zeros after each row, up to the next multiple of 64 bytes of float32."""
    lacking = -tensor.shape[-1] % _MULTIPLE
    return functional.pad(tensor, (0, lacking)) if lacking else tensor


def is_aligned(layer: nn.Linear) -> bool:
    """Whether `AlignedRows` leaves a layer alone, to the bit."""
    return layer.in_features % _MULTIPLE == 0 and layer.out_features >= _COLUMNS


class AlignedRows(TorchFunctionMode):
    """For the time of the block, inputs and weights of linear layers are filled up with zeros.

    To rows of a multiple of 64 bytes, and to 8 columns at least.

    What is computed stays the same up to rounding. Layers that have such a shape already are left alone, to the bit.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call what was called, with filled-up rows where it is a linear layer."""
        if func is functional.linear:
            return _linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` of the same arguments."""
    input = fill_rows(input)
    weight = fill_rows(weight)
    columns = len(weight)
    lacking = max(_COLUMNS - columns, 0)
    if not lacking:
        return functional.linear(input, weight, bias)
    if bias is not None:
        bias = functional.pad(bias, (0, lacking))
    return functional.linear(input, functional.pad(weight, (0, 0, 0, lacking)), bias)[..., :columns]
