"""Files like Janus-Pro's at toy size: generator, tokenizer and what answers questions, random, in one state dict."""

import re

import ml_dtypes
import numpy as np

from rear_jax import generators, tokenizers
from rear_jax.config import janus, llamagen_vq
from rear_jax.weights import layout
from tests import toy

OTHERS = {  # what neither network reads
    "language_model.lm_head.weight": (40, 16),
    "language_model.model.rotary_emb.inv_freq": (4,),
    "gen_vision_model.quantize.codebook_used": (16,),
    "vision_model.vision_tower.blocks.0.attn.qkv.weight": (24, 8),
    "vision_model.vision_tower.pos_embed": (1, 4, 8),
    "aligner.layers.0.weight": (16, 8),
    "aligner.layers.0.bias": (16,),
}
TRANSFORMERS = (  # the authors' names -> those of transformers
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^gen_embed\.", "model.generation_embeddings."),
    (r"^gen_head\.output_mlp_projector\.", "model.generation_head.proj_out."),
    (r"^gen_head\.", "model.generation_head."),
    (r"^gen_aligner\.", "model.generation_aligner."),
    (r"^(aligner|vision_model)\.", r"model.\1."),
    (r"^(model\.(?:generation_)?aligner)\.layers\.0\.", r"\1.fc1."),
    (r"^(model\.(?:generation_)?aligner)\.layers\.2\.", r"\1.hidden_layers.0."),
    (r"^gen_vision_model\.", "model.vqmodel."),
    (r"^(model\.vqmodel\.encoder)\.conv_blocks\.", r"\1.down."),
    (r"^(model\.vqmodel\.decoder)\.conv_blocks\.", r"\1.up."),
    (r"^(model\.vqmodel\..+)\.res\.", r"\1.block."),
    (r"^(model\.vqmodel\..+\.mid)\.0\.", r"\1.block_1."),
    (r"^(model\.vqmodel\..+\.mid)\.1\.", r"\1.attn_1."),
    (r"^(model\.vqmodel\..+\.mid)\.2\.", r"\1.block_2."),
)
FLOAT32 = ("inv_freq", "codebook_used")  # the others are bfloat16


def config(**changes):
    """The toy experiment with a Janus; keywords as of `toy.config`."""
    made = toy.config()
    made.unlock()
    made.tokenizer = llamagen_vq()
    made.tokenizer.update(channels=8, channel_mult=(1, 1, 2, 2), num_res_blocks=1, z_channels=4, codebook_size=16)
    made.model = janus()
    made.model.update(width=16, depth=2, heads=2, mlp_width=24, vocabulary_size=40, code_dim=8, dtype="float32")
    made.model.update(prompt_length=6, pad_id=2)
    made.method.name = "ar"
    for name, value in changes.items():
        *parents, leaf = name.split("__")
        section = made
        for parent in parents:
            section = section[parent]
        section[leaf] = value
    return made


def shapes(made) -> dict[str, np.ndarray]:
    """Keys of the authors' file of a config, with stand-ins for its tensors."""
    network, tokenizer = toy.generator(made), toy.tokenizer(made)
    of_tokenizer = layout.torch_shapes(tokenizers.shapes(tokenizer), tokenizers.family_of(tokenizer).layout.torch_name)
    of_generator = layout.torch_shapes(generators.shapes(network), generators.family_of(network).layout.torch_name)
    return of_generator | {f"gen_vision_model.{key}": tensor for key, tensor in of_tokenizer.items()}


def tensors(made, seed: int = 0) -> dict[str, np.ndarray]:
    """The state dict of the authors' file of a config, random and in an order of its own."""
    rng = np.random.default_rng(seed)
    sizes = {key: tensor.shape for key, tensor in shapes(made).items()} | OTHERS
    keys = sorted(sizes, key=lambda key: key[::-1])
    made = {key: rng.normal(0.0, 0.4, sizes[key]) for key in keys}
    return {k: v.astype(np.float32 if k.endswith(FLOAT32) else ml_dtypes.bfloat16) for k, v in made.items()}


def for_transformers(key: str) -> str:
    """What transformers calls a tensor of the authors' file."""
    for pattern, name in TRANSFORMERS:
        key = re.sub(pattern, name, key)
    return key
