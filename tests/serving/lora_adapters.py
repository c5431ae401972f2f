"""Random LoRA adapters in PEFT's format, and what a model with one computes."""

import json

import safetensors.torch
import torch

import la_aciq

RANK = 8
# In each layer that vLLM fuses some parts have an adapter and others have none.
SHAPES = {
    "self_attn.q_proj": (128, 128),
    "self_attn.v_proj": (64, 128),
    "self_attn.o_proj": (128, 128),
    "mlp.up_proj": (256, 128),
    "mlp.down_proj": (128, 256),
}


def write_adapter(folder, base, seed):
    """Write an adapter for the two layers of the served model; by layer the factors A [rank, K] and B [N, rank]."""
    generator = torch.Generator().manual_seed(seed)
    factors, tensors = {}, {}
    for layer in range(2):
        for module, (n, k) in SHAPES.items():
            a, b = (torch.randn(shape, generator=generator) * 0.1 for shape in ((RANK, k), (n, RANK)))
            key = f"model.layers.{layer}.{module}"
            factors[key] = a, b
            tensors |= {f"base_model.model.{key}.lora_A.weight": a, f"base_model.model.{key}.lora_B.weight": b}
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [module.partition(".")[2] for module in SHAPES],
        "base_model_name_or_path": str(base),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return factors


def log_probabilities(model, ids, tag, factors):
    """float64 [tokens - 1, vocabulary] after each of ids [tokens] but the last, by transformers, with an adapter's
    product added to the output of each layer that has one.
    """
    handles = []
    for key, (a, b) in factors.items():

        def add(module, args, output, a=a, b=b):
            return output + args[0] @ a.T @ b.T

        handles.append(model.get_submodule(key).register_forward_hook(add))
    try:
        with torch.no_grad(), la_aciq.language(tag):
            logits = model(ids[None]).logits[0, :-1].double()
    finally:
        for handle in handles:
            handle.remove()
    return logits.log_softmax(-1)
