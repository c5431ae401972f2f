"""Quantize while transformers loads a model, save it as transformers does, and load it again: the same bits.

    python examples/from_pretrained.py MODEL TEXTS FOLDER

MODEL is a folder or Hugging Face id with safetensors, TEXTS a folder of <tag>.txt files, FOLDER a new one.
"""

import sys

import torch
from transformers import AutoModelForCausalLM

import la_aciq
from la_aciq import calibration, models
from la_aciq.integrations.transformers import LaAciqConfig

name, texts_folder, folder = sys.argv[1:]

# Once: measure the model.
model, tokenizer = models.load_model(name)
texts = calibration.load_texts(texts_folder)
la_aciq.calibrate(model, texts, tokenizer, seqlen=128, tokens=256, progress=False).save(f"{folder}/profile")
del model

# Layer by layer: no more than one layer is in memory unquantized.
config = LaAciqConfig(profile=f"{folder}/profile", activations=8)
model = AutoModelForCausalLM.from_pretrained(name, quantization_config=config, dtype=torch.float32, device_map="auto")
model.save_pretrained(f"{folder}/int4")

# Whoever loads it needs `import la_aciq`, which registers the method, and nothing else.
again = AutoModelForCausalLM.from_pretrained(f"{folder}/int4", device_map="auto")

ids = tokenizer("The committee met on Tuesday.", return_tensors="pt")["input_ids"]
with torch.no_grad(), la_aciq.language("sw"):
    print("the same outputs after loading:", torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits))
