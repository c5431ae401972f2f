"""Export INT4 weights to compressed-tensors, which transformers and vLLM load without LA-ACIQ.

    python examples/export_compressed_tensors.py MODEL TEXTS FOLDER

Needs the extra: pip install 'la-aciq[compressed-tensors]'. The kernels that load the folder do not rotate, have a level
at zero and no bias by language, and leave activations in 16 bits. The group size must divide the inputs of every layer.
MODEL is a folder or Hugging Face id, TEXTS a folder of <tag>.txt files, FOLDER a folder to create. MODEL and TEXTS may
be "embedded": the test model and its texts.
"""

import sys

import torch
from transformers import AutoModelForCausalLM

import la_aciq
from la_aciq import calibration, clipping, embedded, models
from la_aciq.integrations.compressed_tensors import export_compressed_tensors, load_table

if len(sys.argv) != 4:
    sys.exit(f"usage: python {sys.argv[0]} MODEL TEXTS FOLDER")
name, texts_name, folder = sys.argv[1:]
model, tokenizer = embedded.load_model() if name == "embedded" else models.load_model(name)
texts = embedded.load_texts(["en", "sw", "th"]) if texts_name == "embedded" else calibration.load_texts(texts_name)
settings = {"group_size": 32, "rotate": False}
profile = la_aciq.calibrate(model, texts, tokenizer, seqlen=128, tokens=256, progress=False, **settings)
config = la_aciq.QuantConfig(weights=4, activations=16, codebook="midtread", center=False, **settings)
int4 = la_aciq.quantize_model(model, profile, config, progress=False)

# The table of the activations' clips by language is saved beside the weights.
export_compressed_tensors(int4, folder, tokenizer, table=clipping.table(profile, bits=8, codebook="midtread"))

loaded = AutoModelForCausalLM.from_pretrained(folder)
ids = tokenizer("The committee met on Tuesday.", return_tensors="pt")["input_ids"]
with torch.no_grad(), la_aciq.language("en"):
    difference = (loaded(input_ids=ids).logits - int4(input_ids=ids).logits).abs().max()
print(f"largest difference of a logit: {float(difference):.1e}")
print("languages of the table:", ", ".join(load_table(f"{folder}/la_aciq/clip_table.safetensors").entries))
