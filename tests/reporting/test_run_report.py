"""The report says what the summary says: every number, no more, and nothing a hostile name could add."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jinja2 import UndefinedError

from cotune.reporting import charts
from cotune.reporting.run_report import render_report, write_report
from cotune.reporting.verdict import conclude_verdict
from tests.support.html import LOADS, Page

Summary = dict[str, Any]


def scores(accuracy: float, precision: float, recall: float, f1: float) -> dict[str, float]:
    return {"accuracy": accuracy, "precision": precision, "recall": recall, "f1": f1}


def measured(accuracy: float) -> Summary:
    return scores(accuracy, 0.6, 0.6, 0.61) | {
        "accuracy_interval": [accuracy - 0.02, accuracy + 0.03], "f1_interval": [0.59, 0.64],
    }  # fmt: skip


def choices(alone: float, adapted: float, records: int) -> Summary:
    return {
        "records": records, "accuracy": 0.72, "majority": measured(0.5), "alone": measured(alone),
        "alone_without_privacy": measured(alone + 0.01), "federated": measured(0.72), "adapted": measured(adapted),
    }  # fmt: skip


def organization(
    name: str, alone: float, spent: float, labels: dict[str, int], adapted: float = 0.75, answer: str = "yes"
) -> Summary:
    own = choices(alone, adapted, 1500)
    difference = adapted - alone - 0.01
    return {
        "name": name, "examples": sum(labels.values()), "labels": labels,
        "alone": scores(alone, 0.6, 0.6, 0.6), "gain": difference, "own": own, "common": choices(alone - 0.1, adapted - 0.1, 5586),
        "worth": {
            "answer": answer, "useful": True, "joined": "adapted", "against": "alone_without_privacy", "difference": difference,
            "interval": [difference - 0.02, difference + 0.02], "p": 0.0123, "test": "McNemar exact", "few": False,
        },
        "adaptation": {"method": "head", "described": "head, penalty 1 / n", "tried": {"federated": 0.7, "head": 0.74}},
        "epsilon_spent": spent, "epsilon_all_models": spent, "epsilon_allowed": 8.0, "delta": 4.4e-05, "noise_multiplier": 0.937, "sample_rate": 0.0512,
        "steps": 1234, "rounds": 2,
    }  # fmt: skip


def worth(yes: int = 0, no: int = 0, close: int = 0) -> Summary:
    means = {name: scores(value, 0.5, 0.5, 0.5) for name, value in (("majority", 0.5), ("alone", 0.672), ("federated", 0.72))}
    answer = "it depends" if yes and no else "yes" if yes else "no" if no else "too close to tell"
    return {
        "answer": answer, "answers": {"yes": yes, "no": no, "too close to tell": close},
        "own_means": means | {"alone_without_privacy": scores(0.682, 0.5, 0.5, 0.5), "adapted": scores(0.751, 0.5, 0.5, 0.5)},
    }  # fmt: skip


def one_round(number: int, stage: str, accuracy: float | None, spent: float) -> Summary:
    metrics = None if accuracy is None else scores(accuracy, 0.5, 0.5, 0.5)
    return {
        "round": number, "stage": stage, "metrics": metrics, "epsilon": {"org-1": spent, "org-2": spent},
        "participants": ["org-1", "org-2"], "dropped": [], "bytes_up": 4620, "bytes_down": 4712, "seconds": 1.2,
    }  # fmt: skip


@pytest.fixture
def summary() -> Summary:
    """A finished, staged, private run of two organizations with both baselines."""
    organizations = [
        organization("org-1", 0.70, 7.98, {"negative": 5000, "neutral": 1000, "positive": 4000}),
        organization("org-2", 0.644, 6.5, {"negative": 100, "neutral": 200, "positive": 100}),
    ]
    return {
        "schema": 1, "run": "20261122-101500-tweets", "plan": "tweets", "plan_id": "ab" * 32,
        "created": "2026-11-22T11:15:00+01:00", "engine": "in-process", "status": "finished", "stopped": None, "client_privacy": None,
        "partition": "dirichlet:0.5", "worth": worth(yes=2),
        "privacy": {
            "mode": "record", "epsilon": 8.0, "delta": "1/n^1.1", "clip_norm": 1.0, "claim_table": [["Unit of privacy", "<record>"]], "statement": ["First part.", "Second part."],
        },
        "model": {"base": "some/model", "base_hash": "cd" * 32, "parameters": 22700000, "shared_parameters": 1155},
        "labels": ["negative", "neutral", "positive"],
        "test": {
            "examples": 5586,
            "majority": scores(0.448, 0.149, 0.333, 0.206),
            "alone": {"mean": scores(0.672, 0.651, 0.639, 0.642), "each": {o["name"]: o["alone"] for o in organizations}},
            "alone_without_privacy": {"mean": scores(0.69, 0.68, 0.67, 0.66), "each": {}},
            "federated": scores(0.734, 0.713, 0.701, 0.704),
            "adapted": {"mean": scores(0.7, 0.69, 0.68, 0.67), "each": {}},
            "pooled": scores(0.745, 0.724, 0.712, 0.715),
        },
        "organizations": organizations,
        "rounds": [one_round(1, "head", 0.55, 3.1), one_round(2, "head", None, 4.0), one_round(3, "lora", 0.734, 6.5)],
        "bytes": {"up": 27720, "down": 28272000}, "seconds": 100.0, "peak_memory_bytes": 2_000_000_000,
        "versions": {"cotune": "0.1.0", "torch": "2.11.0"}, "reproduce": ["cotune simulate plan.toml --set a=1"],
    }  # fmt: skip


@pytest.fixture
def without_privacy(summary: Summary) -> Summary:
    summary["privacy"] |= {"mode": "none", "epsilon": None, "delta": None, "clip_norm": None}
    for each in summary["organizations"]:
        each |= dict.fromkeys(["epsilon_spent", "epsilon_allowed", "delta", "noise_multiplier"])
    for each in summary["rounds"]:
        each["epsilon"] = {}
    return summary


def read(summary: Summary) -> Page:
    return Page(render_report(summary))


def test_it_loads_nothing_and_runs_nothing(summary: Summary) -> None:
    html = render_report(summary)
    page = Page(html)
    assert not {tag for tag, _ in page.elements} & {"script", "iframe", "img", "object", "embed", "base", "form"}
    fetched = [value for _, attrs in page.elements for name, value in attrs.items() if name in LOADS]
    assert fetched == ["data:,"]  # the empty icon, which keeps browsers from asking for one
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    assert not re.search(r"@import|url\(|https?:", html)
    assert "default-src 'none'" in html


def test_the_same_summary_makes_the_same_page(summary: Summary) -> None:
    assert render_report(summary) == render_report(summary)


def test_it_names_the_run(summary: Summary) -> None:
    page = read(summary)
    for words in ("tweets", "20261122-101500-tweets", "2026-11-22 10:15 UTC", "2 organizations"):
        assert words in page.text


def test_the_verdict_is_about_own_records(summary: Summary) -> None:
    text = read(summary).text
    assert "Yes: each on its own held-out records, joining is better than training alone for 2 of 2 organizations" in text
    assert "from +4.0 to +9.6 points of accuracy." in text  # 75.0 against 71.0, and against 65.4
    for said in ("alone with the same privacy 67.2 %", "alone without privacy 68.2 %", "federated and adapted 75.1 %"):
        assert said in text
    assert "±1.2 points" in text  # 1.96 √(0.734 × 0.266 / 5586) = 0.0116
    assert "the most that any organization spent is 7.98" in text
    assert "--vary partition=" in text


@pytest.mark.parametrize(
    ("yes", "no", "close", "answer"),
    [(2, 0, 0, "Yes"), (1, 0, 1, "Yes"), (0, 1, 1, "No"), (1, 1, 0, "It depends"), (0, 0, 2, "Too close to tell")],
)
def test_some_who_lose_are_not_outvoted(summary: Summary, yes: int, no: int, close: int, answer: str) -> None:
    summary["worth"] = worth(yes, no, close)
    found = conclude_verdict(summary)
    assert found.answer == answer
    assert f"for {yes} of 2 organizations, worse for {no} and too close to tell for {close}" in found.sentence


def test_gain_on_mixed_records_hides_no_loss_on_own_ones(summary: Summary) -> None:
    """What the report said before: the federated model is far above alone on everybody's records."""
    summary["worth"] = worth(no=2)
    for each in summary["organizations"]:
        each["worth"] |= {"answer": "no", "difference": -0.05}
    assert summary["test"]["federated"]["accuracy"] > summary["test"]["alone"]["mean"]["accuracy"] + 0.05
    assert conclude_verdict(summary).answer == "No"


