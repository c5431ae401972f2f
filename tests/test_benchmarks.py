"""What the benchmarks make of times: rounds, ratios within a round, shares of a limit; and when a plot is stale."""

import json
import multiprocessing
from collections import Counter
from pathlib import Path

import pytest

import la_aciq.bench
from benchmarks import bench_rounding, measure, plots, results, roofline
from benchmarks.results import Case
from tools import mutation

ROOT = Path(__file__).parent.parent

CASE = Case(
    {
        "suite": "linear",
        "dtype": "bfloat16",
        "bytes": 1000,
        "multiply_adds": 4000,
        "limit_calls": {"limit: int8": 2.0, "limit: bfloat16": 4.0},
        "times_s": {
            "la_aciq A16": [8.0, 10.0, 12.0],
            "la_aciq A8": [4.0, 4.0, 4.0],
            "peer": [16.0, 40.0],  # slow: left out of the last round
            "limit: read": [2.0, 2.0, 2.0],
            "limit: int8": [0.5, 0.5, 0.5],
            "limit: bfloat16": [1.0, 1.0, 1.5],
        },
    }
)


class Rounds:
    """Stands for pytest-benchmark."""

    def __init__(self):
        self.extra_info = {}

    def pedantic(self, function, rounds):
        for _ in range(rounds):
            function()


def test_ratios_are_taken_within_a_round():
    assert CASE.ratios("peer", "la_aciq A16") == [2, 4]
    assert CASE.ratio("peer", "la_aciq A16") == 3
    assert CASE.peers() == ["peer"]
    assert CASE.limits() == ["read", "int8", "bfloat16"]


def test_a_product_is_held_against_the_longer_of_reading_and_multiplying():
    # Reading takes 2; multiplying in int8 2 calls of 0.5, in bfloat16 4 calls of 1, 1 and 1.5.
    assert CASE.product_share("la_aciq A8") == 2 / 4
    assert CASE.product_share("la_aciq A16") == 0.5  # the median of 4 / 8, 4 / 10 and 6 / 12


def test_every_contender_runs_in_every_round(monkeypatch):
    monkeypatch.setattr(measure, "MIN_SAMPLE_S", 0)
    order = []
    contenders = {name: lambda name=name: order.append(name) for name in "abc"}
    benchmark = Rounds()
    measure.compare(benchmark, contenders, operation="none")
    case = benchmark.extra_info["case"]
    assert order[6:15] == list("abcbcacab")  # after two calls of each: the first moves on by one each round
    assert {len(times) for times in case["times_s"].values()} == {measure.MAX_ROUNDS}
    assert (case["suite"], case["operation"]) == ("streaming", "none")


def test_a_result_file_of_another_schema_is_refused():
    with pytest.raises(ValueError, match="old: expected schema 2, got 1"):
        results.from_json("old", {"schema": 1, "rows": []})


def test_a_plot_of_other_results_is_stale(tmp_path):
    some = results.from_json("some", {"schema": 2, "device": "x", "cases": []})
    other = results.from_json("other", {"schema": 2, "device": "y", "cases": []})
    for name in plots.PLOTS:
        (tmp_path / f"{name}.png").write_bytes(b"..." + plots.digest(some).encode() + b"...")
    assert plots.stale(some, tmp_path) == []
    assert len(plots.stale(other, tmp_path)) == len(plots.PLOTS)


def test_the_roofline_reads_writes_and_copies():
    if measure.optional("la_aciq._C") is None:
        pytest.skip("needs a compiler, as the core does")
    source, target = roofline.aligned(1 << 16), roofline.aligned(1 << 16)
    source.random_()
    roofline.read(source)()
    roofline.copy(source, target)()
    assert target.equal(source)
    roofline.write(target)()
    assert target[:8].tolist() == [1, 0, 0, 0, 0, 0, 0, 0]
    assert target.view(8192, 8).eq(target[:8]).all()


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("AMD EPYC", "AMD EPYC (family 25, model 17)"),  # of several generations: what a virtual machine may say
        ("AMD EPYC 9R14 96-Core Processor", "AMD EPYC 9R14 96-Core Processor"),
    ],
)
def test_a_cpu_without_a_number_is_named_by_family_and_model(tmp_path, monkeypatch, said, expected):
    cpuinfo = tmp_path / "cpuinfo"
    of_one = f"processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: {said}\nflags\t\t: fpu vme\n\n"
    cpuinfo.write_text(of_one + of_one.replace("processor\t: 0", "processor\t: 1"), encoding="utf-8")
    monkeypatch.setattr(la_aciq.bench, "_CPUINFO", cpuinfo)
    assert la_aciq.bench.cpu_name() == expected


def test_a_result_file_of_one_core_says_where_and_with_what_it_was_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(results, "cpu_name", lambda: "Some CPU 7")
    target = results.write_single_core("clip-table", [{"case": "a"}], target_s=1.0)
    assert target == tmp_path / "clip-table-some-cpu-7.json"
    content = json.loads(target.read_text("utf-8"))
    committed = json.loads((Path(results.__file__).parent / "results" / "clip-table-amd-epyc.json").read_text("utf-8"))
    assert list(content) == [name for name in committed if name not in ("layers", "languages")]
    assert list(content["versions"]) == list(committed["versions"])
    assert content["rows"] == [{"case": "a"}]


def test_the_total_of_a_model_of_8_billion_weights_is_that_of_its_shapes():
    rows = [
        {"n": n, "k": k, "times_s": {"la_aciq": [seconds, seconds, 9.0]}, "factor_s": factor}
        for (n, k), seconds, factor in [
            ((4096, 4096), 2.0, 1.5), ((1024, 4096), 0.5, 1.0), ((14336, 4096), 7.0, 1.25), ((4096, 14336), 30.0, 40.0),
        ]
    ]  # fmt: skip
    total = bench_rounding.total_8b(rows)
    assert total == {"rounding_s": 32 * (2 * 2 + 2 * 0.5 + 2 * 7 + 30), "factors_s": 32 * (3 * 1.0 + 40.0)}
    weights = 32 * sum(count * n * k for (n, k), count in bench_rounding.MATRICES_8B.items())
    assert 6.9e9 < weights < 7.1e9  # without the embedding and the head


def test_a_neighbor_is_busy_as_long_as_it_is_wanted():
    with bench_rounding.busy_neighbor():
        (neighbor,) = multiprocessing.active_children()
        assert neighbor.is_alive()
    assert not multiprocessing.active_children()


def test_every_fault_that_was_seeded_in_the_cpu_kernels_was_found():
    result = json.loads((ROOT / "benchmarks" / "results" / "mutation-cpu.json").read_text("utf-8"))
    assert {fault["fault"] for fault in result["faults"]} == {fault.name for fault in mutation.CPU}
    assert [fault["fault"] for fault in result["faults"] if fault["found_by"] == "passed"] == []
    operations = Counter(fault["fault"].partition(":")[0] for fault in result["faults"])
    assert operations.keys() >= {"quantize", "quantize_dynamic", "dequantize", "rotate", "moments", "linear"}
    assert min(operations.values()) >= 5
