"""A run under a limit of memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from gpu_bench import Bench, Row, Skipped, free, reason_of_failure
from made_up import plan_for, records, tokenizer, write_base
from transformers import BertConfig

from cotune.errors import CotuneError
from cotune.models.local_events import observe_models
from cotune.simulations.run import simulate


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
        raise Skipped(f"this version of cotune finds no physical batch size by itself ({reason_of_failure(error)})") from None
    told: list[Row] = []
    with limited_memory(bench, gib=2.0), observe_models(lambda what, fields: told.append({"event": what, **fields})):
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
