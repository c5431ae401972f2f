"""The quantization method "la_aciq": what a checkpoint's `quantization_config` says, and the layers it makes.

vLLM fuses layers that share an input (q, k and v; gate and up). Their codes and weight clips lie one below the other;
the table of input clips and the signs of the rotation belong to the input and must be the same in all of them.
"""

import functools
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.model_executor.models.utils import WeightsMapper
from vllm.model_executor.utils import set_weight_attrs

from ...checkpoint.folder import METHOD, check_tensors, read_description
from ...errors import LaAciqError
from ...nn.linear import RENAMED_BUFFERS, LanguageAwareLinear, check_clips
from ...ops import rotation
from ...profile import Profile
from ...tags import UND
from .adapt import ClipMoves
from .language_ids import BatchLanguageIds
from .metrics import TABLE
from .settings import ADAPT, batch_invariant
from .supported import check_supported
from .tail_sums import TailSums, check_adaptable, is_sampled

# Layouts (nn/layout.py) of one row for each token, which vLLM has as [tokens, K] whatever transformers' order is.
_BY_TOKEN = ("batch tokens", "tokens batch", "batch*tokens", "tokens*batch", "batch kept")
# The parameter of vLLM's layer that a tensor of ours is loaded into, where it has another name: vLLM's own `bias` is a
# vector, ours with centers is a table by entry.
_PARAMETERS = {"bias": "entry_bias"}


class LaAciqVllmConfig(QuantizationConfig):
    """A checkpoint's `quantization_config`, and in a worker the language ids of the requests it serves.

    Args:
        description: the `quantization_config` of the checkpoint's config.json.

    Attributes:
        quantization: the `Quantization` that the description states.
        entries: the names of the tables' entries.
        version: of the tables; part of the prefix cache's keys.
        language_ids: of the running step; None until the worker that runs the model makes them.
        tail_sums: of the worker's layers, where they are sampled.
        clip_moves: how often the engine has moved the clips of each entry.

    Raises:
        LaAciqError: the description was edited, is incomplete, or comes from a newer version of the format.
    """

    in_use = False  # whether this process has a model of ours

    def __init__(self, description: dict[str, Any]) -> None:
        super().__init__()
        self.description = description
        self.quantization, self._sha256 = read_description(description)
        self.entries = self.quantization.state.entries
        self.version: str = description["checksum"][:16]
        self.language_ids: BatchLanguageIds | None = None
        self.tail_sums: list[TailSums] = []
        self.clip_moves = ClipMoves([0] * len(self.entries))
        self._files: dict[str, tuple[int, ...]] | None = None  # of the folder, when loading began
        self._folder: Path | None = None
        LaAciqVllmConfig.in_use = True
        TABLE.labels(self.version).set(1)

    def check_supported(self, vllm_config: VllmConfig) -> None:
        """Refuse what the model cannot be served with (`supported.check_supported`)."""
        check_supported(vllm_config, self.quantization.config.kv)

    def check_loaded(self) -> None:
        """Check, once, that the loaded tensors are those described, all of one state of the folder.

        The folder may have been replaced while it was loaded. A model that is no folder has no files, and is not
        checked.

        Raises:
            LaAciqError: the files changed, or their SHA-256 is another.
        """
        if self._files and self._folder is not None:
            before, self._files = self._files, {}
            if _tensor_files(self._folder) != before:
                raise LaAciqError(f"{str(self._folder)!r} was changed while it was loaded; start again")
            check_tensors(self._folder, self._sha256)

    @functools.cached_property
    def profile(self) -> Profile:
        """The profile that the clips move from, validated."""
        profile = Profile.load(os.environ[ADAPT])
        check_adaptable(self.quantization, profile)
        return profile

    def language_id(self, tag: str) -> int:
        """Return the entry that serves a canonical tag; entry 0 when the languages share their clips."""
        return self.quantization.state.entry(tag) if self.quantization.config.by_language else 0

    def is_unserved(self, tag: str) -> bool:
        """Whether a canonical tag names a language that has no entry."""
        return tag != UND and self.quantization.state.entry(tag) == 0

    def __reduce__(self) -> Any:
        """Pickle for vLLM's other processes: the description makes the same configuration there."""
        return type(self), (self.description,)

    def __deepcopy__(self, memo: dict[int, Any]) -> "LaAciqVllmConfig":
        """Return the same object: vLLM copies configurations for parts of a model, which share the language ids."""
        return self

    @classmethod
    def get_name(cls) -> Any:
        """Return "la_aciq"."""
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Return the dtypes of activations that the kernels take."""
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return 80, CUDA's compute capability 8.0."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no file: config.json has the description."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "LaAciqVllmConfig":
        """Make the configuration of a `quantization_config`; raises `LaAciqError` as the class does."""
        return cls(config)

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """Map the names of the checkpoint's tensors to the parameters of vLLM's layers.

        Folders of schema 2 have older names. The tensor that makes transformers without LA-ACIQ refuse a folder of
        schema 3 is left out.
        """
        packed, suffixes = self.quantization.config.weights == 4, dict[str, str | None]()
        for name in self.quantization.layers:
            if self.quantization.config.center:
                suffixes[f"{name}.bias"] = f"{name}.{_PARAMETERS['bias']}"
            if self.description["schema"] == 2:
                suffixes |= {
                    f"{name}.{old}": f"{name}.{new}" for old, new in RENAMED_BUFFERS.items() if packed or old == "clip"
                }
            elif packed:
                suffixes[f"{name}.weight"] = None
        return WeightsMapper(orig_to_new_suffix=suffixes)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return how vLLM computes a layer; None for layers that are never quantized.

        Args:
            layer: of vLLM's model.
            prefix: its name there.

        Raises:
            LaAciqError: the layer is quantized and vLLM cannot compute it so, or the engine has a refused feature.
        """
        vllm_config = get_current_vllm_config()
        self.check_supported(vllm_config)
        if self._files is None:
            self._folder = Path(vllm_config.model_config.model)
            self._files = _tensor_files(self._folder)
        if not isinstance(layer, LinearBase):
            if any(name == prefix or name.startswith(prefix + ".") for name in self.quantization.layers):
                raise LaAciqError(
                    f"layer {prefix!r} is quantized, and vLLM's {type(layer).__name__} cannot be served so; name it in "
                    "--ignore when you quantize"
                )
            return _EmbeddingByToken() if batch_invariant() and isinstance(layer, ParallelLMHead) else None
        last = prefix.rpartition(".")[2]
        names = [prefix.removesuffix(last) + part for part in self.packed_modules_mapping.get(last, [last])]
        quantized = [name in self.quantization.layers for name in names]
        if not any(quantized):
            return _LinearByToken() if batch_invariant() else UnquantizedLinearMethod()
        if not all(quantized):
            raise LaAciqError(
                f"vLLM computes {', '.join(names)} as one layer, and only {names[quantized.index(True)]} is quantized; "
                "expected all of them or none"
            )
        for name in names:
            layout = self.quantization.layouts.get(name, "batch tokens")
            if layout not in _BY_TOKEN:
                raise LaAciqError(
                    f"layer {name!r}: the rows of its input were {layout!r} in calibration, and vLLM serves layers "
                    "with one row for each token; name it in --ignore when you quantize"
                )
        return LanguageLinearMethod(self, prefix)


