"""MaskGIT-VQGAN on ImageNet-1k at 256 pixels (arXiv 2202.04200): the tokenizer of MaskGIT, RAR and reAR; rFID 2.28.

    python -m rear_jax.main --config=configs/tokenizer_maskgit_vqgan.py --workdir=DIR

54.5M parameters, 16×16 codes of 1024. To fine-tune the published one, add
--config.tokenizer_training.init_from=maskgit-vqgan-imagenet-f16-256.bin.
300 epochs of batch 256, as MaskGIT's models. The paper prints no loss weights for its tokenizer, so the adversary is
VQGAN's (arXiv 2012.09841): PatchGAN, hinge, weight 0.8 times the ratio of last-layer gradients; it joins at 20 000
steps as in the other two recipes, tokenizer_vqgan_plus.py and tokenizer_llamagen_vq16.py.
Not run here: the expected result is the paper's, whose perceptual network is another.
8 A100 of 80 GB: 60.0 GiB. v5e:16x16: 2.2 GiB.
"""

from rear_jax.config import default, maskgit_vqgan


def get_config():
    config = default()
    config.jobs = ("tokenizer",)
    config.tokenizer = maskgit_vqgan()
    vq = config.tokenizer_training
    vq.discriminator_weight = 0.8
    vq.discriminator_start = 20_000
    vq.discriminator_adaptive = True
    vq.loop.steps = 1_501_368  # 300 epochs
    vq.loop.batch_size = 256
    vq.optimizer.learning_rate = 1e-4
    vq.optimizer.final_learning_rate = 1e-5
    return config
