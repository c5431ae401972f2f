"""How much of what is served is clipped, by language, and clips that follow it (`la-aciq serve --adapt`).

Both need sums over the inputs of the quantized layers that the quantize kernel returns on request (`tail_sums`), for
static clips. One step in many is a sample: every layer quantizes its input once more for the sums. Such a step runs
outside of vLLM's compiled graph; steps that a CUDA graph replays cannot be samples, so that with graphs the prefills
longer than the largest graph are.

The engine says when the clips move, after a number of steps and before the next one is scheduled. Every worker then
takes one step of `clipping.adapt` with the sums it has, and the engine counts the moves of each row, which are part of
the prefix cache's keys. Rows move by their own tokens alone. The sink's never does: its tokens are of all languages.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ... import ops
from ...clipping.adapt import AdaptationRule, Adapted, rolled_back, start, update
from ...errors import LaAciqError
from ...nn.linear import LanguageAwareLinear, entries_of
from ...nn.quantize import Quantization
from ...profile import Profile
from ...tags import SINK
from .serve import ADAPT, SAMPLE_STEPS

SAMPLES = 16  # between two moves of the clips
RULE = AdaptationRule()


def sample_steps() -> int:
    """One step in so many is a sample; 0: none is."""
    return int(os.environ.get(SAMPLE_STEPS, "64"))


def sampled(done: Quantization) -> bool:
    """Whether the layers of a quantized model have static clips, and are sampled."""
    return done.config.activations < 16 and done.config.clip == "static" and sample_steps() > 0


def check_adaptable(done: Quantization, profile: Profile) -> None:
    """Raises `LaAciqError` where a model's clips cannot follow what is served, or were not made of this profile."""
    config = done.config
    if config.activations == 16 or config.clip != "static":
        raise LaAciqError(f"--adapt needs static clips of activations, got clip = {config.clip!r}; see quantize --clip")
    if config.sharing != "language":
        raise LaAciqError("--adapt needs clips by language, got sharing = 'pooled': one language would move all clips")
    if sample_steps() == 0:
        raise LaAciqError(f"--adapt needs samples, got {SAMPLE_STEPS}=0")
    profile.check_fingerprint(done.fingerprint)
    if bool(profile.metadata.get("center")) != bool(config.center):
        raise LaAciqError(f"--adapt needs the profile the model was quantized with; its center is not {config.center}")
    if missing := [row for row in done.state.entries if row not in profile.entries]:
        raise LaAciqError(f"--adapt needs the profile the model was quantized with; it has no row {missing[0]!r}")


class TailSums:
    """The sums of one layer's inputs, and its clips as they move.

    name: of the layer in the checkpoint, one of those that vLLM fuses. first: the first of the input's groups that this
    rank has. copied: whether every rank has the same input. seen: float64 [rows, 2], values and clipped ones, all time.
    """

    def __init__(self, name: str, layer: LanguageAwareLinear, first: int, copied: bool) -> None:
        if layer.clips is None:
            raise RuntimeError("a layer with static clips has a table of them")
        self.name, self.layer, self.first, self.copied = name, layer, first, copied
        self.clip = layer.clips
        self._sums = torch.zeros(*self.clip.shape, 4, dtype=torch.float64, device=self.clip.device)
        self._seen = torch.zeros(len(self.clip), 2, dtype=torch.float64, device=self.clip.device)
        self.adapted: Adapted | None = None

    def add(self, x: torch.Tensor, language: torch.Tensor) -> None:
        """Count a step's inputs x [tokens, K] under their rows, int32 [tokens]; nothing waits for the device."""
        layer, config = self.layer, self.layer.config
        if layer.center is not None:
            x = x - entries_of(layer.center, language, x).to(x.dtype)
        _, sums = ops.quantize(
            x,
            self.clip,
            language,
            group_size=config.activation_group_size or None,
            codebook=config.codebook,
            signs=layer.signs,
            block_size=layer.block_size or None,
            tail_sums=True,
        )
        self._sums += sums
        self._seen += sums[..., :2].sum(1)

    def seen(self) -> np.ndarray[Any, Any]:
        found: np.ndarray[Any, Any] = self._seen.cpu().numpy()
        return found

    def calibrate(self, profile: Profile) -> None:
        """Let the clips move, from where the profile's data left them."""
        rows = [profile.entries.index(row) for row in self.layer.state.entries]
        site = profile.sites[profile.layers[self.name]]
        clips = self.clip.double().cpu().numpy()
        groups = slice(self.first, self.first + clips.shape[1]) if clips.shape[1] > 1 else slice(None)
        alpha = np.ones((len(profile.entries), site.groups))
        alpha[rows, groups] = clips
        sums = np.stack([site.histogram[..., 0].sum(-1), *site.tail_sums(alpha)], axis=-1)[rows, groups]
        self.adapted = start(clips, sums if clips.shape[1] > 1 else sums.sum(1, keepdims=True))

    def move(self, rows: Iterable[int]) -> set[int]:
        """Move the clips of these rows by what was counted under them; returns the rows that moved."""
        if self.adapted is None:
            raise RuntimeError("clips move from those of a profile: calibrate")
        sums = self._sums.cpu().numpy()
        moved = self._use(update(self.adapted, sums, list(rows), RULE))
        # What was too little for a step waits for more; what was enough was counted at a clip of the past.
        self._sums[torch.from_numpy(sums[..., 0] >= RULE.minimum)] = 0
        return moved

    def roll_back(self) -> set[int]:
        """The checkpoint's clips again; returns the rows that had others."""
        if self.adapted is None:
            return set()
        self._sums.zero_()
        return self._use(rolled_back(self.adapted))

    def _use(self, new: Adapted) -> set[int]:
        if self.adapted is None or new is self.adapted:
            return set()
        new = replace(new, alpha=new.alpha.astype(np.float32).astype(np.float64))  # as the kernel has it
        changed = (new.alpha != self.adapted.alpha).any(axis=1)
        self.adapted = new
        self.clip.copy_(torch.from_numpy(new.alpha))
        return set(np.flatnonzero(changed).tolist())

    def ratio(self) -> np.ndarray[Any, Any]:
        """By row the mean logarithm of its clips over the checkpoint's."""
        if self.adapted is None:
            return np.zeros(len(self.clip))
        ratio: np.ndarray[Any, Any] = np.log(self.adapted.alpha / self.adapted.calibrated).mean(axis=1)
        return ratio


