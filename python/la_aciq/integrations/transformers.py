"""LA-ACIQ as a quantization method of Hugging Face transformers.

    config = LaAciqConfig(profile="profile", activations=8)
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config)
    model.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)  # the same outputs, bit for bit

Importing this module registers the method "la_aciq"; `import la_aciq` sees to that as soon as transformers is imported,
before or after. Without it transformers does not know the method of the checkpoint, warns, and refuses the shapes of
its tensors. `la_aciq.checkpoint.folder` describes the files.
"""

import copy
import os
import re
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoint.folder import (
    METHOD,
    check_files,
    describe,
    digest,
    old_names,
    read_description,
    stored_tensors,
    unfit_tensor,
)
from ..errors import LaAciqError
from ..models import fingerprint_of, sample
from ..nn.config import QuantConfig
from ..nn.quantize import AFTER_QUANTIZING, Plan, Quantization, adopt, install
from ..profile import Profile


@register_quantization_config(METHOD)
class LaAciqConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers has no type information
    """How `from_pretrained` quantizes a model: a profile, and the fields of `QuantConfig`.

    Attributes:
        profile: the statistics; None for a model that is quantized already.
        config: the `QuantConfig`.
        description: how the model was quantized (see `la_aciq.checkpoint.folder`), which config.json holds; None before
            it is.
    """

    def __init__(self, profile: Profile | str | os.PathLike[str], **settings: Any) -> None:
        """Read the profile where it is a folder, and check the settings.

        Args:
            profile: of the model that is to be loaded, or the folder of one.
            settings: fields of `QuantConfig`; group_size, rotate and ignore are by default the profile's.

        Raises:
            LaAciqError: the folder holds no profile, or a setting is none of `QuantConfig`.
        """
        if not isinstance(profile, Profile):
            profile = Profile.load(profile)
        measured = {
            "group_size": profile.metadata["group_size"],
            "rotate": profile.metadata["rotation"]["enabled"],
            "ignore": profile.metadata["ignore"],
        }
        self.quant_method = METHOD
        self.profile: Profile | None = profile
        self.config = QuantConfig.from_dict(measured | settings)
        self.description: dict[str, Any] | None = None

    @classmethod
    def of(cls, description: dict[str, Any]) -> "LaAciqConfig":
        """Make the configuration of a model that is quantized already.

        Args:
            description: How the model was quantized, as `quantization_config` in its config.json has it.

        Returns:
            The configuration, without a profile.

        Raises:
            LaAciqError: The description is inconsistent, or of a version that this release does not read.
        """
        quantization, _ = read_description(description)
        config = cls.__new__(cls)
        config.quant_method, config.profile = METHOD, None
        config.config, config.description = quantization.config, dict(description)
        return config

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The configuration in a config.json."""
        config = cls.of(config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def __deepcopy__(self, memo: dict[int, Any]) -> "LaAciqConfig":
        """transformers copies configurations; the profile, which nothing changes and which may be large, is shared."""
        copied = copy.copy(self)
        copied.description = copy.deepcopy(self.description, memo)
        return copied

    def to_dict(self) -> dict[str, Any]:
        """JSON types: the description of a quantized model, otherwise the settings without the profile."""
        return dict(self.description or {"quant_method": METHOD, "config": self.config.to_dict()})


@register_quantizer(METHOD)
class LaAciqQuantizer(HfQuantizer):  # type: ignore[misc]
    """What transformers calls while it loads and saves a model with a `LaAciqConfig`.

    An unquantized model's layers are replaced one by one, each as soon as all its parameters are read, so that at most
    one layer is in memory unquantized. A quantized model's files are checked before the first tensor is loaded.
    """

    quantization_config: LaAciqConfig
    is_trainable = False
    is_compileable = True

    def __init__(self, quantization_config: LaAciqConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._plan: Plan | None = None
        self._quantization: Quantization | None = None  # of a model that is quantized already
        self._renamed: dict[str, str] = {}  # names in its files that its tensors have others for
        self._parameters: list[str] = []  # names in the unquantized model
        self._samples: dict[str, bytes] = {}  # of the parameters that are not there any more
        self._replaced: set[str] = set()
        self._failure: LaAciqError | None = None
        self._bar: tqdm[Any] | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """For a model that is unpickled: its attention is looked up by name, so the module that has it is imported."""
        from ..nn import attention  # noqa: F401

        self.__dict__.update(state)

    def is_serializable(self) -> bool:
        """Whether `save_pretrained` works: yes."""
        return True

    def update_weight_conversions(self, weight_conversions: list[Any], *model: nn.Module) -> list[Any]:
        """How names in the files become names in the model: a quantized model's files have the model's own names."""
        if self.pre_quantized:
            from transformers.core_model_loading import WeightRenaming

            return [WeightRenaming(f"^{re.escape(old)}$", new) for old, new in self._renamed.items()]
        # `model` since transformers 5.20.
        conversions: list[Any] = super().update_weight_conversions(weight_conversions, *model)
        return conversions

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuses what would leave layers where they cannot be quantized."""
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise LaAciqError(
                "device_map offloads to the disk, which LA-ACIQ does not support; expected cpu or devices"
            )

    @property
    def quantized_element_size(self) -> float | None:
        """Bytes per weight after quantization, for `device_map="auto"`."""
        config = self.quantization_config.config
        return 0.5 + (4 / config.group_size if config.group_size else 0.0) if config.weights == 4 else None

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter read from the files belongs to a layer that is to be quantized."""
        return self._plan is not None and param_name.rpartition(".")[0] in self._plan.names

    def get_quantize_ops(self) -> Any:
        """The conversion that takes over the parameters of those layers."""
        from transformers.core_model_loading import ConversionOps

        quantizer = self

        class Quantize(ConversionOps):  # type: ignore[misc]
            def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
                for name, value in input_dict.items():
                    tensor = value[0] if isinstance(value, list) else value
                    quantizer._take(kwargs["model"], name, tensor, kwargs.get("missing_keys"))
                return {}

        return Quantize()

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        hugging_face: Any = model
        _check_undistributed(getattr(hugging_face.config, "distributed_config", None))
        if not checkpoint_files or not all(str(file).endswith(".safetensors") for file in checkpoint_files):
            raise LaAciqError("LA-ACIQ loads models from safetensors files only")
        config = self.quantization_config
        if self.pre_quantized:
            description = config.to_dict()
            self._quantization, sha256 = read_description(description)
            names = hugging_face.config.architectures or []
            if names and type(model).__name__ not in names:
                raise LaAciqError(
                    f"the checkpoint is that of a {names[0]}, which was quantized as a whole; load it as one"
                )
            install(model, self._quantization)
            unfit: dict[str, torch.Tensor] = {}
            if description["schema"] == 2:
                self._renamed = old_names(model)
            else:
                unfit = unfit_tensor(model, self._quantization)
                ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
                hugging_face._keys_to_ignore_on_load_unexpected = {
                    *ignored,
                    *(f"^{re.escape(name)}$" for name in unfit),
                }
            check_files(model, checkpoint_files, sha256, renamed=self._renamed, unfit=unfit)
            return
        if config.profile is None:
            raise LaAciqError("this LaAciqConfig is that of a quantized model; expected one with a profile")
        # transformers ties weights after loading; until then a tied one is a parameter of its own. The first of several
        # is the one that `named_parameters` has afterwards.
        tied: Any = model.all_tied_weights_keys
        first: dict[str, str] = {}
        for name, _ in model.named_parameters():
            first.setdefault(tied.get(name, name), name)
        self._parameters = list(first.values())
        self._plan = Plan(model, config.profile, config.config)

    def _take(self, model: nn.Module, name: str, tensor: torch.Tensor, missing: set[str] | None) -> None:
        """Put a parameter into its layer, and replace the layer when it is complete."""
        if missing is not None:
            missing.discard(name)
        if self._failure is not None or self._plan is None:
            return
        layer, _, parameter = name.rpartition(".")
        module = model.get_submodule(layer)
        try:
            shape = module.get_parameter(parameter).shape
            if tensor.shape != shape:
                raise LaAciqError(f"parameter {name!r} has shape {list(tensor.shape)}, expected {list(shape)}")
            self._samples[name] = sample(tensor)
            setattr(module, parameter, nn.Parameter(tensor, requires_grad=False))
            if not any(tensor.is_meta for tensor in module.parameters()):
                if self._bar is None:  # beneath transformers' own, which counts parameters
                    self._bar = tqdm(
                        total=len(self._plan.names),
                        desc="Quantizing",
                        unit="layer",
                        leave=None,
                        disable=not logging.is_progress_bar_enabled(),
                    )
                quantized = self._plan.quantized(layer, module)
                for buffer in quantized.buffers():
                    buffer._is_hf_initialized = True  # type: ignore[attr-defined]  # or transformers would initialize it
                model.set_submodule(layer, quantized)
                self._replaced.add(layer)
                self._bar.update()
        except LaAciqError as error:
            self._failure = error  # transformers would log it and go on; it is raised when loading ends

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if self._quantization is not None:
            adopt(model, self._quantization)
            return
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        plan, profile = self._plan, self.quantization_config.profile
        if plan is None or profile is None:
            raise RuntimeError("transformers ended loading a model before it began")
        if self._failure is not None:
            raise self._failure
        if missing := [name for name in plan.names if name not in self._replaced]:
            raise LaAciqError(f"the checkpoint lacks parameters of the layer {missing[0]!r}")
        samples = {name: self._samples.get(name) or sample(model.get_parameter(name)) for name in self._parameters}
        profile.check_fingerprint(fingerprint_of(model, samples))
        self._plan, self._samples = None, {}
        plan.finish(model)

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Called by `save_pretrained` before it writes config.json, which is to hold the digest of the tensors.

        Returns the tensors to save.
        """
        quantization: Any = getattr(model, "la_aciq")  # noqa: B009  # no attribute of nn.Module
        tensors = stored_tensors(model)
        for name, tensor in tensors.items():
            if tensor.is_meta:
                tensors[name] = _offloaded(model, name)
        tensors |= unfit_tensor(model, quantization)
        self.quantization_config.description = describe(quantization, digest(tensors))
        return tensors, {}