def test_few_records_and_a_natural_partition_are_said(summary: Summary) -> None:
    summary["organizations"][1]["worth"]["few"] = True
    summary["partition"] = "column:hospital"
    text = read(summary).text
    assert "fewer than 200 test records" in text
    assert "--vary partition=" not in text


def test_the_table_holds_every_number(summary: Summary) -> None:
    page = read(summary)
    assert page.row("Majority class") == ["44.8 %", "14.9 %", "33.3 %", "20.6 %"]
    assert page.row("Each organization alone (mean, same privacy)") == ["67.2 %", "65.1 %", "63.9 %", "64.2 %"]
    assert page.row("Each organization alone (mean, without privacy)") == ["69.0 %", "68.0 %", "67.0 %", "66.0 %"]
    assert page.row("Federated, adapted by each (mean)") == ["70.0 %", "69.0 %", "68.0 %", "67.0 %"]
    assert page.row("Federated (this run)") == ["73.4 %", "71.3 %", "70.1 %", "70.4 %"]
    assert page.row("All data pooled, without privacy (the bound)") == ["74.5 %", "72.4 %", "71.2 %", "71.5 %"]
    assert "Not measured" not in page.text


def unmeasured(summary: Summary) -> None:
    """Without baselines."""
    summary["test"] |= {"alone": None, "pooled": None, "alone_without_privacy": None, "adapted": None}
    summary["worth"] = None
    for each in summary["organizations"]:
        each |= {"alone": None, "gain": None, "worth": None, "adaptation": None}
        for key in ("own", "common"):
            each[key] |= {"alone": None, "alone_without_privacy": None, "adapted": None}


