"""Quantized linear layers that read the very same tensor, computed in one call.

A transformer's query, key and value projections share their input, and so do the two first projections of a gated MLP.
Rotating and quantizing the input and the cost of a call are the same for all of them. That matters most where a token
is decoded and a layer takes a few tens of microseconds.
"""

import copy
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

# Calls in a row whose outputs nobody fetched all of, after which the layers part: they read different tensors.
_WASTED = 8


class JoinedLayers:
    """The layers (`LanguageAwareLinear` with INT4 weights) that read one tensor.

    Their weights become views of joined ones; state dicts, copies and pickles have storages of their own (see
    `LanguageAwareLinear`). In a forward pass of the model the first layer called with a tensor computes the outputs of
    all, and the others fetch theirs when they are called with that tensor. They get it only where nothing can have
    changed since: in the same pass, of the same tensor and with the same buffers, none of them written since by
    PyTorch's own count. Where there is no such count (tensors of inference mode) and outside of a pass each layer is
    computed for itself. An output that its layer never asks for is kept until the next call.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self._layers = tuple(layers)
        self._sizes = [layer.out_features for layer in layers]
        self._states: list[list[Any]] = []  # of the layers' buffers, as `_join` left them
        self._buffers: list[Tensor | None] = []  # those buffers: while they live, no other tensor has their ids
        self._joined: tuple[Tensor, Tensor, Tensor | None] | None = None
        self._pending: tuple[Tensor, int, Any, dict[int, Tensor]] | None = None
        self._wasted = 0
        for place, layer in enumerate(layers):
            layer.joined_layers, layer.place = self, place

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, whose tensors have other ids and versions."""
        return self.__dict__ | {"_pending": None, "_joined": None, "_states": [], "_buffers": []}

    def __deepcopy__(self, memo: dict[int, Any]) -> "JoinedLayers | None":
        """A layer that is copied without its model is computed alone: the others are not copied with it."""
        if not self._layers[0].state.copied_with(memo):
            return None
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def part(self) -> None:
        """From now on each layer is computed for itself."""
        self._pending = self._joined = None
        self._states, self._buffers = [], []
        for layer in self._layers:
            layer.joined_layers = None

    def output(self, place: int, x: Tensor) -> Tensor:
        """The output [..., N] of the layer at this place for x [..., K], in x's dtype."""
        layer = self._layers[place]
        current = layer.state.current_pass
        if current is None or x.is_inference():
            return self._alone(layer, x)
        pending = self._pending
        if pending is not None and pending[0] is x and pending[1] == x._version and pending[2] is current:
            outputs = pending[3]
            if place in outputs and _state(layer) == self._states[place]:
                output = outputs.pop(place)
                if not outputs:
                    self._pending, self._wasted = None, 0
                return output
        self._wasted += pending is not None
        joined = self._join() if self._wasted < _WASTED else None
        if joined is None:
            self.part()
            return self._alone(layer, x)
        y = layer.multiply(x, *joined)
        if torch.is_grad_enabled():  # autograd forbids to write to one of several views that one call made
            ends = accumulate(self._sizes)
            views = [y.narrow(-1, end - size, size) for size, end in zip(self._sizes, ends, strict=True)]
        else:
            views = list(torch.split_with_sizes(y, self._sizes, dim=-1))
        outputs = dict(enumerate(views))
        output = outputs.pop(place)
        self._pending = x, x._version, current, outputs
        return output

    @staticmethod
    def _alone(layer: Any, x: Tensor) -> Tensor:
        buffers = layer._buffers
        out: Tensor = layer.multiply(x, buffers["weight_codes"], buffers["weight_clip"], buffers["bias"])
        return out

    def _join(self) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """The joined codes, clips of the weights and biases; made again when a layer's were replaced or written.

        None when a layer has been given clips, a center or signs of its own, or a buffer of inference mode, and when
        not all hold their weights in the same layout.
        """
        states = [_state(layer) for layer in self._layers]
        if self._joined is None or states != self._states:
            if not all(self._agree(name) for name in ("clips", "center", "signs")):
                return None
            if len({layer._buffers["weight_codes"].dtype for layer in self._layers}) > 1:  # only some can be repacked
                return None
            if any(b is not None and b.is_inference() for layer in self._layers for b in layer._buffers.values()):
                return None
            with torch.no_grad(), torch.inference_mode(False):
                codes, clips = self._joined_buffer("weight_codes"), self._joined_buffer("weight_clip")
                biases = [layer._buffers["bias"] for layer in self._layers]
                bias = None if biases[0] is None else torch.cat(biases, dim=-1)  # [N] or [entries, N], and small
            self._joined = codes, clips, bias
            self._states = [_state(layer) for layer in self._layers]
            self._buffers = [buffer for layer in self._layers for buffer in layer._buffers.values()]
        return self._joined

    def _agree(self, name: str) -> bool:
        first, *others = (layer._buffers[name] for layer in self._layers)
        return first is None or first.is_meta or all(torch.equal(first, other) for other in others)

    def _joined_buffer(self, name: str) -> Tensor:
        buffers = [layer._buffers[name] for layer in self._layers]
        joined = _adjacent(buffers)
        if joined is None:
            joined = torch.cat(buffers)
            views = torch.split(joined, [len(buffer) for buffer in buffers])
            for layer, view in zip(self._layers, views, strict=True):
                layer._buffers[name] = view
        return joined


def _state(layer: Any) -> list[Any]:
    """What differs when a buffer of the layer is another tensor or was written in place.

    Equal to nothing where a buffer is a tensor of inference mode, whose writes are not counted.
    """
    try:
        return [x is not None and (id(x), x._version) for x in layer._buffers.values()]
    except RuntimeError:
        return [object()]


def _adjacent(tensors: Sequence[Tensor]) -> Tensor | None:
    """One view over tensors that lie one after the other in the same memory already; None when they do not."""
    first, place = tensors[0], tensors[0].storage_offset()
    for tensor in tensors:
        same = tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if tensor.is_meta or not same or tensor.storage_offset() != place or not tensor.is_contiguous():
            return None
        place += tensor.numel()
    return first.as_strided((sum(len(tensor) for tensor in tensors), *first.shape[1:]), first.stride())
