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


def for_transformers(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The understanding side as transformers has it."""
    made = {"model.vision_model.embeddings.position_ids": np.arange(4.0)}
    for key, tensor in tensors.items():
        if key.startswith("language_model."):
            made["lm_head.weight" if "lm_head" in key else f"model.language_model.{key[21:]}"] = tensor
        elif key.startswith("aligner."):
            made[f"model.{key}".replace("layers.0", "fc1").replace("layers.2", "hidden_layers.0")] = tensor
        elif key.endswith("pos_embed"):
            made["model.vision_model.embeddings.position_embedding.weight"] = tensor[0]
        elif key.startswith("vision_model.vision_tower.blocks."):
            name = key.replace("vision_tower.blocks", "encoder.layers").replace(".norm", ".layer_norm")
            parts = np.split(tensor, 3) if ".qkv." in name else [tensor]
            for part, value in zip("qkv", parts, strict=False):
                name_of_part = name.replace("attn.qkv", f"self_attn.{part}_proj")
                made["model." + name_of_part.replace(".attn.proj", ".self_attn.projection_layer")] = value
        elif "attn_pool" not in key and key.startswith("vision_model."):
            name = key.replace("vision_tower.patch_embed.proj", "embeddings.patch_embedding")
            made["model." + name.replace("vision_tower.norm", "post_layernorm")] = tensor
    return {key: np.ascontiguousarray(tensor) for key, tensor in made.items()}
