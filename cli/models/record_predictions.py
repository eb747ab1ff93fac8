"""Predict records with models, for `cotune predict`, `evaluate`, `fuse` and `distill`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from cotune.cli.options import RecordOptions
from cotune.cli.plans.plan_options import own_options
from cotune.data.config import DataConfig, has_classes
from cotune.data.record_reading import read_records
from cotune.data.types import Input, Question
from cotune.data.unlabeled import Row, read_questions, read_typed, read_typed_questions, read_unlabeled
from cotune.ensembles.config import DistillationConfig
from cotune.ensembles.fit import ask_models, fit_and_write, measure_fusion, write_unfitted
from cotune.ensembles.predictor import open_model, require_classifiers
from cotune.ensembles.resumable_distillation import Distillation, LabeledInputs, distill
from cotune.errors import DataError, ModelError
from cotune.models.config import Method, ModelConfig
from cotune.models.evaluation.answers import evaluate_answers
from cotune.models.evaluation.predictor import Classifier, Predictor, class_numbers, evaluate_classifier, open_predictor
from cotune.models.evaluation.quality import NOT_PREDICTED, Threshold, parse_threshold, predict_classes
from cotune.reporting.model_card import CARD
from cotune.reporting.student_card import student_card


def predict_rows(
    model: str,
    inputs: Path | Sequence[str],
    *,
    column: str | None,
    encoding: str,
    question: str | None = None,
    threshold: str | None,
    max_length: int | None,
    device: str,
) -> list[dict[str, Any]]:
    """Return one plain table for each input, in order, with the answer of a model.

    Args:
        model: A folder of a model or a run, or a hub id.
        inputs: A file or folder, or the texts or images' files themselves.
        column: That holds the inputs in a file; None: as the task names it.
        question: Of a model that answers questions: the one about each text, or the column of a file that holds them.
        encoding: Of a file of text.
        threshold: As `CLASS=P`; None: the best class is predicted.
        max_length: Tokens that are read of a text; None: as in training.
        device: What computes.
    """
    predictor, limit = _open(model, threshold, max_length, device)
    if predictor.task == "question-answering":
        return _answers_to(predictor, inputs, column, question, encoding)
    if question is not None:
        raise ModelError(f"{model} answers no questions: leave --question out", code="model.no_question_answering")
    with own_options():
        if isinstance(inputs, Path):
            rows = read_unlabeled(inputs, predictor.task, column=column, encoding=encoding)
        else:
            rows = read_typed(list(inputs), predictor.task)
    return list(_predictions(predictor, rows, limit))


def _answers_to(
    predictor: Classifier, inputs: Path | Sequence[str], column: str | None, question: str | None, encoding: str
) -> list[dict[str, Any]]:
    """One plain table for each question, in order, with the part of its text that answers it."""
    assert isinstance(predictor, Predictor), "fused models predict classes"
    task = predictor.task
    with own_options():
        if isinstance(inputs, Path):
            rows = read_questions(inputs, task, context=column, question=question, encoding=encoding)
        elif question is None:
            raise DataError("the model answers questions about texts: expected --question TEXT", code="data.no_question")
        else:
            rows = read_typed_questions(list(inputs), question, task)
    texts = iter(predictor.answer_texts([row.given for row in rows if isinstance(row.given, Question)]))
    found = [None if row.given is None else next(texts) for row in rows]
    return [
        {"row": number, "input": row.shown, "text": text, "reason": row.reason or ("" if text is not None else "cannot be read")}
        for number, (row, text) in enumerate(zip(rows, found, strict=True), 1)
    ]


def evaluate_records(
    model: str, data: DataConfig, *, threshold: str | None, max_length: int | None, device: str
) -> dict[str, Any]:
    """Return how good a model is on labeled records.

    Args:
        model: A folder of a model or a run, or a hub id.
        data: The records and how they are read.
        threshold: As `CLASS=P`; None: the best class is predicted.
        max_length: Tokens that are read of a text; None: as in training.
        device: What computes.
    """
    predictor, limit = _open(model, threshold, max_length, device)
    with own_options():
        records = read_records(data, None, predictor.task)
    if isinstance(predictor, Predictor) and not has_classes(predictor.task):
        return evaluate_answers(predictor, records)
    return dict(evaluate_classifier(predictor, records, limit))


def fuse_models(
    models: Sequence[str],
    data: DataConfig | None,
    method: Method,
    *,
    out: Path | None,
    seed: int,
    max_length: int | None,
    device: str,
) -> dict[str, Any]:
    """Return how good each model and their fusion are, and write the fused model.

    Args:
        models: Folders of models or runs, or hub ids.
        data: Labeled records and how they are read; None: nothing is fitted or measured.
        method: How predictions become one.
        out: A new folder for the fused model; None: it is only measured.
        seed: Of the folds on which the fusion is measured.
        max_length: Tokens that are read of a text; None: as in training.
        device: What computes.
    """
    opened = [open_predictor(model, device, max_length) for model in models]
    require_classifiers(opened, models)
    if data is None:
        assert out is not None, "without records there is nothing but the fused model"
        write_unfitted(method, opened, out)
        return {"method": method, "out": str(out)}
    with own_options():
        records = read_records(data, None, opened[0].task)
    judgment = ask_models(opened, records)
    found = measure_fusion(method, judgment, models, seed)
    if out is not None:
        fusion = fit_and_write(method, judgment, opened, out)
        found |= {"out": str(out), "temperatures": list(fusion.temperatures), "weights": list(fusion.weights)}
    return found


def distill_models(
    teachers: Sequence[str],
    student: ModelConfig,
    config: DistillationConfig,
    data: Path,
    columns: RecordOptions,
    *,
    out: Path,
    device: str,
    license: str,
    source: str,
    test: Path | None,
) -> dict[str, Any]:
    """Train a student on what teachers predict, write it with its card, and return its settings and figures.

    Args:
        teachers: Folders of models, fused models or runs, or hub ids.
        student: The base model that learns.
        config: How it is trained.
        data: Public inputs, with labels where `columns` names their column.
        columns: How the inputs are read.
        out: A new folder for the student.
        device: What computes.
        license: Of the inputs.
        source: Where they come from.
        test: Labeled records to measure on; None: none.
    """
    opened = [open_model(teacher, device) for teacher in teachers]
    require_classifiers(opened, teachers)
    first = opened[0]
    with own_options():
        if columns.label is None:
            column = columns.text if columns.text is not None else columns.image
            rows = read_unlabeled(data, first.task, column=column, encoding=columns.encoding)
            inputs: Sequence[Input] = [row.given for row in rows if row.given is not None]
            truth = None
        else:
            records = read_records(columns.config(str(data)), None, first.task)
            inputs = records.inputs
            truth = class_numbers(records.labels, first.labels, records.source)
        tested = None if test is None else _read_test(test, columns, first)
    work = Distillation(opened, teachers, student, config, inputs, truth, out, device, license, source, tested)
    return distill(work, lambda done: {CARD: student_card(done)})


def _read_test(test: Path, columns: RecordOptions, model: Classifier) -> LabeledInputs:
    records = read_records(columns.config(str(test)), None, model.task)
    if not records.inputs:
        raise DataError(f"{test} holds no record that can be used: expected labeled records", code="data.no_records")
    return LabeledInputs(test.name, records.inputs, class_numbers(records.labels, model.labels, records.source))


def _open(model: str, threshold: str | None, max_length: int | None, device: str) -> tuple[Classifier, Threshold | None]:
    """The model, and the threshold of one of its classes."""
    predictor = open_model(model, device, max_length)
    if threshold is None:
        return predictor, None
    require_classifiers([predictor], [model])
    return predictor, parse_threshold(threshold, predictor.labels)


def _predictions(predictor: Classifier, rows: Sequence[Row], threshold: Threshold | None) -> Iterator[dict[str, Any]]:
    """One plain table for each row, in order."""
    if isinstance(predictor, Predictor) and not has_classes(predictor.task):
        yield from _other_answers(predictor, rows)
        return
    probabilities = iter(predictor.probabilities([row.given for row in rows if row.given is not None]))
    for number, row in enumerate(rows, 1):
        about = {"row": number, "input": row.shown}
        if row.given is None:
            yield {**about, "label": None, "score": None, "scores": None, "reason": row.reason}
        else:
            yield {**about, **_answer(predictor, next(probabilities), threshold), "reason": ""}


def _other_answers(predictor: Predictor, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Of regression a number; of several labels those that are predicted, and the probability of each."""
    answers = iter(predictor.answers([row.given for row in rows if row.given is not None]))
    for number, row in enumerate(rows, 1):
        answer = None if row.given is None else next(answers)
        reason = row.reason or ("cannot be read" if answer is None else "")
        yield {"row": number, "input": row.shown, **_predicted(predictor, answer), "reason": reason}


def _predicted(predictor: Predictor, answer: tuple[Any, ...] | None) -> dict[str, Any]:
    if predictor.task == "regression":
        return {"value": None if answer is None else answer[0]}
    scores = None if answer is None else dict(zip(predictor.labels, answer, strict=True))
    labels = None if scores is None else [label for label, score in scores.items() if score > 0.5]
    return {"labels": labels, "scores": scores}


def _answer(predictor: Classifier, probabilities: Tensor, threshold: Threshold | None) -> dict[str, Any]:
    """One class; of words a list of tags, None for one that was not read."""
    numbers = predict_classes(probabilities.numpy(), predictor.labels, threshold).tolist()
    labels = [None if number == NOT_PREDICTED else predictor.labels[number] for number in numbers]
    rows = [dict(zip(predictor.labels, row, strict=True)) for row in probabilities.tolist()]
    scores = [None if label is None else row[label] for label, row in zip(labels, rows, strict=True)]
    every = [None if label is None else row for label, row in zip(labels, rows, strict=True)]
    if predictor.task == "token-classification":
        return {"label": labels, "score": scores, "scores": every}
    return {"label": labels[0], "score": scores[0], "scores": every[0]}
