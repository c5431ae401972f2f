"""Any candidates against a reference: losses as `evaluate` has them, on disk, and taken up again."""

import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from byte_llama import SENTENCES, byte_llama, byte_tokenizer, sentences
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import la_aciq
from la_aciq.calibration import Window
from la_aciq.checkpoint import load_quantized, save_quantized
from la_aciq.errors import LaAciqError
from la_aciq.evaluation import candidates, compare, evaluate
from la_aciq.evaluation.candidates import transformers as transformers_candidate
from la_aciq.evaluation.held_out import Reading

SETTINGS = {"seqlen": 200, "tokens": 500, "progress": False}
TEXTS = {tag: sentences(tag) for tag in SENTENCES}


@pytest.fixture(scope="module")
def quantized_folder(model_folder, tmp_path_factory):
    """Of the same name whichever test asks."""
    folder = tmp_path_factory.mktemp("compare") / "int4"
    model, tokenizer = byte_llama(), byte_tokenizer()
    profile = la_aciq.calibrate(model, TEXTS, tokenizer, seqlen=32, tokens=128, group_size=10, progress=False)
    quantized = la_aciq.quantize_model(model, profile, la_aciq.QuantConfig(group_size=10), progress=False)
    save_quantized(quantized, folder, tokenizer)
    return folder


@pytest.fixture
def compared(model_folder, quantized_folder, tmp_path):
    """`compare` with these two models by default, into one folder."""

    def compared(*names, folder=tmp_path / "out", texts=TEXTS, **settings):
        return compare(
            str(model_folder), list(map(str, names or [quantized_folder])), texts=texts, folder=folder,
            **SETTINGS | settings,
        )  # fmt: skip

    return compared


def content(report):
    """A report without its date."""
    return report.to_dict() | {"created": None}


def opened(monkeypatch):
    """Names of the candidates in the order in which they are loaded."""
    names = []
    load = transformers_candidate.TransformersModel.opened

    def recorded(self):
        names.append(self.name)
        return load(self)

    monkeypatch.setattr(transformers_candidate.TransformersModel, "opened", recorded)
    return names


def test_a_quantized_folder_against_its_model_is_what_evaluate_says(compared, model_folder, quantized_folder):
    report = compared()
    expected = evaluate(
        load_quantized(quantized_folder), byte_llama(), texts=TEXTS, tokenizer=byte_tokenizer(), name="int4", **SETTINGS
    )
    assert report.configurations == expected.configurations
    assert report.texts == expected.texts  # the calibration's 128 tokens are skipped
    assert report.texts["en"]["skipped"] == 128
    assert report.unit == "byte"
    assert report.model["name"] == model_folder.name


def test_another_dtype_by_hand(compared, model_folder):
    report = compared(f"{model_folder}@bfloat16", skip=0)
    (configuration,) = report.configurations
    assert configuration.name == f"{model_folder.name}@bfloat16"
    assert configuration.config == {"dtype": "bfloat16"}
    assert configuration.bits == 16
    ids = torch.tensor(byte_tokenizer()(TEXTS["en"])["input_ids"][:500])
    for model, bits in (
        (AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32), "reference_bpb"),
        (AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16), "bpb"),
    ):
        nats = 0.0
        for window in torch.split(ids, 200):
            with torch.no_grad():
                logprobs = torch.log_softmax(model(input_ids=window[None]).logits[0].double(), -1)
            nats -= logprobs[:-1].gather(-1, window[1:, None]).sum().item()
        assert getattr(configuration.by_language["en"], bits) == pytest.approx(nats / math.log(2) / 497, rel=1e-5)


