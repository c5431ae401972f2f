"""Which tokens of a forward pass are the first of their sequence, and so read the entry of the attention sink.

The rule: a token is a first token when it is no padding and the model lets it see no earlier token. Everything that a
model is given is evidence of what a token sees:

- A mask with a row per query ([batch, queries, keys], [batch, heads, queries, keys], a BlockMask) says it alone: the
  first key that a first token sees is itself. A dictionary of masks by kind of layer is read by its full attention, by
  its linear attention, or by all of its masks together.
- A mask [batch, keys] says where a sequence begins: its first value that is not zero. Keys are counted from the start
  of the cache.
- A cache holds the tokens before the pass, whatever its class and its argument (`PAST`). Without a mask there is no
  first token after them.
- Position ids that do not go up by one begin another sequence, as transformers has it, where there is neither a mask
  nor a cache; under flash attention position 0 does.
- `cu_seq_lens_q` and `seq_idx` say where the sequences in a row begin.

Where these contradict each other, or the model would attend over the borders that they draw, the call is refused.
docs/first-token.md has the table.
"""

from collections.abc import Mapping
from functools import lru_cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LaAciqError

# transformers' names for the argument that has its cache, and for the attribute of an output: since 5.24, and before.
CACHE_NAMES = ("cache", "past_key_values")
# Arguments that carry what a model has read before the pass.
PAST = (*CACHE_NAMES, "cache_params", "past_buckets_states", "mems", "state")
_BIAS = -1e4  # a float mask hides what it adds this or less to: nothing of it is left after the softmax


def first_tokens(
    module: nn.Module, arguments: Mapping[str, Any], shape: tuple[int, int], device: torch.device, past: Any
) -> Tensor | None:
    """The first tokens of a pass.

    Args:
        module: The model, or the part of it that is called.
        arguments: The call's arguments by name.
        shape: [batch, tokens] of the call.
        device: Of the call's tokens.
        past: What `past_tokens` says of the call.

    Returns:
        bool [batch or 1, tokens], True at first tokens; None where there are none.

    Raises:
        LaAciqError: The arguments do not tell, or contradict each other.
    """
    tokens = shape[1]
    mask = _leading_mask(arguments)
    begins = _begins(arguments, shape, device)
    if mask is not None and _by_query(mask, tokens):
        if begins is not None:
            raise LaAciqError(
                "attention_mask has a row per query, and cu_seq_lens_q or seq_idx is given too; expected one of them"
            )
        return _seen_first(mask, past, tokens, arguments)
    first: Tensor | None = None
    if mask is not None:
        first = _first_by_key(mask, past, tokens, device)
    elif isinstance(past, Tensor) or past == 0:
        first = torch.arange(tokens, device=device)[None] + past == 0
    restarts = _restarts(module, arguments, shape, mask, past, first)
    if begins is None:
        return restarts if restarts is not None else first
    if mask is not None and bool((_keys(mask) == 0).any()):
        raise LaAciqError(
            "attention_mask hides tokens, and cu_seq_lens_q or seq_idx is given too; expected one of them"
        )
    if restarts is not None and not torch.equal(restarts.expand(begins.shape), begins):
        raise LaAciqError("cu_seq_lens_q or seq_idx and position_ids begin sequences at different tokens")
    if restarts is None and int(begins.sum()) > shape[0] and _attends_over(module, arguments):
        raise LaAciqError(
            "cu_seq_lens_q or seq_idx is given without position_ids that begin again at 0, and this attention reads "
            "only those; pass position_ids and use_cache=False"
        )
    return begins


def first_of_memory(mask: Any, tokens: int, device: torch.device) -> Tensor:
    """The first tokens, bool [batch or 1, tokens], of what cross-attention reads, by its mask of any form."""
    if isinstance(mask, Tensor) and mask.ndim >= 2:
        return _first_by_key(mask, 0, tokens, device)
    return torch.arange(tokens, device=device)[None] == 0


