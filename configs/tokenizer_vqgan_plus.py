"""VQGAN+ with 12 bits on ImageNet-1k at 256 pixels (MaskBit, arXiv 2409.16211): rFID 1.39 for the released weights.

    python -m rear_jax.main --config=configs/tokenizer_vqgan_plus.py --workdir=DIR

55.0M parameters, 16×16 codes of 4096. To fine-tune the published one, add
--config.tokenizer_training.init_from=vqgan_plus_12bit.bin.
270 epochs = 1 350 000 steps of batch 256, from the authors' vqgan_plus_12bit.yaml: hinge adversary of fixed weight
0.02 from step 20 000 on, 128 channels and 4 halvings in the discriminator, perceptual weight 0.1, L2 weight 4.
Not as published: the perceptual distance compares EfficientNet-Lite features, not ResNet-50 logits, so its weight may
want another value; the discriminator pools by strides without blur; no LeCam term; no moving average of the weights.
Not run here: the expected result is the paper's.
8 A100 of 80 GB: 62.1 GiB.
"""

from rear_jax.config import default, vqgan_plus


def get_config():
    config = default()
    config.jobs = ("tokenizer",)
    config.tokenizer = vqgan_plus()
    vq = config.tokenizer_training
    vq.mse_weight = 4.0
    vq.perceptual_weight = 0.1
    vq.perceptual_network = "lite2"
    vq.revive_below = 0.0
    vq.discriminator_weight = 0.02
    vq.discriminator_start = 20_000
    vq.discriminator_adaptive = False
    vq.discriminator_channels = 128
    vq.discriminator_layers = 4
    vq.loop.steps = 1_350_000
    vq.loop.batch_size = 256
    vq.optimizer.learning_rate = 1e-4
    vq.optimizer.final_learning_rate = 1e-5
    vq.optimizer.warmup_steps = 5_000
    vq.optimizer.b1 = 0.9
    vq.optimizer.b2 = 0.999
    vq.optimizer.weight_decay = 1e-4
    return config
