"""Evaluation end to end on a small Llama, checked against numbers computed here by hand."""

import math
import re
import warnings

import numpy as np
import pytest
import scipy.stats
import torch
from tiny_llama import random_texts, tiny_llama

import la_aciq
from la_aciq.calibration import TokenizedText
from la_aciq.errors import LaAciqError
from la_aciq.evaluation import evaluate, evaluate_configurations
from la_aciq.nn import QuantConfig, quantize_model

SETTINGS = {"seqlen": 200, "tokens": 500, "progress": False}


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def profile(model):
    settings = {"seqlen": 64, "tokens": 256, "group_size": 16, "center": False}
    return la_aciq.calibrate(model, random_texts(), progress=False, **settings)


def with_bytes(texts):
    """Token t adds 1 + t % 4 bytes."""
    return {tag: TokenizedText(ids, np.cumsum(1 + np.asarray(ids) % 4)) for tag, ids in texts.items()}


def nats(model, ids):
    """Loss of each predicted token of one window, float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(ids)[None]).logits[0].double()
    return (torch.logsumexp(logits, -1)[:-1] - logits[:-1].gather(-1, torch.from_numpy(ids)[1:, None])[:, 0]).numpy()


def test_bits_per_byte_by_hand(model, profile):
    texts = with_bytes(random_texts())
    quantized = quantize_model(model, profile, QuantConfig(group_size=16), progress=False)
    report = evaluate(quantized, model, texts=texts, name="W4A4", **SETTINGS)
    (configuration,) = report.configurations
    assert report.unit == "byte"
    assert list(configuration.by_language) == ["en", "sw", "th"]
    for tag, result in configuration.by_language.items():
        ids = texts[tag].ids[256:756]  # what follows the calibration's tokens
        windows = [ids[:200], ids[200:400], ids[400:]]
        size = sum(sum(1 + int(t) % 4 for t in window[1:]) for window in windows)
        before = np.concatenate([nats(model, window) for window in windows])
        with la_aciq.language(tag):
            after = np.concatenate([nats(quantized, window) for window in windows])
        assert result.tokens == 497
        assert result.segments == 5  # 128 + 71, 128 + 71, 99
        assert result.reference_bpb == pytest.approx(before.sum() / math.log(2) / size, rel=1e-5)
        assert result.bpb == pytest.approx(after.sum() / math.log(2) / size, rel=1e-5)
        assert result.change == pytest.approx(result.bpb - result.reference_bpb, abs=1e-9)
        assert result.nats == pytest.approx((after - before).sum() / 497, abs=1e-5)
        assert result.low <= result.change <= result.high
        parts = np.split(after - before, [128, 199, 327, 398])
        assert result.tail_rate == np.mean([part.mean() > 0.5 for part in parts])
    changes = [result.change for result in configuration.by_language.values()]
    errors = [result.se for result in configuration.by_language.values()]
    assert configuration.mean == pytest.approx(np.mean(changes))
    assert configuration.mean_se == pytest.approx(math.sqrt(sum(e**2 for e in errors)) / 3, rel=0.1)
    assert configuration.mean_low < configuration.mean < configuration.mean_high
    # Student's t of 4 degrees of freedom for five segments each.
    for result in configuration.by_language.values():
        assert (result.high - result.change) / result.se == pytest.approx(2.776, abs=1e-3)
        assert (result.change - result.low) / result.se == pytest.approx(2.776, abs=1e-3)
    assert configuration.worst == max(changes) == configuration.by_language[configuration.worst_language].change
    assert configuration.gap == pytest.approx(max(changes) - min(changes))
    assert 0 <= configuration.gap_low < configuration.gap < configuration.gap_high
    assert configuration.config["activations"] == 4


def test_token_ids_without_text_give_bits_per_token(model):
    report = evaluate(model, model, texts=random_texts(("en",)), **SETTINGS)
    (result,) = report.configurations[0].by_language.values()
    assert report.unit == "token"
    windows = [random_texts(("en",))["en"][start : start + 200] for start in (0, 200, 400)]
    losses = np.concatenate([nats(model, window[: 500 - 200 * i]) for i, window in enumerate(windows)])
    assert result.reference_bpb == pytest.approx(losses.mean() / math.log(2), rel=1e-5)
    assert result.change == result.low == result.high == result.tail_rate == 0


def test_the_tokens_of_the_calibration_are_skipped_unless_told_otherwise(model, profile):
    quantized = quantize_model(model, profile, QuantConfig(group_size=16), progress=False)
    texts = random_texts()
    assert evaluate(quantized, model, texts=texts, **SETTINGS).texts["sw"]["skipped"] == 256
    report = evaluate(quantized, model, texts=texts, skip={"sw": 10}, **SETTINGS)
    assert {tag: entry["skipped"] for tag, entry in report.texts.items()} == {"en": 0, "sw": 10, "th": 0}


def test_a_text_that_is_too_short_is_refused_with_the_numbers(model, profile):
    quantized = quantize_model(model, profile, QuantConfig(group_size=16), progress=False)
    with pytest.raises(LaAciqError, match=r"'en' is too short.*756.*600"):
        evaluate(quantized, model, texts=random_texts(tokens=600), **SETTINGS)


def test_with_several_profiles_nothing_that_any_was_calibrated_on_is_evaluated(model, profile):
    longer = la_aciq.calibrate(model, random_texts(), seqlen=64, tokens=288, group_size=32, progress=False)
    configurations = {"16": QuantConfig(group_size=16), "32": QuantConfig(group_size=32)}
    report = evaluate_configurations(model, [profile, longer], configurations, texts=random_texts(), **SETTINGS)
    assert profile.metadata["tokens"]["en"] < 288
    assert {tag: description["skipped"] for tag, description in report.texts.items()} == dict.fromkeys(
        ("en", "sw", "th"), 288
    )


def test_what_cannot_differ_by_language_is_not_compared(model, profile):
    kinds = {
        "W4A16": {"activations": 16, "clip": "static", "center": False},
        "KV4": {"weights": 16, "activations": 16, "kv": 4, "kv_clip": "static", "center": False},
    }
    configurations = {
        f"{name} {sharing}": QuantConfig(group_size=16, sharing=sharing, **kind)
        for name, kind in kinds.items()
        for sharing in ("language", "pooled")
    }
    report = evaluate_configurations(model, profile, configurations, texts=random_texts(), **SETTINGS)
    assert [(c.name, c.baseline) for c in report.comparisons] == [("KV4 language", "KV4 pooled")]


@pytest.fixture(scope="module")
def several(model, profile):
    calls = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    configurations = {
        "bfloat16": torch.bfloat16,
        "W4A4 language": QuantConfig(group_size=16, clip="static"),
        "W4A4 pooled": QuantConfig(group_size=16, clip="static", sharing="pooled"),
        "W4A4 absmax": QuantConfig(group_size=16, clip="absmax"),
    }
    try:
        report = evaluate_configurations(model, profile, configurations, texts=with_bytes(random_texts()), **SETTINGS)
    finally:
        handle.remove()
    return report, calls, configurations


def test_several_configurations_are_each_as_if_alone(model, profile, several):
    report, calls, configurations = several
    assert [c.name for c in report.configurations] == list(configurations)
    # The hook counts the reference and its copies: one pass per window and model.
    assert len(calls) == 9 * (1 + len(configurations))
    quantized = quantize_model(model, profile, configurations["W4A4 pooled"], progress=False)
    alone = evaluate(quantized, model, texts=with_bytes(random_texts()), name="W4A4 pooled", **SETTINGS)
    assert report.configurations[2] == alone.configurations[0]
    assert report.configurations[0].config == {"dtype": "bfloat16"}
    assert report.configurations[0].bits == 16
    assert abs(report.configurations[0].mean) < abs(report.configurations[1].mean)
    assert next(model.parameters()).dtype == torch.float32


def test_per_language_clips_are_compared_with_pooled_ones_pairwise(several):
    report, _, _ = several
    (comparison,) = report.comparisons
    assert (comparison.name, comparison.baseline) == ("W4A4 language", "W4A4 pooled")
    by_language, pooled = report.configurations[1], report.configurations[2]
    for tag, difference in comparison.by_language.items():
        expected = by_language.by_language[tag].change - pooled.by_language[tag].change
        assert difference.difference == pytest.approx(expected, abs=1e-9)
        assert difference.low <= difference.difference <= difference.high
        # Paired: narrower than two independent intervals would give.
        errors = [result.by_language[tag].se for result in (by_language, pooled)]
        # Of three intervals at 1 - 0.05 / 3 with 4 degrees of freedom.
        margin = scipy.stats.t.ppf(1 - 0.05 / 6, 4) * math.hypot(*errors)
        assert difference.high - difference.difference < margin
    assert comparison.mean.difference == pytest.approx(by_language.mean - pooled.mean, abs=1e-9)
    assert comparison.gap.difference == pytest.approx(by_language.gap - pooled.gap, abs=1e-9)
    assert comparison.gap.low < comparison.gap.difference < comparison.gap.high
    assert comparison.segments == 15


def test_what_the_profile_says_is_in_the_report(several, profile):
    report, _, _ = several
    assert list(report.regret) == ["q_proj", "key", "value", "o_proj", "gate_proj", "down_proj"]
    assert all(value >= 0 for row in report.regret.values() for value in row.values())
    assert len(report.clips.sites) == len(report.kurtosis.sites) == 8
    site = profile.sites["model.layers.1.mlp.down_proj"]
    place = report.kurtosis.sites.index("model.layers.1.mlp.down_proj")
    assert report.kurtosis.by_language["sw"][place] == pytest.approx(site.moments[2].pool(0).kurtosis)
    assert all(1.5 < ratio < 8 for values in report.clips.by_language.values() for ratio in values)
    for curve in report.curves:
        for tag, mse in curve.mse.items():
            assert curve.optimum[tag][1] == min(mse)
            assert curve.optimum[tag][0] == curve.ratio[mse.index(min(mse))]
            assert 0.005 < min(mse) < 0.05  # a Gaussian's is 0.0115


def test_each_configuration_takes_the_profile_with_its_rotation(model, profile):
    plain = la_aciq.calibrate(model, random_texts(), seqlen=64, tokens=256, group_size=16, rotate=False, progress=False)
    configurations = {
        "rotated": QuantConfig(group_size=16, clip="static"),
        "plain": QuantConfig(group_size=16, clip="static", rotate=False),
    }
    texts = random_texts()
    report = evaluate_configurations(model, [profile, plain], configurations, texts=texts, **SETTINGS)
    expected = quantize_model(model, plain, configurations["plain"], progress=False)
    alone = evaluate(expected, model, texts=texts, name="plain", **SETTINGS)
    assert report.configurations[1] == alone.configurations[0]
    with pytest.raises(LaAciqError, match="rotate = False"):
        evaluate_configurations(model, profile, configurations, texts=texts, **SETTINGS)


def test_one_segment_is_no_sample(model):
    with pytest.raises(LaAciqError, match=r"tokens = 100.*at least two segments.*'en' has 1 "):
        evaluate(model, model, texts=random_texts(), seqlen=200, tokens=100, progress=False)


def test_evaluation_sets_a_language(model, profile):
    quantized = quantize_model(model, profile, QuantConfig(group_size=16), progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        evaluate(quantized, model, texts=random_texts(), **SETTINGS)


def test_nothing_to_evaluate(model, profile):
    with pytest.raises(LaAciqError, match="at least one"):
        evaluate_configurations(model, profile, {}, texts=random_texts(), **SETTINGS)


def test_tokens_that_add_no_byte_are_no_sample(model):
    """Windows of two tokens in the middle of characters of several bytes."""
    ids = np.arange(8) % 61
    ends = {"en": np.arange(1, 9), "th": np.array([3, 3, 6, 6, 9, 9, 12, 12])}
    texts = {tag: TokenizedText(ids, bytes_) for tag, bytes_ in ends.items()}
    passes = []
    handle = model.register_forward_pre_hook(lambda *_: passes.append(1))
    with pytest.raises(LaAciqError, match=r"tokens = 4: .*the text for 'th' has 0 in which the tokens add text"):
        evaluate(model, model, texts=texts, seqlen=2, tokens=4, progress=False)
    handle.remove()
    assert not passes
    report = evaluate(model, model, texts={"en": texts["en"]}, seqlen=2, tokens=4, progress=False)
    assert report.configurations[0].by_language["en"].segments == 2


def test_a_window_that_ends_with_part_of_a_character(model):
    """Its last segment is one token without a byte, and joins the one before it: no draw of segments is empty."""
    ids = np.arange(520) % 61
    counts = np.ones(520, dtype=np.int64)
    counts[129::130] = 0
    text = TokenizedText(ids, np.cumsum(counts))
    report = evaluate(model, model, texts={"th": text}, seqlen=130, tokens=520, progress=False)
    (result,) = report.configurations[0].by_language.values()
    assert (result.segments, result.tokens) == (4, 4 * 129)


@pytest.mark.parametrize(
    ("texts", "settings", "message"),
    [
        ({"en": np.full(600, 61)}, {}, r"texts\['en'\] has token ids from 61 to 61; the model knows 0 to 60"),
        ({"en": np.arange(9000) % 61}, {"seqlen": 4096, "tokens": 4096}, "seqlen = 4096 is longer than the 2048"),
    ],
)
def test_texts_that_the_model_cannot_read_before_it_runs(model, texts, settings, message):
    with pytest.raises(LaAciqError, match=message):
        evaluate(model, model, texts=texts, **SETTINGS | settings)


def test_a_profile_of_another_model_before_the_model_runs(profile):
    other = tiny_llama(1)
    other.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(LaAciqError, match="measured on another model"):
        evaluate_configurations(other, profile, {"a": QuantConfig(group_size=16)}, texts=random_texts(), **SETTINGS)


def test_a_configuration_that_does_not_fit_its_profile_is_named_before_the_model_runs(profile):
    model = tiny_llama()
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    configurations = {
        "fits": QuantConfig(group_size=16),
        "unrotated": QuantConfig(16, 4, group_size=16, clip="static", rotate=False),
    }
    with pytest.raises(LaAciqError, match=r"configuration 'unrotated': rotate = False, but the profile"):
        evaluate_configurations(model, profile, configurations, texts=with_bytes(random_texts()), **SETTINGS)


@pytest.mark.parametrize("progress", [True, False])
def test_a_progress_bar_counts_the_layers_that_are_quantized(model, profile, capsys, progress):
    configurations = {"W4A8": QuantConfig(activations=8, group_size=16), "bf16": torch.bfloat16}
    settings = SETTINGS | {"progress": progress}
    evaluate_configurations(model, profile, configurations, texts=random_texts(), **settings)
    shown = capsys.readouterr().err
    if progress:
        layers = len(quantize_model(model, profile, configurations["W4A8"], progress=False).la_aciq.layers)
        assert re.search(rf"Quantizing: +0%.* 0/{layers} \[00:00<\?, \?layer/s\]", shown)
        assert "Evaluating: 100%" in shown
    else:
        assert shown == ""
