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
    """Run `la_aciq.calibrate` divided among Ray actors.

    The entries of the profile are bit-identical to those of one process, where the workers compute as it does: the same
    kind of device, as many threads (Ray gives a worker `num_cpus` threads). Second moments agree to float32 rounding.

    Args:
        load: makes the model and its tokenizer (or None), once in each worker.
        texts: by language, as `la_aciq.calibrate` takes them.
        workers: number of actors; at most one for each language is started.
        num_cpus: Ray's CPUs for each worker.
        num_gpus: Ray's GPUs for each worker.
        settings: other keyword arguments of `la_aciq.calibrate`, except `progress` and `resume`.

    Returns:
        The profile.

    Raises:
        LaAciqError: as `la_aciq.calibrate` does, or workers is less than 1.
    """
    if workers < 1:
        raise LaAciqError(f"workers = {workers}; expected at least 1")
    workers = min(workers, max(len(texts), 1))
    context = ray.data.DataContext.get_current()
    ordered, context.execution_options.preserve_order = context.execution_options.preserve_order, True
    try:
        records = (
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
        return _profile(records)
    finally:
        context.execution_options.preserve_order = ordered


class _Worker:
    """An actor that measures a share of the languages and yields records {"kind", "name", "data"}."""

    def __init__(self, load: Callable[[], tuple[Any, Any]], texts: Any, workers: int, settings: dict[str, Any]) -> None:
        self._load, self._texts, self._workers, self._settings = load, ray.get(texts), workers, settings

    def __call__(self, record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        share = int(record["share"])
        try:
            model, tokenizer = self._load()
            calibration = Calibration(model, self._texts, tokenizer, **DEFAULTS | self._settings)
            for statistics in calibration.measured(calibration.languages[share :: self._workers], progress=False):
                yield _record("language", statistics.tag, statistics.to_bytes())
            # After measuring, which finds the layouts of the layers' inputs.
            yield _record("metadata", "", json.dumps(calibration.metadata).encode())
        except LaAciqError as error:
            yield _record("error", "", str(error).encode())
            return
        if calibration.second_moments is None:
            return
        for site in list(calibration.second_moments):
            yield _record("second moments", site, triangle(calibration.second_moments.pop(site)).tobytes())


def _record(kind: str, name: str, data: bytes) -> dict[str, Any]:
    return {"kind": kind, "name": name, "data": data}


def _profile(records: Iterator[Mapping[str, Any]]) -> Profile:
    """Make the profile of the workers' records."""
    metadata: dict[str, Any] | None = None
    measured: dict[str, bytes] = {}
    sums: dict[str, Float32] = {}
    for record in records:
        kind, name, data = record["kind"], record["name"], record["data"]
        if kind == "error":
            raise LaAciqError(data.decode())
        if kind == "metadata":
            of_worker = json.loads(data)
            if metadata is not None and of_worker != metadata:
                raise LaAciqError("workers loaded different models; expected the same in all of them")
            metadata = of_worker
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
