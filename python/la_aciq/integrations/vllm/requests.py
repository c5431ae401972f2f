"""The language of a request in vLLM: checked where it arrives, part of its keys in the prefix cache, and put into the
row of its slot when it joins the batch.

The tag is `extra_args["language"]` of `SamplingParams`, over HTTP `"vllm_xargs": {"language": "sw"}`; without one the
request is served by the pooled row `und`.
"""

import functools
import os
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import BeamSearchParams, SamplingParams
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

from ...errors import LaAciqError
from ...tags import UND, canonical
from . import adapt, metrics
from .method import LaAciqConfig, check_supported, quantization
from .rows import ServedRows, fill_before_each_step
from .serve import DETECT

KEY = "language"


def tag_of(params: SamplingParams | None) -> str:
    """The canonical tag of a request, `und` for none. Raises `LaAciqError` or `TypeError` for what is no BCP-47 tag."""
    tag = (params.extra_args or {}).get(KEY) if params is not None else None
    return UND if tag is None else canonical(tag)


class LanguageProcessor(LogitsProcessor, LogitsProcessorV2):
    """Follows vLLM's batch and keeps the row of each slot; it changes no logits.

    vLLM's V2 model runner loads only processors of its own kind. This is one of them too, so that other models run
    there with LA-ACIQ installed; a model of LA-ACIQ's is refused.
    """

    def __init__(self, vllm_config: VllmConfig, device: Any, is_pin_memory: bool = False) -> None:
        self._config = quantization(vllm_config)
        if self._config is not None:
            check_supported(vllm_config, self._config)
            self._rows = self._config.rows = ServedRows(self._config.done.state, vllm_config, device)
            fill_before_each_step(quantization)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """HTTP 400 for a tag that is not BCP-47. In a process without a model of ours the key is anybody's."""
        if LaAciqConfig.in_use:
            try:
                tag_of(sampling_params)
            except (LaAciqError, TypeError) as error:
                metrics.INVALID.inc()
                raise VLLMValidationError(str(error), parameter=f"vllm_xargs.{KEY}") from error

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests into, out of and between slots; in vLLM's order: removed, added, moved."""
        if self._config is None or batch_update is None:
            return
        slots = self._rows.host_slots
        for slot in batch_update.removed:
            slots[slot] = 0
        for slot, params, _, _ in batch_update.added:
            slots[slot] = self._config.row(tag_of(params))
        for source, target, direction in batch_update.moved:
            before = slots[target]
            slots[target] = slots[source]
            if direction == MoveDirectionality.SWAP:
                slots[source] = before
        self._rows.publish()

    def is_argmax_invariant(self) -> bool:
        """Without effect on the logits, it is not even called for them."""
        return True

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """V2: no request's logits are changed."""
        return False

    def apply(self, logits: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        """The logits as they are."""
        return logits


def register() -> None:
    """Extend vLLM where its server admits requests and where its engine hands them to the scheduler; once."""
    if hasattr(EngineCore.preprocess_add_request, "la_aciq"):
        return
    process_inputs = InputProcessor.process_inputs
    resolve_watermarking = InputProcessor.resolve_watermarking
    preprocess_add_request = EngineCore.preprocess_add_request
    post_step = EngineCore.post_step

    @functools.wraps(process_inputs)
    def process_and_count(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = process_inputs(self, *args, **kwargs)
        config = quantization(self.vllm_config)
        if config is not None and request.sampling_params is not None:
            _admit(config, request, self.tokenizer)
        return request

    @functools.wraps(resolve_watermarking)
    def refuse_beams(self: Any, params: Any) -> Any:
        # The first thing that vLLM does with a beam search, which then runs it as requests of its own, without the tag.
        if isinstance(params, BeamSearchParams) and quantization(self.vllm_config) is not None:
            raise VLLMValidationError("beam search is not served: it would drop the language", parameter="beam_width")
        return resolve_watermarking(self, params)

    @functools.wraps(preprocess_add_request)
    def salt_and_add(self: Any, request: Any) -> Any:
        config = quantization(self.vllm_config)
        if config is not None:
            # In the engine, which no client gets around: blocks computed under one row's clips serve that row alone.
            row = config.row(tag_of(request.sampling_params))
            version = f"{config.version}:{config.done.state.entries[row]}:{config.moves.moves[row]}"
            request.cache_salt = f"la_aciq:{version}:{request.cache_salt or ''}"
        return preprocess_add_request(self, request)

    @functools.wraps(post_step)
    def adapt_after_step(self: Any, model_executed: bool) -> None:
        post_step(self, model_executed)
        config = quantization(self.vllm_config)
        if config is not None and model_executed and adapt.sampled(config.done):
            adapt.after_step(self, config)

    def report(self: Any) -> dict[str, list[Any]]:
        config = quantization(self.vllm_config)
        return {} if config is None or not adapt.sampled(config.done) else adapt.report(self, config)

    def roll_back(self: Any) -> list[str]:
        config = quantization(self.vllm_config)
        return [] if config is None else adapt.roll_back(self, config)

    salt_and_add.la_aciq = True  # type: ignore[attr-defined]
    EngineCore.post_step = adapt_after_step
    EngineCore.la_aciq_report = report
    EngineCore.la_aciq_roll_back = roll_back
    InputProcessor.process_inputs = process_and_count
    InputProcessor.resolve_watermarking = refuse_beams
    EngineCore.preprocess_add_request = salt_and_add


def _admit(config: LaAciqConfig, request: Any, tokenizer: Any) -> None:
    """In the server: detect a language that is not given, where that is switched on, and count the request."""
    params = request.sampling_params
    extra = params.extra_args or {}
    if extra.get(KEY) is None and os.environ.get(DETECT) == "1" and request.prompt_token_ids:
        # `params` is the request's own copy, `extra` the caller's.
        text = tokenizer.decode(request.prompt_token_ids, skip_special_tokens=True)
        params.extra_args = {**extra, KEY: detected(text)}
        metrics.DETECTED.inc()
    tag = tag_of(params)
    metrics.REQUESTS.labels(config.done.state.entries[config.row(tag)]).inc()
    if tag != UND and config.done.state.entry(tag) == 0:
        metrics.UNKNOWN.inc()


def detected(text: str) -> str:
    """The language of a text by lingua's models, `und` when they cannot tell."""
    language = _detector().detect_language_of(text)
    return UND if language is None else canonical(language.iso_code_639_1.name.lower())


@functools.cache
def _detector() -> Any:
    try:
        from lingua import LanguageDetectorBuilder
    except ImportError as error:
        raise LaAciqError("detecting languages needs lingua-language-detector; install la-aciq[detect]") from error
    return LanguageDetectorBuilder.from_all_languages().build()
