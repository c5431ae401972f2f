"""What to quantize and how to choose the clips."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from fnmatch import fnmatchcase
from numbers import Real
from typing import Any

from .. import choices
from ..choices import ActivationClip, Codebook, LanguageObjective
from ..errors import LaAciqError

ABSMAX_SHARE = 0.9  # of the largest magnitude, for INT4 "absmax" clips: a little of it clipped has the smaller error

_CHOICES: dict[str, tuple[Any, ...]] = {
    "weights": choices.WEIGHT_BITS,
    "activations": choices.ACTIVATION_BITS,
    "kv": choices.KV_BITS,
    "codebook": choices.CODEBOOKS,
    "clip": choices.ACTIVATION_CLIPS,
    "kv_clip": choices.ACTIVATION_CLIPS,
    "sharing": choices.SHARINGS,
    "granularity": choices.GRANULARITIES,
    "objective": choices.OBJECTIVES,
    "language_objective": choices.LANGUAGE_OBJECTIVES,
    "rounding": choices.ROUNDINGS,
}


@dataclass(frozen=True)
class QuantConfig:
    """How a model is quantized. 16 bits mean "as it is".

    Attributes:
        weights, activations, kv: bits of the linear layers' weights (4, 16), of their inputs (4, 8, 16) and of the key
            and value cache (4, 16; see `LanguageAwareCache`).
        group_size: elements along K that share a weight's clip and, with granularity "group", an activation's clip:
            even, or 0 for one group per row. It is the one that the profile was measured with.
        codebook: "midrise" or "midtread".
        clip: how the activations' clip is chosen. "static": read from the table, which the languages' statistics made.
            "rms": a factor of the table times the root mean square of the token's group. "absmax": the largest
            magnitude of the token's group, no table; at INT4 0.9 of it, which has the smaller error.
        kv_clip: how the cache's clips are chosen, one per token and head: as for `clip`; "absmax" needs no table.
        sharing: "language" gives each language an entry of clips and centers, "pooled" has the pooled entry alone for
            all of them; the attention sink has an entry in both.
        sink: give the first token of a sequence, the attention sink, an entry. Without, it has its language's.
        granularity: what shares one clip of the table: a "group", a "layer", or the whole "model" (per language). With
            a dynamic clip, "token" shares one clip over a token's whole row, and the other three have one per token and
            group.
        objective: the clip's model of the quantization error, as in `clipping.optimal`.
        language_objective: how the languages' errors make one where they share a clip, as in `clipping.table`: their
            "mean", a "weighted" mean, the largest ("minimax"), or the mean and their "variance". It chooses the pooled
            clips, and those that languages with few tokens are drawn to.
        language_weights: the languages' weights by tag, not negative; a language without one has 0. Needed for
            "weighted", allowed for "minimax" (which languages count) and "variance"; None for equal weights.
        language_penalty: how much the variance counts with "variance", at least 0.
        rounding: how weights become codes. "feedback": by the error of the layer's output on the profile's second
            moments, see `nn.weights`. "nearest": each weight for itself. "auto": "feedback" where the profile has
            second moments, otherwise "nearest"; a quantized model's configuration says which.
        rotate: rotate the layers' inputs by a randomized Hadamard transform (and the weights, offline).
        center: use the mean input of each entry of the table, which the profile has. What the rounding of the weights
            adds to a layer's output for that input is taken off again (bias correction, by language), and activations
            are quantized less it. `sharing` says whose mean it is. None: if the profile has it.
        ignore: names of linear layers to leave alone: full names, last components, or shell patterns such as
            "model.layers.0.*". "lm_head" is the output head, whatever the architecture calls it.

    Raises:
        LaAciqError: a value outside these, or a combination that has no meaning or no kernel.
    """

    weights: int = 4
    activations: int = 4
    kv: int = 16
    group_size: int = choices.GROUP_SIZE
    codebook: Codebook = choices.CODEBOOK
    clip: ActivationClip = choices.CLIP
    kv_clip: ActivationClip = choices.CLIP
    sharing: str = "language"
    granularity: str = "group"
    objective: str = "exact"
    rounding: str = "auto"
    sink: bool = True
    rotate: bool = True
    center: bool | None = None
    ignore: tuple[str, ...] = ("lm_head",)
    language_objective: LanguageObjective = "mean"
    language_weights: Mapping[str, float] | None = field(default=None, hash=False)
    language_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, accepted in _CHOICES.items():
            value = getattr(self, name)
            if not isinstance(value, type(accepted[0])) or value not in accepted or isinstance(value, bool):
                raise LaAciqError(f"{name}: expected {' or '.join(repr(choice) for choice in accepted)}, got {value!r}")
        if (
            not isinstance(self.group_size, int)
            or isinstance(self.group_size, bool)
            or self.group_size < 0
            or self.group_size % 2
        ):
            raise LaAciqError(
                f"group_size: expected an even number of elements, or 0 for the whole row, got {self.group_size!r}"
            )
        for name in ("sink", "rotate"):
            if not isinstance(getattr(self, name), bool):
                raise LaAciqError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        if self.center is not None and not isinstance(self.center, bool):
            raise LaAciqError(f"center: expected True, False or None, got {self.center!r}")
        if not isinstance(self.ignore, list | tuple) or not all(isinstance(pattern, str) for pattern in self.ignore):
            raise LaAciqError(f"ignore: expected a list of layer names or patterns, got {self.ignore!r}")
        object.__setattr__(self, "ignore", tuple(self.ignore))
        self._check_language_objective()
        if self.granularity == "token" and self.clip == "static":
            raise LaAciqError(
                "granularity = 'token' needs clip = 'rms' or 'absmax'; got clip = 'static', without a clip per token"
            )
        if self.weights == 16 and self.activations == 8:
            raise LaAciqError(
                "activations = 8 needs weights = 4: there is no kernel for INT8 activations with 16-bit weights"
            )

    def _check_language_objective(self) -> None:
        penalty, weights = self.language_penalty, self.language_weights
        if not isinstance(penalty, Real) or isinstance(penalty, bool) or not 0 <= penalty < math.inf:
            raise LaAciqError(f"language_penalty: expected a finite number of at least 0, got {penalty!r}")
        if penalty != 1 and self.language_objective != "variance":
            raise LaAciqError(
                f"language_penalty: expected 1.0 with language_objective = {self.language_objective!r}, which has no "
                f"penalty, got {penalty!r}"
            )
        object.__setattr__(self, "language_penalty", float(penalty))
        if weights is None and self.language_objective == "weighted":
            raise LaAciqError(
                "language_weights: expected the languages' weights for language_objective = 'weighted', got None"
            )
        if weights is not None and self.language_objective == "mean":
            raise LaAciqError(
                f"language_weights: expected None with language_objective = 'mean', which has none, got {weights!r}"
            )
        if weights is None:
            return
        if (
            not isinstance(weights, Mapping)
            or not all(isinstance(tag, str) for tag in weights)
            or not all(
                isinstance(weight, Real) and not isinstance(weight, bool) and math.isfinite(weight) and weight >= 0
                for weight in weights.values()
            )
            or not sum(weights.values())
        ):
            raise LaAciqError(
                f"language_weights: expected finite weights by tag, none negative and not all zero, got {weights!r}"
            )
        object.__setattr__(self, "language_weights", {tag: float(weight) for tag, weight in weights.items()})

    @property
    def activation_group_size(self) -> int:
        """Elements along K that share an activation's clip; 0 is the whole row."""
        whole_row = self.granularity == "token" or (self.clip == "static" and self.granularity in ("layer", "model"))
        return 0 if whole_row else self.group_size

    @property
    def quantizes_linear(self) -> bool:
        """Whether linear layers have anything to quantize."""
        return min(self.weights, self.activations) < 16

    @property
    def by_language(self) -> bool:
        """Whether the languages have clips or centers of their own."""
        centers = bool(self.center) and self.quantizes_linear
        clips = (self.activations < 16 and self.clip != "absmax") or (self.kv < 16 and self.kv_clip != "absmax")
        return self.sharing == "language" and (centers or clips)

    def groups(self, k: int) -> int:
        """The number of groups of a layer's input that have a clip of their own.

        Args:
            k: The layer's input features K.

        Returns:
            The columns of its clip table.
        """
        return -(-k // self.activation_group_size) if self.activation_group_size else 1

    def ignores(self, name: str, head: str | None = None) -> bool:
        """Whether a layer is left alone by `ignore`.

        Args:
            name: The layer's full name.
            head: The name of the model's output head, which "lm_head" in `ignore` also names; None without one.

        Returns:
            True where a pattern names the layer by its full name, its last component, or as a shell pattern.
        """
        return is_ignored(name, self.ignore, head)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON types; `from_dict` reads them."""
        return asdict(self) | {"ignore": list(self.ignore)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "QuantConfig":
        """Make a configuration of a mapping, such as `to_dict` gives.

        Args:
            values: By the names of fields their values, of JSON types; fields that are absent have their defaults.

        Returns:
            The configuration.

        Raises:
            LaAciqError: an unknown name, or a value that the field cannot have.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise LaAciqError(f"unknown quantization setting {unknown[0]!r}; expected {', '.join(sorted(known))}")
        return cls(**values)


def is_ignored(layer: str, patterns: Iterable[str], head: str | None = None) -> bool:
    """Whether a layer of this full name is named by its full name, its last component, or a shell pattern.

    "lm_head" also names the model's output head, `head`, where it has another name.
    """
    last = "lm_head" if layer == head else layer.rpartition(".")[2]
    return any(pattern in (layer, last) or fnmatchcase(layer, pattern) for pattern in patterns)
