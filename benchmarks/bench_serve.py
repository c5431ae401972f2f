"""Serving on the CPU: `make bench-serve` writes results/serve-<device>.json and the table and plot of docs/serving.md.

The embedded model, quantized by LA-ACIQ, as it is in bfloat16, and exported to compressed-tensors, each with a server
of vLLM's, under the load of `la-aciq bench serve`. The models are made in --models once (minutes) and used again. vLLM
has a virtual environment of its own, whose interpreter is --python.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import la_aciq
from benchmarks import tables
from la_aciq import embedded
from la_aciq.bench import cpu_name, in_file_names
from la_aciq.checkpoint import save_quantized
from la_aciq.integrations.compressed_tensors import export_compressed_tensors
from la_aciq.nn import QuantConfig, quantize_model

HERE = Path(__file__).parent
LANGUAGES = ("en", "de", "ar", "sw", "th", "zh")
TOKENS = 1024  # of each language, for calibration
# The same for every server; 16 requests fit at a time, twice as many as there are.
OPTIONS = ["--max-model-len", "512", "--max-num-seqs", "16", "--dtype", "bfloat16"]


def unquantized(model):
    """The model without what says that it came from a 4-bit file, which transformers will not save."""
    plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    return plain


def make_models(folder: Path) -> list[Path]:
    """The folders to serve, made where they are not there yet: ours first."""
    names = ("la_aciq", "bfloat16", "compressed-tensors")
    folders = [folder / name for name in names]
    if all((one / "config.json").exists() for one in folders):
        return folders
    folder.mkdir(parents=True, exist_ok=True)
    texts = embedded.load_texts(LANGUAGES)
    model, tokenizer = embedded.load_model()
    plain = unquantized(model)
    plain.save_pretrained(folders[1])
    tokenizer.save_pretrained(folders[1])
    profile = la_aciq.calibrate(model, texts, tokenizer, tokens=TOKENS)
    ours = quantize_model(model, profile, QuantConfig(activations=8))
    save_quantized(ours, folders[0], tokenizer, force=True)
    unrotated = la_aciq.calibrate(model, texts, tokenizer, tokens=TOKENS, rotate=False, center=False)
    config = QuantConfig(activations=16, codebook="midtread", rotate=False, center=False)
    exported = quantize_model(model, unrotated, config, inplace=True)
    export_compressed_tensors(exported, folders[2], tokenizer, force=True)
    return folders


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_serve", description=__doc__)
    parser.add_argument("--python", default=".venv-vllm/bin/python", help="interpreter of vLLM's environment")
    parser.add_argument("--models", type=Path, default=Path("bench-serve-models"), help="folder of the models")
    arguments = parser.parse_args(argv)
    ours, *others = map(str, make_models(arguments.models))
    target = HERE / "results" / f"serve-{in_file_names(cpu_name())}.json"
    program = [arguments.python, "-m", "la_aciq.cli", "bench"]
    chosen = ["--languages", ",".join(LANGUAGES), "--output", str(target)]
    subprocess.run([*program, "serve", ours, "--against", *others, *chosen, "--", *OPTIONS], check=True)
    return tables.main([])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
