"""The model card: what it says is in the report, or in the tables themselves."""

import numpy as np
import pytest
import yaml
from tiny_llama import random_texts, tiny_llama

import la_aciq
from la_aciq.checkpoint import save_quantized
from la_aciq.checkpoint.card import model_card
from la_aciq.errors import LaAciqError
from la_aciq.nn import QuantConfig, quantize_model


@pytest.fixture(scope="module")
def setting():
    model = tiny_llama()
    profile = la_aciq.calibrate(model, random_texts(), seqlen=64, tokens=128, group_size=16, progress=False)
    return model, quantize_model(model, profile, QuantConfig(group_size=16, clip="static"), progress=False)


def evaluated(model, quantized):
    return la_aciq.evaluate(
        quantized, model, texts=random_texts(tokens=600), seqlen=100, tokens=200, name="W4A4", progress=False
    )


def test_without_a_report_it_shows_what_the_clips_were_chosen_on(setting):
    _, quantized = setting
    card = model_card(quantized)
    front = yaml.safe_load(card.split("---")[1])
    assert front["language"] == ["en", "sw", "th"]
    assert front["library_name"] == "transformers"
    clips = [quantized.get_submodule(name).clips.double().numpy() for name in quantized.la_aciq.layers]
    sw = np.exp(np.mean([np.log(clip[2] / clip[0]).mean() for clip in clips]))
    assert f"| sw | 128 | {sw:.3f} |" in card
    assert "| und |  | 1.000 |" in card
    assert "| activations | 4 |" in card
    assert "- `lm_head`: ignored by the configuration" in card
    assert "LlamaForCausalLM.from_pretrained(folder)" in card


def test_without_clips_by_language_it_has_no_column_of_them(setting):
    model, _ = setting
    profile = la_aciq.calibrate(model, random_texts(), seqlen=64, tokens=128, group_size=16, progress=False)
    card = model_card(quantize_model(model, profile, QuantConfig(group_size=16), progress=False))
    assert "| entry | calibration tokens |\n" in card
    assert "| sw | 128 |\n" in card


def test_with_a_report_it_shows_the_change_by_language(setting, tmp_path):
    model, quantized = setting
    report = evaluated(model, quantized)
    save_quantized(quantized, tmp_path / "int4", report=report)
    card = (tmp_path / "int4" / "README.md").read_text("utf-8")
    for tag, result in report.configurations[0].by_language.items():
        assert f"| {tag} | {result.reference_bpb:.3f} | {result.change:+.3f} [" in card
    assert "Not evaluated" not in card


def test_reports_of_something_else_are_refused(setting, tmp_path):
    model, quantized = setting
    report = evaluated(model, quantized)
    profile = la_aciq.calibrate(model, random_texts(), seqlen=64, tokens=128, group_size=16, progress=False)
    other = quantize_model(model, profile, QuantConfig(group_size=16, activations=8), progress=False)
    with pytest.raises(LaAciqError, match="no results of this configuration; it has W4A4"):
        save_quantized(other, tmp_path / "other", report=report)
    assert not (tmp_path / "other").exists()
    report.model["fingerprint"] = "0"
    with pytest.raises(LaAciqError, match="another model"):
        model_card(quantized, report)
