"""Which row of the clip tables serves each request in vLLM's batch, and each token of the running step."""

from collections.abc import Callable
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform

from ...nn.forward_pass import LanguageState
from ...tags import SINK


class ServedRows(LanguageState):
    """The rows of a worker's running step, shared by all quantized layers of its model.

    slots: int32 [max_num_seqs], the row of the request in each slot of vLLM's batch, set in `host_slots`. tokens: int32
    [tokens of the largest step], the row of each token of the running step. Both tensors stay where they are and are
    written in place.
    """

    def __init__(self, like: LanguageState, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(like.entries)
        scheduler, graphs = vllm_config.scheduler_config, vllm_config.compilation_config
        tokens = max(scheduler.max_num_batched_tokens, graphs.max_cudagraph_capture_size or 0)
        self.slots = torch.zeros(scheduler.max_num_seqs, dtype=torch.int32, device=device)
        self.tokens = torch.zeros(tokens, dtype=torch.int32, device=device)
        self._order = torch.arange(tokens, dtype=torch.int32, device=device)
        # Whether the running step is a sample (`adapt`), one step in `sample_steps`; 0: none is. count: of its tokens.
        self.sampling = False
        self.sample_steps = 0
        self.count = 0
        self._steps = 0
        self.host_slots = [0] * scheduler.max_num_seqs
        self._sink_row = self.entries.index(SINK) if SINK in self.entries else None

    def publish(self) -> None:
        """Make `host_slots` the rows of the slots, before the step that uses them."""
        # From a tensor of its own: nothing else is written to it while the copy may still be under way.
        self.slots.copy_(torch.tensor(self.host_slots, dtype=torch.int32))

    def begin(self, starts: torch.Tensor, lengths: torch.Tensor, count: int, longest: int) -> None:
        """Fill `tokens` for a step, without waiting for the device.

        starts: int32 [requests + 1], where each request's tokens begin in the step. lengths: int32 [>= requests], the
        tokens of each request up to and with this step. count: the tokens of the step. longest: the most tokens that a
        request has in it.
        """
        self._steps += 1
        self.sampling = self.sample_steps > 0 and self._steps % self.sample_steps == 0
        self.count = count
        requests = starts.shape[0] - 1
        if longest == 1 and requests == count:  # one token each: decoding
            tokens = self.tokens[:count]
            tokens.copy_(self.slots[:count])
            if self._sink_row is not None:
                tokens.masked_fill_(lengths[:count] == 1, self._sink_row)
            return
        order = self._order[:count]
        request = torch.bucketize(order, starts[1:], right=True).clamp_(max=requests - 1)
        rows = self.slots[request]
        if self._sink_row is not None:
            # The sequence's first token is the attention sink; after a prefix hit or in a later chunk there is none.
            position = order + (lengths[:requests] - starts[1:])[request]
            rows = torch.where(position == 0, self._sink_row, rows)
        self.tokens[:count].copy_(rows)

    def ids_for(self, x: torch.Tensor, layout: str | None = None) -> torch.Tensor:
        """The rows of the running step for a layer's input [tokens, K]."""
        return self.tokens[: x.shape[0]]


def fill_before_each_step(quantization: Callable[[VllmConfig], Any]) -> None:
    """Fill the rows of tokens where vLLM sets up a forward pass: with the attention's metadata there, in Python, and
    before a CUDA graph is replayed. The platform's hook for this is the one place all of its model runners go through.
    """
    platform = type(current_platform)
    original = platform.set_additional_forward_context
    if hasattr(original, "la_aciq"):
        return

    def set_additional_forward_context(
        cls: Any, /, *args: Any, attn_metadata: Any, vllm_config: VllmConfig, **kwargs: Any
    ) -> dict[str, Any]:
        config = quantization(vllm_config)
        if config is not None and config.rows is not None and attn_metadata:
            metadata = next(iter(attn_metadata.values()))
            config.rows.begin(
                metadata.query_start_loc, metadata.seq_lens, metadata.num_actual_tokens, metadata.max_query_len
            )
        result: dict[str, Any] = original(*args, attn_metadata=attn_metadata, vllm_config=vllm_config, **kwargs)
        return result

    set_additional_forward_context.la_aciq = True  # type: ignore[attr-defined]
    platform.set_additional_forward_context = classmethod(set_additional_forward_context)
