"""The language of a request in vLLM: validated where the request arrives, written to its slot when it joins the batch.

The tag is `extra_args["language"]` of `SamplingParams`, over HTTP `"vllm_xargs": {"language": "sw"}`. The entry `und`,
pooled over the languages, serves requests without a tag.
"""

import os
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

from ...errors import LaAciqError
from ...tags import UND, canonical
from .detection import detect_language
from .language_ids import BatchLanguageIds
from .method import LaAciqVllmConfig, served_config
from .metrics import DETECTED, INVALID, REQUESTS, UNKNOWN
from .settings import DETECT
from .worker_hooks import install

KEY = "language"


def tag_of(params: SamplingParams | None) -> str:
    """Return the canonical tag of a request, `und` for a request without one.

    Raises:
        LaAciqError: the tag is not BCP-47.
        TypeError: the tag is not a string.
    """
    tag = (params.extra_args or {}).get(KEY) if params is not None else None
    return UND if tag is None else canonical(tag)


def admit(config: LaAciqVllmConfig, request: Any, tokenizer: Any) -> None:
    """Count a request that the server admits; detect its language first, where it has no tag and `DETECT` is set.

    Args:
        config: of the served model.
        request: vLLM's `EngineCoreRequest`.
        tokenizer: of the served model; None without one.
    """
    params = request.sampling_params
    extra = params.extra_args or {}
    if extra.get(KEY) is None and os.environ.get(DETECT) == "1" and request.prompt_token_ids and tokenizer is not None:
        # `params` is the request's own copy, `extra` the caller's.
        text = tokenizer.decode(request.prompt_token_ids, skip_special_tokens=True)
        params.extra_args = {**extra, KEY: detect_language(text)}
        DETECTED.inc()
    tag = tag_of(params)
    REQUESTS.labels(config.entries[config.language_id(tag)]).inc()
    if config.is_unserved(tag):
        UNKNOWN.inc()


class LanguageProcessor(LogitsProcessor, LogitsProcessorV2):
    """Follows vLLM's batch and keeps the language id of each slot; it changes no logits.

    vLLM's V2 model runner loads only processors of its own kind. This class is one of them too, so that other models
    run there while LA-ACIQ is installed; a model of LA-ACIQ's is refused.
    """

    def __init__(self, vllm_config: VllmConfig, device: Any, is_pin_memory: bool = False) -> None:
        self._config = served_config(vllm_config)
        if self._config is not None:
            self._config.check_supported(vllm_config)
            self._language_ids = BatchLanguageIds(self._config.entries, vllm_config, device)
            self._config.language_ids = self._language_ids
            install()

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Answer HTTP 400 for a tag that is not BCP-47. In a process without a model of ours the key has any value."""
        if LaAciqVllmConfig.in_use:
            try:
                tag_of(sampling_params)
            except (LaAciqError, TypeError) as error:
                INVALID.inc()
                raise VLLMValidationError(str(error), parameter=f"vllm_xargs.{KEY}") from error

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests into, out of and between slots; in vLLM's order: removed, added, moved."""
        if self._config is None or batch_update is None:
            return
        slots = self._language_ids.host_slot_ids
        for slot in batch_update.removed:
            slots[slot] = 0
        for slot, params, _, _ in batch_update.added:
            slots[slot] = self._config.language_id(tag_of(params))
        for source, target, direction in batch_update.moved:
            before = slots[target]
            slots[target] = slots[source]
            if direction == MoveDirectionality.SWAP:
                slots[source] = before
        self._language_ids.publish()

    def is_argmax_invariant(self) -> bool:
        """Return True: no logits change, and vLLM does not call `apply` for greedy requests."""
        return True

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """V2: return False, because the logits of no request change."""
        return False

    def apply(self, logits: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        """Return the logits as they are."""
        return logits
