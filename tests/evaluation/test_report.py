"""report.json, the tables, the verdicts and the plots."""

import copy
import json
import unicodedata

import pytest

from la_aciq.errors import LaAciqError
from la_aciq.evaluation import Comparison, Configuration, Curve, Difference, LanguageResult, Layers, Report
from la_aciq.evaluation.plots import draw

TAGS = ("en", "sw", "zh-Hant")


def result(change):
    return LanguageResult(1.0, 1.0 + change, change, change - 0.02, change + 0.02, 0.01, change, 0.125, 1022, 8)


def configuration(name, changes):
    worst = max(changes)
    return Configuration(
        name=name,
        config={"weights": 4},
        bits=4.5,
        mean=sum(changes) / 3,
        mean_low=sum(changes) / 3 - 0.008,
        mean_high=sum(changes) / 3 + 0.008,
        mean_se=0.004,
        worst=worst,
        worst_language=TAGS[changes.index(worst)],
        gap=worst - min(changes),
        gap_low=0.0,
        gap_high=worst - min(changes) + 0.05,
        tail_rate=0.125,
        nats=0.1,
        by_language={tag: result(change) for tag, change in zip(TAGS, changes, strict=True)},
        skipped={"lm_head": "ignored by the configuration"},
    )


def comparison(mean, languages=((-0.01, 0.01), (-0.01, 0.01), (-0.01, 0.01)), gap=(-0.03, 0.02)):
    low, high = mean
    gap = Difference(sum(gap) / 2, *gap)
    by_language = {tag: Difference((a + b) / 2, a, b) for tag, (a, b) in zip(TAGS, languages, strict=True)}
    return Comparison("own", "pooled", Difference((low + high) / 2, low, high), gap, by_language, 24)


@pytest.fixture
def report():
    numbers = {tag: [2.5, None] for tag in TAGS}
    return Report(
        created="2026-01-01T00:00:00+00:00",
        versions={"la_aciq": "0.1.0"},
        settings={"seqlen": 512, "tokens": 1024, "segment": 128, "tail_nats": 0.5},
        model={"name": "a/model", "parameters": 10, "dtype": "float32", "fingerprint": "0"},
        texts={tag: {"skipped": 1024, "tokens": 1024} for tag in TAGS},
        unit="byte",
        configurations=[
            configuration("W4A16", [0.01, 0.02, 0.015]),
            configuration("W4A4 静的|x", [0.1, 0.2, 0.15]),
            configuration("W4A4 unrotated", [3.0, 4.0, 2.5]),
        ],
        comparisons=[comparison((-0.01, 0.02))],
        regret={"q_proj": dict.fromkeys(TAGS, 0.012), "value": {"en": 0.5, "sw": None, "zh-Hant": 0.0}},
        clips=Layers(["model.layers.0.q_proj", "model.layers.1.q_proj"], numbers, dict.fromkeys(TAGS, 2.6)),
        kurtosis=Layers(["model.layers.0.q_proj", "model.layers.1.q_proj"], numbers, dict.fromkeys(TAGS, 1.0)),
        curves=[
            Curve(
                "model.layers.1.q_proj",
                [1.0, 2.0, 4.0],
                {t: [0.1, 0.01, 0.05] for t in TAGS},
                {t: [2.0, 0.01] for t in TAGS},
            )
        ],
    )


def test_json_round_trip(report, tmp_path):
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == report
    values = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert values["schema"] == 1
    assert values["configurations"][0]["by_language"]["sw"]["change"] == 0.02
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("schema",), 2, "schema 2"),
        (("schema",), None, "no schema number"),
        (("configurations",), {}, "configurations: expected list"),
        (("configurations", 0, "mean"), "0.1", r"configurations\[0\]: mean: expected float"),
        (("configurations", 0, "mean"), True, "mean: expected float"),
        (("configurations", 0, "by_language", "sw", "low"), float("nan"), "sw: low: expected float"),
        (("configurations", 0, "by_language", "sw", "tokens"), 1.5, "tokens: expected int"),
        (("clips", "by_language", "en"), [1.0, "x"], r"en\[1\]"),
        (("clips",), 3, "clips: expected an object"),
        (("surprise",), 1, "unknown field 'surprise'"),
    ],
)
def test_a_field_of_another_kind_is_named(report, path, value, message):
    values = copy.deepcopy(report.to_dict())
    target = values
    for step in path[:-1]:
        target = target[step]
    target[path[-1]] = value
    with pytest.raises(LaAciqError, match=message):
        Report.from_dict(values)


def test_a_missing_field_is_named(report):
    values = report.to_dict()
    del values["configurations"][1]["gap"]
    with pytest.raises(LaAciqError, match=r"configurations\[1\]: field 'gap' is missing"):
        Report.from_dict(values)


