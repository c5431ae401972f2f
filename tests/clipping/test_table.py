"""Clip tables from a profile: right clips in right places, and nothing that is not finite and positive gets out."""

import json

import numpy as np
import pytest
from synthetic_profile import log_histogram, moments_state, normal, student, synthetic_profile

from la_aciq import clipping
from la_aciq.clipping import ClipTable
from la_aciq.clipping.table import PRIOR_SAMPLES
from la_aciq.profile.profile import Profile

SITES = ("layers.q_proj.in", "layers.down_proj.in", "layers.k_proj.output")
SIGMA = {"en": 1.0, "sw": 1.4, "pt-BR": 0.6}


@pytest.fixture(scope="module")
def profile():
    languages = {
        tag: {SITES[0]: normal(s), SITES[1]: student(5, 3 * s), SITES[2]: normal(10 * s)} for tag, s in SIGMA.items()
    }
    made = synthetic_profile(languages, normal(40.0), values=30_000)
    layers = {"layers.q_proj": SITES[0], "layers.v_proj": SITES[0], "layers.down_proj": SITES[1]}
    return Profile(made.entries, made.sites, layers)


def histogram_of(profile, site, row, group):
    return profile.sites[site].moments.histogram[profile.entries.index(row), group]


def test_every_layer_entry_and_group_has_its_own_clip(profile):
    table = clipping.table(profile)
    assert table.entries == ("und", "en", "sw", "pt-BR", "sink")
    assert set(table.clips) == {"layers.q_proj", "layers.v_proj", "layers.down_proj", SITES[2]}
    for layer, site in [("layers.q_proj", SITES[0]), ("layers.down_proj", SITES[1]), (SITES[2], SITES[2])]:
        assert table.clips[layer].shape == (5, 2)
        for row in ("en", "sw", "pt-BR", "sink"):
            for group in range(2):
                expected = float(clipping.optimal_histogram(histogram_of(profile, site, row, group))[0])
                ours = table.clips[layer][table.entry(row), group]
                # Languages are drawn toward `und` with the weight of 1024 values; a token class is not.
                assert ours == pytest.approx(expected, rel=1e-5 if row == "sink" else 0.06)
    np.testing.assert_array_equal(table.clips["layers.q_proj"], table.clips["layers.v_proj"])


def test_factors_are_the_clip_over_the_rms(profile):
    table = clipping.table(profile)
    rms = np.repeat(list(SIGMA.values()), 2).reshape(3, 2)
    np.testing.assert_allclose(
        table.clips["layers.q_proj"][1:4] / table.clip_factors["layers.q_proj"][1:4], rms, rtol=0.05
    )
    assert table.clip_factors["layers.q_proj"][1, 0] == pytest.approx(2.51, abs=0.1)


def test_shared_clips_minimize_the_language_objective(profile):
    grid = np.geomspace(0.5, 12, 3000)
    rows = [profile.entries.index(tag) for tag in SIGMA]
    for kind in ("mean", "minimax", "variance"):
        table = clipping.table(profile, language_objective=kind)
        for group in range(2):
            histogram = profile.sites[SITES[0]].moments.histogram[rows, group]
            power = np.array([[float(clipping.Empirical.from_histogram(h).power)] for h in histogram])
            errors = clipping.histogram_mse(histogram[:, None], grid) / power
            value = {"mean": errors.mean(0), "minimax": errors.max(0), "variance": errors.mean(0) + errors.var(0)}[kind]
            shared = float(table.clips["layers.q_proj"][0, group])
            at = clipping.histogram_mse(histogram, shared) / power[:, 0]
            got = {"mean": at.mean(), "minimax": at.max(), "variance": at.mean() + at.var()}[kind]
            assert got <= value.min() * (1 + 1e-4)
    weighted = clipping.table(profile, language_objective="weighted", language_weights={"pt-BR": 2.0})
    own = clipping.table(profile)
    np.testing.assert_allclose(weighted.clips["layers.q_proj"][0], own.clips["layers.q_proj"][3], rtol=0.04)


def test_pooled_sharing_gives_languages_the_und_clip_and_sink_its_own(profile):
    own, pooled = clipping.table(profile), clipping.table(profile, sharing="pooled")
    for layer in pooled.clips:
        np.testing.assert_array_equal(pooled.clips[layer][1:4], np.repeat(pooled.clips[layer][:1], 3, axis=0))
        np.testing.assert_array_equal(pooled.clips[layer][[0, 4]], own.clips[layer][[0, 4]])
        # The dynamic operation multiplies a row's own rms, so the factors differ.
        assert np.ptp(pooled.clip_factors[layer][1:4, 0]) > 0.5
    assert np.all(pooled.shrinkage["layers.q_proj"][1:4] == 1)


