"""The README.md of a quantized model: what it is, what it costs each language, and how to load it."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import LaAciqError
from ..nn.linear import LanguageAwareLinear
from ..nn.quantize import Quantization, bits_per_weight

if TYPE_CHECKING:
    from ..evaluation import Configuration, Report


def model_card(model: nn.Module, report: "Report | None" = None) -> str:
    """Markdown with the front matter of the Hugging Face hub.

    report: of an evaluation of this configuration of this model; its table by language goes into the card, otherwise
    what the statistics were measured on and how the clips differ between the languages. Raises `LaAciqError` for the
    report of another model or other configurations.
    """
    quantized: Any = model
    done: Quantization = quantized.la_aciq
    if report is not None:
        chosen = _configuration(report, done)
        # The regret is that of a profile, not of this configuration.
        only = dataclasses.replace(report, configurations=[chosen], comparisons=[], regret={})
        table = only.markdown()
    else:
        table = _calibration_table(model, done)
    name = Path(str(getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__)).name
    config = done.config
    tags = "".join(f"- {tag}\n" for tag in sorted({row.partition("-")[0] for row in done.calibration_tokens}))
    skipped = "".join(f"- `{layer}`: {reason}\n" for layer, reason in done.skipped.items())
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

{bits_per_weight(model):.2f} bits per weight in {len(done.layers)} layers, {config.activations}-bit activations,
{config.kv}-bit keys and values.

{table}
## Use

```python
import la_aciq  # registers the quantization method
from transformers import {type(model).__name__}

model = {type(model).__name__}.from_pretrained(folder)
with la_aciq.language("{next(iter(done.calibration_tokens), "und")}"):
    ...
```

A language without a row of its own is served by the pooled row.

## Settings

| setting | value |
| --- | --- |
{settings}
Layers left as they were:

{skipped or "none"}"""


def _configuration(report: "Report", done: Quantization) -> "Configuration":
    if report.model.get("fingerprint") != done.fingerprint:
        raise LaAciqError("the report is of another model than the one that was quantized")
    found = [one for one in report.configurations if one.config == done.config.to_dict()]
    if not found:
        names = ", ".join(one.name for one in report.configurations)
        raise LaAciqError(f"the report has no results of this configuration; it has {names}")
    return found[0]


def _calibration_table(model: nn.Module, done: Quantization) -> str:
    """Per language the tokens its statistics come from, and its clips relative to the pooled ones where it has any."""
    names = dict.fromkeys([*done.state.entries, *done.calibration_tokens])  # pooled tables have no rows of languages
    rows = {row: f"| {row} | {done.calibration_tokens.get(row, '')} |" for row in names}
    layers = [module for module in model.modules() if isinstance(module, LanguageAwareLinear)]
    clips = [layer.clip for layer in layers if layer.clip is not None and not layer.clip.is_meta]
    if done.config.clip == "absmax" or not clips:
        lines = ["| row | calibration tokens |", "| --- | ---: |", *rows.values()]
        return "Not evaluated yet. What the languages' statistics were measured on:\n\n" + "\n".join(lines) + "\n"
    # Geometric means over the groups of all layers, of each row's clips over the pooled row's.
    mean = torch.stack([torch.log(clip / clip[:1]).double().mean(dim=1) for clip in clips]).mean(dim=0).exp().tolist()
    lines = ["| row | calibration tokens | clips |", "| --- | ---: | ---: |"]
    clip = dict(zip(done.state.entries, mean, strict=True))
    lines += [f"{line} {clip.get(row, 1):.3f} |" for row, line in rows.items()]
    return (
        "Not evaluated yet. What the clips were chosen on, and the activations' clips relative to those of the pooled "
        "row `und` (geometric mean over layers and groups):\n\n" + "\n".join(lines) + "\n"
    )


def _cell(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