def test_files_that_are_not_reports(tmp_path):
    with pytest.raises(LaAciqError, match="cannot be read"):
        Report.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{", "utf-8")
    with pytest.raises(LaAciqError, match=r"bad\.json' is not JSON"):
        Report.load(tmp_path / "bad.json")
    (tmp_path / "list.json").write_text("[]", "utf-8")
    with pytest.raises(LaAciqError, match="not a report"):
        Report.load(tmp_path / "list.json")


def test_an_infinite_number_is_never_written(report, tmp_path):
    report.configurations[0].config["weights"] = float("inf")
    with pytest.raises(ValueError, match="JSON"):
        report.save(tmp_path / "report.json")
    assert list(tmp_path.iterdir()) == []


def columns(line):
    """Where a line's cells end, in columns of a terminal."""
    width, ends = 0, []
    for character, following in zip(line, line[1:] + " ", strict=True):
        width += 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if character != " " and following == " ":
            ends.append(width)
    return ends


def test_the_terminal_table_is_aligned_whatever_the_script(report):
    text = report.terminal()
    lines = text.splitlines()
    start = lines.index("Configurations")
    rule = columns(lines[start + 2])
    for line in lines[start + 3 : start + 6]:
        assert columns(line)[-1] == rule[-1]
        assert columns(line)[0] == rule[0]
    assert "+0.150 ±0.008" in lines[start + 4]
    assert "+0.200 sw" in lines[start + 4]
    assert "12.5%" in lines[start + 4]
    assert "0.100 [0.000, 0.150]" in lines[start + 4]
    assert "1.2%" in text
    assert "–" in text  # a language that was never seen there
    assert all(sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in line) <= 110 for line in lines)


def test_markdown_has_the_intervals(report):
    text = report.markdown()
    assert "| sw | 1.000 | +0.020 [+0.000, +0.040] | +0.200 [+0.180, +0.220] |" in text
    assert "静的\\|x" in text
    # Every row of a table has as many cells as its header.
    for block in text.split("\n\n"):
        rows = [line.replace("\\|", "") for line in block.splitlines() if line.startswith("|")]
        assert len({row.count("|") for row in rows}) <= 1


def test_markdown_without_details_keeps_configurations_and_verdicts(report):
    text = report.markdown(details=False)
    assert text.count("| configuration |") == 1
    assert "| sw |" not in text
    assert all(comparison.sentence() in text for comparison in report.comparisons)


def test_the_verdict_follows_the_interval():
    null = comparison((-0.01, 0.02)).sentence()
    assert "no difference between statistics by language and pooled ones was measured (+0.0050 bits per byte" in null
    assert "interval -0.0100 to +0.0200, mean of 3 languages, paired over 24 segments" in null
    assert "gap not measurably different (-0.0050, -0.0300 to +0.0200)" in null
    assert "language by language, corrected for 3 languages, no difference in any" in null
    assert "gap smaller" in comparison((-0.01, 0.02), gap=(-0.03, -0.01)).sentence()
    assert "gap larger" in comparison((-0.01, 0.02), gap=(0.01, 0.03)).sentence()
    assert "statistics by language lose less than pooled ones" in comparison((-0.02, -0.01)).sentence()
    mixed = comparison((0.01, 0.02), ((-0.02, -0.01), (0.01, 0.02), (-0.01, 0.01))).sentence("token")
    assert "statistics by language lose more than pooled ones (+0.0150 bits per token" in mixed
    assert "better in en and worse in sw" in mixed


def test_a_verdict_is_in_both_tables(report):
    assert "no difference between statistics by language and pooled ones was measured" in " ".join(
        report.terminal().split()
    )
    assert "no difference between statistics by language and pooled ones was measured" in report.markdown()


def test_plots_are_drawn_from_the_report_alone(report, tmp_path):
    paths = draw(report, tmp_path)
    assert [path.name for path in paths] == ["changes.png", "clips.png", "layers.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_a_report_without_a_profile_has_one_plot(report, tmp_path):
    values = report.to_dict() | {"regret": {}, "clips": None, "kurtosis": None, "curves": []}
    assert [path.name for path in draw(Report.from_dict(values), tmp_path)] == ["changes.png"]


def test_changes_off_the_scale_are_written_out(report, tmp_path):
    from la_aciq.evaluation.plots import draw_changes

    figure = draw_changes(report)
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert len(panels) == 3
    assert panels[0].get_xlim()[1] < 1.0  # the unrotated configuration does not set the scale
    assert [text.get_text() for text in panels[2].texts] == ["3.00 →", "2.50 →", "4.00 →"]
    # Languages in one order, by their change in the configurations that are shown: the worst at the top.
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["en", "zh-Hant", "sw"]
    assert not panels[0].texts
