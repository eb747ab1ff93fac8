from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch

from tests.support.console import Cotune, Outcome, Started
from tests.support.datasets import sentences, write_csv

MORE_CLASSES = '--set=labels=["good","bad"]'


def sentence(outcome: Outcome, code: int) -> str:
    """The one line that a failure is, without its "cotune: "."""
    assert outcome.code == code, outcome
    lines = outcome.err.splitlines()
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("cotune: ")
    assert "unexpected error" not in lines[0]
    assert "Traceback" not in outcome.out + outcome.err
    return lines[0].removeprefix("cotune: ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        # the data
        (["--data", "nowhere.csv"], ["nowhere.csv does not exist", "check data.source"]),
        (["--text", "txt"], ["reviews.csv has no column 'txt'", "did you mean 'text'?"]),
        (["--label", "lable"], ["has no column 'lable'", "did you mean 'label'?", "--set data.label=COLUMN"]),
        (["--data", "empty.csv"], ["empty.csv is empty (0 bytes)"]),
        (["--data", "header.csv"], ["header.csv holds the names of its columns and no records"]),
        (["--data", "photo.csv"], ["photo.csv is not"]),
        (["--data", "latin.csv"], ["latin.csv is not utf-8 text", "--set data.encoding=cp1252"]),
        (["--data", "zip.parquet"], ["zip.parquet is not valid Parquet"]),
        (["--data", "reviews.xlsx"], ["reviews.xlsx is not a valid Excel workbook"]),
        (["--data", "one.csv"], ["'good' only", "two or more"]),
        (["--data", "nothing"], ["holds no data file"]),
        ([MORE_CLASSES], ["classes that the plan does not list ('so')"]),
        (["--data", "organizations", MORE_CLASSES], ["south.csv", "classes that the plan does not list ('so')"]),
        (["--set", "local.batch_size=150"], ["fewer than a batch needs (150"]),
        (["--clients", "100"], ["100 clients", "use fewer clients"]),
        # the plan
        (["--set", "privacy.epsilom=3"], ['unknown key "privacy.epsilom"', "did you mean 'epsilon'?"]),
        (["--set", "local.learning_rat=3"], ['unknown key "local.learning_rat"', "did you mean 'learning_rate'?"]),
        (["--set", "simulatoin.clients=3"], ['unknown key "simulatoin"', "did you mean 'simulation'?"]),
        (["--set", "epsilon=3"], ['unknown key "epsilon"', "did you mean 'privacy.epsilon'"]),
        (["--set", "learning_rate=3"], ["did you mean 'local.learning_rate'"]),
        (["--epsilon", "3"], ["no such option --epsilon", "did you mean --set privacy.epsilon=3"]),
        (["--learning-rate", "3"], ["no such option --learning-rate", "did you mean --set local.learning_rate=3"]),
        (["--set", "rounds=many"], ['rounds = "many"']),
        (["--set", "rounds=0"], ["rounds = 0"]),
        (["--set", "privacy.epsilon=-1"], ["privacy.epsilon = -1"]),
        (["--set", "privacy.delta=0"], ["privacy.delta = 0"]),
        (["--set", "privacy=some"], ["privacy"]),
        (["--set", "rounds"], ['the override "rounds" is not understood: expected key=value']),
        (["--partition", "dirichle:0.5"], ["dirichle", "did you mean 'dirichlet:ALPHA'?"]),
        (["--partition", "dirichlet:zero"], ["dirichlet:zero", "dirichlet:0.5"]),
        (["--task", "tagging"], ['task = "tagging"', "'token-classification'"]),
        (["--set", "lora.method=dora"], ['lora.method = "dora": expected lora or rslora: DoRA divides']),
        (["--set", "train=lora", "--set", "lora.layers=9"], ["lora.layers = 9, but the modules to adapt lie in 2 layers"]),
        (["--set", "train=lora", "--set", 'lora.targets=["word_embeddings"]'], ["lora.targets names the embedding bert."]),
        (["--task", "image-classification"], ["reviews.csv has no column 'image': use --set data.image=COLUMN"]),
        (["--task", "token-classification"], ["reviews.csv has ", "expected a tag for each word"]),
        (["--engine", "in-proces"], ['unknown engine "in-proces"', "did you mean 'in-process'?"]),
        (["--set", "strategy.fusion=meen"], ['unknown fusion "meen"', "did you mean 'mean'?"]),
        (["--set", "strategy.weighting=example"], ['unknown weighting "example"', "did you mean 'examples'?"]),
        (["--set", "strategy.server_optimizer.name=sdg"], ["sdg", "did you mean 'sgd'?"]),
        (["--set", 'strategy.server_optimizer={name="sgd",lrr=1}'], ['"lrr"', "did you mean 'lr'?"]),
        (["--set", "train=heads"], ["train", "heads"]),
        # the model
        (["--model", "./bare"], ["./bare has no weights: expected *.safetensors"]),
        (["--model", "./pickled"], ["pytorch_model.bin", "can run code when it is opened", "safetensors"]),
        (["--model", "./pointer"], ["./pointer has a pointer of Git LFS in place of model.safetensors", "git lfs pull"]),
        (["--model", "./nowhere"], ["./nowhere is not a folder"]),
        (["--model", "package:no_such_model"], ["package:no_such_model is not installed"]),
        (["--model", "nobody/nothing"], ["nobody/nothing was found neither as a folder nor on the Hugging Face hub"]),
        (["--set", f"model.base_hash={'0' * 64}"], ["expected 0000000000000000"]),
        # privacy and hardware
        (
            ["--set", 'privacy={epsilon=1e-6,delta="1/n^4"}', "--set", "local.steps=5000"],
            ["ε = 1e-06", "cannot be reached by 10000 steps", "allow a larger ε, or plan fewer steps or smaller batches"],
        ),
        (["--set", "privacy={delta=0.4}"], ["privacy.delta = 0.4"]),
        (["--device", "tpu"], ['device = "tpu" is not known: expected auto, cpu, cuda or cuda:N']),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else None,
)
def test_a_failure_before_training_is_one_sentence(cotune: Cotune, broken: Path, arguments: list[str], words: list[str]) -> None:
    said = sentence(cotune("simulate", "toy.toml", *arguments), code=2)
    for word in words:
        assert word in said
    assert len(said) < 500
    assert not (broken / "runs").exists()


