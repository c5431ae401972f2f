"""How the rows of a layer's input belong to a model's tokens: detected by passes of two shapes, read at run time.

A layout is a string, the leading dimensions of an input [..., K] in order:

- "batch tokens", "tokens batch", "batch n tokens" (a dimension of the layer's own between them), and "batch*tokens",
  "tokens*batch" for one dimension over both; further dimensions may follow. "memory" in place of "tokens" is what
  cross-attention reads, "kept" the tokens that an output head computes (`logits_to_keep`).
- "batch", "n batch": rows have a language, but are no single tokens: pooled, padded or joined with cached ones. None of
  them is a first token.
- "none": the input does not depend on the text, such as embeddings of distances. Its rows read the entry `und`.

A layer whose calls have several layouts, or another one, has none and is left alone.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LaAciqError
from .first_token import PAST

# Strongest first: where several fit, the first is meant.
_BY_TOKEN = ("batch {} ", "{} batch ", "batch n {} ", "batch*{}", "{}*batch")
_BY_ROW = ("batch", "n batch")


class LayoutDetector:
    """Collects what passes through layers in a few passes, and tells their layouts.

    Run, inside `attached`, the same batch twice, the second time `rolled` by one row, and then batches of other shapes.

    Args:
        modules: The layers by name; the first argument of their calls is their input.
        shape_of_pass: Says [batch, tokens, tokens of the memory] of the running pass.
        head: The name of the model's output head, or None.
    """

    def __init__(self, modules: dict[str, nn.Module], shape_of_pass: Callable[[], Any], head: str | None) -> None:
        self._modules, self._shape_of_pass, self._head = modules, shape_of_pass, head
        self._passes: list[dict[str, list[tuple[Tensor, Any]]]] = []

    def run(self, call: Callable[[], Any]) -> Any:
        """What a call of the model returns, noting the inputs of its layers."""
        inputs: dict[str, list[tuple[Tensor, Any]]] = {}

        def hook(name: str) -> Callable[..., None]:
            def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                x = args[0] if args else next(iter(kwargs.values()))
                # One number per row is enough to tell rows apart.
                generator = torch.Generator().manual_seed(x.shape[-1])
                weights = torch.randn(x.shape[-1], generator=generator).to(x.device)
                inputs.setdefault(name, []).append(((x.float() @ weights).cpu(), self._shape_of_pass()))

            return note

        handles = [
            module.register_forward_pre_hook(hook(name), with_kwargs=True) for name, module in self._modules.items()
        ]
        try:
            output = call()
            self._passes.append(inputs)
            return output
        finally:
            for handle in handles:
                handle.remove()

    def layouts(self) -> dict[str, str | None]:
        """By the name of each layer that was called its layout; None where it has none of those known."""
        names = dict.fromkeys(name for inputs in self._passes for name in inputs)
        return {name: self._layout(name) for name in names}

    def _layout(self, name: str) -> str | None:
        calls = [inputs.get(name, []) for inputs in self._passes]
        plain, rolled = calls[0], calls[1]
        if not plain or len(plain) != len(rolled):
            return None
        constant = [
            x.shape == y.shape and torch.allclose(x, y, rtol=1e-3, atol=1e-3 * float(x.abs().max()) + 1e-30)
            for (x, _), (y, _) in zip(plain, rolled, strict=True)
        ]
        candidates = [form.format(axis).strip() for axis in ("tokens", "memory") for form in _BY_TOKEN] + list(_BY_ROW)
        for layout in candidates:
            if not all(_fits(layout, x.shape, shape) for inputs in calls for x, shape in inputs):
                continue
            if all(
                same or _rolls(layout, x, y, shape[0])
                for same, (x, shape), (y, _) in zip(constant, plain, rolled, strict=True)
            ):
                return "batch kept" if name == self._head and layout == "batch tokens" else layout
        # The same for every text, and for every batch.
        shapes = {x.shape for inputs in calls for x, _ in inputs}
        return "none" if all(constant) and len(shapes) <= len(plain) else None


def _tokens(layout: str, shape: tuple[int, int | None, int | None]) -> int | None:
    return shape[2] if "memory" in layout else shape[1]


def _fits(layout: str, leading: Sequence[int], shape: Any) -> bool:
    """Whether an input of these leading dimensions can have a layout in a pass of [batch, tokens, memory]."""
    if shape is None:
        return False
    batch, tokens = shape[0], _tokens(layout, shape)
    if layout in _BY_ROW:
        place = layout.split().index("batch")
        return len(leading) > place and leading[place] == batch
    if tokens is None:
        return False
    if "*" in layout:
        return len(leading) == 1 and leading[0] == batch * tokens
    axes = layout.split()
    return len(leading) >= len(axes) and all(
        leading[place] == (batch if axis == "batch" else tokens) for place, axis in enumerate(axes) if axis != "n"
    )


def _rolls(layout: str, x: Tensor, y: Tensor, batch: int) -> bool:
    """Whether y is x with the rows of the batch rolled by one, where a layout has them."""
    if x.shape != y.shape:
        return False
    if "*" in layout:
        x, y = (z.view(batch, -1) if layout.startswith("batch") else z.view(-1, batch) for z in (x, y))
        place = 0 if layout.startswith("batch") else 1
    else:
        place = layout.split().index("batch")
    rolled = x.roll(1, place)
    return float((y - rolled).abs().mean()) < 0.1 * float((y - x).abs().mean())


def ids_in_layout(layout: str, leading: Sequence[int], ids: Tensor | None, batch_ids: Tensor) -> Tensor | None:
    """Language ids for an input of these leading dimensions, matching them from the left; None for the entry `und`.

    Args:
        layout: The layer's.
        leading: The input's dimensions without the last.
        ids: Those of the pass's tokens, or of the memory, int32 [batch, tokens]; None where rows are no tokens.
        batch_ids: Those of the batch, int32 [batch].

    Raises:
        LaAciqError: The input does not have the layout.
    """
    if layout == "none":
        return None
    if ids is None or ids.ndim == 1:  # an encoder of features has no tokens
        layout = layout if layout in _BY_ROW else "batch"
    by_row = ids is None or layout in _BY_ROW
    number = None if by_row or ids is None else ids.shape[1]
    shape = (len(batch_ids), number, number)
    if not _fits(layout.replace("kept", "tokens"), leading, shape):
        raise LaAciqError(
            f"a quantized layer got an input of shape {[*leading, 'K']} in a pass over [batch, tokens] = "
            f"{list(shape[:2])}, and its inputs in calibration were {layout!r}; the language of its rows is unknown"
        )
    if ids is None or by_row:
        return batch_ids if layout == "batch" else batch_ids.expand(leading[0], -1).contiguous()
    first, *_ = layout.replace("*", " ").split()
    ordered = ids if first == "batch" else ids.T.contiguous()
    if "*" in layout:
        return ordered.reshape(-1)
    return ordered[:, None].expand(-1, leading[1], -1).contiguous() if " n " in layout else ordered


def detect_layouts(
    network: Any, call: Mapping[str, Tensor], detector: LayoutDetector, device: torch.device
) -> dict[str, str | None]:
    """The layouts of a model's layers, from a few passes over batches like one of its calls.

    Args:
        network: The model, or its body, to which the detector's state is attached.
        call: The arguments of a call, with a batch of one.
        detector: For the layers of the model.
        device: Of the model.
    """
    generator = torch.Generator().manual_seed(0)

    def batch_of(rows: int, tokens: int) -> dict[str, Tensor]:
        """The call for a batch of other ids. Lengths vary where no other argument has them."""
        arguments = {}
        varies = all(name.endswith("input_ids") or value.ndim > 2 for name, value in call.items())
        for name, value in call.items():
            if name.endswith("input_ids"):
                count = value.shape[1] if not varies else tokens if name == "input_ids" else tokens - 4
                picks = torch.randint(value.numel(), (rows, count), generator=generator)
                arguments[name] = value.flatten()[picks].to(device)
            else:
                arguments[name] = (
                    value.expand(rows, *value.shape[1:]).to(device) if len(value) == 1 else value.to(device)
                )
        return arguments

    taken = signature(getattr(network, "forward", network)).parameters
    plain: dict[str, Any] = {"use_cache": False} if "use_cache" in taken else {}
    first = batch_of(3, 11)
    detector.run(lambda: network(**first, **plain))
    detector.run(lambda: network(**{name: value.roll(1, 0) for name, value in first.items()}, **plain))
    detector.run(lambda: network(**batch_of(2, 13), **plain))
    if plain and set(call) == {"input_ids"}:
        prompt, token = batch_of(1, 11), batch_of(1, 1)
        output = detector.run(lambda: network(**prompt, use_cache=True))
        past = next((name for name in PAST if getattr(output, name, None) is not None), None)
        if past is not None:
            with suppress(Exception):  # some models want all tokens again beside the cache, or fail with one
                detector.run(lambda: network(**token, **{past: output[past]}, use_cache=True))
    return detector.layouts()
