"""Check that a base model is complete, finite, free of foreign code, and deterministic, before it is trained."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cotune.errors import ModelError
from cotune.printable import printable

if TYPE_CHECKING:  # takes seconds to import, which commands that load no model need not wait for
    pass


def check_no_code_is_named(settings: Any) -> None:
    """Check that a configuration names no code of the hub: transformers would fetch and run it, and no hash of files covers it.

    Raises:
        ModelError: If it names some.
    """
    if isinstance(settings, dict):
        for key, value in settings.items():
            if key.endswith("_implementation") and "/" in json.dumps(value):
                raise ModelError(
                    f"the base model's config.json names code of the Hugging Face hub ({key} = {json.dumps(value)[:80]}), which"
                    " is not run: expected eager or sdpa; remove that line",
                    code="model.names_code",
                )
            check_no_code_is_named(value)


def check_files_are_wide(settings: Any) -> None:
    """Check that a configuration is of weights that no library has quantized: transformers would use that library's layers.

    Which ones, depends on what is installed and on the device, and some of them read the rows of a batch together.

    Raises:
        ModelError: If it is.
    """
    quantized = settings.get("quantization_config")
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else None
        raise ModelError(
            "the base model's files hold weights that are quantized already (quantization_config in config.json, method"
            f" {printable(str(method or 'not given'))[:40]}): expected those of the full model, which"
            ' model.quantization = "nf4" quantizes as they are read',
            code="model.quantized_files",
        )


def check_padding_row(config: Any) -> None:
    """Check that the padding token has a row in the table of tokens; `token_limits.check_tokens` checks the tokenizer's.

    Raises:
        ModelError: If it has none.
    """
    pad = getattr(config, "pad_token_id", None)
    rows = getattr(config, "vocab_size", None)
    if isinstance(pad, int) and isinstance(rows, int) and pad >= rows:
        raise ModelError(
            f"the base model's config.json says pad_token_id = {pad}, and its table has {rows} tokens: expected a number below"
            " that, as its tokenizer has it; correct that line, or resize the model with resize_token_embeddings()",
            code="model.damaged_config",
        )


def make_deterministic(module: nn.Module) -> None:
    """Leave nothing in training to chance, under whatever name: dropout, stochastic depth, dropped layers, masks, jitter.

    All of it is done by modules in training mode. Only modules with parameters of their own stay in it, as Opacus takes gradients
    of single rows from those alone: plain layers, and of modules with layers inside (the embeddings of vision transformers) those
    whose code does not ask for the mode. Batch normalization uses the statistics of the base model, and does not move them.
    """
    module.eval()
    for layer in module.modules():
        own_parameters = any(True for _ in layer.parameters(recurse=False))
        plain = not any(True for _ in layer.children())
        if own_parameters and not isinstance(layer, _BatchNorm) and (plain or not _asks_for_mode(type(layer))):
            layer.training = True


def _asks_for_mode(kind: type[nn.Module]) -> bool:
    """Whether the code of a class reads whether it is in training; true where the code cannot be read."""
    own = [base for base in kind.__mro__ if issubclass(base, nn.Module) and base is not nn.Module]
    try:
        return any("training" in inspect.getsource(base) for base in own)
    except (OSError, TypeError):
        return True


def check_finite(module: nn.Module) -> None:
    """Check that weights and buffers are numbers: one that is not would make every answer none.

    Raises:
        ModelError: If a parameter is not finite, or a buffer holds NaN.
    """
    broken = [name for name, tensor in module.named_parameters() if _has(tensor, lambda t: ~t.isfinite())]
    broken += [name for name, tensor in module.named_buffers() if _has(tensor, Tensor.isnan)]  # a mask may hold infinity
    if broken:
        raise ModelError(
            f"the base model's weights hold NaN or infinite values ({len(broken)} of its tensors, such as {broken[0]}): expected"
            " numbers; download the folder again, or use another base model",
            code="model.not_finite",
        )


def _has(tensor: Tensor, is_broken: Callable[[Tensor], Tensor]) -> bool:
    """Whether any value of a tensor is broken; of one on the meta device there are none."""
    return not tensor.is_meta and bool(is_broken(tensor).any())


def check_complete(report: Any, prefixes: tuple[str, ...], frozen: tuple[str, ...], finished: bool) -> None:
    """Check that no parameter is missing in the files, as transformers would silently initialize it at random.

    Args:
        report: Of transformers, on missing and mismatched parameters.
        prefixes: Of the encoder's parameters.
        frozen: Prefixes of parameters that may be missing.
        finished: Whether the head and the pooler must be present, too.

    Raises:
        ModelError: If a parameter is missing, or has another shape.
    """
    new = [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]
    if finished and new:
        raise ModelError(
            f"the model's safetensors lack {len(new)} of its parameters, such as {sorted(new)[0]}: expected a fine-tuned model"
            " with its head, such as `model/` in the folder of a run",
            code="model.incomplete_weights",
        )
    poolers = tuple(f"{prefix}pooler." for prefix in prefixes)
    lacking = sorted(k for k in new if k.startswith(prefixes) and not k.startswith((*frozen, *poolers)))
    if lacking:
        raise ModelError(
            f"the base model's safetensors lack {len(lacking)} parameters of its architecture, such as {lacking[0]}, or hold them"
            " in another shape: expected config.json and weights of the same model; download the folder again",
            code="model.incomplete_weights",
        )
