"""The command line: every command end to end on a tiny model, and every bad input as one sentence and a status."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from byte_llama import byte_llama, byte_tokenizer, sentences
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM

from la_aciq import cli
from la_aciq._files import check_output
from la_aciq.calibration import collect
from la_aciq.checkpoint import load_quantized
from la_aciq.evaluation import Report
from la_aciq.ops import backends
from la_aciq.profile import Profile

SMALL = ["--seqlen", "32", "--nsamples", "4", "--group_size", "10"]


@pytest.fixture
def run(capsys):
    """Run one command in this process; returns its status, stdout and stderr."""

    def run(*argv):
        status = cli.main([str(argument) for argument in argv])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def refused(run):
    """Run a command that must end with one sentence on stderr, nothing on stdout, and status 2."""

    def refused(message, *argv):
        status, out, err = run(*argv)
        lines = [line for line in re.split(r"[\r\n]+", err) if line.startswith("la-aciq")]
        assert status == 2, err
        assert out == ""
        assert len(lines) == 1, err
        assert re.search(message, lines[0]), lines[0]
        assert lines[0] == re.split(r"[\r\n]+", err.rstrip())[-1]
        assert "Traceback" not in err

    return refused


@pytest.fixture(scope="module")
def profile_folder(model_folder, texts_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "profile"
    argv = ["calibrate", "--model", model_folder, "--texts", texts_folder, "--output_dir", folder, *SMALL]
    assert cli.main([str(argument) for argument in argv]) == 0
    return folder


@pytest.fixture(scope="module")
def quantized_folder(model_folder, profile_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "int4"
    argv = ["quantize", "--model", model_folder, "--profile", profile_folder, "--output_dir", folder]
    assert cli.main([str(argument) for argument in [*argv, "--scheme", "W4A8", "--kv_bits", "4"]]) == 0
    return folder


class TestCommands:
    def test_calibrate_writes_the_profile_that_python_would_make(self, profile_folder, model_folder):
        import la_aciq

        profile = Profile.load(profile_folder)
        assert profile.rows == ("und", "en", "sw", "th", "sink")
        assert profile.metadata["tokens"] == {"en": 128, "sw": 128, "th": 128}
        texts = {tag: sentences(tag) for tag in ("en", "sw", "th")}
        expected = la_aciq.calibrate(
            byte_llama(), texts, byte_tokenizer(), seqlen=32, tokens=128, group_size=10, progress=False
        )
        assert profile.metadata == expected.metadata
        for name, site in expected.sites.items():
            assert (site.moments.state == profile.sites[name].moments.state).all()
        assert not profile_folder.with_name("profile.partial").exists()

    def test_calibrate_a_choice_of_languages_without_rotation(self, run, model_folder, texts_folder, tmp_path):
        status, out, _ = run(
            *("calibrate", "--model", model_folder, "--texts", texts_folder, "--languages", "swa,en", "--no-rotate"),
            *("--output-dir", tmp_path / "profile", *SMALL, "--ignore=lm_head,down_proj"),
        )
        assert status == 0
        assert "2 languages" in out
        profile = Profile.load(tmp_path / "profile")
        assert profile.languages == ("sw", "en")
        assert profile.metadata["rotation"] == {"enabled": False, "seed": 0}
        assert not any(name.endswith("down_proj") for name in profile.layers)

    def test_quantize_writes_a_model_that_loads_and_runs(self, quantized_folder):
        model = load_quantized(quantized_folder)
        assert model.la_aciq.config.activations == 8
        assert model.la_aciq.config.kv == 4
        assert torch.isfinite(model(torch.arange(8)[None]).logits).all()

    def test_weights_are_rounded_as_asked_for(self, run, refused, model_folder, profile_folder, texts_folder, tmp_path):
        assert (profile_folder / "second_moments.safetensors").exists()
        quantize = ("quantize", "--model", model_folder, "--scheme", "W4A16", "--output_dir")
        for asked, done in (("auto", "feedback"), ("nearest", "nearest")):
            output = tmp_path / asked
            assert run(*quantize, output, "--profile", profile_folder, "--rounding", asked)[0] == 0
            assert load_quantized(output).la_aciq.config.rounding == done
        without = tmp_path / "without"
        run(
            *("calibrate", "--model", model_folder, "--texts", texts_folder, "--output_dir", without),
            *("--no_second_moments", *SMALL),
        )
        assert not (without / "second_moments.safetensors").exists()
        asked_for = ("--profile", without, "--rounding", "feedback")
        refused("rounding = 'feedback' needs a profile with second moments", *quantize, tmp_path / "none", *asked_for)

    def test_the_card_shows_a_report(self, run, model_folder, profile_folder, quantized_folder, texts_folder, tmp_path):
        status, _, _ = run(
            *("evaluate", "--model", model_folder, "--quantized", quantized_folder, "--texts", texts_folder),
            *("--seqlen", "64", "--nsamples", "2", "--output_dir", tmp_path / "report"),
        )
        assert status == 0
        status, _, _ = run(
            *("quantize", "--model", model_folder, "--profile", profile_folder, "--scheme", "W4A8", "--kv_bits", "4"),
            *("--report", tmp_path / "report", "--output_dir", tmp_path / "int4"),
        )
        assert status == 0
        result = Report.load(tmp_path / "report" / "report.json").configurations[0].by_language["th"]
        assert f"| th | {result.reference_bpb:.3f} | {result.change:+.3f} [" in (
            tmp_path / "int4" / "README.md"
        ).read_text("utf-8")

    def test_quantize_to_compressed_tensors(self, run, model_folder, texts_folder, tmp_path):
        pytest.importorskip("compressed_tensors")
        status, _, _ = run(
            *("calibrate", "--model", model_folder, "--texts", texts_folder, "--no_rotate", "--group_size", "20"),
            *("--seqlen", "32", "--nsamples", "2", "--ignore", "lm_head,down_proj"),
            *("--output_dir", tmp_path / "profile"),
        )
        assert status == 0
        status, _, _ = run(
            *("quantize", "--model", model_folder, "--profile", tmp_path / "profile", "--scheme", "W4A16"),
            *("--codebook", "midtread", "--format", "compressed-tensors", "--output_dir", tmp_path / "ct"),
        )
        assert status == 0
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "ct")
        assert torch.isfinite(model(torch.arange(8)[None]).logits).all()
        assert (tmp_path / "ct" / "la_aciq" / "clip_table.safetensors").exists()

    def test_other_models_than_causal_ones(self, run, texts_folder, tmp_path):
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 54}
        BertForMaskedLM(BertConfig(vocab_size=256, **sizes)).save_pretrained(tmp_path / "bert")
        byte_tokenizer().save_pretrained(tmp_path / "bert")
        status, _, _ = run(
            *("calibrate", "--model", tmp_path / "bert", "--texts", texts_folder, "--output_dir", tmp_path / "profile"),
            *SMALL,
        )
        assert status == 0
        status, _, _ = run(
            *("quantize", "--model", tmp_path / "bert", "--profile", tmp_path / "profile"),
            *("--output_dir", tmp_path / "int4"),
        )
        assert status == 0
        assert type(load_quantized(tmp_path / "int4")) is BertForMaskedLM

    @pytest.mark.parametrize("what", ["profile", "quantized"])
    def test_evaluate_writes_a_report(self, run, what, model_folder, texts_folder, tmp_path, request):
        given = request.getfixturevalue(f"{what}_folder")
        status, out, _ = run(
            *("evaluate", "--model", model_folder, f"--{what}", given, "--texts", texts_folder),
            *("--seqlen", "64", "--nsamples", "2", "--output_dir", tmp_path / "report"),
        )
        assert status == 0
        report = Report.load(tmp_path / "report" / "report.json")
        assert list(report.texts) == ["en", "sw", "th"]
        assert report.texts["sw"] == {"skipped": 128, "tokens": 128}
        names = [c.name for c in report.configurations]
        assert names == ["int4"] if what == "quantized" else "W4A4 static, per language" in names
        assert all(name in out for name in names)
        for name in ("report.json", "report.md", "changes.png"):
            assert (tmp_path / "report" / name).stat().st_size > 0
            assert name in out

    def test_evaluate_one_scheme(self, run, model_folder, profile_folder, texts_folder, tmp_path):
        status, _, _ = run(
            *("evaluate", "--model", model_folder, "--profile", profile_folder, "--texts", texts_folder),
            *("--languages", "th", "--scheme", "W4A16", "--seqlen", "64", "--nsamples", "2"),
            *("--output_dir", tmp_path / "report"),
        )
        assert status == 0
        report = Report.load(tmp_path / "report" / "report.json")
        names = ["W4A16 to nearest, no centers", "W4A16 pooled", "W4A16 per language"]
        assert ([c.name for c in report.configurations], list(report.texts)) == (names, ["th"])

    def test_demo_and_report(self, run, model_folder, texts_folder, tmp_path):
        output = tmp_path / "out"
        status, out, _ = run(
            "demo", "--quick", "--model", model_folder, "--texts", texts_folder, "--output_dir", output
        )
        assert status == 0
        last = out.rstrip().split("\n")[-4:]
        assert str(output / "report.json") in "".join(last)
        assert all(str(output / name) in "".join(last) for name in ("changes.png", "clips.png", "layers.png"))
        assert Profile.load(output / "profile").languages == ("en", "sw", "th")
        report = Report.load(output / "report.json")
        configs = [c.config for c in report.configurations]
        assert {(c["weights"], c["activations"], c["kv"]) for c in configs} == {
            *((4, 16, 16), (4, 8, 16), (4, 4, 16), (16, 16, 4))
        }
        assert {c["clip"] for c in configs} == {"static", "absmax"}
        assert {c["sharing"] for c in configs} == {"language", "pooled"}
        assert {c["rotate"] for c in configs} == {True, False}
        assert report.regret
        assert report.comparisons

        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        check_output(output, "report.json", force=True)  # there is nothing in it that --force would not replace

        table = out[out.index("Change in bits") : out.index("Done in")].strip()
        (output / "changes.png").unlink()
        json_file = output / "report.json"
        json_file.write_text(json_file.read_text() + "\n")
        before = json_file.read_bytes()
        for place in (output, output / "report.json"):
            status, out, _ = run("report", place)
            assert status == 0
            assert out.startswith(table)
        assert (output / "changes.png").exists()
        assert json_file.read_bytes() == before

        # Where nothing can be written the table is printed all the same.
        (output / "report.md").unlink()
        (output / "report.md").mkdir()
        status, out, err = run("report", output)
        assert (status, out.startswith(table)) == (2, True)
        assert "Is a directory" in err

    def test_the_embedded_model_comes_in_the_dtype_asked_for(self, monkeypatch):
        from la_aciq import embedded, models

        asked = []
        monkeypatch.setattr(embedded, "_package", lambda name: Path(name))
        monkeypatch.setattr(Path, "is_file", lambda self: True)
        monkeypatch.setattr(models, "load_model", lambda name, **rest: asked.append(rest) or (byte_llama(), None))
        arguments = cli._parser().parse_args(["demo", "--device", "cpu", "--dtype", "bfloat16"])
        cli._model(arguments)
        assert asked == [{"device": "cpu", "dtype": "bfloat16"}]

    def test_bench_times_every_operation(self, run):
        status, out, _ = run("bench", "ops", "--size_mib", "1")
        assert status == 0
        for operation in ("read", "moments", "quantize", "quantize_dynamic", "dequantize", "rotate", "linear"):
            assert re.search(rf"^{operation}\b.* ms .* GB/s .*%$", out, re.MULTILINE), out
        assert re.search(r"^read \(torch\.(sum|max|dot)\) .* 100%$", out, re.MULTILINE), out

    def test_bench_times_a_layer(self, run, monkeypatch):
        monkeypatch.setattr("la_aciq.bench.layer._BYTES", 1)
        status, out, _ = run("bench", "layer", "--in_features", "128", "--out_features", "64")
        assert status == 0
        for layer in ("la_aciq W4A16", "la_aciq W4A8", "la_aciq W4A4", "la_aciq W4A4, static", "torch bfloat16"):
            assert re.search(rf"^{layer}  .* MiB( +\d+ us \( *\d+\.\dx\)){{4}}$", out, re.MULTILINE), out

    def test_info(self, run):
        status, out, _ = run("info")
        assert status == 0
        assert re.search(rf"^torch +{re.escape(torch.__version__)}$", out, re.MULTILINE)
        for backend in ("cpu", "cuda", "triton", "reference"):
            assert re.search(rf"^backend +{backend}: \w", out, re.MULTILINE)
        assert re.search(r"^threads +\d+ threads?$", out, re.MULTILINE)

    @pytest.mark.parametrize(
        ("forced", "said"),
        [
            (None, "no backend (LA_ACIQ_BACKEND is not set)"),
            ("reference", "reference (by LA_ACIQ_BACKEND)"),
            ("cpuu", "LA_ACIQ_BACKEND: expected one of reference, cpu, cuda, triton, got 'cpuu'"),
        ],
    )
    def test_info_shows_the_forced_backend(self, run, monkeypatch, forced, said):
        monkeypatch.setattr("la_aciq.ops.backends._FROM_ENVIRONMENT", forced)
        status, out, _ = run("info")
        assert status == 0
        assert re.search(rf"^forced +{re.escape(said)}$", out, re.MULTILINE), out

    @pytest.mark.parametrize(("version", "named"), [("12.2.0", "GCC 12.2.0"), ("Clang 17.0.6", "Clang 17.0.6")])
    def test_the_compiler_has_a_name(self, run, monkeypatch, version, named):
        _C = pytest.importorskip("la_aciq._C")
        monkeypatch.setattr(_C, "build_info", lambda: {"torch": "2.13.0", "compiler": version, "cuda": False})
        assert f"built with {named} for torch 2.13.0\n" in run("info")[1]

    def test_output_that_nobody_reads_to_its_end(self):
        command = [sys.executable, "-m", "la_aciq.cli", "info"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 141

    @pytest.mark.parametrize("argv", [["--help"], ["quantize", "--help"], ["--version"]])
    def test_help_and_version_exit_with_zero(self, capsys, argv):
        with pytest.raises(SystemExit) as stop:
            cli.main(argv)
        assert stop.value.code == 0
        assert "la-aciq" in capsys.readouterr().out

    def test_the_installed_command(self):
        done = subprocess.run([sys.executable, "-m", "la_aciq.cli", "info"], capture_output=True, text=True, check=True)
        assert done.stdout.startswith("la-aciq ")

    def test_an_unexpected_error_keeps_its_traceback(self, monkeypatch):
        def broken(arguments):
            raise ZeroDivisionError

        monkeypatch.setattr(cli, "_info", broken)
        with pytest.raises(ZeroDivisionError):
            cli.main(["info"])

    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            (["--group-size", "64"], ["--group_size", "64"]),
            (["--group-size=64"], ["--group_size=64"]),
            (["--output-dir=my-out=put"], ["--output_dir=my-out=put"]),
            (["--texts", "a-b", "-h"], ["--texts", "a-b", "-h"]),
        ],
    )
    def test_dashes_in_options_are_underscores(self, given, expected):
        assert cli._with_underscores(given) == expected


class TestBadInput:
    """One sentence, a non-zero status, no traceback, and nothing half-written."""

    def test_what_compressed_tensors_cannot_hold(self, refused, model_folder, profile_folder, tmp_path):
        refused(
            "needs a profile without rotation; calibrate with --no_rotate",
            *("quantize", "--model", model_folder, "--profile", profile_folder, "--format", "compressed-tensors"),
            *("--output_dir", tmp_path / "ct"),
        )

    def test_compressed_tensors_by_the_default_scheme_before_a_model_is_loaded(
        self, run, refused, model_folder, texts_folder, tmp_path, monkeypatch
    ):
        status, _, _ = run(
            *("calibrate", "--model", model_folder, "--texts", texts_folder, "--no_rotate", *SMALL),
            *("--output_dir", tmp_path / "profile"),
        )
        assert status == 0
        monkeypatch.setattr(cli, "_model", lambda *_, **__: pytest.fail("the model was loaded"))
        refused(
            "compressed-tensors needs activations = 16, got 4: use --scheme W4A16 --codebook midtread",
            *("quantize", "--model", model_folder, "--profile", tmp_path / "profile"),
            *("--format", "compressed-tensors", "--output_dir", tmp_path / "ct"),
        )
        refused(
            "compressed-tensors needs codebook = 'midtread', got 'midrise': use --scheme W4A16 --codebook midtread",
            *("quantize", "--model", model_folder, "--profile", tmp_path / "profile", "--scheme", "W4A16"),
            *("--format", "compressed-tensors", "--output_dir", tmp_path / "ct"),
        )

    @pytest.fixture
    def calibrate(self, model_folder, texts_folder, tmp_path):
        """Arguments of a calibration that would work; later ones take their place."""
        output = tmp_path / "out"
        return ["calibrate", "--model", model_folder, "--texts", texts_folder, "--output_dir", output, *SMALL]

    def test_a_missing_model_path(self, refused, calibrate, tmp_path):
        refused("model path '.*/nowhere' does not exist", *calibrate, "--model", tmp_path / "nowhere")

    def test_a_model_that_is_not_causal(self, refused, profile_folder, texts_folder, tmp_path):
        BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(tmp_path / "bert")
        refused(
            "is not a causal language model: it is BertForMaskedLM",
            *("evaluate", "--model", tmp_path / "bert", "--profile", profile_folder, "--texts", texts_folder),
            *("--output_dir", tmp_path / "out"),
        )

    @pytest.mark.parametrize("name", ["english", "xx", "12"])
    def test_a_file_named_by_something_else_than_a_tag(self, refused, calibrate, tmp_path, name):
        (tmp_path / f"{name}.txt").write_text("text")
        refused(f"{name}.txt: language tag '{name}' .*is not BCP-47", *calibrate, "--texts", tmp_path)

    def test_a_language_that_is_not_a_tag(self, refused, calibrate):
        refused("language tag 'swahili' is not BCP-47", *calibrate, "--languages", "en,swahili")

    def test_a_language_without_a_text(self, refused, calibrate):
        refused("--languages names 'ko', and .* has only en, sw, th", *calibrate, "--languages", "en,kor")

    def test_texts_that_are_nowhere(self, refused, calibrate, tmp_path):
        refused("texts '.*' not found", *calibrate, "--texts", tmp_path / "nowhere")

    def test_an_empty_text(self, refused, calibrate, tmp_path):
        (tmp_path / "sw.txt").write_text("")
        refused(r"sw\.txt: the text for 'sw' is empty", *calibrate, "--texts", tmp_path)

    def test_too_short_a_text_says_how_much_is_needed(self, refused, calibrate, tmp_path):
        (tmp_path / "sw.txt").write_text("a" * 127)
        refused("'sw' is too short: 128 tokens are needed, and it has 127", *calibrate, "--texts", tmp_path)

    def test_too_short_a_text_for_evaluation(self, refused, model_folder, profile_folder, tmp_path):
        (tmp_path / "sw.txt").write_text("a" * 200)
        argv = ["evaluate", "--model", model_folder, "--profile", profile_folder, "--texts", tmp_path]
        refused(
            "128 tokens after 128 for calibration are needed, 256 in all, and it has 200",
            *(*argv, "--seqlen", "32", "--nsamples", "4", "--output_dir", tmp_path / "out"),
        )

    def test_a_file_that_is_not_utf8(self, refused, calibrate, tmp_path):
        (tmp_path / "de.txt").write_bytes("Straße".encode("latin-1"))
        refused(r"de\.txt is not UTF-8: byte 4", *calibrate, "--texts", tmp_path)

    @pytest.mark.parametrize("command", ["quantize", "evaluate"])
    def test_a_profile_of_another_model(self, refused, command, profile_folder, texts_folder, tmp_path):
        byte_llama(seed=1).save_pretrained(tmp_path / "other")
        byte_tokenizer().save_pretrained(tmp_path / "other")
        argv = [command, "--model", tmp_path / "other", "--profile", profile_folder, "--output_dir", tmp_path / "out"]
        if command == "evaluate":
            argv += ["--texts", texts_folder, "--seqlen", "32"]
        refused("the profile was measured on another model: its fingerprint is", *argv)
        assert not (tmp_path / "out").exists()

    def test_a_quantized_model_of_another_model(self, refused, quantized_folder, texts_folder, tmp_path):
        byte_llama(seed=1).save_pretrained(tmp_path / "other")
        byte_tokenizer().save_pretrained(tmp_path / "other")
        refused(
            "the quantized model was made from another model than --model",
            *("evaluate", "--model", tmp_path / "other", "--quantized", quantized_folder, "--texts", texts_folder),
            *("--output_dir", tmp_path / "out"),
        )

    @pytest.mark.parametrize("harm", ["truncated", "edited"])
    @pytest.mark.parametrize("of", ["profile", "quantized"])
    def test_a_truncated_or_edited_safetensors_file(
        self, refused, of, harm, model_folder, texts_folder, tmp_path, request
    ):
        copy = tmp_path / "copy"
        copy.mkdir()
        for path in request.getfixturevalue(f"{of}_folder").iterdir():
            data = bytearray(path.read_bytes())
            if path.suffix == ".safetensors" and harm == "truncated":
                data = data[:-100]
            elif path.suffix == ".safetensors":
                data[-100] ^= 0x10
            (copy / path.name).write_bytes(data)
        if of == "profile":
            argv = ["quantize", "--profile", copy]
        else:
            argv = ["evaluate", "--quantized", copy, "--texts", texts_folder]
        message = "was edited or cut short"
        refused(message, *argv, "--model", model_folder, "--output_dir", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_too_few_samples_for_an_interval_before_anything_is_read(self, refused):
        argv = ["evaluate", "--model", "m", "--profile", "p", "--texts", "t", "--output_dir", "o"]
        refused(
            "--nsamples 1 --seqlen 129: an interval needs at least two segments of up to 128 predicted tokens in each "
            "language; give --nsamples 2 or --seqlen 130, or more",
            *(*argv, "--nsamples", "1", "--seqlen", "129"),
        )

    @pytest.mark.parametrize(("samples", "seqlen"), [("1", "130"), ("2", "16")])
    def test_the_fewest_samples_are_enough(
        self, run, model_folder, profile_folder, texts_folder, tmp_path, samples, seqlen
    ):
        status, _, err = run(
            *("evaluate", "--model", model_folder, "--profile", profile_folder, "--texts", texts_folder),
            *("--scheme", "W4A16", "--nsamples", samples, "--seqlen", seqlen, "--output_dir", tmp_path / "out"),
        )
        assert status == 0, err

    def test_a_backend_in_the_environment_that_cannot_be_had(self, refused, calibrate, monkeypatch):
        def forced(name):
            monkeypatch.setenv("LA_ACIQ_BACKEND", name)
            monkeypatch.setattr("la_aciq.ops.backends._FROM_ENVIRONMENT", name)
            monkeypatch.setattr("la_aciq.ops.backends._choice.backend", name)

        nowhere = ("--model", "nowhere")  # said before a model is looked for
        forced("cpuu")
        message = "LA_ACIQ_BACKEND: expected one of reference, cpu, cuda, triton, got 'cpuu'"
        refused(message, *calibrate, *nowhere)
        refused(message, "bench", "ops")
        monkeypatch.setitem(backends._WHY_NOT, "cuda", "PyTorch finds no CUDA device")
        forced("cuda")
        message = r"backend 'cuda' \(of LA_ACIQ_BACKEND\) is not available: PyTorch finds no CUDA device"
        refused(message, *calibrate, *nowhere)
        refused(message, "bench", "ops")
        # Where there is a device, the tensors of this command are not on it.
        monkeypatch.setitem(backends._WHY_NOT, "cuda", None)
        refused(r"backend 'cuda' \(of LA_ACIQ_BACKEND\) is not available: x is on cpu", "bench", "ops")

    def test_an_edited_report(self, refused, tmp_path):
        (tmp_path / "report.json").write_text('{"schema": 1}')
        refused(r"report\.json", "report", tmp_path)
        refused("cannot be read", "report", tmp_path / "nowhere")

    def test_nan_in_the_weights(self, refused, calibrate, tmp_path):
        model = byte_llama()
        model.model.layers[1].self_attn.o_proj.weight.data[2, 3] = float("nan")
        model.save_pretrained(tmp_path / "broken")
        byte_tokenizer().save_pretrained(tmp_path / "broken")
        refused(r"'model\.layers\.1\.self_attn\.o_proj\.weight' has 1 NaN", *calibrate, "--model", tmp_path / "broken")
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.partial").exists()

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["quantize", "--scheme", "W5A5"], "argument --scheme: invalid choice: 'W5A5'.*W4A16"),
            (["quantize", "--clip", "percentile"], "argument --clip: invalid choice: 'percentile'"),
            (["quantize", "--kv_bits", "3"], "argument --kv_bits: invalid choice: 3"),
            (["calibrate", "--seqlen", "1"], "argument --seqlen: '1' given, expected an integer of at least 2"),
            (["calibrate", "--nsamples", "0"], "argument --nsamples: '0' given, expected an integer of at least 1"),
            (["calibrate", "--seqlen", "many"], "argument --seqlen: 'many' given"),
            (["calibrate", "--group_size", "7"], "argument --group_size: '7' given, expected an even integer, or 0"),
            (["calibrate", "--no_such_option"], "required"),
            (["info", "--no_such_option"], r"unrecognized arguments: --no_such_option \(see la-aciq info --help\)"),
            (["bench", "ops", "--tokens", "3"], r"unrecognized arguments: --tokens 3 \(see la-aciq bench ops --help\)"),
            (["--no_such_option", "info"], r"unrecognized arguments: --no_such_option \(see la-aciq --help\)"),
            (["calibrate"], "the following arguments are required: --model, --texts, --output_dir"),
            (["dance"], "invalid choice: 'dance'"),
            ([], "the following arguments are required: COMMAND"),
            (["evaluate", "--model", "m", "--texts", "t", "--output_dir", "o"], "--profile --quantized is required"),
        ],
    )
    def test_option_values_that_do_not_exist(self, refused, argv, message):
        refused(message, *argv)

    def test_options_that_do_not_go_together(self, refused, model_folder, profile_folder, tmp_path):
        refused(
            "granularity = 'token' needs clip = 'rms' or 'absmax'",
            *("quantize", "--model", model_folder, "--profile", profile_folder, "--output_dir", tmp_path / "out"),
            *("--granularity", "token", "--clip", "static"),
        )

    @pytest.mark.parametrize("option", [["--scheme", "W4A8"], ["--codebook", "midrise"]])
    def test_options_of_a_profile_with_a_quantized_model(self, refused, option, tmp_path):
        refused(
            "--scheme and --codebook choose among a profile's configurations",
            *("evaluate", "--model", "m", "--quantized", "q", "--texts", "t", "--output_dir", tmp_path / "out"),
            *option,
        )

    def test_a_quantized_folder_as_the_model(self, refused, calibrate, quantized_folder):
        refused(
            "is quantized already; expected floating-point weights; evaluate it with --quantized",
            *(*calibrate, "--model", quantized_folder),
        )

    @pytest.mark.parametrize("command", ["calibrate", "quantize", "evaluate", "demo"])
    def test_the_working_directory_as_output_is_refused_before_any_work(
        self, refused, command, profile_folder, texts_folder, tmp_path, monkeypatch
    ):
        monkeypatch.chdir(tmp_path)
        argv = [command, "--model", tmp_path / "no-model-is-read", "--output_dir", "."]
        if command != "quantize":
            argv += ["--texts", texts_folder]
        if command in ("quantize", "evaluate"):
            argv += ["--profile", profile_folder]
        refused("'.' is or holds the working directory", *argv)

    @pytest.mark.parametrize("command", ["calibrate", "quantize", "evaluate", "demo"])
    def test_an_output_folder_that_exists_is_refused_before_any_work(
        self, refused, run, command, model_folder, profile_folder, texts_folder, tmp_path
    ):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes.txt").write_text("mine")
        argv = [command, "--model", tmp_path / "no-model-is-read", "--output_dir", tmp_path / "out"]
        if command != "quantize":
            argv += ["--texts", texts_folder]
        if command in ("quantize", "evaluate"):
            argv += ["--profile", profile_folder]
        refused("exists; choose another or pass --force", *argv)
        # Force replaces what la-aciq wrote, not what somebody else did.
        refused("did not write it and will not replace it", *argv, "--force")
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]

    def test_force_replaces_a_quantized_model_with_its_tokenizer(self, quantized_folder):
        assert (quantized_folder / "tokenizer.json").exists()
        check_output(quantized_folder, "config.json", force=True)

    def test_force_replaces_a_profile(self, run, refused, calibrate, tmp_path):
        assert run(*calibrate, "--languages", "en")[0] == 0
        before = (tmp_path / "out" / "profile.json").read_bytes()
        refused("exists", *calibrate)
        assert (tmp_path / "out" / "profile.json").read_bytes() == before
        assert run(*calibrate, "--force")[0] == 0
        assert Profile.load(tmp_path / "out").languages == ("en", "sw", "th")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_a_disk_that_cannot_be_written(self, refused, calibrate, monkeypatch, tmp_path):
        from pathlib import Path

        def full(self, data):
            raise OSError(28, "No space left on device", str(self))

        monkeypatch.setattr(Path, "write_bytes", full)
        refused("No space left on device: .*profile.safetensors", *calibrate)
        assert list(tmp_path.iterdir()) == []

    def test_a_package_that_is_missing(self, refused, calibrate, monkeypatch):
        monkeypatch.setitem(sys.modules, "transformers", None)
        refused(r"needs the package transformers; run: pip install 'la-aciq\[demo\]'", *calibrate)

    def test_in_a_process_of_its_own(self, tmp_path):
        done = subprocess.run(
            [sys.executable, "-m", "la_aciq.cli", "calibrate", "--model", tmp_path / "x", "--texts", "y"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.startswith("la-aciq: error: the following arguments are required: --output_dir")
        assert done.stderr.count("\n") == 1


class TestInterruption:
    def test_ctrl_c_keeps_finished_languages_and_the_same_command_goes_on(self, model_folder, tmp_path):
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

    def test_an_interrupted_demos_calibrations_are_taken_up_again(
        self, run, model_folder, texts_folder, tmp_path, monkeypatch
    ):
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

        def stop(model, given, *args, **kwargs):
            profiles.extend(given)
            raise KeyboardInterrupt

        monkeypatch.setattr(demo, "evaluate_configurations", stop)
        monkeypatch.setattr(collect._Collector, "_measure", lambda *arguments: pytest.fail("measured again"))
        assert run(*argv)[0] == 130
        assert [profile.metadata for profile in profiles] == [profile.metadata for profile in kept.values()]

    def test_ctrl_c_before_anything_is_done(self, run, model_folder, texts_folder, tmp_path, monkeypatch):
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


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_serving_without_vllm(refused):
    refused("serving needs vLLM", "serve", "folder", "--", "--max-model-len", "128")
