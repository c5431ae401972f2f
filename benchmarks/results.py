"""Result files: reading those of the CPU operations (medians, ratios within a round, shares of the hardware limit), and
writing those of the clip optimizer.
"""

import json
import platform
import statistics
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import la_aciq
from la_aciq.bench import cpu_name, in_file_names, versions

LIMIT = "limit: "
FOLDER = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Case:
    """One case of the file; times are seconds per round, and round i of every contender is of the same moment."""

    values: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        try:
            return self.values[name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def times(self) -> dict[str, list[float]]:
        return self.values["times_s"]

    def seconds(self, name: str) -> float:
        return statistics.median(self.times[name])

    def ratios(self, name: str, other: str) -> list[float]:
        return [a / b for a, b in zip(self.times[name], self.times[other], strict=False)]

    def ratio(self, name: str, other: str) -> float:
        """How many times as long `name` takes as `other`: the median of the rounds."""
        return statistics.median(self.ratios(name, other))

    def peers(self) -> list[str]:
        return [name for name in self.times if not name.startswith((LIMIT, "la_aciq"))]

    def limits(self) -> list[str]:
        return [name.removeprefix(LIMIT) for name in self.times if name.startswith(LIMIT)]

    def share(self, name: str, limit: str) -> float:
        """The time of the limit over the time taken."""
        return self.ratio(LIMIT + limit, name)

    def product_share(self, name: str) -> float:
        """The same of a matrix product, whose limit is the longer of reading the weights and multiplying."""
        kind = "int8" if name.startswith(("la_aciq A8", "la_aciq A4")) else self.dtype
        reading = self.times[f"{LIMIT}read"]
        factor = self.limit_calls.get(f"{LIMIT}{kind}", 0.0)
        multiplying = self.times.get(f"{LIMIT}{kind}", [0.0] * len(reading))
        bounds = [max(r, factor * m) for r, m in zip(reading, multiplying, strict=True)]
        return statistics.median(bound / taken for bound, taken in zip(bounds, self.times[name], strict=False))


@dataclass(frozen=True)
class Results:
    name: str  # of the file
    head: dict[str, Any]
    cases: list[Case]

    def suite(self, name: str) -> list[Case]:
        return [case for case in self.cases if case.suite == name]

    def by_threads(self) -> list[Case]:
        """The cases of every number of threads: of the size that comes with most of them, 256 MiB if possible."""
        sizes = self.suite("size")
        counts = {case.size: [other.size for other in sizes].count(case.size) for case in sizes}
        best = max(sizes, key=lambda case: (counts[case.size], case.bytes <= 2**28, case.bytes)).size
        return sorted((case for case in sizes if case.size == best), key=lambda case: case.threads)


def from_json(name: str, content: dict[str, Any]) -> Results:
    if content.get("schema") != 2:
        raise ValueError(f"{name}: expected schema 2, got {content.get('schema')}; run: make bench")
    head = {key: value for key, value in content.items() if key != "cases"}
    return Results(name, head, [Case(case) for case in content["cases"]])


def load(path: Path) -> Results:
    return from_json(path.stem, json.loads(path.read_text(encoding="utf-8")))


def write_single_core(name: str, rows: list[dict[str, Any]], **settings: Any) -> Path:
    """Write results/<name>-<device>.json: rows measured on one core, without PyTorch, and their settings."""
    device = cpu_name()
    content = {
        "schema": 1,
        "device": device,
        "cores": 1,
        **settings,
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"la_aciq": la_aciq.__version__, "python": platform.python_version()}
        | versions(("numpy", "scipy")),
        "rows": rows,
    }
    target = FOLDER / f"{name}-{in_file_names(device)}.json"
    target.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return target
