"""What it costs a decoding step that each request has a language of its own.

Two engines of the same model take turns: one as it is served, its requests in different languages; and one whose tables
were reduced to the row of one language when it was loaded, so that nothing is written per step and nothing looked up
per token. Each is a process of its own, which this module is when it is run: `python -m la_aciq.bench.data_plane`.
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

from ..integrations.vllm.serve import ENVIRONMENT

_PROMPT = 32  # tokens
_STEPS = 24  # timed in one round
_MIXED, _FIXED = "mixed", "fixed"


def measure(folder: str, *, batches: Sequence[int] = (1, 8), rounds: int = 12, dtype: str = "auto") -> dict[str, Any]:
    """Decode with both engines in turns, for each number of requests at a time.

    Returns JSON types: per number of requests the median step of each engine in ms, the median over the rounds of how
    much longer the first engine's median step is, as a share of the second's, with the quartiles of that, and the share
    of its step that the first one spends on writing rows.
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
        found = []
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
            found.append(
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
        return {"rounds": rounds, "steps": _STEPS, "batches": found}
    finally:
        for engine in engines.values():
            engine.kill()
            engine.wait()


def table(cost: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        "| requests at a time | step, ms | step with one fixed language, ms | cost | writing rows |",
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


def _reduce_to_one_row(row: int) -> None:
    """Make this process's vLLM load tables of one row, and look nothing up."""
    from ..integrations.vllm.method import LanguageLinearMethod
    from ..integrations.vllm.rows import ServedRows

    load = LanguageLinearMethod.process_weights_after_loading

    def load_one_row(self: Any, layer: Any) -> None:
        load(self, layer)
        made = layer.quantized
        for name in ("clip", "center"):
            if getattr(made, name) is not None:
                setattr(made, name, getattr(made, name)[row : row + 1].clone())
        if made.bias is not None and made.bias.ndim == 2:
            made.bias = made.bias[row].clone()

    changed: Any = LanguageLinearMethod, ServedRows
    changed[0].process_weights_after_loading = load_one_row
    changed[1].begin = lambda *_: None
    changed[1].ids_for = lambda *_: None


def _engine(folder: str, dtype: str, most: int, kind: str) -> None:
    """Answer each number of requests on standard input with the seconds of steps that decode them."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    if kind == _FIXED:
        _reduce_to_one_row(1)
    from vllm import LLM, SamplingParams

    from ..integrations.vllm.rows import ServedRows
    from ..tags import SINK

    writing: list[float] = []
    begin = ServedRows.begin

    def timed(*arguments: Any) -> None:
        start = time.perf_counter()
        begin(*arguments)
        writing.append(time.perf_counter() - start)

    changed: Any = ServedRows
    changed.begin = timed
    llm = LLM(folder, dtype=dtype, max_model_len=256, max_num_seqs=most, enable_prefix_caching=False)
    engine: Any = llm.llm_engine
    rows = engine.vllm_config.quant_config.done.state.entries
    tags = [tag for tag in rows[1:] if tag != SINK]
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
