"""Reports as text: complete, within the width, and harmless whatever the names are."""

from __future__ import annotations

import os

import pytest

from bntools import tables
from bntools.report import (
    Action,
    Decision,
    Equivalence,
    Finding,
    Inspection,
    LayerHealth,
    OutputError,
    Plan,
    Range,
    Reason,
    Report,
    Severity,
)

LONG = "features.denseblock{}.denselayer{}.norm1"


def fold(path="bn1", host="conv1", kind="BatchNorm2d", detail=""):
    return Decision(path, kind, Action.FOLD, (host,), detail=detail)


def keep(path="bn2", reason=Reason.RETURNED, detail="the model returns conv2 as well", **others):
    return Decision(path, others.get("kind", "BatchNorm2d"), Action.KEEP, (), reason, detail)


def dense(count):
    detail = "it follows max_pool2d_with_indices in features.pool0"
    return [keep(LONG.format(1, i), Reason.NOT_AFTER_LINEAR, detail) for i in range(count)]


def health(path, **facts):
    usual = {
        "channels": 64,
        "eps": 1e-5,
        "momentum": 0.1,
        "batches_tracked": 100,
        "mean": Range(-0.123456, 1.5),
        "variance": Range(0.01, 2.0),
        "gamma": Range(1.0, 1.0),
        "decision": fold(path, f"{path}.conv"),
    }
    return LayerHealth(path, facts.pop("kind", "BatchNorm2d"), **{**usual, **facts})


def alike(count, code="never-updated", severity=Severity.WARNING):
    return [Finding(f"layer{i}.bn", severity, code, "its statistics are new") for i in range(count)]


@pytest.fixture(params=[40, 60, 80, 100, 200])
def width(request, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(request.param))
    return request.param


@pytest.fixture(autouse=True)
def _no_columns(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)


def squeezed(text):
    return "".join(text.split())


def test_every_layer_has_its_host_or_its_reason():
    text = tables.decisions([fold(), keep(), fold("bn3", "conv3", detail="through view")])
    assert text.splitlines() == [
        "norm layer  kind         outcome",
        "-" * 72,
        "bn1         BatchNorm2d  -> conv1",
        "bn2         BatchNorm2d  kept, returned: the model returns conv2 as well",
        "bn3         BatchNorm2d  -> conv3 (through view)",
    ]  # fmt: skip


def test_several_hosts_are_listed():
    decision = Decision("bn", "BatchNorm2d", Action.FOLD, ("a", "b"))
    assert "-> a, b" in tables.decisions([decision])


def test_a_norm_that_is_the_model_itself_has_a_name():
    assert "(the model)" in tables.decisions([keep("")])


def test_a_reason_without_a_sentence_stands_alone():
    assert tables.decisions([keep(detail="")]).endswith("kept, returned")


def test_no_layers_are_no_table():
    for empty in (tables.decisions, tables.layers, tables.findings, tables.outputs):
        assert empty([]) == ""


def test_nothing_is_lost_and_nothing_sticks_out(width):
    rows = [*dense(12), fold(LONG.format(2, 1), "features.conv0", "FrozenBatchNorm2d")]
    text = tables.decisions(rows)
    assert max(map(len, text.splitlines())) <= width
    for row in rows:
        assert row.path in text
        assert row.kind in text
        assert squeezed(row.detail) in squeezed(text)
        assert (row.reason or Reason.RETURNED).value in squeezed(text) or row.reason is None


