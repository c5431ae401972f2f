"""Hooks into vLLM's workers where it has no entry point: forward passes, LoRA adapters, reloading of weights."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform

from ...errors import LaAciqError
from .method import served_config


def install() -> None:
    """Install the hooks in a worker's process. Idempotent."""
    _write_language_ids()
    _refuse_reloading()
    if current_platform.is_cpu():
        _keep_requests_without_adapter()


def _write_language_ids() -> None:
    """Write the language ids where vLLM sets up a forward pass.

    There the attention's metadata is known, Python runs, and a CUDA graph is not yet replayed. The platform's hook for
    this is the one place that all of its model runners go through.
    """
    platform = type(current_platform)
    original = platform.set_additional_forward_context
    if hasattr(original, "la_aciq"):
        return

    def set_additional_forward_context(
        cls: Any, /, *args: Any, attn_metadata: Any, vllm_config: VllmConfig, **kwargs: Any
    ) -> dict[str, Any]:
        config = served_config(vllm_config)
        if config is not None and config.language_ids is not None and attn_metadata:
            metadata = next(iter(attn_metadata.values()))
            config.language_ids.begin(metadata.query_start_loc, metadata.seq_lens, metadata.num_actual_tokens)
        result: dict[str, Any] = original(*args, attn_metadata=attn_metadata, vllm_config=vllm_config, **kwargs)
        return result

    set_additional_forward_context.la_aciq = True  # type: ignore[attr-defined]
    platform.set_additional_forward_context = classmethod(set_additional_forward_context)


def _refuse_reloading() -> None:
    """Refuse `reload_weights` before vLLM takes the layers apart: the engine goes on with the weights it has."""
    from vllm.v1.worker.gpu_worker import Worker

    reload_weights = Worker.reload_weights
    if hasattr(reload_weights, "la_aciq"):
        return

    @functools.wraps(reload_weights)
    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        if served_config(self.vllm_config) is not None:
            raise LaAciqError(
                "reload_weights cannot replace the tensors of a model quantized by LA-ACIQ; start a new engine"
            )
        return reload_weights(self, *args, **kwargs)

    refuse.la_aciq = True  # type: ignore[attr-defined]
    Worker.reload_weights = refuse


def _keep_requests_without_adapter() -> None:
    """Leave the rows of requests without a LoRA adapter as they are, in a batch with requests that have one.

    vLLM marks such rows with the adapter index -1. Its kernels for CPUs (0.32) read -1 as the last adapter and add its
    product; its kernels for GPUs skip these rows.
    """
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    for name, indices in (
        ("add_lora_linear", "token_lora_indices"),
        ("add_lora_embedding", "token_lora_indices"),
        ("add_lora_logits", "sampler_indices"),
    ):
        original = getattr(PunicaWrapperCPU, name)
        if not hasattr(original, "la_aciq"):
            setattr(PunicaWrapperCPU, name, _keeping_rows(original, indices))


def _keeping_rows(original: Callable[..., Any], indices: str) -> Callable[..., Any]:
    """Wrap a function that adds to y [rows, N] in place; `indices` is the attribute with the adapter of each row."""

    @functools.wraps(original)
    def add(self: Any, y: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        without = getattr(self, indices) < 0
        before = y[: len(without)].clone()
        result = original(self, y, *args, **kwargs)
        after = y[: len(without)]
        after.copy_(torch.where(without[:, None], before, after))
        return result

    add.la_aciq = True  # type: ignore[attr-defined]
    return add
