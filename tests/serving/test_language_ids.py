"""The language ids of slots and tokens against plain Python: no engine."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm", reason="vLLM has its own virtual environment: make test runs these in .venv-vllm")

from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

from la_aciq.integrations.vllm.language_ids import BatchLanguageIds
from la_aciq.integrations.vllm.method import LaAciqVllmConfig
from la_aciq.integrations.vllm.requests import LanguageProcessor

ENTRIES = ("und", "en", "sw", "th", "sink")
SLOTS = 8


def language_ids(entries=ENTRIES):
    scheduler = SimpleNamespace(max_num_batched_tokens=64, max_num_seqs=SLOTS)
    config = SimpleNamespace(
        scheduler_config=scheduler, compilation_config=SimpleNamespace(max_cudagraph_capture_size=None)
    )
    return BatchLanguageIds(entries, config, torch.device("cpu"))


@settings(deadline=None, max_examples=100)
@given(
    steps=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=SLOTS)
    | st.lists(st.tuples(st.just(1), st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=SLOTS),
    padding=st.integers(0, 5),
    sink=st.booleans(),
)
def test_language_ids_of_tokens(steps, padding, sink):
    """steps: per request its tokens in this step, those before it, and its language id; some requests have none."""
    ids = language_ids(ENTRIES if sink else ENTRIES[:-1])
    ids.host_slot_ids[: len(steps)] = [language_id for _, _, language_id in steps]
    ids.publish()
    expected = []
    for count, before, language_id in steps:
        expected += [4 if sink and before + i == 0 else language_id for i in range(count)]
    starts = torch.tensor(np.cumsum([0] + [count for count, _, _ in steps]), dtype=torch.int32)
    lengths = torch.tensor([count + before for count, before, _ in steps], dtype=torch.int32)
    ids.token_language_ids.fill_(-1)
    ids.begin(starts, lengths, len(expected) + padding)
    assert ids.token_language_ids[: len(expected)].tolist() == expected
    # Padding of a graph may have any id that exists; what lies behind is not touched.
    assert set(ids.token_language_ids[len(expected) : len(expected) + padding].tolist()) <= set(range(len(ids.entries)))
    assert set(ids.token_language_ids[len(expected) + padding :].tolist()) <= {-1}
    padded = torch.zeros(len(expected) + padding, 3)
    assert ids.ids_for(padded)[: len(expected)].tolist() == expected


@pytest.mark.parametrize("shape", [(3, 8), (1, 4, 8), (8,)])
def test_inputs_whose_rows_are_not_the_tokens_of_the_step_are_refused(shape):
    """As those of transformers' layout [1, tokens, K], or of a layer that sees the last tokens only."""
    ids = language_ids()
    ids.begin(torch.tensor([0, 4], dtype=torch.int32), torch.tensor([9], dtype=torch.int32), 4)
    assert ids.ids_for(torch.zeros(4, 8)).shape == (4,)
    with pytest.raises(RuntimeError, match="language of each of its rows is unknown"):
        ids.ids_for(torch.zeros(shape))


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_slots_follow_the_batch(data):
    """Requests leave, join and are moved as in vLLM's batch: gaps are filled from the end, slots are swapped."""
    processor = LanguageProcessor.__new__(LanguageProcessor)
    processor._language_ids = language_ids()
    processor._config = SimpleNamespace(language_id=ENTRIES.index)
    batch = []  # tags by slot: the model of what vLLM holds
    for _ in range(6):
        removed = [slot for slot in range(len(batch)) if data.draw(st.booleans())]
        free = sorted(removed)
        slots = {slot: tag for slot, tag in enumerate(batch) if slot not in removed}
        new = data.draw(st.lists(st.sampled_from(ENTRIES[:-1]), max_size=SLOTS - len(slots)))
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
        assert [ENTRIES[i] for i in processor._language_ids.slot_ids[: len(batch)].tolist()] == batch
    before = processor._language_ids.slot_ids.clone()
    processor.update_state(None)
    assert torch.equal(processor._language_ids.slot_ids, before)


def test_tensors_stay_where_they_are():
    """CUDA graphs read the addresses they were captured with."""
    ids = language_ids()
    addresses = ids.slot_ids.data_ptr(), ids.token_language_ids.data_ptr()
    ids.host_slot_ids[0] = 2
    ids.publish()
    ids.begin(torch.tensor([0, 4], dtype=torch.int32), torch.tensor([9], dtype=torch.int32), 4)
    assert (ids.slot_ids.data_ptr(), ids.token_language_ids.data_ptr()) == addresses
    assert ids.token_language_ids[:4].tolist() == [2] * 4


def test_other_models_keep_their_key(monkeypatch):
    """In a process without a model of ours, "language" is anybody's extra argument."""
    monkeypatch.setattr(LaAciqVllmConfig, "in_use", False)
    LanguageProcessor.validate_params(SamplingParams(extra_args={"language": 5}))
