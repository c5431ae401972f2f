"""An INT4 key and value cache for transformers' models: codes for the past, 16 bits for its first and latest tokens.

How a head's key (after the rotary embedding) or value is stored:

- a key less the mean key of its block of 64 tokens: keys have channels that are far from zero and vary little from
  token to token, which would take most of a clip's span;
- rotated by a Hadamard transform over the head's channels, which spreads the outliers that are left;
- as INT4 codes with a clip per token and head: 0.9 times the largest magnitude (`kv_clip` "absmax"), a factor of the
  language's table times the root mean square ("rms"), or the language's clip ("static", which stores none).

The first tokens of every sequence (attention sinks) and the latest ones keep the model's dtype. With bfloat16 clips
and means, heads of 64 channels take 4.5 bits per element of a key and 4.25 of a value.
"""

import copy
import warnings
from collections.abc import Callable, Mapping
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)
from transformers.modeling_utils import PreTrainedModel

from .. import ops
from ..errors import LaAciqError
from ..ops import rotation
from ..profile.profile import Kind
from .config import ABSMAX_SHARE, QuantConfig
from .first_token import cache_name, cache_of
from .forward_pass import LanguageState
from .kv import BLOCK, SINKS, WINDOW, KeyValueClips, center, site


class LanguageAwareCache(DynamicCache):  # type: ignore[misc]  # transformers has no type information
    """The cache of a model quantized with `QuantConfig(kv=4)`, for `past_key_values=` of its calls or of `generate`;
    since transformers 5.24 the argument is `cache=`.

    `generate`, and a call with use_cache that is given no cache or an empty DynamicCache, makes one by itself. Layers
    with full or sliding-window attention are quantized; others (linear attention, indexers) are transformers' own, and
    so is what an encoder-decoder's cross-attention keeps.
    Where the clips are a language's, each row of the batch keeps the language it began with. Raises `LaAciqError` when
    the model has no INT4 cache.
    """

    def __init__(self, model: nn.Module) -> None:
        quantization: Any = getattr(model, "la_aciq", None)
        if quantization is None or quantization.config.kv != 4:
            raise LaAciqError("a LanguageAwareCache needs a model quantized with QuantConfig(kv=4)")
        hugging_face: Any = model
        super().__init__(config=hugging_face.config.get_text_config(decoder=True))
        clips = getattr(model, KeyValueClips.NAME, None)
        # Attention that does not go through transformers' interface may ask for views of keys and values.
        contiguous = any(
            isinstance(part, PreTrainedModel) and not part._can_set_attn_implementation() for part in model.modules()
        )
        self.layers: list[Any] = [
            _quantized(layer, index, clips, quantization.state, quantization.config, contiguous)
            for index, layer in enumerate(self.layers)
        ]

    @classmethod
    def take_over(cls, cache: DynamicCache, model: nn.Module) -> None:
        """Make an empty DynamicCache a LanguageAwareCache in place: whoever made it goes on using that object.

        Args:
            cache: The cache, which holds no tokens yet.
            model: A model quantized with `QuantConfig(kv=4)`.

        Raises:
            LaAciqError: The model has no INT4 cache.
        """
        marks = {name: value for name, value in vars(cache).items() if name == "_is_user_defined"}
        cache.__class__ = cls
        cache.__dict__ = vars(cls(model)) | marks

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors the quantized layers hold now: codes, clips, means, 16-bit tokens, room to grow."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, LanguageAwareLayer))

    @property
    def bits_per_element(self) -> float:
        """8 nbytes over the number of key and value elements that the quantized layers stand for; 0 when empty."""
        elements = sum(layer.elements for layer in self.layers if isinstance(layer, LanguageAwareLayer))
        return 8 * self.nbytes / elements if elements else 0.0


