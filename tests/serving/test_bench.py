"""`la-aciq bench serve` without a server: what is asked, and what is made of the answers. test_server.py has a run."""

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="vLLM has its own virtual environment: make test runs these in .venv-vllm")

from la_aciq.bench import data_plane, serve
from la_aciq.errors import LaAciqError

LOAD = serve.Load(num_prompts=6, input_len=4, output_len=2, max_concurrency=3)
TOKENIZER = SimpleNamespace(encode=lambda text, add_special_tokens: [ord(letter) for letter in text])


def texts(length):
    return {tag: "".join(chr(start + i) for i in range(length)) for tag, start in (("en", 1000), ("sw", 5000))}


def test_prompts_are_tagged_and_never_asked_twice():
    warm_up, prompts = serve._prompts(TOKENIZER, texts(100), LOAD)
    assert {language: len(requests) for language, requests in prompts.items()} == {"en": 6, "sw": 6, "mixed": 6}
    everything = [*warm_up, *(request for requests in prompts.values() for request in requests)]
    assert len({tuple(request.prompt) for request in everything}) == len(everything)
    for request in everything:
        assert request.prompt_len == len(request.prompt) == 4
        assert request.request_overrides == {"vllm_xargs": {"language": "en" if request.prompt[0] < 5000 else "sw"}}
    assert [request.prompt[0] < 5000 for request in prompts["mixed"]] == [True, False] * 3
    assert all(request.prompt[0] < 5000 for request in prompts["en"])


def test_too_little_text_is_refused():
    with pytest.raises(LaAciqError, match="'en' has 20 tokens, and 11 prompts of 4 tokens each need 44"):
        serve._prompts(TOKENIZER, texts(20), LOAD)


def test_what_a_folder_holds(served_folder, tmp_path):
    assert serve.contender(str(served_folder)) == serve.Contender("la_aciq W4A4 absmax", str(served_folder), True)
    for content, name in (
        ({"dtype": "bfloat16"}, "vLLM bfloat16"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "vLLM compressed-tensors"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(content))
        assert serve.contender(str(tmp_path)) == serve.Contender(name, str(tmp_path), False)
    for broken in ("[]", "{"):
        (tmp_path / "config.json").write_text(broken)
        with pytest.raises(LaAciqError, match="not the folder of a model"):
            serve.contender(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(LaAciqError, match="is not a model quantized by LA-ACIQ"):
        serve.measure([str(tmp_path)], {}, LOAD)


def test_the_tables_show_what_was_measured():
    numbers = {f"p{p}_{metric}_ms": 10.0 * i + p for i, metric in enumerate(serve.METRICS) for p in serve.PERCENTILES}
    runs = [{"name": "one", "language": tag, "output_throughput": 7.4} | numbers for tag in ("mixed", "sw")]
    lines = serve.table({"runs": runs, "languages": ["sw"], "failed": {"two": "no kernel"}}).splitlines()
    assert lines[2] == "| one | sw | 50 | 95 | 99 | 60 | 105 | 109 | 70 | 115 | 119 | 80 | 125 | 129 | 7 |"
    assert [line.split(" | ")[1] for line in lines[2:4]] == ["sw", "mixed"]
    assert lines[-1] == "two was not measured: no kernel"
    cost = {
        "requests": 8,
        "step_ms": 14.5,
        "fixed_step_ms": 14.0,
        "cost": 0.03571,
        "cost_low": -0.01,
        "cost_high": 0.05,
    }
    assert data_plane.table({"batches": [cost | {"writing": 0.00214}]}).splitlines()[2] == (
        "| 8 | 14.50 | 14.00 | +3.6% [-1.0%, +5.0%] | 0.21% |"
    )
