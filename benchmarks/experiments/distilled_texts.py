"""What does a small language model gain from a larger one, beyond what it learns from the same public texts alone?

    python benchmarks/experiments/distilled_texts.py --runs runs/distilled-texts    # about half an hour on one core

Tiny models, made from configurations and trained from nothing, write Debian's short description of a package after the first
words of the long one. Teachers learn from packages that the student never sees; 400 others are public, and 300 are tested on.
Packages of one source are never on two sides. What was trained is kept under --runs, and not trained again: the command can be
stopped and started again.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from results_page import cell
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from cotune.data import samples
from cotune.data.records import Records
from cotune.data.types import Passage
from cotune.ensembles.config import DistillationConfig
from cotune.ensembles.sequence_distillation import SequenceDistillation, distill_sequences
from cotune.models.config import ModelConfig
from cotune.models.evaluation.language_model import evaluate_language_model, open_language_model

WORDS = 10  # of the long description, which are the prompt
PUBLIC = 400
TEST = 300
LENGTH = 64
SIZES = {"teacher": (128, 3), "student": (64, 2)}  # width and layers
ALONE = DistillationConfig(label_weight=1.0, epochs=10, learning_rate=2e-3)
STUDENT_EPOCHS = 15
WAYS: dict[
    str, tuple[tuple[str, ...], float, float, int | None]
] = {  # teachers, weight of the targets, temperature, tokens written
    "references alone": (("teacher",), 1.0, 1.0, None),
    "references and the teacher, T = 1": (("teacher",), 0.5, 1.0, None),
    "references and the teacher, T = 2": (("teacher",), 0.5, 2.0, None),
    "the teacher alone, T = 1": (("teacher",), 0.0, 1.0, None),
    "references and two teachers of half the records, T = 1": (("half-1", "half-2"), 0.5, 1.0, None),
    "texts that the teacher writes, alone": (("teacher",), 1.0, 1.0, 32),
    "texts that the teacher writes, and the teacher, T = 1": (("teacher",), 0.5, 1.0, 32),
}


def read_packages(seed: int) -> list[Passage]:
    """Return prompts and short descriptions, packages of one source side by side."""
    lines = (Path(str(samples.__path__[0])) / "debian-descriptions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    sources = sorted({row["source"] for row in rows})
    random.Random(seed).shuffle(sources)
    place = {source: number for number, source in enumerate(sources)}
    rows.sort(key=lambda row: (place[row["source"]], row["package"]))
    return [Passage(" ".join(row["long"].split()[:WORDS]) + "\n", row["short"]) for row in rows]


def write_bases(folder: Path, public: Sequence[Passage]) -> None:
    """Write untrained models of both sizes, with one tokenizer that has learned from the public texts."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=["<pad>", "</s>"], initial_alphabet=alphabet)
    words.train_from_iterator((text for each in public for text in (each.prompt, each.target)), trainer)
    reader = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    for name, (width, layers) in SIZES.items():
        config = LlamaConfig(
            vocab_size=len(reader),
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=3 * width,
            max_position_embeddings=2 * LENGTH,
            tie_word_embeddings=True,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / f"{name}-base")
        reader.save_pretrained(folder / f"{name}-base")


def train(
    out: Path, base: Path, teachers: Sequence[Path], inputs: Sequence[Passage], config: DistillationConfig, write: int | None
) -> None:
    """Train one model, unless it is there."""
    if out.exists():
        return
    opened = [open_language_model(str(teacher), "causal-lm", "cpu", LENGTH) for teacher in teachers]
    student = ModelConfig(base=str(base), max_length=LENGTH)
    prompts = inputs if write is None else [Passage(each.prompt, "") for each in inputs]
    names = [str(teacher) for teacher in teachers]
    distill_sequences(SequenceDistillation(opened, names, "causal-lm", student, config, prompts, out, write, device="cpu"))


def measure(folder: Path, test: Sequence[Passage]) -> float:
    """Return the loss per target token, in nats."""
    model = open_language_model(str(folder), "causal-lm", "cpu", LENGTH)
    return float(evaluate_language_model(model, Records(tuple(test), ("",) * len(test), "test"))["figures"]["loss"])


def run_seed(runs: Path, seed: int) -> dict[str, float]:
    """Return the test loss of each model."""
    folder = runs / f"seed-{seed}"
    packages = read_packages(seed)
    test, public, private = packages[:TEST], packages[TEST : TEST + PUBLIC], packages[TEST + PUBLIC :]
    if not (folder / "student-base").exists():
        write_bases(folder, public)
    base = folder / "teacher-base"
    half = len(private) // 2
    for name, records in (("teacher", private), ("half-1", private[:half]), ("half-2", private[half:])):
        train(folder / name, base, [base], records, ALONE, None)
    found = {name: measure(folder / name, test) for name in ("teacher", "half-1", "half-2")}
    for number, (way, (teachers, weight, temperature, write)) in enumerate(WAYS.items()):
        config = DistillationConfig(
            label_weight=weight, temperature=temperature, epochs=STUDENT_EPOCHS, learning_rate=2e-3, seed=seed
        )
        train(folder / f"way-{number}", folder / "student-base", [folder / each for each in teachers], public, config, write)
        found[way] = measure(folder / f"way-{number}", test)
    print(json.dumps({"seed": seed, **{name: round(loss, 3) for name, loss in found.items()}}), flush=True)
    return found


def main() -> None:
    """Train what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/distilled-texts"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    found = [run_seed(options.runs, seed) for seed in options.seeds]
    print("\n| model | loss, nats per token | gain over references alone |\n|---|---|---|")
    for name in found[0]:
        gains = [each["references alone"] - each[name] for each in found]
        print(f"| {name} | {cell([each[name] for each in found])} | {cell(gains)} |")


if __name__ == "__main__":
    main()
