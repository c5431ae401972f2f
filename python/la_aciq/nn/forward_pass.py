"""The language ids of a model's running forward pass, which its quantized layers read.

A model's `LanguageState` turns the language of the request (nn/request.py), when the model's forward pass starts, into
one int32 id per token and writes the ids in place into a persistent buffer (nn/id_buffers.py). nn/entries.py says which
entry serves a language, nn/first_token.py which tokens are the first of their sequence, nn/running.py which thread is
in the pass.
"""

import copy
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .._deprecated import warn_renamed
from ..errors import LaAciqError
from .entries import Entries
from .first_token import CACHE_NAMES, cache_name, carries_state, first_of_memory, first_tokens, past_tokens
from .id_buffers import IdBuffers
from .layout import ids_in_layout
from .running import RunningPass

# The cache for a pass of a module with these arguments, or None to leave the caller's.
MakeCache = Callable[[nn.Module, Mapping[str, Any]], Any]

_NO_EXPORT = (
    "a quantized model cannot be exported or traced: the program would keep the language of the example; use "
    "torch.compile, which reads the language of each call"
)


class LanguageState:
    """The language ids of a model's running forward pass, shared by all its quantized layers.

    Args:
        entries: The entries of the model's clip tables: "und" first, then languages, then the class of tokens "sink",
            if the tables have it; pooled tables have no languages.
        by_language: Whether the entries differ; then the first pass without any language set gives a UserWarning.

    Attributes:
        common_entry: The entry that all tokens of the running pass read, where that is known without waiting for a
            device: layers are spared looking each token's up. None for several, and in compiled code, which would hold
            on to it.

    Raises:
        ValueError: The entries do not start with "und".
    """

    def __init__(self, entries: Sequence[str], by_language: bool = True) -> None:
        self._entries = Entries(entries, by_language)
        self.common_entry: int | None = None
        self._make_cache: MakeCache | None = None
        # The model, and the modules whose forward passes are hooked.
        self._model: nn.Module | None = None
        self._hooked: tuple[nn.Module, ...] = ()
        self._decoder: nn.Module | None = None  # the module that takes a cache
        self._features = False  # whether an encoder reads features, such as a spectrogram's, instead of tokens
        self._stateful = False  # whether modules of the model keep what they have read
        self._no_pass()

    def _no_pass(self) -> None:
        """Be in no forward pass, with nothing of an earlier one."""
        self._running = RunningPass()
        self._buffers = IdBuffers()
        self._counted = False  # whether the running pass has counted the languages that have no entry
        self._batch_entries: list[int] = []
        self._release()

    def _release(self) -> None:
        self.common_entry = None
        self._ids: torch.Tensor | None = None  # int32 [batch, tokens], or [batch] for features
        self._batch_ids: torch.Tensor | None = None  # int32 [batch]
        self._memory: tuple[torch.Tensor, torch.Tensor] | None = None  # what cross-attention reads, and its ids
        # For the INT4 cache: the first tokens, bool [batch or 1, tokens], and how many tokens there are.
        self._first: torch.Tensor | None = None
        self._tokens = 0
        self._kept: Any = 0  # `logits_to_keep` of the model's call

    @property
    def entries(self) -> tuple[str, ...]:
        """The names of the tables' entries."""
        return self._entries.names

    @property
    def rows(self) -> tuple[str, ...]:
        """The old name of `entries`."""
        warn_renamed("LanguageState.rows", "LanguageState.entries")
        return self.entries

    @property
    def unserved(self) -> Counter[str]:
        """By primary language subtag, the rows of batches, over all passes, whose language had no entry where others
        have one.
        """
        return self._entries.unserved

    def entry(self, tag: str) -> int:
        """The number of the entry that serves a language.

        Args:
            tag: A canonical BCP-47 tag, such as "pt-BR".

        Returns:
            The index in `entries`; 0 (`und`) when no entry's language is close to the tag's.
        """
        return self._entries.entry(tag)

    def row(self, tag: str) -> int:
        """The old name of `entry`; gives a DeprecationWarning.

        Args:
            tag: A canonical BCP-47 tag.

        Returns:
            What `entry` returns.
        """
        warn_renamed("LanguageState.row", "LanguageState.entry")
        return self.entry(tag)

    def copied_with(self, memo: dict[int, Any]) -> bool:
        """Whether a copy in progress is that of the model, or of a part that has its passes; not of a layer alone.

        Args:
            memo: That of `copy.deepcopy`: by id the objects that are copied already.

        Returns:
            True where a module that `attach` hooked is being copied, and where none is hooked.
        """
        return not self._hooked or any(id(module) in memo for module in self._hooked)

    def __deepcopy__(self, memo: dict[int, Any]) -> "LanguageState":
        """A copy of a layer alone has the state of the layer's model, not a copy of all of it."""
        if not self.copied_with(memo):
            return self
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """For copies of a model: a copy is in no forward pass and has counted nothing."""
        entries = copy.copy(self._entries)
        entries.unserved = Counter()
        per_pass = {
            "_running",
            "_buffers",
            "_counted",
            "_ids",
            "_batch_ids",
            "_batch_entries",
            "_memory",
            "_first",
            "_tokens",
            "_kept",
        }
        kept = {name: value for name, value in self.__dict__.items() if name not in per_pass}
        return kept | {"_entries": entries, "common_entry": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._no_pass()

    def attach(self, model: nn.Module, make_cache: MakeCache | None = None) -> list[RemovableHandle]:
        """Hook the state to a model: its forward passes set the ids first and release them at the end.

        An encoder-decoder's two parts have positions of their own and set their ids each for itself; cross-attention
        reads those of the encoder.

        Args:
            model: The model.
            make_cache: Called with the module and the arguments of each pass of the part that decodes; the cache that
                the pass is to have, or None to leave the caller's.

        Returns:
            The handles of the hooks.
        """
        self._model = model
        # The body of a Hugging Face model may be called alone, for its hidden states.
        whole = [model, getattr(model, "base_model", model)]
        reading = whole
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            hugging_face: Any = model
            reading = [hugging_face.get_encoder(), hugging_face.get_decoder()]
            self._features = _reads_features(reading[0]) and not _embeds_ids(reading[0])
        self._make_cache, self._decoder, self._stateful = make_cache, reading[-1], carries_state(model)
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

    def shape_of_pass(self) -> tuple[int, int | None, int | None] | None:
        """[batch, tokens, tokens of the memory that cross-attention reads] of the running pass; None for features."""
        if self._ids is None or self._batch_ids is None:
            return None
        counts = [None if ids is None or ids.ndim < 2 else ids.shape[1] for ids in (self._ids, self._memory_ids)]
        return len(self._batch_ids), counts[0], counts[1]

    @property
    def _memory_ids(self) -> torch.Tensor | None:
        return None if self._memory is None else self._memory[1]

    def ids_for(self, x: torch.Tensor, layout: str | None = None) -> torch.Tensor | None:
        """The language ids for a layer's input in the running pass.

        Without a layout, x has the pass's [batch, tokens] positions, the same positions flattened, only the last ones
        of each row (a head under `logits_to_keep`), those of the encoder that a decoder's cross-attention reads, or one
        row for each of the batch (a pooler, a classifier's head), which reads its language's entry whichever token it
        was.

        Args:
            x: The input [..., K], of any dtype.
            layout: The layer's layout (nn/layout.py); None: x's shape tells.

        Returns:
            int32 ids that match x's leading dimensions from the left, on x's device; None, the pooled entry, outside of
            a forward pass of the model and for the layout "none".

        Raises:
            RuntimeError: Without a layout, x has another shape: it is not known which token is whose.
            LaAciqError: x does not have the layout.
        """
        ids = self._ids
        if ids is None:
            return None
        if layout is not None and self._batch_ids is not None:
            if layout == "batch tokens" and x.shape[:2] == ids.shape and ids.device == x.device:
                return ids
            if "memory" in layout:
                ids = self._memory_ids
                if ids is None:
                    raise LaAciqError("a layer of cross-attention was called in a pass without encoder_hidden_states")
            elif layout == "batch kept" and ids.ndim == 2:
                ids = self._kept_of(ids)
            ordered = ids_in_layout(layout, x.shape[:-1], ids, self._batch_ids)
            return ordered if ordered is None or ordered.device == x.device else ordered.to(x.device)
        memory = self._memory
        if memory is not None and (
            x is memory[0] or (_matching(ids, x) is None and _matching(memory[1], x) is not None)
        ):
            ids = memory[1]
        matching = _matching(ids, x)
        if matching is None and self._batch_ids is not None and x.ndim == 2 and len(x) == len(self._batch_ids):
            matching = self._batch_ids
        if matching is None:
            raise RuntimeError(
                f"a quantized layer got an input of shape {list(x.shape)} in a forward pass over [batch, tokens] = "
                f"{list(ids.shape)}; the language of each of its rows is unknown"
            )
        return matching if matching.device == x.device else matching.to(x.device)

    def _kept_of(self, ids: torch.Tensor) -> torch.Tensor:
        """Those of the tokens that the call's `logits_to_keep` has: a number of last ones, 0 for all, or places."""
        kept = self._kept
        if isinstance(kept, torch.Tensor):
            return ids[:, kept.to(ids.device)]
        return ids[:, -kept:] if kept else ids

    @contextmanager
    def picked(self, x: torch.Tensor, tokens: torch.Tensor, layout: str | None = None) -> Iterator[None]:
        """Inside, layers read some rows of a layer's input, as experts do.

        Args:
            x: The input of all experts [T, K].
            tokens: The rows of x that are read inside, int64 [n].
            layout: x's, as `ids_for` takes it.

        Yields:
            Nothing.

        Raises:
            RuntimeError: As `ids_for`.
            LaAciqError: As `ids_for`.
        """
        before, memory = self._ids, self._memory
        ids = self.ids_for(x, layout)
        self._ids, self._memory = None if ids is None else ids[tokens], None
        try:
            yield
        finally:
            self._ids, self._memory = before, memory

    def _begin_body(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # In a compiled graph of the whole model, which has set the ids before it: a break less.
        if torch.compiler.is_compiling() and self._running.outermost is self._model:
            return None
        return self._begin(model, args, kwargs)

    def _end_body(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not (torch.compiler.is_compiling() and self._running.outermost is self._model):
            self._end(model, args, output)

    # What sets and releases the ids is never traced: it reads the context, and a graph would hold on to what it read.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._running.enter(model):
            self._counted = False

    @torch.compiler.disable(reason=_NO_EXPORT)  # type: ignore[untyped-decorator, no-untyped-call]
    def _begin(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._enter(model, args, kwargs)
        if torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None:
            raise LaAciqError(_NO_EXPORT)
        arguments = kwargs
        if args:
            arguments = dict(zip(inspect.signature(model.forward).parameters, args, strict=False)) | kwargs
        inputs = args[0] if args else arguments.get("input_ids")
        if inputs is None:
            inputs = arguments.get("inputs_embeds")
        features = inputs is None and _reads_features(model)
        if features:
            inputs = arguments.get(str(model.main_input_name))
            # SpeechT5's decoder reads token ids as "input_values".
            features = not (isinstance(inputs, torch.Tensor) and inputs.ndim == 2 and _are_ids(inputs))
        if not isinstance(inputs, torch.Tensor) or inputs.ndim < 2:
            raise LaAciqError(
                "a quantized model's call needs input_ids [batch, tokens] or inputs_embeds [batch, tokens, width]"
            )
        batch, device = inputs.shape[0], inputs.device
        self._memory = self.common_entry = None
        self._kept = arguments.get("logits_to_keep", self._kept)
        self._batch_entries = self._entries.of_batch(batch, self._counted)
        self._counted = True
        if features:  # how many positions it makes of them is its own affair, and none is a first token
            self._ids, self._batch_ids = self._write("tokens", (batch,), device)
            return None
        tokens = inputs.shape[1]
        past = past_tokens(arguments, tokens, self._stateful)
        first = first_tokens(model, arguments, (batch, tokens), device, past)
        self._first, self._tokens = first, tokens
        self._ids, self._batch_ids = self._write("tokens", (batch, tokens), device, first)
        if (
            device.type == "cpu"
            and len(set(self._batch_entries)) == 1
            and not (self._entries.sink is not None and first is not None and bool(first.any()))
        ):
            self.common_entry = self._batch_entries[0]
        memory = arguments.get("encoder_hidden_states")
        if isinstance(memory, torch.Tensor) and memory.ndim == 3:
            self.common_entry = None
            if self._features:
                ids, _ = self._write("memory", (batch,), device)
            else:
                first = first_of_memory(_memory_mask(arguments), memory.shape[1], device)
                ids, _ = self._write("memory", (batch, memory.shape[1]), device, first)
            self._memory = (memory, ids)
        if self._make_cache is None or not (model is self._decoder or self._model in self._running):
            return None
        cache, name = self._make_cache(model, arguments), cache_name(type(model).forward)
        if cache is None or name is None:
            return None
        return args, {key: value for key, value in kwargs.items() if key not in CACHE_NAMES} | {name: cache}

    def batch_ids(self, batch: int, device: torch.device) -> torch.Tensor:
        """The language id of each row of the running pass's batch.

        Args:
            batch: The number of rows.
            device: Of the result.

        Returns:
            int32 [batch]; `und` outside of a pass.

        Raises:
            LaAciqError: The running pass has another batch.
        """
        entries = self._batch_entries if self._ids is not None else [0] * batch
        if len(entries) != batch:
            raise LaAciqError(f"the cache got a batch of {batch} rows in a pass over {len(entries)}")
        return torch.tensor(entries, dtype=torch.int32, device=device)

    def check_batch_ids(self, ids: torch.Tensor) -> None:
        """Compare ids with those of the running pass, on the CPU, where reading them is free.

        Args:
            ids: The language id of each row of the batch, int32 [batch].

        Raises:
            LaAciqError: They differ.
        """
        if ids.device.type == "cpu" and self._ids is not None and ids.tolist() != self._batch_entries:
            raise LaAciqError(
                "the languages of the batch changed between prefill and decode, and what is cached was quantized under "
                "the first ones; start with a new cache"
            )

    def starts_of_batch(self, batch: int, device: torch.device) -> torch.Tensor | None:
        """Where among the running pass's tokens each sequence begins.

        Args:
            batch: The number of rows.
            device: Of the result.

        Returns:
            int64 [batch]: the place of the first token, or the number of tokens where no sequence begins. None where
            all sequences begin with the first token, and outside of a pass.

        Raises:
            LaAciqError: More than one sequence begins in a row of the batch.
        """
        if self._ids is None:
            return None
        if self._first is None:
            return torch.full((batch,), self._tokens, dtype=torch.int64, device=device)
        first = self._first.to(device).expand(batch, -1)
        counts = first.sum(dim=1)
        if counts.device.type == "meta":
            return None  # a pass over shapes alone
        if int(counts.max()) > 1:
            raise LaAciqError("kv = 4: an INT4 cache takes one sequence per row of the batch, and this has several")
        starts = torch.where(counts == 1, first.to(torch.uint8).argmax(dim=1), self._tokens)
        return None if not bool(starts.any()) else starts

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # The hook also runs after a pass that `_begin` refused: that pass must not release another thread's.
        if self._running.leave(model):
            self._release()

    def _write(
        self, role: str, shape: tuple[int, ...], device: torch.device, first: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids of this shape, [batch, tokens] or [batch], and of the batch, int32 [batch], in their role's persistent
        buffers; `first` get the sink's.
        """
        batch, entries = shape[0], self._batch_entries
        ids = self._buffers.view(role, shape, device)
        batch_ids = self._buffers.view(f"{role} batch", (batch,), device)
        if len(set(entries)) == 1:
            batch_ids.fill_(entries[0])
            ids.fill_(entries[0])
        else:
            batch_ids.copy_(torch.tensor(entries, dtype=torch.int32))
            ids.copy_(batch_ids.view(-1, *[1] * (len(shape) - 1)))
        sink = self._entries.sink
        if sink is not None and first is not None and ids.numel():
            ids.masked_fill_(first, sink)
        return ids, batch_ids


def _reads_features(module: nn.Module) -> bool:
    """Whether a Hugging Face module reads something else than tokens or their embeddings, such as a spectrogram."""
    return getattr(module, "main_input_name", "input_ids") not in ("input_ids", "inputs_embeds")


def _embeds_ids(module: nn.Module) -> bool:
    """Whether what a Hugging Face module reads first goes through a table of embeddings."""
    embeddings: Any = getattr(module, "get_input_embeddings", None)
    try:
        return embeddings is not None and isinstance(embeddings(), nn.Embedding)
    except NotImplementedError:  # transformers' way to say that there are none
        return False


def _are_ids(inputs: torch.Tensor) -> bool:
    return not (inputs.is_floating_point() or inputs.is_complex())


def _memory_mask(arguments: Mapping[str, Any]) -> Any:
    """The mask of what a decoder's cross-attention reads, by the names that transformers' decoders have for it."""
    names = ("encoder_attention_mask", "encoder_padding_mask")  # the second one is FSMT's
    return next((arguments[name] for name in names if arguments.get(name) is not None), None)


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