class CacheMaker:
    """Gives the passes of a model quantized with `QuantConfig(kv=4)` an INT4 cache where they would make one."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._warn = True

    def __call__(self, module: nn.Module, arguments: Mapping[str, Any]) -> Any:
        """The new cache for a pass of a module of the model with these arguments; None to leave the caller's.

        An empty DynamicCache becomes an INT4 cache in place.
        """
        whole: Any = self._model
        cache = cache_of(arguments)
        if cache is None:
            uses = arguments.get("use_cache")
            if cache_name(type(module).forward) is None or not (
                getattr(whole.config, "use_cache", False) if uses is None else uses
            ):
                return None
            quantized = LanguageAwareCache(whole)
            if not whole.config.is_encoder_decoder:
                return quantized
            return EncoderDecoderCache(quantized, DynamicCache(config=whole.config.get_text_config(decoder=True)))
        past = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        if type(past) is DynamicCache and not past.offloading and past.get_seq_length() == 0:
            LanguageAwareCache.take_over(past, whole)
        elif not isinstance(past, LanguageAwareCache) and self._warn:
            self._warn = False
            warnings.warn(
                f"kv = 4, but the cache of the call is a {type(past).__name__}, which keeps keys and values as they "
                "are; expected none, an empty DynamicCache without offloading, or a LanguageAwareCache",
                stacklevel=2,
            )
        return None


def _quantized(
    layer: Any, index: int, clips: KeyValueClips | None, state: LanguageState, config: QuantConfig, contiguous: bool
) -> Any:
    """The INT4 layer in place of one of transformers', or that one where it holds something else."""
    if type(layer) is DynamicSlidingWindowLayer:
        return LanguageAwareLayer(index, clips, state, config, layer.sliding_window, contiguous)
    if type(layer) is DynamicLayer:
        return LanguageAwareLayer(index, clips, state, config, contiguous=contiguous)
    return layer


