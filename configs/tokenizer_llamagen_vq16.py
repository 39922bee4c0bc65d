"""LlamaGen's VQ-16 on ImageNet-1k at 256 pixels (arXiv 2406.06525): rFID 2.19 with 16×16 codes.

    python -m rear_jax.main --config=configs/tokenizer_llamagen_vq16.py --workdir=DIR \
        --config.lpips.vgg16=vgg16-397923af.pth --config.lpips.heads=vgg.pth

71.9M parameters, 16384 unit-length codes of width 8. To fine-tune the published one, add
--config.tokenizer_training.init_from=vq_ds16_c2i.pt; the same weights serve 384 and 512 pixels (rFID 0.94 and 0.70).
40 epochs = 400 360 steps of batch 128 at a constant 1e-4, from the authors' vq_train.py: L2 + LPIPS-VGG + PatchGAN
(hinge, fixed weight 0.5 from step 20 000 on) + commitment 0.25. The L2 is of images in
[-1, 1] there and in [0, 1] here, hence its weight of 4.
Not as published: the discriminator normalises each image by itself instead of the batch.
8 A100 of 80 GB: 45.5 GiB.
Not run here: the expected result is the paper's.
"""

from rear_jax.config import default, llamagen_vq


def get_config():
    config = default()
    config.jobs = ("tokenizer",)
    config.tokenizer = llamagen_vq()
    vq = config.tokenizer_training
    vq.augmentation = "wide_crop_flip"
    vq.mse_weight = 4.0
    vq.perceptual_weight = 1.0
    vq.perceptual_network = "lpips"
    vq.commitment_weight = 0.25
    vq.revive_below = 0.0
    vq.discriminator_weight = 0.5
    vq.discriminator_start = 20_000
    vq.discriminator_adaptive = False
    vq.loop.steps = 400_360
    vq.loop.batch_size = 128
    vq.optimizer.learning_rate = 1e-4
    vq.optimizer.final_learning_rate = 1e-4
    vq.optimizer.warmup_steps = 0
    vq.optimizer.b1 = 0.9
    vq.optimizer.b2 = 0.95
    vq.optimizer.weight_decay = 0.0
    return config
