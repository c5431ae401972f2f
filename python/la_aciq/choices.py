"""What a setting may be: choices shared by the operations, the clip optimizer, `QuantConfig` and the command line."""

from typing import Literal, get_args

Codebook = Literal["midrise", "midtread"]
Statistic = Literal["rms", "absmax"]  # what a clip that is measured on a row is a multiple of
ActivationClip = Literal["static", "rms", "absmax"]
Objective = Literal["exact", "in_range", "aciq"]
LanguageObjective = Literal["mean", "weighted", "minimax", "variance"]
Sharing = Literal["language", "pooled"]
TableGranularity = Literal["group", "layer", "model"]
Granularity = Literal["group", "layer", "model", "token"]
Rounding = Literal["auto", "nearest", "feedback"]

CODEBOOKS: tuple[str, ...] = get_args(Codebook)
STATISTICS: tuple[str, ...] = get_args(Statistic)
ACTIVATION_CLIPS: tuple[str, ...] = get_args(ActivationClip)
OBJECTIVES: tuple[str, ...] = get_args(Objective)
LANGUAGE_OBJECTIVES: tuple[str, ...] = get_args(LanguageObjective)
SHARINGS: tuple[str, ...] = get_args(Sharing)
TABLE_GRANULARITIES: tuple[str, ...] = get_args(TableGranularity)
GRANULARITIES: tuple[str, ...] = get_args(Granularity)
ROUNDINGS: tuple[str, ...] = get_args(Rounding)

WEIGHT_BITS = (4, 16)
ACTIVATION_BITS = (4, 8, 16)
KV_BITS = (4, 16)
TABLE_BITS = range(2, 9)  # of a clip found by `la_aciq.clipping`

CODEBOOK: Codebook = "midrise"
CLIP: ActivationClip = "absmax"
GROUP_SIZE = 64
