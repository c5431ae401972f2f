"""Triton kernels of LA-ACIQ, one file per operation; installed as `la_aciq.kernels`."""
