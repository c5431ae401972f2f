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
from . import adapt, metrics
from .rows import ServedRows
from .serve import ADAPT, BATCH_INVARIANT

_NAMES = {"bias": "row_bias"}  # of our tensors in vLLM's layers, where they are others


class LaAciqConfig(QuantizationConfig):
    """A checkpoint's `quantization_config`, and in a worker the rows of the requests it serves.

    done: the `Quantization` described. version: of the tables, part of the prefix cache's keys.
    """

    in_use = False  # whether this process has a model of ours

    def __init__(self, description: dict[str, Any]) -> None:
        super().__init__()
        self.description = description
        self.done, self._sha256 = read_description(description)
        self._files: dict[str, tuple[int, ...]] | None = None  # of the folder, when loading began
        self._folder: Path | None = None
        self.version: str = description["checksum"][:16]
        self.rows: ServedRows | None = None  # made by the worker that runs the model
        self.tail_sums: list[adapt.TailSums] = []  # of the worker's layers, where they are sampled
        self.moves = adapt.Moves([0] * len(self.done.state.entries))
        LaAciqConfig.in_use = True
        metrics.TABLE.labels(self.version).set(1)

    def check_loaded(self) -> None:
        """Once: raises `LaAciqError` unless what was loaded are the tensors described, all of one state of the folder,
        which may have been replaced meanwhile. A model that is no folder has no files, and is not checked.
        """
        if self._files and self._folder is not None:
            before, self._files = self._files, {}
            if _tensor_files(self._folder) != before:
                raise LaAciqError(f"{str(self._folder)!r} was changed while it was loaded; start again")
            check_tensors(self._folder, self._sha256)

    @functools.cached_property
    def profile(self) -> Profile:
        """The profile that the clips move from, checked."""
        profile = Profile.load(os.environ[ADAPT])
        adapt.check_adaptable(self.done, profile)
        return profile

    def row(self, tag: str) -> int:
        """The row of the tables that serves a canonical tag; one for all when the languages share their clips."""
        return self.done.state.entry(tag) if self.done.config.by_language else 0

    def __reduce__(self) -> Any:
        """For vLLM's other processes: the description makes the same configuration there."""
        return type(self), (self.description,)

    def __deepcopy__(self, memo: dict[int, Any]) -> "LaAciqConfig":
        """vLLM copies configurations for parts of a model; all parts share the rows of the requests."""
        return self

    @classmethod
    def get_name(cls) -> Any:
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "LaAciqConfig":
        return cls(config)

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """The names of tensors in vLLM: a bias by entry is not vLLM's bias of the layer. The tensor that is there to
        make the unquantized model refuse the folder is left out, and tensors of older folders get their present names.
        """
        packed, suffixes = self.done.config.weights == 4, dict[str, str | None]()
        for name in self.done.layers:
            if self.done.config.center:
                suffixes[f"{name}.bias"] = f"{name}.{_NAMES['bias']}"
            if self.description["schema"] == 2:
                suffixes |= {
                    f"{name}.{old}": f"{name}.{new}" for old, new in RENAMED_BUFFERS.items() if packed or old == "clip"
                }
            elif packed:
                suffixes[f"{name}.weight"] = None
        return WeightsMapper(orig_to_new_suffix=suffixes)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How vLLM's layer of this name is computed; None for layers that are never quantized."""
        vllm_config = get_current_vllm_config()
        check_supported(vllm_config, self)
        if self._files is None:
            self._folder = Path(vllm_config.model_config.model)
            self._files = _tensor_files(self._folder)
        if not isinstance(layer, LinearBase):
            if any(name == prefix or name.startswith(prefix + ".") for name in self.done.layers):
                raise LaAciqError(
                    f"layer {prefix!r} is quantized, and vLLM's {type(layer).__name__} cannot be served so; name it in "
                    "--ignore when you quantize"
                )
            return _EmbeddingByToken() if batch_invariant() and isinstance(layer, ParallelLMHead) else None
        last = prefix.rpartition(".")[2]
        names = [prefix.removesuffix(last) + part for part in self.packed_modules_mapping.get(last, [last])]
        quantized = [name in self.done.layers for name in names]
        if not any(quantized):
            return _LinearByToken() if batch_invariant() else UnquantizedLinearMethod()
        if not all(quantized):
            raise LaAciqError(
                f"vLLM computes {', '.join(names)} as one layer, and only {names[quantized.index(True)]} is quantized; "
                "expected all of them or none"
            )
        return LanguageLinearMethod(self, prefix)


