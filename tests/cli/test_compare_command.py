"""`la-aciq compare`: what it writes, and one sentence for what it refuses."""

import html
import json
import re
import shutil
from html.parser import HTMLParser

import pytest
import torch
from byte_llama import byte_llama, byte_tokenizer

from la_aciq.evaluation import Report

SIZE = ("--seqlen", "64", "--nsamples", "4")


def files(folder):
    """Names of what is in a folder, without the losses."""
    return {path.name for path in folder.iterdir()} - {"losses"}


def test_a_report_against_the_model_is_that_of_evaluate(run, model_folder, quantized_folder, texts_folder, tmp_path):
    output = tmp_path / "out"
    arguments = ("--texts", texts_folder, "--output_dir", output, *SIZE)
    status, out, err = run("compare", model_folder, quantized_folder, f"{model_folder}@bfloat16", *arguments)
    assert status == 0, err
    heading = f"Change in bits per byte against {model_folder.name}, 256 held-out tokens in each of 3 languages"
    assert " ".join(out.split()).startswith(heading)
    assert re.search(r"Comparing: 100%.*36/36", err)
    assert files(output) == {"report.json", "report.md", "changes.png"}
    status, _, err = run(
        *("evaluate", "--model", model_folder, "--quantized", quantized_folder, "--texts", texts_folder),
        *("--output_dir", tmp_path / "evaluated", *SIZE),
    )
    assert status == 0, err
    ours, other = Report.load(output / "report.json").configurations
    assert [ours] == Report.load(tmp_path / "evaluated" / "report.json").configurations
    assert other.name == f"{model_folder.name}@bfloat16"
    # Everything is known: no model is loaded, and `report` prints the same tables.
    status, again, err = run("compare", model_folder, quantized_folder, f"{model_folder}@bfloat16", *arguments)
    assert status == 0, err
    assert again == out
    assert out.startswith(run("report", output)[1].partition("\n\nReport")[0])


def test_one_file_for_a_colleague(run, model_folder, texts_folder, tmp_path):
    candidate = tmp_path / "<img src=x onerror=alert(1)> & co"
    byte_llama(seed=1).save_pretrained(candidate)
    byte_tokenizer().save_pretrained(candidate)
    output = tmp_path / "out"
    status, out, err = run(
        *("compare", model_folder, candidate, "--texts", texts_folder, "--output_dir", output, "--format", "html"),
        *SIZE,
    )
    assert status == 0, err
    assert str(output / "report.html") in out
    assert files(output) == {"report.json", "report.html"}
    page = (output / "report.html").read_text("utf-8")
    tags = []

    class Page(HTMLParser):
        def handle_starttag(self, tag, attributes):
            tags.append((tag, dict(attributes)))

    Page().feed(page)
    images = [attributes["src"] for tag, attributes in tags if tag == "img"]
    assert len(images) == 1
    assert images[0].startswith("data:image/png;base64,iVBOR")
    assert {tag for tag, _ in tags} & {"script", "link", "iframe", "object"} == set()
    assert not any("href" in attributes or "onerror" in attributes for _, attributes in tags)
    assert html.escape(candidate.name) in page
    result = Report.load(output / "report.json").configurations[0].by_language["sw"]
    assert f"<td>{result.change:+.3f} [{result.low:+.3f}, {result.high:+.3f}]</td>" in page


def test_json_alone(run, model_folder, texts_folder, tmp_path):
    output = tmp_path / "out"
    status, out, _ = run(
        *("compare", model_folder, f"{model_folder}@float16", "--texts", texts_folder, "--output_dir", output),
        *("--format", "json", "--languages", "sw,th", "--skip", "10", *SIZE),
    )
    assert status == 0
    assert files(output) == {"report.json"}
    assert json.loads((output / "report.json").read_text())["texts"] == {
        tag: {"skipped": 10, "tokens": 256} for tag in ("sw", "th")
    }
    assert out.rstrip().endswith(f"Report   {output / 'report.json'}")


