"""Whole-model speed on the CPU: `python -m benchmarks.bench_model` writes results/model-<device>.json and the table of
docs/speed.md.

The embedded model decodes with 1, 4 and 16 rows, in different languages, after a prompt of 128 tokens: the model in
float32 and bfloat16, with torch's INT4 matrix product (the one that torchao's INT4 weights use on a CPU) in place of
its linear layers, with torchao itself where it is installed, and quantized by LA-ACIQ. All of them run on the same
threads in turns, so that what disturbs the machine disturbs all. Before the timing each reads the same texts, and a
loss far from float32's stops the run. The output head stays as it is in all of them. A run that was broken off goes on
with the numbers of rows that it had not finished, when the versions and the threads are still the same.
"""

import argparse
import copy
import gc
import json
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import la_aciq
from benchmarks import tables
from la_aciq import embedded
from la_aciq.bench import cpu_name, in_file_names, versions
from la_aciq.nn import QuantConfig, quantize_model
from la_aciq.nn.attention import use_attention

TAGS = ["en", "sw", "th", "ko", "ar", "de", "ru", "zh", "fi", "hi", "ja", "es", "fr", "vi", "tr", "pl"]
ROWS = (1, 4, 16)
PROMPT, STEPS, ROUNDS = 128, 10, 3
GROUP = 64
LOSS_TOKENS = 128
MOST_NATS = 1.0  # a model that loses more than this was put together wrongly

OURS = {
    "la_aciq W4A16": QuantConfig(activations=16, group_size=GROUP),
    "la_aciq W4A16, INT4 cache": QuantConfig(activations=16, kv=4, group_size=GROUP),
    "la_aciq W4A8": QuantConfig(activations=8, group_size=GROUP),
    "la_aciq W4A4": QuantConfig(activations=4, group_size=GROUP, clip="absmax"),
}


class TorchInt4(nn.Module):
    """A linear layer through torch's own INT4 kernel: groups of 64 with a scale and a zero each, no bias."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        n, k = linear.weight.shape
        groups = linear.weight.detach().float().view(n, -1, GROUP)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        step = (high - low).clamp(min=1e-8) / 15
        q = ((groups - low) / step).round().clamp(0, 15).to(torch.int32).view(n, k)
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
        zero = low + 8 * step  # the kernel's value is (q - 8) * step + zero
        self.parameters_ = torch.stack([step.squeeze(-1).T, zero.squeeze(-1).T], dim=-1).to(torch.bfloat16).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.packed, GROUP, self.parameters_)
        return out.view(*x.shape[:-1], -1)


def torch_int4(model: Any) -> Any:
    candidate = copy.deepcopy(model).to(torch.bfloat16)
    for name, module in list(candidate.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            candidate.set_submodule(name, TorchInt4(module))
    return candidate


def torchao_int4(model: Any) -> Any:
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import quantize_

    candidate = copy.deepcopy(model).to(torch.bfloat16)
    quantize_(
        candidate,
        PrototypeInt4WeightOnlyConfig(group_size=GROUP),
        filter_fn=lambda module, name: isinstance(module, nn.Linear) and name != "lm_head",
    )
    return candidate


def with_our_attention(model: Any) -> Any:
    candidate = copy.deepcopy(model)
    use_attention(candidate)
    return candidate


def loss(model: Any, ids: Tensor) -> float:
    """Nats per token of rows of ids [rows, tokens], each under its language."""
    with la_aciq.languages(TAGS[: len(ids)]):
        logits = model(ids, use_cache=False).logits[:, :-1].float()
    return float(nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


def run(model: Any, ids: Tensor) -> tuple[float, list[float]]:
    """Seconds of reading the prompt, and of each step after it."""
    with la_aciq.languages(TAGS[: len(ids)]):
        start = time.perf_counter()
        out = model(ids, use_cache=True, logits_to_keep=1)
        prefill, steps = time.perf_counter() - start, []
        for _ in range(STEPS):
            start = time.perf_counter()
            out = model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
            steps.append(time.perf_counter() - start)
    return prefill, steps


def main() -> None:
    argparse.ArgumentParser(
        prog="python -m benchmarks.bench_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    torch.set_grad_enabled(False)
    model, tokenizer = embedded.load_model()
    texts = embedded.load_texts(TAGS)
    # Rows for a few of the languages: what a table holds does not change how long reading it takes.
    few = {tag: texts[tag] for tag in TAGS[:3]}
    profile = la_aciq.calibrate(model, few, tokenizer, tokens=64, seqlen=64, group_size=GROUP, progress=False)
    ids = torch.stack([torch.tensor(tokenizer(texts[tag])["input_ids"][1000 : 1000 + PROMPT]) for tag in TAGS])

    models: dict[str, Any] = {}
    makers: dict[str, Callable[[], Any]] = {
        "float32": lambda: model,
        "bfloat16": lambda: copy.deepcopy(model).to(torch.bfloat16),
        "torch int4": lambda: torch_int4(model),
        "torch int4, our attention": lambda: with_our_attention(models["torch int4"]),
    }
    if versions(["torchao"]):
        makers["torchao int4"] = lambda: torchao_int4(model)
    for name, config in OURS.items():
        makers[name] = lambda config=config: quantize_model(
            model, profile, config, like=models.get("la_aciq W4A16"), progress=False
        ).to(torch.bfloat16)
    nats = {}
    for name, make in makers.items():
        models[name] = make()
        nats[name] = loss(models[name], ids[:4, :LOSS_TOKENS])
        print(f"{name:28s} {nats[name]:.3f} nats per token", flush=True)
        if nats[name] - nats["float32"] > MOST_NATS:
            raise SystemExit(f"{name} loses {nats[name] - nats['float32']:.2f} nats: it was put together wrongly")

    results: dict[str, Any] = {
        "schema": 1,
        "device": cpu_name(),
        "threads": torch.get_num_threads(),
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(("la-aciq", "torch", "transformers", "torchao")),
        "model": embedded.MODEL_NAME,
        "prompt": PROMPT,
    }
    device = in_file_names(cpu_name())
    target = Path(__file__).parent / "results" / f"model-{device}.json"
    partial = target.with_suffix(".partial")
    same = {name: results[name] for name in ("threads", "versions", "prompt")} | {"names": list(models)}
    before = json.loads(partial.read_text(encoding="utf-8")) if partial.exists() else {}
    rows = before["rows"] if before.get("same") == same else []
    gc.disable()  # collected between the turns
    for count in ROWS:
        if any(row["rows"] == count for row in rows):
            continue
        prefills: dict[str, list[float]] = {name: [] for name in models}
        steps: dict[str, list[float]] = {name: [] for name in models}
        for turn in range(ROUNDS + 1):
            for name, one in models.items():
                prefill, decode = run(one, ids[:count])
                if turn:  # the first turn warms up
                    prefills[name].append(prefill)
                    steps[name] += decode
            gc.collect()
        for name in models:
            step = statistics.median(steps[name])
            rows.append(
                {
                    "name": name,
                    "rows": count,
                    "prefill_s": statistics.median(prefills[name]),
                    "step_s": step,
                    "step_quartiles_s": statistics.quantiles(steps[name], n=4)[::2],
                    "nats": nats[name],
                }
            )
            print(f"{count:2d} rows, {name:28s} {count / step:8.1f} tokens/s, prefill {rows[-1]['prefill_s']:.3f} s")
        partial.write_text(json.dumps({"same": same, "rows": rows}), encoding="utf-8")
    target.write_text(json.dumps(results | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
    partial.unlink()
    print(f"{target.name}: written")
    tables.main([])


if __name__ == "__main__":
    main()
