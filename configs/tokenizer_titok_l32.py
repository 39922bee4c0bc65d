"""TiTok-L-32 on ImageNet-1k at 256 pixels (arXiv 2406.07550): rFID 2.21 with 32 codes.

    python -m rear_jax.main --config=configs/tokenizer_titok_l32.py:1 --workdir=DIR1 \
        --config.tokenizer_training.proxy=maskgit-vqgan-imagenet-f16-256.bin
    python -m rear_jax.main --config=configs/tokenizer_titok_l32.py:2 --workdir=DIR2 \
        --config.tokenizer_training.init_from=DIR1/tokenizer

641.1M parameters, 30.7M of them MaskGIT-VQGAN's; 32 codes of 4096 with width 12. The published network is
`tokenizer_titok_l32.bin` or the hub folder `tokenizer_titok_l32_imagenet`: give either as tokenizer_from.
Recipe of both stages, the :1 and :2 after the file's name: stage 2 from the authors' titok_l32.yaml, stage 1 as they
train the two smaller ones.
Stage 1, 200 epochs = 1 000 000 steps of batch 256: cross-entropy of MaskGIT-VQGAN's codes. Stage 2, 500 000 steps:
encoder and codebook stay, the decoder, MaskGIT's included, learns pixels: L2 + 0.1 perceptual + 0.01 PatchGAN (hinge,
from step 20 000 on).
Not as published: the perceptual distance compares EfficientNet-Lite features, not ConvNeXt-S logits, so its weight may
want another value; the discriminator pools by strides without blur; no LeCam term; no moving average of the weights.
Not run here: the expected result is the paper's.
Stage 1: 8 A100 of 80 GB: 15.8 GiB.
Stage 2: 8 A100 of 80 GB: 50.6 GiB.
"""

from rear_jax.config.experiments import titok_imagenet


def get_config(stage="1"):
    config = titok_imagenet(stage)
    tokenizer = config.tokenizer
    tokenizer.num_latent_tokens = 32
    tokenizer.encoder_width = tokenizer.decoder_width = 1024
    tokenizer.encoder_depth = tokenizer.decoder_depth = 24
    tokenizer.encoder_heads = tokenizer.decoder_heads = 16
    return config
