"""`layer.weight` of a quantized layer: what code around a linear layer reads of it."""

import copy
import pickle

import pytest
import torch
from tiny_llama import random_texts, tiny_llama
from torch import nn
from transformers import NllbMoeConfig, NllbMoeForConditionalGeneration

import la_aciq
from la_aciq.nn import LanguageAwareLinear, QuantConfig, quantize_model
from la_aciq.nn.forward_pass import LanguageState

IDS = torch.arange(1, 25).view(2, 12)


def made(n=32, k=48, dtype=torch.float32, bias=False, **changes):
    torch.manual_seed(0)
    linear = nn.Linear(k, n, bias=bias, dtype=dtype)
    config = QuantConfig(**({"activations": 16, "group_size": 16} | changes))
    clips = None if config.activations == 16 else torch.full((1, config.groups(k)), 0.9)
    return linear, LanguageAwareLinear.from_linear(linear, config, LanguageState(("und",)), clips)


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("codebook", ["midrise", "midtread"])
@pytest.mark.parametrize("repacked", [False, True])
def test_its_values_are_those_that_inputs_are_multiplied_with(rotate, codebook, repacked):
    linear, layer = made(rotate=rotate, codebook=codebook)
    if repacked:
        layer.repack()
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    assert not isinstance(weight, nn.Parameter)
    assert (weight.shape, weight.dtype, weight.device) == ((32, 48), torch.float32, torch.device("cpu"))
    assert weight.is_floating_point()
    assert not weight.requires_grad
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(nn.functional.linear(x, weight), layer(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight @ torch.eye(48), layer(torch.eye(48)).T, rtol=1e-4, atol=1e-5)
    trained = linear.weight.detach()
    assert float((weight - trained).norm()) < 0.15 * float(trained.norm())
    assert type(weight.detach()) is type(weight.clone()) is type(weight.t()) is type(weight[0]) is torch.Tensor
    assert copy.deepcopy(weight).equal(pickle.loads(pickle.dumps(weight)))
    assert "DequantizedWeight(shape=[32, 48]" in repr(weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_its_dtype_is_that_of_the_activations(dtype):
    _, layer = made(dtype=dtype)
    assert layer.weight.dtype == layer.weight[:1].dtype == dtype
    for other in (torch.float16, torch.bfloat16):
        assert layer.to(other).weight.dtype == other
    assert layer.float().weight.dtype == torch.float32
    assert copy.deepcopy(layer.half()).weight.dtype == pickle.loads(pickle.dumps(layer)).weight.dtype == torch.float16
    assert layer.to("meta").weight.is_meta
    assert layer.weight.dtype == torch.float16


def test_it_cannot_be_written():
    _, layer = made()
    codes = layer.weight_codes.clone()
    for write in (
        lambda: layer.weight.zero_(),
        lambda: layer.weight.mul_(2),
        lambda: layer.weight.copy_(torch.zeros(32, 48)),
        lambda: torch.add(torch.zeros(32, 48), 1, out=layer.weight),
        lambda: nn.init.normal_(layer.weight),
    ):
        with pytest.raises(RuntimeError, match=r"weight: expected an operation that only reads .* weight_codes"):
            write()
    with pytest.raises(AttributeError):
        layer.weight = torch.zeros(32, 48)
    assert torch.equal(layer.weight_codes, codes)


def test_the_operations_read_it():
    _, layer = made()
    clips = la_aciq.ops.quantize_dynamic(layer.weight, torch.ones(1, 3), group_size=16, statistic="absmax")[1]
    torch.testing.assert_close(clips, layer.weight.unflatten(1, (3, 16)).abs().amax(-1))


def test_with_16_bits_it_is_the_buffer():
    _, layer = made(weights=16, activations=4, rotate=False)
    assert layer.weight is layer._buffers["weight"]
    assert layer.weight_codes is None
    assert set(layer.state_dict()) == {"weight", "clips"}


def test_old_names_of_the_tensors_warn():
    _, layer = made(activations=4)
    with pytest.warns(DeprecationWarning, match=r"weight_scale is now LanguageAwareLinear\.weight_clip"):
        assert layer.weight_scale is layer.weight_clip
    with pytest.warns(DeprecationWarning, match=r"clip is now LanguageAwareLinear\.clips"):
        assert layer.clip is layer.clips


class CastsToTheWeight(nn.Module):
    """A layer with code around it as transformers' has it in many places."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        x = x.to(self.layer.weight.dtype).to(self.layer.weight.device)
        return self.layer(x[..., : self.layer.weight.shape[1]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_code_that_casts_to_its_dtype_compiled_too(dtype):
    _, layer = made(dtype=dtype, activations=8)
    layer.repack()
    module = CastsToTheWeight(layer)
    x = torch.randn(3, 48)
    assert torch.equal(module(x), layer(x.to(dtype)))
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, layer(x.to(dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_beside_quantized_layers(dtype):
    """PEFT's layers cast their inputs to the dtype of the adapters' weights, which are linear layers too."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        tiny_llama(tie=False, dtype=dtype), peft.LoraConfig(target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    ).eval()
    profile = la_aciq.calibrate(model, random_texts(), seqlen=64, tokens=128, group_size=8, progress=False)
    out = quantize_model(model, profile, QuantConfig(group_size=8, activations=16), progress=False)
    assert any("base_layer" in name for name in out.la_aciq.layers)
    with torch.no_grad(), la_aciq.language("sw"):
        assert out(input_ids=IDS).logits.dtype == dtype
        torch.testing.assert_close(out(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1, atol=4)


def test_a_model_whose_experts_cast_to_the_weights_dtype():
    torch.manual_seed(0)
    sizes = {"layers": 2, "ffn_dim": 48, "attention_heads": 4, "sparse_step": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = NllbMoeConfig(
        vocab_size=61,
        d_model=32,
        num_experts=4,
        max_position_embeddings=128,
        **tokens,
        **{f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in sizes.items()},
    )
    model = NllbMoeForConditionalGeneration(config).eval()
    layer = model.model.encoder.layers[1].ffn.experts["expert_0"]
    profile = la_aciq.calibrate(model, random_texts(), seqlen=64, tokens=128, group_size=16, progress=False)
    out = quantize_model(model, profile, QuantConfig(group_size=16), progress=False)
    quantized = out.model.encoder.layers[1].ffn.experts["expert_0"]
    x = torch.randn(3, 32)
    ids = torch.arange(1, 13).view(2, 6)
    with torch.no_grad():
        assert out(input_ids=ids, decoder_input_ids=ids).logits.isfinite().all()
    assert quantized(x).dtype == layer(x).dtype == torch.float32