def test_granularities(profile):
    layer = clipping.table(profile, granularity="layer")
    for name, site in [("layers.q_proj", SITES[0]), ("layers.down_proj", SITES[1])]:
        assert np.all(layer.clips[name] == layer.clips[name][:, :1])
        summed = profile.sites[site].moments.histogram.sum(1)
        expected = clipping.optimal_histogram(summed)[0]
        np.testing.assert_allclose(layer.clips[name][1:, 0], expected[1:], rtol=0.03)
    model = clipping.table(profile, granularity="model")
    assert np.all(model.clips["layers.q_proj"] == model.clips["layers.down_proj"])
    assert not np.any(model.clips["layers.q_proj"] == model.clips[SITES[2]])  # keys are another quantizer
    total = sum(profile.sites[site].moments.histogram.sum(1) for site in SITES[:2])
    np.testing.assert_allclose(model.clips["layers.q_proj"][1:, 0], clipping.optimal_histogram(total)[0][1:], rtol=0.03)


def test_models_and_codebooks_reach_the_solver(profile):
    for bits, codebook, objective in ((2, "midtread", "exact"), (8, "midrise", "in_range"), (4, "midrise", "aciq")):
        table = clipping.table(profile, bits, codebook, objective)
        expected = clipping.optimal_histogram(histogram_of(profile, SITES[1], "sink", 1), bits, codebook, objective)[0]
        assert table.clips["layers.down_proj"][4, 1] == pytest.approx(float(expected), rel=1e-6)


def with_row(profile, row, samples):
    """The profile with one row of one site's groups replaced by histograms of these samples (None: empty)."""
    sites = {}
    for name, site in profile.sites.items():
        histogram, state = site.moments.histogram.copy(), site.moments.state.copy()
        x = np.zeros(0) if samples is None else samples
        histogram[profile.entries.index(row)] = log_histogram(x)
        state[profile.entries.index(row)] = moments_state(x)
        moments = type(site.moments).from_state(state, histogram)
        sites[name] = type(site)(site.kind, site.layer_kind, site.k, site.group_size, moments)
    return Profile(profile.entries, sites, profile.layers)


def test_small_samples_are_shrunk_toward_und(profile):
    few = np.random.default_rng(0).normal(0, 0.05, PRIOR_SAMPLES)
    table = clipping.table(with_row(profile, "sw", few))
    layer, row = "layers.q_proj", table.entry("sw")
    assert table.shrinkage[layer][row] == pytest.approx(0.5)
    assert table.shrinkage[layer][table.entry("en")] == pytest.approx(PRIOR_SAMPLES / (PRIOR_SAMPLES + 30_000))
    assert table.shrinkage[layer][0] == pytest.approx(0)
    own = float(clipping.optimal_histogram(log_histogram(few))[0])
    np.testing.assert_allclose(table.clips[layer][row], np.sqrt(own * table.clips[layer][0]), rtol=1e-5)
    empty = clipping.table(with_row(profile, "sw", None))
    np.testing.assert_array_equal(empty.clips[layer][row], empty.clips[layer][0])
    np.testing.assert_array_equal(empty.shrinkage[layer][row], 1)
    no_sink = clipping.table(with_row(profile, "sink", None))
    np.testing.assert_array_equal(no_sink.clips[layer][4], no_sink.clips[layer][0])
    assert np.isfinite(no_sink.clip_factors[layer]).all()


def test_zero_channels_get_finite_clips(profile):
    dead = profile
    for row in profile.entries:
        dead = with_row(dead, row, np.zeros(1000))
    table = clipping.table(dead)
    for values in (*table.clips.values(), *table.clip_factors.values()):
        assert np.all(np.isfinite(values) & (values > 0))


def test_a_group_nobody_reached_is_an_error(profile):
    dead = profile
    for row in profile.entries:
        dead = with_row(dead, row, None)
    with pytest.raises(ValueError, match=r"profile: expected values in every group, got none for 'layers.q_proj.in'"):
        clipping.table(dead)


def test_checkpoint_round_trip(profile):
    table = clipping.table(profile, granularity="layer", language_objective="minimax")
    arrays, metadata = table.to_arrays()
    again = ClipTable.from_arrays(arrays, json.loads(json.dumps(metadata)))
    assert again.entries == table.entries
    assert again.language_objective == "minimax"
    for field in ("clips", "clip_factors", "shrinkage"):
        for layer, values in getattr(table, field).items():
            np.testing.assert_array_equal(getattr(again, field)[layer], values)


@pytest.mark.parametrize(
    ("tag", "row"), [("en", "en"), ("pt", "pt-BR"), ("en-GB", "en"), ("ja", "und"), ("und", "und"), ("sink", "sink")]
)
def test_entries_are_matched_by_tag(profile, tag, row):
    table = clipping.table(profile)
    assert table.entries[table.entry(tag)] == row