def past_tokens(arguments: Mapping[str, Any], tokens: int, stateful: bool) -> Any:
    """How many tokens the model has read before the pass: an int, or for a static cache a tensor, which is not read
    back. None where it has read some, and their number is not known.

    Args:
        arguments: The call's arguments by name.
        tokens: Of each row of the call.
        stateful: Whether modules of the model keep what they have read (`carries_state`).

    Raises:
        LaAciqError: A cache does not tell.
    """
    position = arguments.get("cache_position")
    at = position[0] if isinstance(position, Tensor) and position.numel() else None
    for name in PAST:
        value = arguments.get(name)
        if value is None:
            continue
        past = _past(name, value)
        if past is None and at is not None:
            return at
        if past is None:
            mask = arguments.get("attention_mask")
            if isinstance(mask, Tensor) and mask.ndim == 2:
                if mask.shape[1] > tokens:
                    return mask.shape[1] - tokens
                if tokens and bool((mask[:, 0] == 0).any()):
                    raise LaAciqError(
                        f"{name} does not say how many tokens it has read, and attention_mask [batch, {mask.shape[1]}] "
                        "begins with padding; expected an attention_mask from the start of the sequences"
                    )
        return past
    for name, value in arguments.items():
        if value is not None and name not in PAST and not isinstance(value, bool | int | str) and _carries(name):
            raise LaAciqError(
                f"{name}: it is not known which tokens came before by it; expected one of {', '.join(PAST)}"
            )
    if at is not None:
        return at
    if stateful:
        _check_fresh(arguments, tokens)
    return 0


@lru_cache(maxsize=1024)
def _carries(name: str) -> bool:
    """Whether an argument of this name may carry a past."""
    return name.startswith("past_") or name.endswith(("_past", "_cache", "_mems", "past_key_values"))


def _past(name: str, value: Any) -> Any:
    """The number of tokens in a past that was passed; None where it holds some and does not say how many."""
    if name == "mems":
        held = [mem for mem in value if mem is not None and mem.dim() > 1]
        return held[0].shape[0] if held else 0
    if name == "state":  # RWKV: numerators, denominators and maxima that no token has changed yet are zero, zero, -1e30
        return None if any(bool((part != 0).any()) for part in value[:-1]) else 0
    if isinstance(value, dict):  # XLM's, an argument of the name "cache"
        return int(value["slen"]) if value else 0
    if hasattr(value, "seqlen_offset"):  # xLSTM
        return value.seqlen_offset
    if hasattr(value, "get_start_idx"):  # Reformer
        return value.get_start_idx()
    layers = getattr(value, "layers", None)
    if layers is None:
        layers = getattr(getattr(value, "self_attention_cache", None), "layers", None)
    if layers and not any(hasattr(layer, "get_seq_length") for layer in layers):
        states = [layer.has_previous_state for layer in layers if hasattr(layer, "has_previous_state")]
        if states:  # only state spaces and linear attention: they keep no count
            return None if any(state for layer in states for state in layer.values()) else 0
    if not hasattr(value, "get_seq_length"):
        raise LaAciqError(f"{name}: expected a cache with get_seq_length(), got {type(value).__name__}")
    return value.get_seq_length()


def carries_state(module: nn.Module) -> bool:
    """Whether modules of the model keep what they have read themselves, as RecurrentGemma's do."""
    states = {f"{kind}_state{plural}" for kind in ("conv", "conv1d", "recurrent", "rnn", "ssm") for plural in ("", "s")}
    return any(not states.isdisjoint(part.__dict__) for part in module.modules())


def _check_fresh(arguments: Mapping[str, Any], tokens: int) -> None:
    """Refuse a pass without a cache that may go on from a state inside the model."""
    positions = arguments.get("position_ids")
    later = isinstance(positions, Tensor) and positions.numel() > 0 and bool((positions[..., 0] != 0).any())
    if tokens == 1 or later:
        raise LaAciqError(
            "this model keeps what it has read in its modules, and a call with one token or with position_ids that do "
            "not begin at 0 may go on from there; pass the cache of the call before"
        )


def _known(past: Any) -> Any:
    """A number of tokens to count with: some, where it is not known how many."""
    return 1 if past is None else past


def _leading_mask(arguments: Mapping[str, Any]) -> Any:
    """The mask that says what a token sees at the most; None for all earlier tokens."""
    mask = arguments.get("attention_mask")
    if mask is None and isinstance(arguments.get("input_mask"), Tensor):  # XLNet's: 1 for padding
        return 1 - arguments["input_mask"]
    if not isinstance(mask, Mapping):
        return mask
    for kind in ("full_attention", "linear_attention"):
        if kind in mask:
            return mask[kind]
    masks = list(mask.values())
    if any(one is None for one in masks):
        raise LaAciqError(
            f"attention_mask: the masks of {', '.join(map(repr, mask))} do not say where a sequence begins; "
            "expected one of 'full_attention' among them"
        )
    if len(masks) > 1 and any("chunk" in kind for kind in mask):
        masks = [one for kind, one in mask.items() if "chunk" not in kind]
    elif any("chunk" in kind for kind in mask):
        raise LaAciqError(
            "attention_mask: a mask of chunked attention does not say where a sequence begins; expected one of "
            "'full_attention' beside it"
        )
    dense = [_visible(one) for one in masks]
    if len({one.shape[-2:] for one in dense}) > 1:
        raise LaAciqError("attention_mask: masks of different shapes and none of 'full_attention'")
    union = dense[0]
    for one in dense[1:]:
        union = union | one
    return union


