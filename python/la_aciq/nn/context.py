"""The language of a request, from the `with` statement around a call to the row ids that every quantized layer reads.

`language("sw")` and `languages(["sw", "en"])` set a context variable, so each thread and each asyncio task has its
own. A model's `LanguageState` turns it, when the model's forward pass starts, into one int32 row id per token and
writes the ids in place into a persistent buffer, which the quantized layers hand to their kernels: the addresses stay
the same from call to call, as a CUDA graph needs.
"""

import inspect
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from ..errors import LaAciqError
from ..tags import UND, canonical, match

SINK = "sink"

# A tag for the whole batch, one tag per row of the batch, or None: the pooled row.
_requested: ContextVar[str | tuple[str, ...] | None] = ContextVar("la_aciq_language", default=None)


@contextmanager
def language(tag: str) -> Iterator[None]:
    """Run the model calls inside under one language: a BCP-47 tag such as "sw" or "pt-BR".

    A language that the model has no row for is served by the pooled row `und`, and counted in `LanguageState.unserved`.

    An asyncio task started inside inherits the language; a thread does not, neither threading.Thread (as with
    TextIteratorStreamer) nor loop.run_in_executor. Hand it the context, or enter `language` in the function it runs:

        Thread(target=contextvars.copy_context().run, args=(model.generate,), kwargs=inputs)

    (asyncio.to_thread does this by itself.) Raises `LaAciqError` when the tag is not BCP-47.
    """
    token = _requested.set(canonical(tag))
    try:
        yield
    finally:
        _requested.reset(token)


@contextmanager
def languages(tags: Sequence[str]) -> Iterator[None]:
    """Run the model calls inside with one language per row of the batch; calls with another batch size are refused.

    Raises `LaAciqError` when a tag is not BCP-47, `TypeError` when `tags` is a single string.
    """
    if isinstance(tags, str):
        raise TypeError(
            f"languages takes one tag per row of the batch, got the string {tags!r}; for one language use language()"
        )
    token = _requested.set(tuple(canonical(tag) for tag in tags))
    try:
        yield
    finally:
        _requested.reset(token)


# Bounded: the tags are a server's clients'.
_match = lru_cache(maxsize=4096)(match)