def _offloaded(model: nn.Module, name: str) -> torch.Tensor:
    """The tensor of this name that accelerate's hooks keep elsewhere; raises `LaAciqError` where none does."""
    for module_name, module in model.named_modules():
        prefix = f"{module_name}." if module_name else ""
        if not name.startswith(prefix):
            continue
        hook = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", [hook]):
            weights: Any = getattr(part, "weights_map", None)
            if weights is not None:
                try:
                    tensor: torch.Tensor = weights[name.removeprefix(prefix)]
                except KeyError:
                    continue
                return tensor
    raise LaAciqError(f"tensor {name!r}: expected values to save, got none: it is on the meta device")


def prepare(model: nn.Module, quantization: Quantization) -> None:
    """Give a quantized model of transformers the attributes of one that transformers has quantized.

    By them `save_pretrained` writes it as a quantized one, and `Trainer` and `half()` refuse it.

    Args:
        model: The model, which is changed; one that is not of transformers is left as it is.
        quantization: How it was quantized.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return
    from ..nn.attention import use_attention

    # The digest is that of the tensors when they are saved.
    config = LaAciqConfig.of(describe(quantization, ""))
    hugging_face: Any = model
    hugging_face.config.quantization_config = config
    hugging_face.hf_quantizer = LaAciqQuantizer(config, pre_quantized=True)
    hugging_face.is_quantized, hugging_face.quantization_method = True, METHOD
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = True
    # Tensors are saved under the names of the quantized model, not renamed back to those of the original files.
    hugging_face._weight_conversions = []
    use_attention(model)


AFTER_QUANTIZING.append(prepare)


def _check_undistributed(settings: Any) -> None:
    """Raises `LaAciqError` for transformers' parallelism, whose plans name weights that quantized layers lack."""
    sizes = [
        name for name in ("tp_size", "fsdp_size", "pp_size", "dp_size") if (getattr(settings, name, None) or 1) > 1
    ]
    if sizes or getattr(settings, "tp_plan", None):
        raise LaAciqError(
            f"a model quantized by LA-ACIQ cannot be distributed by transformers ({', '.join(sizes) or 'tp_plan'}); "
            "expected one process, device_map for several devices, or vLLM for tensor parallelism"
        )