def test_missing_baselines_are_left_out_with_a_note(summary: Summary) -> None:
    unmeasured(summary)
    page = read(summary)
    assert (
        "Measured: the federated model reaches 73.4 % accuracy, 28.6 points above always giving the most frequent label; "
        "what the organizations reach alone was not measured." in page.text
    )
    assert "Not measured in this run: Each organization alone" in page.text
    assert "Not measured in this run: All data pooled" in page.text
    assert not [row for row in page.rows if row[0].startswith(("Each organization", "All data"))]
    assert page.row("org-1")[:2] == ["–", "–"]
    assert len(page.row("org-1")) == 5  # the answer and the difference, majority, federated, and the number of records


def test_each_organization_has_its_row(summary: Summary) -> None:
    page = read(summary)
    own, common, contributed, _ = (row[1:] for row in page.rows if row[0] == "org-1")
    assert own[:2] == ["yes", "+4.0 +2.0 to +6.0 p = 0.012"]
    assert own[3] == "70.0 % 68.0 % to 73.0 % F1 61.0 % (59.0 % to 64.0 %)"
    assert (own[6][:6], own[7]) == ("75.0 %", "1,500")
    assert (common[1][:6], common[4][:6], common[5]) == ("60.0 %", "65.0 %", "5,586")
    assert contributed == ["10,000", contributed[1], "7.98 of 8.00", "2 of 3"]
    assert contributed[1].endswith("50 · 10 · 40 %")
    bars = [attrs["aria-label"] for tag, attrs in page.elements if tag == "svg" and attrs.get("class") == "bar"]
    assert [bar and bar.replace("\u00a0", " ") for bar in bars] == [
        "negative: 5,000 (50.0 %), neutral: 1,000 (10.0 %), positive: 4,000 (40.0 %)",
        "negative: 100 (25.0 %), neutral: 200 (50.0 %), positive: 100 (25.0 %)",
    ]


