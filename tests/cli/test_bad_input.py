"""Bad input: one sentence, a non-zero status, no traceback, and nothing half-written."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from byte_llama import byte_llama, byte_tokenizer, sentences
from small_calibration import SMALL
from transformers import BertConfig

from la_aciq._files import check_output
from la_aciq.ops import backends
from la_aciq.profile import Profile


def test_what_compressed_tensors_cannot_hold(refused, model_folder, profile_folder, tmp_path):
    refused(
        "needs a profile without rotation; calibrate with --no_rotate",
        *("quantize", "--model", model_folder, "--profile", profile_folder, "--format", "compressed-tensors"),
        *("--output_dir", tmp_path / "ct"),
    )


def test_compressed_tensors_by_the_default_scheme_before_a_model_is_loaded(
    run, refused, model_folder, texts_folder, tmp_path, monkeypatch
):
    status, _, _ = run(
        *("calibrate", "--model", model_folder, "--texts", texts_folder, "--no_rotate", *SMALL),
        *("--output_dir", tmp_path / "profile"),
    )
    assert status == 0
    monkeypatch.setattr("la_aciq.cli.quantize.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
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
def calibrate(model_folder, texts_folder, tmp_path):
    """Arguments of a calibration that would work; later ones take their place."""
    output = tmp_path / "out"
    return ["calibrate", "--model", model_folder, "--texts", texts_folder, "--output_dir", output, *SMALL]


def test_a_missing_model_path(refused, calibrate, tmp_path):
    refused("model path '.*/nowhere' does not exist", *calibrate, "--model", tmp_path / "nowhere")


def test_a_model_that_is_not_causal(refused, profile_folder, texts_folder, tmp_path):
    BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(tmp_path / "bert")
    refused(
        "is not a causal language model: it is BertForMaskedLM",
        *("evaluate", "--model", tmp_path / "bert", "--profile", profile_folder, "--texts", texts_folder),
        *("--output_dir", tmp_path / "out"),
    )


@pytest.mark.parametrize("name", ["english", "xx", "12"])
def test_a_file_named_by_something_else_than_a_tag(refused, calibrate, tmp_path, name):
    (tmp_path / f"{name}.txt").write_text("text")
    refused(f"{name}.txt: language tag '{name}' .*is not BCP-47", *calibrate, "--texts", tmp_path)


def test_a_language_that_is_not_a_tag(refused, calibrate):
    refused("language tag 'swahili' is not BCP-47", *calibrate, "--languages", "en,swahili")


def test_a_language_without_a_text(refused, calibrate):
    refused("--languages names 'ko', and .* has only en, sw, th", *calibrate, "--languages", "en,kor")


def test_texts_that_are_nowhere(refused, calibrate, tmp_path):
    refused("texts '.*' not found", *calibrate, "--texts", tmp_path / "nowhere")


def test_an_empty_text(refused, calibrate, tmp_path):
    (tmp_path / "sw.txt").write_text("")
    refused(r"sw\.txt: the text for 'sw' is empty", *calibrate, "--texts", tmp_path)


def test_too_short_a_text_says_how_much_is_needed(refused, calibrate, tmp_path):
    (tmp_path / "sw.txt").write_text("a" * 127)
    refused("'sw' is too short: 128 tokens are needed, and it has 127", *calibrate, "--texts", tmp_path)


def test_too_short_a_text_for_evaluation(refused, model_folder, profile_folder, tmp_path):
    (tmp_path / "sw.txt").write_text("a" * 200)
    argv = ["evaluate", "--model", model_folder, "--profile", profile_folder, "--texts", tmp_path]
    refused(
        "128 tokens after 128 for calibration are needed, 256 in all, and it has 200",
        *(*argv, "--seqlen", "32", "--nsamples", "4", "--output_dir", tmp_path / "out"),
    )


@pytest.mark.parametrize("command", ["calibrate", "evaluate", "demo"])
def test_half_of_a_character_in_a_text(refused, command, model_folder, profile_folder, tmp_path):
    texts = tmp_path / "texts.jsonl"
    lines = [{"language": "en", "text": sentences("en")}, {"language": "sw", "text": "a \ud83d " + sentences("sw")}]
    texts.write_text("\n".join(map(json.dumps, lines)))
    argv = [command, "--model", model_folder, "--texts", texts, "--output_dir", tmp_path / "out"]
    if command == "evaluate":
        argv += ["--profile", profile_folder]
    refused(r"texts\.jsonl line 2: the text for 'sw' has a lone surrogate, U\+D83D, as character 2", *argv)
    assert [path.name for path in tmp_path.iterdir()] == ["texts.jsonl"]


def test_few_tokens_of_characters_of_several_bytes(refused, model_folder, profile_folder, texts_folder, tmp_path):
    refused(
        "tokens = 4: an interval needs at least two segments .* and the text for 'th' has [01] in which the tokens add",
        *("evaluate", "--model", model_folder, "--profile", profile_folder, "--texts", texts_folder),
        *("--languages", "th", "--nsamples", "2", "--seqlen", "2", "--output_dir", tmp_path / "out"),
    )


def test_the_demos_held_out_text_is_checked_before_it_calibrates(run, model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("la_aciq.demo.calibrate", lambda *_, **__: pytest.fail("calibrated"))
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "en.txt").write_text(sentences("en")[:400])  # enough to calibrate on
    status, _, err = run("demo", "--quick", "--model", model_folder, "--texts", texts, "--output_dir", tmp_path / "out")
    assert status == 2
    assert "'en' is too short: 256 tokens after 256 for calibration are needed, 512 in all, and it has 400" in err
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]


def test_a_file_that_is_not_utf8(refused, calibrate, tmp_path):
    (tmp_path / "de.txt").write_bytes("Straße".encode("latin-1"))
    refused(r"de\.txt is not UTF-8: byte 4", *calibrate, "--texts", tmp_path)


@pytest.mark.parametrize("command", ["quantize", "evaluate"])
def test_a_profile_of_another_model(refused, command, profile_folder, texts_folder, tmp_path):
    byte_llama(seed=1).save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    argv = [command, "--model", tmp_path / "other", "--profile", profile_folder, "--output_dir", tmp_path / "out"]
    if command == "evaluate":
        argv += ["--texts", texts_folder, "--seqlen", "32"]
    refused("the profile was measured on another model: its fingerprint is", *argv)
    assert not (tmp_path / "out").exists()


def test_a_quantized_model_of_another_model(refused, quantized_folder, texts_folder, tmp_path):
    byte_llama(seed=1).save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    refused(
        r"--model .* is not the model that .* was quantized from",
        *("evaluate", "--model", tmp_path / "other", "--quantized", quantized_folder, "--texts", texts_folder),
        *("--output_dir", tmp_path / "out"),
    )


@pytest.mark.parametrize("harm", ["truncated", "edited"])
@pytest.mark.parametrize("of", ["profile", "quantized"])
def test_a_truncated_or_edited_safetensors_file(refused, of, harm, model_folder, texts_folder, tmp_path, request):
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


def test_too_few_samples_for_an_interval_before_anything_is_read(refused):
    argv = ["evaluate", "--model", "m", "--profile", "p", "--texts", "t", "--output_dir", "o"]
    refused(
        "--nsamples 1 --seqlen 129: an interval needs at least two segments of up to 128 predicted tokens in each "
        "language; give --nsamples 2 or --seqlen 130, or more",
        *(*argv, "--nsamples", "1", "--seqlen", "129"),
    )


@pytest.mark.parametrize(("samples", "seqlen"), [("1", "130"), ("2", "16")])
def test_the_fewest_samples_are_enough(run, model_folder, profile_folder, texts_folder, tmp_path, samples, seqlen):
    status, _, err = run(
        *("evaluate", "--model", model_folder, "--profile", profile_folder, "--texts", texts_folder),
        *("--scheme", "W4A16", "--nsamples", samples, "--seqlen", seqlen, "--output_dir", tmp_path / "out"),
    )
    assert status == 0, err


def test_a_backend_in_the_environment_that_cannot_be_had(refused, calibrate, monkeypatch):
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


def test_an_edited_report(refused, tmp_path):
    (tmp_path / "report.json").write_text('{"schema": 1}')
    refused(r"report\.json", "report", tmp_path)
    refused("cannot be read", "report", tmp_path / "nowhere")


def test_nan_in_the_weights(refused, calibrate, tmp_path):
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
        (["calibrate", "--seqlen", "1"], "argument --seqlen: expected an integer of at least 2, got '1'"),
        (["calibrate", "--nsamples", "0"], "argument --nsamples: expected an integer of at least 1, got '0'"),
        (["calibrate", "--seqlen", "many"], "argument --seqlen: expected an integer of at least 2, got 'many'"),
        (["calibrate", "--group_size", "7"], "argument --group_size: expected an even integer, or 0, got '7'"),
        (["quantize", "--language_objective", "best"], "argument --language_objective: invalid choice: 'best'"),
        (["quantize", "--language_weights", "en"], "argument --language_weights: expected TAG=WEIGHT.*got 'en'"),
        (["quantize", "--language_penalty", "-1"], "argument --language_penalty: expected a finite number.*got '-1'"),
        (["demo", "--language_penalty", "nan"], "argument --language_penalty: expected a finite number.*got 'nan'"),
        (["demo", "--language_weights", "xx=1"], "argument --language_weights: .*got 'xx=1'.*BCP-47"),
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
def test_option_values_that_do_not_exist(refused, argv, message):
    refused(message, *argv)


def test_options_that_do_not_go_together(refused, model_folder, profile_folder, tmp_path):
    refused(
        "granularity = 'token' needs clip = 'rms' or 'absmax'",
        *("quantize", "--model", model_folder, "--profile", profile_folder, "--output_dir", tmp_path / "out"),
        *("--granularity", "token", "--clip", "static"),
    )


@pytest.mark.parametrize(
    "option",
    [
        ["--scheme", "W4A8"],
        ["--codebook", "midrise"],
        ["--language_objective", "minimax"],
        ["--language_weights", "en=1"],
        ["--language_penalty", "0"],
    ],
)
def test_options_of_a_profile_with_a_quantized_model(refused, option, tmp_path):
    refused(
        r"--scheme, --codebook and the options --language_\* of a shared clip go with --profile",
        *("evaluate", "--model", "m", "--quantized", "q", "--texts", "t", "--output_dir", tmp_path / "out"),
        *option,
    )


def test_a_quantized_folder_as_the_model(refused, calibrate, quantized_folder):
    refused(
        "is quantized already; expected floating-point weights; evaluate it with --quantized",
        *(*calibrate, "--model", quantized_folder),
    )


@pytest.mark.parametrize("command", ["calibrate", "quantize", "evaluate", "demo"])
def test_the_working_directory_as_output_is_refused_before_any_work(
    refused, command, profile_folder, texts_folder, tmp_path, monkeypatch
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
    refused, run, command, model_folder, profile_folder, texts_folder, tmp_path
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


def test_force_replaces_a_quantized_model_with_its_tokenizer(quantized_folder):
    assert (quantized_folder / "tokenizer.json").exists()
    check_output(quantized_folder, "config.json", force=True)


def test_force_replaces_a_profile(run, refused, calibrate, tmp_path):
    assert run(*calibrate, "--languages", "en")[0] == 0
    before = (tmp_path / "out" / "profile.json").read_bytes()
    refused("exists", *calibrate)
    assert (tmp_path / "out" / "profile.json").read_bytes() == before
    assert run(*calibrate, "--force")[0] == 0
    assert Profile.load(tmp_path / "out").languages == ("en", "sw", "th")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_disk_that_cannot_be_written(refused, calibrate, monkeypatch, tmp_path):
    def full(self, data):
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    refused("No space left on device: .*profile.safetensors", *calibrate)
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_is_missing(refused, calibrate, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused(r"needs the package transformers; run: pip install 'la-aciq\[demo\]'", *calibrate)


@pytest.mark.parametrize("command", ["evaluate", "demo"])
def test_a_plotting_package_that_is_missing_is_found_before_the_work(refused, command, texts_folder, monkeypatch):
    for name in ("la_aciq.demo", "la_aciq.evaluation.plots"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.delattr(name, raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    argv = [command, "--model", "nowhere", "--texts", texts_folder, "--output_dir", "o"]
    if command == "evaluate":
        argv += ["--profile", "p"]
    refused(r"needs the package matplotlib.*; run: pip install 'la-aciq\[demo\]'", *argv)


def test_in_a_process_of_its_own(tmp_path):
    process = subprocess.run(
        [sys.executable, "-m", "la_aciq.cli", "calibrate", "--model", tmp_path / "x", "--texts", "y"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 2
    assert process.stdout == ""
    assert process.stderr.startswith("la-aciq: error: the following arguments are required: --output_dir")
    assert process.stderr.count("\n") == 1


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_serving_without_vllm(refused):
    refused("serving needs vLLM", "serve", "folder", "--", "--max-model-len", "128")