def test_damaged_tables_are_refused(profile):
    arrays, metadata = clipping.table(profile).to_arrays()
    name = "alpha/layers.q_proj"

    def altered(value):
        changed = arrays[name].copy()
        changed[2, 1] = value
        return {**arrays, name: changed}

    for value in (np.nan, np.inf, 0.0, -1.0):
        with pytest.raises(
            ValueError,
            match=r"clips of layer 'layers.q_proj': expected finite and positive values, got .* for 'sw', group 1",
        ):
            ClipTable.from_arrays(altered(value), metadata)
    with pytest.raises(ValueError, match=r"expected float32 \[5, groups\], got float64"):
        ClipTable.from_arrays({**arrays, name: arrays[name].astype(np.float64)}, metadata)
    with pytest.raises(ValueError, match=r"expected float32 \[5, groups\], got float32 \[4, 2\]"):
        ClipTable.from_arrays({**arrays, name: arrays[name][:4]}, metadata)
    with pytest.raises(ValueError, match="expected arrays of the same layers"):
        ClipTable.from_arrays({k: v for k, v in arrays.items() if k != name}, metadata)
    with pytest.raises(ValueError, match="expected names of alpha/, shape/ or shrinkage/"):
        ClipTable.from_arrays({**arrays, "weights": arrays[name]}, metadata)
    with pytest.raises(ValueError, match="metadata: expected 'bits'"):
        ClipTable.from_arrays(arrays, {k: v for k, v in metadata.items() if k != "bits"})
    with pytest.raises(ValueError, match="entries: expected 'und' first"):
        ClipTable.from_arrays(arrays, {**metadata, "rows": ["en", "und", "sw", "pt-BR", "sink"]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"granularity": "tensor"}, "granularity: expected one of group, layer, model, got 'tensor'"),
        ({"sharing": "all"}, "sharing: expected one of language, pooled, got 'all'"),
        ({"language_objective": "worst"}, "language_objective: expected one of"),
        ({"language_objective": "weighted"}, "language_weights: expected weights for"),
        ({"language_weights": {"en": 1.0}}, "language_weights: expected None for language_objective='mean'"),
        (
            {"language_objective": "weighted", "language_weights": {"xx": 1.0}},
            "language_weights: expected languages of the profile, got 'xx'",
        ),
        ({"language_objective": "weighted", "language_weights": {"en": -1.0}}, "none negative"),
        ({"bits": 16}, "bits: expected an integer from 2 to 8, got 16"),
        ({"codebook": "nf4"}, "codebook: expected one of"),
    ],
)
def test_bad_choices(profile, change, message):
    with pytest.raises(ValueError, match=message):
        clipping.table(profile, **change)


def test_the_pooled_clip_makes_room_for_the_distance_between_centers(profile):
    site = profile.sites[SITES[0]]
    centers = np.zeros((5, site.k), np.float32)
    centers[1, :8], centers[2, :8] = 2.0, -2.0  # en and sw in the first of two groups of 8; their mean is 0
    made = Profile(
        profile.entries, profile.sites, profile.layers, {"rotation": {"enabled": False}}, centers={SITES[0]: centers}
    )
    own, without = clipping.table(made), clipping.table(profile)
    pooled = clipping.table(made, sharing="pooled")
    power = np.mean([s**2 for s in SIGMA.values()])
    wider = np.sqrt(1 + np.mean([4.0, 4.0, 0.0]) / power)
    before = without.clips["layers.q_proj"]
    np.testing.assert_allclose(own.clips["layers.q_proj"][0], before[0] * [wider, 1], rtol=0.02)
    np.testing.assert_allclose(pooled.clips["layers.q_proj"][:4], np.tile(before[0] * [wider, 1], (4, 1)), rtol=0.02)
    np.testing.assert_array_equal(own.clips["layers.q_proj"][1:], before[1:])


def test_the_disparity_weighted_error_narrows_the_gap_by_its_penalty():
    """A larger penalty gives a smaller spread of the normalized errors under `und`'s clip, at a larger mean; weights
    shift the clip toward the language that they name.
    """
    draws = {"en": {"a.q_proj.in": normal(1)}, "sw": {"a.q_proj.in": normal(1.6)}}
    profile = synthetic_profile(draws, normal(9), values=100_000)

    def errors(**arguments):
        clips = clipping.table(profile, sharing="pooled", **arguments).clips["a.q_proj"][0, 0]
        return np.array([clipping.mse(clipping.Gaussian(s), clips) / s**2 for s in (1, 1.6)])

    under = {p: errors(language_objective="variance", penalty=p) for p in (0.0, 100.0, 1e5)}
    assert np.ptp(under[0.0]) > np.ptp(under[100.0]) > np.ptp(under[1e5])
    assert under[0.0].mean() < under[100.0].mean() < under[1e5].mean()
    np.testing.assert_allclose(under[0.0], errors(), rtol=1e-2)
    toward_en = errors(language_objective="variance", penalty=1.0, language_weights={"en": 9, "sw": 1})
    assert toward_en[0] < errors(language_objective="variance", penalty=1.0)[0]
    with pytest.raises(ValueError, match="penalty: expected a number of at least 0, got -1"):
        clipping.table(profile, language_objective="variance", penalty=-1)
    with pytest.raises(TypeError, match="language_weights: expected a mapping of languages to weights, got list"):
        clipping.table(profile, language_objective="weighted", language_weights=[1, 2])
