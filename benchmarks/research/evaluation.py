"""What each configuration costs each language on the embedded model, beside other methods at the same bits.

    python -m benchmarks.research.evaluation [--only NAME ...] [--tokens N] [--skip N] [--languages TAG ...]
    python -m benchmarks.research.evaluation --speed

The result file has a row for each configuration: the change in bits per byte against the model in float32. All other
models run in bfloat16. The file is written after every row, so that an interrupted run continues, and a run of a few
rows keeps the others. A row is kept when the settings and the versions are the same; after a change of the code, use
--again. The bits of a kept row are counted again. A row is left out when its package is not installed. Profiles and
the losses of the float32 model are kept in build/evaluation.

--speed measures how fast the rows of the file decode: minutes, on a machine that is otherwise idle. Rows whose
quantization is simulated have no speed.
"""

import argparse
import copy
import datetime
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import la_aciq
from la_aciq import embedded
from la_aciq.bench import cpu_name, versions
from la_aciq.calibration import tokenize
from la_aciq.demo import LANGUAGES
from la_aciq.evaluation.loss import (
    Estimate,
    gap_difference,
    gap_interval,
    segment_sums,
    tail_rate,
    token_losses,
)
from la_aciq.nn import QuantConfig, bits_per_weight, quantize_model
from la_aciq.profile import Profile

from .. import bench_model
from . import baselines

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "evaluation-embedded.json"
SEQLEN, CALIBRATION = 512, 1024  # tokens; calibration's are the first of each text
_BITS_PER_NAT = 1 / np.log(2)
SPEED_ROUNDS = 5
OTHERS = ("nf4", "hqq", "awq", "gptq")  # weights of `baselines`


@dataclass(frozen=True)
class Run:
    """One row of the table: a configuration of ours, or a baseline's weights with activations rounded as given.

    profile: the name in `PROFILES` of the statistics it uses. tagged: the tag of the language that every text is
    tagged with instead of its own, or None.
    """

    config: QuantConfig | None = None
    profile: str = "usual"
    weights: str | None = None
    activations: int = 16
    tagged: str | None = None

    @property
    def computes_as_used(self) -> bool:
        """Whether its time means something: not where rounding to fewer bits is played in floating point."""
        if self.config is None:
            return self.weights is None or (self.weights in baselines.PACKAGES and self.activations == 16)
        return self.config.weights == 4 or not self.config.quantizes_linear

    @property
    def language_blind(self) -> bool:
        """Whether it treats all languages alike: what others do, and our rows that pool them."""
        return self.config is None or self.config.sharing == "pooled"


# What calibration measures for each name: keyword arguments, and the languages (None: all that are evaluated).
PROFILES: dict[str, tuple[dict[str, Any], tuple[str, ...] | None]] = {
    "usual": ({}, None),
    "not centered": ({"center": False, "second_moments": False}, None),
    "not rotated": ({"rotate": False}, None),
    "English": ({}, ("en",)),
}


