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
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoint.folder import METHOD, check_files, describe, digest, read_description, stored_tensors
from ..errors import LaAciqError
from ..models import fingerprint_of, sample
from ..nn.config import QuantConfig
from ..nn.quantize import Plan, Quantization, adopt, install
from ..profile import Profile


@register_quantization_config(METHOD)
class LaAciqConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers has no type information
    """How `from_pretrained` quantizes a model: a profile, and the fields of `QuantConfig`.

    profile: a `Profile` of this model, or the folder of one. settings: fields of `QuantConfig`; group_size, rotate and
    ignore are the profile's unless given.

    After loading, `description` is what was done (see `la_aciq.checkpoint.folder`), and what config.json holds.
    """

    def __init__(self, profile: Profile | str | os.PathLike[str], **settings: Any) -> None:
        if not isinstance(profile, Profile):
            profile = Profile.load(profile)
        own = {
            "group_size": profile.metadata["group_size"],
            "rotate": profile.metadata["rotation"]["enabled"],
            "ignore": profile.metadata["ignore"],
        }
        self.quant_method = METHOD
        self.profile: Profile | None = profile
        self.config = QuantConfig.from_dict(own | settings)
        self.description: dict[str, Any] | None = None

    @classmethod
    def of(cls, description: dict[str, Any]) -> "LaAciqConfig":
        """The configuration of a model that is quantized already; raises `LaAciqError` for an inconsistent one."""
        done, _ = read_description(description)
        made = cls.__new__(cls)
        made.quant_method, made.profile, made.config, made.description = METHOD, None, done.config, dict(description)
        return made

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The configuration in a config.json."""
        made = cls.of(config_dict)
        return (made, kwargs) if return_unused_kwargs else made

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
        self._done: Quantization | None = None
        self._parameters: list[str] = []  # names in the unquantized model
        self._samples: dict[str, bytes] = {}  # of the parameters that are not there any more
        self._replaced: set[str] = set()
        self._failure: LaAciqError | None = None

    def is_serializable(self) -> bool:
        """Whether `save_pretrained` works: yes."""
        return True

    def update_weight_conversions(self, weight_conversions: list[Any], *model: nn.Module) -> list[Any]:
        """How names in the files become names in the model: a quantized model's files have the model's own names."""
        if self.pre_quantized:
            return []
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
        if not checkpoint_files or not all(str(file).endswith(".safetensors") for file in checkpoint_files):
            raise LaAciqError("LA-ACIQ loads models from safetensors files only")
        config = self.quantization_config
        if self.pre_quantized:
            self._done, sha256 = read_description(config.to_dict())
            hugging_face: Any = model
            names = hugging_face.config.architectures or []
            if names and type(model).__name__ not in names:
                raise LaAciqError(
                    f"the checkpoint is that of a {names[0]}, which was quantized as a whole; load it as one"
                )
            install(model, self._done)
            check_files(model, checkpoint_files, sha256)
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
        layer, _, own = name.rpartition(".")
        module = model.get_submodule(layer)
        try:
            shape = module.get_parameter(own).shape
            if tensor.shape != shape:
                raise LaAciqError(f"parameter {name!r} has shape {list(tensor.shape)}, expected {list(shape)}")
            self._samples[name] = sample(tensor)
            setattr(module, own, nn.Parameter(tensor, requires_grad=False))
            if not any(parameter.is_meta for parameter in module.parameters()):
                quantized = self._plan.quantized(layer, module)
                for buffer in quantized.buffers():
                    buffer._is_hf_initialized = True  # type: ignore[attr-defined]  # or transformers would initialize it
                model.set_submodule(layer, quantized)
                self._replaced.add(layer)
        except LaAciqError as error:
            self._failure = error  # transformers would log it and go on; it is raised when loading ends

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if self._done is not None:
            adopt(model, self._done)
            return
        plan, profile = self._plan, self.quantization_config.profile
        if plan is None or profile is None:
            raise RuntimeError("transformers ended loading a model before it began")
        if self._failure is not None:
            raise self._failure
        if missing := [name for name in plan.names if name not in self._replaced]:
            raise LaAciqError(f"the checkpoint lacks parameters of the layer {missing[0]!r}")
        samples = {name: self._samples.get(name) or sample(model.get_parameter(name)) for name in self._parameters}
        profile.check_fingerprint(fingerprint_of(model, samples))
        plan.finish(model)

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[None, dict[str, str]]:
        """Called by `save_pretrained` before it writes config.json, which is to hold the digest of the tensors."""
        done: Any = model.la_aciq
        self.quantization_config.description = describe(done, digest(stored_tensors(model)))
        return None, {}


def prepare_for_saving(model: nn.Module, done: Quantization) -> None:
    """Give a quantized Hugging Face model the attributes by which `save_pretrained` writes it as one."""
    hugging_face: Any = model
    # The digest is that of the tensors when they are saved.
    config = LaAciqConfig.of(describe(done, ""))
    hugging_face.config.quantization_config = config
    hugging_face.hf_quantizer = LaAciqQuantizer(config, pre_quantized=True)
    # Tensors are saved under the names of the quantized model, not renamed back to those of the original files.
    hugging_face._weight_conversions = []