@dataclass
class Moves:
    """What an engine knows of its workers' clips. moves: by row, how often they were moved or rolled back.
    adapting: None until the engine's first step.
    """

    moves: list[int]
    adapting: bool | None = None
    steps: int = 0


# --- In the engine --------------------------------------------------------------------------------------------------


def after_step(engine: Any, config: Any) -> None:
    """After each step of an engine's model: let the clips move when it is time."""
    known: Moves = config.moves
    if known.adapting is None:
        known.adapting = ADAPT in os.environ
        engine.model_executor.collective_rpc(_begin)
    known.steps += 1
    if known.adapting and known.steps % (sample_steps() * SAMPLES) == 0:
        _count(known, engine.model_executor.collective_rpc(_move))


def roll_back(engine: Any, config: Any) -> list[str]:
    """The checkpoint's clips again, until the engine starts anew; returns the rows that had others."""
    known: Moves = config.moves
    known.adapting = False
    moved = _count(known, engine.model_executor.collective_rpc(_roll_back))
    return [config.done.state.entries[row] for row in sorted(moved)]


def report(engine: Any, config: Any) -> dict[str, list[Any]]:
    """By row: [values, clipped values, moves, the geometric mean of its clips over the checkpoint's]."""
    found = engine.model_executor.collective_rpc(_report)
    seen = np.sum([seen for seen, _ in found], axis=0)
    ratios = np.exp(np.mean([ratio for _, ratio in found], axis=0))
    rows = config.done.state.entries
    return {row: [*seen[i].tolist(), config.moves.moves[i], float(ratios[i])] for i, row in enumerate(rows)}


def _count(known: Moves, moved: list[list[int]]) -> set[int]:
    rows = {row for own in moved for row in own}
    for row in rows:
        known.moves[row] += 1
    return rows


# --- In a worker ----------------------------------------------------------------------------------------------------


def _begin(worker: Any) -> None:
    """Sample from now on."""
    from vllm.forward_context import get_forward_context

    rows = worker.vllm_config.quant_config.rows

    def leave_the_graph(*_: Any) -> None:
        if rows.sampling:
            get_forward_context().skip_compiled = True

    worker.get_model().register_forward_pre_hook(leave_the_graph)
    rows.sample_steps = sample_steps()


def _move(worker: Any) -> list[int]:
    config = worker.vllm_config.quant_config
    rows = [row for row, name in enumerate(config.done.state.entries) if name != SINK]
    return sorted({row for sums in config.tail_sums for row in sums.move(rows)})


def _roll_back(worker: Any) -> list[int]:
    return sorted({row for sums in worker.vllm_config.quant_config.tail_sums for row in sums.roll_back()})


def _report(worker: Any) -> tuple[Any, Any]:
    config = worker.vllm_config.quant_config
    own = [sums for sums in config.tail_sums if worker.rank == 0 or not sums.copied]
    nothing = np.zeros((len(config.done.state.entries), 2))
    ratios = [sums.ratio() for sums in config.tail_sums] or [nothing[:, 0]]
    return sum((sums.seen() for sums in own), nothing), np.mean(ratios, axis=0)
