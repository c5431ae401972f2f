"""The language of a request, from the `with` statement around a call to the row ids that every quantized layer reads.

`language("sw")` and `languages(["sw", "en"])` set a context variable, so each thread and each asyncio task has its
own. A model's `LanguageState` turns it, when the model's forward pass starts, into one int32 row id per token and
writes the ids in place into a persistent buffer, which the quantized layers hand to their kernels: the addresses stay
the same from call to call, as a CUDA graph needs.
"""

import copy
import inspect
import math
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import lru_cache
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..errors import LaAciqError
from ..tags import SINK, UND, canonical, match

# A tag for the whole batch, one tag per row of the batch, or None: the pooled row.
_requested: ContextVar[str | tuple[str, ...] | None] = ContextVar("la_aciq_language", default=None)
# Whether `generate` runs: it repeats each row of the batch for its beams or return sequences.
_generating: ContextVar[bool] = ContextVar("la_aciq_generating", default=False)


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
    tables have it; pooled tables have no languages. `unserved` counts, by primary language subtag, the batch rows over
    all forward passes whose language had no row of its own where others have. With `by_language` (the rows differ), the
    first pass without any language set gives a UserWarning.
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
        self._buffers: dict[tuple[str, torch.device, int], torch.Tensor] = {}
        self._ids: torch.Tensor | None = None
        # The one row that all tokens of the running pass have, where that is known without waiting for a device: layers
        # are spared looking each token's up. None for several, and in compiled code, which would hold on to it.
        self.common_row: int | None = None
        self._memory: tuple[torch.Tensor, torch.Tensor] | None = None  # what cross-attention reads, and its ids
        self._features = False  # whether an encoder reads features, such as a spectrogram's, instead of tokens
        self._counted = False  # whether the running pass has counted the languages that have no row
        self._owner: threading.Thread | None = None
        self._running: list[nn.Module] = []  # hooked modules in whose forward the owner is, the outermost first
        self._whole = False  # whether the whole model is the outermost of them, not its body alone
        # For the INT4 cache: the model and the module that is given one, the running pass's row per row of the batch
        # and its attention mask.
        self._model: nn.Module | None = None
        self._hooked: tuple[nn.Module, ...] = ()
        self._cached: tuple[nn.Module, nn.Module] | None = None
        self._warn_cache = True
        self._batch_rows: list[int] = []
        self._of_batch: torch.Tensor | None = None  # the same, int32 [batch] in a persistent buffer
        self._mask: torch.Tensor | None = None
        self._lock = threading.Lock()

    def copied_with(self, memo: dict[int, Any]) -> bool:
        """Whether a copy in progress is that of the model, or of a part that has its passes; not of a layer alone."""
        return not self._hooked or any(id(module) in memo for module in self._hooked)

    def __deepcopy__(self, memo: dict[int, Any]) -> "LanguageState":
        """A copy of a layer alone has the state of the layer's model, not a copy of all of it."""
        if not self.copied_with(memo):
            return self
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """For copies of a model: a copy has its own lock and buffers and is in no forward pass."""
        state = self.__dict__.copy()
        del state["_lock"]
        return state | {
            "_buffers": {},
            "_ids": None,
            "_of_batch": None,
            "_memory": None,
            "common_row": None,
            "_owner": None,
            "_running": [],
            "_mask": None,
            "unserved": Counter(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def attach(self, model: nn.Module, cached: bool = False) -> list[RemovableHandle]:
        """Hook the state to a model: its forward passes set the ids first and release them at the end.

        An encoder-decoder's two parts have positions of their own and set their ids each for itself; cross-attention
        reads those of the encoder. cached: the model's passes get an INT4 cache. Returns the handles of the hooks.
        """
        self._model = model
        # The body of a Hugging Face model may be called alone, for its hidden states.
        whole = [model, getattr(model, "base_model", model)]
        reading = whole
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            hugging_face: Any = model
            reading = [hugging_face.get_encoder(), hugging_face.get_decoder()]
            self._features = _reads_features(reading[0])
        self._cached = (model, reading[-1]) if cached else None
        modules = {id(module): module for module in [*whole, *reading]}
        self._hooked = tuple(modules.values())
        handles = []
        for key, module in modules.items():
            begin, end = self._begin if any(key == id(part) for part in reading) else self._enter, self._end
            if module is not model and reading is whole:
                begin, end = self._begin_body, self._end_body
            handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
            handles.append(module.register_forward_hook(end, always_call=True))
        return handles

    @property
    def current_pass(self) -> Any:
        """An object that is another one in every forward pass; None outside of them."""
        return self._ids

    def row(self, tag: str) -> int:
        """The row that serves a canonical BCP-47 tag, 0 (`und`) when no row's language is close to it."""
        return self.rows.index(_match(tag, self._languages))

    def ids_for(self, x: torch.Tensor) -> torch.Tensor | None:
        """The row ids (int32) for a layer's input x [..., K]: they match x's leading dimensions from the left.

        None, the pooled row, outside a forward pass of the model. x has the pass's [batch, tokens] positions, the same
        positions flattened, only the last ones of each row (a head under `logits_to_keep`), those of the encoder that a
        decoder's cross-attention reads, or one row for each of the batch (a pooler, a classifier's head), which has its
        language's row whichever token it was; anything else raises `RuntimeError`, because it cannot be known which
        token is whose.
        """
        ids = self._ids
        if ids is None:
            return None
        memory = self._memory
        if memory is not None and (
            x is memory[0] or (_matching(ids, x) is None and _matching(memory[1], x) is not None)
        ):
            ids = memory[1]
        found = _matching(ids, x)
        if found is None and self._of_batch is not None and x.ndim == 2 and len(x) == len(self._of_batch):
            found = self._of_batch
        if found is None:
            raise RuntimeError(
                f"a quantized layer got an input of shape {list(x.shape)} in a forward pass over [batch, tokens] = "
                f"{list(ids.shape)}; the language of each of its rows is unknown"
            )
        return found if found.device == x.device else found.to(x.device)

    @contextmanager
    def picked(self, x: torch.Tensor, tokens: torch.Tensor) -> Iterator[None]:
        """Inside, layers read rows x[tokens] of a layer's input x [T, K] (int64 [n]), as experts do."""
        before, memory = self._ids, self._memory
        ids = self.ids_for(x)
        self._ids, self._memory = None if ids is None else ids[tokens], None
        try:
            yield
        finally:
            self._ids, self._memory = before, memory

    def _begin_body(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # In a compiled graph of the whole model, which has set the ids before it: a break less.
        if torch.compiler.is_compiling() and self._whole:
            return None
        return self._begin(model, args, kwargs)

    def _end_body(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not (torch.compiler.is_compiling() and self._whole):
            self._end(model, args, output)

    # What sets and releases the ids is never traced: it reads the context, and a graph would hold on to what it read.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
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
            if not self._running:
                self._counted = False
            self._running.append(model)
            self._whole = self._running[0] is self._model

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _begin(
        self, model: nn.Module, args: tuple[Any, ...], given: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._enter(model, args, given)
        kwargs = given
        if args:
            kwargs = dict(zip(inspect.signature(model.forward).parameters, args, strict=False)) | kwargs
        inputs = args[0] if args else kwargs.get("input_ids")
        if inputs is None:
            inputs = kwargs.get("inputs_embeds")
        if inputs is None and _reads_features(model):
            inputs = kwargs.get(str(model.main_input_name))
        if not isinstance(inputs, torch.Tensor) or inputs.ndim < 2:
            raise LaAciqError(
                "a quantized model's call needs input_ids [batch, tokens] or inputs_embeds [batch, tokens, width]"
            )
        batch, device = inputs.shape[0], inputs.device
        self._memory = self.common_row = None
        if _reads_features(model):  # how many positions it makes of them is its own affair, and none is a first token
            self._ids = self._write("own", (batch,), device)
            return None
        first = self._first_tokens(inputs.shape[1], device, kwargs.get("attention_mask"), kwargs.get("past_key_values"))
        self._ids = self._write("own", (batch, inputs.shape[1]), device, first)
        if (
            device.type == "cpu"
            and len(set(self._batch_rows)) == 1
            and not (self._sink is not None and bool(first.any()))
        ):
            self.common_row = self._batch_rows[0]
        memory = kwargs.get("encoder_hidden_states")
        if isinstance(memory, torch.Tensor) and memory.ndim == 3:
            self.common_row = None
            if self._features:
                ids = self._write("memory", (batch,), device)
            else:
                first = self._first_tokens(memory.shape[1], device, kwargs.get("encoder_attention_mask"), None)
                ids = self._write("memory", (batch, memory.shape[1]), device, first)
            self._memory = (memory, ids)
        if self._cached is None or not (model is self._cached[1] or self._cached[0] in self._running):
            return None
        mask = kwargs.get("attention_mask")
        self._mask = mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
        cache = self._int4_cache(model, kwargs)
        return None if cache is None else (args, given | {"past_key_values": cache})

    def _int4_cache(self, model: nn.Module, kwargs: dict[str, Any]) -> Any:
        """The new INT4 cache for a pass that would make one of its own; an empty DynamicCache becomes one in place."""
        from transformers.cache_utils import DynamicCache, EncoderDecoderCache

        from .cache import LanguageAwareCache

        if self._cached is None:
            return None
        whole: Any = self._cached[0]
        cache = kwargs.get("past_key_values")
        if cache is None:
            uses = kwargs.get("use_cache")
            if "past_key_values" not in inspect.signature(model.forward).parameters or not (
                getattr(whole.config, "use_cache", False) if uses is None else uses
            ):
                return None
            made = LanguageAwareCache(whole)
            if not whole.config.is_encoder_decoder:
                return made
            return EncoderDecoderCache(made, DynamicCache(config=whole.config.get_text_config(decoder=True)))
        own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        if type(own) is DynamicCache and not own.offloading and own.get_seq_length() == 0:
            LanguageAwareCache.take_over(own, whole)
        elif not isinstance(own, LanguageAwareCache) and self._warn_cache:
            self._warn_cache = False
            warnings.warn(
                f"kv = 4, but the {type(own).__name__} given keeps keys and values as they are; expected none, an "
                "empty DynamicCache without offloading, or a LanguageAwareCache",
                stacklevel=2,
            )
        return None

    def rows_of_batch(self, batch: int, device: torch.device) -> torch.Tensor:
        """The row of each row of the running pass's batch, int32 [batch]; the pooled row outside of a pass."""
        rows = self._batch_rows if self._ids is not None else [0] * batch
        if len(rows) != batch:
            raise LaAciqError(f"the cache got a batch of {batch} rows in a pass over {len(rows)}")
        return torch.tensor(rows, dtype=torch.int32, device=device)

    def check_rows(self, rows: torch.Tensor) -> None:
        """Raises `LaAciqError` when these are not the running pass's rows (on the CPU, where looking is free)."""
        if rows.device.type == "cpu" and self._ids is not None and rows.tolist() != self._batch_rows:
            raise LaAciqError(
                "the languages of the batch changed between prefill and decode, and what is cached was quantized under "
                "the first ones; start with a new cache"
            )

    def starts_of_batch(self, batch: int, device: torch.device) -> torch.Tensor | None:
        """The number of each sequence's first token after left padding, int64 [batch]: that of the next token where
        the mask has none yet. None without a mask.
        """
        if self._mask is None or self._ids is None or self._mask.shape[0] != batch:
            return None
        seen = self._mask.to(device) != 0
        starts = seen.to(torch.uint8).argmax(dim=1)
        return torch.where(seen.any(dim=1), starts, seen.shape[1])

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # The hook also runs after a pass that `_begin` refused: that pass must not release another thread's.
        with self._lock:
            if self._owner is threading.current_thread() and model in self._running:
                del self._running[self._running.index(model) :]
                if not self._running:
                    self._whole = False
                    self._owner = self._mask = self.common_row = None
                    self._ids = self._of_batch = self._memory = None

    def _write(
        self, role: str, shape: tuple[int, ...], device: torch.device, first: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Ids of this shape, [batch, tokens] or [batch], in their role's persistent buffer; `first` get the sink's."""
        batch = shape[0]
        ids, of_batch = self._buffer(role, shape, device), self._buffer(f"{role} batch", (batch,), device)
        requested = _requested.get()
        if isinstance(requested, tuple):
            # `generate` has compared the tags with the inputs; what is more now are their beams, side by side.
            repeats = batch // len(requested) if _generating.get() and requested else 1
            if len(requested) * repeats != batch:
                raise LaAciqError(
                    f"languages() has {len(requested)} tags for a batch of {batch} rows; expected one tag per row"
                )
            self._batch_rows = [self._count(tag) for tag in requested for _ in range(repeats)]
            of_batch.copy_(torch.tensor(self._batch_rows, dtype=torch.int32))
            ids.copy_(of_batch.view(-1, *[1] * (len(shape) - 1)))
        else:
            if requested is None and self._warn:
                self._warn = False
                warnings.warn(
                    "a model with statistics per language runs with no language set and uses the pooled ones; set one "
                    "in the thread that calls the model: `with la_aciq.language('sw'):`, or 'und' to pool on purpose",
                    stacklevel=2,
                )
            row = 0 if requested is None else self._count(requested, batch)
            self._batch_rows = [row] * batch
            of_batch.fill_(row)
            ids.fill_(row)
        self._of_batch = of_batch
        self._counted = True
        if self._sink is not None and first is not None and ids.numel():
            ids.masked_fill_(first, self._sink)
        return ids

    def _buffer(self, role: str, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        """The persistent buffer of a role, int32 of this shape, as it was left."""
        number = math.prod(shape)
        size = 1 << max(number - 1, 0).bit_length()
        key = (role, device, size)
        if key not in self._buffers:
            # Made in inference mode, the buffer could not be written in place outside of it.
            with torch.inference_mode(False):
                self._buffers[key] = torch.zeros(size, dtype=torch.int32, device=device)
        return self._buffers[key][:number].view(shape)

    def _count(self, tag: str, batch: int = 1) -> int:
        row = self.row(tag)
        if row == 0 and tag != UND and self._languages and not self._counted:
            self.unserved[tag.partition("-")[0]] += batch
        return row

    @staticmethod
    def _first_tokens(tokens: int, device: torch.device, mask: Any, cache: Any) -> torch.Tensor:
        """True, [batch or 1, tokens], at each sequence's first token: after left padding, not in a continuation."""
        # An int, or for a static cache a tensor, which is not read back.
        past = cache.get_seq_length() if cache is not None else 0
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            first = (mask != 0).to(torch.uint8).argmax(dim=1, keepdim=True)
        else:
            first = torch.zeros((1, 1), dtype=torch.int64, device=device)
        return torch.arange(tokens, device=device) + past == first


def _reads_features(module: nn.Module) -> bool:
    """Whether a Hugging Face module reads something else than tokens or their embeddings, such as a spectrogram."""
    return getattr(module, "main_input_name", "input_ids") not in ("input_ids", "inputs_embeds")


def _matching(ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor | None:
    """Ids [batch, tokens], [batch] or [tokens], as they belong to the leading dimensions of x [..., K], if they do."""
    leading = x.shape[:-1]
    if leading[: ids.ndim] == ids.shape:
        return ids
    if ids.ndim == 2:
        if len(leading) == 1 and leading[0] == ids.numel():
            return ids.view(-1)
        if len(leading) == 2 and leading[0] == ids.shape[0] and leading[1] < ids.shape[1]:
            return ids[:, ids.shape[1] - leading[1] :]
    return None


def add_language_to_generate(model: nn.Module) -> None:
    """Give a model's `generate` the argument `language`: one tag, or a list with one per row of the inputs.

    Where it has an argument of that name already, as Whisper's has, that keeps its meaning, and `la_aciq.language` or
    `languages` around the call says the language.
    """
    generate = getattr(type(model), "generate", None)
    if generate is not None:
        own = "language" in inspect.signature(generate).parameters
        model.generate = MethodType(_generate_in_context if own else _generate, model)  # type: ignore[assignment]


def _generate(model: Any, *args: Any, language: str | Sequence[str] | None = None, **kwargs: Any) -> Any:
    """`generate` of a quantized model: the class's own, under `language`, which this call alone sees.

    language: a BCP-47 tag, or a list with one per row of the inputs (beams and return sequences have their input's);
    None for that of the surrounding `la_aciq.language` or `languages`. Raises `LaAciqError` for another number of tags
    than rows, and for a tag that is not BCP-47.
    """
    context = (
        nullcontext()
        if language is None
        else language_context(language)
        if isinstance(language, str)
        else languages(language)
    )
    with context:
        return _generate_in_context(model, *args, **kwargs)


def _generate_in_context(model: Any, *args: Any, **kwargs: Any) -> Any:
    """`generate` of a quantized model: the class's own, in whose passes beams and return sequences have the language of
    their input. Raises `LaAciqError` when `languages` around it has another number of tags than the inputs have rows.
    """
    tags = _requested.get()
    inputs = args[0] if args else None
    for name in ("inputs", "input_ids", "inputs_embeds", getattr(model, "main_input_name", "input_ids")):
        inputs = kwargs.get(name) if inputs is None else inputs
    if isinstance(tags, tuple) and isinstance(inputs, torch.Tensor) and len(inputs) != len(tags):
        raise LaAciqError(f"language has {len(tags)} tags for {len(inputs)} rows of inputs; expected one per row")
    token = _generating.set(True)
    try:
        return type(model).generate(model, *args, **kwargs)
    finally:
        _generating.reset(token)


language_context = language  # by a name that `_generate`'s argument does not hide
