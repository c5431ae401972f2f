"""Calibrate a model on a few texts, quantize it to INT4, and generate in a language.

    python examples/quantize_and_generate.py [MODEL [TEXTS]]

MODEL is a folder or Hugging Face id, TEXTS a folder of <tag>.txt files. Default: the embedded model and its texts.
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

# Measure the inputs of every layer in each language. Calibration reads the start of each text; 1024 tokens are usual.
profile = la_aciq.calibrate(model, texts, tokenizer, seqlen=128, tokens=256, progress=False)

# INT4 weights and INT8 activations. Each token's language selects the center (and, with clip="static", the clip).
config = la_aciq.QuantConfig(weights=4, activations=8)
int4 = la_aciq.quantize_model(model, profile, config, progress=False)
print(f"{len(int4.la_aciq.layers)} layers quantized; not quantized: {int4.la_aciq.skipped}")
print(f"clips for {', '.join(int4.la_aciq.state.entries)}")

prompt = tokenizer("Habari ya asubuhi", return_tensors="pt", return_token_type_ids=False)
with la_aciq.language("sw"):
    generated = int4.generate(**prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
print("sw:", tokenizer.decode(generated[0], skip_special_tokens=True))
