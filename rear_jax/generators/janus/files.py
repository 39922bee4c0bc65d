"""Janus-Pro's files as transformers writes them: the names that its tensors have there.

Such a file holds the tensors of the authors' file under other names. The encoder of images alone (`vision_model.`) is
cut up otherwise: its names begin as published and go on as in transformers.
"""

import re

BEGINNINGS = {  # of transformers' names -> of the published ones
    "lm_head.": "language_model.lm_head.",
    "model.language_model.": "language_model.model.",
    "model.generation_embeddings.": "gen_embed.",
    "model.generation_aligner.": "gen_aligner.",
    "model.generation_head.": "gen_head.",
    "model.aligner.": "aligner.",
    "model.vqmodel.": "gen_vision_model.",
    "model.vision_model.": "vision_model.",
}
INSIDE = (  # what differs besides, in names that begin as published
    (r"^((?:gen_)?aligner)\.fc1\.", r"\1.layers.0."),
    (r"^((?:gen_)?aligner)\.hidden_layers\.(\d+)\.", lambda found: f"{found[1]}.layers.{2 * int(found[2]) + 2}."),
    (r"^gen_head\.proj_out\.", "gen_head.output_mlp_projector."),
    (r"^(gen_vision_model\.(?:en|de)coder)\.(?:down|up)\.", r"\1.conv_blocks."),
    (r"^(gen_vision_model\.\w+\.conv_blocks\.\d+)\.block\.", r"\1.res."),
    (r"^(gen_vision_model\.\w+\.mid)\.block_1\.", r"\1.0."),
    (r"^(gen_vision_model\.\w+\.mid)\.attn_1\.", r"\1.1."),
    (r"^(gen_vision_model\.\w+\.mid)\.block_2\.", r"\1.2."),
)


def published_names(key: str) -> str | None:
    """The published name of a tensor, from the one that transformers gives it; None where that is none of its names."""
    start = next((start for start in BEGINNINGS if key.startswith(start)), None)
    if start is None:
        return None
    name = BEGINNINGS[start] + key.removeprefix(start)
    for pattern, instead in INSIDE:
        name = re.sub(pattern, instead, name)
    return name
