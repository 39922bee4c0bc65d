"""TiTok-BL-64 on ImageNet-1k at 256 pixels, the one with 8192 codes (arXiv 2406.07550): rFID 2.06 with 64 codes.

    python -m rear_jax.main --config=configs/tokenizer_titok_bl64_vq8k.py --workdir=DIR \
        --config.lpips.vgg16=vgg16-397923af.pth --config.lpips.heads=vgg.pth

390.0M parameters; 64 codes of 8192 with width 64, compared as they are. The decoder, larger than the encoder, makes
pixels itself: no MaskGIT-VQGAN takes part, and there is one stage of training. The published network is
`tokenizer_titok_bl64_vq8k.bin` or the hub folder `tokenizer_titok_bl64_vq8k_imagenet`: give either as tokenizer_from.
Sizes from the authors' titok_bl64_vq8k.yaml, rFID from their list of models.
Not known here, and so not as published: how it was trained. The recipe is that of its successor for text, from the
authors' tatitok_bl64_vq.yaml: 650 000 steps of batch 256, L2 + LPIPS-VGG + 0.1 PatchGAN (hinge, from step 200 000 on),
unused codes revived. Of that one's loss 0.1 ConvNeXt-S logits and LeCam are left out, and its moving average of the
weights; the discriminator pools by strides without blur.
Not run here: the expected result is the authors'.
8 A100 of 80 GB: 32.6 GiB.
"""

from rear_jax.config.experiments import titok_imagenet


def get_config():
    config = titok_imagenet("2")
    tokenizer = config.tokenizer
    tokenizer.codebook_size = 8192
    tokenizer.codebook_dim = 64
    tokenizer.decoder_width = 1024
    tokenizer.decoder_depth = 24
    tokenizer.decoder_heads = 16
    tokenizer.l2_normalize = False
    tokenizer.legacy_reshape = False
    tokenizer.predicts = "pixels"
    vq = config.tokenizer_training
    vq.trained = "all"
    vq.perceptual_weight = 1.0
    vq.perceptual_network = "lpips"
    vq.commitment_weight = 0.25
    vq.revive_below = 0.01
    vq.discriminator_weight = 0.1
    vq.discriminator_start = 200_000
    vq.loop.steps = 650_000
    vq.optimizer.warmup_steps = 10_000
    return config