class LanguageLinearMethod(LinearMethodBase):
    """A `LanguageAwareLinear` in place of vLLM's layer, several fused ones where vLLM fuses them."""

    def __init__(self, config: LaAciqConfig, prefix: str) -> None:
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
        """Empty parameters for the checkpoint's tensors, by their names there."""
        config = self.config.done.config
        k, n = input_size_per_partition, sum(output_partition_sizes)
        block = rotation.block_size(input_size) if config.rotate else 1
        for what, size in (("blocks of the rotation", block), ("groups", config.group_size or input_size)):
            if k != input_size and k % size:
                raise LaAciqError(
                    f"layer {self.prefix!r}: tensor parallelism gives each rank {k} of {input_size} inputs, which are "
                    f"no whole number of {what} ({size}); expected fewer ranks"
                )
        # An empty layer of ours says what tensors there are.
        rows = self.config.done.state
        wanted = LanguageAwareLinear(k, n, False, config, rows, dtype=params_dtype, device="meta")
        for name, buffer in wanted.named_buffers():
            parameter = nn.Parameter(torch.empty(buffer.shape, dtype=buffer.dtype), requires_grad=False)
            if buffer.is_floating_point():
                parameter.fill_(torch.nan)  # what is not loaded is found below
            if name in ("weight", "weight_codes", "weight_clip"):
                grouped = name != "weight_clip" or config.group_size > 0
                set_weight_attrs(parameter, {"output_dim": 0, **({"input_dim": 1} if grouped else {})})
                set_weight_attrs(parameter, extra_weight_attrs)
            elif name == "bias":
                set_weight_attrs(parameter, {"output_dim": 1, **extra_weight_attrs})
            else:
                set_weight_attrs(parameter, {"weight_loader": _InputLoader(layer, self.prefix)})
            layer.register_parameter(_NAMES.get(name, name), parameter)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what was loaded, and make the layer of it."""
        rows = self.config.rows
        self.config.check_loaded()
        if rows is None:
            raise LaAciqError("vLLM loads the model before its request hook: the entry point vllm.logits_processors")
        config = self.config.done.config
        weight = layer.weight_codes if config.weights == 4 else layer.weight
        n, k = weight.shape[0], layer.input_size_per_partition
        dtype = weight.dtype if weight.is_floating_point() else None
        made = LanguageAwareLinear(k, n, False, config, rows, dtype=dtype, device="meta")
        for name in list(made._buffers):
            if made._buffers[name] is not None:
                parameter = getattr(layer, _NAMES.get(name, name))
                delattr(layer, _NAMES.get(name, name))
                if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
                    raise LaAciqError(f"layer {self.prefix!r}: its {name} is not in the checkpoint, or not finite")
                setattr(made, name, parameter.data)
        if made.clips is not None:
            check_clips(made.clips, tuple(made.clips.shape), self.prefix)
        if made.signs is not None and not bool((made.signs.abs() == 1).all()):
            raise LaAciqError(f"layer {self.prefix!r}: the signs of its rotation are not all +1 or -1")
        if made.bias is not None:
            layer.bias = None  # the rows of ours have it in them
            if k != layer.input_size and layer.tp_rank > 0:
                made.bias.zero_()  # the ranks' results are added
        made.repack()
        layer.quantized = made
        layer.tail_sums = None
        if adapt.sampled(self.config.done):
            layer.tail_sums = self._sampled(layer, made)

    def _sampled(self, layer: Any, made: LanguageAwareLinear) -> adapt.TailSums:
        whole = made.in_features == layer.input_size
        size = self.config.done.config.activation_group_size
        first = 0 if whole or not size else layer.tp_rank * made.in_features // size
        last = self.prefix.rpartition(".")[2]
        name = self.prefix.removesuffix(last) + self.config.packed_modules_mapping.get(last, [last])[0]
        sums = adapt.TailSums(name, made, first, whole)
        if ADAPT in os.environ:
            sums.calibrate(self.config.profile)
        self.config.tail_sums.append(sums)
        return sums

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [tokens, K] -> [tokens, N], each token under the clips of its request's language."""
        rows = layer.quantized.state
        # Never in a compiled graph, which a step that is a sample does not run.
        if not torch.compiler.is_compiling() and layer.tail_sums is not None and rows.sampling:
            layer.tail_sums.add(x[: rows.count], rows.tokens[: rows.count])
        y: torch.Tensor = layer.quantized(x)
        return y if bias is None else y + bias


