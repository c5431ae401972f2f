"""Profiles: merging, tail sums, and what is on disk."""

import dataclasses
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from byte_llama import byte_llama
from safetensors.numpy import load_file, save_file

import la_aciq
from la_aciq.errors import LaAciqError
from la_aciq.ops.streaming import HISTOGRAM_BINS, Moments, histogram_edges
from la_aciq.profile import Profile, SiteStats
from la_aciq.profile.profile import _checksum


def ids(seed, n=120):
    return np.random.default_rng(seed).integers(0, 256, n)


def calibrated(texts, **changes):
    settings = {"seqlen": 30, "tokens": 90, "group_size": 16, "center": False, "progress": False} | changes
    return la_aciq.calibrate(byte_llama(), texts, **settings)


@pytest.fixture(scope="module")
def profile():
    return calibrated({"en": ids(0), "sw": ids(1), "th": ids(2)})


@pytest.fixture
def saved(profile, tmp_path):
    profile.save(tmp_path / "profile")
    return tmp_path / "profile"


def assert_same(a, b, exact=True):
    """The same rows with the same statistics, in whatever order the rows are."""
    assert set(a.entries) == set(b.entries)
    assert a.layers == b.layers
    assert list(a.sites) == list(b.sites)
    for row in a.entries:
        for name, own in a.entry(row).items():
            other = b.entry(row)[name]
            np.testing.assert_array_equal(own.histogram, other.histogram)
            if exact:
                np.testing.assert_array_equal(own.state, other.state)
            else:
                np.testing.assert_allclose(own.state, other.state, rtol=1e-9, atol=1e-9)


