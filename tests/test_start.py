"""What a network starts from, and what of it decays, beside the authors' code.

Sources: RAR and reAR `modeling/rar.py`, `modeling/rear.py` (`init_weights`, then zeros for adaLN) and 1d-tokenizer's
`create_optimizer`; LlamaGen `autoregressive/models/gpt.py` (`initialize_weights`, `configure_optimizers` of its
trainers: every parameter of two axes or more decays) and `tokenizer_image/vq_model.py`; TiTok `modeling/titok.py`
(`_init_weights`) and `modeling/modules/blocks.py`; VQGAN+ MaskBit's `modeling/conv_vqgan.py`, which leaves PyTorch's
own start; MaskGIT-VQGAN was trained in Flax with its own. AliTok's trainers are not public: its networks are read as
RAR's and TiTok's, from which they descend, with `in_proj` a linear layer like the others.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from rear_jax import generators, tokenizers
from rear_jax.runtime.sharding import decay_mask
from rear_jax.training import objectives
from tests import toy
from tests.test_configs import FILES, load

LAW = 0.02
NORMS = [(r"/scale$|^scale$", 1.0, 0.0)]
BIASES = [(r"(^|/)bias$", 0.0, 0.0)]


# our own: at the released hidden width of 2048 it is the authors' law
PROJECTORS = [(r"_projector/layer[12]/kernel$", 0.0, lambda shape: LAW * (2048 / shape[0]) ** 0.5)]


def fan_in(shape: tuple[int, ...]) -> float:
    return float(np.prod(shape[:-1])) ** -0.5


# name of the family -> in turn: pattern of the path, mean, and standard deviation or what makes it of the shape
START = {
    "generator rar": [
        *NORMS,
        *BIASES,
        (r"^cls_token$", 0.0, 0.0),
        (r"adaln/kernel$", 0.0, 0.0),
        *PROJECTORS,
        (r"", 0.0, LAW),
    ],
    "generator llamagen": [
        *NORMS,
        (r"^lm_head/kernel$", 0.0, 0.0),
        (r"^null_caption$", 0.0, lambda shape: shape[-1] ** -0.5),
        (r"", 0.0, LAW),
    ],
    "generator alitok": [*NORMS, *BIASES, *PROJECTORS, (r"", 0.0, LAW)],
    "generator janus": [*NORMS, *BIASES, (r"^code_embeddings$", 0.0, 1.0), (r"", 0.0, LAW)],
    "tokenizer titok": [
        *NORMS,
        *BIASES,
        (r"codebook$", 0.0, lambda shape: 1 / shape[0] / 3**0.5),
        (r"(embedding|latent_tokens|mask_token)$", 0.0, lambda shape: shape[-1] ** -0.5),
        (r"in_proj/kernel$", 0.0, lambda shape: (2 / sum(shape[-2:])) ** 0.5),  # Xavier's, of PyTorch's attention
        (r"^pixel_decoder/.*kernel$", 0.0, fan_in),  # of the proxy, whose weights take their place
        (r"", 0.0, LAW),
    ],
    "tokenizer alitok": [
        *NORMS,
        *BIASES,
        (r"codebook$", 0.0, lambda shape: 1 / shape[0] / 3**0.5),
        (r"(embedding|latent_tokens)$", 0.0, lambda shape: shape[-1] ** -0.5),
        (r"", 0.0, LAW),
    ],
    "tokenizer maskgit_vqgan": [
        *NORMS,
        *BIASES,
        (r"codebook$", 0.0, lambda shape: 1 / shape[0] / 3**0.5),
        (r"kernel$", 0.0, fan_in),
    ],
    "tokenizer vqgan_plus": [
        (r"norm\w*/scale$", 1.0, 0.0),
        (r"norm\w*/bias$", 0.0, 0.0),
        (r"codebook$", 0.0, lambda shape: 1 / shape[0] / 3**0.5),
        (r"kernel$", 0.0, lambda shape: fan_in(shape) / 3**0.5),
    ],
    "tokenizer llamagen_vq": [
        (r"norm\w*/scale$", 1.0, 0.0),
        (r"norm\w*/bias$", 0.0, 0.0),
        (r"codebook$", 0.0, lambda shape: shape[-1] ** -0.5),  # vectors of length one
        (r"kernel$", 0.0, lambda shape: fan_in(shape) / 3**0.5),
    ],
}


def networks_of(config) -> dict[str, Callable[[], Any]]:
    """Name -> what draws the parameters, of the config's generator and tokenizer."""
    size = config.data.image_size
    tokenizer = tokenizers.build(config.tokenizer, size)
    generator = objectives.build_generator(config, tokenizer)
    images = np.zeros((1, size, size, 3), np.float32)
    return {
        f"tokenizer {config.tokenizer.name}": lambda: tokenizer.init(jax.random.key(0), images)["params"],
        f"generator {config.model.name}": lambda: generators.family_of(generator).init(generator, 0),
    }


