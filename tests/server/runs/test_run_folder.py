from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

from cotune.errors import RunError
from cotune.plan.load import parse_plan
from cotune.reporting.documents.rounds import RoundEntry
from cotune.server.runs.run_folder import Participant, Progress, RunFile, RunFolder
from tests.support.failures import fails_with
from tests.support.run_folders import NewRun


def progress(round: int) -> Progress:
    generator = torch.Generator().manual_seed(round)
    state = {
        "head.weight": torch.randn(3, 4, generator=generator),
        "head.bias": torch.randn(4, 3, generator=generator).T,  # not contiguous
        "scale": torch.tensor(float(round)),
    }
    memory = {"head.weight": torch.randn(3, 4, generator=generator, dtype=torch.float64)}
    history = tuple(
        {"round": i, "stage": "head", "dropped": [{"organization": "Zürich", "reason": "…"}]} for i in range(1, round + 1)
    )
    return Progress(round, state, memory, history)


def assert_same(got: Progress, expected: Progress) -> None:
    assert (got.round, got.history) == (expected.round, expected.history)
    for one, other in ((got.state, expected.state), (got.memory, expected.memory)):
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            assert tensor.dtype == other[name].dtype
            assert torch.equal(tensor, other[name])


def checkpoints(folder: RunFolder) -> list[str]:
    return sorted(path.name for path in (folder.path / "checkpoints").iterdir())


# --- making and opening


def test_a_new_folder_holds_plan_and_participants_and_no_round(new_run: NewRun) -> None:
    folder = new_run("org-1", "Zürich")
    assert parse_plan(tomllib.loads((folder.path / "plan.toml").read_text(encoding="utf-8"))) == folder.plan
    assert folder.file.participants == (
        Participant(name="org-1", site="sites/org-1"),
        Participant(name="Zürich", site="sites/Zürich"),
    )
    again = RunFolder(folder.path)
    assert (again.plan, again.file) == (folder.plan, folder.file)
    assert again.load() == Progress()
    assert not again.finished


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("plan.toml", None),
        ("plan.toml", b"name = "),
        ("plan.toml", b"\xff\xfe\x00"),
        ("run.json", None),
        ("run.json", b""),
        ("run.json", b'{"run": "toy"'),
        ("run.json", b'{"run": "toy"}'),
        ("run.json", b"\xff\xfe\x00"),
    ],
)
def test_what_is_not_the_folder_of_a_run_is_refused(new_run: NewRun, file: str, content: bytes | None) -> None:
    folder = new_run().path
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    with fails_with("run.not_a_run", "plan.toml", "run.json"):
        RunFolder(folder)


