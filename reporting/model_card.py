"""The model card of an exported model: what it is, how it is called, what is promised about the records, what it reached.

It is Markdown, and it travels with the model. Names that come from a plan or from records are shown as they are, and can neither
end a line nor begin a tag.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cotune.data.inputs.chat_wording import wording_of
from cotune.data.readers.sources import get_base_path
from cotune.data.tasks.task import get_task
from cotune.models.base.lookup import FOLDER
from cotune.models.base.quantization import EXACT
from cotune.models.config import FeatureConfig
from cotune.plan.plan import Plan
from cotune.plan.stacking import list_uncovered
from cotune.privacy.claimed_guarantee import build_claim
from cotune.privacy.config import RecordPrivacy
from cotune.reporting.measures import get_measures

CARD = "README.md"  # its name in the folder of a model
Measured = Mapping[str, Mapping[str, Any] | None]  # what was tested -> its metrics; None: not tested
_MOST_LABELS = 200
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~])")


def model_card(
    plan: Plan,
    *,
    privacy: Sequence[str],
    length: int,
    test: Measured | None = None,
    examples: int = 0,
    about: str = "Fine-tuned with cotune by organizations that did not share their records.",
    adapters: bool = False,
) -> str:
    """Return the card.

    Args:
        plan: Of the run, resolved.
        privacy: Paragraphs about what is promised.
        length: Tokens that the model reads of a text.
        test: Metrics of the model and of what it is compared with.
        examples: How many records they were measured on.
        about: What it is, in one sentence.
        adapters: Whether it is for the adapters alone, as a PEFT folder.
    """
    task = get_task(plan.task)
    pipeline = get_task(plan.tasks[0].type).pipeline if plan.tasks else task.pipeline
    how = _use_of_adapters(plan) if adapters else _how(plan, pipeline, length)
    library = "peft" if adapters else "transformers"
    lines = [
        *("---", f"library_name: {library}", f"pipeline_tag: {pipeline}", "---", "", f"# {escape_line(plan.name)}", ""),
        *(about, "", *how, *_trained_on(plan, adapters), "", "## Model", "", "| | |", "|---|---|"),
        *(f"| {name} | {escape_line(value)} |" for name, value in _facts(plan, task.key, length)),
        *("", "## Privacy", "", "\n\n".join(map(escape_line, (*privacy, *_about_members(plan))))),
        *_results(test or {}, examples),
    ]
    return "\n".join(lines) + "\n"


def _trained_on(plan: Plan, adapters: bool) -> Iterator[str]:
    """Say of a base of 4 bits what its layers computed with, and what adapters are put on."""
    if plan.model.quantization == "none":
        return
    if adapters:
        yield from (
            "",
            "They were trained on the base model in 4 bits, as it is loaded here. Without `quantization_config` they are on the"
            " full base model: answers differ somewhat, and no figure here is of it.",
        )
        return
    yield from (
        "",
        f"It was trained on the base model in 4 bits ({plan.model.quantization}). These weights are what its layers computed"
        " with: the 4-bit weights, widened, with what was trained; they are not the full base model's with something added. The"
        " adapters in `adapter/`, where that folder is there, fit a base that is loaded with"
        f" `quantization_config={_in_four_bits(plan)}`.",
    )


def _in_four_bits(plan: Plan) -> str:
    settings = f'load_in_4bit=True, bnb_4bit_quant_type="{plan.model.quantization}", llm_int8_skip_modules={json.dumps(EXACT)}'
    return f"BitsAndBytesConfig({settings})"


def promised(plan: Plan) -> list[str]:
    """Return what a plan promises about the records of every organization, where what was spent is not known."""
    if not isinstance(plan.privacy, RecordPrivacy):
        return ["No differential privacy for records: the plan says privacy = none. The model may reveal single records."]
    claim = build_claim(plan.privacy, None, not_covered=list_uncovered(plan.model.members))
    return [
        f"Record-level differential privacy: ε at most {claim.epsilon_allowed:g} at δ = {claim.delta_rule} for what each"
        f" organization has sent, as the plan says (neighboring data sets: {claim.neighbors}). {claim.mechanism}.",
        f"Not covered: {'; '.join(claim.not_covered)}.",
    ]


def _about_members(plan: Plan) -> Iterator[str]:
    """The promise above is about the records that the meta-model has learned from, and not about those of its members."""
    for member in plan.model.members:
        yield (
            f"The model of {member.name} was trained without privacy, and may reveal single records of its training."
            if member.handed_over
            else f"The model of {member.name} was trained before, with ε = {member.epsilon:g} at δ = {member.delta:g}, as the"
            " plan says; for a record in both trainings the two add up."
        )


def _how(plan: Plan, pipeline: str, length: int) -> Iterator[str]:
    if plan.model.members:
        return _use_of_members(plan)
    return _use(pipeline, length, plan) if plan.model.feature is None else _use_of_layers(plan.model.feature, length)


def _use_of_adapters(plan: Plan) -> Iterator[str]:
    """The base model is named below, with its hash."""
    task = get_task(plan.task)
    kind = "AutoModel" if task.has_several_heads else task.model_class().__name__
    yield from (
        "## How to use",
        "",
        "These are the adapters alone. `BASE` is a copy of the base model below.",
        "",
        "```python",
        "from peft import PeftModel",
        *_put_on_base(plan, kind),
        "```",
    )
    if task.has_several_heads:
        yield from ("", "They are for the encoder; the heads of the tasks are not here. Organizations have the whole model.")


def _put_on_base(plan: Plan, kind: str) -> Iterator[str]:
    if plan.model.quantization == "none":
        yield from (f"from transformers import {kind}", "")
        yield f'model = PeftModel.from_pretrained({kind}.from_pretrained("BASE"), "FOLDER").merge_and_unload()'
        return
    yield from (f"from transformers import {kind}, BitsAndBytesConfig", "")
    yield f"quantization = {_in_four_bits(plan)}"
    yield f'base = {kind}.from_pretrained("BASE", quantization_config=quantization)'
    yield 'model = PeftModel.from_pretrained(base, "FOLDER")'


def _use_of_members(plan: Plan) -> Iterator[str]:
    yield from (
        "## How to use",
        "",
        "```bash",
        'cotune predict FOLDER "a text"',
        "cotune evaluate FOLDER --data records.csv",
        "```",
    )
    yield from (
        "",
        f"Each of the {len(plan.model.members)} models in `models/` predicts, and a multinomial logistic regression makes one"
        " prediction of theirs: `meta_model.safetensors` holds its coefficients, which are multiplied by the logarithms of all"
        " probabilities, calibrated by the temperatures in `fusion.json`. `cotune distill FOLDER` makes one model of it.",
    )


def _use_of_layers(feature: FeatureConfig, length: int) -> Iterator[str]:
    """A head on layers has no class in transformers: this is all that applying it takes."""
    first = ", hidden[-1][:, 0]" if feature.cls else ""
    mapped = '((feature - head["center"]) @ head["matrix"].T)' if feature.whiten == "public" else "feature"
    yield from (
        "## How to use",
        "",
        "**This is the exact model**: `head.safetensors` holds the head as the rounds have left it. It reads the means of layers"
        f" {', '.join(map(str, feature.layers))} of its encoder, for which transformers has no class: `pipeline` refuses this"
        " folder. `cotune predict FOLDER` and `cotune evaluate FOLDER` open it, and so does this program. `cotune onnx FOLDER`"
        " writes the same head as `head.onnx`. `cotune distill FOLDER` makes a plain classifier of it, which is another model:"
        " its card says what that has cost.",
        "",
        "```python",
        "import json",
        "from pathlib import Path",
        "",
        "import torch",
        "from safetensors.torch import load_file",
        "from transformers import AutoModel, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER/encoder")',
        'encoder = AutoModel.from_pretrained("FOLDER/encoder").eval()',
        'head = load_file("FOLDER/head.safetensors")',
        'labels = json.loads(Path("FOLDER/config.json").read_text())["id2label"]',
        "",
        f'batch = tokenizer(["a text"], truncation=True, max_length={length}, padding=True, return_tensors="pt")',
        "with torch.no_grad():",
        "    hidden = encoder(**batch, output_hidden_states=True).hidden_states",
        '    mask = batch["attention_mask"][:, :, None].float()',
        f"    means = [(hidden[layer] * mask).sum(1) / mask.sum(1) for layer in {list(feature.layers)}]",
        f"    feature = torch.cat([*means{first}], 1)",
        f'    scores = {mapped} @ head["weight"].T + head["bias"]',
        "print([labels[str(best)] for best in scores.argmax(1).tolist()])",
        "```",
    )


def _use(pipeline: str, length: int, plan: Plan) -> Iterator[str]:
    if pipeline == "text2text-generation":
        yield from _use_of_translator(length)
        return
    if pipeline == "question-answering":
        yield from _use_of_answerer(length)
        return
    if pipeline == "text-generation":
        yield from _use_of_chat_model(plan, length) if plan.data.chats else _use_of_writer(length)
        return
    folder = f"FOLDER/{plan.tasks[0].name}" if plan.tasks else "FOLDER"
    yield from show_pipeline(pipeline, folder, length, ", top_k=None" if plan.task == "multi-label" else "")
    if plan.tasks:
        named = ", ".join(f"{task.name} ({get_task(task.type).pipeline})" for task in plan.tasks)
        yield f"Each task has a model of its own in a folder of its name: {named}."
    given = "photo.png" if pipeline == "image-classification" else '"a text"'
    yield f"`cotune predict {folder} {given}` does the same, also for files."


def show_pipeline(pipeline: str, folder: str, length: int, options: str = "") -> Iterator[str]:
    """Yield the lines that say how `transformers.pipeline` opens a plain classifier.

    Args:
        pipeline: Its name in transformers.
        folder: Of the model.
        length: Tokens of a text that it reads.
        options: Further arguments, with a comma before each.
    """
    is_image = pipeline == "image-classification"
    cut = ", truncation=True" if pipeline == "text-classification" else ""
    yield from ("## How to use", "", "```python", "from transformers import pipeline", "")
    yield f'predict = pipeline("{pipeline}", "{folder}"{cut}{options})'
    yield from (f'print(predict("{"photo.png" if is_image else "a text"}"))', "```", "")
    if cut:
        yield (
            f"`truncation=True` cuts a text after {length} tokens, as in training. Without it transformers reads the whole text,"
            " which may change the answer, and fails where the text is longer than the model has positions."
        )
    elif not is_image:
        yield f"A text is cut after {length} tokens, as in training."


def _use_of_writer(length: int) -> Iterator[str]:
    yield from ("## How to use", "", "```python", "from transformers import pipeline", "")
    yield 'write = pipeline("text-generation", "FOLDER")'
    yield from ('print(write("a prompt\\n", max_new_tokens=50, do_sample=False, return_full_text=False))', "```", "")
    yield f"A prompt ends with the separator of the plan, as in training; with its answer it had {length} tokens at most."


def _use_of_chat_model(plan: Plan, length: int) -> Iterator[str]:
    """Contents are ASCII literals: those of the plan are text that another organization has written."""
    chat = wording_of(plan.data).ask("a question" if plan.data.instruction is None else "a prompt")
    said = ", ".join(f'{{"role": "{role}", "content": {content!a}}}' for role, content in chat.messages)
    yield from ("## How to use", "", "```python", "from transformers import pipeline", "")
    yield 'write = pipeline("text-generation", "FOLDER")'
    yield f"chat = [{said}]"
    yield from ('print(write(chat, max_new_tokens=50, do_sample=False, return_full_text=False)[0]["generated_text"])', "```", "")
    yield f"The base model's chat template writes a chat out, as in training; with its answer it had {length} tokens at most."


def _use_of_translator(length: int) -> Iterator[str]:
    yield from ("## How to use", "", "```python", "from transformers import AutoModelForSeq2SeqLM, AutoTokenizer", "")
    yield 'model, reader = AutoModelForSeq2SeqLM.from_pretrained("FOLDER"), AutoTokenizer.from_pretrained("FOLDER")'
    yield 'written = model.generate(**reader("a prompt\\n", truncation=True, return_tensors="pt"), max_new_tokens=50)'
    yield from ("print(reader.decode(written[0], skip_special_tokens=True))", "```", "")
    yield f"A prompt ends with the separator of the plan, as in training. Prompts and targets had {length} tokens at most."


def _use_of_answerer(length: int) -> Iterator[str]:
    yield from (
        "## How to use",
        "",
        "```bash",
        'cotune predict FOLDER "a text with the answer" --question "a question"',
        "```",
        "",
    )
    yield f"A question and its text are read as one, of {length} tokens at most; `AutoModelForQuestionAnswering` loads the model."


def _facts(plan: Plan, key: str, length: int) -> Iterator[tuple[str, str]]:
    labels = ", ".join(plan.labels[:_MOST_LABELS]) + (" …" if len(plan.labels) > _MOST_LABELS else "")
    yield "task", plan.task
    if plan.labels:
        yield "labels", f"{len(plan.labels)}, in the order of the head: {labels}"
    if key == "text":
        yield "length", f"{length} tokens; the rest of a text is not read"
    yield "base model", _base(plan)
    yield "plan", f"{plan.name}, id {plan.plan_id}"
    yield "training", "; ".join(f"{stage.rounds} rounds of train = {stage.mode}" for stage in plan.stages)
    if plan.tasks:
        yield "weights of the tasks", ", ".join(f"{task.name}: {task.weight:g}" for task in plan.tasks)
    if plan.class_weights:
        yield "class weights", ", ".join(f"{label}: {weight:g}" for label, weight in plan.class_weights.items())
    yield "strategy", f"{plan.strategy.weighting.name} weights, {plan.strategy.fusion.name} fusion"


def _base(plan: Plan) -> str:
    """A folder by its last name alone: where it is on a machine is nobody's business."""
    base = plan.model.base
    name = base.removeprefix(FOLDER) if get_base_path(base) is None else Path(base).name
    revision = "" if plan.model.revision is None else f", revision {plan.model.revision}"
    quantized = "" if plan.model.quantization == "none" else f", in 4 bits ({plan.model.quantization})"
    return f"{name}{revision}{quantized}, SHA-256 {plan.model.base_hash or 'not given'}"


_MEANS = {  # by the figure that decides
    "accuracy": "precision, recall and F1 are means over the classes",
    "loss": "loss is in nats per target token",
    "token_f1": "F1 is of the words of an answer and of the nearest true one, as in SQuAD",
    "mse": "errors are in the units of the numbers",
    "micro_f1": "a label is predicted where its probability is above one half",
}


def _results(test: Measured, examples: int) -> Iterator[str]:
    rows = [(name, metrics) for name, metrics in test.items() if metrics]
    if not rows:
        return
    keys = [measure.key for measure in get_measures(rows[0][1])]
    means = _MEANS[keys[0]]
    yield from ("", "## Test", "", f"On {examples:,} held-out records; {means}. No ε covers these figures.", "")
    yield f"| | {' | '.join(keys)} |"
    yield f"|---|{'---|' * len(keys)}"
    for name, metrics in rows:
        yield f"| {escape_line(name)} | {' | '.join(f'{float(metrics[key]):.3f}' for key in keys)} |"


def escape_line(text: str) -> str:
    """Return a text on one line, with Markdown's and HTML's own characters escaped."""
    line = " ".join("".join(" " if unicodedata.category(c).startswith("C") else c for c in text).split())
    return _SPECIAL.sub(r"\\\1", line)
