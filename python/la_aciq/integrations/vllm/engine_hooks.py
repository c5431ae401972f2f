"""Hooks into vLLM's server and engine where it has no entry point: configuration, admission, scheduling."""

import functools
from typing import Any

from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.platforms import current_platform
from vllm.sampling_params import BeamSearchParams
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.input_processor import InputProcessor

from . import adapt
from .method import served_config
from .requests import admit, tag_of
from .tail_sums import is_sampled


def install() -> None:
    """Install the hooks in this process. Idempotent."""
    if hasattr(EngineCore, "la_aciq_report"):
        return
    create_engine_config = EngineArgs.create_engine_config
    process_inputs = InputProcessor.process_inputs
    resolve_watermarking = InputProcessor.resolve_watermarking
    preprocess_add_request = EngineCore.preprocess_add_request
    post_step = EngineCore.post_step

    @functools.wraps(create_engine_config)
    def create_and_check(self: Any, *args: Any, **kwargs: Any) -> Any:
        vllm_config = create_engine_config(self, *args, **kwargs)
        config = served_config(vllm_config)
        if config is not None:
            config.check_supported(vllm_config)
        return vllm_config

    @functools.wraps(process_inputs)
    def process_and_admit(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = process_inputs(self, *args, **kwargs)
        config = served_config(self.vllm_config)
        if config is not None and request.sampling_params is not None:
            if (
                request.sampling_params.prompt_logprobs is not None
                and self.vllm_config.lora_config is not None
                and current_platform.is_cpu()
            ):
                # vLLM's CPU kernels for adapters fail on such a request, and the engine would die.
                raise VLLMValidationError(
                    "prompt_logprobs are not served on a CPU with enable_lora", parameter="prompt_logprobs"
                )
            admit(config, request, self.tokenizer)
        return request

    @functools.wraps(resolve_watermarking)
    def refuse_beams(self: Any, params: Any) -> Any:
        # The first function that vLLM calls for a beam search. It then runs the beams as requests without the tag.
        if isinstance(params, BeamSearchParams) and served_config(self.vllm_config) is not None:
            raise VLLMValidationError("beam search is not served: it would drop the language", parameter="beam_width")
        return resolve_watermarking(self, params)

    @functools.wraps(preprocess_add_request)
    def salt_and_add(self: Any, request: Any) -> Any:
        config = served_config(self.vllm_config)
        if config is not None:
            # In the engine, where no client can avoid it: blocks computed under one entry's clips serve that entry.
            language_id = config.language_id(tag_of(request.sampling_params))
            version = f"{config.version}:{config.entries[language_id]}:{config.clip_moves.counts[language_id]}"
            request.cache_salt = f"la_aciq:{version}:{request.cache_salt or ''}"
        return preprocess_add_request(self, request)

    @functools.wraps(post_step)
    def adapt_after_step(self: Any, model_executed: bool) -> None:
        post_step(self, model_executed)
        config = served_config(self.vllm_config)
        if config is not None and model_executed and is_sampled(config.quantization):
            adapt.after_step(self, config)

    def report(self: Any) -> dict[str, list[Any]]:
        config = served_config(self.vllm_config)
        return {} if config is None or not is_sampled(config.quantization) else adapt.report(self, config)

    def roll_back(self: Any) -> list[str]:
        config = served_config(self.vllm_config)
        return [] if config is None else adapt.roll_back(self, config)

    EngineArgs.create_engine_config = create_and_check
    InputProcessor.process_inputs = process_and_admit
    InputProcessor.resolve_watermarking = refuse_beams
    EngineCore.preprocess_add_request = salt_and_add
    EngineCore.post_step = adapt_after_step
    EngineCore.la_aciq_report = report
    EngineCore.la_aciq_roll_back = roll_back
