"""Candidates that other programs run: servers that speak OpenAI's API, and .gguf files by llama.cpp.

llama-cpp-python is not needed: a module with the part of its interface that is used stands in for it.
"""

import sys
import types
from typing import ClassVar

import numpy as np
import pytest
import torch
from byte_llama import SENTENCES, byte_llama, byte_tokenizer, sentences
from model_server import serving

from la_aciq.errors import LaAciqError
from la_aciq.evaluation import compare
from la_aciq.evaluation.candidates import server as server_candidate

SETTINGS = {"seqlen": 200, "tokens": 500, "progress": False}
TEXTS = {tag: sentences(tag) for tag in SENTENCES}


@pytest.fixture
def server():
    """Serves other weights than those of `model_folder`."""
    with serving(byte_llama(seed=1), byte_tokenizer()) as running:
        yield running


@pytest.fixture
def compared(model_folder, tmp_path):
    """`compare` against the model's folder."""

    def compared(*names, folder=tmp_path / "out", reference=model_folder, **settings):
        return compare(str(reference), list(map(str, names)), texts=TEXTS, folder=folder, **SETTINGS | settings)

    return compared


@pytest.fixture
def local(compared, tmp_path):
    """The report of what the server serves, read by transformers."""
    byte_llama(seed=1).save_pretrained(tmp_path / "tiny")
    byte_tokenizer().save_pretrained(tmp_path / "tiny")
    return compared(tmp_path / "tiny", folder=tmp_path / "local").configurations[0]


def assert_same_losses(configuration, expected):
    for tag, result in configuration.by_language.items():
        other = expected.by_language[tag]
        assert (result.tokens, result.segments) == (other.tokens, other.segments)
        assert result.change == pytest.approx(other.change, abs=1e-5)
        assert (result.low, result.high) == pytest.approx((other.low, other.high), abs=1e-5)


@pytest.mark.parametrize("form", ["vllm", "echo", "echo 1"])
def test_a_server_gives_the_losses_of_its_model(compared, local, server, form):
    server.behavior["form"] = form
    (configuration,) = compared(server.url).configurations
    assert_same_losses(configuration, local)
    assert configuration.name == f"tiny at 127.0.0.1:{server.server_port}"
    assert configuration.bits is None
    bodies = [body for _, _, body in server.requests if body is not None]
    assert len(bodies) <= 9 + 3 + 3  # windows, the vocabulary of each language, and the forms that were tried
    if form == "vllm":
        assert {body["vllm_xargs"]["language"] for body in bodies} == set(TEXTS)


def test_a_server_as_the_reference(compared, model_folder, local, server):
    (configuration,) = compared(model_folder, reference=server.url, tokenizer=str(model_folder)).configurations
    for tag, result in configuration.by_language.items():
        assert result.change == pytest.approx(-local.by_language[tag].change, abs=1e-5)
        assert result.reference_bpb == pytest.approx(local.by_language[tag].bpb, rel=1e-5)


def test_bits_per_byte_of_a_server_whose_tokenizer_is_at_hand(compared, server, tmp_path, local):
    server.behavior["root"] = str(tmp_path / "tiny")
    by_server, by_folder = compared(server.url, tmp_path / "tiny", bits_per_byte=True).configurations
    assert_same_losses(by_server, by_folder)


def test_the_key_is_read_from_the_environment(compared, server, monkeypatch, tmp_path):
    server.behavior["key"] = "secret"
    with pytest.raises(LaAciqError, match=r"answers 401 .*: no such key; the API key is read from LA_ACIQ_API_KEY"):
        compared(server.url)
    monkeypatch.setenv(server_candidate.API_KEY, "secret")
    report = compared(server.url)
    assert "secret" not in str(report.to_dict())
    assert not any("secret" in file.read_text() for file in (tmp_path / "out").rglob("*.jsonl"))


def test_the_key_does_not_follow_a_redirect(compared, server, monkeypatch):
    monkeypatch.setenv(server_candidate.API_KEY, "secret")
    with (
        serving(byte_llama(), byte_tokenizer(), redirect=f"{server.url}/v1/models") as first,
        pytest.raises(LaAciqError, match="answers 302"),
    ):
        compared(first.url)
    assert server.requests == []


