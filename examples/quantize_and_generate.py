"""Calibrate a model on a few texts, quantize it to INT4, and generate with the clips of a language.

    python examples/quantize_and_generate.py [MODEL [TEXTS]]

MODEL is a folder or Hugging Face id, TEXTS a folder of <tag>.txt files; without them the embedded model and texts.
"""

import sys

import la_aciq
from la_aciq import calibration, embedded, models

if len(sys.argv) > 2:
    model, tokenizer = models.load_model(sys.argv[1])
    texts = calibration.load_texts(sys.argv[2])
else:
    model, tokenizer = embedded.load_model()
    texts = embedded.load_texts(["en", "sw", "th"])

# What every layer's input looks like in each language. Texts are read from their start; 1024 tokens of each are usual.
profile = la_aciq.calibrate(model, texts, tokenizer, seqlen=128, tokens=256, progress=False)

# INT4 weights, INT8 activations. The clip of the activations is looked up by the language of each token.
config = la_aciq.QuantConfig(weights=4, activations=8)
int4 = la_aciq.quantize_model(model, profile, config, progress=False)
print(f"{len(int4.la_aciq.layers)} layers quantized; left as they were: {int4.la_aciq.skipped}")
print(f"clips for {', '.join(int4.la_aciq.state.entries)}")

prompt = tokenizer("Habari ya asubuhi", return_tensors="pt", return_token_type_ids=False)
with la_aciq.language("sw"):
    generated = int4.generate(**prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
print("sw:", tokenizer.decode(generated[0], skip_special_tokens=True))
