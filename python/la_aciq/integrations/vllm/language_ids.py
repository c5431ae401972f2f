"""The language ids of a worker's running step: which entry of the clip tables serves each request and each token."""

import torch
from vllm.config import VllmConfig

from ...nn.forward_pass import LanguageState
from ...tags import SINK


class BatchLanguageIds(LanguageState):
    """The language ids of a worker's running step, shared by all quantized layers of its model.

    This is the one place that decides which language a token has and which token is the first of its sequence.

    Attributes:
        host_slot_ids: a list [max_num_seqs], the language id of the request in each slot of vLLM's batch.
        slot_ids: the same as an int32 tensor on the device, written by `publish`.
        token_language_ids: int32 [tokens of the largest step], the language id of each token, written by `begin`.
            Both tensors are written in place and keep their addresses, because CUDA graphs hold on to those.
        count: tokens of the running step.
        sampling: whether the running step is a sample (`adapt`).
        sample_steps: one step in this many is a sample; 0: none is.
    """

    def __init__(self, entries: tuple[str, ...], vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(entries)
        scheduler, graphs = vllm_config.scheduler_config, vllm_config.compilation_config
        tokens = max(scheduler.max_num_batched_tokens, graphs.max_cudagraph_capture_size or 0)
        self.host_slot_ids = [0] * scheduler.max_num_seqs
        self.slot_ids = torch.zeros(scheduler.max_num_seqs, dtype=torch.int32, device=device)
        self.token_language_ids = torch.zeros(tokens, dtype=torch.int32, device=device)
        self._order = torch.arange(tokens, dtype=torch.int32, device=device)
        self.count = 0
        self.sampling = False
        self.sample_steps = 0
        self._steps = 0
        self._sink_id = entries.index(SINK) if SINK in entries else None

    def publish(self) -> None:
        """Copy `host_slot_ids` to `slot_ids`, before the step that reads them."""
        # From a new tensor: nothing else writes to it while the copy may still be under way.
        self.slot_ids.copy_(torch.tensor(self.host_slot_ids, dtype=torch.int32))

    def begin(self, starts: torch.Tensor, lengths: torch.Tensor, count: int) -> None:
        """Write `token_language_ids` for a step, without waiting for the device.

        A token has the language id of its request. The first token of a sequence (position 0) has the id of the
        attention sink, where the tables have one: a step that continues a sequence, after a prefix hit or in a later
        chunk, has no such token.

        Args:
            starts: int32 [requests + 1], the index of each request's first token in the step.
            lengths: int32 [>= requests], tokens of each request up to the end of the step.
            count: tokens of the step, with or without those that fill up a graph.
        """
        self._steps += 1
        self.sampling = self.sample_steps > 0 and self._steps % self.sample_steps == 0
        self.count = count
        requests = starts.shape[0] - 1
        order = self._order[:count]
        request = torch.bucketize(order, starts[1:], right=True).clamp_(max=requests - 1)
        ids = self.slot_ids[request]
        if self._sink_id is not None:
            position = order + (lengths[:requests] - starts[1:])[request]
            ids = torch.where(position == 0, self._sink_id, ids)
        self.token_language_ids[:count].copy_(ids)

    def ids_for(self, x: torch.Tensor, layout: str | None = None) -> torch.Tensor:
        """The language ids of the running step, int32 [tokens], for a layer's input x [tokens, K].

        Raises:
            RuntimeError: x does not have one row for each token of the step, so that the language of its rows is
                unknown. Compiled code does not check this: its graph was traced before the step.
        """
        if not torch.compiler.is_compiling() and (x.ndim != 2 or x.shape[0] < self.count):
            raise RuntimeError(
                f"a quantized layer got an input of shape {list(x.shape)} in a step of {self.count} tokens; the "
                "language of each of its rows is unknown"
            )
        return self.token_language_ids[: x.shape[0]]
