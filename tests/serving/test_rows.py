"""Rows of slots and tokens against plain Python: no engine."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm", reason="vLLM has its own virtual environment: make test runs these in .venv-vllm")

from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

from la_aciq.integrations.vllm.method import LaAciqConfig, check_supported
from la_aciq.integrations.vllm.requests import LanguageProcessor
from la_aciq.integrations.vllm.rows import ServedRows
from la_aciq.nn.forward_pass import LanguageState

ROWS = ("und", "en", "sw", "th", "sink")
SLOTS = 8


def served_rows(rows=ROWS):
    scheduler = SimpleNamespace(max_num_batched_tokens=64, max_num_seqs=SLOTS)
    config = SimpleNamespace(
        scheduler_config=scheduler, compilation_config=SimpleNamespace(max_cudagraph_capture_size=None)
    )
    return ServedRows(LanguageState(rows), config, torch.device("cpu"))


@settings(deadline=None, max_examples=100)
@given(
    steps=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=SLOTS)
    | st.lists(st.tuples(st.just(1), st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=SLOTS),
    padding=st.integers(0, 5),
    sink=st.booleans(),
)
def test_rows_of_tokens(steps, padding, sink):
    """steps: per request its tokens in this step, those before it, and its row; some requests have none."""
    rows = served_rows(ROWS if sink else ROWS[:-1])
    rows.host_slots[: len(steps)] = [row for _, _, row in steps]
    rows.publish()
    expected = []
    for count, before, row in steps:
        expected += [4 if sink and before + i == 0 else row for i in range(count)]
    starts = torch.tensor(np.cumsum([0] + [count for count, _, _ in steps]), dtype=torch.int32)
    lengths = torch.tensor([count + before for count, before, _ in steps], dtype=torch.int32)
    rows.tokens.fill_(-1)
    rows.begin(starts, lengths, len(expected) + padding, max(count for count, _, _ in steps))
    assert rows.tokens[: len(expected)].tolist() == expected
    # Padding of a graph may have any row that exists; what lies behind is not touched.
    assert set(rows.tokens[len(expected) : len(expected) + padding].tolist()) <= set(range(len(rows.rows)))
    assert set(rows.tokens[len(expected) + padding :].tolist()) <= {-1}
    assert rows.ids_for(torch.zeros(len(expected), 3)).tolist() == expected


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_slots_follow_the_batch(data):
    """Requests leave, join and are moved as in vLLM's batch: gaps are filled from the end, slots are swapped."""
    processor = LanguageProcessor.__new__(LanguageProcessor)
    processor._rows = served_rows()
    processor._config = SimpleNamespace(row=lambda tag: ROWS.index(tag))
    batch = []  # tags by slot: the model of what vLLM holds
    for _ in range(6):
        removed = [slot for slot in range(len(batch)) if data.draw(st.booleans())]
        free = sorted(removed)
        slots = {slot: tag for slot, tag in enumerate(batch) if slot not in removed}
        new = data.draw(st.lists(st.sampled_from(ROWS[:-1]), max_size=SLOTS - len(slots)))
        added = []
        for tag in new:
            slot = free.pop(0) if free else max([*slots, -1]) + 1
            slots[slot] = tag
            extra = None if tag == "und" else {"language": tag}
            added.append((slot, SamplingParams(extra_args=extra), None, []))
        moved = []
        while free and free[0] < max([*slots, -1]):
            last, gap = max(slots), free.pop(0)
            slots[gap] = slots.pop(last)
            moved.append((last, gap, MoveDirectionality.UNIDIRECTIONAL))
        for _ in range(data.draw(st.integers(0, 3)) if len(slots) > 1 else 0):
            one, other = data.draw(st.lists(st.integers(0, len(slots) - 1), min_size=2, max_size=2, unique=True))
            slots[one], slots[other] = slots[other], slots[one]
            moved.append((one, other, MoveDirectionality.SWAP))
        batch = [slots[slot] for slot in range(len(slots))]
        processor.update_state(BatchUpdate(len(batch), removed=removed, added=added, moved=moved))
        assert [ROWS[row] for row in processor._rows.slots[: len(batch)].tolist()] == batch
    before = processor._rows.slots.clone()
    processor.update_state(None)
    assert torch.equal(processor._rows.slots, before)


def test_tensors_stay_where_they_are():
    """CUDA graphs read the addresses they were captured with."""
    rows = served_rows()
    addresses = rows.slots.data_ptr(), rows.tokens.data_ptr()
    rows.host_slots[0] = 2
    rows.publish()
    rows.begin(torch.tensor([0, 4], dtype=torch.int32), torch.tensor([9], dtype=torch.int32), 4, 4)
    assert (rows.slots.data_ptr(), rows.tokens.data_ptr()) == addresses
    assert rows.tokens[:4].tolist() == [2] * 4


def configuration(kv=16):
    """A vLLM configuration that is supported, as far as `check_supported` looks at it."""
    parallel = SimpleNamespace(
        pipeline_parallel_size=1,
        decode_context_parallel_size=1,
        prefill_context_parallel_size=1,
        enable_dbo=False,
    )
    engine = SimpleNamespace(
        speculative_config=None,
        use_v2_model_runner=False,
        model_config=SimpleNamespace(runner_type="generate", is_encoder_decoder=False, enforce_eager=True),
        parallel_config=parallel,
        kv_transfer_config=None,
    )
    return engine, SimpleNamespace(done=SimpleNamespace(config=SimpleNamespace(kv=kv)))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda engine: setattr(engine, "speculative_config", object()), "speculative decoding"),
        (lambda engine: setattr(engine, "use_v2_model_runner", True), "V2 model runner"),
        (lambda engine: setattr(engine.model_config, "runner_type", "pooling"), "pooling"),
        (lambda engine: setattr(engine.parallel_config, "pipeline_parallel_size", 2), "pipeline parallelism"),
        (lambda engine: setattr(engine.parallel_config, "enable_dbo", True), "overlapping"),
        (lambda engine: setattr(engine, "kv_transfer_config", object()), "transfer"),
        (lambda engine: setattr(engine.model_config, "enforce_eager", False), "eager"),
    ],
)
def test_what_would_drop_the_language_is_refused(change, named):
    engine, config = configuration()
    check_supported(engine, config)
    change(engine)
    with pytest.raises(Exception, match=named):
        check_supported(engine, config)


def test_an_int4_cache_is_refused():
    engine, config = configuration(kv=4)
    with pytest.raises(Exception, match="kv_bits 16"):
        check_supported(engine, config)


def test_other_models_keep_their_key(monkeypatch):
    """In a process without a model of ours, "language" is anybody's extra argument."""
    monkeypatch.setattr(LaAciqConfig, "in_use", False)
    LanguageProcessor.validate_params(SamplingParams(extra_args={"language": 5}))
