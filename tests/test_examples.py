"""The examples run on a tiny model and print what they show."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from byte_llama import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from la_aciq import embedded, models
from la_aciq.calibration import load_texts

EXAMPLES = Path(__file__).parents[1] / "examples"
# The arguments of each, "model", "texts" and a new "folder", and parts of its output.
CASES = {
    "quantize_and_generate.py": (["model", "texts"], ["14 layers quantized", "und, en, sw, th, sink", "sw: Habari ya"]),
    "mixed_languages.py": (
        ["model", "texts"],
        ["sw     the same in a mixed batch: True; distance from English: 0.", "served by the pooled entry: {'pt': "],
    ),
    "from_pretrained.py": (["model", "texts", "folder"], ["the same outputs after loading: True"]),
    "numpy_moments_and_clips.py": ([], ["Gaussian(sigma=1.0, mean=0.0): clip 2.5140, normalized MSE 0.01154"]),
    "export_compressed_tensors.py": (["even", "texts", "folder"], ["languages of the table: und, en, sw, th, sink"]),
}


@pytest.fixture(scope="module")
def even_folder(tmp_path_factory):
    """A model whose sizes are multiples of 32, as compressed-tensors needs."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4
    )
    folder = tmp_path_factory.mktemp("even")
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(CASES)


NEED_ARGUMENTS = [name for name, (arguments, _) in CASES.items() if "folder" in arguments]


@pytest.mark.parametrize("name", NEED_ARGUMENTS)
@pytest.mark.parametrize("arguments", [[], ["model", "texts", "folder", "more"]])
def test_an_example_without_its_arguments_says_how_it_is_called(name, arguments, monkeypatch):
    if name == "export_compressed_tensors.py":
        pytest.importorskip("compressed_tensors")
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit, match=f"^usage: python .*{name} MODEL TEXTS FOLDER$"):
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.parametrize("name", NEED_ARGUMENTS)
def test_an_example_with_the_embedded_model(name, even_folder, texts_folder, tmp_path, monkeypatch, capsys):
    """Another model and other texts in its place, which take less time."""
    if name == "export_compressed_tensors.py":
        pytest.importorskip("compressed_tensors")
    model, tokenizer = models.load_model(str(even_folder))
    model.config.name_or_path = embedded.MODEL_NAME
    monkeypatch.setattr(embedded, "load_model", lambda: (model, tokenizer))
    monkeypatch.setattr(embedded, "load_texts", lambda tags: {tag: load_texts(texts_folder)[tag] for tag in tags})
    monkeypatch.setattr(sys, "argv", [name, "embedded", "embedded", str(tmp_path / "out")])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    output = capsys.readouterr().out
    for text in CASES[name][1]:
        assert text in output


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("error::UserWarning:la_aciq")
def test_example(name, model_folder, texts_folder, even_folder, tmp_path, monkeypatch, capsys):
    if name == "export_compressed_tensors.py":
        pytest.importorskip("compressed_tensors")
    arguments, expected = CASES[name]
    values = {"model": model_folder, "even": even_folder, "texts": texts_folder, "folder": tmp_path / "out"}
    monkeypatch.setattr(sys, "argv", [name, *(str(values[argument]) for argument in arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    output = capsys.readouterr().out
    for text in expected:
        assert text in output
