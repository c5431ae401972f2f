"""Ctrl-C: finished work is kept, and the same command goes on."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from byte_llama import sentences

from la_aciq.calibration import collect
from la_aciq.profile import Profile


def test_ctrl_c_keeps_finished_languages_and_the_same_command_goes_on(model_folder, tmp_path):
    texts = tmp_path / "texts.jsonl"
    tags = ["en", "de", "sw", "th", "ko"]
    lines = [{"language": tag, "text": sentences("en", 10_000 + i)} for i, tag in enumerate(tags)]
    texts.write_text("\n".join(map(json.dumps, lines)))

    def command(output):
        return [
            *(sys.executable, "-m", "la_aciq.cli", "calibrate", "--model", model_folder, "--texts", texts),
            *("--output_dir", output, "--seqlen", "64", "--nsamples", "150", "--group_size", "10"),
        ]

    output, partial = tmp_path / "out", tmp_path / "out.partial"
    # One thread each: the test is about the signal, and other tests may be running.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command(output),
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # A shell that runs the tests in the background makes them, and what they start, ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not partial.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert f"finished languages are kept in {partial}, and the same command goes on from there" in err
    assert not output.exists()
    kept = Profile.load(partial).languages
    assert 0 < len(kept) < len(tags)

    again = subprocess.run(command(output), capture_output=True, text=True, env=environment, check=True)
    first = re.split(r"[\r\n]", again.stderr)[0]
    assert f"{150 * 64 * len(kept)}/{2 * 150 * 64 * len(tags)}" in again.stderr, first
    assert not partial.exists()
    uninterrupted = tmp_path / "uninterrupted"
    subprocess.run(command(uninterrupted), capture_output=True, env=environment, check=True)
    for name in ("profile.json", "profile.safetensors"):
        assert (output / name).read_bytes() == (uninterrupted / name).read_bytes()


def test_an_interrupted_demos_calibrations_are_taken_up_again(run, model_folder, texts_folder, tmp_path, monkeypatch):
    from la_aciq import demo

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    output = tmp_path / "out"
    argv = ["demo", "--quick", "--model", model_folder, "--texts", texts_folder, "--output_dir", output]
    with monkeypatch.context() as patch:
        patch.setattr(demo, "evaluate_configurations", interrupted)
        status, _, err = run(*argv)
    assert status == 130
    partial, unrotated = tmp_path / "out.partial", tmp_path / "out.unrotated.partial"
    assert f"finished languages are kept in {partial} and {unrotated}, and the same command goes on" in err
    assert sorted(tmp_path.iterdir()) == [partial, unrotated]
    kept = {folder: Profile.load(folder) for folder in (partial, unrotated)}
    assert [profile.languages for profile in kept.values()] == [("en", "sw", "th")] * 2

    profiles = []

    def stop(model, measured, *args, **kwargs):
        profiles.extend(measured)
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "evaluate_configurations", stop)
    monkeypatch.setattr(collect._Collector, "_measure", lambda *arguments: pytest.fail("measured again"))
    assert run(*argv)[0] == 130
    assert [profile.metadata for profile in profiles] == [profile.metadata for profile in kept.values()]


def test_ctrl_c_before_anything_is_done(run, model_folder, texts_folder, tmp_path, monkeypatch):
    import la_aciq.calibration

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(la_aciq.calibration, "calibrate", interrupted)
    status, _, err = run(
        "calibrate", "--model", model_folder, "--texts", texts_folder, "--output_dir", tmp_path / "out"
    )
    assert status == 130
    assert "interrupted; no language was finished, nothing is kept" in err
    assert list(tmp_path.iterdir()) == []