@pytest.fixture
def broken(folder: Path) -> Path:
    """Files and model folders with something wrong in each."""
    (folder / "empty.csv").touch()
    (folder / "header.csv").write_text("text,label\n")
    (folder / "photo.csv").write_bytes(b"\xff\xd8\xff\xe0\x00\x10JFIF\x00" + bytes(range(256)))
    (folder / "latin.csv").write_bytes("text,label\nschön,good\n".encode("latin-1"))
    (folder / "zip.parquet").write_bytes(b"PK\x03\x04" * 20)
    (folder / "reviews.xlsx").write_bytes(b"PK\x03\x04")
    write_csv(folder / "one.csv", sentences(50, classes=("good",)))
    (folder / "nothing").mkdir()
    (folder / "organizations").mkdir()
    write_csv(folder / "organizations" / "north.csv", sentences(60, classes=("good", "bad")))
    write_csv(folder / "organizations" / "south.csv", sentences(60, seed=1))
    for name in ("bare", "pickled", "broken", "pointer"):
        shutil.copytree(folder / "base", folder / name)
        (folder / name / "model.safetensors").unlink()
    torch.save({}, folder / "pickled" / "pytorch_model.bin")
    (folder / "pointer" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:a\nsize 9\n")
    (folder / "broken" / "model.safetensors").write_bytes(b"half of it")
    return folder


def test_weights_that_are_damaged(cotune: Cotune, broken: Path) -> None:
    said = sentence(cotune("simulate", "toy.toml", "--model", "./broken"), code=2)
    assert "broken has model.safetensors, which holds no tensors" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(cotune: Cotune) -> None:
    said = sentence(cotune("simulate", "toy.toml", "--device", "cuda"), code=2)
    assert 'device = "cuda" was asked for, but this machine shows 0 CUDA GPUs to PyTorch: use --device cpu' in said


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ("tweet", ['neither a preset nor a file "tweet"', "did you mean 'tweets'?"]),
        ("mine.toml", ["mine.toml does not exist", "cotune plan new tweets > my.toml"]),
        ("bad.toml", ["bad.toml is not valid TOML"]),
        ("binary.toml", ["binary.toml cannot be read"]),
        ("half.toml", ['lacks "model"']),
        ("typo.toml", ['unknown key "privacy.epsilom"', "did you mean 'epsilon'?"]),
    ],
)
@pytest.mark.parametrize("command", [("simulate",), ("plan", "check")])
def test_a_plan_that_cannot_be_read(cotune: Cotune, folder: Path, command: tuple[str, ...], plan: str, words: list[str]) -> None:
    (folder / "bad.toml").write_text("rounds = \n")
    (folder / "binary.toml").write_bytes(b"\xff\xfe\x00\x01")
    (folder / "half.toml").write_text('[data]\nsource = "reviews.csv"\n')
    (folder / "typo.toml").write_text(
        (folder / "toy.toml").read_text().replace('privacy = "none"\n', "") + "[privacy]\nepsilom = 3\n"
    )
    said = sentence(cotune(*command, plan), code=2)
    for word in words:
        assert word in said


