"""`generate` of quantized models in the ways that transformers offers: each row has what it gets alone."""

import copy
import pickle

import pytest
import torch
from tiny_llama import random_texts, tiny_llama
from torch._dynamo.testing import CompileCounter
from transformers import DynamicCache, StaticCache

import la_aciq
from la_aciq import LaAciqError
from la_aciq.nn import LanguageAwareCache, LanguageAwareLinear, QuantConfig, quantize_model

IDS = torch.arange(1, 25).view(2, 12)
TAGS = ["sw", "en"]


@pytest.fixture(scope="module", params=[16, 4], ids=["kv=16", "kv=4"])
def model(request):
    """A model whose languages have clips of their own, with and without an INT4 cache."""
    return _quantized(0, kv=request.param)


def _quantized(seed, **changes):
    model = tiny_llama(seed, tie=False)
    profile = la_aciq.calibrate(model, random_texts(), seqlen=64, tokens=128, group_size=16, progress=False)
    return quantize_model(model, profile, QuantConfig(group_size=16, clip="static", **changes), progress=False)


def new_tokens(model, ids, language, count=6, **settings):
    settings = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": count} | settings
    return model.generate(ids, language=language, **settings)[:, -count:]


def test_beams_of_rows_with_padding_on_the_left(model):
    padded, mask = IDS.clone(), torch.ones_like(IDS)
    padded[0, :5] = mask[0, :5] = 0
    beams = {"num_beams": 3, "num_return_sequences": 2}
    together = new_tokens(model, padded, TAGS, attention_mask=mask, **beams)
    alone = [new_tokens(model, row, tag, **beams) for row, tag in zip((IDS[:1, 5:], IDS[1:]), TAGS, strict=True)]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(alone[0], new_tokens(model, IDS[:1, 5:], "en", **beams))  # the language matters


def test_a_conversation_goes_on_with_the_cache_of_its_first_turn(model):
    cache = DynamicCache(config=model.config)
    answer = new_tokens(model, IDS[:1], "sw", past_key_values=cache)
    turn = torch.cat([IDS[:1], answer, IDS[1:]], dim=1)
    assert cache.get_seq_length() == 12 + 6 - 1
    assert isinstance(cache, LanguageAwareCache) == (model.la_aciq.config.kv == 4)
    assert torch.equal(new_tokens(model, turn, "sw", past_key_values=cache), new_tokens(model, turn, "sw"))


def test_an_assistant_that_is_quantized_too(model):
    assistant = _quantized(1)
    expected = new_tokens(model, IDS[:1], "sw")
    assert torch.equal(new_tokens(model, IDS[:1], "sw", assistant_model=assistant), expected)


def test_a_prompt_in_chunks(model):
    assert torch.equal(new_tokens(model, IDS, TAGS, prefill_chunk_size=5), new_tokens(model, IDS, TAGS))


@pytest.mark.filterwarnings("ignore:kv = 4, but the cache of the call is a StaticCache")
def test_a_static_cache_and_a_compiled_model():
    model = _quantized(0)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = copy.deepcopy(model)
    compiled.forward = torch.compile(compiled.forward, backend=counter, fullgraph=True)
    last = {}
    for tags in (TAGS, ["th", "sw"]):
        cache = StaticCache(config=model.config, max_cache_len=20)
        dynamic = DynamicCache(config=model.config)
        with la_aciq.languages(tags), torch.no_grad():
            for begin, end in ((0, 6), *((place, place + 1) for place in range(6, 12))):
                ids = IDS[:, begin:end]
                logits = compiled(ids, past_key_values=cache, cache_position=torch.arange(begin, end)).logits
                torch.testing.assert_close(logits, model(ids, past_key_values=dynamic).logits)
        last[tags[0]] = logits
    assert not torch.equal(last["sw"], last["th"])
    assert counter.frame_count == 2  # the prompt, and a token; no more for another language or place


@pytest.mark.parametrize(
    "copied", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_continuous_batching_is_refused(model, copied):
    """Its passes pack requests in a row, in another thread: the language of each would be unknown."""
    with pytest.raises(LaAciqError, match=r"generate_batch of a quantized model: .*use `generate` with `languages`"):
        copied(model).generate_batch([[1, 2, 3], [4, 5]])
    with pytest.raises(LaAciqError, match="init_continuous_batching of a quantized model"):
        copied(model).init_continuous_batching()


def test_adapters_stay_as_they_are_and_are_not_merged(tmp_path):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(
        r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    adapted = peft.get_peft_model(tiny_llama(tie=False), settings).eval()
    profile = la_aciq.calibrate(adapted, random_texts(), seqlen=64, tokens=128, group_size=16, progress=False)
    model = quantize_model(adapted, profile, QuantConfig(group_size=16), progress=False)
    kinds = {name: type(module) for name, module in model.named_modules() if name in model.la_aciq.skipped}
    assert {name for name, reason in model.la_aciq.skipped.items() if reason == "an adapter of PEFT"} == {
        name for name in kinds if "lora_" in name
    }
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert type(layer.base_layer) is LanguageAwareLinear
    assert type(layer.lora_A["default"]) is torch.nn.Linear
    for method in ("merge_and_unload", "merge_adapter", "unload"):
        for part in (model, model.base_model):
            with pytest.raises(LaAciqError, match=f"{method} of a quantized model: adapters cannot be merged"):
                getattr(part, method)()
    with pytest.raises(LaAciqError, match="got a PeftModelForCausalLM; merge adapters before calibration"):
        la_aciq.save_quantized(model, tmp_path / "model")
    model.save_pretrained(tmp_path / "adapters")  # PEFT's: the adapters alone, for the unquantized model
    loaded = peft.PeftModel.from_pretrained(tiny_llama(tie=False), tmp_path / "adapters").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, adapted(IDS).logits)
