"""Run a batch with a language per row: the result of a row does not depend on the languages of the other rows.

    python examples/mixed_languages.py [MODEL [TEXTS]]

MODEL is a folder or Hugging Face id, TEXTS a folder of <tag>.txt files. Default: the embedded model and its texts.
"""

import sys

import torch

import la_aciq
from la_aciq import calibration, embedded, models

if len(sys.argv) > 2:
    model, tokenizer = models.load_model(sys.argv[1])
    texts = calibration.load_texts(sys.argv[2])
else:
    model, tokenizer = embedded.load_model()
    texts = embedded.load_texts(["en", "sw", "th"])

profile = la_aciq.calibrate(model, texts, tokenizer, seqlen=128, tokens=256, progress=False)
config = la_aciq.QuantConfig(weights=4, activations=4)
int4 = la_aciq.quantize_model(model, profile, config, progress=False)

# All rows have the same tokens, so only the language differs.
ids = tokenizer("The committee met on Tuesday.", return_tensors="pt")["input_ids"]
batch = ids.expand(4, -1)
with torch.no_grad(), la_aciq.languages(["en", "sw", "th", "pt-BR"]):
    mixed = int4(input_ids=batch).logits

for row, tag in enumerate(["en", "sw", "th", "pt-BR"]):
    with torch.no_grad(), la_aciq.languages([tag] * 4):
        alone = int4(input_ids=batch).logits[row]
    same = torch.equal(alone, mixed[row])
    distance = float((mixed[row] - mixed[0]).norm() / mixed[0].norm())
    print(f"{tag:6} the same in a mixed batch: {same}; distance from English: {distance:.4f}")

# Calibration has no Portuguese. The pooled entry `und` serves it, and the model counts such requests.
print("served by the pooled entry:", dict(int4.la_aciq.state.unserved))
