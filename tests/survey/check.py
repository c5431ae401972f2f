"""One architecture: a tiny model is calibrated, quantized, run in every way, saved, loaded, compared with itself."""

import inspect
import math
import re
import statistics
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import la_aciq
from la_aciq.checkpoint import load_quantized
from la_aciq.errors import LaAciqError
from la_aciq.nn import QuantConfig

from .architectures import FIRST_ID, VOCABULARY, Architecture, tiny_model

TAGS = ("en", "sw", "th")
LENGTHS = (12, 7, 9)  # of the rows of a padded batch
NEW_TOKENS = 4
TOKENS, WINDOW = 96, 32  # of each language in calibration
GROUP = 16
SEEDS = (0, 1, 2)
# Relative to the largest logit of a row. Beside other rows, products are summed in another order; a value at the border
# of two codes then gets the other code now and then. The median over three inputs does not see such a single case.
TOLERANCE = 1e-4

CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "static": {"clip": "static"},
    "kv=4": {"activations": 16, "kv": 4, "kv_clip": "static"},
}

Call = dict[str, torch.Tensor]


class Subject:
    """A model, quantized or not, and how it is called.

    features: the name and the shape [...] of what its encoder reads for one row; None for token ids.
    """

    def __init__(self, model: Any, features: tuple[str, tuple[int, ...]] | None) -> None:
        self.model = model
        self.features = features
        self.takes = inspect.signature(model.forward).parameters
        self.encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))

    def batch(self, rows: list[torch.Tensor], side: str | None = None) -> Call:
        """The arguments of a call with these rows of token ids, padded on this side to the longest."""
        if self.features is not None:
            return {self.features[0]: torch.stack([self._features(row) for row in rows])}
        if side is None:
            return {"input_ids": torch.stack(rows)}
        width = max(map(len, rows))
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            span = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
            ids[place, span], mask[place, span] = row, 1
        call = {"input_ids": ids, "attention_mask": mask}
        if side == "left" and "position_ids" in self.takes and not self.encoder_decoder:
            call["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        return call

    def texts(self) -> dict[str, Any]:
        """What the model is calibrated on, by language: token ids, or calls where it reads features."""
        texts = random_texts()
        if self.features is None:
            return texts
        return {
            tag: [
                self.batch([torch.from_numpy(ids[span])]) | {"decoder_input_ids": torch.from_numpy(ids[span])[None]}
                for span in (slice(0, 24), slice(24, 48))
            ]
            for tag, ids in texts.items()
        }

    def logits(self, call: Call) -> torch.Tensor:
        """[batch, tokens, vocabulary] of one pass without a cache."""
        if self.encoder_decoder and "decoder_input_ids" not in call:
            batch = len(next(iter(call.values())))
            call = call | {"decoder_input_ids": random_ids(7, 6).expand(batch, -1)}
        switches = {"use_cache": False} if "use_cache" in self.takes else {}
        with torch.no_grad():
            logits: torch.Tensor = self.model(**call, **switches).logits
        return logits

    def generated(self, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids [batch, NEW_TOKENS] of greedy decoding with a cache, and logits [batch, NEW_TOKENS, vocabulary]."""
        out = self.model.generate(
            **{name: value for name, value in call.items() if name != "position_ids"},
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            num_beams=1,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return out.sequences[:, -NEW_TOKENS:], torch.stack(out.logits, dim=1)

    def _features(self, row: torch.Tensor) -> torch.Tensor:
        """Random features that belong to a row of ids; their scale differs from row to row."""
        assert self.features is not None
        number = int(row.sum())
        values = torch.randn(self.features[1], generator=torch.Generator().manual_seed(number))
        return values * (1 + number % 3)


def random_ids(seed: int, length: int) -> torch.Tensor:
    """Token ids [length], no special ones."""
    return torch.from_numpy(np.random.default_rng(seed).integers(FIRST_ID, VOCABULARY, length))


def random_rows(seed: int, lengths: tuple[int, ...]) -> list[torch.Tensor]:
    """Rows of token ids of these lengths."""
    return [random_ids(10 * seed + place, length) for place, length in enumerate(lengths)]


def random_texts() -> dict[str, NDArray[np.int64]]:
    """Token ids by language, each from its own part of the vocabulary."""
    random = np.random.default_rng(0)
    width = (VOCABULARY - FIRST_ID) // 2
    starts = np.linspace(FIRST_ID, VOCABULARY - width, len(TAGS)).astype(int)
    return {tag: random.integers(start, start + width, TOKENS) for tag, start in zip(TAGS, starts, strict=True)}


def deviation(values: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest expected magnitude; infinite where a value is not finite."""
    if values.shape != expected.shape:
        raise AssertionError(f"logits of shape {list(values.shape)} beside {list(expected.shape)}")
    ratio = float((values - expected).abs().max() / expected.abs().max())
    return ratio if math.isfinite(ratio) else math.inf


def check_batch(subject: Subject, seed: int, side: str | None = None) -> float:
    """One pass over rows of three languages, each compared with itself alone; padded on a side, or of one length."""
    rows = random_rows(seed, LENGTHS if side else (LENGTHS[0],) * len(TAGS))
    with la_aciq.languages(TAGS):
        together = subject.logits(subject.batch(rows, side))
    worst = 0.0
    for row, tag, logits in zip(rows, TAGS, together, strict=True):
        with la_aciq.language(tag):
            expected = subject.logits(subject.batch([row]))[0]
        if side is not None and not subject.encoder_decoder:
            logits = logits[: len(row)] if side == "right" else logits[-len(row) :]
        worst = max(worst, deviation(logits, expected))
    return worst


def check_cache(subject: Subject, seed: int) -> float:
    """Logits of decoding token by token with a cache, compared with those of one pass over the decoded sequence."""
    call = subject.batch(random_rows(seed, (LENGTHS[0],) * len(TAGS)))
    with la_aciq.languages(TAGS):
        ids, logits = subject.generated(call)
        if subject.encoder_decoder:
            start = torch.full_like(ids[:, :1], subject.model.generation_config.decoder_start_token_id)
            call["decoder_input_ids"] = torch.cat([start, ids[:, :-1]], dim=1)
        else:
            call["input_ids"] = torch.cat([call["input_ids"], ids[:, :-1]], dim=1)
        whole = subject.logits(call)
    return deviation(logits, whole[:, -NEW_TOKENS:])


def check_generate(subject: Subject, seed: int) -> float:
    """`generate` on a padded batch of three languages: the logits of each row compared with those of itself alone."""
    rows = random_rows(seed, LENGTHS)
    with la_aciq.languages(TAGS):
        together = subject.generated(subject.batch(rows, "right" if subject.encoder_decoder else "left"))[1]
    worst = 0.0
    for row, tag, logits in zip(rows, TAGS, together, strict=True):
        with la_aciq.language(tag):
            worst = max(worst, deviation(logits, subject.generated(subject.batch([row]))[1][0]))
    return worst


CHECKS: dict[str, Callable[[Subject, int], float]] = {
    "batch": check_batch,
    "padding right": lambda subject, seed: check_batch(subject, seed, "right"),
    "padding left": lambda subject, seed: check_batch(subject, seed, "left"),
    "cache": check_cache,
    "generate": check_generate,
}
GENERATING = ("cache", "generate")
PADDING = ("padding right", "padding left")


def check_loading(subject: Subject) -> bool:
    """Whether the model, quantized or not, saved and loaded, gives the same logits bit for bit."""
    call = subject.batch(random_rows(0, (LENGTHS[0],) * len(TAGS)))
    load = load_quantized if hasattr(subject.model, "la_aciq") else type(subject.model).from_pretrained
    with tempfile.TemporaryDirectory() as folder:
        subject.model.save_pretrained(folder)
        loaded = Subject(load(folder).eval(), subject.features)
        with la_aciq.languages(TAGS):
            return torch.equal(loaded.logits(call), subject.logits(call))


def attempt(run: Callable[[], Any]) -> tuple[str, Any]:
    """("", the value), ("refused", the sentence) for an error of ours, or ("error", its last line)."""
    try:
        return "", run()
    except LaAciqError as error:
        return "refused", str(error)
    except Exception as error:  # whatever it is, it is this architecture's result
        frames = traceback.extract_tb(error.__traceback__)[:-4:-1]
        places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames)
        return "error", f"{type(error).__name__}: {' '.join(str(error).split())[:300]} [{places}]"


def median(check: Callable[[Subject, int], float], subject: Subject) -> float:
    """The deviation with the first seed, or the median over the seeds where that one is not within the tolerance."""
    first = check(subject, SEEDS[0])
    return first if first <= TOLERANCE else statistics.median([first, *(check(subject, seed) for seed in SEEDS[1:])])


def outcome(check: Callable[[Subject, int], float], subject: Subject) -> str:
    """The outcome of one check of a quantized model in a word or a sentence."""
    problem, value = attempt(lambda: median(check, subject))
    if problem:
        return f"{problem}: {value}"
    return "holds" if value <= TOLERANCE else f"differs: {value:.1e}"


def survey(architecture: Architecture, configs: Sequence[str] = tuple(CONFIGS)) -> dict[str, Any]:
    """What becomes of an architecture under these of the configurations: its `status`, and what belongs to it.

    "holds": every check holds that the unquantized model itself passes. "refused": by `calibrate` or `quantize_model`,
    with the reason. "fails": something else. "not built", "not run": transformers' own model does not, with these sizes
    and inputs.
    """
    warnings.simplefilter("ignore")
    result: dict[str, Any] = {"class": architecture.class_name}
    problem, model = attempt(lambda: tiny_model(architecture))
    if problem:
        return result | {"status": "not built", "reason": model}
    original = Subject(model, architecture.features)
    names = _names_of_checks(architecture, model)
    same: dict[str, bool | None] = {}  # of the unquantized model: None where it cannot be called so
    for name in names:
        problem, value = attempt(lambda name=name: median(CHECKS[name], original))
        same[name] = None if problem else value <= TOLERANCE
        if problem and name == "batch":
            return result | {"status": "not run", "reason": value}
    loads = attempt(lambda: check_loading(original)) == ("", True)
    result["not compared"] = [name for name in names if not same[name]] + ([] if loads else ["load"])
    passes: list[None] = []
    handle = model.register_forward_pre_hook(lambda *_: passes.append(None))
    problem, profile = attempt(
        lambda: la_aciq.calibrate(
            model, original.texts(), seqlen=WINDOW, tokens=TOKENS, group_size=GROUP, progress=False
        )
    )
    handle.remove()
    if problem:
        status = "refused" if problem == "refused" else "fails"
        return result | {"status": status, "stage": "calibrate", "passes": len(passes), "reason": profile}
    outcomes: dict[str, str] = {}
    for label in configs:
        if label == "kv=4" and not model.can_generate():
            continue
        config = QuantConfig(group_size=GROUP, **CONFIGS[label])
        problem, quantized = attempt(
            lambda config=config: la_aciq.quantize_model(model, profile, config, progress=False)
        )
        if problem == "refused" and label != "kv=4":
            return result | {"status": "refused", "stage": "quantize", "passes": 0, "reason": quantized}
        if problem:
            outcomes[f"{label}: quantize"] = f"{problem}: {quantized}"
            continue
        if "layers" not in result:
            result |= {"configs": list(configs)}
            result |= {"layers": len(quantized.la_aciq.layers), "left alone": left_alone(quantized.la_aciq.skipped)}
        subject = Subject(quantized, architecture.features)
        for name in names:
            if same[name]:
                outcomes[f"{label}: {name}"] = outcome(CHECKS[name], subject)
            elif same[name] is False:  # it runs, and there is nothing to compare with
                problem, value = attempt(lambda name=name, subject=subject: CHECKS[name](subject, 0))
                outcomes[f"{label}: {name}"] = f"{problem}: {value}" if problem else "holds"
        problem, value = attempt(lambda subject=subject: check_loading(subject))
        value = value or not loads
        outcomes[f"{label}: load"] = f"{problem}: {value}" if problem else "holds" if value else "differs"
    result["limits"] = {name: text.partition(": ")[2] for name, text in outcomes.items() if text.startswith("refused")}
    faults = {name: text for name, text in outcomes.items() if text.startswith(("error", "differs"))}
    late = [name for name in result["limits"] if name.endswith(": batch")]
    if faults or late:
        return result | {"status": "fails", "reason": faults or "refuses every call, after it was quantized"}
    return result | {"status": "holds"}


def _names_of_checks(architecture: Architecture, model: Any) -> list[str]:
    generates = model.can_generate() and architecture.kind != "masked"
    absent = (() if generates else GENERATING) + (PADDING if architecture.features else ())
    return [name for name in CHECKS if name not in absent]


def left_alone(skipped: dict[str, str]) -> dict[str, str]:
    """The reasons by layer, the numbers of blocks replaced by "*"; without the output head and tied weights."""
    expected = ("ignored by the configuration", "its weight is tied to another layer's")
    return {
        re.sub(r"\b\d+\b", "*", name): reason for name, reason in skipped.items() if not reason.startswith(expected)
    }
