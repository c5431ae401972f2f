"""Shared by the tests of the operations: inputs, and when two roundings may differ."""

import torch

from la_aciq import ops
from la_aciq.ops import reference

try:
    from la_aciq import _C
except ImportError:
    _C = None

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CODEBOOKS = ["midrise", "midtread"]


def available_isas():
    return _C.cpu_info()["available"] if _C else ["none"]


def on_reference(function, *args, **kwargs):
    with ops.use_backend("reference"):
        return function(*args, **kwargs)


def assert_codes_match(codes, x, clip, codebook, tolerance=4 * 2.0**-23):
    """codes are those of the definition for float64 x [..., K] and clips [..., K].

    A neighbouring code is right as well where x / Delta lies within the relative tolerance of the boundary between the
    two. Below 2^-124 the float32 reciprocal of Delta overflows, and codes other than the middle are those of the ends.
    """
    k = x.shape[-1]
    got = reference.unpack(codes, k).double()
    expected = reference.to_codes(x, clip, 4, codebook)
    scaled = x / (2 * clip / 15)
    boundary = torch.round(scaled) if codebook == "midrise" else torch.floor(scaled) + 0.5
    close = (scaled - boundary).abs() <= tolerance * scaled.abs().clamp(min=1.0)
    tiny = (clip > 0) & (clip < 2.0**-124) & ((got == 0) | (got == 15))
    wrong = (got != expected) & ~(close & ((got - expected).abs() <= 1)) & ~tiny
    assert not wrong.any(), (got[wrong][:5], expected[wrong][:5], scaled[wrong][:5])
    if k % 2:
        assert (codes[..., -1] < 16).all()


def make_inputs(op, dtype):
    """Arguments of torch.ops.la_aciq.<op>: the plainest call, and one that uses everything."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 40, generator=generator).to(dtype)
    table = torch.rand(4, 2, generator=generator) + 0.5
    language_ids = torch.tensor([1, 3], dtype=torch.int32)
    signs = torch.ones(40)
    codes = torch.randint(0, 256, (5, 20), generator=generator, dtype=torch.uint8)
    row_clips = torch.rand(5, 2, generator=generator)
    groups = {"group_size": 32}
    rotation = {"signs": signs, "block_size": 8}
    return {
        "moments": [((x,), {}), ((x, language_ids, 4, True), {})],
        "quantize": [((x, table[:, :1]), {}), ((x, table, language_ids), {**groups, **rotation, "tail_sums": True})],
        "quantize_dynamic": [((x, table[:, :1]), {}), ((x, table, language_ids, 32, "absmax", "midtread"), rotation)],
        "dequantize": [
            ((codes, table[:, :1]), {"k": 40, "dtype": dtype}),
            ((codes, row_clips), {"k": 39, **groups, "per_row": True, "codebook": "midtread", "dtype": torch.float32}),
        ],
        "round_weights": [
            ((x[0], torch.eye(40), torch.eye(40)), {}),
            ((x[0].T.contiguous().T, torch.eye(40), torch.eye(40), 16, "midtread"), {}),
        ],
        "rotate": [((x, signs), {}), ((x.transpose(0, 1), signs.to(torch.int8), 4), {})],
        "linear": [
            ((x, codes, row_clips[:, :1]), {}),
            (
                (x, codes, row_clips, torch.ones(5)),
                {**groups, **rotation, "activation_bits": 4, "clips": table[:, :1], "language_ids": language_ids},
            ),
            ((x, reference.repack(codes), row_clips), groups),
        ],
    }[op]
