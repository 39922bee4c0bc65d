"""LlamaGen-XL, text-conditional, at 256 pixels (arXiv 2406.06525, stage 1): images for captions of your own.

    python -m rear_jax.main --config=configs/llamagen_xl_t2i.py --workdir=DIR --job=sample \
        --config.tokenizer_from=vq_ds16_t2i.pt --config.init_from=t2i_XL_stage1_256.pt \
        --config.sample.captions=captions.npz --config.sample.num_images=64

778M parameters, of which the authors count 775M. captions.npz holds T5-XL features [captions, at most 120, 2048] and
their mask (rear_jax/data/captions.py); sample i is of caption i modulo the number of captions.
Trained by the authors on 50M captioned images; training on captions is not offered here. Not run here.
"""

from rear_jax.config.experiments import llamagen_imagenet


def get_config():
    config = llamagen_imagenet(image_size=256)
    config.jobs = ("sample",)
    config.model.condition = "text"
    config.model.width = 1280
    config.model.depth = 36
    config.model.heads = 20
    config.model.mlp_width = 3584
    config.sample.guidance_scale = 7.5
    config.sample.top_k = 1000
    return config
