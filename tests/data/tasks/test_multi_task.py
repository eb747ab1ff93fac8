"""Records with a column of labels for each task."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cotune.data.config import DataConfig
from cotune.data.record_reading import read_records
from cotune.data.records import Records
from cotune.data.tasks.classes import IGNORED
from cotune.data.tasks.tagged_multi_task import TaggedMultiTask
from cotune.data.tasks.token import NOT_PREDICTED
from tests.support.failures import fails_with
from tests.support.multi_task import write_tasks

MOOD = ("mood", "mood")
LENGTH = ("length", "length")


@pytest.mark.parametrize("held", [(MOOD,), (LENGTH,), (MOOD, LENGTH)])
def test_labels_of_the_tasks_that_are_held_are_read(tmp_path: Path, held: tuple[tuple[str, str], ...]) -> None:
    """An organization may hold one of a plan's tasks alone."""
    source = write_tasks(tmp_path / "records.csv", 60)
    records = read_records(DataConfig(source=str(source), tasks=held), source, task="multi-task")
    names = {name for label in records.labels for name in label}
    assert {name.partition("/")[0] for name in names} == {task for task, _ in held}
    assert len(records.inputs) > 20


def test_repeated_header_is_no_record_with_one_task_either(tmp_path: Path) -> None:
    source = write_tasks(tmp_path / "records.csv", 60)
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    source.write_text("".join([*lines, lines[0], "a new text,good,long,person 1\n"]), encoding="utf-8")
    config = DataConfig(source=str(source), tasks=(MOOD,))
    records = read_records(config, source, task="multi-task")
    assert {name for label in records.labels for name in label} == {"mood/bad", "mood/good", "mood/so"}


WORDS = ("words", "words")


def read_tagged(tmp_path: Path, *rows: str, tasks: tuple[tuple[str, str], ...] = (MOOD, WORDS), lenient: bool = False) -> Records:
    source = tmp_path / "tagged.csv"
    source.write_text("\n".join(["text,mood,words", *rows, ""]), encoding="utf-8")
    config = DataConfig(source=str(source), tasks=tasks, tags=("words",))
    return read_records(config, source, task="multi-task-tags", lenient=lenient)


def test_a_record_has_a_tag_for_each_word_or_none(tmp_path: Path) -> None:
    records = read_tagged(tmp_path, "a good day,good,O O B", "a bad day,,O O B", "a so day,so,", "nothing said,,")
    assert records.inputs == (("a", "good", "day"), ("a", "bad", "day"), ("a", "so", "day"))
    assert records.labels == (("mood/good", "words/O", "words/O", "words/B"), ("words/O", "words/O", "words/B"), ("mood/so",))
    assert records.skipped == {"missing label": 1}


def test_a_tag_too_few_is_refused_and_leniently_left_out(tmp_path: Path) -> None:
    rows = ("a good day,good,O O", "a bad day,bad,O O B")
    with fails_with("data.tags_do_not_match", "record 1"):
        read_tagged(tmp_path, *rows)
    assert len(read_tagged(tmp_path, *rows, lenient=True)) == 1


def test_tags_that_a_plan_does_not_list_count_for_nothing(tmp_path: Path) -> None:
    """Which of the others is whose word is then not known; the record's other labels count."""
    does = TaggedMultiTask(("mood/bad", "mood/good", "words/B", "words/O"), ("words",))
    example = {"input_ids": [1, 2, 3, 4], "starts": [1, 2, None]}
    assert does._by_position(example, (1, 3, 2, 3)) == [(1, IGNORED), (IGNORED, 3), (IGNORED, 2), (IGNORED, IGNORED)]
    assert does._by_position(example, (1, 3, IGNORED, 3)) == [(1, IGNORED), *[(IGNORED, IGNORED)] * 3]
    scores = torch.zeros(1, 4, 4)
    scores[0, 0, 1] = scores[0, 1, 2] = scores[0, 2, 3] = 1.0
    asked = [{**example, "asked": tuple(map(does._task_number, numbers))} for numbers in ((1, 3, 2, 3), (1, 3, IGNORED, 3))]
    assert does.answers(scores.expand(2, -1, -1), asked) == [(1, 2, 3, NOT_PREDICTED), (1, *[NOT_PREDICTED] * 3)]
    said = does.answer_scores(scores, asked[:1])[0]
    assert said[:3].isnan().tolist() == [[False, False, True, True], *[[True, True, False, False]] * 2]
    assert bool(said[3].isnan().all())
