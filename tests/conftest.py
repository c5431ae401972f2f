"""What several areas of the tests share: a tiny model as a folder, texts as a folder, and the embedded model."""

from pathlib import Path

import pytest
from byte_llama import SENTENCES, byte_llama, byte_tokenizer, sentences

# Files that take ten seconds or more, by `pytest --durations=0`; `make check` leaves them to `make test`.
THOROUGH = [
    "test_docs.py",
    "test_embedded.py",
    "test_packaging.py",
    "calibration/test_calibrate.py",
    "calibration/test_distributed.py",
    "checkpoint/test_checkpoint.py",
    "cli/test_bad_input.py",
    "cli/test_commands.py",
    "cli/test_compare_command.py",
    "cli/test_interruption.py",
    "clipping/test_laws.py",
    "clipping/test_optimal.py",
    "cuda/test_compile.py",
    "cuda/test_emulation.py",
    "cuda/test_operations.py",
    "evaluation/test_candidates.py",
    "evaluation/test_compare.py",
    "evaluation/test_embedded_quality.py",
    "evaluation/test_measure.py",
    "integrations/test_compressed_tensors.py",
    "integrations/test_families.py",
    "integrations/test_transformers.py",
    "kernels/test_codes.py",
    "kernels/test_compile_record.py",
    "kernels/test_linear.py",
    "kernels/test_moments.py",
    "kernels/test_tracing.py",
    "nn/test_first_token.py",
    "nn/test_joined.py",
    "nn/test_layout.py",
    "nn/test_quantize_model.py",
    "nn/test_saving.py",
    "ops/test_fuzz.py",
    "ops/test_integration.py",
    "survey/test_survey.py",
    "test_site.py",
]


def pytest_collection_modifyitems(items):
    folder = Path(__file__).parent
    thorough = {folder / name for name in THOROUGH}
    for item in items:
        if item.path not in thorough:
            item.add_marker("fast")


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
