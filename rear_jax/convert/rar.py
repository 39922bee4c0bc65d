"""The published layout of the RAR family: AR, RAR and reAR state dicts."""

from rear_jax.convert.layout import LINEAR, Path, TorchName

TABLES = {"cls_token", "pos_embed", "target_aware_pos_embed", "timesteps_embeddings"}
BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "qkv": "attn.qkv",
    "proj": "attn.proj",
    "q_norm": "attn.q_norm",
    "k_norm": "attn.k_norm",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
    "adaln": "adaLN_modulation.1",
}
PROJECTOR = {"shallow_projector": "encode_align_mlp", "deep_projector": "decode_align_mlp"}


def torch_name(path: Path) -> TorchName:
    """Key of a parameter of `models.rar.RARTransformer` in the authors' files."""
    module, *inner = path
    if module in TABLES:
        return TorchName(module)
    if module == "embeddings":
        return TorchName("embeddings.weight")
    if module == "blocks":
        return _leaf(f"blocks.{{i}}.{BLOCK[inner[0]]}", inner[-1])
    if module in PROJECTOR:  # an activation stands between two linear layers
        return _leaf(f"{PROJECTOR[module]}.{2 * int(inner[0].removeprefix('layer'))}", inner[-1])
    return _leaf({"head_adaln": "adaln_before_head.adaLN_modulation.1", "lm_head": "lm_head"}[module], inner[-1])


def _leaf(prefix: str, leaf: str) -> TorchName:
    """`kernel` is a transposed weight; a norm's `scale` is PyTorch's weight."""
    if leaf == "kernel":
        return TorchName(f"{prefix}.weight", LINEAR)
    return TorchName(f"{prefix}.{'weight' if leaf == 'scale' else 'bias'}")