def test_no_folder_at_all_is_refused_and_none_is_made(tmp_path: Path) -> None:
    with fails_with("run.not_a_run"):
        RunFolder(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_a_plan_that_is_not_valid_any_more_is_named(new_run: NewRun) -> None:
    folder = new_run().path
    with (folder / "plan.toml").open("a") as stream:
        stream.write("\n[privat]\nepsilon = 1\n")
    with fails_with("plan.invalid", "privat"):
        RunFolder(folder)


def test_a_folder_whose_making_was_cut_short_is_not_a_run(new_run: NewRun, tmp_path: Path) -> None:
    """run.json is written last."""
    whole = new_run()
    blocked = tmp_path / "blocked"
    (blocked / "run.json").mkdir(parents=True)  # writing run.json fails
    with pytest.raises(OSError, match=r"run\.json"):
        RunFolder.create(blocked, whole.plan, whole.file)
    assert sorted(path.name for path in blocked.iterdir()) == ["plan.toml", "run.json"]  # nothing half written is left
    with pytest.raises(RunError):
        RunFolder(blocked)


# --- checkpoints


def test_a_round_is_read_back_bit_for_bit(new_run: NewRun) -> None:
    folder = new_run(rounds=2)
    folder.save(progress(1))
    assert_same(RunFolder(folder.path).load(), progress(1))
    assert not folder.finished
    folder.save(progress(2))
    assert_same(RunFolder(folder.path).load(), progress(2))
    assert folder.finished


def test_rules_may_remember_a_tensor_of_the_state_or_one_twice(new_run: NewRun) -> None:
    """Such as a parameter before the round, which a stage that trains another left as it is."""
    folder = new_run()
    tensor = torch.arange(6.0)
    memory = {"optimizer/x": tensor, "fusion/x": tensor, "fusion/turned": tensor.reshape(2, 3).T}
    folder.save(Progress(1, {"x": tensor}, memory))
    found = folder.load()
    assert torch.equal(found.state["x"], tensor)
    assert found.memory.keys() == memory.keys()
    assert all(torch.equal(found.memory[name], kept) for name, kept in memory.items())


def test_checkpoint_is_a_plain_safetensors_file(new_run: NewRun) -> None:
    folder = new_run()
    folder.save(progress(1))
    with safe_open(folder.path / "checkpoints" / "round-00001.safetensors", framework="pt") as file:
        assert set(file.keys()) == {"state/head.weight", "state/head.bias", "state/scale", "memory/head.weight"}
        about = json.loads(file.metadata()["checkpoint"])
    assert (about["round"], about["plan_id"]) == (1, folder.plan.plan_id)
    lines = (folder.path / "history.jsonl").read_bytes()
    assert about["history_bytes"] == len(lines)
    assert [json.loads(line) for line in lines.splitlines()] == list(progress(1).history)


@pytest.mark.parametrize(("keep", "left"), [(0, [1, 2, 3, 4, 5]), (1, [5]), (2, [4, 5]), (9, [1, 2, 3, 4, 5])])
def test_as_many_checkpoints_stay_as_the_plan_says(new_run: NewRun, keep: int, left: list[int]) -> None:
    folder = new_run(rounds=5, keep_checkpoints=keep)
    for round in range(1, 6):
        folder.save(progress(round))
    assert checkpoints(folder) == [f"round-{round:05d}.safetensors" for round in left]
    assert_same(folder.load(), progress(5))


def test_round_that_cannot_be_written_leaves_the_one_before(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = new_run(rounds=5, keep_checkpoints=1)
    folder.save(progress(1))

    def disk_full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", disk_full)
        with pytest.raises(OSError, match="No space left"):
            folder.save(progress(2))
    assert checkpoints(folder) == ["round-00001.safetensors"]
    assert_same(RunFolder(folder.path).load(), progress(1))


def test_half_written_checkpoint_is_ignored_and_removed(new_run: NewRun) -> None:
    folder = new_run(rounds=5)
    folder.save(progress(1))
    part = folder.path / "checkpoints" / ".round-00002.safetensors.k3xq.part"
    part.write_bytes(b"half of")
    assert_same(RunFolder(folder.path).load(), progress(1))
    folder.save(progress(2))
    assert not part.exists()  # each is as large as the model


@pytest.mark.parametrize(
    "damage", ["empty", "garbage", "cut", "header", "no metadata", "other metadata", "metadata without a plan"]
)
def test_a_damaged_checkpoint_is_named_and_nothing_is_guessed(new_run: NewRun, damage: str) -> None:
    folder = new_run(rounds=5)
    folder.save(progress(1))
    folder.save(progress(2))
    last = folder.path / "checkpoints" / "round-00002.safetensors"
    content = last.read_bytes()
    tensors = {"state/scale": torch.zeros(())}
    last.write_bytes(
        {
            "empty": b"",
            "garbage": b"\x93NUMPY" * 20,
            "cut": content[:-7],
            "header": content[:8] + b"!" + content[9:],
            "no metadata": save(tensors),
            "other metadata": save(tensors, metadata={"checkpoint": "{"}),
            "metadata without a plan": save(tensors, metadata={"checkpoint": "{}"}),
        }[damage]
    )
    with fails_with("run.damaged_checkpoint", "round-00002.safetensors"):
        folder.load()
    last.unlink()
    assert_same(folder.load(), progress(1))


def test_a_checkpoint_of_another_plan_is_refused(new_run: NewRun) -> None:
    folder = new_run(seed=1)
    other = new_run(seed=2)
    other.save(progress(1))
    (folder.path / "checkpoints").mkdir()
    name = "checkpoints/round-00001.safetensors"
    (folder.path / name).write_bytes((other.path / name).read_bytes())
    with fails_with("run.foreign_checkpoint", folder.plan.plan_id[:12]):
        folder.load()


# --- the history


def test_a_checkpoint_does_not_grow_with_the_rounds(new_run: NewRun) -> None:
    """Safetensors reads headers of up to 100 MB: a long run with many organizations could not be continued."""
    folder = new_run(rounds=99, keep_checkpoints=2)
    for round in (10, 11, 98, 99):
        folder.save(progress(round))
    sizes = {len((folder.path / "checkpoints" / name).read_bytes()) for name in checkpoints(folder)}
    assert len(sizes) == 1
    assert_same(folder.load(), progress(99))
    assert (folder.path / "checkpoints" / "round-00099.safetensors").stat().st_size < 1500


@pytest.mark.parametrize("tail", [b'{"round": 3, "stage": "head"}\n', b'{"round": 3, "st', b"\n\n\x00"])
def test_lines_that_no_checkpoint_counts_on_are_replaced(new_run: NewRun, tail: bytes) -> None:
    """As a process leaves them that is killed before its checkpoint is there."""
    folder = new_run(rounds=5)
    folder.save(progress(2))
    with (folder.path / "history.jsonl").open("ab") as stream:
        stream.write(tail)
    again = RunFolder(folder.path)
    assert_same(again.load(), progress(2))
    assert again.history() == progress(2).history
    again.save(progress(3))
    assert_same(RunFolder(folder.path).load(), progress(3))


def test_each_line_is_written_once(new_run: NewRun) -> None:
    folder = new_run(rounds=5)
    folder.save(progress(1))
    before = (folder.path / "history.jsonl").read_bytes()
    folder.save(progress(2))
    after = (folder.path / "history.jsonl").read_bytes()
    assert after.startswith(before)
    assert after.count(b"\n") == 2


def test_the_round_before_has_its_own_history(new_run: NewRun) -> None:
    folder = new_run(rounds=5)
    for round in (1, 2, 3):
        folder.save(progress(round))
    (folder.path / "checkpoints" / "round-00003.safetensors").unlink()
    again = RunFolder(folder.path)
    assert_same(again.load(), progress(2))
    again.save(progress(3))
    assert_same(RunFolder(folder.path).load(), progress(3))


@pytest.mark.parametrize("damage", ["gone", "cut", "changed"])
def test_a_damaged_history_is_named_and_nothing_is_guessed(new_run: NewRun, damage: str) -> None:
    folder = new_run(rounds=5)
    folder.save(progress(2))
    file = folder.path / "history.jsonl"
    content = file.read_bytes()
    file.unlink()
    if damage != "gone":
        file.write_bytes(content[:-1] if damage == "cut" else content.replace(b"head", b"full", 1))
    for read in (RunFolder(folder.path).load, RunFolder(folder.path).history):
        with fails_with("run.damaged_history", "history.jsonl") as raised:
            read()
        assert raised.value.code == "run.damaged_history"


# --- the lock

HOLDER = (
    "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
)


@pytest.mark.crash
def test_second_process_is_kept_off_until_the_first_ends(new_run: NewRun) -> None:
    folder = new_run()
    with folder.locked():
        pass  # let go again
    command = [sys.executable, "-c", HOLDER, str(folder.path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with fails_with("run.locked"), folder.locked():
            pytest.fail("the lock was given twice")
        first.kill()
        first.wait()
    with folder.locked(), pytest.raises(RunError), RunFolder(folder.path).locked():
        pytest.fail("the lock was given twice")


def test_one_that_only_looks_keeps_nobody_off(new_run: NewRun) -> None:
    folder = new_run()
    with open(folder.path / ".lock", "a") as looking:
        fcntl.flock(looking, fcntl.LOCK_EX)
        threading.Timer(0.1, lambda: fcntl.flock(looking, fcntl.LOCK_UN)).start()
        with folder.locked():
            pass


def test_a_folder_that_is_gone_is_said(new_run: NewRun) -> None:
    folder = new_run()
    shutil.rmtree(folder.path)
    with fails_with("run.not_writable", "run-1"), folder.locked():
        pass


def test_the_lock_is_let_go_after_an_error(new_run: NewRun) -> None:
    folder = new_run()
    with pytest.raises(ValueError, match="oh"), folder.locked():
        raise ValueError("oh")
    with folder.locked():
        pass


def test_the_description_of_a_run_has_no_unknown_fields() -> None:
    with pytest.raises(ValueError, match="Extra inputs"):
        RunFile.model_validate({"run": "x", "created": "x", "engine": "x", "participants": [], "token": "secret"})


def test_last_admitted_round_is_the_newest_that_was_applied() -> None:
    rounds = [(["a", "b"], True), (["a", "c"], True), (["a", "b"], False), (["d"], True)]
    history = tuple(
        RoundEntry(round=number, stage="head", participants=names, applied=applied)
        for number, (names, applied) in enumerate(rounds, 1)
    )
    assert Progress(4, history=history).last_admitted(["a", "b", "c", "e"]) == {"a": 2, "b": 1, "c": 2}
