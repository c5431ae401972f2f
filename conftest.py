"""Without a GPU the Triton kernels are tested in Triton's interpreter. Triton chooses that when it is first imported,
which tests/conftest.py does: so here."""

import os

import torch

if torch.cuda.device_count() == 0:
    os.environ.setdefault("TRITON_INTERPRET", "1")
