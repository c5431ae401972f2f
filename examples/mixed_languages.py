"""One batch, one language per row: each row reads its own language's clips, whatever its neighbours speak.

python examples/mixed_languages.py [MODEL [TEXTS]]
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

# The same tokens in every row, so that nothing but the language differs.
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

# Nobody calibrated Portuguese: the pooled row `und` serves it, and it is counted.
print("served by the pooled row:", dict(int4.la_aciq.state.unserved))