def test_a_loss_and_an_overspent_budget_are_not_hidden(summary: Summary) -> None:
    summary["organizations"][0] |= {"epsilon_spent": 8.001}
    summary["organizations"][0]["worth"] |= {"answer": "no", "difference": -0.011}
    summary["worth"] = worth(yes=1, no=1)
    page = read(summary)
    assert page.row("org-1")[0] == "no"
    assert page.row("org-1")[1].startswith("−1.1")
    (spent,) = (row[3] for row in page.rows if row[0] == "org-1" and row[1] == "10,000")
    assert spent == "8.01 of 8.00 – over"  # rounded up: spending never looks smaller than it was
    assert "from −1.1 to +9.6 points" in page.text


def test_organization_without_labels_has_an_empty_bar(summary: Summary) -> None:
    summary["organizations"][1] |= {"examples": 0, "labels": {}}
    assert ["org-2", "0", ""] in [row[:3] for row in read(summary).rows]


def test_many_labels_and_organizations_share_the_colors(summary: Summary) -> None:
    labels = {f"intent-{i}": 10 + i for i in range(20)}
    summary |= {
        "labels": list(labels),
        "organizations": [organization(f"org-{i}", 0.7, 5 + i / 10, labels) for i in range(1, 11)],
    }
    page = read(summary)
    assert "15 others" in page.text
    assert "intent-19" in page.text
    assert "each of 10 organizations at most 6.00" in page.text


def test_a_dropped_update_is_shown_with_its_reason(summary: Summary) -> None:
    assert "None: every update that was sent was used." in read(summary).text
    summary["rounds"][1]["dropped"] = [{"organization": "org-2", "reason": "norm 41.2, expected at most 10"}]
    assert "Round 2, org-2 : norm 41.2, expected at most 10" in read(summary).text
    summary["rounds"][0]["dropped"] = [{"organization": "org-2", "reason": "norm 41.2, expected at most 10"}]
    assert "Rounds 1, 2, org-2 : norm 41.2, expected at most 10" in read(summary).text


def test_privacy_is_stated_and_quantified(summary: Summary) -> None:
    page = read(summary)
    assert "First part. Second part." in page.text
    assert ["org-1", "7.98", "7.98", "4.4 × 10⁻⁵", "0.937", "0.0512", "1,234"] in page.rows
    assert "No differential privacy" not in page.text


def test_a_run_without_privacy_says_so_loudly(without_privacy: Summary) -> None:
    page = read(without_privacy)
    assert page.count("p", **{"class": "banner"}) == 1
    assert "No differential privacy: " in page.text
    assert "same privacy" not in page.text
    assert page.count("svg", role="img", **{"class": "drawing"}) == 1  # no chart of ε
    assert "ε" not in page.text


def test_an_unfinished_run_says_so(summary: Summary) -> None:
    summary["status"] = "stopped"
    assert "This run did not finish (status: stopped)." in read(summary).text


def test_charts_show_the_rounds_the_baselines_and_the_stages(summary: Summary) -> None:
    chart = charts.accuracy_chart(summary)
    assert chart is not None
    assert [(key.name, key.value.replace("\u00a0", " ")) for key in chart.legend] == [
        ("federated", "73.4 %"), ("all data pooled, no privacy", "74.5 %"), ("alone, mean", "67.2 %"),
        ("alone without privacy, mean", "69.0 %"), ("majority class", "44.8 %"),
    ]  # fmt: skip
    assert [(band.stage, band.first, band.last, band.x) for band in chart.bands] == [("head", 1, 2, 0.0), ("lora", 3, 3, 66.667)]
    assert chart.y_ticks == ((100.0, "40"), (75.0, "50"), (50.0, "60"), (25.0, "70"), (0.0, "80"))
    assert [(p.x, p.y) for p in chart.lines[-1].points] == [
        (16.667, 62.5),
        (83.333, 16.5),
    ]  # 55 and 73.4 on 40..80; round 2 untested


