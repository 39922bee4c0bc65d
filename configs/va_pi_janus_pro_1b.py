"""VA-π on Janus-Pro-1B at 384 pixels (arXiv 2512.19680): GenEval 0.725 -> 0.744.

    python -m rear_jax.main --config=configs/va_pi_janus_pro_1b.py --workdir=DIR \
        --config.tokenizer_from=Janus-Pro-1B --config.init_from=Janus-Pro-1B \
        --config.text.vocabulary=Janus-Pro-1B/tokenizer.json --config.data.path=pairs \
        --config.lpips.vgg16=vgg16-397923af.pth --config.lpips.heads=vgg.pth

Every file of the command is yours to bring: Janus-Pro-1B, the folder of the published model with config.json,
pytorch_model.bin (or shards with their index) and tokenizer.json, from which generator, tokenizer and vocabulary are
read; pairs/train-*.parquet, rows with an `image` and its caption in `caption_original` (the paper has 50 000 random
pairs of FLUX-Reason-6M; docs/images.md has other forms); and the two files of LPIPS.

| GenEval | overall | two objects | attributes |
|---|---|---|---|
| Janus-Pro-1B | 0.725 | 0.801 | 0.540 |
| after this training | 0.744 | 0.835 | 0.585 |

100 steps of 64 images with 8 samples each, learning rate 1e-7, prior weight 0.1, noise rate 0.95, no prompt dropped.
The released launcher has a noise rate of 1.0, and scores with LPIPS of AlexNet. Images for GenEval from the result:
--job=sample --config.sample.stage=posttrain --config.sample.prompts=evaluation_metadata.jsonl
--config.sample.geneval=True. A file for the authors' code, in which all that was not trained is as it was:
--job=convert --config.convert.source=DIR/posttrained --config.convert.export=mine.bin
--config.convert.onto=Janus-Pro-1B. Not run here: the results are the paper's.
8 A100 of 80 GB: 53.6 GiB. v5e:4x4: remat 'products', 9.9 GiB.
"""

from rear_jax.config.experiments import janus_pro


def get_config():
    config = janus_pro()
    config.jobs = ("posttrain",)
    post = config.posttrain
    post.update(noise_rate=0.95, label_drop=0.0, augmentation="bicubic")
    post.loop.batch_size = 64
    post.optimizer.update(learning_rate=1e-7, final_learning_rate=1e-7)
    config.mesh.update(data=1, fsdp=-1)  # parameters, gradients and moments are divided
    return config
