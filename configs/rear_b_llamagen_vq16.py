"""reAR-B on LlamaGen's tokenizer VQ-16 (arXiv 2406.06525), ImageNet-1k at 256 pixels.

    python -m rear_jax.main --config=configs/rear_b_llamagen_vq16.py --workdir=DIR \
        --job=tokenize,train,sample,evaluate --config.tokenizer_from=vq_ds16_c2i.pt

284.5M parameters and 11.6M of projectors: 16384 codes instead of rear_b.py's 1024, embeddings of width 8, of unit
length as the decoder sees them. The recipe is rear_b.py's (arXiv 2510.04450), guidance included, which nobody has tuned
for these codes. With a tokenizer trained here (tokenizer_llamagen_vq16.py), --config.tokenizer_from is that workdir's
`tokenizer` folder.
Not run here, and no paper has this row: the published tokenizer's rFID of 2.19 is a floor, not an expectation.
8 A100 of 80 GB: accumulation 4, 55.0 GiB. v5e:16x16: 10.6 GiB.
"""

from rear_jax.config import default, llamagen_vq


def get_config():
    config = default()
    config.tokenizer = llamagen_vq()
    config.model.depth = 24
    config.model.width = 768
    config.model.mlp_width = 3072
    config.sample.guidance_scale = 14.5
    config.sample.guidance_power = 2.25
    return config
