"""The README.md of a quantized model: what it is, what it costs each language, and how to load it."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ..errors import LaAciqError
from ..nn.config import QuantConfig
from ..nn.linear import LanguageAwareLinear
from ..nn.quantize import Quantization, bits_per_weight


class EvaluatedConfiguration(Protocol):
    """One configuration of a report."""

    @property
    def name(self) -> str: ...

    @property
    def config(self) -> Mapping[str, Any]: ...


class EvaluationReport(Protocol):
    """What a card needs of a report of `la_aciq.evaluate`, a dataclass that also has `comparisons` and `regret`."""

    @property
    def model(self) -> Mapping[str, Any]: ...

    @property
    def configurations(self) -> Sequence[EvaluatedConfiguration]: ...

    def markdown(self) -> str:
        """The report as tables by language."""
        ...


def model_card(model: nn.Module, report: EvaluationReport | None = None) -> str:
    """Markdown with the front matter of the Hugging Face hub.

    Args:
        model: of `quantize_model`.
        report: of an evaluation of this configuration of this model; its table by language goes into the card,
            otherwise what the statistics were measured on and how the clips differ between the languages.

    Returns:
        The text of a README.md.

    Raises:
        LaAciqError: the report is of another model or other configurations.
    """
    quantized: Any = model
    quantization: Quantization = quantized.la_aciq
    if report is not None:
        table = _only(report, _configuration(report, quantization)).markdown()
    else:
        table = _calibration_table(model, quantization)
    name = Path(str(getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__)).name
    config = quantization.config
    tags = "".join(f"- {tag}\n" for tag in sorted({tag.partition("-")[0] for tag in quantization.calibration_tokens}))
    skipped = "".join(f"- `{layer}`: {reason}\n" for layer, reason in quantization.skipped.items())
    settings = "".join(f"| {key} | {_cell(value)} |\n" for key, value in config.to_dict().items())
    return f"""---
library_name: transformers
tags:
- la-aciq
- int4
- quantized
language:
{tags}---

# {name}, quantized by LA-ACIQ

{bits_per_weight(model):.2f} bits per weight in {len(quantization.layers)} layers, {config.activations}-bit activations,
{config.kv}-bit keys and values.

{table}
## Use

```python
import la_aciq  # registers the quantization method
from transformers import {type(model).__name__}

model = {type(model).__name__}.from_pretrained(folder)
with la_aciq.language("{next(iter(quantization.calibration_tokens), "und")}"):
    ...
```

A language without an entry of its own is served by the pooled entry.

## Settings

| setting | value |
| --- | --- |
{settings}
Layers left as they were:

{skipped or "none"}"""


def _configuration(report: EvaluationReport, quantization: Quantization) -> EvaluatedConfiguration:
    if report.model.get("fingerprint") != quantization.fingerprint:
        raise LaAciqError("the report is of another model than the one that was quantized")
    defaults = QuantConfig().to_dict()  # of settings that a report of an earlier version lacks
    for configuration in report.configurations:
        if defaults | dict(configuration.config) == quantization.config.to_dict():
            return configuration
    names = ", ".join(configuration.name for configuration in report.configurations)
    raise LaAciqError(f"the report has no results of this configuration; it has {names}")


def _only(report: Any, configuration: EvaluatedConfiguration) -> EvaluationReport:
    """The report of this configuration alone. The regret is that of a profile, not of a configuration."""
    reduced: EvaluationReport = dataclasses.replace(report, configurations=[configuration], comparisons=[], regret={})
    return reduced


def _calibration_table(model: nn.Module, quantization: Quantization) -> str:
    """Per language the tokens its statistics come from, and its clips relative to the pooled ones where it has any."""
    # Pooled tables have no entries of languages.
    names = dict.fromkeys([*quantization.state.entries, *quantization.calibration_tokens])
    rows = {name: f"| {name} | {quantization.calibration_tokens.get(name, '')} |" for name in names}
    layers = [module for module in model.modules() if isinstance(module, LanguageAwareLinear)]
    clips = [layer.clips for layer in layers if layer.clips is not None and not layer.clips.is_meta]
    if quantization.config.clip == "absmax" or not clips:
        lines = ["| entry | calibration tokens |", "| --- | ---: |", *rows.values()]
        return "Not evaluated yet. What the languages' statistics were measured on:\n\n" + "\n".join(lines) + "\n"
    # Geometric means over the groups of all layers, of each entry's clips over the pooled entry's.
    logarithms = [torch.log(table / table[:1]).double().mean(dim=1) for table in clips]
    means = torch.stack(logarithms).mean(dim=0).exp().tolist()
    lines = ["| entry | calibration tokens | clips |", "| --- | ---: | ---: |"]
    relative = dict(zip(quantization.state.entries, means, strict=True))
    lines += [f"{line} {relative.get(name, 1):.3f} |" for name, line in rows.items()]
    return (
        "Not evaluated yet. What the clips were chosen on, and the activations' clips relative to those of the pooled "
        "entry `und` (geometric mean over layers and groups):\n\n" + "\n".join(lines) + "\n"
    )


def _cell(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