def test_a_kind_that_all_share_is_told_once_where_room_is_short(monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    text = tables.decisions(dense(3))
    assert text.count("BatchNorm2d") == 1
    assert "all of them: BatchNorm2d" in text


def test_a_long_table_ends_with_the_reasons_counted():
    rows = [*dense(9), *[fold(f"bn{i}") for i in range(5)], keep("x"), keep("y")]
    text = tables.decisions(rows)
    assert text.splitlines()[-1] == "kept 11 of 16: 9 not-after-linear, 2 returned"
    assert "kept 2 of" not in tables.decisions([keep("x"), keep("y")])


def test_health_has_ranges_and_what_all_share_once():
    rows = [health("bn1"), health("bn2", channels=128, mean=Range(0.5, 0.5), frozen=True)]
    assert tables.layers(rows).splitlines() == [
        "norm layer  kind                  channels  mean        outcome",
        "-" * 67,
        "bn1         BatchNorm2d           64        -0.12..1.5  -> bn1.conv",
        "bn2         BatchNorm2d (frozen)  128       0.5         -> bn2.conv",
        "",
        "all of them: eps 1e-05, momentum 0.1, batches 100, variance 0.01..2, gamma 1",
    ]


def test_one_layer_shares_nothing():
    text = tables.layers([health("bn")])
    assert "all of them" not in text
    assert text.splitlines()[2].split()[:4] == ["bn", "BatchNorm2d", "1e-05", "0.1"]


def test_what_a_layer_does_not_have_is_a_dash():
    bare = LayerHealth("ln", "LayerNorm", eps=1e-5, input_dependent=True)
    text = tables.layers([health("bn"), bare, LayerHealth("lazy", "LazyBatchNorm2d")])
    assert "depends on the input: not counted" in text
    assert text.splitlines()[-1].split()[-2:] == ["not", "planned"]
    assert " - " in text


def test_health_is_complete_at_every_width(width):
    rows = [
        health(LONG.format(i, i), channels=i, mean=Range(-i, i), batches_tracked=i)
        for i in range(1, 13)
    ]
    text = tables.layers(rows)
    assert max(map(len, text.splitlines())) <= width
    for i, row in enumerate(rows, 1):
        assert row.path in text
        assert f"{row.path}.conv" in squeezed(text)
        assert f"{-i:.2g}..{i:.2g}" in text


def test_few_findings_are_told_one_by_one():
    rows = [
        Finding("bn1", Severity.ERROR, "nan-or-inf", "values are NaN"),
        *alike(5),
        Finding("", Severity.INFO, "mixed-eps", "the norm layers differ in eps"),
    ]
    assert tables.findings(rows).splitlines()[2:] == [
        "error    bn1          nan-or-inf: values are NaN",
        *(f"warning  layer{i}.bn    never-updated: its statistics are new" for i in range(5)),
        "info     (the model)  mixed-eps: the norm layers differ in eps",
    ]


def test_many_findings_of_one_kind_take_one_line():
    (line,) = tables.findings(alike(120)).splitlines()[2:3]
    assert line.startswith("warning  120 layers  never-updated: its statistics are new (layer0.bn,")
    assert tables.findings(alike(120)).endswith(", ...)")


def test_many_findings_that_differ_have_an_example():
    rows = [
        Finding(f"bn{i}", Severity.INFO, "biased-conv", f"conv{i} has a bias") for i in range(6)
    ]
    assert tables.findings(rows).splitlines()[2:] == [
        "info     bn0     biased-conv: conv0 has a bias",
        "info     5 more  biased-conv, of their own: bn1, bn2, bn3, bn4, bn5",
    ]


def test_findings_fit_and_keep_their_sentences(width):
    rows = [Finding(LONG.format(i, i), s, s.value, "what is wrong " * 8) for i, s in
            enumerate(Severity)]  # fmt: skip
    text = tables.findings(rows)
    assert max(map(len, text.splitlines())) <= width
    assert squeezed(text).count("whatiswrong") == 24
    assert all(row.path in text for row in rows)


def test_outputs_have_a_verdict():
    same = OutputError("output", 1e-7, 2e-7, 8e-7, 1e-6, passed=True)
    nan = OutputError("output[1]", float("inf"), 0.0, 0.0, float("inf"), passed=False, note="NaN")
    text = tables.outputs([same, nan])
    assert text.splitlines()[2].endswith("same")
    assert text.splitlines()[3].endswith("DIFFERS NaN")
    assert "inf" in text


def test_parts_are_set_off_where_they_are_tables():
    assert tables.text("a\nb", "", "c", "d") == "a\nb\n\nc\nd"
    assert tables.text("c", "a\nb", "d") == "c\n\na\nb\n\nd"
    assert tables.text("", "") == ""


@pytest.mark.parametrize("steering", ["\x1b[31mred", "a\rb", "a\nb", "\x9b1m", "\u202egnp.exe"])
def test_names_from_a_file_cannot_steer_the_terminal(steering):
    decision = Decision(steering, steering, Action.KEEP, (), Reason.RETURNED, steering)
    hosts = Decision("bn", "BatchNorm2d", Action.FOLD, (steering,))
    found = Finding(steering, Severity.ERROR, "code", steering)
    output = OutputError(steering, 0, 0, 0, 0, passed=False, note=steering)
    text = tables.text(
        tables.decisions([decision, hosts]),
        tables.layers([health(steering, kind=steering, decision=decision)]),
        tables.findings([found]),
        tables.outputs([output]),
    )
    assert steering not in text
    assert all(c.isprintable() or c == "\n" for c in text)


def test_brackets_are_no_markup():
    assert "[red]bn[/red]" in tables.decisions([keep("[red]bn[/red]")])


def test_other_scripts_stay_readable():
    assert "нормаль" in tables.decisions([keep("нормаль")])


class Terminal:
    """A stdout that is a terminal."""

    def isatty(self):
        return True

    def fileno(self):
        return 1


def test_the_width_is_that_of_the_terminal_or_columns_or_100(monkeypatch):
    assert tables.width() == 100
    monkeypatch.setattr("sys.stdout", Terminal())
    monkeypatch.setattr("os.get_terminal_size", lambda _: os.terminal_size((77, 20)))
    assert tables.width() == 77
    monkeypatch.setenv("COLUMNS", "66")
    assert tables.width() == 66
    monkeypatch.setenv("COLUMNS", "3")
    assert tables.width() == 40


@pytest.mark.parametrize("columns", ["", "0", "wide", "-5"])
def test_columns_that_are_no_number_do_not_count(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    assert tables.width() == 100


def test_there_may_be_no_stdout(monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    assert tables.width() == 100


def test_the_last_line_of_every_result_is_its_summary():
    decided = (fold(), keep())
    assert str(Report("fold", decided)).splitlines()[-1] == Report("fold", decided).summary()
    assert str(Plan(decided)).splitlines()[-1].startswith("1 of 2")
    inspection = Inspection((health("bn"),), tuple(alike(3)))
    assert str(inspection).splitlines()[-1] == inspection.summary()
    assert str(Report("fold", ())) == "the model has no norm layer to fold"
    same = OutputError("output", 1e-7, 2e-7, 8e-7, 1e-6, passed=True)
    judged = Equivalence((same,), "float64", "float32", 4.0, 8.0)
    assert str(judged).splitlines()[-1].startswith("equivalent: worst error 0.5x")


def test_text_is_text_in_a_notebook_and_where_colour_is_forced(monkeypatch):
    expected = tables.decisions([fold(), keep()])
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert tables.decisions([fold(), keep()]) == expected
    assert "\x1b" not in expected


def test_layers_that_differ_in_nothing_are_not_listed_twice(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    rows = [health(LONG.format(1, i), decision=decision) for i, decision in enumerate(dense(4))]
    text = tables.layers(rows)
    assert text.count("denselayer2.norm1") == 1
    assert "gamma 1" in text.splitlines()[-1]