def test_a_busy_server_is_asked_again(compared, local, server, monkeypatch):
    monkeypatch.setattr(server_candidate, "_PAUSES", (0.01, 0.01, 0.01))
    server.behavior["busy"] = 2
    assert_same_losses(compared(server.url).configurations[0], local)
    server.behavior["busy"] = 100
    with pytest.raises(LaAciqError, match="answers 503 Service Unavailable: later"):
        compared(server.url, tokens=450)


@pytest.mark.parametrize(
    ("behavior", "message"),
    [
        ({"form": "none"}, "gives no log-probabilities of a prompt of token ids"),
        ({"limit": 60}, "read 60 of a window's 64 tokens: it truncates"),
        ({"max_model_len": 200}, "reads at most 199 tokens, and a window has 200"),
        ({"models": ["a", "b"]}, "serves a, b; name one: .*/v1#MODEL"),
        ({"models": []}, "serves no model"),
    ],
)
def test_what_a_server_cannot_do_is_found_before_hours_of_work(compared, server, tmp_path, behavior, message):
    server.behavior |= behavior
    with pytest.raises(LaAciqError, match=message):
        compared(server.url)
    assert list(tmp_path.rglob("*.jsonl")) == []


def test_another_model_than_the_server_has(compared, server):
    with pytest.raises(LaAciqError, match="serves tiny, and not 'large'"):
        compared(f"{server.url}#large")
    compared(f"{server.url}/v1#tiny")


def test_a_server_with_another_vocabulary(compared, server):
    class Shuffled:
        def decode(self, ids):
            return byte_tokenizer().decode([(token * 7 + 3) % 256 for token in ids])

    server.tokenizer = Shuffled()
    with pytest.raises(LaAciqError, match="another vocabulary than the tokenizer of the comparison"):
        compared(server.url)


def test_a_window_that_is_truncated_later(compared, server):
    server.behavior["limit"] = 150
    with pytest.raises(LaAciqError, match="read 150 of a window's 200 tokens: it truncates"):
        compared(server.url)
    del server.behavior["limit"]
    compared(server.url)


def test_a_log_probability_that_is_not_finite(compared, server):
    server.behavior["nan"] = True
    with pytest.raises(LaAciqError, match=r"tiny at .*: a log-probability .* the text for 'en' is no finite number"):
        compared(server.url)


def test_a_server_that_is_gone_or_serves_another_model(compared, local, server, capsys):
    name = f"{server.url}#tiny"
    first = compared(name)
    server.model = byte_llama(seed=2)
    with pytest.raises(LaAciqError, match=r"gives other losses than those in .*jsonl': another model is served"):
        compared(name)
    server.shutdown()
    server.server_close()
    again = compared(name)
    assert again.configurations == first.configurations
    assert "cannot be reached" in capsys.readouterr().err
    with pytest.raises(LaAciqError, match="cannot be reached"):
        compared(name, tokens=450)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://user:word@localhost:1", "must not hold a password; put the API key into LA_ACIQ_API_KEY"),
        ("http://", "expected a URL such as"),
        ("http://localhost:1/?key=1", "expected a URL such as"),
        ("http://[::1", "is not a URL"),
        ("http://127.0.0.1:1", "cannot be reached"),
    ],
)
def test_what_is_no_server(compared, url, message):
    with pytest.raises(LaAciqError, match=message) as refused:
        compared(url)
    assert "word" not in str(refused.value).replace("password", "")


