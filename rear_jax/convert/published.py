"""Which network a published checkpoint file holds, and its parameters in this project's form.

A file format is a module of this package with `SIGNATURE` (a key that only this network has), `IGNORE`, `sizes` and
`torch_name`; `FORMATS` lists them all.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from rear_jax.convert import (
    alitok,
    alitok_tokenizer,
    layout,
    llamagen,
    llamagen_vq,
    maskgit_vqgan,
    rar,
    titok,
    vqgan_plus,
)
from rear_jax.convert.torch_files import read_tensors
from rear_jax.errors import RearError


class Format(NamedTuple):
    """One published file format.

    Attributes:
      section: of the config that describes the network, 'model' (generators) or 'tokenizer'.
      network: `name` in that section.
      layout: the converter module.
      under: key under which the authors' code looks for the state dict in a pickled file; '' = the file is one.
    """

    section: str
    network: str
    layout: ModuleType
    under: str = ""


FORMATS = (
    Format("model", "rar", rar),
    Format("model", "llamagen", llamagen, under="model"),
    Format("model", "alitok", alitok),
    Format("tokenizer", "maskgit_vqgan", maskgit_vqgan),
    Format("tokenizer", "vqgan_plus", vqgan_plus),
    Format("tokenizer", "llamagen_vq", llamagen_vq, under="model"),
    Format("tokenizer", "titok", titok),
    Format("tokenizer", "alitok", alitok_tokenizer),
)
PUBLISHED = {  # (network, width, depth), for tokenizers (network, `EXTENT`) -> name and million parameters
    ("rar", 768, 20): ("reAR-S", 218.4),
    ("rar", 768, 24): ("RAR-B or reAR-B", 260.9),
    ("rar", 1024, 24): ("RAR-L or reAR-L", 461.7),
    ("rar", 1280, 32): ("RAR-XL", 955.4),
    ("rar", 1408, 40): ("RAR-XXL", 1498.5),
    ("llamagen", 768, 12): ("LlamaGen-B", 110.9),
    ("llamagen", 1024, 24): ("LlamaGen-L", 342.9),
    ("llamagen", 1280, 36): ("LlamaGen-XL", 774.7),
    ("llamagen", 1536, 48): ("LlamaGen-XXL", 1411.0),
    ("llamagen", 3200, 24): ("LlamaGen-3B", 3096.7),
    ("llamagen_text", 1280, 36): ("LlamaGen-XL, text-conditional", 777.9),
    ("alitok", 768, 24): ("AliTok-B", 177.0),
    ("alitok", 1024, 24): ("AliTok-L", 317.9),
    ("alitok", 1280, 32): ("AliTok-XL", 662.1),
    ("maskgit_vqgan", 5): ("MaskGIT-VQGAN", 54.5),
    ("vqgan_plus", 5): ("VQGAN+", 55.0),
    ("llamagen_vq", 5): ("LlamaGen VQ-16", 71.9),
    ("llamagen_vq", 4): ("LlamaGen VQ-8", 70.1),
    ("titok", 512, "codes", 128): ("TiTok-S-128", 83.7),
    ("titok", 768, "codes", 64): ("TiTok-B-64", 204.8),
    ("titok", 1024, "codes", 32): ("TiTok-L-32", 641.1),
    ("titok", 1024, "pixels", 64): ("TiTok-BL-64 VQ", 390.0),
    ("alitok", 768, 1024, 17): ("AliTok", 389.9),
}
EXTENT = {  # what tells the published sizes of a tokenizer apart; of those with a grid it is the number of levels
    "titok": ("decoder_width", "predicts", "num_latent_tokens"),
    "alitok": ("encoder_width", "decoder_width", "prefix_tokens"),
}
HUB_CONFIG = "config.json"
HUB_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
KINDS = {"model": "generator", "tokenizer": "tokenizer"}


def format_of(section: str, network: str) -> Format:
    """The file format of a network of this project.

    Raises:
      RearError: it has none.
    """
    found = [f for f in FORMATS if (f.section, f.network) == (section, network)]
    if not found:
        raise RearError(f"config.{section}.name = {network!r} has no published file format.")
    return found[0]


def detect(tensors: Mapping[str, np.ndarray], source: str) -> Format:
    """The format of a state dict, by its keys.

    Raises:
      RearError: it is none that is known here.
    """
    found = [f for f in FORMATS if any(re.fullmatch(f.layout.SIGNATURE, key) for key in tensors)]
    if len(found) != 1:
        known, first = ", ".join(f.network for f in FORMATS), ", ".join(sorted(tensors)[:3])
        raise RearError(f"{source} is no checkpoint of a network known here ({known}); its first keys are {first}.")
    return found[0]


def lookup(section: str, sizes: Mapping[str, Any]) -> tuple[str, float | None]:
    """Name and million parameters of a network of such sizes (keys of a config section), as published."""
    if section == "model":
        network = "llamagen_text" if sizes.get("condition") == "text" else sizes["name"]
        key = network, sizes["width"], sizes["depth"]
    elif sizes["name"] in EXTENT:
        key = sizes["name"], *(sizes[size] for size in EXTENT[sizes["name"]])
    else:
        key = sizes["name"], len(sizes["channel_mult"])
    return PUBLISHED.get(key, (f"a {sizes['name']} of no published size", None))


def weights_file(place: Path) -> Path | None:
    """The file with the weights of a published checkpoint, None where `place` is none.

    Args:
      place: the file itself, or a folder as model hubs hand it out, with `config.json` beside the weights.

    Raises:
      RearError: such a folder lacks the weights.
    """
    if place.is_file():
        return place
    if not (place / HUB_CONFIG).is_file():
        return None
    found = [place / name for name in HUB_WEIGHTS if (place / name).is_file()]
    if not found:
        raise RearError(f"{place} has a {HUB_CONFIG} but neither of {', '.join(HUB_WEIGHTS)}: download it again.")
    return found[0]


def read_params(path: Path, config: ConfigDict, section: str, shapes: Any) -> Any:
    """The parameters in a published file, for the network that the config describes.

    Args:
      path: of the file, or of a hub's folder.
      config: the experiment.
      section: 'model' or 'tokenizer'.
      shapes: parameter shapes of that network.

    Returns:
      A nested dict of float32 numpy arrays. Projectors that only one of file and config has are left out of it
      (`rar.keep_projectors`); nothing else may be missing or spare.

    Raises:
      RearError: the file holds something else, other sizes, or not everything; each key or setting is named.
    """
    tensors = read_tensors(weights_file(path) or path)
    found = detect(tensors, str(path))
    if found.section != section:
        raise RearError(f"{path} holds a {KINDS[found.section]} ({found.network}), not a {KINDS[section]}.")
    _require_sizes(found, tensors, config, path)
    ignore = found.layout.IGNORE
    if section == "model":
        spare = [prefix for module, prefix in rar.PROJECTOR.items() if module not in shapes]
        ignore += tuple(f"{prefix}." for prefix in spare)
        shapes = rar.keep_projectors(shapes, rar.projectors_in(tensors), str(path))
    return layout.from_torch(tensors, shapes, found.layout.torch_name, ignore=ignore, source=str(path))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise RearError(f"{path} is damaged ({error}): download it again.") from error


def _require_sizes(found: Format, tensors: Mapping[str, np.ndarray], config: ConfigDict, path: Path) -> None:
    settings = config[found.section]
    sizes = {"name": found.network} | found.layout.sizes(tensors, source=str(path))
    if found.layout is titok and (path / HUB_CONFIG).is_file():
        sizes |= titok.hub_sizes(_read_json(path / HUB_CONFIG), source=str(path / HUB_CONFIG))
    wrong = [
        f"{key} {size!r} (config: {settings.get(key)!r})" for key, size in sizes.items() if settings.get(key) != size
    ]
    if wrong:
        name, _ = lookup(found.section, sizes)
        raise RearError(f"{path} is {name} with config.{found.section}.{', '.join(wrong)}: use that network's config.")
