"""Calibration by several processes: one result, whatever their number."""

import multiprocessing
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from byte_llama import byte_llama, byte_tokenizer, sentences

import la_aciq
from la_aciq.calibration import calibrate_distributed
from la_aciq.calibration.collect import Calibration, _Collector
from la_aciq.calibration.distributed import DEFAULTS
from la_aciq.calibration.language_statistics import LanguageStatistics, ProfileBuilder
from la_aciq.profile import Profile

TEXTS = {tag: sentences(tag) for tag in ("en", "sw", "th")}
KILLED = 9
SETTINGS = {"seqlen": 64, "tokens": 192, "group_size": 16, "progress": False}


def process(rank, world, folder, changes):
    """One of `world`: saves the profile where it gets one, writes down its error otherwise."""
    torch.set_num_threads(1)  # a forked process has none of its parent's others
    changes(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        profile = calibrate_distributed(byte_llama(), TEXTS, byte_tokenizer(), **SETTINGS)
        assert (profile is None) == (rank > 0)
        if profile is not None:
            profile.save(folder / "profile")
    except Exception as error:
        (folder / f"error-{rank}").write_text(f"{type(error).__name__}: {error}")
    dist.destroy_process_group()


def run(world, folder, changes=lambda rank: None):
    folder.mkdir()
    start = multiprocessing.get_context("fork").Process
    processes = [start(target=process, args=(rank, world, folder, changes)) for rank in range(world)]
    for one in processes:
        one.start()
    for one in processes:
        one.join(120)
    assert [one.exitcode for one in processes] in ([0] * world, [0, KILLED])
    return folder / "profile"


def errors(folder):
    return {path.name: path.read_text() for path in folder.glob("error-*")}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of `calibrate` in one process, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        profile = la_aciq.calibrate(byte_llama(), TEXTS, byte_tokenizer(), **SETTINGS)
    finally:
        torch.set_num_threads(threads)
    folder = tmp_path_factory.mktemp("alone") / "profile"
    profile.save(folder)
    return folder


def check_same(found, alone):
    """All but second moments bit for bit; those to float32 rounding of sums of some hundred products."""
    assert (found / "profile.safetensors").read_bytes() == (alone / "profile.safetensors").read_bytes()
    merged, single = Profile.load(found), Profile.load(alone)
    assert (merged.entries, merged.layers, merged.metadata) == (single.entries, single.layers, single.metadata)
    assert list(merged.sites) == list(single.sites)
    assert list(merged.second_moments) == list(single.second_moments)
    for site, matrix in single.second_moments.items():
        scale = np.sqrt(np.outer(matrix.diagonal(), matrix.diagonal()))
        assert np.all(np.abs(merged.second_moments[site] - matrix) <= 1e-6 * scale)


@pytest.mark.parametrize("world", [1, 2, 4])  # of three languages: one process of four has none
def test_the_result_does_not_depend_on_the_number_of_processes(alone, tmp_path, world):
    check_same(run(world, tmp_path / "run"), alone)


def test_torchrun(alone, model_folder, texts_folder, tmp_path):
    """The command as it is documented."""
    output = tmp_path / "profile"
    command = ["calibrate", "--model", model_folder, "--texts", texts_folder, "--output_dir", output]
    options = ["--seqlen", "64", "--nsamples", "3", "--group_size", "16"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"),
            *("-m", "la_aciq.cli", *map(str, command), *options),
        ],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Profile of 3 languages and 12 sites") == 1
    check_same(output, alone)
    assert [path.name for path in tmp_path.iterdir()] == ["profile"]


def test_one_failure_fails_all_with_its_error_and_leaves_nothing(tmp_path):
    def overflow_in_second(rank):
        measure = _Collector._measure

        def broken(self, site, kind, group_size, values, x):
            measure(self, site, kind, group_size, values * torch.inf, x)

        if rank == 1:
            _Collector._measure = broken

    folder = run(3, tmp_path / "run", overflow_in_second).parent
    found = errors(folder)
    reason = "the input of layer 'model.layers.0.self_attn.q_proj' has"
    assert found["error-1"].startswith(f"LaAciqError: {reason}")
    for rank in (0, 2):
        assert found[f"error-{rank}"].startswith(f"LaAciqError: process 1 of 3 failed: {reason}")
    assert not (folder / "profile").exists()


def test_a_process_that_dies_ends_the_others(tmp_path):
    def die_in_second(rank):
        if rank == 1:
            _Collector._measure = lambda *arguments: os._exit(KILLED)

    folder = run(2, tmp_path / "run", die_in_second).parent
    assert errors(folder)["error-0"].startswith("RuntimeError")
    assert not (folder / "profile").exists()


@pytest.mark.parametrize(
    "changed", [{"seed": 1}, {"seqlen": 48}, {"second_moments": False}, {"texts": {**TEXTS, "sw": sentences("en")}}]
)
def test_processes_that_do_not_measure_the_same_are_refused(tmp_path, changed):
    def differ(rank):
        if rank == 1:
            TEXTS.update(changed.get("texts", {}))
            SETTINGS.update({name: value for name, value in changed.items() if name != "texts"})

    folder = run(2, tmp_path / "run", differ).parent
    expected = "LaAciqError: process 1 of 2 has another model, texts or settings than process 0; expected the same"
    assert errors(folder) == {"error-0": expected, "error-1": expected}
    assert not (folder / "profile").exists()


def test_a_part_survives_the_way_to_another_process():
    ids = {"en": np.arange(200) % 256, "sw": np.arange(200) * 3 % 256}
    calibration = Calibration(byte_llama(), ids, None, **DEFAULTS | {"seqlen": 24, "tokens": 60, "group_size": 16})
    here, there = ProfileBuilder(), ProfileBuilder()
    for statistics in calibration.measured(calibration.languages, progress=False):
        here.add(statistics)
        there.add(LanguageStatistics.from_bytes(statistics.to_bytes()))
    one, other = calibration.profile(here), calibration.profile(there)
    assert (one.entries, one.layers, one.metadata) == (other.entries, other.layers, other.metadata)
    assert list(one.sites) == list(other.sites)
    for name, site in one.sites.items():
        assert np.array_equal(site.moments.state, other.sites[name].moments.state)
        assert np.array_equal(site.histogram, other.sites[name].histogram)
        assert site.kind != "input" or np.array_equal(one.centers[name], other.centers[name])
