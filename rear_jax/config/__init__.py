"""All settings, with their defaults. A file in configs/ starts from `default()` and changes what it needs.

Each group of sections has a file here. The sections of networks are in the files of their families.
The result of `default()` is locked: the error for an unknown key names the nearest key that exists.
Sizes that follow from other settings (codes per image, width of an embedding) are derived where they are used.
"""

from ml_collections import ConfigDict

from rear_jax import generators, tokenizers
from rear_jax.config import data, evaluation, running, text, training
from rear_jax.config.training import loop_settings as loop_settings
from rear_jax.config.training import optimizer_settings as optimizer_settings

# The sections of the families, for files in configs/; the module of each family documents its settings.
rar = generators.rar.FAMILY.section
llamagen = generators.llamagen.FAMILY.section
janus = generators.janus.FAMILY.section
alitok_generator = generators.alitok.FAMILY.section
maskgit_vqgan = tokenizers.maskgit_vqgan.FAMILY.section
vqgan_plus = tokenizers.vqgan_plus.FAMILY.section
llamagen_vq = tokenizers.llamagen_vq.FAMILY.section
titok = tokenizers.titok.FAMILY.section
alitok = tokenizers.alitok.FAMILY.section


def default() -> ConfigDict:
    """The default experiment: reAR on ImageNet-1k at 256 pixels, with the tokenizer MaskGIT-VQGAN."""
    config = ConfigDict()
    config.jobs = ("train",)  # jobs that run one after another; the flag --job replaces them
    # services that get numbers and pictures too, besides metrics.jsonl and TensorBoard: 'wandb', 'mlflow'
    config.writers = ()
    config.seed = 0  # seed of initial parameters, training, data order and samples
    # tokenizer to use: a folder from job 'tokenizer' or 'convert', a published file or a hub folder;
    # '' = <workdir>/tokenizer
    config.tokenizer_from = ""
    # which state dict of a training checkpoint of PyTorch to take for a tokenizer, such as 'ema': in tokenizer_from,
    # tokenizer_training.init_from and convert.source; '' = 'model' or the like, the log says which
    config.tokenizer_section = ""
    config.codes_from = ""  # folder of code files; '' = <workdir>/codes
    # caption features that text-conditional generators are trained with: .npz file or folder, see
    # rear_jax/data/captions.py; '' = <workdir>/captions. The label of an image is the number of its caption.
    config.captions_from = ""
    # generator to use if the workdir has none: a folder from job 'train' or 'convert', a published file or hub folder,
    # which may be that of tokenizer_from; '' = none. Job 'train' then starts from random parameters.
    config.init_from = ""
    config.init_section = ""  # the same for a generator, in init_from and convert.source

    config.mesh = running.mesh()
    config.buckets = running.buckets()
    config.data = data.data()
    config.inspect = data.inspect()
    config.text = text.text()
    config.describe = text.describe()
    config.tokenizer = maskgit_vqgan()  # section of a family in rear_jax/tokenizers
    config.tokenizer_training = training.tokenizer_training()
    config.lpips = training.lpips()
    config.clip = training.clip()
    config.hps = training.hps()
    config.codes = data.codes()
    config.model = rar()  # section of a family in rear_jax/generators
    config.method = training.method()
    config.train = training.train()
    config.posttrain = training.posttrain()
    config.study = running.study()
    config.sample = evaluation.sample()
    config.sweep = evaluation.sweep()
    config.plan = running.plan()
    config.convert = running.convert()
    config.import_codes = running.import_codes()
    config.demo = running.demo()
    config.evaluate = evaluation.evaluate()
    config.analyze = evaluation.analyze()
    return config.lock()