def test_candidates_and_languages_are_added_later(compared, model_folder, quantized_folder, tmp_path, monkeypatch):
    names = opened(monkeypatch)
    english = {"en": TEXTS["en"]}
    compared(quantized_folder, texts=english)
    assert names == [model_folder.name, "int4"]
    compared(quantized_folder, texts=english)
    assert len(names) == 2  # everything is known
    compared(quantized_folder, f"{model_folder}@bfloat16", texts=english)
    assert names[2:] == [f"{model_folder.name}@bfloat16"]
    later = compared(quantized_folder, f"{model_folder}@bfloat16")
    assert names[3:] == [model_folder.name, "int4", f"{model_folder.name}@bfloat16"]
    at_once = compared(quantized_folder, f"{model_folder}@bfloat16", folder=tmp_path / "other")
    assert content(later) == content(at_once)


def test_one_model_is_in_memory_at_a_time(compared, model_folder, quantized_folder, monkeypatch):
    import gc
    import weakref

    loaded = []
    load = transformers_candidate.TransformersModel.opened

    def watched(self):
        gc_free = [reference() is None for reference in loaded]
        assert all(gc_free)
        context = load(self)
        enter = context.__enter__

        class Watched:
            def __enter__(self):
                model = enter()
                loaded.append(weakref.ref(model.model))
                return model

            def __exit__(self, *error):
                return context.__exit__(*error)

        return Watched()

    monkeypatch.setattr(transformers_candidate.TransformersModel, "opened", watched)
    compared(quantized_folder, f"{model_folder}@bfloat16")
    gc.collect()
    assert [reference() for reference in loaded] == [None] * 3


def test_a_run_that_fails_in_the_middle_of_a_language_goes_on(compared, tmp_path, monkeypatch):
    uninterrupted = compared(folder=tmp_path / "uninterrupted")
    read = transformers_candidate.token_losses
    windows = []

    def interrupted(model, several, tag):
        if len(windows) == 13:  # the second model is in the middle of the second language
            raise KeyboardInterrupt
        windows.append(tag)
        return read(model, several, tag)

    with monkeypatch.context() as patch:
        patch.setattr(transformers_candidate, "token_losses", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compared()
    assert windows == ["en"] * 3 + ["sw"] * 3 + ["th"] * 3 + ["en"] * 3 + ["sw"]
    again = []
    monkeypatch.setattr(
        transformers_candidate, "token_losses", lambda *arguments: again.append(arguments[2]) or read(*arguments)
    )
    assert content(compared()) == content(uninterrupted)
    assert again == ["sw"] * 2 + ["th"] * 3


KILLED = """
import os, signal, sys
from la_aciq.evaluation import compare
from la_aciq.evaluation.candidates import transformers
from la_aciq.evaluation.stored_losses import StoredLosses

write = StoredLosses.add
written = []

def add(self, key, tag, sums):
    written.append(key)
    write(self, key, tag, sums)
    if len(written) == 13:
        with self.file.open("ab") as file:
            file.write(b'{"window": "cut in the mid')
        os.kill(os.getpid(), signal.SIGKILL)

StoredLosses.add = add
sys.path[:0] = ["tests"]
from byte_llama import SENTENCES, sentences
texts = {tag: sentences(tag) for tag in SENTENCES}
compare(sys.argv[1], [sys.argv[2]], texts=texts, folder=sys.argv[3], seqlen=200, tokens=500, progress=False)
"""


def test_a_killed_run_goes_on(compared, model_folder, quantized_folder, tmp_path, monkeypatch):
    command = [sys.executable, "-c", KILLED, str(model_folder), str(quantized_folder), str(tmp_path / "out")]
    root = Path(__file__).parent.parent.parent
    killed = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    read = transformers_candidate.token_losses
    again = []
    monkeypatch.setattr(
        transformers_candidate, "token_losses", lambda *arguments: again.append(arguments[2]) or read(*arguments)
    )
    report = compared()
    assert again == ["sw"] * 2 + ["th"] * 3
    assert content(report) == content(compared(folder=tmp_path / "uninterrupted"))
    for file in (tmp_path / "out" / "losses").glob("*.jsonl"):
        assert all(json.loads(line) for line in file.read_text().splitlines())


def test_two_runs_into_one_folder(compared, tmp_path):
    code = (
        "import sys, time; from la_aciq.evaluation.stored_losses import locked_folder\n"
        "with locked_folder(sys.argv[1]): print('locked', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(LaAciqError, match="another comparison is writing into"):
            compared()
    finally:
        other.communicate("")
    compared()  # the lock ended with its process


def test_losses_of_another_model_text_or_setting_are_not_used(compared, tmp_path, monkeypatch):
    names = opened(monkeypatch)
    compared()
    for change in ({"seqlen": 150}, {"tokens": 450}, {"skip": 0}, {"texts": TEXTS | {"en": TEXTS["en"][::-1]}}):
        before = len(names)
        report = compared(**change)
        assert len(names) == before + 2, change
        assert content(report) == content(compared(folder=tmp_path / f"{list(change)}{before}", **change))
    other = tmp_path / "other" / "int4"
    byte_llama(seed=1).save_pretrained(other)
    byte_tokenizer().save_pretrained(other)
    before = len(names)
    report = compared(other)
    assert names[before:][-1] == "int4"  # of the same name as the other model
    assert report.configurations[0].config == {"dtype": "float32"}


def test_a_file_of_losses_under_another_models_name_is_refused(compared, model_folder, tmp_path):
    compared()
    first, second = sorted((tmp_path / "out" / "losses").glob("*.jsonl"))
    first.write_bytes(second.read_bytes())
    with pytest.raises(LaAciqError, match="holds the losses of another model or another format: delete the file"):
        compared()


@pytest.mark.parametrize("damage", ["{", "[1]", '{"window": "0", "nats": [NaN]}', '{"window": "0", "nats": ["1"]}'])
def test_a_damaged_file_of_losses_is_refused_by_its_line(compared, tmp_path, damage):
    compared()
    file = sorted((tmp_path / "out" / "losses").glob("*.jsonl"))[0]
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:2], damage, *lines[2:]]) + "\n")
    with pytest.raises(LaAciqError, match=rf"{file.name}' is damaged in line 3: delete the file"):
        compared()


