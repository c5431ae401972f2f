"""Counts what the clips of a layer cut off of served inputs, and moves the clips of `la-aciq serve --adapt`.

Both need sums over the inputs of the quantized layers, which the quantize kernel returns on request (`tail_sums`), for
static clips.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ... import ops
from ...clipping.adapt import AdaptationRule, Adapted, rolled_back, start, update
from ...errors import LaAciqError
from ...nn.linear import LanguageAwareLinear, entries_of
from ...nn.quantize import Quantization
from ...profile import Profile
from .settings import SAMPLE_STEPS, sample_steps

RULE = AdaptationRule()


def is_sampled(quantization: Quantization) -> bool:
    """Whether the layers of a quantized model have static clips, and steps are sampled."""
    config = quantization.config
    return config.activations < 16 and config.clip == "static" and sample_steps() > 0


def check_adaptable(quantization: Quantization, profile: Profile) -> None:
    """Check that a model's clips can follow what is served.

    Args:
        quantization: of the model.
        profile: of the data that the model was quantized with.

    Raises:
        LaAciqError: the clips cannot move, or the model was not quantized with this profile.
    """
    config = quantization.config
    if config.activations == 16 or config.clip != "static":
        raise LaAciqError(f"--adapt needs static clips of activations, got clip = {config.clip!r}; see quantize --clip")
    if config.sharing != "language":
        raise LaAciqError("--adapt needs clips by language, got sharing = 'pooled': one language would move all clips")
    if sample_steps() == 0:
        raise LaAciqError(f"--adapt needs samples, got {SAMPLE_STEPS}=0")
    profile.check_fingerprint(quantization.fingerprint)
    if bool(profile.metadata.get("center")) != bool(config.center):
        raise LaAciqError(f"--adapt needs the profile the model was quantized with; its center is not {config.center}")
    if missing := [entry for entry in quantization.state.entries if entry not in profile.entries]:
        raise LaAciqError(f"--adapt needs the profile the model was quantized with; it has no entry {missing[0]!r}")


class TailSums:
    """The sums over one layer's inputs, and the layer's clips as they move.

    Args:
        name: of the layer in the checkpoint; where vLLM fuses layers, of the first of them.
        layer: a layer with static clips.
        first_group: the first of the input's groups that this rank has.
        same_input: whether every rank has the same input.

    Attributes:
        clips: float32 [num_entries, groups], the table that the layer reads.
        adapted: the state of the moving clips; None until `calibrate`.
    """

    def __init__(self, name: str, layer: LanguageAwareLinear, first_group: int, same_input: bool) -> None:
        if layer.clips is None:
            raise RuntimeError("a layer with static clips has a table of them")
        self.name, self.layer, self.first_group, self.same_input = name, layer, first_group, same_input
        self.clips = layer.clips
        self._sums = torch.zeros(*self.clips.shape, 4, dtype=torch.float64, device=self.clips.device)
        self._totals = torch.zeros(len(self.clips), 2, dtype=torch.float64, device=self.clips.device)
        self.adapted: Adapted | None = None

    def add(self, x: torch.Tensor, language_ids: torch.Tensor) -> None:
        """Add a step's inputs to the sums, without waiting for the device.

        Args:
            x: [tokens, K].
            language_ids: int32 [tokens].
        """
        layer, config = self.layer, self.layer.config
        if layer.center is not None:
            x = x - entries_of(layer.center, language_ids, x).to(x.dtype)
        _, sums = ops.quantize(
            x,
            self.clips,
            language_ids,
            group_size=config.activation_group_size or None,
            codebook=config.codebook,
            signs=layer.signs,
            block_size=layer.block_size or None,
            tail_sums=True,
        )
        self._sums += sums
        self._totals += sums[..., :2].sum(1)

    def totals(self) -> np.ndarray[Any, Any]:
        """Return float64 [num_entries, 2]: values and clipped values since the engine started."""
        totals: np.ndarray[Any, Any] = self._totals.cpu().numpy()
        return totals

    def calibrate(self, profile: Profile) -> None:
        """Let the clips move, starting where the profile's data left them."""
        entries = [profile.entries.index(entry) for entry in self.layer.state.entries]
        site = profile.sites[profile.layers[self.name]]
        clips = self.clips.double().cpu().numpy()
        groups = slice(self.first_group, self.first_group + clips.shape[1]) if clips.shape[1] > 1 else slice(None)
        all_clips = np.ones((len(profile.entries), site.groups))
        all_clips[entries, groups] = clips
        sums = np.stack([site.histogram[..., 0].sum(-1), *site.tail_sums(all_clips)], axis=-1)[entries, groups]
        self.adapted = start(clips, sums if clips.shape[1] > 1 else sums.sum(1, keepdims=True))

    def move(self, entries: Iterable[int]) -> set[int]:
        """Move the clips of these entries by one step, and return the entries whose clips moved."""
        if self.adapted is None:
            raise RuntimeError("clips move from those of a profile: calibrate")
        sums = self._sums.cpu().numpy()
        moved = self._use(update(self.adapted, sums, list(entries), RULE))
        # Sums that were too small for a step wait for more; the others were counted at a clip of the past.
        self._sums[torch.from_numpy(sums[..., 0] >= RULE.minimum)] = 0
        return moved

    def roll_back(self) -> set[int]:
        """Restore the checkpoint's clips, and return the entries that had others."""
        if self.adapted is None:
            return set()
        self._sums.zero_()
        return self._use(rolled_back(self.adapted))

    def _use(self, new: Adapted) -> set[int]:
        if self.adapted is None or new is self.adapted:
            return set()
        new = replace(new, clips=new.clips.astype(np.float32).astype(np.float64))  # as the kernel has it
        changed = (new.clips != self.adapted.clips).any(axis=1)
        self.adapted = new
        self.clips.copy_(torch.from_numpy(new.clips))
        return set(np.flatnonzero(changed).tolist())

    def log_ratios(self) -> np.ndarray[Any, Any]:
        """Return float64 [num_entries]: the mean logarithm of the clips over the checkpoint's."""
        if self.adapted is None:
            return np.zeros(len(self.clips))
        ratios: np.ndarray[Any, Any] = np.log(self.adapted.clips / self.adapted.calibrated).mean(axis=1)
        return ratios