class LanguageLinearMethod(LinearMethodBase):
    """Computes vLLM's layer as a `LanguageAwareLinear`, several fused ones where vLLM fuses them.

    Args:
        config: of the model.
        prefix: the layer's name in vLLM.
    """

    def __init__(self, config: LaAciqVllmConfig, prefix: str) -> None:
        self.config = config
        self.prefix = prefix

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register empty parameters for the checkpoint's tensors.

        Args:
            layer: vLLM's layer.
            input_size_per_partition: K of this rank.
            output_partition_sizes: N of this rank, one for each of the fused layers.
            input_size: K of all ranks.
            output_size: N of all ranks.
            params_dtype: of the activations.
            extra_weight_attrs: what vLLM sets on a weight.

        Raises:
            LaAciqError: tensor parallelism cuts through a group or a block of the rotation.
        """
        config = self.config.quantization.config
        k, n = input_size_per_partition, sum(output_partition_sizes)
        block = rotation.block_size(input_size) if config.rotate else 1
        for unit, size in (("blocks of the rotation", block), ("groups", config.group_size or input_size)):
            if k != input_size and k % size:
                raise LaAciqError(
                    f"layer {self.prefix!r}: tensor parallelism gives each rank {k} of {input_size} inputs, which are "
                    f"no whole number of {unit} ({size}); expected fewer ranks"
                )
        # The buffers of an empty layer name the tensors and their shapes.
        state = self.config.quantization.state
        empty = LanguageAwareLinear(k, n, False, config, state, dtype=params_dtype, device="meta")
        for name, buffer in empty.named_buffers():
            parameter = nn.Parameter(torch.empty(buffer.shape, dtype=buffer.dtype), requires_grad=False)
            if buffer.is_floating_point():
                parameter.fill_(torch.nan)  # so that a tensor that is not loaded is noticed below
            if name in ("weight", "weight_codes", "weight_clip"):
                grouped = name != "weight_clip" or config.group_size > 0
                set_weight_attrs(parameter, {"output_dim": 0, **({"input_dim": 1} if grouped else {})})
                set_weight_attrs(parameter, extra_weight_attrs)
            elif name == "bias":
                set_weight_attrs(parameter, {"output_dim": 1, **extra_weight_attrs})
            else:
                set_weight_attrs(parameter, {"weight_loader": _InputLoader(layer, self.prefix)})
            layer.register_parameter(_PARAMETERS.get(name, name), parameter)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Validate the loaded tensors, and make a `LanguageAwareLinear` of them.

        Args:
            layer: vLLM's layer.

        Raises:
            LaAciqError: a tensor is missing or has values that it must not have.
        """
        language_ids = self.config.language_ids
        self.config.check_loaded()
        if language_ids is None:
            raise LaAciqError("vLLM loads the model before its request hook: the entry point vllm.logits_processors")
        config = self.config.quantization.config
        weight_name = "weight_codes" if config.weights == 4 else "weight"
        weight = layer.get_parameter(weight_name)
        n, k = weight.shape[0], layer.input_size_per_partition
        dtype = weight.dtype if weight.is_floating_point() else None
        quantized = LanguageAwareLinear(k, n, False, config, language_ids, dtype=dtype, device="meta")
        for name in list(quantized._buffers):
            if quantized._buffers[name] is not None:
                parameter = getattr(layer, _PARAMETERS.get(name, name))
                delattr(layer, _PARAMETERS.get(name, name))
                if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
                    raise LaAciqError(f"layer {self.prefix!r}: its {name} is not in the checkpoint, or not finite")
                setattr(quantized, name, parameter.data)
        if quantized.clips is not None:
            check_clips(quantized.clips, tuple(quantized.clips.shape), self.prefix)
        if quantized.signs is not None and not bool((quantized.signs.abs() == 1).all()):
            raise LaAciqError(f"layer {self.prefix!r}: the signs of its rotation are not all +1 or -1")
        if quantized.bias is not None:
            layer.bias = None  # the entries of ours include it
            if k != layer.input_size and layer.tp_rank > 0:
                quantized.bias.zero_()  # the ranks' results are added
        quantized.repack()
        layer.quantized = quantized
        # By a name that vLLM's wrapper of a layer with LoRA adapters looks for the device under.
        layer.weight_packed = quantized._buffers[weight_name]
        layer.tail_sums = self._tail_sums(layer, quantized) if is_sampled(self.config.quantization) else None

    def _tail_sums(self, layer: Any, quantized: LanguageAwareLinear) -> TailSums:
        whole_input = quantized.in_features == layer.input_size
        size = self.config.quantization.config.activation_group_size
        first_group = 0 if whole_input or not size else layer.tp_rank * quantized.in_features // size
        last = self.prefix.rpartition(".")[2]
        name = self.prefix.removesuffix(last) + self.config.packed_modules_mapping.get(last, [last])[0]
        sums = TailSums(name, quantized, first_group, whole_input)
        if ADAPT in os.environ:
            sums.calibrate(self.config.profile)
        self.config.tail_sums.append(sums)
        return sums

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Compute a layer, each token under the clips of its request's language.

        Args:
            layer: vLLM's layer.
            x: [tokens, K].
            bias: [N] or None, added to the output.

        Returns:
            [tokens, N] in x's dtype.
        """
        ids = layer.quantized.state
        # Never in a compiled graph, which a step that is a sample does not run.
        if not torch.compiler.is_compiling() and layer.tail_sums is not None and ids.sampling:
            layer.tail_sums.add(x[: ids.count], ids.token_language_ids[: ids.count])
        y: torch.Tensor = layer.quantized(x)
        return y if bias is None else y + bias


def _tensor_files(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return by file of a folder what distinguishes it from a file that replaces it."""
    states = {file.name: file.stat() for file in folder.glob("*.safetensors")}
    return {name: (state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns) for name, state in states.items()}


