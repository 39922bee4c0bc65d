"""reAR-B on the tokenizer VQGAN+ (MaskBit, arXiv 2409.16211), ImageNet-1k at 256 pixels.

    python -m rear_jax.main --config=configs/rear_b_vqgan_plus.py --workdir=DIR --job=tokenize,train,sample,evaluate \
        --config.tokenizer_from=vqgan_plus_12bit.bin

265.6M parameters and 11.8M of projectors: 4096 codes instead of rear_b.py's 1024, embeddings of width 64.
The recipe is rear_b.py's (arXiv 2510.04450), guidance included, which nobody has tuned for these codes. With a
tokenizer trained here (tokenizer_vqgan_plus.py), --config.tokenizer_from is that workdir's `tokenizer` folder.
Not run here, and no paper has this row: the published tokenizer's rFID of 1.39 is a floor, not an expectation.
8 A100 of 80 GB: accumulation 4, 52.4 GiB. v5e:16x16: 10.2 GiB.
"""

from rear_jax.config import default, vqgan_plus


def get_config():
    config = default()
    config.tokenizer = vqgan_plus()
    config.model.depth = 24
    config.model.width = 768
    config.model.mlp_width = 3072
    config.sample.guidance_scale = 14.5
    config.sample.guidance_power = 2.25
    return config