class TestMerging:
    def test_languages_measured_apart_are_those_measured_together(self, profile):
        parts = [calibrated({tag: ids(seed)}) for seed, tag in enumerate(("en", "sw", "th"))]
        merged = Profile.merge(*parts)
        assert merged.entries == profile.entries
        assert_same(merged, profile, exact=False)
        assert merged.metadata["tokens"] == profile.metadata["tokens"]
        assert merged.metadata["texts"] == profile.metadata["texts"]

    def test_order_does_not_matter(self):
        parts = [calibrated({tag: ids(seed)}) for seed, tag in enumerate(("en", "sw", "en"))]
        first, *others = [Profile.merge(*order) for order in itertools.permutations(parts)]
        for other in others:
            assert_same(first, other, exact=False)
            assert other.metadata["texts"] == first.metadata["texts"]

    def test_two_texts_of_one_language_are_one_longer_text(self):
        a, b = ids(0, 90), ids(1, 90)
        merged = Profile.merge(calibrated({"sw": a}), calibrated({"sw": b}))
        whole = calibrated({"sw": np.concatenate([a, b])}, tokens=180)
        assert_same(merged, whole, exact=False)
        assert merged.metadata["tokens"] == {"sw": 180}

    def test_centers_of_one_language_are_averaged(self):
        a, b = ids(0, 90), ids(1, 90)
        parts = [calibrated({"sw": a}, center=True), calibrated({"sw": b, "en": a}, center=True)]
        whole = calibrated({"sw": np.concatenate([a, b]), "en": a}, tokens=180 // 2, center=True)
        merged = Profile.merge(*parts)
        assert merged.entries == whole.entries
        for site, center in merged.centers.items():
            mean = (parts[0].centers[site][1] + parts[1].centers[site][1]) / 2
            np.testing.assert_allclose(center[1], mean, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(center[2], whole.centers[site][2], rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(center[0], (center[1] + center[2]) / 2, rtol=1e-5, atol=1e-6)
        with pytest.raises(LaAciqError, match="different center cannot be merged"):
            Profile.merge(parts[0], calibrated({"en": a}))

    def test_centers_come_back_from_disk_and_must_fit(self, tmp_path):
        made = calibrated({"en": ids(0), "sw": ids(1)}, center=True)
        made.save(tmp_path / "profile")
        loaded = Profile.load(tmp_path / "profile")
        assert loaded.centers.keys() == made.centers.keys()
        assert all(np.array_equal(loaded.centers[site], made.centers[site]) for site in made.centers)
        site = next(iter(made.centers))
        for bad in (made.centers[site][:, 1:], np.full_like(made.centers[site], np.nan)):
            dataclasses.replace(made, centers=made.centers | {site: bad}).save(tmp_path / "bad", force=True)
            with pytest.raises(LaAciqError, match=r"not consistent.*center"):
                Profile.load(tmp_path / "bad")

    def test_profiles_of_different_things_do_not_merge(self, profile):
        for changes, what in (({"seed": 1}, "rotation"), ({"ignore": ["lm_head", "q_proj"]}, "ignore")):
            with pytest.raises(LaAciqError, match=f"different {what} cannot be merged"):
                Profile.merge(profile, calibrated({"en": ids(0)}, **changes))
        with pytest.raises(ValueError, match="at least one"):
            Profile.merge()


@pytest.fixture(scope="module")
def sample():
    return np.abs(np.random.default_rng(3).laplace(size=(2, 3, 20000))).astype(np.float32)


@pytest.fixture(scope="module")
def site(sample):
    group = np.arange(6, dtype=np.int32).reshape(2, 3)
    m = la_aciq.moments(sample, torch.from_numpy(group), 6, histogram=True)
    return SiteStats(
        "input", "o_proj", 3, 1, Moments.from_state(m.state.reshape(2, 3, -1), m.histogram.reshape(2, 3, -1, 2))
    )


class TestTailSums:
    @pytest.mark.parametrize("bin_", [1, 100, 120, 129, 140, 160])
    def test_exact_at_the_edges(self, sample, site, bin_):
        alpha = histogram_edges()[bin_]
        count, total = site.tail_sums(alpha)
        beyond = sample >= alpha  # an element on the edge adds nothing to E(|x| - alpha)+ either way
        np.testing.assert_array_equal(count, beyond.sum(-1))
        np.testing.assert_allclose(total, np.where(beyond, sample.astype(np.float64), 0).sum(-1), rtol=1e-12, atol=1e-9)

    def test_close_inside_a_bin(self, sample, site):
        alpha = np.array([[0.013, 0.51, 1.3], [2.22, 3.14159, 5.0]])
        count, total = site.tail_sums(alpha)
        beyond = sample > alpha[..., None]
        np.testing.assert_allclose(count, beyond.sum(-1), rtol=0.02, atol=5)
        np.testing.assert_allclose(total, np.where(beyond, sample, 0).sum(-1), rtol=0.02, atol=20)

    def test_falling_in_alpha_and_zero_past_the_largest(self, site):
        alphas = np.geomspace(1e-6, 1e4, 500)
        counts, totals = (np.array(a) for a in zip(*(site.tail_sums(alpha) for alpha in alphas), strict=True))
        assert (np.diff(counts, axis=0) <= 1e-9).all()
        assert (np.diff(totals, axis=0) <= 1e-6).all()
        assert (counts[-1] == 0).all()
        assert (totals >= counts * alphas[:, None, None] * (1 - 1e-12)).all()

    @pytest.mark.parametrize("alpha", [-1.0, float("nan")])
    def test_what_is_not_a_clip(self, site, alpha):
        with pytest.raises(ValueError, match="alpha: expected clips of at least 0"):
            site.tail_sums(alpha)


class TestOnDisk:
    def test_what_was_saved_is_loaded_bit_for_bit(self, profile, saved):
        loaded = Profile.load(saved)
        assert_same(loaded, profile)
        assert (loaded.entries, loaded.metadata) == (profile.entries, profile.metadata)
        assert sorted(path.name for path in saved.iterdir()) == [
            "profile.json",
            "profile.safetensors",
            "second_moments.safetensors",
        ]

    def test_histograms_are_cut_to_what_they_hold(self, profile, saved):
        window = load_file(saved / "profile.safetensors")["model.layers.0.mlp.down_proj.histogram"]
        used = np.flatnonzero(profile.sites["model.layers.0.mlp.down_proj"].histogram[..., 0].any((0, 1)))
        assert window.shape[2] == used[-1] - used[0] + 1 < HISTOGRAM_BINS

    def test_an_existing_folder_is_kept_unless_forced(self, profile, saved):
        before = (saved / "profile.json").read_bytes()
        with pytest.raises(LaAciqError, match="exists"):
            profile.save(saved)
        other = calibrated({"en": ids(5)})
        other.save(saved, force=True)
        assert (saved / "profile.json").read_bytes() != before
        assert_same(Profile.load(saved), other)

    def test_a_failing_save_leaves_nothing(self, profile, tmp_path):
        broken = Profile(profile.entries, profile.sites, profile.layers, {"metadata": object()})
        with pytest.raises(TypeError):
            broken.save(tmp_path / "profile")
        assert list(tmp_path.iterdir()) == []

    def test_another_models_profile(self, profile):
        with pytest.raises(LaAciqError, match="measured on another model: its fingerprint is"):
            profile.check_fingerprint("0" * 64)
        profile.check_fingerprint(profile.metadata["fingerprint"])

    def test_loading_needs_no_torch(self, saved):
        code = "import sys, la_aciq; la_aciq.Profile.load(sys.argv[1]); print('torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code, saved], capture_output=True, text=True, check=True)
        assert done.stdout == "False\n"


class TestRefusedOnLoad:
    """Each with one sentence that names the folder or file."""

    @staticmethod
    def refused(folder, message):
        with pytest.raises(LaAciqError, match=message) as error:
            Profile.load(folder)
        assert "\n" not in str(error.value)

    def test_no_folder(self, tmp_path):
        self.refused(tmp_path / "nowhere", "is not a profile folder: No such file")

    @pytest.mark.parametrize("name", ["profile.json", "profile.safetensors"])
    def test_a_missing_file(self, saved, name):
        (saved / name).unlink()
        self.refused(saved, f"is not a profile folder: No such file or directory: .*{name}")

    @pytest.mark.parametrize("keep", [0, 7, 100, 0.5, -1])
    def test_a_truncated_tensor_file(self, saved, keep):
        file = saved / "profile.safetensors"
        data = file.read_bytes()
        file.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
        self.refused(saved, "does not match its checksum")

    @pytest.mark.parametrize("position", [200, 0.3, -1])
    def test_an_edited_byte_of_the_tensors(self, saved, position):
        file = saved / "profile.safetensors"
        data = bytearray(file.read_bytes())
        data[int(len(data) * position) if isinstance(position, float) else position] ^= 1
        file.write_bytes(data)
        self.refused(saved, "does not match its checksum")

    def test_edited_settings(self, saved):
        file = saved / "profile.json"
        text = file.read_text()
        assert '"seed": 0' in text
        file.write_text(text.replace('"seed": 0', '"seed": 1'))
        self.refused(saved, "does not match its checksum")

    def test_a_truncated_description(self, saved):
        file = saved / "profile.json"
        file.write_bytes(file.read_bytes()[:-20])
        self.refused(saved, "is not JSON")

    @pytest.mark.parametrize("content", ["[]", "{}", '{"format": "something else"}'])
    def test_another_json_file(self, saved, content):
        (saved / "profile.json").write_text(content)
        self.refused(saved, "does not describe a LA-ACIQ profile")

    def test_another_schema(self, saved):
        description = json.loads((saved / "profile.json").read_text())
        (saved / "profile.json").write_text(json.dumps({**description, "schema": 2}))
        self.refused(saved, "has schema 2; this version of la-aciq reads schema 1")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t, s: t.pop(f"{s}.state"), "is missing or belongs to no site"),
            (lambda t, s: t.update(extra=np.zeros(1)), "'extra' is missing or belongs to no site"),
            (lambda t, s: t.update({f"{s}.state": t[f"{s}.state"][:-1].copy()}), r"expected float64 \[5, 7, 8\]"),
            (lambda t, s: t.update({f"{s}.state": t[f"{s}.state"].astype(np.float32)}), "is float32"),
            (lambda t, s: t[f"{s}.state"].__setitem__((0, 0, 1), np.nan), "not those of finite data"),
            (lambda t, s: t[f"{s}.state"].__setitem__((0, 0, 2), -1.0), "not those of finite data"),
            (lambda t, s: t[f"{s}.histogram"].__setitem__((0, 0, 0, 0), 10**6), "does not add up to its counts"),
        ],
    )
    def test_tensors_that_contradict_themselves_under_a_valid_checksum(self, profile, saved, change, message):
        from la_aciq.profile.profile import _checksum

        tensors = load_file(saved / "profile.safetensors")
        change(tensors, "model.layers.0.mlp.down_proj")
        save_file(tensors, saved / "profile.safetensors")
        description = json.loads((saved / "profile.json").read_text())
        description.pop("checksum")
        description["checksum"] = _checksum(description, (saved / "profile.safetensors").read_bytes())
        (saved / "profile.json").write_text(json.dumps(description))
        self.refused(saved, f"is not consistent: .*{message}")


