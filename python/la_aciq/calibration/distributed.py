"""Calibration by several processes of `torch.distributed`: each measures some of the languages, the first has them all.

    torchrun --nproc-per-node 4 -m la_aciq.cli calibrate --model MODEL --texts TEXTS --output_dir profile

Every process holds the model and reads every fourth language. What it measured goes to the first process, which adds
the languages up in the order of the profile's entries (`language_statistics`): the profile is bit-identical for any
number of processes. Second moments, which are as large as the model, are added up within each process first and then
over the processes: they are the same to float32 rounding.
"""

import datetime
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from ..errors import LaAciqError
from ..profile.profile import Profile
from ..profile.second_moments import Float32, SecondMoments, triangle
from .collect import Calibration, calibrate
from .language_statistics import LanguageStatistics, ProfileBuilder

# Others wait for the slowest; a process that died is noticed by its closed connections, whatever this is.
_PATIENCE = datetime.timedelta(days=1)

DEFAULTS = {
    name: value for name, value in (calibrate.__kwdefaults__ or {}).items() if name not in ("progress", "resume")
}


def calibrate_distributed(
    model: nn.Module, texts: Mapping[str, Any], tokenizer: Any = None, *, progress: bool = True, **settings: Any
) -> Profile | None:
    """`calibrate`, divided among the processes of `torch.distributed`'s default group.

    Every process calls this with the same arguments, each with a model of its own. Processes beyond the number of
    languages have nothing to do. Statistics of entries are bit-identical to those of one process where all processes
    compute alike (the same kind of device, as many threads); second moments are the same to float32 rounding.

    Args:
        model: as for `calibrate`.
        texts: as for `calibrate`.
        tokenizer: as for `calibrate`.
        progress: show a progress bar in the first process.
        settings: other keyword arguments of `calibrate`, without `resume`.

    Returns:
        The profile in the first process (rank 0), None in the others.

    Raises:
        LaAciqError: another process failed (the message names it), or the processes' models, texts or settings differ.
            A process that fails itself raises its own error.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    # Whatever the default group moves tensors of GPUs with: what is exchanged here lies in main memory.
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    try:
        try:
            calibration = Calibration(model, texts, tokenizer, **DEFAULTS | settings)
            measured = list(calibration.measured(calibration.languages[rank::world], progress and rank == 0))
        except Exception as error:
            _agree({"error": str(error) or type(error).__name__}, group)
            raise
        described = json.dumps([calibration.metadata, calibration.second_moments is None])
        _agree({"sha256": hashlib.sha256(described.encode()).hexdigest()}, group)
        builder = _gathered(calibration.languages, measured, group)
        products = _summed(calibration.second_moments, group)
        return None if builder is None else builder.profile(calibration.metadata, products)
    finally:
        dist.destroy_process_group(group)


@contextmanager
def torchrun_group() -> Iterator[int | None]:
    """The rank of a process among several that torchrun started, which form the default group within; else None."""
    if not dist.is_torchelastic_launched() or int(os.environ["WORLD_SIZE"]) == 1:
        yield None
        return
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def _agree(status: Mapping[str, str], group: Any) -> None:
    """Raises `LaAciqError` where all is well when another process failed, or did something else than the first.

    status: {"error": what went wrong}, or {"sha256": of what was measured}.
    """
    statuses = [json.loads(data) for data in _exchanged(json.dumps(status).encode(), group)]
    if "error" in status:
        return
    for rank, other in enumerate(statuses):
        if "error" in other:
            raise LaAciqError(f"process {rank} of {len(statuses)} failed: {other['error']}")
    for rank, other in enumerate(statuses):
        if other != statuses[0]:
            raise LaAciqError(
                f"process {rank} of {len(statuses)} has another model, texts or settings than process 0; "
                "expected the same"
            )


def _exchanged(data: bytes, group: Any) -> list[bytes]:
    """What every process gave, in the order of ranks."""
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, torch.tensor([len(data)]), group)
    longest = max(int(length) for length in lengths)
    padded = torch.frombuffer(bytearray(data.ljust(longest, b"\0")), dtype=torch.uint8)
    received = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(received, padded, group)
    return [data.numpy().tobytes()[: int(length)] for data, length in zip(received, lengths, strict=True)]


def _gathered(languages: tuple[str, ...], measured: list[LanguageStatistics], group: Any) -> ProfileBuilder | None:
    """In the first process the languages of all processes, added in the order of the languages; None in the others."""
    rank, world = dist.get_rank(), dist.get_world_size()
    statistics = iter(measured)
    builder = ProfileBuilder()
    for number in range(len(languages)):
        owner = number % world
        if rank == owner == 0:
            builder.add(next(statistics))
        elif rank == owner:
            data = next(statistics).to_bytes()
            dist.send(torch.tensor([len(data)]), 0, group)
            dist.send(torch.frombuffer(bytearray(data), dtype=torch.uint8), 0, group)
        elif rank == 0:
            length = torch.zeros(1, dtype=torch.int64)
            dist.recv(length, owner, group)
            received = torch.empty(int(length), dtype=torch.uint8)
            dist.recv(received, owner, group)
            builder.add(LanguageStatistics.from_bytes(received.numpy().tobytes()))
    return builder if rank == 0 else None


def _summed(matrices: dict[str, Float32] | None, group: Any) -> SecondMoments | None:
    """In the first process the sum of all processes' second moments, None in the others. It empties `matrices`."""
    if matrices is None:
        return None
    sizes = json.dumps([(site, len(matrix)) for site, matrix in matrices.items()]).encode()
    sites = dict(item for data in _exchanged(sizes, group) for item in json.loads(data))
    sums = {}
    for site, k in sites.items():
        # One site at a time: beside the matrices there is never more than one triangle here, but in the first process.
        total = torch.from_numpy(triangle(matrices.pop(site)) if site in matrices else np.zeros(k * (k + 1) // 2, "f4"))
        dist.reduce(total, 0, group=group)
        if dist.get_rank() == 0:
            sums[site] = total.numpy()
    return SecondMoments(sums) if dist.get_rank() == 0 else None
