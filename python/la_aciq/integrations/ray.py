"""Calibration as a Ray Data job, for texts and models on many machines (extra `ray`).

    import functools, la_aciq
    from la_aciq.integrations import ray as la_aciq_ray

    load = functools.partial(la_aciq.models.load_model, "MODEL", device="cuda", causal=False)
    profile = la_aciq_ray.calibrate(load, texts, workers=8, num_gpus=1)

Each worker holds the model and measures every eighth language, as a process of torchrun does
(`la_aciq.calibration.distributed`); the driver needs neither model nor GPU.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import ray
import ray.data

from ..calibration.collect import Calibration
from ..calibration.distributed import DEFAULTS
from ..calibration.language_statistics import LanguageStatistics, ProfileBuilder
from ..errors import LaAciqError
from ..profile.profile import Profile
from ..profile.second_moments import Float32, SecondMoments, triangle


def calibrate(
    load: Callable[[], tuple[Any, Any]],
    texts: Mapping[str, Any],
    *,
    workers: int,
    num_cpus: float = 1,
    num_gpus: float = 0,
    **settings: Any,
) -> Profile:
    """`la_aciq.calibrate` divided among Ray actors.

    load: makes the model and its tokenizer (or None), once in each worker. texts: as `la_aciq.calibrate` takes them.
    workers: how many; more than languages are not started. num_cpus, num_gpus: Ray's resources of each. settings:
    other keyword arguments of `la_aciq.calibrate`, but for `progress` and `resume`.

    Rows of the profile are those of one process bit for bit, where the workers compute as it does (the same kind of
    device, as many threads; Ray gives a worker `num_cpus` of them); second moments to float32 rounding. Raises
    `LaAciqError` as `la_aciq.calibrate` does.
    """
    if workers < 1:
        raise LaAciqError(f"workers = {workers}; expected at least 1")
    workers = min(workers, max(len(texts), 1))
    context = ray.data.DataContext.get_current()
    ordered, context.execution_options.preserve_order = context.execution_options.preserve_order, True
    try:
        rows = (
            ray.data.from_items([{"share": share} for share in range(workers)], override_num_blocks=workers)
            .flat_map(
                _Worker,
                fn_constructor_args=(load, ray.put(dict(texts)), workers, settings),
                compute=ray.data.ActorPoolStrategy(size=workers),
                num_cpus=num_cpus,
                num_gpus=num_gpus,
            )
            .iter_rows()
        )
        return _profile(rows)
    finally:
        context.execution_options.preserve_order = ordered


class _Worker:
    """An actor: what it measured of a share of the languages, in rows {"kind", "name", "data"}."""

    def __init__(self, load: Callable[[], tuple[Any, Any]], texts: Any, workers: int, settings: dict[str, Any]) -> None:
        self._load, self._texts, self._workers, self._settings = load, ray.get(texts), workers, settings

    def __call__(self, row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        share = int(row["share"])
        try:
            model, tokenizer = self._load()
            calibration = Calibration(model, self._texts, tokenizer, **DEFAULTS | self._settings)
            yield _row("metadata", "", json.dumps(calibration.metadata).encode())
            for statistics in calibration.measured(calibration.languages[share :: self._workers], progress=False):
                yield _row("language", statistics.tag, statistics.to_bytes())
        except LaAciqError as error:
            yield _row("error", "", str(error).encode())
            return
        if calibration.second_moments is None:
            return
        for site in list(calibration.second_moments):
            yield _row("second moments", site, triangle(calibration.second_moments.pop(site)).tobytes())


def _row(kind: str, name: str, data: bytes) -> dict[str, Any]:
    return {"kind": kind, "name": name, "data": data}


def _profile(rows: Iterator[Mapping[str, Any]]) -> Profile:
    """The profile of what the workers measured."""
    metadata: dict[str, Any] | None = None
    measured: dict[str, bytes] = {}
    sums: dict[str, Float32] = {}
    for row in rows:
        kind, name, data = row["kind"], row["name"], row["data"]
        if kind == "error":
            raise LaAciqError(data.decode())
        if kind == "metadata":
            own = json.loads(data)
            if metadata is not None and own != metadata:
                raise LaAciqError("workers loaded different models; expected the same in all of them")
            metadata = own
        elif kind == "language":
            measured[name] = data
        else:
            products = np.frombuffer(data, dtype=np.float32)
            sums[name] = sums[name] + products if name in sums else products
    assert metadata is not None  # each worker gives one, or an error
    builder = ProfileBuilder()
    for tag in metadata["tokens"]:
        builder.add(LanguageStatistics.from_bytes(measured.pop(tag)))
    return builder.profile(metadata, SecondMoments(sums) if sums else None)