def test_the_old_names_of_entries_work_and_say_the_new_ones():
    profile = calibrated({"en": ids(0), "sw": ids(1)})
    with pytest.warns(DeprecationWarning, match=r"Profile\.rows is now Profile\.entries"):
        assert profile.rows == profile.entries == ("und", "en", "sw", "sink")
    with pytest.warns(DeprecationWarning, match=r"Profile\.row is now Profile\.entry"):
        assert profile.row("sw").keys() == profile.entry("sw").keys()


def test_a_folder_says_which_version_wrote_it(tmp_path):
    import la_aciq

    calibrated({"en": ids(0)}).save(tmp_path / "profile")
    assert (
        json.loads((tmp_path / "profile" / "profile.json").read_text())["written_by"]
        == f"la-aciq {la_aciq.__version__}"
    )


def test_a_folder_of_0_1_loads(tmp_path):
    """It does not say who wrote it."""
    profile = calibrated({"en": ids(0)})
    profile.save(tmp_path / "profile")
    file = tmp_path / "profile" / "profile.json"
    description = json.loads(file.read_text())
    del description["written_by"], description["checksum"]
    tensors = (tmp_path / "profile" / "profile.safetensors").read_bytes()
    description["checksum"] = _checksum(description, tensors)
    file.write_text(json.dumps(description))
    assert Profile.load(tmp_path / "profile").entries == profile.entries
