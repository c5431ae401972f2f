"""The report: what quantization costs each language, as JSON (schema 1), as a table for the terminal, and as
Markdown.
"""

import base64
import dataclasses
import html
import json
import math
import os
import textwrap
import types
import typing
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from ..errors import LaAciqError

SCHEMA = 1
_PER_TABLE = 5  # configurations side by side in a terminal
_WIDTH = 110
# The policy holds the page to what it is: text, style and images of its own.
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font-family: sans-serif; color: #333; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.2rem; }}
table {{ border-collapse: collapse; margin: 1.5rem 0; font-variant-numeric: tabular-nums; }}
caption {{ text-align: left; font-weight: bold; padding: .3rem .6rem; }}
th, td {{ padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #ddd; }}
.name {{ text-align: left; }}
img {{ max-width: 100%; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


@dataclass(frozen=True)
class LanguageResult:
    """One configuration in one language.

    Attributes:
        reference_bpb: bits per byte of the unquantized model (bits per token when the report's unit says so).
        bpb: bits per byte of the configuration.
        change: bpb - reference_bpb.
        low, high: the 95 % interval of the change, by Student's t.
        se: the standard error of the change, by the paired bootstrap.
        nats: the change in nats per predicted token.
        tail_rate: share of segments whose loss rose by more than the report's threshold.
        tokens: predicted tokens.
        segments: segments of the bootstrap.
    """

    reference_bpb: float
    bpb: float
    change: float
    low: float
    high: float
    se: float
    nats: float
    tail_rate: float
    tokens: int
    segments: int


@dataclass(frozen=True)
class Configuration:
    """One configuration over all languages.

    Attributes:
        name: of the configuration.
        config: the fields of the `QuantConfig`, or {"dtype": ...} for the unquantized model; of `compare` also the
            method of another package, the .gguf file or the server.
        bits: stored bits per weight of the replaced layers, with their clips, centers and biases; None where they are
            not known.
        mean: mean change over the languages, with equal weights.
        mean_low, mean_high: the 95 % interval of the mean. It is about the text, not about the choice of languages.
        mean_se: the standard error of the mean.
        worst: the largest change.
        worst_language: the language with the largest change.
        gap: the largest minus the smallest change. It is biased upwards, as every range of noisy numbers is.
        gap_low, gap_high: the 95 % interval of the gap. It holds whichever languages are the extremes, and is wide.
        tail_rate: mean of the tail rates over the languages.
        nats: mean change in nats per predicted token.
        by_language: results by tag.
        skipped: names of layers that were left alone, with the reason.
    """

    name: str
    config: dict[str, Any]
    bits: float | None
    mean: float
    mean_low: float
    mean_high: float
    mean_se: float
    worst: float
    worst_language: str
    gap: float
    gap_low: float
    gap_high: float
    tail_rate: float
    nats: float
    by_language: dict[str, LanguageResult]
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """A difference of two configurations' changes with its interval; negative means the first one is better."""

    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Two configurations that differ only in whose clips and centers they use: by language, or pooled.

    Attributes:
        name: the configuration by language.
        baseline: the pooled configuration.
        mean: mean difference over the languages, paired over segments, with its 95 % interval.
        gap: difference of the two gaps, with its 95 % interval.
        by_language: differences by tag, with intervals that hold together with 95 % (Bonferroni).
        segments: segments of all languages.
    """

    name: str
    baseline: str
    mean: Difference
    gap: Difference
    by_language: dict[str, Difference]
    segments: int

    def sentence(self, unit: str = "byte") -> str:
        """In words, whether statistics by language lose less than pooled ones, as the intervals say.

        Args:
            unit: "byte" or "token", as the report has it.

        Returns:
            The sentence.
        """
        if self.mean.high < 0:
            verdict = "statistics by language lose less than pooled ones"
        elif self.mean.low > 0:
            verdict = "statistics by language lose more than pooled ones"
        else:
            verdict = "no difference between statistics by language and pooled ones was measured"
        gap = "smaller" if self.gap.high < 0 else "larger" if self.gap.low > 0 else "not measurably different"
        better = [tag for tag, d in self.by_language.items() if d.high < 0]
        worse = [tag for tag, d in self.by_language.items() if d.low > 0]
        alone = [f"better in {', '.join(better)}"] if better else []
        alone += [f"worse in {', '.join(worse)}"] if worse else []
        return (
            f"{self.name} against {self.baseline}: {verdict} ({self.mean.difference:+.4f} bits per {unit}, 95 % "
            f"interval {self.mean.low:+.4f} to {self.mean.high:+.4f}, mean of {len(self.by_language)} languages, "
            f"paired over {self.segments} segments); gap {gap} ({self.gap.difference:+.4f}, {self.gap.low:+.4f} to "
            f"{self.gap.high:+.4f}); language by language, corrected for {len(self.by_language)} languages, "
            f"{' and '.join(alone) or 'no difference in any'}."
        )


@dataclass(frozen=True)
class Curve:
    """Normalized MSE of one site's inputs (mean over its groups) against the clip, by language.

    Attributes:
        site: name of the site.
        ratio: clips as multiples of the rms of each group.
        mse: by tag, one value per ratio.
        optimum: by tag, the ratio and the normalized MSE at the minimum of the curve.
    """

    site: str
    ratio: list[float]
    mse: dict[str, list[float]]
    optimum: dict[str, list[float]]


@dataclass(frozen=True)
class Layers:
    """A number per site (in the model's order) and language, and its counterpart for the whole model.

    None where a language never reached the site (an expert).
    """

    sites: list[str]
    by_language: dict[str, list[float | None]]
    model: dict[str, float | None]


@dataclass(frozen=True)
class Report:
    """What quantization costs each language. `save` and `load` are its report.json.

    regret, clips, kurtosis and curves describe the profile, and are empty in a report without one.

    Attributes:
        created: date and time.
        versions: of la_aciq, Python, PyTorch and NumPy.
        settings: seqlen, tokens, segment, tail_nats, resamples, confidence, seed; of `compare` also bits_per_byte.
        model: the reference: name, parameters, dtype, fingerprint; of `compare` name, config, identity.
        texts: by tag, the tokens skipped and read.
        unit: "byte" or "token".
        configurations: results of each configuration.
        comparisons: pairs of configurations, by language and pooled.
        regret: by kind of layer and tag, how much the pooled clip raises the normalized MSE over that of the language's
            clip, relative to the latter.
        clips: alpha* / rms by layer and language.
        kurtosis: excess kurtosis by layer and language.
        curves: MSE against the clip at a few sites.
    """

    created: str
    versions: dict[str, str]
    settings: dict[str, Any]
    model: dict[str, Any]
    texts: dict[str, dict[str, int]]
    unit: str
    configurations: list[Configuration]
    comparisons: list[Comparison] = field(default_factory=list)
    regret: dict[str, dict[str, float | None]] = field(default_factory=dict)
    clips: Layers | None = None
    kurtosis: Layers | None = None
    curves: list[Curve] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The content of report.json."""
        return {"schema": SCHEMA} | dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Any, source: str = "report") -> Self:
        """The report of a report.json.

        Args:
            values: the content of report.json.
            source: names it in error messages.

        Returns:
            The report.

        Raises:
            LaAciqError: a field is missing, of another type or not finite.
        """
        if not isinstance(values, dict) or not isinstance(values.get("schema"), int):
            raise LaAciqError(f"{source}: not a report of LA-ACIQ (no schema number)")
        if values["schema"] != SCHEMA:
            raise LaAciqError(f"{source}: schema {values['schema']}; this version of LA-ACIQ reads schema {SCHEMA}")
        report: Self = _parse(cls, {name: value for name, value in values.items() if name != "schema"}, source)
        return report

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write report.json, complete or not at all.

        Args:
            path: the file; an existing one is replaced.

        Raises:
            LaAciqError: the file cannot be written.
        """
        file = Path(path)
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
            # Half a character, in a path for example, is written as JSON's escape.
            temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
            temporary.replace(file)
        except OSError as error:
            raise LaAciqError(f"{str(file)!r} cannot be written: {error.strerror}") from error
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a report.json and check every field.

        Args:
            path: the file.

        Returns:
            The report.

        Raises:
            LaAciqError: the file cannot be read, or is not a report of this schema. The message names the field.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise LaAciqError(f"{str(path)!r} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise LaAciqError(f"{str(path)!r} is not JSON: {error}") from error
        return cls.from_dict(values, str(path))

    @property
    def reference(self) -> str:
        """The model that the configurations are compared with, in words."""
        return str(self.model["name"]) if "identity" in self.model else "the unquantized model"

    def terminal(self) -> str:
        """The tables and the verdicts as text for a terminal with a fixed-width font."""
        everything = range(len(self.configurations))
        parts = [_text_table(*self._summary())]
        parts += [
            _text_table(*self._languages(everything[start : start + _PER_TABLE], intervals=False))
            for start in everything[::_PER_TABLE]
        ]
        if self.regret:
            parts.append(_text_table(*self._regret()))
        notes = [textwrap.fill(note, _WIDTH) for note in self._notes()]
        return "\n\n".join([textwrap.fill(self._heading(), _WIDTH), *parts, *notes])

    def markdown(self, details: bool = True) -> str:
        """The tables and the verdicts as Markdown, with the intervals in full.

        Args:
            details: also the tables by language; otherwise the configurations and verdicts alone.

        Returns:
            The text.
        """
        everything = range(len(self.configurations))
        parts = [_markdown_table(*self._summary())]
        if details:
            parts.append(_markdown_table(*self._languages(everything, intervals=True)))
        if details and self.regret:
            parts.append(_markdown_table(*self._regret()))
        return "\n\n".join([self._heading(), *parts, *self._notes()]) + "\n"

    def html(self, images: Mapping[str, bytes] | None = None) -> str:
        """One page with the tables, the verdicts and images, which loads nothing from elsewhere.

        Args:
            images: contents of PNG files by name.

        Returns:
            The HTML.
        """
        everything = range(len(self.configurations))
        tables = [self._summary(), self._languages(everything, intervals=True)]
        if self.regret:
            tables.append(self._regret())
        parts = [f"<h1>{html.escape(self._heading())}</h1>", *(_html_table(*table) for table in tables)]
        parts += [f"<p>{html.escape(note)}</p>" for note in self._notes()]
        parts += [
            f'<img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(content).decode()}">'
            for name, content in (images or {}).items()
        ]
        return _PAGE.format(title=html.escape(self._heading()), body="\n".join(parts))

    def _heading(self) -> str:
        name = "" if self.reference == self.model["name"] else f" ({self.model['name']})"
        return (
            f"Change in bits per {self.unit} against {self.reference}, {self.settings['tokens']} held-out tokens "
            f"in each of {len(self.texts)} languages{name}"
        )

    def _summary(self) -> tuple[str, list[str], list[list[str]]]:
        header = ["#", "configuration", "bits/weight", "mean", "worst", "gap", "tail"]
        rows = [
            [
                str(number),
                c.name,
                "–" if c.bits is None else f"{c.bits:.2f}",
                f"{c.mean:+.3f} ±{c.mean_high - c.mean:.3f}",
                f"{c.worst:+.3f} {c.worst_language}",
                f"{c.gap:.3f} [{c.gap_low:.3f}, {c.gap_high:.3f}]",
                f"{c.tail_rate:.1%}",
            ]
            for number, c in enumerate(self.configurations, 1)
        ]
        return "Configurations", header, rows

    def _languages(self, numbers: Sequence[int], *, intervals: bool) -> tuple[str, list[str], list[list[str]]]:
        header = ["language", "reference", *(f"#{number + 1}" for number in numbers)]
        rows = []
        for tag in self.texts:
            results = [self.configurations[number].by_language[tag] for number in numbers]
            cells = [
                f"{r.change:+.3f} [{r.low:+.3f}, {r.high:+.3f}]"
                if intervals
                else f"{r.change:+.3f} ±{r.high - r.change:.3f}"
                for r in results
            ]
            rows.append([tag, f"{results[0].reference_bpb:.3f}", *cells])
        title = f"Change by language with its 95 % interval; reference is the bits per {self.unit} of {self.reference}"
        return title, header, rows

    def _regret(self) -> tuple[str, list[str], list[list[str]]]:
        kinds = list(self.regret)
        rows = [[tag, *(_percent(self.regret[kind][tag]) for kind in kinds)] for tag in self.regret[kinds[0]]]
        title = "Regret: extra quantization error of a layer's input from sharing one clip over the languages"
        return title, ["language", *kinds], rows

    def _notes(self) -> list[str]:
        notes = (
            "± is the half-width of a 95 % interval for text like the one read. gap: worst minus best language, with a "
            f"95 % interval. tail: share of segments of {self.settings['segment']} tokens whose loss rose by more than "
            f"{self.settings['tail_nats']} nats a token."
        )
        return [notes, *(comparison.sentence(self.unit) for comparison in self.comparisons)]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _width(text: str) -> int:
    """Columns of a terminal that a string takes: two for East Asian wide characters, none for combining marks."""
    return sum(
        0 if unicodedata.category(c) in ("Mn", "Me", "Cf") else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def _text_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(_width, column)) for column in zip(header, *rows, strict=True)]
    left = _text_columns(rows)

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell + " " * (width - _width(cell)) if column in left else " " * (width - _width(cell)) + cell
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    return "\n".join([title, line(header), "  ".join("─" * width for width in widths), *map(line, rows)])


def _markdown_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    left = _text_columns(rows)
    rule = ["---" if column in left else "---:" for column in range(len(header))]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in (header, rule, *rows)]
    return "\n".join([f"**{title}**", "", *lines])


def _html_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    left = _text_columns(rows)

    def line(cells: Sequence[str], kind: str) -> str:
        written = [
            f"<{kind}{' class=name' if column in left else ''}>{html.escape(cell)}</{kind}>"
            for column, cell in enumerate(cells)
        ]
        return f"<tr>{''.join(written)}</tr>"

    lines = [line(header, "th"), *(line(cells, "td") for cells in rows)]
    return "\n".join(["<table>", f"<caption>{html.escape(title)}</caption>", *lines, "</table>"])


def _text_columns(rows: Sequence[Sequence[str]]) -> set[int]:
    """The columns that hold names: those where an entry starts with a letter."""
    return {column for row in rows for column, cell in enumerate(row) if cell[:1].isalpha()}


def _parse(kind: Any, value: Any, where: str) -> Any:
    """`value` (of JSON) as the annotated type `kind`: a dataclass, list, dict, optional or scalar."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, dict):
            raise LaAciqError(f"{where}: expected an object, got {value!r:.60}")
        kinds = typing.get_type_hints(kind)
        fields = {f.name: f for f in dataclasses.fields(kind)}
        for name in value:
            if name not in fields:
                raise LaAciqError(f"{where}: unknown field {name!r}")
        for name in fields:
            if name not in value:
                raise LaAciqError(f"{where}: field {name!r} is missing")
        return kind(**{name: _parse(kinds[name], value[name], f"{where}: {name}") for name in fields})
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return None if value is None else _parse(arguments[0], value, where)
    if origin is list and isinstance(value, list):
        return [_parse(arguments[0], entry, f"{where}[{i}]") for i, entry in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {name: _parse(arguments[1], entry, f"{where}.{name}") for name, entry in value.items()}
    if kind is Any:
        return value
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if kind in (int, str) and isinstance(value, kind) and not isinstance(value, bool):
        return value
    raise LaAciqError(f"{where}: expected {getattr(kind, '__name__', kind)}, got {value!r:.60}")