class _LinearByToken(UnquantizedLinearMethod):
    """Computes a layer that is not quantized row by row."""

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return _by_token(x, layer.get_parameter("weight"), bias)


class _EmbeddingByToken(UnquantizedEmbeddingMethod):
    """Computes a head that is not quantized row by row."""

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return _by_token(x, layer.get_parameter("weight"), bias)


def _by_token(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.cat([nn.functional.linear(row, weight, bias) for row in torch.split(x, 1)])


class _InputLoader:
    """Loads the table of input clips, the centers or the signs, the same in all layers that vLLM fuses."""

    def __init__(self, layer: nn.Module, prefix: str) -> None:
        self.layer, self.prefix, self.loaded = layer, prefix, False

    def __call__(self, parameter: nn.Parameter, loaded: torch.Tensor, shard: Any = None) -> None:
        layer: Any = self.layer
        if loaded.shape[-1] != parameter.shape[-1] and layer.input_size != layer.input_size_per_partition:
            width = parameter.shape[-1]
            loaded = loaded.narrow(-1, layer.tp_rank * width, width)
        if loaded.shape != parameter.shape:
            raise LaAciqError(
                f"layer {self.prefix!r}: the table of its input has shape {list(loaded.shape)}, expected "
                f"{list(parameter.shape)}: it does not match the model"
            )
        loaded = loaded.to(parameter.device, parameter.dtype)
        if self.loaded and not torch.equal(parameter, loaded):
            raise LaAciqError(f"layer {self.prefix!r}: the layers that vLLM fuses to it have different tables of clips")
        parameter.data.copy_(loaded)
        self.loaded = True


def served_config(vllm_config: VllmConfig) -> LaAciqVllmConfig | None:
    """Return the configuration of the model an engine serves, None for a model that is not ours."""
    config = vllm_config.quant_config
    return config if isinstance(config, LaAciqVllmConfig) else None


def register_method() -> None:
    """Make vLLM choose `LaAciqVllmConfig` for checkpoints whose `quant_method` is "la_aciq". Idempotent."""
    if METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(METHOD)(LaAciqVllmConfig)
