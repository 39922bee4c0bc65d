"""LlamaGen-XL from text (arXiv 2406.06525): stage 1 at 256 pixels, or stage 2 at 512.

Images for prompts of your own, by the authors' files and those of flan-T5-XL:

    python -m rear_jax.main --config=configs/llamagen_xl_t2i.py --workdir=DIR --job=sample \
        --config.tokenizer_from=vq_ds16_t2i.pt --config.init_from=t2i_XL_stage1_256.pt \
        --config.text.encoder=flan-t5-xl --config.sample.prompt="a red dog on the grass"

flan-t5-xl is the folder of the published files: model.safetensors.index.json with its shards, and tokenizer.json or
spiece.model. With --config=configs/llamagen_xl_t2i.py:2 and t2i_XL_stage2_512.pt the images have 512 pixels.

Training on pairs of images and captions, in the .tar shards pairs/train-*.tar and pairs/test-*.tar:

    python -m rear_jax.main --config=configs/llamagen_xl_t2i.py --workdir=DIR --job=tokenize,caption,train \
        --config.tokenizer_from=vq_ds16_t2i.pt --config.text.encoder=flan-t5-xl --config.data.path=pairs

Add --config.init_from=t2i_XL_stage1_256.pt to go on from the published weights. The authors trained stage 1 on 50M
pairs of LAION-COCO, and stage 2 on 10M pairs of their own; the steps here are one pass over each. 778M parameters, of
which the authors count 775M. The features of a caption of 120 tokens take 491 kB. Not run here.
8 A100 of 80 GB: accumulation 2, 38.4 GiB. v5e:16x16: remat 'products', 0.9 GiB.
"""

from rear_jax.config.experiments import llamagen_t2i
from rear_jax.errors import RearError

STAGES = {"1": (256, 195_312), "2": (512, 39_062)}  # pixels, and steps of 256 images


def get_config(stage="1"):
    if stage not in STAGES:
        raise RearError(
            f"LlamaGen-XL is trained from text in stages 1 and 2, not {stage!r}: end --config=FILE with :1 or :2."
        )
    image_size, steps = STAGES[stage]
    config = llamagen_t2i(image_size)
    config.jobs = ("tokenize", "caption", "train")
    config.train.loop.steps = steps
    config.mesh.update(data=1, fsdp=-1)  # parameters, gradients and moments are divided
    return config