def _tensor_files(folder: Path) -> dict[str, tuple[int, ...]]:
    """What tells the files of a folder from those that replace them."""
    states = {file.name: file.stat() for file in folder.glob("*.safetensors")}
    return {name: (state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns) for name, state in states.items()}


class _LinearByToken(UnquantizedLinearMethod):
    """A layer left unquantized, each token's row on its own."""

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return _by_token(x, layer.get_parameter("weight"), bias)


class _EmbeddingByToken(UnquantizedEmbeddingMethod):
    """The head left unquantized, each token's row on its own."""

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return _by_token(x, layer.get_parameter("weight"), bias)


def _by_token(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.cat([nn.functional.linear(row, weight, bias) for row in torch.split(x, 1)])


class _InputLoader:
    """Loads the table of input clips, the centers or the signs: from each layer that vLLM fuses, each time the same."""

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


def batch_invariant() -> bool:
    """Whether a request's logits must not depend, bit for bit, on the requests beside it (`BATCH_INVARIANT`)."""
    return os.environ.get(BATCH_INVARIANT) == "1"


def check_supported(vllm_config: VllmConfig, config: LaAciqConfig) -> None:
    """Refuse at start-up what would drop or mix up the languages of requests, or has no kernel; `LaAciqError`."""
    parallel = vllm_config.parallel_config
    refused = {
        "speculative decoding": vllm_config.speculative_config is not None,
        "vLLM's V2 model runner (set VLLM_USE_V2_MODEL_RUNNER=0)": vllm_config.use_v2_model_runner,
        "pooling": vllm_config.model_config.runner_type != "generate",
        "encoder-decoder models": vllm_config.model_config.is_encoder_decoder,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "context parallelism": parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
        "overlapping of two batches": parallel.enable_dbo,
        "transfer of key and value blocks between engines": vllm_config.kv_transfer_config is not None,
        "bit-identical batches outside of eager mode (--enforce-eager)": batch_invariant()
        and not vllm_config.model_config.enforce_eager,
        "an INT4 key and value cache (quantize with kv_bits 16)": config.done.config.kv != 16,
    }
    for what, found in refused.items():
        if found:
            raise LaAciqError(f"a model quantized by LA-ACIQ cannot be served with {what}")


def quantization(vllm_config: VllmConfig) -> LaAciqConfig | None:
    """The configuration of the model an engine serves when it is one of ours."""
    config = vllm_config.quant_config
    return config if isinstance(config, LaAciqConfig) else None


def register() -> None:
    """Make vLLM choose `LaAciqConfig` for checkpoints whose `quant_method` is "la_aciq"."""
    if METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(METHOD)(LaAciqConfig)