def runs() -> dict[str, Run]:
    """Every row, by name: bits first, then whose weights, then how the clip of the activations is found."""
    language = QuantConfig(center=True, clip="static")
    pooled = replace(language, sharing="pooled")
    plain = QuantConfig(clip="static", center=False, sharing="pooled", rounding="nearest")
    table: dict[str, Run] = {"bfloat16": Run()}

    def add(name: str, config: QuantConfig, **changes: Any) -> None:
        table[name] = Run(config, **changes)

    for name in OTHERS:
        table[f"W4A16 {name}"] = Run(weights=name)
    for name in baselines.PACKAGES:
        table[f"W4A16 {name}"] = Run(weights=name)
    add("W4A16 nearest", replace(plain, activations=16))
    add("W4A16 nearest, centers pooled", replace(pooled, activations=16, rounding="nearest"))
    add("W4A16 nearest, centers by language", replace(language, activations=16, rounding="nearest"))
    add("W4A16 feedback", replace(plain, activations=16, rounding="feedback"))
    add("W4A16 feedback, centers pooled", replace(pooled, activations=16))
    add("W4A16 feedback, centers by language", replace(language, activations=16))
    add("W4A16 feedback, calibrated on English", replace(pooled, activations=16), profile="English")
    for bits in (8, 4):
        for name in OTHERS:
            table[f"W4A{bits} {name}, absmax per token"] = Run(weights=name, activations=bits)
        short = f"W4A{bits}"
        add(f"{short} static pooled", replace(pooled, activations=bits))
        add(f"{short} static by language", replace(language, activations=bits))
        add(
            f"{short} absmax per token by language",
            replace(language, activations=bits, clip="absmax", granularity="token"),
        )
        add(f"{short} absmax per group pooled", replace(pooled, activations=bits, clip="absmax"))
        add(f"{short} absmax per group by language", replace(language, activations=bits, clip="absmax"))
        # What is known without languages: a rotation, error feedback, a scale per token or per group.
        blind = replace(plain, activations=bits, clip="absmax", rounding="feedback")
        add(f"{short} absmax per token, no centers", replace(blind, granularity="token"))
        add(f"{short} absmax per group, no centers", blind)
    add("W4A4 static by language, no sink row", replace(language, sink=False))
    add("W4A4 rms per token by language", replace(language, clip="rms", granularity="token"))
    add("W4A4 rms per group pooled", replace(pooled, clip="rms"))
    add("W4A4 rms per group by language", replace(language, clip="rms"))
    for name, config in (("pooled", plain), ("by language", replace(plain, sharing="language"))):
        add(f"A4 static {name}, no centers", replace(config, weights=16), profile="not centered")
    add("A4 absmax per group, no centers", replace(plain, weights=16, clip="absmax"))
    for name, config in (("pooled", pooled), ("by language", language)):
        add(f"A4 static {name}", replace(config, weights=16))
        add(f"A4 absmax per group {name}", replace(config, weights=16, clip="absmax"))
    add("A4 absmax per group, calibrated on English", replace(language, weights=16, clip="absmax"), profile="English")
    add("A4 static, calibrated on English", replace(language, weights=16), profile="English")
    add("A4 absmax per group, tagged und", replace(language, weights=16, clip="absmax"), tagged="und")
    add("W4A8 static by language, not rotated", replace(language, activations=8, rotate=False), profile="not rotated")
    cache = replace(language, weights=16, activations=16, kv=4)
    add("KV4 static pooled", replace(cache, kv_clip="static", sharing="pooled"))
    add("KV4 static by language", replace(cache, kv_clip="static"))
    add("KV4 rms by language", replace(cache, kv_clip="rms"))
    add("KV4 absmax", cache)
    add("W4A4 absmax per group of 32 by language", replace(language, clip="absmax", group_size=32))
    add("W4A4KV4 absmax by language", replace(language, clip="absmax", kv=4))
    return table


# Pairs (one, other): the difference one - other, paired over segments.
COMPARISONS = (
    ("W4A16 nearest, centers by language", "W4A16 nearest, centers pooled"),
    ("W4A16 feedback, centers by language", "W4A16 feedback, centers pooled"),
    ("W4A16 feedback, centers by language", "W4A16 feedback"),
    ("W4A16 feedback, calibrated on English", "W4A16 feedback, centers pooled"),
    *((f"W4A16 feedback{centers}", f"W4A16 {name}") for centers in ("", ", centers by language") for name in OTHERS),
    *(("W4A16 feedback, centers by language", f"W4A16 {name}") for name in baselines.PACKAGES),
    ("W4A8 static by language", "W4A8 static pooled"),
    ("W4A8 static by language", "W4A8 static by language, not rotated"),
    ("W4A8 absmax per group by language", "W4A8 gptq, absmax per token"),
    ("W4A4 static by language", "W4A4 static pooled"),
    ("W4A4 static by language", "W4A4 static by language, no sink row"),
    ("W4A4 rms per group by language", "W4A4 rms per group pooled"),
    ("W4A4 absmax per group by language", "W4A4 absmax per group pooled"),
    ("W4A4 absmax per group by language", "W4A4 absmax per group, no centers"),
    ("W4A4 absmax per group by language", "W4A4 rms per group by language"),
    ("W4A4 absmax per group by language", "W4A4 static by language"),
    ("W4A4 absmax per group of 32 by language", "W4A4 absmax per group by language"),
    *(("W4A4 absmax per group by language", f"W4A4 {name}, absmax per token") for name in OTHERS),
    ("A4 static by language, no centers", "A4 static pooled, no centers"),
    ("A4 static by language", "A4 static pooled"),
    ("A4 static by language", "A4 static by language, no centers"),
    ("A4 absmax per group by language", "A4 absmax per group pooled"),
    ("A4 absmax per group by language", "A4 absmax per group, no centers"),
    ("A4 absmax per group, calibrated on English", "A4 absmax per group by language"),
    ("A4 static, calibrated on English", "A4 static by language"),
    ("A4 absmax per group, tagged und", "A4 absmax per group by language"),
    ("KV4 static by language", "KV4 static pooled"),
    ("KV4 absmax", "KV4 static by language"),
    ("KV4 absmax", "KV4 rms by language"),
    ("W4A4KV4 absmax by language", "W4A4 absmax per group by language"),
)