class Llama:
    """What is used of llama_cpp.Llama, with the tiny model of other weights behind it."""

    vocabulary = byte_tokenizer()
    metadata: ClassVar = {"general.architecture": "llama", "llama.context_length": "512"}
    open_models = 0

    def __init__(
        self, model_path, *, verbose, vocab_only=False, n_ctx=512, n_batch=512, logits_all=False, n_gpu_layers=0
    ):
        with open(model_path, "rb") as file:
            if b"unknown" in file.read():
                raise ValueError(f"Failed to load model from file: {model_path}")
        assert not verbose
        assert vocab_only or (logits_all and n_batch == n_ctx and n_gpu_layers == 0)
        self._vocab_only = vocab_only
        self._model = byte_llama(seed=1)
        self.scores = np.full((n_ctx, 256), np.nan, np.single)
        self.n_tokens = 0
        Llama.open_models += 1

    def n_vocab(self):
        return 256

    def detokenize(self, tokens):
        return self.vocabulary.decode(tokens).encode()

    def reset(self):
        self.n_tokens = 0

    def eval(self, tokens):
        assert not self._vocab_only
        assert self.n_tokens == 0
        with torch.no_grad():
            self.scores[: len(tokens)] = self._model(input_ids=torch.tensor([tokens])).logits[0].numpy()
        self.n_tokens = len(tokens)

    def close(self):
        Llama.open_models -= 1


@pytest.fixture
def llama_cpp(monkeypatch):
    module = types.ModuleType("llama_cpp")
    module.Llama, module.__version__ = Llama, "0.3.0"
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    return module


@pytest.fixture
def gguf(tmp_path):
    file = tmp_path / "tiny-Q4_0.gguf"
    file.write_bytes(b"GGUF" + bytes(20))
    return file


def test_llama_cpp_runs_a_gguf_file(compared, local, llama_cpp, gguf):
    (configuration,) = compared(gguf).configurations
    assert_same_losses(configuration, local)
    assert configuration.name == "tiny-Q4_0.gguf"
    assert configuration.config == {"runtime": "llama.cpp", "file": "tiny-Q4_0.gguf"}
    assert Llama.open_models == 0


def test_a_gguf_file_as_the_reference(compared, model_folder, local, llama_cpp, gguf):
    (configuration,) = compared(model_folder, reference=gguf, tokenizer=str(model_folder)).configurations
    assert configuration.by_language["sw"].change == pytest.approx(-local.by_language["sw"].change, abs=1e-5)


def test_a_gguf_file_that_cannot_be_run(compared, llama_cpp, gguf, monkeypatch, tmp_path):
    text = tmp_path / "text.gguf"
    text.write_text("{}")
    with pytest.raises(LaAciqError, match=r"is not a \.gguf file: it does not begin with GGUF"):
        compared(text)
    monkeypatch.setitem(Llama.metadata, "llama.context_length", "128")
    with pytest.raises(LaAciqError, match=r"tiny-Q4_0\.gguf reads at most 128 tokens, and a window has 200"):
        compared(gguf)
    monkeypatch.setitem(Llama.metadata, "llama.context_length", "512")
    monkeypatch.setattr(Llama, "detokenize", lambda self, tokens: bytes(tokens[::-1]))
    with pytest.raises(LaAciqError, match="another vocabulary"):
        compared(gguf)
    monkeypatch.setattr(Llama, "n_vocab", lambda self: 32)
    with pytest.raises(LaAciqError, match="knows the token ids 0 to 31"):
        compared(gguf)
    gguf.write_bytes(b"GGUF unknown architecture")
    with pytest.raises(
        LaAciqError, match=r"cannot be loaded by llama-cpp-python 0\.3\.0, which does not know its arch"
    ):
        compared(gguf)
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(
        LaAciqError, match=r"run by llama\.cpp, which is not installed; run: pip install llama-cpp-python"
    ):
        compared(gguf)
    assert Llama.open_models == 0
    assert list(tmp_path.rglob("*.jsonl")) == []


def test_logits_of_a_gguf_file_that_are_not_finite(compared, llama_cpp, gguf, monkeypatch):
    run = Llama.eval

    def broken(self, tokens):
        run(self, tokens)
        self.scores[3] = np.nan

    monkeypatch.setattr(Llama, "eval", broken)
    with pytest.raises(LaAciqError, match=r"tiny-Q4_0\.gguf: the model's loss on the text for 'en' is not finite"):
        compared(gguf)
    assert Llama.open_models == 0
