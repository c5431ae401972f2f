"""The tables of docs/models.md, made from benchmarks/results/architectures.json."""

import collections
import json
import re
from pathlib import Path
from typing import Any

from .architectures import KINDS, architectures

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "architectures.json"
PAGE = ROOT / "docs" / "models.md"

TITLES = {
    "causal": "decoders",
    "masked": "encoders with a masked language model's head",
    "encoder-decoder": "encoder-decoders of text",
    "speech": "encoder-decoders of speech",
}


def read() -> dict[str, Any]:
    """The committed results; without any, an empty file."""
    content: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"architectures": {}}
    return content


def write(results: dict[str, dict[str, Any]], versions: dict[str, str]) -> None:
    """Write the results of all architectures that transformers still has, in order."""
    names = [one.name for one in architectures() if one.name in results]
    content = {"schema": 1, "versions": versions, "architectures": {name: results[name] for name in names}}
    RESULTS.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def tables(content: dict[str, Any]) -> dict[str, str]:
    """The tables by the name of their marker in the page."""
    results: dict[str, dict[str, Any]] = content["architectures"]
    return {
        "architectures": _counts(results, content["versions"]),
        "architectures hold": _hold(results),
        "architectures left alone": _left_alone(results),
        "architectures refused": _reasons(results, "refused"),
        "architectures limits": _limits(results),
        "architectures without a result": _without(results),
    }


def _kind(name: str) -> str:
    return name.partition("/")[0]


def _model_type(name: str) -> str:
    return name.partition("/")[2]


def _status(result: dict[str, Any]) -> str:
    if result["status"] == "holds":
        return "left alone" if result["left alone"] else "holds"
    return "no result" if result["status"].startswith("not ") else str(result["status"])


def _rows(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    if not rows:
        return "None.\n"
    lines = [header, ("---",) * len(header), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def _counts(results: dict[str, dict[str, Any]], versions: dict[str, str]) -> str:
    counts = {kind: collections.Counter[str]() for kind in TITLES}
    for name, result in results.items():
        counts[_kind(name)][_status(result)] += 1
    statuses = ("holds", "left alone", "refused", "fails", "no result")
    header = ("architectures", "hold", "hold, some layers left alone", "refused", "fail", "no result")
    rows = [(TITLES[kind], *(str(counter[status]) for status in statuses)) for kind, counter in counts.items()]
    total = sum(counts.values(), collections.Counter[str]())
    rows.append(("all", *(str(total[status]) for status in statuses)))
    missing = [one.name for one in architectures() if one.name not in results]
    partly = sum(one.get("configs") == ["static"] for one in results.values())
    notes = f"\n{partly} of them were surveyed with static clips alone.\n" if partly else ""
    notes += f"\nNot surveyed yet: {', '.join(missing)}.\n" if missing else ""
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{_rows(header, rows)}\nMeasured with {named}.\n{notes}"


def _hold(results: dict[str, dict[str, Any]]) -> str:
    rows = []
    for kind in TITLES:
        names = [_model_type(name) for name, one in results.items() if _kind(name) == kind and _status(one) == "holds"]
        rows.append((TITLES[kind], ", ".join(names)))
    return _rows(("kind", "model types"), [row for row in rows if row[1]])


def _left_alone(results: dict[str, dict[str, Any]]) -> str:
    """By reason and last component of the layers' names, the architectures."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, result in results.items():
        layers: dict[str, set[str]] = {}
        for layer, reason in result.get("left alone", {}).items():
            last = [part for part in layer.split(".") if part != "*"][-1]
            layers.setdefault(reason, set()).add(f"`{last}`")
        for reason, parts in layers.items():
            groups.setdefault((reason, ", ".join(sorted(parts))), []).append(_model_type(name))
    rows = [(", ".join(dict.fromkeys(names)), layers, reason) for (reason, layers), names in sorted(groups.items())]
    return _rows(("model types", "layers", "reason"), rows)


def _grouped(sentences: dict[str, list[str]]) -> list[tuple[str, ...]]:
    return [(", ".join(dict.fromkeys(names)), text) for text, names in sorted(sentences.items())]


def _reasons(results: dict[str, dict[str, Any]], status: str) -> str:
    sentences: dict[str, list[str]] = {}
    for name, result in results.items():
        if result["status"] == status:
            sentences.setdefault(_general(result["reason"]), []).append(_model_type(name))
    return _rows(("model types", "error"), _grouped(sentences))


def _limits(results: dict[str, dict[str, Any]]) -> str:
    sentences: dict[str, list[str]] = {}
    for name, result in results.items():
        for check, text in result.get("limits", {}).items():
            call = "`kv=4`" if check.startswith("kv=4") else check.partition(": ")[2]
            sentences.setdefault(f"{call}: {_general(text)}", []).append(_model_type(name))
    return _rows(("model types", "call and error"), _grouped(sentences))


def _without(results: dict[str, dict[str, Any]]) -> str:
    sentences: dict[str, list[str]] = {}
    for name, result in results.items():
        if result["status"].startswith("not "):
            reason = re.sub(r" \[[^\[]*\]$", "", result["reason"])
            sentences.setdefault(f"{result['status']}: {reason}", []).append(_model_type(name))
    return _rows(("model types", "reason"), _grouped(sentences))


def _general(text: str) -> str:
    """A sentence without what differs from one architecture to the next: class names, layers, shapes."""
    text = re.sub(r"\b[A-Z]\w+(For\w+|Model|LMHead\w*|Decoder)\b", "the model", text)
    return " ".join(re.sub(r"\[[\d, ]+\]", "[...]", text).split())


assert set(TITLES) == set(KINDS)