class Bench:
    """The model, the texts and what is made of them on demand."""

    def __init__(self, languages: tuple[str, ...], tokens: int, folder: Path, skip: int = CALIBRATION) -> None:
        self.languages, self.folder = languages, folder
        full, tokenizer = embedded.load_model()
        self.texts = tokenize(embedded.load_texts(languages), tokenizer)
        self.windows = {
            tag: text.windows(tag, tokens=tokens, seqlen=SEQLEN, skip=skip) for tag, text in self.texts.items()
        }
        self.bytes = {
            tag: segment_sums([w.byte_counts for w in windows], windows) for tag, windows in self.windows.items()
        }
        self.tokens = {
            tag: segment_sums([np.ones(len(w.ids) - 1) for w in windows], windows)
            for tag, windows in self.windows.items()
        }
        self.reference = self._kept(f"reference-{skip}", tokens, lambda: self.losses(full))
        self.model = full.to(torch.bfloat16)
        self._empty = copy.deepcopy(self.model).to("meta")
        self._previous: nn.Module | None = None
        self._statistics: baselines.InputStatistics | None = None

    def _kept(self, name: str, tokens: int, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `make` gives, by language, in nats per segment; from an earlier run with the same texts if there was."""
        file = self.folder / f"{name}-{'-'.join(self.languages)}-{tokens}.json"
        if not file.exists():
            file.write_text(json.dumps({tag: [float(v) for v in nats] for tag, nats in make().items()}))
        return {tag: np.asarray(nats) for tag, nats in json.loads(file.read_text()).items()}

    def profile(self, name: str) -> Profile:
        settings, languages = PROFILES[name]
        chosen = languages or self.languages
        folder = self.folder / f"profile-{name.replace(' ', '-')}-{'-'.join(chosen)}"
        if not folder.exists():
            texts = {tag: self.texts[tag] for tag in chosen}
            print(f"calibrating: {name}", flush=True)
            la_aciq.calibrate(self.model, texts, tokens=CALIBRATION, progress=False, **settings).save(folder)
        return Profile.load(folder)

    def losses(self, model: nn.Module, tagged: str | None = None) -> dict[str, Any]:
        """Nats per segment by language."""
        model.eval()
        return {
            tag: segment_sums(token_losses(model, windows, tagged or tag), windows)
            for tag, windows in self.windows.items()
        }

    def bits(self, run: Run) -> float:
        """The bits per weight of a configuration of ours, without its values."""
        return bits_per_weight(quantize_model(self._empty, self.profile(run.profile), run.config, progress=False))

    def candidate(self, run: Run) -> tuple[nn.Module, float]:
        """The model of a row and its bits per weight."""
        if run.config is not None:
            candidate = quantize_model(
                self.model, self.profile(run.profile), run.config, like=self._previous, progress=False
            )
            if run.config.quantizes_linear:
                self._previous = candidate
            return candidate, bits_per_weight(candidate)
        if run.weights is None:
            return self.model, 16.0
        if run.weights in baselines.PACKAGES:
            return baselines.package_copy(self.model, run.weights)
        if self._statistics is None:
            windows = [
                torch.from_numpy(window.ids)
                for tag, text in self.texts.items()
                for window in text.windows(tag, tokens=CALIBRATION, seqlen=SEQLEN)
            ]
            self._statistics = baselines.InputStatistics.measure(self.model, windows)
        candidate, bits = baselines.quantized_copy(self.model, run.weights, self._statistics)
        if run.activations < 16:
            round_inputs(candidate, run.activations)
        return candidate, bits


def round_inputs(model: nn.Module, bits: int) -> None:
    """Round the inputs of the model's linear layers as others do: symmetric, a scale per token from its absmax."""
    half = 2 ** (bits - 1) - 1

    def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x = args[0].float()
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / half
        return ((x / scale).round() * scale).to(args[0].dtype), *args[1:]

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith("lm_head"):
            module.register_forward_pre_hook(hook)


def summary(bench: Bench, losses: dict[str, Any]) -> dict[str, Any]:
    """A row's numbers, of its nats per segment."""
    changes = estimates(bench, losses, bench.reference)
    tails = {tag: tail_rate(losses[tag] - bench.reference[tag], bench.tokens[tag]) for tag in bench.languages}
    mean = Estimate.mean(list(changes.values()))
    worst = max(changes, key=lambda tag: changes[tag].value)
    gap, gap_low, gap_high = gap_interval(list(changes.values()))
    return {
        "mean": mean.value,
        "mean_se": mean.se,
        "mean_low": mean.interval()[0],
        "mean_high": mean.interval()[1],
        "worst": changes[worst].value,
        "worst_language": worst,
        "gap": gap,
        "gap_low": gap_low,
        "gap_high": gap_high,
        "tail_rate": float(np.mean(list(tails.values()))),
        "by_language": {
            tag: {
                "change": change.value,
                "se": change.se,
                "low": change.interval()[0],
                "high": change.interval()[1],
                "tail_rate": tails[tag],
                "nats": [round(float(value), 3) for value in losses[tag]],
            }
            for tag, change in changes.items()
        },
    }


def estimates(bench: Bench, losses: dict[str, Any], other: dict[str, Any]) -> dict[str, Estimate]:
    """The difference of two rows in bits per byte, by language; every difference draws the same segments."""
    return {
        tag: Estimate.ratio((np.asarray(losses[tag]) - other[tag]) * _BITS_PER_NAT, bench.bytes[tag], seed=[0, place])
        for place, tag in enumerate(bench.languages)
    }


def comparison(bench: Bench, rows: dict[str, dict[str, Any]], one: str, other: str) -> dict[str, Any]:
    """The difference of two rows, paired; of the gaps too."""
    nats = [
        {tag: np.asarray(result["nats"]) for tag, result in rows[name]["by_language"].items()} for name in (one, other)
    ]
    difference = estimates(bench, *nats)
    mean = Estimate.mean(list(difference.values()))
    gap = gap_difference(*(list(estimates(bench, losses, bench.reference).values()) for losses in nats))
    intervals = {tag: estimate.interval(len(difference)) for tag, estimate in difference.items()}
    return {
        "name": one,
        "baseline": other,
        "mean": mean.value,
        "mean_low": mean.interval()[0],
        "mean_high": mean.interval()[1],
        "gap": gap.value,
        "gap_low": gap.interval()[0],
        "gap_high": gap.interval()[1],
        "better": [tag for tag, (_, high) in intervals.items() if high < 0],
        "worse": [tag for tag, (low, _) in intervals.items() if low > 0],
    }


def best_of_ours(bench: Bench, rows: dict[str, dict[str, Any]], table: dict[str, Run]) -> list[dict[str, Any]]:
    """The configuration of ours of the least mean against every language-blind one of the same bits of weights and
    activations, what others do first; and where its tables take more bits per weight than theirs, so too the best of
    ours that takes no more.
    """
    comparisons = []
    for bits in ("W4A16", "W4A8", "W4A4"):
        same = [name for name in rows if name.split()[0] == bits]
        others = [name for name in same if table[name].config is None]
        ours = [
            name for name in same if (config := table[name].config) is not None and config.group_size == baselines.GROUP
        ]
        if not others or not ours:
            continue
        most = max(rows[name]["bits"] for name in others)
        best_rows = [
            min(names, key=lambda name: rows[name]["mean"]) for names in (ours, small(ours, rows, most)) if names
        ]
        for best in dict.fromkeys(best_rows):
            against = others + [name for name in ours if table[name].language_blind and name != best]
            comparisons += [{"bits": bits} | comparison(bench, rows, best, other) for other in against]
    return comparisons


def small(names: list[str], rows: dict[str, dict[str, Any]], most: float) -> list[str]:
    """The rows of no more than so many bits per weight."""
    return [name for name in names if rows[name]["bits"] <= most]


def decode_speeds(names: list[str], table: dict[str, Run]) -> dict[str, float]:
    """Tokens per second of decoding one sequence after a prompt, by row, for those that compute as they are used.

    All of them take turns, so that what disturbs the machine disturbs all; the number is the median step's. Weights are
    rounded to nearest and clips come from little text: neither changes how long a step takes.
    """
    model, tokenizer = embedded.load_model()
    model = model.to(torch.bfloat16)
    texts = tokenize(embedded.load_texts(LANGUAGES), tokenizer)
    tag = LANGUAGES[0]
    (window,) = texts[tag].windows(tag, tokens=bench_model.PROMPT, seqlen=bench_model.PROMPT)
    ids = torch.from_numpy(window.ids)[None]
    profiles: dict[str, Profile] = {}
    models: dict[str, nn.Module] = {}
    previous = None
    for name in names:
        run = table[name]
        if run.config is None:
            candidate = model if run.weights is None else baselines.package_copy(model, run.weights)[0]
        else:
            if run.profile not in profiles:
                settings, languages = PROFILES[run.profile]
                few = {language: texts[language] for language in languages or LANGUAGES}
                options = settings | {"second_moments": False}
                profiles[run.profile] = la_aciq.calibrate(model, few, tokens=64, seqlen=64, progress=False, **options)
            config = replace(run.config, rounding="nearest")
            candidate = quantize_model(model, profiles[run.profile], config, like=previous, progress=False)
            previous = candidate if config.quantizes_linear else previous
        models[name] = candidate.eval()
    steps: dict[str, list[float]] = {name: [] for name in models}
    gc.disable()  # collected between the turns
    with torch.inference_mode():
        for turn in range(SPEED_ROUNDS + 1):
            for name, one in models.items():
                _, step_seconds = bench_model.run(one, ids)
                steps[name] += step_seconds if turn else []  # the first turn warms up
            gc.collect()
    return {name: 1 / statistics.median(step_seconds) for name, step_seconds in steps.items()}


def add_speeds(result: dict[str, Any], table: dict[str, Run]) -> None:
    """Measure how fast the rows of a result file decode, and put it there."""
    installed = set(baselines.packages_installed())
    names = [row["name"] for row in result["configurations"]]
    measured = [
        name
        for name in names
        if table[name].computes_as_used and table[name].weights not in set(baselines.PACKAGES) - installed
    ]
    speeds = decode_speeds(measured, table)
    for row in result["configurations"]:
        row["tokens_per_second"] = speeds.get(row["name"])
        print(f"{row['name']:45} {speeds.get(row['name'], float('nan')):6.1f} tokens/s")
    result["speed"] = {
        "device": cpu_name(),
        "threads": torch.get_num_threads(),
        "measured": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(("la-aciq", "torch", "transformers", "torchao", "bitsandbytes")),
        "prompt": bench_model.PROMPT,
    }


def chosen(names: Iterable[str], only: list[str] | None) -> list[str]:
    """The names that `--only` gives, all of them without it; one that ends with * stands for those that begin so."""

    def asked(name: str, pattern: str) -> bool:
        return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern

    return [name for name in names if only is None or any(asked(name, pattern) for pattern in only)]


def write(file: Path, result: dict[str, Any]) -> None:
    """The result file, replaced at once, so that an interrupted run leaves the one before."""
    text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
    file.with_suffix(".tmp").write_text(text + "\n", encoding="utf-8")
    file.with_suffix(".tmp").replace(file)


def in_words(pair: dict[str, Any]) -> str:
    """A `comparison` in a line."""
    mean, gap = (
        "{:+.4f} [{:+.4f}, {:+.4f}]".format(*(pair[f"{quantity}{end}"] for end in ("", "_low", "_high")))
        for quantity in ("mean", "gap")
    )
    return f"{pair['name']} - {pair['baseline']}: {mean}; gap {gap}"


def command_line(name: str, description: str, results: Path) -> argparse.ArgumentParser:
    """The parser of a command that measures rows into a result file."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.research.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these rows; NAME* is all rows that begin so")
    parser.add_argument("--again", action="store_true", help="measure rows that are in the file already again")
    parser.add_argument("--output", type=Path, default=results, help=f"result file (default: {results.name})")
    return parser


def main() -> None:
    parser = command_line("evaluation", __doc__, RESULTS)
    parser.add_argument(
        "--tokens", type=int, default=4096, help="evaluated tokens of each language (default: %(default)s)"
    )
    parser.add_argument(
        "--skip",
        type=int,
        default=CALIBRATION,
        help="tokens before the evaluated ones in each text (default: %(default)s)",
    )
    parser.add_argument(
        "--languages", nargs="+", default=LANGUAGES, metavar="TAG", help=f"default: {' '.join(LANGUAGES)}"
    )
    parser.add_argument("--speed", action="store_true", help="only measure how fast the rows of the file decode")
    arguments = parser.parse_args()
    if arguments.speed:
        result = json.loads(arguments.output.read_text(encoding="utf-8"))
        add_speeds(result, runs())
        write(arguments.output, result)
        return
    folder = ROOT / "build" / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    table = runs()
    wanted = chosen(table, arguments.only)
    bench = Bench(tuple(arguments.languages), arguments.tokens, folder, arguments.skip)
    settings = {
        "model": embedded.MODEL_NAME,
        "languages": list(bench.languages),
        "tokens": arguments.tokens,
        "calibration_tokens": CALIBRATION,
        "skipped_tokens": arguments.skip,
        "seqlen": SEQLEN,
    }
    current_versions = {
        "la_aciq": la_aciq.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    rows: dict[str, dict[str, Any]] = {}
    speed: dict[str, Any] = {}
    if arguments.output.exists():
        before = json.loads(arguments.output.read_text())
        if before["settings"] == settings and before["versions"] == current_versions:
            rows = {row["name"]: row for row in before["configurations"] if row["name"] in table}
            speed = {name: value for name, value in before.items() if name == "speed"}

    def save() -> None:
        ordered = {name: rows[name] for name in table if name in rows}
        pairs = [(one, other) for one, other in COMPARISONS if one in rows and other in rows]
        result = {
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": current_versions,
            "settings": settings,
            **speed,
            "configurations": list(ordered.values()),
            "comparisons": [comparison(bench, rows, one, other) for one, other in pairs],
            "best": best_of_ours(bench, ordered, table),
        }
        write(arguments.output, result)

    for name in wanted:
        config = table[name].config
        described = config.to_dict() if config is not None else {"weights": table[name].weights or "bfloat16"}
        if name in rows and rows[name]["config"] == described and not arguments.again:
            if config is not None:
                rows[name]["bits"] = bench.bits(table[name])
            continue
        if table[name].weights in set(baselines.PACKAGES) - set(baselines.packages_installed()):
            print(f"{name}: not installed", flush=True)
            continue
        start = time.monotonic()
        model, bits = bench.candidate(table[name])
        rows[name] = {
            "name": name,
            "bits": bits,
            "config": described,
            "tokens_per_second": rows.get(name, {}).get("tokens_per_second"),
        } | summary(bench, bench.losses(model, table[name].tagged))
        print(
            f"{name:45} {bits:5.2f} mean {rows[name]['mean']:+.4f} ±{2 * rows[name]['mean_se']:.4f} "
            f"gap {rows[name]['gap']:.3f} tail {rows[name]['tail_rate']:.1%}  {time.monotonic() - start:.0f} s",
            flush=True,
        )
        save()
    save()
    for one, other in COMPARISONS:
        if one in rows and other in rows:
            print(in_words(comparison(bench, rows, one, other)))


if __name__ == "__main__":
    main()
