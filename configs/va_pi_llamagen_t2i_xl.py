"""VA-π on LlamaGen-XL, text-conditional, at 256 pixels (arXiv 2512.19680): GenEval 0.306 -> 0.339.

    python -m rear_jax.main --config=configs/va_pi_llamagen_t2i_xl.py --workdir=DIR \
        --config.tokenizer_from=vq_ds16_t2i.pt --config.init_from=t2i_XL_stage1_256.pt \
        --config.lpips.vgg16=vgg16-397923af.pth --config.lpips.heads=vgg.pth \
        --config.data.path=pairs.npz --config.captions_from=captions

pairs.npz holds train_images and validation_images, uint8 [n, H, W, 3], and in train_labels and validation_labels the
number of each image's caption; a folder of class folders works as well, with one caption for each class. captions is
an .npz or a folder (features.npy, which is memory-mapped, and mask.npy) of T5-XL features [captions, at most 120,
2048] and their mask (rear_jax/data/captions.py).

200 steps of 128 images with 8 samples each, learning rate 1e-6, prior weight 0.1, noise rate 0.5 (0: GenEval 0.302,
0.95: 0.329). CLIP 0.245 -> 0.291, HPSv2 0.153 -> 0.211. Sample from the result with --job=sample
--config.sample.stage=posttrain --config.sample.captions=... Not run here: the results are the paper's.
8 A100 of 80 GB: 46.0 GiB.
"""

from rear_jax.config.experiments import llamagen_imagenet


def get_config():
    config = llamagen_imagenet(image_size=256)
    config.jobs = ("posttrain",)
    config.data.source = "arrays"
    config.data.path = "pairs.npz"
    config.model.condition = "text"
    config.model.width = 1280
    config.model.depth = 36
    config.model.heads = 20
    config.model.mlp_width = 3584
    config.posttrain.noise_rate = 0.5
    config.posttrain.loop.steps = 200
    config.sample.guidance_scale = 7.5
    config.sample.top_k = 1000
    config.mesh.update(data=1, fsdp=-1)  # parameters, gradients and moments are divided
    return config