def test_a_folder_of_something_else_is_refused(compared, tmp_path):
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(LaAciqError, match="exists and holds no losses of a comparison"):
        compared(folder=tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "report.json"]
    with pytest.raises(LaAciqError, match="is not a folder"):
        compared(folder=tmp_path / "report.json")


def test_a_loss_that_is_not_finite_names_the_model_and_loses_nothing(compared, tmp_path):
    broken = byte_llama()
    with torch.no_grad():
        thai_byte = byte_tokenizer()("ค")["input_ids"][0]  # the others do not have it
        broken.model.embed_tokens.weight[thai_byte] = float("nan")
    broken.save_pretrained(tmp_path / "broken")
    byte_tokenizer().save_pretrained(tmp_path / "broken")
    with pytest.raises(LaAciqError, match="broken: the model's loss on the text for 'th' is not finite"):
        compared(tmp_path / "broken")
    lines = [len(file.read_text().splitlines()) for file in (tmp_path / "out" / "losses").glob("*.jsonl")]
    assert sorted(lines) == [2 + 6, 2 + 9]


def shuffled_tokenizer():
    """Bytes under other ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: 255 - i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def pair_tokenizer():
    """Merges of bytes, learned on the texts: 512 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS.values(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def saved(folder, tokenizer, **changes):
    byte_llama(**changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_another_vocabulary_is_refused_before_a_model_runs(compared, tmp_path, monkeypatch):
    names = opened(monkeypatch)
    with pytest.raises(LaAciqError, match="another vocabulary than the tokenizer of the comparison; compare bits per"):
        compared(saved(tmp_path / "shuffled", shuffled_tokenizer()))
    small = byte_llama(vocab_size=100)
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(LaAciqError, match="small knows the token ids 0 to 99, and the texts have"):
        compared(tmp_path / "small")
    short = byte_llama()
    short.config.max_position_embeddings = 100
    short.save_pretrained(tmp_path / "short")
    with pytest.raises(LaAciqError, match="short reads at most 100 tokens, and a window has 200"):
        compared(tmp_path / "short")
    assert names == []


def test_bits_per_byte_of_another_tokenizer_by_hand(compared, model_folder, tmp_path):
    """The same weights under other ids of the same bytes: float32 rounding aside, another model's bits per byte."""
    shuffled = byte_llama()
    with torch.no_grad():
        shuffled.model.embed_tokens.weight.copy_(byte_llama().model.embed_tokens.weight.flip(0))
        shuffled.lm_head.weight.copy_(byte_llama().lm_head.weight.flip(0))
    shuffled.save_pretrained(tmp_path / "shuffled")
    shuffled_tokenizer().save_pretrained(tmp_path / "shuffled")
    pairs = saved(tmp_path / "pairs", pair_tokenizer(), vocab_size=512)
    report = compared(tmp_path / "shuffled", pairs, bits_per_byte=True, skip=0)
    same, other = report.configurations
    for result in same.by_language.values():
        assert result.change == pytest.approx(0, abs=1e-6)
        assert result.segments == 5
    assert same.by_language["en"].tokens == 500 - 3 * 64  # a byte each
    model, tokenizer = AutoModelForCausalLM.from_pretrained(pairs), pair_tokenizer()
    # English: one byte per character. A token over the border of the context counts with the bytes behind it.
    nats = 0.0
    for start, stop in ((0, 200), (200, 400), (400, 500)):
        encoded = tokenizer(TEXTS["en"][start:stop], return_offsets_mapping=True)
        ids = torch.tensor(encoded["input_ids"])
        with torch.no_grad():
            logprobs = torch.log_softmax(model(input_ids=ids[None]).logits[0].double(), -1)
        for place, (first, last) in enumerate(encoded["offset_mapping"]):
            if last > 64:
                share = (last - max(first, 64)) / (last - first)
                nats -= share * logprobs[place - 1, ids[place]].item()
    assert other.by_language["en"].bpb == pytest.approx(nats / math.log(2) / (500 - 3 * 64), rel=1e-5)


def test_losses_are_divided_over_bytes():
    """Five tokens of 3, 0, 2, 0 and 4 bytes after one of 2 that is not predicted; borders at 4 and 9 of 11 bytes."""
    window = Window(np.arange(6), np.array([3, 0, 2, 0, 4]))
    reading = Reading(window, np.array([4, 9, 11]), 11)
    sums = reading.sums(np.array([3.0, 0.5, 4.0, 0.25, 8.0]))
    # The first token's third byte begins at 4; the empty ones go with the token before them.
    assert sums == pytest.approx([3.5 / 3 + 4.25 + 4.0, 4.0])
    empty_first = Reading(Window(np.arange(3), np.array([0, 4])), np.array([2, 4]), 4)
    assert empty_first.sums(np.array([1.0, 2.0])) == pytest.approx([1.5])


def test_what_names_no_model(compared, tmp_path):
    with pytest.raises(LaAciqError, match="is given twice"):
        compared("a", "a")
    with pytest.raises(LaAciqError, match="does not exist"):
        compared(tmp_path / "nowhere")
    with pytest.raises(LaAciqError, match=r"does not exist; expected a \.gguf file"):
        compared(tmp_path / "nowhere.gguf")
    with pytest.raises(LaAciqError, match="candidates is empty"):
        compare("a", [], texts=TEXTS, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_folders_of_one_name_have_their_paths_in_the_report(model_folder, tmp_path):
    first, second = (saved(tmp_path / name / "model", byte_tokenizer()) for name in ("a", "b"))
    names = [candidate.name for candidate in candidates.parse([str(first), str(second), str(model_folder)])]
    assert names == [str(first), str(second), model_folder.name]
