"""Whether a record's feature, logits and gradient have the same bits in every slot of a batch and beside any records.

    python benchmarks/experiments/gpu_independence.py [--device cuda] [--seconds 110] [--small]

Needs torch, transformers and opacus only; models are made from configurations. One probe stands in every slot, once beside long
rows with loud embeddings and once beside short and blank ones, in batches of one shape. A line for each model, arithmetic and
shape: in how many of the probe's rows a bit differs, and by how much; "repeated" runs the very same batch again.
"""

from __future__ import annotations

import argparse
import itertools
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import transformers
from opacus import GradSampleModule
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY = 1000
LOUD = 999  # a token with a long embedding
PAD = 0


def configurations(small: bool) -> dict[str, tuple[Any, type]]:
    width, layers, heads, inner = (32, 2, 2, 64) if small else (384, 3, 12, 1536)
    plain = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": inner}
    text = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "max_position_embeddings": 256, **plain}
    grouped = {"num_key_value_heads": heads // 2, "bos_token_id": 1, "eos_token_id": 2}
    sequence = transformers.AutoModelForSequenceClassification
    gpt2 = {"n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": 256, "bos_token_id": 1, "eos_token_id": 2}
    distil = {"dim": width, "n_layers": layers, "n_heads": heads, "hidden_dim": inner, "max_position_embeddings": 256}
    return {
        "bert": (transformers.BertConfig(**text), sequence),
        "distilbert": (transformers.DistilBertConfig(vocab_size=VOCABULARY, pad_token_id=PAD, **distil), sequence),
        "roberta": (transformers.RobertaConfig(**{**text, "max_position_embeddings": 300}), sequence),
        "gpt2": (transformers.GPT2Config(vocab_size=VOCABULARY, pad_token_id=PAD, **gpt2), sequence),
        "llama": (transformers.LlamaConfig(**text, **grouped), sequence),
        "qwen2": (transformers.Qwen2Config(**text, **grouped), sequence),
        "vit": (
            transformers.ViTConfig(image_size=64, patch_size=8, **plain),
            transformers.AutoModelForImageClassification,
        ),
    }


def made(config: Any, auto: Any, attention: str, device: str) -> nn.Module:
    for key in config.to_dict():
        if ("dropout" in key or key.endswith("pdrop")) and isinstance(getattr(config, key, None), float):
            setattr(config, key, 0.0)
    config.num_labels = 3
    torch.manual_seed(0)
    module: Any = auto.from_config(config, attn_implementation=attention).to(device)
    table = module.get_input_embeddings()
    with torch.no_grad():
        if isinstance(table, nn.Embedding):
            table.weight[LOUD] *= 1000
    found: nn.Module = module.train()
    return found


def trainable(module: nn.Module) -> None:
    """The linear layers of the last block, and the head."""
    linear = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    module.requires_grad_(False)
    for layer in linear[-5:]:
        layer.requires_grad_(True)


def batches(vision: bool, slots: int, length: int, device: str) -> list[tuple[dict[str, Tensor], list[int]]]:
    """(batch, slots that hold the probe), for even and for odd slots; the last slot is blank."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for parity in (0, 1):
        places = [i for i in range(slots - 1) if i % 2 == parity]
        if vision:
            pixels = torch.randn(slots, 3, 64, 64, generator=generator) * (1000 if parity == 0 else 0.001)
            pixels[places] = torch.linspace(-1, 1, 3 * 64 * 64).reshape(3, 64, 64)
            pixels[-1] = 0
            batch = {"pixel_values": pixels}
        else:
            ids = torch.randint(3, VOCABULARY - 1, (slots, length), generator=generator)
            mask = torch.ones_like(ids)
            if parity == 0:
                ids[::3, ::2] = LOUD
            else:
                mask[:, max(1, length // 4) :] = 0
            ids[places] = torch.arange(3, 3 + length)
            mask[places] = 1
            mask[places, length - 1 :] = 0
            mask[-1] = 0
            mask[-1, 0] = 1
            ids[mask == 0] = PAD
            batch = {"input_ids": ids, "attention_mask": mask}
            batch["position_ids"] = torch.arange(length).repeat(slots, 1)
        batch["labels"] = torch.zeros(slots, dtype=torch.long)
        batch["labels"][-1] = -100
        found.append(({key: value.to(device) for key, value in batch.items()}, places))
    return found


def answers(module: nn.Module, batch: dict[str, Tensor], low: bool, kind: str) -> dict[str, list[Tensor]]:
    """Tensors whose rows belong to slots: features, logits and gradients."""
    inner: Any = module._module if isinstance(module, GradSampleModule) else module
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    if kind in ("roberta", "vit"):
        inputs.pop("position_ids", None)
    device = batch["labels"].device.type
    with torch.autocast(device, dtype=torch.bfloat16, enabled=low):
        with torch.no_grad():
            base = getattr(inner, inner.base_model_prefix)
            features = base(**inputs).last_hidden_state[:, :2].float()
        logits = module(**inputs).logits.float()
        losses = functional.cross_entropy(logits, batch["labels"], ignore_index=-100, reduction="none")
    losses.sum().backward()  # type: ignore[no-untyped-call]
    parameters: list[Any] = [p for p in module.parameters() if p.requires_grad]
    gradients = [p.grad_sample.float() for p in parameters]
    for p in parameters:
        p.grad = None
        p.grad_sample = None
    return {"features": [features], "logits": [logits.detach()], "gradients": gradients}


def compared(reference: Sequence[Tensor], rows: Sequence[Tensor]) -> tuple[int, float]:
    """(rows in which a bit differs, largest relative distance)."""
    differing = torch.zeros(len(rows[0]), dtype=torch.bool)
    worst = 0.0
    for one, many in zip(reference, rows, strict=True):
        flat = many.reshape(len(many), -1)
        first = one.reshape(1, -1)
        differing |= (flat != first).any(dim=1).cpu()
        size = float(first.double().norm())
        distance = float((flat.double() - first.double()).norm(dim=1).max())
        worst = max(worst, distance / size if size else distance)
    return int(differing.sum()), worst


def line(module: nn.Module, kind: str, low: bool, slots: int, length: int, device: str) -> str:
    reference: dict[str, list[Tensor]] = {}
    repeated = True
    totals = {"features": (0, 0.0), "logits": (0, 0.0), "gradients": (0, 0.0)}
    shown = 0
    for batch, places in batches(kind == "vit", slots, length, device):
        got, again = (answers(module, batch, low, kind) for _ in range(2))
        shown += len(places)
        for what, tensors in got.items():
            reference.setdefault(what, [t[places[0]] for t in tensors])
            count, worst = compared(reference[what], [t[places] for t in tensors])
            totals[what] = (totals[what][0] + count, max(totals[what][1], worst))
        repeated &= all(torch.equal(a[places], b[places]) for what in got for a, b in zip(got[what], again[what], strict=True))
    told = [f"{w}: same" if n == 0 else f"{w}: {n}/{shown} differ by {d:.1e}" for w, (n, d) in totals.items()]
    return " | ".join([*told, "repeated: same" if repeated else "repeated: DIFFERS"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=110, help="no further line is begun after that time")
    parser.add_argument("--small", action="store_true", help="tiny models, for a CPU")
    chosen = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    name = torch.cuda.get_device_name() if chosen.device.startswith("cuda") else torch.backends.cpu.get_cpu_capability()
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads")
    shapes = [(64, 32), (9, 16), (33, 64), (17, 128), (32, 8)]
    arithmetics = [("float32", False), ("bfloat16", True)]
    began = time.monotonic()
    for shape, attention in itertools.product(shapes, ("sdpa", "eager")):
        for kind, (config, auto) in configurations(chosen.small).items():
            if kind == "vit" and shape not in shapes[:3]:
                continue
            for arithmetic, low in arithmetics:
                if time.monotonic() - began > chosen.seconds:
                    print("time is over")
                    return
                make = partial(made, config, auto, attention, chosen.device)
                report(make, kind, arithmetic, low, shape, attention, chosen.device)


def report(
    make: Callable[[], nn.Module], kind: str, arithmetic: str, low: bool, shape: tuple[int, int], attention: str, device: str
) -> None:
    slots, length = shape
    label = f"{kind:10} {attention:5} {arithmetic:8} slots {slots:3} length {length:3}"
    try:
        module = make()
        trainable(module)
        wrapped = GradSampleModule(module, strict=False, loss_reduction="sum")
        print(f"{label} | {line(wrapped, kind, low, slots, length, device)}", flush=True)
        wrapped.remove_hooks()
    except Exception as error:
        print(f"{label} | {type(error).__name__}: {str(error)[:120]}", flush=True)


if __name__ == "__main__":
    main()
