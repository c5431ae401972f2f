"""Every command end to end, on a tiny model."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from byte_llama import byte_llama, byte_tokenizer, sentences
from small_calibration import SMALL
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM

from la_aciq import cli
from la_aciq._files import check_output
from la_aciq.checkpoint import load_quantized
from la_aciq.cli.arguments import with_underscores
from la_aciq.cli.inputs import load_model
from la_aciq.evaluation import Report
from la_aciq.profile import Profile


def test_calibrate_writes_the_profile_that_python_would_make(profile_folder, model_folder):
    import la_aciq

    profile = Profile.load(profile_folder)
    assert profile.entries == ("und", "en", "sw", "th", "sink")
    assert profile.metadata["tokens"] == {"en": 128, "sw": 128, "th": 128}
    texts = {tag: sentences(tag) for tag in ("en", "sw", "th")}
    expected = la_aciq.calibrate(
        byte_llama(), texts, byte_tokenizer(), seqlen=32, tokens=128, group_size=10, progress=False
    )
    assert profile.metadata == expected.metadata
    for name, site in expected.sites.items():
        assert (site.moments.state == profile.sites[name].moments.state).all()
    assert not profile_folder.with_name("profile.partial").exists()


def test_calibrate_a_choice_of_languages_without_rotation(run, model_folder, texts_folder, tmp_path):
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


def test_quantize_writes_a_model_that_loads_and_runs(quantized_folder):
    model = load_quantized(quantized_folder)
    assert model.la_aciq.config.activations == 8
    assert model.la_aciq.config.kv == 4
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()


def test_weights_are_rounded_as_asked_for(run, refused, model_folder, profile_folder, texts_folder, tmp_path):
    assert (profile_folder / "second_moments.safetensors").exists()
    quantize = ("quantize", "--model", model_folder, "--scheme", "W4A16", "--output_dir")
    for asked, rounding in (("auto", "feedback"), ("nearest", "nearest")):
        output = tmp_path / asked
        assert run(*quantize, output, "--profile", profile_folder, "--rounding", asked)[0] == 0
        assert load_quantized(output).la_aciq.config.rounding == rounding
    without = tmp_path / "without"
    run(
        *("calibrate", "--model", model_folder, "--texts", texts_folder, "--output_dir", without),
        *("--no_second_moments", *SMALL),
    )
    assert not (without / "second_moments.safetensors").exists()
    asked_for = ("--profile", without, "--rounding", "feedback")
    refused("rounding = 'feedback' needs a profile with second moments", *quantize, tmp_path / "none", *asked_for)


def test_the_card_shows_a_report(run, model_folder, profile_folder, quantized_folder, texts_folder, tmp_path):
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
    assert f"| th | {result.reference_bpb:.3f} | {result.change:+.3f} [" in (tmp_path / "int4" / "README.md").read_text(
        "utf-8"
    )


def test_quantize_to_compressed_tensors(run, model_folder, texts_folder, tmp_path):
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


def test_other_models_than_causal_ones(run, texts_folder, tmp_path):
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


@pytest.mark.parametrize("kind", ["profile", "quantized"])
def test_evaluate_writes_a_report(run, kind, model_folder, texts_folder, tmp_path, request):
    folder = request.getfixturevalue(f"{kind}_folder")
    status, out, _ = run(
        *("evaluate", "--model", model_folder, f"--{kind}", folder, "--texts", texts_folder),
        *("--seqlen", "64", "--nsamples", "2", "--output_dir", tmp_path / "report"),
    )
    assert status == 0
    report = Report.load(tmp_path / "report" / "report.json")
    assert list(report.texts) == ["en", "sw", "th"]
    assert report.texts["sw"] == {"skipped": 128, "tokens": 128}
    names = [c.name for c in report.configurations]
    assert names == ["int4"] if kind == "quantized" else "W4A4 static, per language" in names
    assert all(name in out for name in names)
    for name in ("report.json", "report.md", "changes.png"):
        assert (tmp_path / "report" / name).stat().st_size > 0
        assert name in out


@pytest.mark.parametrize(
    ("options", "objective", "weights", "penalty"),
    [
        ([], "mean", None, 1),
        (["--language_objective", "minimax"], "minimax", None, 1),
        (["--language-objective", "weighted", "--language-weights", "eng=1,sw=3,th=0.5"], "weighted", (1, 3, 0.5), 1),
        (["--language_objective", "variance", "--language_penalty", "2.5"], "variance", None, 2.5),
    ],
)
def test_the_languages_objective(run, model_folder, profile_folder, tmp_path, options, objective, weights, penalty):
    status, _, err = run(
        *("quantize", "--model", model_folder, "--profile", profile_folder, "--clip", "static", "--sharing", "pooled"),
        *(*options, "--output_dir", tmp_path / "int4"),
    )
    assert status == 0, err
    config = load_quantized(tmp_path / "int4").la_aciq.config
    assert (config.language_objective, config.language_penalty) == (objective, penalty)
    assert config.language_weights == (None if weights is None else dict(zip(("en", "sw", "th"), weights, strict=True)))


def test_evaluate_one_scheme(run, model_folder, profile_folder, texts_folder, tmp_path):
    status, _, _ = run(
        *("evaluate", "--model", model_folder, "--profile", profile_folder, "--texts", texts_folder),
        *("--languages", "th", "--scheme", "W4A16", "--seqlen", "64", "--nsamples", "2"),
        *("--output_dir", tmp_path / "report"),
    )
    assert status == 0
    report = Report.load(tmp_path / "report" / "report.json")
    names = ["W4A16 to nearest, no centers", "W4A16 pooled", "W4A16 per language"]
    assert ([c.name for c in report.configurations], list(report.texts)) == (names, ["th"])


def test_demo_and_report(run, model_folder, texts_folder, tmp_path):
    output = tmp_path / "out"
    status, out, _ = run("demo", "--quick", "--model", model_folder, "--texts", texts_folder, "--output_dir", output)
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


def test_the_embedded_model_comes_in_the_dtype_asked_for(monkeypatch):
    from la_aciq import embedded, models

    asked = []
    monkeypatch.setattr(embedded, "_package", lambda name: Path(name))
    monkeypatch.setattr(Path, "is_file", lambda self: True)
    monkeypatch.setattr(models, "load_model", lambda name, **rest: asked.append(rest) or (byte_llama(), None))
    arguments = cli.parser().parse_args(["demo", "--device", "cpu", "--dtype", "bfloat16"])
    load_model(arguments)
    assert asked == [{"device": "cpu", "dtype": "bfloat16"}]


def test_bench_times_every_operation(run):
    status, out, _ = run("bench", "ops", "--size_mib", "1")
    assert status == 0
    for operation in ("read", "moments", "quantize", "quantize_dynamic", "dequantize", "rotate", "linear"):
        assert re.search(rf"^{operation}\b.* ms .* GB/s .*%$", out, re.MULTILINE), out
    assert re.search(r"^read \(torch\.(sum|max|dot)\) .* 100%$", out, re.MULTILINE), out


def test_bench_times_a_layer(run, monkeypatch):
    monkeypatch.setattr("la_aciq.bench.layer._BYTES", 1)
    status, out, _ = run("bench", "layer", "--in_features", "128", "--out_features", "64")
    assert status == 0
    for layer in ("la_aciq W4A16", "la_aciq W4A8", "la_aciq W4A4", "la_aciq W4A4, static", "torch bfloat16"):
        assert re.search(rf"^{layer}  .* MiB( +\d+ us \( *\d+\.\dx\)){{4}}$", out, re.MULTILINE), out


def test_info(run):
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
def test_info_shows_the_forced_backend(run, monkeypatch, forced, said):
    monkeypatch.setattr("la_aciq.ops.backends._FROM_ENVIRONMENT", forced)
    status, out, _ = run("info")
    assert status == 0
    assert re.search(rf"^forced +{re.escape(said)}$", out, re.MULTILINE), out


@pytest.mark.parametrize(("version", "named"), [("12.2.0", "GCC 12.2.0"), ("Clang 17.0.6", "Clang 17.0.6")])
def test_the_compiler_has_a_name(run, monkeypatch, version, named):
    _C = pytest.importorskip("la_aciq._C")
    monkeypatch.setattr(_C, "build_info", lambda: {"torch": "2.13.0", "compiler": version, "cuda": False})
    assert f"built with {named} for torch 2.13.0\n" in run("info")[1]


def test_output_that_nobody_reads_to_its_end():
    command = [sys.executable, "-m", "la_aciq.cli", "info"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141


@pytest.mark.parametrize("argv", [["--help"], ["quantize", "--help"], ["--version"]])
def test_help_and_version_exit_with_zero(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 0
    assert "la-aciq" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command", [["calibrate"], ["quantize"], ["evaluate"], ["bench", "serve"], ["demo"], ["serve"]]
)
def test_help_describes_the_command_and_its_defaults(capsys, command):
    with pytest.raises(SystemExit):
        cli.main([*command, "--help"])
    usage, description, options = capsys.readouterr().out.split("\n\n", 2)
    assert usage.startswith(f"usage: la-aciq {' '.join(command)} ")
    assert re.fullmatch(r"[A-Z].*\.", " ".join(description.split()))
    options = " ".join(options.split())
    assert "(default: )" not in options
    seed = re.search(r"--seed SEED .*?\(default: (\d+)\)", options)
    assert (seed is not None) == ("--seed" in options)
    assert seed is None or seed[1] == "0"


def test_the_installed_command():
    command = [sys.executable, "-m", "la_aciq.cli", "info"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert output.startswith("la-aciq ")


def test_an_unexpected_error_keeps_its_traceback(monkeypatch):
    def broken(arguments):
        raise ZeroDivisionError

    monkeypatch.setattr("la_aciq.cli.info.run", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["info"])


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--group-size", "64"], ["--group_size", "64"]),
        (["--group-size=64"], ["--group_size=64"]),
        (["--output-dir=my-out=put"], ["--output_dir=my-out=put"]),
        (["--texts", "a-b", "-h"], ["--texts", "a-b", "-h"]),
    ],
)
def test_dashes_in_options_are_underscores(argv, expected):
    assert with_underscores(argv) == expected
