"""QuantConfig: what it accepts, what it refuses, and how it travels as JSON."""

import json

import pytest

from la_aciq.errors import LaAciqError
from la_aciq.nn import QuantConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weights", 3),
        ("weights", True),
        ("activations", 5),
        ("kv", 8),
        ("group_size", 63),
        ("group_size", -2),
        ("group_size", 64.0),
        ("codebook", "nf4"),
        ("clip", "percentile"),
        ("sharing", "global"),
        ("granularity", "channel"),
        ("objective", "kl"),
        ("rounding", "stochastic"),
        ("rotate", 1),
        ("ignore", "lm_head"),
        ("ignore", (1,)),
    ],
)
def test_values_outside_the_choices_are_refused_by_name(field, value):
    with pytest.raises(LaAciqError, match=rf"^{field}: expected .*, got "):
        QuantConfig(**{field: value})


def test_combinations_without_meaning_or_kernel():
    with pytest.raises(LaAciqError, match="granularity = 'token' needs clip"):
        QuantConfig(clip="static", granularity="token")
    with pytest.raises(LaAciqError, match="activations = 8 needs weights = 4"):
        QuantConfig(weights=16, activations=8)


def test_json_round_trip():
    config = QuantConfig(
        activations=8, kv=4, clip="rms", granularity="token", rotate=False, ignore=["lm_head", "*.0.*"]
    )
    assert QuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(config) == hash(QuantConfig.from_dict(config.to_dict()))


def test_an_unknown_setting_is_named():
    with pytest.raises(LaAciqError, match="unknown quantization setting 'bits'"):
        QuantConfig.from_dict({"bits": 4})


def test_ignore_takes_names_last_components_and_patterns():
    config = QuantConfig(ignore=("lm_head", "model.layers.1.mlp.up_proj", "model.layers.0.*"))
    ignored = {"lm_head", "model.lm_head", "model.layers.1.mlp.up_proj", "model.layers.0.mlp.down_proj"}
    kept = {"model.layers.1.mlp.down_proj", "model.layers.10.mlp.up_proj", "lm_head.0"}
    assert {name for name in ignored | kept if config.ignores(name)} == ignored


@pytest.mark.parametrize(
    ("config", "groups"),
    [
        (QuantConfig(group_size=64), 3),
        (QuantConfig(group_size=64, granularity="layer", clip="static"), 1),
        (QuantConfig(group_size=64, granularity="model", clip="rms"), 3),
        (QuantConfig(group_size=64, granularity="token", clip="absmax"), 1),
        (QuantConfig(group_size=0), 1),
    ],
)
def test_columns_of_the_clip_table(config, groups):
    assert config.groups(130) == groups


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"language_objective": "median"}, "language_objective: expected 'mean' or .*, got 'median'"),
        ({"language_objective": "weighted"}, "language_weights: expected the languages' weights .*, got None"),
        ({"language_weights": {"en": 1}}, "language_weights: expected None with language_objective = 'mean'"),
        ({"language_objective": "weighted", "language_weights": ["en"]}, r"weights by tag, .*, got \['en'\]"),
        ({"language_objective": "weighted", "language_weights": {"en": -1}}, "none negative"),
        ({"language_objective": "weighted", "language_weights": {"en": 0.0}}, "not all zero"),
        ({"language_objective": "weighted", "language_weights": {"en": float("nan")}}, "finite"),
        ({"language_objective": "weighted", "language_weights": {1: 1.0}}, "by tag"),
        (
            {"language_objective": "variance", "language_penalty": -1},
            "at least 0, got -1",
        ),
        ({"language_objective": "variance", "language_penalty": float("inf")}, "finite number"),
        ({"language_penalty": 2}, "language_penalty: expected 1.0 with language_objective = 'mean'"),
    ],
)
def test_language_objectives_that_have_no_meaning(settings, message):
    with pytest.raises(LaAciqError, match=message):
        QuantConfig(**settings)


def test_a_language_objective_survives_json():
    weights = {"en": 3, "sw": 1.5}
    config = QuantConfig(language_objective="weighted", language_weights=weights)
    weights["th"] = 1.0
    assert config.language_weights == {"en": 3.0, "sw": 1.5}
    assert QuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(config) == hash(QuantConfig(language_objective="weighted", language_weights={"en": 3.0, "sw": 1.5}))
    assert QuantConfig(language_objective="variance", language_penalty=2).language_penalty == 2.0
    assert QuantConfig.from_dict({}) == QuantConfig()  # of a version before
