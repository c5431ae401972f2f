"""What each language loses in any candidates against a reference, whatever runs them."""

import gc
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from ..calibration import tokenize
from ..calibration.texts import language_of
from ..errors import LaAciqError
from ..models import load_tokenizer
from .candidates import Candidate, TextsToRead, UnreachableError, parse
from .from_losses import report_from_losses
from .held_out import HeldOut, HeldOutStretches, HeldOutWindows, Reading
from .loss import Float64
from .report import Report
from .stored_losses import StoredLosses, locked_folder

_TOLERANCE = 0.01  # nats per token: a server's arithmetic depends on what else it computes at the time


def compare(
    reference: str,
    candidates: Sequence[str],
    *,
    texts: Mapping[str, Any],
    folder: str | os.PathLike[str],
    tokenizer: str | None = None,
    bits_per_byte: bool = False,
    seqlen: int = 512,
    tokens: int = 1024,
    skip: int | Mapping[str, int] | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Report:
    """Measure the change of candidates' losses against a reference's, language by language.

    One model is in memory at a time. The losses of each window are kept in `folder` as soon as they are measured: an
    interrupted comparison goes on from there, and a candidate or a language that is added later costs its own windows
    alone. Everything that can be checked is checked before a model runs.

    A model is named by a folder or a Hugging Face model id that transformers loads (floating-point, quantized by
    LA-ACIQ, or by a method whose package is installed), with "@bfloat16" or another dtype at its end where the usual
    one is not meant; by a .gguf file, which llama.cpp runs (package llama-cpp-python); or by the URL of a server that
    speaks OpenAI's API and gives log-probabilities of the prompt, such as vLLM's, with "#MODEL" at its end where it
    serves several. The API key of a server is read from the environment variable LA_ACIQ_API_KEY.

    Args:
        reference: the model that the candidates are compared with.
        candidates: one or more models.
        texts: by BCP-47 tag a str, or a list of str.
        folder: for the losses; it is made where it does not exist, and must otherwise be of a comparison.
        tokenizer: folder or id of the tokenizer that all models share; without it, that of the reference.
        bits_per_byte: let each model have its own tokenizer. The models read the same stretches of text, and the first
            64 bytes of each stretch are not counted.
        seqlen: tokens per window.
        tokens: tokens read per language.
        skip: tokens left out at the start of each text; without it, the most that the clips of a model of LA-ACIQ were
            chosen on.
        device: of the models that run in this process.
        dtype: "float32", "bfloat16", "float16" or "auto", of models that transformers loads and whose name has none;
            without it, float32 on a CPU and the dtype of the file elsewhere and for quantized models.
        seed: of the bootstrap.
        progress: show a progress bar.

    Returns:
        The report, with the candidates in this order.

    Raises:
        LaAciqError: a model does not exist, cannot be loaded, has another vocabulary, gives no log-probabilities, or
            gives a loss that is not finite; a text is too short; the folder is in use or holds something else, or a
            file of losses is damaged. Losses that were measured before are kept.
        TypeError: a text is of another type.
    """
    if not candidates:
        raise LaAciqError("candidates is empty; expected at least one model to compare with the reference")
    models = parse([reference, *candidates], device, dtype)
    shared = models[0].tokenizer() if tokenizer is None else load_tokenizer(tokenizer)
    if skip is None:
        calibrated = [model.calibration_tokens for model in models]
        skip = {tag: max(counts.get(tag, 0) for counts in calibrated) for tag in set().union(*calibrated)}
    held_out, measurements = _plan(models, shared, texts, bits_per_byte, seqlen, tokens, skip)
    identities = [model.identity() for model in models]
    with locked_folder(folder) as losses_folder:
        stored = [StoredLosses(losses_folder, identity) for identity in identities]
        for measurement, losses in zip(measurements, stored, strict=True):
            measurement.check(losses)
        total = sum(measurement.num_windows for measurement in measurements)
        left = sum(len(measurement.missing(losses)) for measurement, losses in zip(measurements, stored, strict=True))
        with tqdm(
            total=total, initial=total - left, desc="Comparing", unit="window", disable=not progress, smoothing=0.1
        ) as bar:
            for measurement, losses in zip(measurements, stored, strict=True):
                bar.set_postfix_str(measurement.candidate.name)
                measurement.run(losses, bar)
                gc.collect()  # a model's modules refer to each other in circles
    sums = [measurement.sums(losses) for measurement, losses in zip(measurements, stored, strict=True)]
    descriptions = [losses.description for losses in stored]
    return report_from_losses(
        held_out,
        sums[0],
        {
            model.name: (after, description)
            for model, after, description in zip(models[1:], sums[1:], descriptions[1:], strict=True)
            if description is not None
        },
        model={
            "name": models[0].name,
            "config": {} if descriptions[0] is None else descriptions[0].config,
            "identity": identities[0],
        },
        seed=seed,
        settings={"bits_per_byte": bits_per_byte},
    )


@dataclass(frozen=True)
class _Measurement:
    """What one model reads."""

    candidate: Candidate
    readings: Mapping[str, Sequence[Reading]]
    texts: TextsToRead

    @property
    def num_windows(self) -> int:
        return sum(map(len, self.readings.values()))

    def missing(self, losses: StoredLosses) -> list[tuple[str, str, Reading]]:
        """Tag, key and reading of the windows whose losses are not known."""
        keyed = [(tag, reading.key(tag), reading) for tag, readings in self.readings.items() for reading in readings]
        return [entry for entry in keyed if losses.description is None or entry[1] not in losses.sums]

    def check(self, losses: StoredLosses) -> None:
        """Check that the model can read what is missing, and that it still gives the losses that are stored."""
        missing = self.missing(losses)
        if not missing and self.candidate.certain:
            return
        try:
            self.candidate.check(self.texts)
        except UnreachableError as error:
            if missing:
                raise
            tqdm.write(f"la-aciq: {error}; its losses of an earlier comparison are used", file=sys.stderr)
            return
        if not self.candidate.certain:
            self._confirm(losses)

    def _confirm(self, losses: StoredLosses) -> None:
        """Measure a window again whose losses are stored."""
        for tag, readings in self.readings.items():
            for reading in readings:
                before = losses.sums.get(reading.key(tag))
                if before is None:
                    continue
                with self.candidate.opened() as model:
                    after = reading.sums(model.nats(reading.window, tag))
                if abs(after.sum() - before.sum()) > _TOLERANCE * (len(reading.window.ids) - 1):
                    raise LaAciqError(
                        f"{self.candidate.name} gives other losses than those in {str(losses.file)!r}: another model "
                        "is served under this name now; delete the file, and its losses are measured again"
                    )
                return

    def run(self, losses: StoredLosses, bar: Any) -> None:
        """Load the model and measure what is missing."""
        missing = self.missing(losses)
        if not missing:
            return
        with self.candidate.opened() as model:
            losses.describe(model.description)
            for tag, key, reading in missing:
                if key not in losses.sums:
                    try:
                        nats = model.nats(reading.window, tag)
                    except LaAciqError as error:
                        raise LaAciqError(f"{self.candidate.name}: {error}") from error
                    losses.add(key, tag, reading.sums(nats))
                bar.update()

    def sums(self, losses: StoredLosses) -> dict[str, Float64]:
        """Nats of each segment by language, float64 [segments]."""
        return {
            tag: np.concatenate([losses.sums[reading.key(tag)] for reading in readings])
            for tag, readings in self.readings.items()
        }


def _plan(
    models: Sequence[Candidate],
    tokenizer: Any,
    texts: Mapping[str, Any],
    bits_per_byte: bool,
    seqlen: int,
    tokens: int,
    skip: int | Mapping[str, int],
) -> tuple[HeldOut, list[_Measurement]]:
    """The text that is held out, and what each model reads of it."""
    tokenized = tokenize(texts, tokenizer)
    if not bits_per_byte:
        windows = HeldOutWindows.cut(tokenized, seqlen, tokens, skip)
        readings = windows.readings()
        return windows, [_Measurement(model, readings, TextsToRead(windows.windows, tokenizer)) for model in models]
    contents = {language_of(tag, "texts"): text for tag, text in texts.items()}
    for tag, text in contents.items():
        if not isinstance(text, str):
            raise TypeError(f"texts[{tag!r}]: expected a str for bits per byte, got {type(text).__name__}")
    stretches = HeldOutStretches.cut(contents, tokenized, seqlen, tokens, skip)
    measurements = []
    for model in models:
        model_tokenizer = model.tokenizer()
        readings = stretches.readings(model_tokenizer, model.name)
        cut = {tag: [reading.window for reading in several] for tag, several in readings.items()}
        measurements.append(_Measurement(model, readings, TextsToRead(cut, model_tokenizer)))
    return stretches, measurements
