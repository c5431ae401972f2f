"""Cost, in a decoding step, of requests in different languages.

Two engines of the same model take turns. One is as served, its requests in different languages. The tables of the other
were reduced to the entry of one language when it was loaded: it writes no language ids in a step and looks none up.
Each engine is a process that runs this module: `python -m la_aciq.bench.data_plane`.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from ..integrations.vllm.settings import ENVIRONMENT

_PROMPT = 32  # tokens
_STEPS = 24  # timed in one round
_MIXED, _FIXED = "mixed", "fixed"


def measure(folder: str, *, batches: Sequence[int] = (1, 8), rounds: int = 12, dtype: str = "auto") -> dict[str, Any]:
    """Decode with both engines in turns, for each number of requests at a time.

    Args:
        folder: a quantized model.
        batches: numbers of requests at a time.
        rounds: turns of each engine.
        dtype: of the engines, as vLLM takes it.

    Returns:
        JSON types. For each number of requests: the median step of each engine in ms; the cost, which is the relative
        difference of the two median steps in a round, as the median over the rounds with its quartiles; and the share
        of its step that the first engine spends on writing language ids.
    """
    environment = ENVIRONMENT | os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [sys.executable, "-m", __name__, folder, dtype, str(max(batches))]
    engines = {
        kind: subprocess.Popen(
            [*command, kind], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for kind in (_FIXED, _MIXED)
    }
    try:
        costs = []
        for engine in engines.values():
            _answer(engine)  # that it is ready
        for batch in batches:
            steps: dict[str, list[float]] = {_FIXED: [], _MIXED: []}
            writing: list[float] = []
            ratios: list[float] = []
            for turn in range(rounds):
                medians = {}
                for kind in (_FIXED, _MIXED) if turn % 2 else (_MIXED, _FIXED):
                    answer = _ask(engines[kind], batch)
                    medians[kind] = statistics.median(answer["steps"])
                    steps[kind] += answer["steps"]
                    if kind == _MIXED:
                        writing += answer["writing"]
                ratios.append(medians[_MIXED] / medians[_FIXED] - 1)
            low, _, high = statistics.quantiles(ratios, n=4)
            costs.append(
                {
                    "requests": batch,
                    "step_ms": statistics.median(steps[_MIXED]) * 1e3,
                    "fixed_step_ms": statistics.median(steps[_FIXED]) * 1e3,
                    "cost": statistics.median(ratios),
                    "cost_low": low,
                    "cost_high": high,
                    "writing": statistics.median(writing) / statistics.median(steps[_MIXED]),
                }
            )
        return {"rounds": rounds, "steps": _STEPS, "batches": costs}
    finally:
        for engine in engines.values():
            engine.kill()
            engine.wait()


def table(cost: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        "| requests at a time | step, ms | step with one fixed language, ms | cost | writing language ids |",
        "|--:|--:|--:|--:|--:|",
    ]
    for one in cost["batches"]:
        interval = f"{one['cost']:+.1%} [{one['cost_low']:+.1%}, {one['cost_high']:+.1%}]"
        lines.append(
            f"| {one['requests']} | {one['step_ms']:.2f} | {one['fixed_step_ms']:.2f} | {interval} | "
            f"{one['writing']:.2%} |"
        )
    return "\n".join(lines)


def _ask(engine: Any, batch: int) -> dict[str, Any]:
    engine.stdin.write(f"{batch}\n")
    engine.stdin.flush()
    return _answer(engine)


def _answer(engine: Any) -> dict[str, Any]:
    line = engine.stdout.readline()
    if not line:
        raise RuntimeError(f"an engine of the benchmark ended with status {engine.wait()}")
    answer: dict[str, Any] = json.loads(line)
    return answer


# --- In an engine's process -----------------------------------------------------------------------------------------


def _reduce_to_one_entry(entry: int) -> None:
    """Make this process's vLLM load tables of one entry, and look no language id up."""
    from ..integrations.vllm.language_ids import BatchLanguageIds
    from ..integrations.vllm.method import LanguageLinearMethod

    load = LanguageLinearMethod.process_weights_after_loading

    def load_one_entry(self: Any, layer: Any) -> None:
        load(self, layer)
        quantized = layer.quantized
        for name in ("clips", "center"):
            if getattr(quantized, name) is not None:
                setattr(quantized, name, getattr(quantized, name)[entry : entry + 1].clone())
        if quantized.bias is not None and quantized.bias.ndim == 2:
            quantized.bias = quantized.bias[entry].clone()

    changed: Any = LanguageLinearMethod, BatchLanguageIds
    changed[0].process_weights_after_loading = load_one_entry
    changed[1].begin = lambda *_: None
    changed[1].ids_for = lambda *_: None


def _engine(folder: str, dtype: str, most: int, kind: str) -> None:
    """Answer each number of requests on standard input with the seconds of steps that decode them."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    if kind == _FIXED:
        _reduce_to_one_entry(1)
    from vllm import LLM, SamplingParams

    from ..integrations.vllm.language_ids import BatchLanguageIds
    from ..tags import SINK

    writing: list[float] = []
    begin = BatchLanguageIds.begin

    def timed(*arguments: Any) -> None:
        start = time.perf_counter()
        begin(*arguments)
        writing.append(time.perf_counter() - start)

    changed: Any = BatchLanguageIds
    changed.begin = timed
    llm = LLM(folder, dtype=dtype, max_model_len=256, max_num_seqs=most, enable_prefix_caching=False)
    engine: Any = llm.llm_engine
    entries = engine.vllm_config.quant_config.entries
    tags = [entry for entry in entries[1:] if entry != SINK]
    prompt = {"prompt_token_ids": list(range(100, 100 + _PROMPT))}
    for line in itertools.chain(["1"], sys.stdin):  # the first answer says that it is ready
        writing.clear()
        seconds = []
        for i in range(int(line)):
            tag = tags[i % len(tags)] if kind == _MIXED else tags[0]
            parameters = SamplingParams(
                temperature=0, max_tokens=_STEPS + 4, ignore_eos=True, extra_args={"language": tag}
            )
            engine.add_request(str(i), prompt, parameters)
        while engine.has_unfinished_requests():
            start = time.perf_counter()
            engine.step()
            seconds.append(time.perf_counter() - start)
        middle = slice(2, 2 + _STEPS)  # not the prefill, and not the steps in which requests end
        answers.write(json.dumps({"steps": seconds[middle], "writing": writing[middle]}) + "\n")
        answers.flush()


if __name__ == "__main__":
    _engine(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