def test_the_epsilon_chart_reaches_from_zero_to_what_is_allowed(summary: Summary) -> None:
    chart = charts.epsilon_chart(summary)
    assert chart is not None
    assert (chart.y_ticks[0], chart.y_ticks[-1]) == ((100.0, "0"), (0.0, "8"))
    assert [(key.name, key.value) for key in chart.legend] == [("org-1", "7.98"), ("org-2", "6.50"), ("allowed", "8.00")]
    assert [p.y for p in chart.lines[1].points] == [61.25, 50.0, 18.75]  # 3.1, 4.0 and 6.5 of 8, from the top


@pytest.mark.parametrize("rounds", [0, 1, 2, 7, 60, 1000])
def test_every_place_in_a_chart_is_inside_it(summary: Summary, rounds: int) -> None:
    summary["rounds"] = [one_round(r, "head", r / (rounds + 1), 8 * r / rounds) for r in range(1, rounds + 1)]
    both = [chart for chart in (charts.accuracy_chart(summary), charts.epsilon_chart(summary)) if chart is not None]
    assert len(both) == (2 if rounds else 0)
    for chart in both:
        places = [place for line in chart.lines for point in line.points for place in (point.x, point.y)]
        places += [place for place, _ in (*chart.x_ticks, *chart.y_ticks)]
        assert all(0 <= place <= 100 for place in places)
        assert 1 <= len(chart.x_ticks) <= 9
    read(summary)


def test_hostile_names_stay_text(summary: Summary) -> None:
    hostile = "<script>alert(1)</script>\"' onload=alert(1) {{ 7 * 7 }}"
    summary["organizations"][0]["name"] = hostile
    summary["labels"][0] = hostile
    summary["organizations"][0]["labels"][hostile] = summary["organizations"][0]["labels"].pop("negative")
    summary["rounds"][0] |= {"epsilon": {hostile: 1.0}, "dropped": [{"organization": hostile, "reason": hostile}]}
    summary |= {"plan": hostile, "run": hostile, "engine": hostile, "reproduce": [hostile], "versions": {hostile: hostile}}
    html = render_report(summary)
    assert "<script" not in html
    assert Page(html).count("script") == 0
    assert not [name for _, attrs in Page(html).elements for name in attrs if name.startswith("on")]
    assert hostile in Page(html).text


def test_every_drawing_has_words(summary: Summary) -> None:
    page = read(summary)
    drawings = [attrs for tag, attrs in page.elements if tag == "svg" and attrs.get("role") == "img"]
    assert all("aria-labelledby" in attrs or attrs.get("aria-label") for attrs in drawings)
    ids = {attrs["id"] for _, attrs in page.elements if "id" in attrs}
    assert {word for attrs in drawings for word in (attrs.get("aria-labelledby") or "").split()} <= ids
    assert page.count("desc") == 2


def test_how_it_ran_and_how_to_run_it_again(summary: Summary) -> None:
    text = read(summary).text
    for words in (
        "in-process",
        "27.7 kB",
        "28.3 MB",
        "1 min 40 s",
        "2.0 GB",
        "22,700,000",
        "1,155",
        "some/model",
        "cd" * 32,
        "ab" * 32,
    ):
        assert words in text
    assert "cotune simulate plan.toml --set a=1" in text


@pytest.mark.parametrize(
    "remove", [lambda s: s.pop("engine"), lambda s: s["privacy"].pop("statement"), lambda s: s["test"].pop("pooled")]
)
def test_an_incomplete_summary_is_refused(summary: Summary, remove: Callable[[Summary], object]) -> None:
    remove(summary)
    with pytest.raises((KeyError, UndefinedError)):
        render_report(summary)


