"""Evaluation and features: how fast, and how far from those of the CPU."""

from __future__ import annotations

import time

import torch
from gpu_bench import Bench, Row
from gpu_steps import wait
from made_up import LABELS, Case, build_model, plan_for, texts, tokenizer, write_base
from transformers import BertConfig

from cotune.models.base.load import load_model
from cotune.models.evaluation.predictor import Predictor
from cotune.models.features.cached import encode_batch
from cotune.models.trainable import TrainableModel


def measure_evaluation(bench: Bench) -> None:
    """As the common test set is evaluated, in bfloat16, and in float32."""
    for weights, low in ((torch.bfloat16, True), (torch.float32, True), (torch.float32, False)):
        case = Case("1.5 B", weights, False, 64)
        arithmetic = "bfloat16" if low else "float32"
        bench.attempt(lambda case=case, low=low: evaluation_of(bench, case, low), **case.named, arithmetic=arithmetic)  # type: ignore[misc]


def evaluation_of(bench: Bench, case: Case, low: bool) -> Row:
    """Predicting records of 128 tokens."""
    predictor = Predictor(build_model(bench, case), LABELS, "sequence-classification")
    count = 8 if bench.tiny else 512
    given = texts(count, 128)
    with torch.autocast(bench.device.type, dtype=torch.bfloat16, enabled=low):
        predictor.probabilities(given[:64])
        wait(bench)
        began = time.perf_counter()
        found = predictor.probabilities(given)
    seconds = time.perf_counter() - began
    return {"tokens/s": count * 128 / seconds, "all are numbers": all(bool(each.isfinite().all()) for each in found)}


def measure_features(bench: Bench) -> None:
    """Features of a sentence encoder on the device against those of the CPU in float32."""
    wide = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = BertConfig(vocab_size=len(tokenizer()), pad_token_id=0, **(small if bench.tiny else wide))
    base = write_base(bench.work("features") / "encoder", config)
    plan = plan_for(str(base), train="head")
    loaded = load_model(plan.model, LABELS, 1)
    examples = loaded.encode_unlabeled(texts(8 if bench.tiny else 256, 24))
    expected = encode_batch(TrainableModel(loaded, None, 0, torch.device("cpu")), examples, "float32")
    model = TrainableModel(load_model(plan.model, LABELS, 1), None, 0, bench.device)
    for precision in ("float32", "bfloat16"):
        encode_batch(model, examples, precision)
        began = time.perf_counter()
        found = encode_batch(model, examples, precision)
        seconds = time.perf_counter() - began
        error = float((found - expected).norm() / expected.norm())
        bench.add(precision=precision, **{"relative distance": error, "records/s": len(examples) / seconds})