class LanguageState:
    """The row ids of a model's running forward pass, shared by all its quantized layers.

    `rows` are the rows of the model's clip tables: "und" first, then languages, then the class of tokens "sink", if the
    tables have it. `unserved` counts, by primary language subtag, the batch rows over all forward passes whose language
    had no row of its own. With `by_language` (the rows differ), the first pass without any language set gives a
    UserWarning.
    """

    def __init__(self, rows: Sequence[str], by_language: bool = True) -> None:
        if not rows or rows[0] != UND:
            raise ValueError(f"rows must start with {UND!r}, got {list(rows)!r}")
        self.rows = tuple(rows)
        self.unserved: Counter[str] = Counter()
        self._languages = tuple(row for row in self.rows[1:] if row != SINK)
        self._warn = by_language and bool(self._languages)
        self._sink = self.rows.index(SINK) if SINK in self.rows else None
        # One flat buffer per power of two of batch x tokens: a shape always gets the same addresses, and all shapes
        # together take less than twice the memory of the largest power of two seen, whatever lengths requests have.
        self._buffers: dict[tuple[torch.device, int], torch.Tensor] = {}
        self._ids: torch.Tensor | None = None
        self._owner: threading.Thread | None = None
        self._running: list[nn.Module] = []  # hooked modules in whose forward the owner is, the outermost first
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """For copies of a model: a copy has its own lock and buffers and is in no forward pass."""
        state = self.__dict__.copy()
        del state["_lock"]
        return state | {"_buffers": {}, "_ids": None, "_owner": None, "_running": [], "unserved": Counter()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def attach(self, model: nn.Module) -> None:
        """Hook the state to a model: its forward passes set the ids first and release them at the end."""
        # The body of a Hugging Face model may be called alone, for its hidden states.
        for module in {id(module): module for module in (model, getattr(model, "base_model", model))}.values():
            module.register_forward_pre_hook(self._begin, with_kwargs=True)
            module.register_forward_hook(self._end, always_call=True)

    def row(self, tag: str) -> int:
        """The row that serves a canonical BCP-47 tag, 0 (`und`) when no row's language is close to it."""
        return self.rows.index(_match(tag, self._languages))

    def ids_for(self, x: torch.Tensor) -> torch.Tensor | None:
        """The row ids (int32) for a layer's input x [..., K]: they match x's leading dimensions from the left.

        None, the pooled row, outside a forward pass of the model. x has the pass's [batch, tokens] positions, the same
        positions flattened, or only the last ones of each row (a head under `logits_to_keep`); anything else raises
        `RuntimeError`, because it cannot be known which token is whose.
        """
        ids = self._ids
        if ids is None:
            return None
        leading = x.shape[:-1]
        if leading[:2] != ids.shape:
            if len(leading) == 1 and leading[0] == ids.numel():
                ids = ids.view(-1)
            elif len(leading) == 2 and leading[0] == ids.shape[0] and leading[1] < ids.shape[1]:
                ids = ids[:, ids.shape[1] - leading[1] :]
            else:
                raise RuntimeError(
                    f"a quantized layer got an input of shape {list(x.shape)} in a forward pass over [batch, tokens] = "
                    f"{list(ids.shape)}; the language of each of its rows is unknown"
                )
        return ids if ids.device == x.device else ids.to(x.device)

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        current = threading.current_thread()
        with self._lock:
            # A pass that KeyboardInterrupt broke off never released: its own thread, or anyone after that thread's
            # end, goes on.
            if self._owner not in (None, current) and self._owner.is_alive():
                raise RuntimeError(
                    f"two threads called one quantized model at once ({self._owner.name!r} is in its forward pass): "
                    "each thread needs a copy of the model or a lock around the call"
                )
            if self._owner is not current:
                self._running.clear()
            self._owner = current
            if model in self._running:  # the earlier call was interrupted
                del self._running[self._running.index(model) :]
            self._running.append(model)
        if args:
            kwargs = dict(zip(inspect.signature(model.forward).parameters, args, strict=False)) | kwargs
        inputs = args[0] if args else kwargs.get("input_ids")
        if inputs is None:
            inputs = kwargs.get("inputs_embeds")
        if not isinstance(inputs, torch.Tensor) or inputs.ndim < 2:
            raise LaAciqError(
                "a quantized model's call needs input_ids [batch, tokens] or inputs_embeds [batch, tokens, width]"
            )
        self._write(inputs.shape[0], inputs.shape[1], inputs.device, kwargs)

    def _end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # The hook also runs after a pass that `_begin` refused: that pass must not release another thread's.
        with self._lock:
            if self._owner is threading.current_thread() and model in self._running:
                del self._running[self._running.index(model) :]
                if not self._running:
                    self._owner = self._ids = None

    def _write(self, batch: int, tokens: int, device: torch.device, kwargs: dict[str, Any]) -> None:
        size = 1 << max(batch * tokens - 1, 0).bit_length()
        if (device, size) not in self._buffers:
            # Made in inference mode, the buffer could not be written in place outside of it.
            with torch.inference_mode(False):
                self._buffers[device, size] = torch.zeros(size, dtype=torch.int32, device=device)
        ids = self._buffers[device, size][: batch * tokens].view(batch, tokens)
        requested = _requested.get()
        if isinstance(requested, tuple):
            if len(requested) != batch:
                raise LaAciqError(
                    f"languages() has {len(requested)} tags for a batch of {batch} rows; expected one tag per row"
                )
            rows = [self._count(tag) for tag in requested]
            ids.copy_(torch.tensor(rows, dtype=torch.int32)[:, None])
        else:
            if requested is None and self._warn:
                self._warn = False
                warnings.warn(
                    "a model with clips per language runs with no language set and uses the pooled clips; set one with "
                    "`with la_aciq.language('sw'):` in the thread that calls the model, or 'und' to pool on purpose",
                    stacklevel=2,
                )
            ids.fill_(0 if requested is None else self._count(requested, batch))
        if self._sink is not None and tokens:
            ids.masked_fill_(self._first_tokens(tokens, device, kwargs), self._sink)
        self._ids = ids

    def _count(self, tag: str, batch: int = 1) -> int:
        row = self.row(tag)
        if row == 0 and tag != UND and len(self._running) == 1:
            self.unserved[tag.partition("-")[0]] += batch
        return row

    @staticmethod
    def _first_tokens(tokens: int, device: torch.device, kwargs: dict[str, Any]) -> torch.Tensor:
        """True, [batch or 1, tokens], at each sequence's first token: after left padding, not in a continuation."""
        cache = kwargs.get("past_key_values")
        # An int, or for a static cache a tensor, which is not read back.
        past = cache.get_seq_length() if cache is not None else 0
        mask = kwargs.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            first = (mask != 0).to(torch.uint8).argmax(dim=1, keepdim=True)
        else:
            first = torch.zeros((1, 1), dtype=torch.int64, device=device)
        return torch.arange(tokens, device=device) + past == first