def test_ctrl_c_says_where_the_losses_are(run, model_folder, texts_folder, tmp_path, monkeypatch):
    output = tmp_path / "out"
    command = ("compare", model_folder, f"{model_folder}@bfloat16", "--texts", texts_folder, "--output_dir", output)
    with monkeypatch.context() as patch:
        patch.setattr("la_aciq.evaluation.candidates.transformers._Opened.nats", interrupted_after(5))
        status, _, err = run(*command, *SIZE)
    assert status == 130
    assert f"interrupted; the losses so far are kept in {output}, and the same command goes on from there" in err
    status, _, err = run(*command, *SIZE)
    assert status == 0
    assert re.search(r"Comparing: +21%.* 5/24", err)


def interrupted_after(count):
    """`nats` that reads so many windows."""
    from la_aciq.evaluation.candidates import transformers

    nats, tags = transformers._Opened.nats, []

    def read(self, window, tag):
        if len(tags) == count:
            raise KeyboardInterrupt
        tags.append(tag)
        return nats(self, window, tag)

    return read


def test_what_is_refused(refused, model_folder, texts_folder, tmp_path):
    command = ("compare", model_folder, model_folder, "--texts", texts_folder, "--output_dir", tmp_path / "out", *SIZE)
    refused("is given twice", *command)
    other = ("compare", model_folder, f"{model_folder}@bfloat16", "--texts", texts_folder, *SIZE)
    refused("--languages names 'ko', and", *other, "--languages", "ko", "--output_dir", tmp_path / "out")
    refused("--output_dir", *other)
    refused("holds no losses of a comparison", *other, "--output_dir", texts_folder)
    refused("'en' is too short", *other, "--output_dir", tmp_path / "out", "--nsamples", "1000")
    refused(
        "an interval needs at least two segments",
        *(*other, "--output_dir", tmp_path / "out", "--seqlen", "100", "--nsamples", "1"),
    )
    refused("device 'cuda:99' cannot be used", *other, "--output_dir", tmp_path / "out", "--device", "cuda:99")
    refused("device 'gpu' cannot be used", *other, "--output_dir", tmp_path / "out", "--device", "gpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", ["truncated", "missing"])
def test_a_folder_whose_weights_are_damaged(refused, model_folder, texts_folder, tmp_path, bad):
    broken = tmp_path / "broken"
    shutil.copytree(model_folder, broken)
    if bad == "missing":
        (broken / "model.safetensors").unlink()
    else:
        with (broken / "model.safetensors").open("r+b") as file:
            file.truncate(1000)
    output = tmp_path / "out"
    refused(
        "cannot be loaded",
        *("compare", model_folder, broken, "--texts", texts_folder, "--output_dir", output, *SIZE),
    )
    assert len(list((output / "losses").glob("*.jsonl"))) == 1  # the reference's losses are kept


def test_a_model_that_another_package_quantized(run, model_folder, texts_folder, tmp_path):
    """compressed-tensors, whose package is installed, without LA-ACIQ in its configuration."""
    pytest.importorskip("compressed_tensors")
    profile, quantized, output = tmp_path / "profile", tmp_path / "ct", tmp_path / "out"
    size = ("--seqlen", "32", "--nsamples", "4")
    status, _, err = run(
        *("calibrate", "--model", model_folder, "--texts", texts_folder, "--no_rotate", "--group_size", "20", *size),
        *("--ignore", "lm_head,down_proj", "--output_dir", profile),
    )
    assert status == 0, err
    status, _, err = run(
        *("quantize", "--model", model_folder, "--profile", profile, "--scheme", "W4A16", "--codebook", "midtread"),
        *("--format", "compressed-tensors", "--output_dir", quantized),
    )
    assert status == 0, err
    status, out, err = run("compare", model_folder, quantized, "--texts", texts_folder, "--output_dir", output, *SIZE)
    assert status == 0, err
    (configuration,) = Report.load(output / "report.json").configurations
    assert configuration.config["quant_method"] == "compressed-tensors"
    assert configuration.bits is None
    assert all(result.change != 0 for result in configuration.by_language.values())
    assert torch.tensor(configuration.mean).isfinite()
    assert re.search(r"1 +ct +– ", out)