def flat(tree) -> dict[str, np.ndarray]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def assert_starts(name: str, params) -> None:
    """Mean and standard deviation of every array, within five standard errors."""
    for path, leaf in flat(params).items():
        values = np.asarray(leaf, np.float64)
        kernel = path.replace("bias", "kernel")
        mean, std = next(
            ((mean, std) for pattern, mean, std in [*START[name], (r"bias$", 0.0, None)] if re.search(pattern, path))
        )
        if std is None:  # PyTorch's bias: uniform in ± fan_in^-½ of its kernel
            std = fan_in(flat(params)[kernel].shape) / 3**0.5
        elif callable(std):
            std = std(leaf.shape)
        error = 5 * std / values.size**0.5
        assert values.mean() == pytest.approx(mean, abs=error), path
        assert values.std() == pytest.approx(std, rel=5 * (2 / values.size) ** 0.5 + 0.005), path


def shallow(config):
    """The config with one block a stack, as blocks are drawn alike, and small images, which `init` looks at."""
    config.data.image_size = 64
    config.model.depth = 1
    config.method.update(shallow_layer=0, deep_layer=0)
    for part in ("encoder_depth", "decoder_depth"):
        if part in config.tokenizer:
            config.tokenizer[part] = 1
    return config


def narrow(config):
    """The config with narrow networks."""
    config.model.update(width=128, heads=4, mlp_width=160)
    sizes = {"hidden_channels": 32, "channels": 32, "encoder_width": 96, "decoder_width": 96}
    config.tokenizer.update({key: size for key, size in sizes.items() if key in config.tokenizer})
    return config


@pytest.mark.parametrize(
    "file",
    [
        pytest.param("rear_s", marks=pytest.mark.slow),
        pytest.param("llamagen_b", marks=pytest.mark.slow),
        "llamagen_xl_t2i",
        pytest.param("rear_titok_b64", marks=pytest.mark.slow),
        pytest.param("alitok_b", marks=pytest.mark.slow),
        pytest.param("tokenizer_vqgan_plus", marks=pytest.mark.slow),
    ],
)
def test_narrow_networks_start_as_the_authors_do(file):
    for name, init in networks_of(narrow(shallow(load(toy.ROOT / "configs" / f"{file}.py")))).items():
        assert_starts(name, init())


@pytest.mark.slow
def test_every_published_network_starts_as_the_authors_do():
    """Narrowed, as what is drawn follows from an array's name and shape: at full width one takes minutes."""
    seen = set()
    for file in FILES:
        config = narrow(shallow(load(file)))
        for name, init in networks_of(config).items():
            section = config.tokenizer if name.startswith("tokenizer") else config.model
            key = name, str(sorted(section.to_dict().items()))
            if key not in seen:
                assert_starts(name, init())
            seen.add(key)
    assert {name for name, *_ in seen} == set(START)


def test_the_table_has_every_family():
    kinds = {"generator": generators.FAMILIES, "tokenizer": tokenizers.FAMILIES}
    assert set(START) == {f"{kind} {name}" for kind, families in kinds.items() for name in families}


def by_1d_tokenizer(name: str, axes: int) -> bool:
    """Whether a parameter of RAR, reAR or TiTok decays, by the name that it has there."""
    spared = ("ln", "bias", "latent_tokens", "mask_token", "embedding", "norm", "gamma", "embed")
    return axes >= 2 and not any(part in name for part in spared)


def by_llamagen(name: str, axes: int) -> bool:
    """The same for LlamaGen's generators; the null caption is a buffer there, no parameter."""
    return axes >= 2 and name != "cls_embedding.uncond_embedding"


DECAY = {"generator llamagen": by_llamagen}  # of all others: as in 1d-tokenizer


@pytest.mark.parametrize(
    "file",
    [
        *("rear_s", "rar_b", "llamagen_b", "llamagen_xl_t2i", "rar_alitok_b"),
        *("tokenizer_titok_bl64_vq8k", "tokenizer_titok_s128", "tokenizer_vqgan_plus", "tokenizer_llamagen_vq16"),
    ],
)
def test_what_decays_is_what_the_released_optimizers_decay(file):
    config = load(toy.ROOT / "configs" / f"{file}.py")
    tokenizer = tokenizers.build(config.tokenizer, config.data.image_size)
    generator = objectives.build_generator(config, tokenizer)
    for kind, family, shapes in (
        ("tokenizer", tokenizers.family_of(tokenizer), tokenizers.shapes(tokenizer)),
        ("generator", generators.family_of(generator), generators.shapes(generator)),
    ):
        rule = DECAY.get(f"{kind} {family.name}", by_1d_tokenizer)
        decays = flat(decay_mask(shapes, family.parameters))
        for path, leaf in flat(shapes).items():
            name = family.layout.torch_name(tuple(path.split("/"))).key
            if path == "target_aware_pos_embed":
                name = path  # as in RAR; AliTok has none
            axes = leaf.ndim - ("{i}" in name)  # blocks are stacked here
            assert decays[path] == rule(name, axes), (path, name)