def _is_block_mask(mask: Any) -> bool:
    return type(mask).__name__ == "BlockMask"


def _by_query(mask: Any, tokens: int) -> bool:
    """Whether a mask has a row for each query."""
    if _is_block_mask(mask):
        return True
    if not isinstance(mask, Tensor) or mask.ndim < 2 or mask.ndim > 4:
        form = f"one of shape {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise LaAciqError(
            f"attention_mask: expected [batch, keys], [batch, queries, keys], [batch, heads, queries, keys], a "
            f"BlockMask or a dictionary of masks, got {form}"
        )
    if mask.ndim == 2:
        return False
    if mask.shape[-2] not in (1, tokens):
        raise LaAciqError(f"attention_mask: expected 1 or {tokens} rows for the queries, got {mask.shape[-2]}")
    return mask.shape[-2] == tokens


def _visible(mask: Any) -> Tensor:
    """bool [batch or 1, queries, keys] of a mask with a row per query: what any head sees."""
    if _is_block_mask(mask):
        from torch.nn.attention.flex_attention import create_mask

        batch, heads, *_ = mask.shape
        queries, keys = mask.seq_lengths
        dense: Tensor = create_mask(mask.mask_mod, batch, heads, queries, keys, device=mask.kv_indices.device)
        return dense.any(1)
    if mask.dtype == torch.bool:
        seen = mask
    elif mask.ndim == 4 and mask.is_floating_point():
        seen = mask > _BIAS
    elif mask.ndim == 3 and bool(((mask == 0) | (mask == 1)).all()):
        seen = mask != 0
    else:
        raise LaAciqError(
            f"attention_mask: expected bool, or floats to add, for a mask with heads, and ones and zeros for one of "
            f"[batch, queries, keys], got {mask.dtype} of shape {list(mask.shape)}"
        )
    visible: Tensor = seen.any(1) if seen.ndim == 4 else seen
    return visible


def _keys(mask: Tensor) -> Tensor:
    """[batch or 1, keys], not zero at keys that any query sees, of a mask without a row per query."""
    return mask if mask.ndim == 2 else _visible(mask).any(1)


def _first_by_key(mask: Tensor, past: Any, tokens: int, device: torch.device) -> Tensor:
    """First tokens by a mask over keys: the first that is seen."""
    seen = (_keys(mask) != 0).to(device)
    first = seen.to(torch.uint8).argmax(dim=1, keepdim=True)
    number: Tensor = torch.arange(tokens, device=device)[None] + _known(past)
    return (number == first) & seen.any(dim=1, keepdim=True)


def _seen_first(mask: Any, past: Any, tokens: int, arguments: Mapping[str, Any]) -> Tensor:
    """First tokens by a mask with a row per query: those whose first visible key is themselves."""
    visible = _visible(mask)
    number: Tensor = torch.arange(tokens, device=visible.device) + _offset(visible.shape[2], past, tokens, arguments)
    earliest = visible.to(torch.uint8).argmax(dim=2)
    return visible.any(dim=2) & (earliest == number)


def _offset(keys: int, past: Any, tokens: int, arguments: Mapping[str, Any]) -> Any:
    """The number of the key that the first query is itself, in a mask over so many keys."""
    if past is None:
        return keys - tokens
    cache = cache_of(arguments)
    cache = getattr(cache, "self_attention_cache", cache)
    if cache is not None and hasattr(cache, "get_mask_sizes"):
        for index in range(len(cache.layers)):
            if not hasattr(cache.layers[index], "get_mask_sizes"):
                continue
            length, begin = cache.get_mask_sizes(tokens, index)
            if length == keys:
                return past - begin
    if isinstance(past, Tensor) or keys == past + tokens or (cache is not None and keys > past + tokens):
        return past
    raise LaAciqError(
        f"attention_mask: expected {past + tokens} keys, of {past} cached tokens and {tokens} new ones, got {keys}"
    )