def test_writing_replaces_the_page_and_leaves_nothing_else(summary: Summary, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old", encoding="utf-8")
    summary["plan"] = "tweets ε \ud800"  # half a surrogate pair: valid JSON, not valid UTF-8
    write_report(summary, path)
    assert path.read_text(encoding="utf-8") == render_report(summary).replace("\ud800", "?")
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_keeps_the_old_page(summary: Summary, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.mkdir()  # cannot be replaced by a file
    with pytest.raises(OSError, match=r"report\.html"):
        write_report(summary, path)
    assert list(tmp_path.iterdir()) == [path]


# --- client-level privacy


def test_client_level_privacy_is_stated_beside_the_other(summary: Summary) -> None:
    summary["client_privacy"] = {"statement": ["Of the whole <organization>."]}
    page = render_report(summary)
    assert "Of an organization as a whole" in page
    assert "Of the whole &lt;organization&gt;." in page
    assert "First part." in page


def test_client_level_privacy_alone_is_not_called_none(without_privacy: Summary) -> None:
    assert "No differential privacy: nothing bounds" in render_report(without_privacy)
    without_privacy["client_privacy"] = {"statement": ["Of the whole."]}
    page = render_report(without_privacy)
    assert "No record-level differential privacy: the server saw updates without noise." in page
    assert "nothing bounds" not in page


def test_a_stopped_run_says_why(summary: Summary) -> None:
    summary |= {"status": "stopped", "stopped": "round 4 would exceed the client-level ε = 3"}
    page = render_report(summary)
    assert "This run ended before its last round." in page
    assert "Round 4 would exceed the client-level ε = 3." in page


def test_models_that_only_their_organizations_see_are_not_judged(summary: Summary) -> None:
    summary["test"] |= dict.fromkeys(["majority", "alone", "alone_without_privacy", "federated", "adapted", "pooled"])
    verdict = conclude_verdict(summary)
    assert verdict.answer == "Not measured"
    assert verdict.sentence == "every organization has a model of its own, and how good it is only the organization can see."


def test_a_real_run_of_many_classes_has_a_report(summary: Summary) -> None:
    summary |= {"engine": "superlink", "labels": [f"class {i}" for i in range(40)]}
    for each in summary["organizations"]:
        each |= {"labels": None, "examples": None, "bytes_up": 4620, "dropped": 0}
        each |= {"quarantined": 1, "excluded": True, "delivered": False}
        each |= dict.fromkeys(["alone", "gain", "own", "common", "worth", "adaptation"])
    summary["test"] |= dict.fromkeys(["alone", "alone_without_privacy", "adapted", "pooled"])
    summary |= {"worth": None, "partition": None}
    page = Page(render_report(summary))
    assert page.row("org-2") == ["2 of 3, then left out", "–", "6.50 of 8.00", "4.6 kB", "0", "1", "not confirmed"]
    assert "worth joining" not in page.text


@pytest.mark.parametrize(("rounds", "part"), [((2, 2), 2), ((2, 0), 1), ((0, 0), 0)])
def test_a_real_run_says_how_many_organizations_are_in_its_model(summary: Summary, rounds: tuple[int, int], part: int) -> None:
    """Anyone who was struck out or declined every round has no part in it: the page says so in its first lines."""
    summary |= {"engine": "superlink", "worth": None, "partition": None}
    for each, taken in zip(summary["organizations"], rounds, strict=True):
        each |= {"rounds": taken, "labels": None, "examples": None, "bytes_up": 0, "dropped": 2 - taken}
        each |= {"quarantined": 0, "excluded": False, "delivered": True}
        each |= dict.fromkeys(["alone", "gain", "own", "common", "worth", "adaptation"])
    summary["test"] |= dict.fromkeys(["alone", "alone_without_privacy", "adapted", "pooled"])
    assert conclude_verdict(summary).notes[0].startswith(f"{part} of 2 organizations")
    assert f"{part} of 2 organizations" in Page(render_report(summary)).text


def test_a_simulation_counts_nobody(summary: Summary) -> None:
    assert not any("2 organizations are in" in note for note in conclude_verdict(summary).notes)