@pytest.mark.parametrize(
    ("words", "error_code", "exit_code"),
    [
        (("simulate", "--data", "nowhere.csv"), "data.missing_file", 2),
        (("plan", "keys", "no such word"), "plan.unknown_key", 2),
        (("simulate", "--epsilon", "3"), "usage.invalid", 2),
        (("client", "ledger", "nowhere"), "data.not_a_site", 2),
    ],
)
def test_json_errors_have_a_code_and_the_sentence(
    cotune: Cotune, words: tuple[str, ...], error_code: str, exit_code: int
) -> None:
    outcome = cotune(*words, "--json")
    error = json.loads(outcome.out)["error"]
    assert (error["code"], outcome.code) == (error_code, exit_code)
    assert outcome.err == f"cotune: {error['message']}\n"


def test_unknown_presets_are_named_wherever_one_is_asked_for(cotune: Cotune) -> None:
    assert "did you mean 'tweets'?" in sentence(cotune("plan", "new", "tweet"), code=2)


def test_a_folder_that_is_taken(cotune: Cotune, folder: Path) -> None:
    assert cotune("simulate", "toy.toml", "--out", "run", "--set", "simulation.baselines=[]").code == 0
    before = (folder / "run" / "summary.json").read_bytes()
    said = sentence(cotune("simulate", "toy.toml", "--out", "run"), code=1)
    assert "holds a run already" in said
    assert "--resume" in said
    assert (folder / "run" / "summary.json").read_bytes() == before
    assert "is not an empty folder" in sentence(cotune("simulate", "toy.toml", "--out", "."), code=1)
    assert "toy.toml" in sentence(cotune("simulate", "toy.toml", "--out", "toy.toml"), code=1)
    assert "cannot be written" in sentence(cotune("simulate", "toy.toml", "--out", "toy.toml/run"), code=1)


def test_what_is_not_a_run_cannot_be_resumed(cotune: Cotune, folder: Path) -> None:
    for what in ("nowhere", ".", "toy.toml"):
        assert "is not the folder of a run" in sentence(cotune("simulate", "--resume", what), code=1)


@pytest.mark.parametrize(
    "also", [["toy.toml"], ["--clients", "3"], ["--set", "rounds=9"], ["--out", "elsewhere"], ["--device", "cpu"]]
)
def test_a_run_is_continued_as_it_was_started(cotune: Cotune, also: list[str]) -> None:
    said = sentence(cotune("simulate", "--resume", "run", *also), code=2)
    assert "--resume takes no plan, engine, device or overrides" in said


def test_an_option_that_does_not_exist(cotune: Cotune) -> None:
    outcome = cotune("simulate", "--client", "3")
    assert outcome.code == 2
    assert "--client" in outcome.err
    assert "Traceback" not in outcome.err


def test_a_run_that_fails_says_one_line_and_exits_with_1(cotune: Cotune, folder: Path) -> None:
    outcome = cotune("simulate", "toy.toml", "--out", "run", "--set", "server.max_update_norm=1e-30")
    said = sentence(outcome, code=1)
    assert "round 1 got 0 of 2 updates" in said
    assert "org-1" in said
    assert "round 1: org-2 left out" in outcome.out
    assert not (folder / "run" / "summary.json").exists()


# --- as a process of its own


def test_script_prints_one_line_and_debug_a_traceback(started: Started) -> None:
    command = ("simulate", "toy.toml", "--data", "nowhere.csv")
    with started(*command) as plain, started(*command, "--debug") as debug:
        (out, err), (_, trace) = plain.communicate(timeout=6000), debug.communicate(timeout=120)
    assert "nowhere.csv does not exist" in sentence(Outcome(plain.returncode, out, err), code=2)
    assert out == ""
    assert debug.returncode == 1
    assert "Traceback" in trace
    *_, failure, code = trace.splitlines()
    assert failure.startswith("cotune.errors.DataError: nowhere.csv does not exist")
    assert code == "error code: data.missing_file"


def test_stopped_by_hand_it_says_how_to_go_on(started: Started, folder: Path) -> None:
    with started("simulate", "toy.toml", "--out", "run", "--set", "rounds=5000", "--set", "simulation.baselines=[]") as process:
        assert process.stdout is not None
        while not (line := process.stdout.readline()).startswith("round 2/5000"):
            assert line, "it ended before round 2"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=600)
    assert process.returncode == 130
    assert err == (
        "cotune: stopped; finished rounds are kept: `cotune simulate --resume` with the run's folder goes on after them\n"
    )
    events = [json.loads(line) for line in (folder / "run" / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sum(event["event"] == "round_finished" for event in events) >= 2