def _begins(arguments: Mapping[str, Any], shape: tuple[int, int], device: torch.device) -> Tensor | None:
    """Where `cu_seq_lens_q` or `seq_idx` begin a sequence: bool [batch, tokens], or None without them."""
    batch, tokens = shape
    numbers = arguments.get("seq_idx")
    if isinstance(numbers, Tensor):
        if numbers.ndim != 2 or numbers.shape[1] != tokens:
            raise LaAciqError(f"seq_idx: expected shape [batch, {tokens}], got {list(numbers.shape)}")
        begins = torch.ones((len(numbers), tokens), dtype=torch.bool, device=device)
        begins[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
        return begins.expand(batch, tokens)
    for name in ("cu_seq_lens_q", "cu_seqlens_q", "cu_seqlens"):
        bounds = arguments.get(name)
        if not isinstance(bounds, Tensor):
            continue
        if bounds.ndim != 1 or len(bounds) < 2 or int(bounds[0]) != 0 or int(bounds[-1]) > batch * tokens:
            raise LaAciqError(
                f"{name}: expected bounds from 0 to at most {batch * tokens} tokens, got {bounds.tolist()}"
            )
        lengths = bounds.diff()
        keys = arguments.get(name.replace("_q", "_k"))
        whole = lengths > 0
        if isinstance(keys, Tensor) and keys.shape == bounds.shape:
            whole = whole & (keys.diff() == lengths)  # the others go on from a cache
        begins = torch.zeros(batch * tokens, dtype=torch.bool, device=device)
        begins[bounds[:-1][whole].long().to(device)] = True
        return begins.view(batch, tokens)
    return None


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """transformers' cache among the arguments of a call by name, whatever its name; None without one."""
    caches = (arguments.get(name) for name in CACHE_NAMES)
    return next((cache for cache in caches if cache is not None and not isinstance(cache, dict)), None)


@lru_cache(maxsize=512)
def cache_name(forward: Any) -> str | None:
    """The name of the argument of a class's `forward` that takes transformers' cache; None where there is none."""
    parameters = signature(forward).parameters
    names = (name for name in CACHE_NAMES if name in parameters)
    return next((name for name in names if "dict" not in str(parameters[name].annotation).lower()), None)


@lru_cache(maxsize=512)
def _takes_positions_and_cache(forward: Any) -> bool:
    return cache_name(forward) is not None and "position_ids" in signature(forward).parameters


def _flash(module: nn.Module) -> bool:
    return "flash" in str(getattr(getattr(module, "config", None), "_attn_implementation", None))


def _attends_over(module: nn.Module, arguments: Mapping[str, Any]) -> bool:
    """Whether the model's attention takes no notice of `cu_seq_lens_q` and `seq_idx`."""
    return not _flash(module) and cache_name(type(module).forward) is not None


def _restarts(
    module: nn.Module,
    arguments: Mapping[str, Any],
    shape: tuple[int, int],
    mask: Tensor | None,
    past: Any,
    first: Tensor | None,
) -> Tensor | None:
    """First tokens by position ids, bool [batch or 1, tokens]; None where they say no more than mask and cache do.

    Raises:
        LaAciqError: They begin a sequence where the model sees earlier tokens.
    """
    positions = arguments.get("position_ids")
    if not isinstance(positions, Tensor) or not _takes_positions_and_cache(type(module).forward):
        return None
    if positions.ndim == 3 and positions.shape[0] == 4:  # those of the text, then of time, height and width
        positions = positions[0]
    if positions.ndim == 1:
        positions = positions[None]
    if positions.ndim != 2 or positions.shape[1] != shape[1]:
        return None
    fresh = not isinstance(past, Tensor) and past == 0
    if mask is None and fresh:
        begins = torch.ones_like(positions, dtype=torch.bool)
        begins[:, 1:] = positions[:, 1:] == 0 if _flash(module) else positions.diff() != 1
        if not _uses_cache(module, arguments) or _flash(module):
            return begins
        if shape[1] > 1 and bool(begins[:, 1:].any()):
            raise LaAciqError(
                "position_ids begin a sequence within a row, and with a cache the model attends over its border; pass "
                "use_cache=False, or one sequence per row"
            )
        return None
    if shape[1] == 1 and positions.device.type != "cpu":
        return None  # a decoded token: nothing is read back from the device
    again = positions == 0
    if first is not None:
        again = again & ~first
    if mask is not None and past is not None:
        seen = _keys(mask) != 0
        at = torch.arange(shape[1], device=seen.device) + past
        inside = at < seen.shape[1]
        again = again & (seen[:, at.clamp(max=seen.shape[1] - 1)] & inside).to(again.device)
    if bool(again.any()):
        raise LaAciqError(
            "position_ids begin a sequence at 0 where the attention mask or the cache has earlier tokens of it; pass "
            "packed sequences with use_cache=False and without attention_mask, or one sequence per row"
        )
    return None


def _uses_cache(module: nn.Module, arguments: Mapping[str, Any]) -> bool:
    uses = arguments.get("use_cache")
    if uses is None:
        uses = getattr(getattr(module, "config", None), "use_cache", False) and not module.training
    return bool(uses)
