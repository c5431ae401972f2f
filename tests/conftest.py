"""What several areas of the tests share: a tiny model as a folder, texts as a folder, and the embedded model."""

import pytest
from byte_llama import SENTENCES, byte_llama, byte_tokenizer, sentences


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A folder as save_pretrained writes it: the random Llama over bytes and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    byte_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def texts_folder(tmp_path_factory):
    """en.txt, sw.txt and th.txt."""
    folder = tmp_path_factory.mktemp("texts")
    for tag in SENTENCES:
        (folder / f"{tag}.txt").write_text(sentences(tag), "utf-8")
    return folder


@pytest.fixture(scope="session")
def embedded_model():
    """The embedded model and its tokenizer; tests that use it are marked `model`."""
    pytest.importorskip("gguf")
    from la_aciq import embedded
    from la_aciq.errors import LaAciqError

    try:
        return embedded.load_model()
    except LaAciqError as missing:
        pytest.skip(str(missing))
