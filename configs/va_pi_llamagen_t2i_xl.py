"""VA-π on LlamaGen-XL, text-conditional, at 256 pixels (arXiv 2512.19680): GenEval 0.306 -> 0.339.

    python -m rear_jax.main --config=configs/va_pi_llamagen_t2i_xl.py --workdir=DIR --job=caption,posttrain \
        --config.tokenizer_from=vq_ds16_t2i.pt --config.init_from=t2i_XL_stage1_256.pt \
        --config.text.encoder=flan-t5-xl --config.data.path=pairs \
        --config.lpips.vgg16=vgg16-397923af.pth --config.lpips.heads=vgg.pth

Every file of the command is yours to bring: the tokenizer and the generator of LlamaGen's authors; flan-t5-xl, the
folder of the published encoder with its tokenizer.json or spiece.model; pairs/train-*.tar and pairs/test-*.tar, shards
with an image and a KEY.txt for each pair (docs/images.md has other forms; the paper has pairs of LAION-COCO); and the
two files of LPIPS.

200 steps of 128 images with 8 samples each, learning rate 1e-6, prior weight 0.1, noise rate 0.5 (0: GenEval 0.302,
0.95: 0.329), no caption dropped. CLIP 0.245 -> 0.291, HPSv2 0.153 -> 0.211. Images for GenEval from the result:
--job=sample --config.sample.stage=posttrain --config.sample.prompts=evaluation_metadata.jsonl
--config.sample.geneval=True. Not run here: the results are the paper's.
8 A100 of 80 GB: 46.0 GiB. v5e:4x4: remat 'products', 6.4 GiB.
"""

from rear_jax.config.experiments import llamagen_t2i


def get_config():
    config = llamagen_t2i(image_size=256)
    config.jobs = ("caption", "posttrain")
    config.posttrain.noise_rate = 0.5
    config.posttrain.label_drop = 0.0
    config.posttrain.loop.steps = 200
    config.mesh.update(data=1, fsdp=-1)  # parameters, gradients and moments are divided
    return config
