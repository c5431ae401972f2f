"""The order of the numbers on a real model: what should be small is small, what is known to break breaks."""

import pytest
import torch

import la_aciq
from la_aciq import embedded
from la_aciq.evaluation import evaluate_configurations
from la_aciq.nn import QuantConfig


@pytest.mark.model
def test_the_order_of_configurations_on_the_embedded_model(embedded_model):
    model, tokenizer = embedded_model
    texts = embedded.load_texts(["en", "th"])
    settings = {"seqlen": 256, "progress": False}
    profile = la_aciq.calibrate(model, texts, tokenizer, tokens=512, **settings)
    configurations = {
        "bfloat16": torch.bfloat16,
        "W4A16 to nearest": QuantConfig(activations=16, rounding="nearest", center=False),
        "W4A8": QuantConfig(activations=8),
        "W4A4": QuantConfig(),
        "W4A4 per token": QuantConfig(granularity="token"),
    }
    report = evaluate_configurations(
        model, profile, configurations, texts=texts, tokenizer=tokenizer, tokens=256, **settings
    )
    nats = {configuration.name: configuration.nats for configuration in report.configurations}
    print(nats, [c.bits for c in report.configurations])
    assert abs(nats["bfloat16"]) < 0.02
    # Rounding to the nearest of 16 levels costs a small model this much, and error feedback takes most of it back.
    assert 0.2 < nats["W4A16 to nearest"] < 0.8
    assert 0.01 < nats["W4A8"] < 0.5 * nats["W4A16 to nearest"]
    assert nats["W4A8"] + 0.05 < nats["W4A4"] < nats["W4A4 per token"] - 0.05
    assert nats["W4A4 per token"] < 1
    # English of this model costs about a bit per byte: bytes, not tokens, are in the denominator.
    assert 0.6 < report.configurations[0].by_language["en"].reference_bpb < 1.2
    assert report.configurations[1].bits == pytest.approx(4.5)