class LanguageAwareLayer(CacheLayerMixin):  # type: ignore[misc]
    """One attention layer's keys and values, side by side: a token is a row of heads x (key_dim + value_dim) elements.

    Tokens are numbered from the start of the sequence, padding included. Those from `_first` to `_coded`, multiples of
    BLOCK, are codes: `_codes` uint8 [capacity, batch, elements / 2], `_clips` bfloat16 [capacity, batch, groups] unless
    static, `_means` bfloat16 [blocks, batch, heads * key_dim]. Those from there to `_length` are `_recent` [tokens,
    batch, elements] in the model's dtype, and `_sinks` [SINKS, batch, elements] holds the first tokens. The capacity
    includes the recent tokens' places: they are written over what is decoded there, which spares a copy to join two
    tensors. With a sliding window, tokens that no later query sees are dropped, by whole blocks.
    """

    is_croppable = True
    supports_early_init = False

    def __init__(
        self,
        index: int,
        clips: KeyValueClips | None,
        state: LanguageState,
        config: QuantConfig,
        sliding_window: int | None = None,
        contiguous: bool = False,
    ) -> None:
        self.is_initialized = False
        self.is_sliding = sliding_window is not None
        self.sliding_window = sliding_window
        self.record_past = False
        self._contiguous = contiguous  # whether keys and values are returned as contiguous tensors
        self._index, self._tables, self._state, self._config = index, clips, state, config
        self._length = self._first = self._coded = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> "LanguageAwareLayer":
        """A layer with tensors of its own, of the same model: a prompt's cache is copied to be gone on with twice."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        attributes = self.__dict__.copy()
        models = {name: attributes.pop(name) for name in ("_tables", "_state", "_config")}
        twin.__dict__.update(copy.deepcopy(attributes, memo) | models)
        return twin

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the shapes, the languages and the padding of the first tokens' pass."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, self._heads, _, self._key_dim = key_states.shape
        self._value_dim = value_states.shape[-1]
        self._group = gcd(self._key_dim, self._value_dim)
        if self._group % 2:
            raise LaAciqError(
                f"kv = 4 needs heads of an even number of channels, got {self._key_dim} (keys) and {self._value_dim}"
            )
        self._keys = self._heads * self._key_dim
        self._width = self._keys + self._heads * self._value_dim
        self._block = rotation.block_size(self._group)
        self._ones = torch.ones(self._width, dtype=torch.int8, device=self.device)
        if self._tables is None:
            groups = self._width // self._group
            self._table = torch.full((1, groups), ABSMAX_SHARE, dtype=torch.float32, device=self.device)
            self._language_ids = None
        else:
            self._table = self._tables.table(self._index, self._heads, self._key_dim, self._value_dim).to(self.device)
            self._language_ids = self._state.batch_ids(self.batch_size, self.device)
        self._starts: Tensor | None = None
        self._last_start = 0

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=self.device)

        batch = self.batch_size
        self._codes = empty(0, batch, self._width // 2, dtype=torch.uint8)
        self._clips = empty(0, batch, self._width // self._group, dtype=torch.bfloat16)
        self._means = empty(0, batch, self._keys, dtype=torch.bfloat16)
        self._recent = empty(0, batch, self._width, dtype=self.dtype)
        self._sinks = torch.zeros((SINKS, batch, self._width), dtype=self.dtype, device=self.device)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add tokens [batch, heads, tokens, head_dim]; returns the keys and values that their queries see, like it.

        The new tokens among them are as given, older ones as the cache has them. Raises `LaAciqError` when the batch
        is not the one the cache was filled with.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check(key_states)
        new = key_states.shape[-2]
        if self._last_start >= self._length:  # until every sequence has begun
            self._find_starts(new)
        before = self._length
        held = before if self.sliding_window is None else min(before, self.sliding_window - 1)
        self._length += new
        rows = [states.permute(2, 0, 1, 3).reshape(new, self.batch_size, -1) for states in (key_states, value_states)]
        added = torch.cat(rows, dim=-1)
        self._recent = torch.cat([self._recent, added]) if len(self._recent) else added
        seen = self._split(self._read(before - held)) if held else self._arranged(key_states, value_states)
        self._encode()
        if self.sliding_window is not None and not self.record_past:
            self._drop(self._length - self.sliding_window + 1)
        return seen

    @property
    def keys(self) -> Tensor | None:
        """The keys that the next token will see, decoded for the occasion; None while there are none."""
        return self._held()[0]

    @property
    def values(self) -> Tensor | None:
        """The values, likewise."""
        return self._held()[1]

    def _held(self) -> tuple[Tensor | None, Tensor | None]:
        if not self.is_initialized:
            return None, None
        held = self._length if self.sliding_window is None else min(self._length, self.sliding_window - 1)
        return self._split(self._read(self._length - held))

    def _split(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [batch, heads, tokens, head_dim] of rows [tokens, batch, elements]: views if they may be."""
        keys, values = tokens[..., : self._keys], tokens[..., self._keys :]
        shape = (len(tokens), self.batch_size, self._heads, -1)
        return self._arranged(keys.view(shape).permute(1, 2, 0, 3), values.view(shape).permute(1, 2, 0, 3))

    def _arranged(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values as they are returned."""
        return (keys.contiguous(), values.contiguous()) if self._contiguous else (keys, values)

    def _check(self, states: Tensor) -> None:
        if states.shape[0] != self.batch_size:
            raise LaAciqError(
                f"the cache holds a batch of {self.batch_size} rows and got {states.shape[0]}; between prefill and "
                "decode a batch changes only through reorder_cache, batch_select_indices and batch_repeat_interleave"
            )
        if states.device != self.device or states.dtype != self.dtype:
            raise LaAciqError(
                f"the cache holds {self.dtype} on {self.device} and got {states.dtype} on {states.device}; after "
                "moving the model start with a new cache"
            )
        if self._language_ids is not None:
            self._state.check_batch_ids(self._language_ids)

    def _find_starts(self, new: int) -> None:
        """Note which sequences begin among the `new` tokens of the running pass, after left padding.

        Those that have not begun yet start with the next token.
        """
        starts = self._state.starts_of_batch(self.batch_size, self.device)
        if starts is None and self._length == 0:
            return
        offsets = torch.zeros(self.batch_size, dtype=torch.int64, device=self.device) if starts is None else starts
        begun = torch.full_like(offsets, self._length + new) if self._starts is None else self._starts
        pending = torch.ones_like(begun, dtype=torch.bool) if self._length == 0 else begun >= self._length
        self._starts = torch.where(pending, self._length + offsets, begun)
        self._last_start = int(self._starts.max())

    def _read(self, low: int) -> Tensor:
        """Tokens from number `low` on, [tokens, batch, elements] in the model's dtype."""
        if low >= self._coded:
            return self._recent[low - self._coded :]
        skipped = (low - self._first) // BLOCK
        base = self._first + skipped * BLOCK
        out = self._decode(skipped, min(len(self._codes), self._length - self._first))
        self._put_sinks(out, base)
        coded = self._coded - base
        if len(out) < self._length - base:
            out = torch.cat([out[:coded], self._recent])
        else:
            out[coded:] = self._recent
        return out[low - base :]

    def _decode(self, skipped: int, end: int) -> Tensor:
        """The stored rows from block `skipped` to row `end`; those after the codes hold nothing of meaning."""
        rows = slice(skipped * BLOCK, end)
        if self._config.kv_clip == "static":
            language_ids = None if self._language_ids is None else self._language_ids[None]
            clip: dict[str, Any] = {"clips": self._table, "language_ids": language_ids}
        else:
            clip = {"row_clips": self._clips[rows].float()}
        out = ops.dequantize(
            self._codes[rows],
            k=self._width,
            group_size=self._group,
            codebook=self._config.codebook,
            dtype=self.dtype,
            **clip,
        )
        out = ops.rotate(out, self._ones, self._block)  # Sylvester's matrix is its own inverse
        whole = out[: self._coded - self._first - skipped * BLOCK, :, : self._keys]
        whole.view(-1, BLOCK, *whole.shape[1:]).add_(self._means[skipped:, None])
        return out

    def _encode(self) -> None:
        """Turn the oldest recent tokens into codes, as many whole blocks as leave WINDOW of them."""
        count = (len(self._recent) - WINDOW) // BLOCK * BLOCK
        if count <= 0:
            return
        x = self._recent[:count]
        self._keep_sinks(x)
        values = x.to(torch.float32, copy=True)
        values[..., : self._keys], means = center(values[..., : self._keys], self._counted(count))
        language_ids = None if self._language_ids is None else self._language_ids[None]
        settings: dict[str, Any] = {
            "group_size": self._group,
            "codebook": self._config.codebook,
            "signs": self._ones,
            "block_size": self._block,
        }
        held = self._coded - self._first
        capacity = held + count + WINDOW + BLOCK
        if self._config.kv_clip == "static":
            codes = ops.quantize(values, self._table, language_ids, **settings)
        else:
            codes, clips = ops.quantize_dynamic(
                values, self._table, language_ids, statistic=self._config.kv_clip, **settings
            )
            self._clips = _grown(self._clips[:held], clips, capacity)
        self._codes = _grown(self._codes[:held], codes, capacity)
        self._means = torch.cat([self._means, means])
        self._recent = self._recent[count:].clone()  # a view would keep all of a long prompt
        self._coded += count

    def _counted(self, count: int) -> Tensor | None:
        """Which of the tokens to be coded, bool [count, batch or 1, 1], a block's mean is of: no padding, no sinks."""
        if self._coded >= self._last_start + SINKS:
            return None
        number = torch.arange(self._coded, self._coded + count, device=self.device)[:, None, None]
        return number >= SINKS + (0 if self._starts is None else self._starts[:, None])

    def _keep_sinks(self, x: Tensor) -> None:
        """Copy the first tokens of the sequences among x, the tokens to be coded."""
        if self._coded >= self._last_start + SINKS:
            return
        if self._starts is None:
            self._sinks.copy_(x[:SINKS])
            return
        rows = torch.arange(self.batch_size, device=self.device)
        for i in range(SINKS):
            place = self._starts + i - self._coded
            here = (place >= 0) & (place < len(x))
            self._sinks[i] = torch.where(here[:, None], x[place.clamp(0, len(x) - 1), rows], self._sinks[i])

    def _put_sinks(self, out: Tensor, base: int) -> None:
        """Write the first tokens over the decoded ones; `base` is the number of the first row of out."""
        if self._starts is None:
            if base == 0:
                out[:SINKS] = self._sinks
            return
        rows = torch.arange(self.batch_size, device=self.device)
        for i in range(SINKS):
            place = self._starts + i - base
            here = (place >= 0) & (place < self._coded - base)
            place = place.clamp(0, len(out) - 1)
            out[place, rows] = torch.where(here[:, None], self._sinks[i], out[place, rows])

    def _drop(self, needed: int) -> None:
        """Forget whole blocks of codes before the token numbered `needed`."""
        blocks = (min(needed, self._coded) - self._first) // BLOCK
        if blocks <= 0:
            return
        self._codes, self._clips = self._codes[blocks * BLOCK :].clone(), self._clips[blocks * BLOCK :].clone()
        self._means = self._means[blocks:].clone()
        self._first += blocks * BLOCK

    def get_seq_length(self) -> int:
        """Tokens seen so far, those included that a sliding window has dropped."""
        return self._length

    def get_max_length(self) -> int:
        """The sliding window, or -1 for no limit."""
        return -1 if self.sliding_window is None else self.sliding_window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many tokens the next query_length queries see, and the number of the first of them."""
        held = self._length if self.sliding_window is None else min(self._length, self.sliding_window - 1)
        return held + query_length, self._length - held

    def activate_past_recording(self) -> None:
        """Keep what leaves the sliding window until the next `crop`, which can then go back."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -tokens_to_remove tokens (0: drop what no later query sees).

        Tokens of a block that is not whole any more come back to 16 bits, as they were decoded. Raises `ValueError` for
        a positive number, `RuntimeError` when a sliding window has dropped tokens that it would see again.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove: expected 0 or a negative number of tokens, got {tokens_to_remove}")
        if not self.is_initialized:
            return
        length = max(self._length + tokens_to_remove, 0)
        needed = 0 if self.sliding_window is None else max(length - self.sliding_window + 1, 0)
        if tokens_to_remove and needed < self._first:
            raise RuntimeError(
                "crop: the sliding window has dropped tokens that it would see again; call activate_past_recording "
                "before they are added"
            )
        if length < self._coded:
            coded = length // BLOCK * BLOCK
            self._recent = self._read(coded)[: length - coded].clone()
            self._means = self._means[: (coded - self._first) // BLOCK]
            self._coded = coded
        else:
            self._recent = self._recent[: length - self._coded].clone()
        self._length = length
        self._drop(needed)

    def reset(self) -> None:
        """Forget and free everything."""
        if self.is_initialized:
            del self._codes, self._clips, self._means, self._recent, self._sinks, self.batch_size
        self._length = self._first = self._coded = 0
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make the rows beam_idx [new batch] of the batch the batch."""
        self._over_batch(lambda x, dim: x.index_select(dim, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch `repeats` times."""
        self._over_batch(lambda x, dim: x.repeat_interleave(repeats, dim=dim))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` (numbers, or a boolean mask) of the batch."""
        numbers = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
        self.reorder_cache(numbers)

    def _over_batch(self, change: Callable[[Tensor, int], Tensor]) -> None:
        if not self.is_initialized:
            return
        self._codes, self._clips, self._means = change(self._codes, 1), change(self._clips, 1), change(self._means, 1)
        self._recent, self._sinks = change(self._recent, 1), change(self._sinks, 1)
        self._language_ids = None if self._language_ids is None else change(self._language_ids, 0)
        self._starts = None if self._starts is None else change(self._starts, 0)
        self.batch_size = self._sinks.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors held now."""
        if not self.is_initialized:
            return 0
        held = (self._codes, self._clips, self._means, self._recent, self._sinks)
        return sum(x.numel() * x.element_size() for x in held)

    @property
    def elements(self) -> int:
        """Key and value elements of the tokens held now, those that an unquantized layer would hold."""
        if not self.is_initialized:
            return 0
        window = self._length if self.sliding_window is None else self.sliding_window - 1
        return min(self._length, window) * self.batch_size * self._width


def recording_cache(model: nn.Module, measure: Callable[[str, Kind, int, Tensor], None]) -> DynamicCache:
    """An empty cache for one pass over one sequence, which holds nothing and changes nothing.

    It calls measure(site, "key" or "value", head_dim, x float32 [tokens, heads * head_dim]) with what an INT4 cache
    would round: keys centered, and both rotated.
    """

    class Recording(DynamicLayer):  # type: ignore[misc]
        def __init__(self, index: int) -> None:
            super().__init__()
            self.index = index

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            both: list[tuple[Kind, Tensor]] = [("key", key_states), ("value", value_states)]
            for kind, states in both:
                head_dim = states.shape[-1]
                x = states[0].transpose(0, 1).flatten(1).float()
                if kind == "key":
                    counted = torch.arange(len(x), device=x.device)[:, None] >= SINKS
                    parts = zip(torch.split(x, BLOCK), torch.split(counted, BLOCK), strict=True)
                    x = torch.cat([center(*part)[0] for part in parts])
                ones = torch.ones(x.shape[1], dtype=torch.int8, device=x.device)
                measure(site(self.index, kind), kind, head_dim, ops.rotate(x, ones, rotation.block_size(head_dim)))
            return key_states, value_states

    hugging_face: Any = model
    cache = DynamicCache(config=hugging_face.config.get_text_config(decoder=True))
    cache.layers = [
        Recording(index) if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) else layer
        for index, layer in enumerate(cache.layers)
    ]
    return cache


def _grown(held: Tensor, added: Tensor, capacity: int) -> Tensor:
    """held and added, one after the other, in a tensor of `capacity` rows, in held's dtype."""
    out = held.new_empty((capacity, *held.shape[1:]))
    out[: len(held)] = held
    out[len(held) : len(held) + len(added)] = added
    return out
