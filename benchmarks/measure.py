"""Timing: what is compared takes turns, so that a noisy machine hits all of it alike.

A case is an operation on given inputs with its contenders: la_aciq, its peers, and the limits. Each round runs every
contender once, in an order that moves on by one, and the result file keeps the seconds of every round; ratios are taken
within a round. pytest-benchmark drives the rounds (`-k` selects cases).
"""

import time
from collections.abc import Callable
from importlib import import_module
from types import ModuleType

QUICK = False  # `python -m benchmarks --quick`: small inputs and few rounds, to see that everything runs
MIN_SAMPLE_S = 1e-3  # a sample repeats what is shorter
SLOW_S = 0.3  # what takes longer runs in the first rounds only
MIN_ROUNDS, MAX_ROUNDS = 5, 31
BUDGET_S = 1.5  # of a case, when it does not need more for MIN_ROUNDS

Contenders = dict[str, Callable[[], object]]


def optional(name: str) -> ModuleType | None:
    """A peer's module where it is installed and loads."""
    try:
        return import_module(name)
    except Exception as error:
        print(f"without {name}: {error}")
        return None


def repeats_of(function: Callable[[], object]) -> tuple[int, float]:
    """After a warm-up: how often a sample repeats it, and how long a sample takes."""
    function()
    seconds = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        function()
        seconds = min(seconds, max(time.perf_counter() - start, 1e-7))
        if seconds >= MIN_SAMPLE_S:
            break
    repeats = max(1, min(2000, round(MIN_SAMPLE_S / seconds)))
    return repeats, seconds * repeats


def compare(benchmark, contenders: Contenders, *, suite: str = "streaming", **case: object) -> None:
    """Times the contenders in rounds and keeps {"suite", **case, "times_s": {name: seconds per round}}."""
    repeats, expected = {}, {}
    for name, function in contenders.items():
        repeats[name], expected[name] = repeats_of(function)
    usual = sum(seconds for seconds in expected.values() if seconds < SLOW_S)
    rounds = 2 if QUICK else max(MIN_ROUNDS, min(MAX_ROUNDS, int(BUDGET_S / max(usual, 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    turn = 0

    def one_round() -> None:
        nonlocal turn
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if turn >= (1 if QUICK else 3) and expected[name] >= SLOW_S:
                continue
            function, count = contenders[name], repeats[name]
            start = time.perf_counter()
            for _ in range(count):
                function()
            times[name].append(float(f"{(time.perf_counter() - start) / count:.4g}"))
        turn += 1

    benchmark.pedantic(one_round, rounds=rounds)
    benchmark.extra_info["case"] = {"suite": suite, **case, "times_s": times}
