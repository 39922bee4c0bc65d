"""A Janus-Pro of a few thousand numbers in the authors' names, with a vocabulary of its own."""

import pathlib

import numpy as np
from safetensors.numpy import save_file

from rear_jax.generators.janus import understanding_files
from rear_jax.generators.janus.understanding import Understanding
from rear_jax.text.janus_vocabulary import JanusVocabulary
from rear_jax.weights.layout import torch_shapes
from tests.test_janus_vocabulary import tokenizer_json

HEADS = {"heads": 1, "vision_heads": 1}  # of the sizes that published files have
SIZES = {"width": 128, "depth": 2, "mlp_width": 48, "vision_width": 64, "vision_depth": 1}
OF_IMAGES = {"image_size": 32, "patch_size": 16}


def tensors(vocabulary: JanusVocabulary, *, seed: int = 0) -> dict[str, np.ndarray]:
    """The state dict, with keys of the other side and of SigLIP's pool beside those of the understanding side."""
    module = Understanding(
        vocabulary_size=vocabulary.size + 3, placeholder_id=0, dtype=np.dtype("float32"), **HEADS, **SIZES, **OF_IMAGES
    )
    shapes = torch_shapes(understanding_files.shapes(module), understanding_files.torch_name)
    draw = np.random.default_rng(seed).normal
    made = {key: draw(scale=0.2, size=shape.shape).astype(np.float32) for key, shape in shapes.items()}
    made |= {key: 3 * made[key] for key in made if "q_proj" in key or "k_proj" in key}  # what is seen must matter
    made["aligner.layers.2.weight"] *= 20
    unused = ("vision_model.vision_tower.attn_pool.latent", "gen_embed.weight", "gen_vision_model.post_quant_conv.bias")
    return made | {key: np.zeros((4, 4), np.float32) for key in unused}


def folder(place: pathlib.Path) -> pathlib.Path:
    """Writes model.safetensors and tokenizer.json as a hub's folder has them."""
    place.mkdir(parents=True)
    (place / "tokenizer.json").write_text(tokenizer_json())
    save_file(tensors(JanusVocabulary(place)), place / "model.safetensors")
    return place
