"""Quantize a model while transformers loads it, save it with transformers, and load it again: bit-identical outputs.

    python examples/from_pretrained.py MODEL TEXTS FOLDER

MODEL is a folder or Hugging Face id with safetensors, TEXTS a folder of <tag>.txt files, FOLDER a folder to create.
MODEL and TEXTS may be "embedded": the test model and its texts.
"""

import sys

import torch
from transformers import AutoModelForCausalLM

import la_aciq
from la_aciq import calibration, embedded, models
from la_aciq.integrations.transformers import LaAciqConfig

if len(sys.argv) != 4:
    sys.exit(f"usage: python {sys.argv[0]} MODEL TEXTS FOLDER")
name, texts_name, folder = sys.argv[1:]

# Calibrate once.
model, tokenizer = embedded.load_model() if name == "embedded" else models.load_model(name)
texts = embedded.load_texts(["en", "sw", "th"]) if texts_name == "embedded" else calibration.load_texts(texts_name)
la_aciq.calibrate(model, texts, tokenizer, seqlen=128, tokens=256, progress=False).save(f"{folder}/profile")
if name == "embedded":  # transformers cannot quantize a GGUF file while it loads it
    name = f"{folder}/model"
    model.save_pretrained(name)
del model

# transformers quantizes layer by layer: at most one layer is in memory unquantized.
config = LaAciqConfig(profile=f"{folder}/profile", activations=8)
model = AutoModelForCausalLM.from_pretrained(name, quantization_config=config, dtype=torch.float32, device_map="auto")
model.save_pretrained(f"{folder}/int4")

# Loading needs `import la_aciq`, which registers the quantization method, and nothing else.
again = AutoModelForCausalLM.from_pretrained(f"{folder}/int4", device_map="auto")

ids = tokenizer("The committee met on Tuesday.", return_tensors="pt")["input_ids"]
with torch.no_grad(), la_aciq.language("sw"):
    print("the same outputs after loading:", torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits))
