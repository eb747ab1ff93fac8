"""What one GPU does: models of billions of parameters in tokens per second and GiB, and whether its results are right.

    python benchmarks/gpu.py results            # at most 7 minutes on one H100; writes results/gpu.json and results/gpu.md
    python benchmarks/gpu.py results --dry-run  # the same with tiny models, on a CPU too

It needs cotune with its dependencies, and no network: weights, words and records are made up. Both files are rewritten after each
measurement. A section that fails says why, and the others go on.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import AutoModel, BertConfig, PreTrainedTokenizerFast, Qwen2Config

from cotune.client.training import steps as client_steps
from cotune.client.training.rows import TrainingSetup
from cotune.client.training.setup import synthetic_setup
from cotune.data.tasks.task import get_task
from cotune.errors import CotuneError
from cotune.models.base.load import LoadedModel, load_model
from cotune.models.base.lookup import BaseModelFolder
from cotune.models.config import LoraConfig
from cotune.models.evaluation.predictor import Predictor
from cotune.models.features.cached import encode_batch
from cotune.models.trainable import TrainableModel
from cotune.plan.load import dump_plan, parse_plan
from cotune.plan.schema import Plan
from cotune.privacy.mechanisms import dp_sgd
from cotune.privacy.mechanisms.dp_sgd import DPSGD, DPSGDConfig, DPSGDSetup, check_clipping
from cotune.privacy.mechanisms.random import seeded_generator
from cotune.server.runs.events import observe_run
from cotune.simulations.run import resume, simulate

LABELS = ("bad", "good", "so")
WORDS = [f"word{number}" for number in range(200)]
Row = dict[str, Any]


@dataclass
class Section:
    """What a section found: rows of one table, or why there are none."""

    name: str
    rows: list[Row] = field(default_factory=list)
    skipped: str | None = None
    error: str | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Bench:
    """Where and how everything is measured.

    Attributes:
        device: That is measured.
        tiny: Whether models are tiny and steps few.
        folder: Of the results.
        until: No measurement begins after this time (`time.monotonic`).
        sections: What was found so far.
    """

    device: torch.device
    tiny: bool
    folder: Path
    until: float
    sections: list[Section] = field(default_factory=list)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def work(self, name: str) -> Path:
        """A new folder for what a section needs beside its results."""
        return Path(tempfile.mkdtemp(prefix=f"cotune-{name}-"))

    def add(self, **row: Any) -> None:
        """Add a row to the present section, and write it."""
        self.sections[-1].rows.append(row)
        print("  " + ", ".join(f"{key} {_shown(value)}" for key, value in row.items()), flush=True)
        self.write()

    def attempt(self, measure: Callable[[], Row], **row: Any) -> None:
        """Add what `measure` finds to a row; a failure is found, too. Nothing is begun when the time is over."""
        if time.monotonic() > self.until:
            self.add(**row, failed="the time was over")
            return
        began = time.monotonic()
        try:
            found = measure()
        except Exception as error:
            traceback.print_exc()
            found = {"failed": _reason(error)}
        free(self.device)
        self.add(**row, **found, seconds=round(time.monotonic() - began, 1))

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        here = machine(self.device)
        found = {"machine": here, "tiny": self.tiny, "sections": [vars(section) for section in self.sections]}
        (self.folder / "gpu.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        (self.folder / "gpu.md").write_text(_page(here, self.sections), encoding="utf-8")


class Skipped(Exception):
    """A section has nothing to measure here, for the reason that it gives."""


def machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU with {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}, transformers {transformers.__version__}"


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _reason(error: BaseException) -> str:
    said = (str(error).strip() or "without a word").splitlines()[0][:200]
    return f"{type(error).__name__}: {said}"


def _page(machine: str, sections: list[Section]) -> str:
    lines = [machine, ""]
    for section in sections:
        lines += [f"## {section.name} ({section.seconds:.0f} s)", ""]
        lines += [text for text in (section.skipped, section.error) if text]
        keys = list(dict.fromkeys(key for row in section.rows for key in row))
        if keys:
            lines += [f"| {' | '.join(keys)} |", "|" + "---|" * len(keys)]
            lines += ["| " + " | ".join(_shown(row.get(key)).replace("|", "/") for key in keys) + " |" for row in section.rows]
        lines.append("")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 1000
        else f"{value:,.0f}"
        if isinstance(value, float)
        else str(value)
    )


# --- made-up models, words and records


@dataclass(frozen=True)
class Size:
    """A decoder of the Qwen2 type."""

    hidden: int
    layers: int
    heads: int
    key_heads: int
    inner: int
    words: int


SIZES = {"1.5 B": Size(1536, 28, 12, 2, 8960, 151_936), "7 B": Size(3584, 28, 28, 4, 18_944, 152_064)}
TINY = {"1.5 B": Size(32, 2, 4, 2, 64, 256), "7 B": Size(64, 3, 4, 2, 128, 256)}


def tokenizer() -> PreTrainedTokenizerFast:
    """One number for each of the made-up words."""
    known = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *LABELS, *WORDS])}
    words = Tokenizer(WordLevel(known, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", eos_token="[SEP]"
    )


def texts(count: int, words: int) -> list[str]:
    drawn = random.Random(3)
    return [" ".join(drawn.choices(WORDS, k=words)) for _ in range(count)]


def records(file: Path, count: int) -> Path:
    """Texts whose class is one of their words."""
    drawn = random.Random(5)
    lines = ["text,label"]
    for text in texts(count, 9):
        label = drawn.choice(LABELS)
        lines.append(f"{text} {label},{label}")
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def plan_for(base: str, **changes: Any) -> Plan:
    """A plan that trains adapters under ε = 8."""
    table: dict[str, Any] = {
        "name": "gpu",
        "labels": list(LABELS),
        "train": "lora",
        "rounds": 1,
        "model": {"base": base, "pooling": "native", **changes.pop("model", {})},
        "lora": {"rank": 8, "targets": ["q_proj", "v_proj"], **changes.pop("lora", {})},
        "data": {"source": "records.csv"},
        "privacy": {"epsilon": 8.0},
        "simulation": {"clients": 2, "partition": "iid", "baselines": []},
    }
    return parse_plan({**table, **changes})


@dataclass(frozen=True)
class Case:
    """What is trained, and how.

    Attributes:
        size: A name in SIZES.
        weights: The dtype of frozen weights.
        checkpointing: Whether activations are computed again in the backward pass.
        physical: Slots of a batch, the blank one included.
    """

    size: str
    weights: torch.dtype
    checkpointing: bool
    physical: int

    @property
    def named(self) -> Row:
        return {
            "model": self.size,
            "frozen weights": str(self.weights).removeprefix("torch."),
            "checkpointing": "on" if self.checkpointing else "off",
            "slots": self.physical,
        }


LENGTH = 256


def build_model(bench: Bench, case: Case, task: str = "sequence-classification") -> TrainableModel:
    """A decoder with made-up weights on the device, with adapters and head in float32."""
    size = (TINY if bench.tiny else SIZES)[case.size]
    config = Qwen2Config(
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_heads,
        intermediate_size=size.inner,
        vocab_size=size.words,
        max_position_embeddings=4096,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        use_cache=False,
        num_labels=len(LABELS),
    )
    does = get_task(task)  # type: ignore[arg-type]
    with bench.device:
        module = does.model_class().from_config(config, dtype=case.weights)
    module.requires_grad_(False)
    for name, layer in module.named_children():
        if name != module.base_model_prefix and getattr(layer, "weight", None) is not module.get_input_embeddings().weight:
            layer.float()
    folder = BaseModelFolder("made up", Path(), "0" * 64)
    loaded = LoadedModel(module, tokenizer(), folder, (), LENGTH, does)
    model = TrainableModel(loaded, LoraConfig(rank=8, targets=("q_proj", "v_proj")), 7, bench.device)
    model.train_only(model.names("lora"))
    return model


def build_setup(bench: Bench, case: Case, model: TrainableModel, count: int, **changes: Any) -> TrainingSetup:
    """Made-up records of full length, in batches as training has them."""
    plan = plan_for("made-up", model={"max_length": LENGTH, "precision": "bfloat16"}, **changes)
    stage = plan.stages[0]
    again = "on" if case.checkpointing else "off"
    local = stage.local.model_copy(update={"physical_batch_size": case.physical, "activation_checkpointing": again})
    return synthetic_setup(plan, stage.model_copy(update={"local": local}), model, count)


# --- steps of large models


CASES = [
    Case("7 B", torch.bfloat16, True, 32),
    Case("7 B", torch.bfloat16, False, 32),
    Case("1.5 B", torch.bfloat16, False, 32),
    Case("1.5 B", torch.bfloat16, True, 64),
    Case("7 B", torch.float32, True, 16),
    Case("1.5 B", torch.float32, False, 32),
    Case("7 B", torch.float32, False, 16),
    Case("1.5 B", torch.float32, True, 64),
]


def measure_steps(bench: Bench) -> None:
    for case in CASES:
        chosen = Case(case.size, case.weights, case.checkpointing, 4) if bench.tiny else case
        bench.attempt(lambda case=chosen: steps_of(bench, case), **chosen.named)  # type: ignore[misc]


def steps_of(bench: Bench, case: Case) -> Row:
    """Tokens per second and peak memory of a step of about 16,384 tokens, private and not, after one that is not timed."""
    model = build_model(bench, case)
    whole_batches = max(1, 64 // case.physical) if not bench.tiny else 1
    rows = whole_batches * (case.physical - 1)
    setup = build_setup(bench, case, model, rows)
    plain = timed(bench, plain_steps(setup, rows))
    private = timed(bench, private_steps(setup, rows))
    tokens = rows * LENGTH
    return {
        "tokens/s": tokens / private.seconds,
        "tokens/s without privacy": tokens / plain.seconds,
        "private / plain": private.seconds / plain.seconds,
        "peak GiB": private.gib,
        "peak GiB without privacy": plain.gib,
        "parameters": float(model.parameter_count()),
    }


@dataclass(frozen=True)
class Timed:
    seconds: float
    gib: float | None


def timed(bench: Bench, steps: Iterator[object], count: int = 2) -> Timed:
    """The seconds of a step, over `count` of them, and the most memory of all, with the weights."""
    if bench.on_gpu:
        torch.cuda.reset_peak_memory_stats(bench.device)
    next(steps)
    _wait(bench)
    began = time.perf_counter()
    for _ in range(count):
        next(steps)
    _wait(bench)
    seconds = (time.perf_counter() - began) / count
    peak = torch.cuda.max_memory_allocated(bench.device) / 2**30 if bench.on_gpu else None
    close = getattr(steps, "close", None)
    if close is not None:
        close()
    return Timed(seconds, peak)


def _wait(bench: Bench) -> None:
    if bench.on_gpu:
        torch.cuda.synchronize(bench.device)


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def plain_steps(setup: TrainingSetup, rows: int) -> Iterator[None]:
    """The same batches and losses, without gradients of single records, clipping and noise."""
    optimizer = torch.optim.SGD(trained(setup.module), lr=1e-4)
    while True:
        optimizer.zero_grad()
        for _, batch in setup.batches(range(rows)):
            (setup.loss(batch).sum() / rows).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        yield


def private_steps(setup: TrainingSetup, rows: int, steps: int = 100) -> Iterator[object]:
    optimizer = torch.optim.SGD(trained(setup.module), lr=1e-4)
    config = DPSGDConfig(noise_multiplier=1.0, clip_norm=1.0, sample_rate=1.0, expected_batch=float(rows), steps=steps)
    return DPSGD(config).run(DPSGDSetup(setup.module, optimizer, setup.loss, setup.units, setup.batches))


# --- whether clipped sums are right


def measure_clipped_sums(bench: Bench) -> None:
    for weights, checkpointing in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        case = Case("1.5 B", weights, checkpointing, 4)
        bench.attempt(lambda case=case: clipped_sum_of(bench, case), **case.named)  # type: ignore[misc]


def clipped_sum_of(bench: Bench, case: Case) -> Row:
    """The relative distance of the clipped sum of three records from that of one record at a time, without padding."""
    model = build_model(bench, case)
    setup = build_setup(bench, case, model, 3).samples()
    exact = case.weights == torch.float32
    error = check_clipping(
        setup.module,
        setup.exact if exact else setup.loss,
        batches=setup.batches,
        alone=[setup.alone(row) for row in range(setup.rows)],
        clip_norm=1.0,
    )
    return {"arithmetic": "float32" if exact else "bfloat16", "relative error": error}


# --- a whole run, killed and resumed


def measure_resumption(bench: Bench) -> None:
    """A run under ε = 8 that was killed in its third round, against one that was not: the same bits."""
    folder = bench.work("runs")
    plan = plan_of_a_small_run(folder)
    began = time.monotonic()
    with repeatable_noise():
        whole = simulate(plan, folder / "whole", device=str(bench.device))
    seconds = time.monotonic() - began
    file = folder / "plan.toml"
    file.write_text(dump_plan(plan), encoding="utf-8")
    command = [sys.executable, __file__, str(folder / "other"), "--device", str(bench.device), "--killed", str(file)]
    ended = subprocess.run(command, timeout=200).returncode
    with repeatable_noise():
        other = resume(folder / "other")
    same = model_bytes(whole.folder) == model_bytes(other.folder)
    bench.add(
        **{"ended by": ended, "bit-equal": same, "seconds of the whole run": seconds},
        **{"spent ε": max(float(o.epsilon_spent or 0) for o in whole.summary.organizations)},
    )
    if not same or ended != -signal.SIGKILL:
        raise AssertionError("expected a process that killed itself, and the same model after it")


def plan_of_a_small_run(folder: Path) -> Plan:
    config = BertConfig(
        vocab_size=len(tokenizer()),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    local = {"learning_rate": 0.5, "steps": 4, "batch_size": 0.5, "physical_batch_size": 16}
    return plan_for(
        str(write_base(folder / "base", config)),
        train=[{"mode": "head", "rounds": 2}, {"mode": "lora", "rounds": 2}],
        rounds=4,
        model={"max_length": 16},
        lora={"targets": ["query", "value"]},
        data={"source": str(records(folder / "records.csv", 240))},
        local=local,
    )


def write_base(folder: Path, config: Any) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModel.from_config(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def simulate_until_killed(plan: Path, folder: Path, device: str) -> None:
    """Play a run that ends with SIGKILL when the first update of its third round has come."""

    def look(what: str, fields: Mapping[str, Any]) -> None:
        if what == "update_received" and fields.get("round") == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    with observe_run(look), repeatable_noise():
        simulate(parse_plan(tomllib.loads(plan.read_text(encoding="utf-8"))), folder, device=device)


@contextmanager
def repeatable_noise() -> Iterator[None]:
    """Let organizations draw noise that a second run draws again: for comparing two runs bit for bit, and for nothing else."""
    real = client_steps._private_training

    def drawing(*parts: object) -> Callable[[], Any]:
        drawn = itertools.count()

        def draw() -> Any:
            return seeded_generator(*map(str, parts), next(drawn))

        return draw

    def training(prepared: Any) -> int:
        context = prepared.context
        with mock.patch.object(dp_sgd, "private_generator", drawing(context.site.organization, context.round)):
            return real(prepared)

    counts = mock.patch("cotune.client.account.private_generator", drawing("counts"))
    with mock.patch.object(client_steps, "_private_training", training), counts:
        yield


def model_bytes(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


# --- evaluation, features, memory, text


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
        _wait(bench)
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


def measure_memory_limit(bench: Bench) -> None:
    """A run that finds its physical batch size under a limit that its first choice does not fit in."""
    folder = bench.work("memory")
    wide = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 2048}
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = BertConfig(vocab_size=len(tokenizer()), pad_token_id=0, **(small if bench.tiny else wide))
    try:
        plan = plan_for(
            str(write_base(folder / "base", config)),
            model={"max_length": 32 if bench.tiny else 256},
            lora={"targets": ["query", "value"]},
            data={"source": str(records(folder / "records.csv", 240))},
            local={"steps": 2, "batch_size": 64, "physical_batch_size": "auto"},
        )
    except CotuneError as error:
        raise Skipped(f"this version of cotune finds no physical batch size by itself ({_reason(error)})") from None
    told: list[Row] = []
    with limited_memory(bench, gib=2.0), observe_run(lambda what, fields: told.append({"event": what, **fields})):
        run = simulate(plan, folder / "run", device=str(bench.device))
    said = [str(row) for row in told if "physical" in str(row)]
    bench.add(**{"rounds": len(run.summary.rounds), "limit GiB": 2.0 if bench.on_gpu else None, "said": " ".join(said)[:200]})


@contextmanager
def limited_memory(bench: Bench, gib: float) -> Iterator[None]:
    if not bench.on_gpu:
        yield
        return
    whole = torch.cuda.get_device_properties(bench.device).total_memory
    free(bench.device)
    torch.cuda.set_per_process_memory_fraction(gib * 2**30 / whole, bench.device.index or 0)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, bench.device.index or 0)


def measure_writing(bench: Bench) -> None:
    """A step of a model that writes."""
    try:
        get_task("causal-lm")
    except KeyError:
        raise Skipped("this version of cotune has no task causal-lm") from None
    for checkpointing in (True, False):
        case = Case("1.5 B", torch.bfloat16, checkpointing, 4 if bench.tiny else 16)
        bench.attempt(lambda case=case: writing_of(bench, case), **case.named)  # type: ignore[misc]


def writing_of(bench: Bench, case: Case) -> Row:
    model = build_model(bench, case, "causal-lm")
    rows = case.physical - 1
    setup = build_setup(bench, case, model, rows, task="causal-lm", labels=[])
    private = timed(bench, private_steps(setup, rows))
    return {"tokens/s": rows * LENGTH / private.seconds, "peak GiB": private.gib}


# --- all of it, the most telling first


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "steps": measure_steps,
    "clipped sums": measure_clipped_sums,
    "killed and resumed": measure_resumption,
    "writing": measure_writing,
    "evaluation": measure_evaluation,
    "memory limit": measure_memory_limit,
    "features": measure_features,
}


def run_section(bench: Bench, name: str) -> None:
    """Whatever goes wrong in a section ends that section alone."""
    section = Section(name)
    bench.sections.append(section)
    print(f"{name}:", flush=True)
    began = time.monotonic()
    try:
        if time.monotonic() > bench.until:
            raise Skipped("the time was over")
        SECTIONS[name](bench)
    except Skipped as reason:
        section.skipped = f"Skipped: {reason}."
    except Exception as error:
        traceback.print_exc()
        section.error = f"Failed: {_reason(error)}"
    free(bench.device)
    section.seconds = time.monotonic() - began
    print(f"  {section.skipped or section.error or 'done'} ({section.seconds:.0f} s)", flush=True)
    bench.write()


def main(arguments: list[str] | None = None) -> list[Section]:
    """Measure, write, and return what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where gpu.json and gpu.md are written")
    parser.add_argument("--dry-run", action="store_true", help="tiny models: does everything run?")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=390, help="nothing is begun after that time")
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=list(SECTIONS), help="some of the sections")
    parser.add_argument("--killed", type=Path, help=argparse.SUPPRESS)  # the plan of the run that a section lets be killed
    chosen = parser.parse_args(arguments)
    if chosen.killed:
        simulate_until_killed(chosen.killed, chosen.folder, chosen.device)
    bench = Bench(torch.device(chosen.device), chosen.dry_run, chosen.folder, time.monotonic() + chosen.seconds)
    print(machine(bench.device), flush=True)
    for name in chosen.only:
        run_section(bench, name)
    return bench.sections


if __name__ == "__main__":
    main()
