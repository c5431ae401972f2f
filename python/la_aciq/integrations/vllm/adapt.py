"""How much of what is served is clipped, by language, and clips that follow it (`la-aciq serve --adapt`).

One step in many is a sample: every layer quantizes its input once more for the sums (`tail_sums`). Such a step runs
outside of vLLM's compiled graph. A step that a CUDA graph replays cannot be a sample: with graphs only prefills longer
than the largest graph are samples.

The engine decides when the clips move: after a number of steps, and before it schedules the next one. Every worker then
takes one step of `clipping.adapt` with its sums, and the engine counts the moves of each entry, which are part of the
prefix cache's keys. An entry moves by its own tokens alone. The entry of the sink never moves: its tokens are of all
languages.
"""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...tags import SINK
from .settings import ADAPT, sample_steps

SAMPLES = 16  # between two moves of the clips


@dataclass
class ClipMoves:
    """What an engine knows of its workers' clips.

    Attributes:
        counts: by entry, how often its clips were moved or rolled back.
        adapting: whether clips move; None until the engine's first step.
        steps: of the model since the engine started.
    """

    counts: list[int]
    adapting: bool | None = None
    steps: int = 0


# --- In the engine --------------------------------------------------------------------------------------------------


def after_step(engine: Any, config: Any) -> None:
    """Move the clips when it is time.

    Args:
        engine: vLLM's `EngineCore`, after a step of its model.
        config: the `LaAciqVllmConfig` of the model.
    """
    moves: ClipMoves = config.clip_moves
    if moves.adapting is None:
        moves.adapting = ADAPT in os.environ
        engine.model_executor.collective_rpc(_begin)
    moves.steps += 1
    if moves.adapting and moves.steps % (sample_steps() * SAMPLES) == 0:
        _count(moves, engine.model_executor.collective_rpc(_move))


def roll_back(engine: Any, config: Any) -> list[str]:
    """Restore the checkpoint's clips until the engine restarts, and return the entries that had others."""
    moves: ClipMoves = config.clip_moves
    moves.adapting = False
    moved = _count(moves, engine.model_executor.collective_rpc(_roll_back))
    return [config.entries[entry] for entry in sorted(moved)]


def report(engine: Any, config: Any) -> dict[str, list[Any]]:
    """Return by entry: [values, clipped values, moves, geometric mean of its clips over the checkpoint's]."""
    reports = engine.model_executor.collective_rpc(_report)
    totals = np.sum([totals for totals, _ in reports], axis=0)
    ratios = np.exp(np.mean([log_ratios for _, log_ratios in reports], axis=0))
    counts = config.clip_moves.counts
    return {entry: [*totals[i].tolist(), counts[i], float(ratios[i])] for i, entry in enumerate(config.entries)}


def _count(moves: ClipMoves, moved_by_worker: list[list[int]]) -> set[int]:
    entries = {entry for moved in moved_by_worker for entry in moved}
    for entry in entries:
        moves.counts[entry] += 1
    return entries


# --- In a worker ----------------------------------------------------------------------------------------------------


def _begin(worker: Any) -> None:
    """Take samples from now on."""
    from vllm.forward_context import get_forward_context

    language_ids = worker.vllm_config.quant_config.language_ids

    def leave_the_graph(*_: Any) -> None:
        if language_ids.sampling:
            get_forward_context().skip_compiled = True

    worker.get_model().register_forward_pre_hook(leave_the_graph)
    language_ids.sample_steps = sample_steps()


def _move(worker: Any) -> list[int]:
    config = worker.vllm_config.quant_config
    entries = [number for number, entry in enumerate(config.entries) if entry != SINK]
    return sorted({entry for sums in config.tail_sums for entry in sums.move(entries)})


def _roll_back(worker: Any) -> list[int]:
    return sorted({entry for sums in worker.vllm_config.quant_config.tail_sums for entry in sums.roll_back()})


def _report(worker: Any) -> tuple[Any, Any]:
    config = worker.vllm_config.quant_config
    counted = [sums for sums in config.tail_sums if worker.rank == 0 or not sums.same_input]
    zeros = np.zeros((len(config.entries), 2))
    ratios = [sums.log_ratios() for sums in config.tail_sums] or [zeros[:, 0]]
    return sum((sums.totals() for sums in counted), zeros), np.mean(ratios, axis=0)
