"""`--job=convert`: published checkpoints in, checkpoints with the authors' key names out, and a report on either."""

import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from rear_jax import artifacts, models, tokenizers
from rear_jax.convert import parity, published, rar, safetensors_file, titok, torch_writer
from rear_jax.convert.torch_files import read_tensors
from rear_jax.data.batches import ordered_batches
from rear_jax.data.codes import check_codes, open_codes
from rear_jax.data.images import open_source
from rear_jax.errors import RearError
from rear_jax.training.checkpoints import Checkpoints

log = logging.getLogger(__name__)

BATCH = 32  # images or sequences looked at together by the report


def run(config: ConfigDict, workdir: Path) -> None:
    """Reads `config.convert.source` and writes what is asked for.

    A published file becomes the folder `workdir/converted`, which `init_from`, `tokenizer_from` and
    `tokenizer_training.init_from` take; a file or a folder of checkpoints becomes the file or hub folder of
    `convert.export`. With `convert.verify` nothing is written: a report is printed.
    """
    settings = config.convert
    if not settings.source:
        raise RearError("config.convert.source is empty: name a published checkpoint, or a folder of checkpoints.")
    source = Path(settings.source)
    section = _section(source)
    export = _exporter(section, config) if settings.export else None
    if section == "tokenizer":
        module = tokenizers.build(config.tokenizer, config.data.image_size)
        params = artifacts.read_tokenizer(source, config, artifacts.tokenizer_shapes(module))
    else:
        module = _generator(config)
        params = artifacts.read_generator(source, config, artifacts.generator_shapes(module), None)
    if settings.verify:
        _report(section, module, params, config, workdir)
        return
    published_source = published.weights_file(source) is not None
    if published_source:
        _save(section, params, config, workdir / "converted")
    if export:
        export(params)
        log.info("convert: wrote %s with the authors' key names", settings.export)
    elif not published_source:
        raise RearError(f"{source} is converted already: name a file to export to, --config.convert.export=FILE.")


def _exporter(section: str, config: ConfigDict) -> Callable[[Any], None]:
    """What writes parameters as `config.convert.export` asks.

    Raises:
      RearError: that name has another ending, or the network has no such form.
    """
    target, settings = Path(config.convert.export), config[section]
    found = published.format_of(section, settings.name)
    if found.layout is titok:
        titok.require_published_form(settings)
    if target.suffix == ".safetensors":
        return functools.partial(safetensors_file.save, target, torch_name=found.layout.torch_name)
    if target.suffix == ".bin":
        return functools.partial(torch_writer.save, target, torch_name=found.layout.torch_name, under=found.under)
    if target.suffix or found.layout is not titok:
        raise RearError(
            f"config.convert.export = {config.convert.export!r}: the name must end in .safetensors or .bin (without an "
            "ending it is a hub's folder, which only a TiTok has)."
        )
    if target.exists():
        raise RearError(f"config.convert.export = {config.convert.export!r} exists already: name a new folder.")
    return functools.partial(_save_hub_folder, target, titok.hub_config(settings, config.data.image_size))


def _save_hub_folder(folder: Path, hub_config: dict, params: Any) -> None:
    """Writes a TiTok as model hubs hand it out; the file that makes it a hub's folder comes last."""
    folder.mkdir(parents=True)
    safetensors_file.save(folder / published.HUB_WEIGHTS[0], params, titok.torch_name)
    artifacts.write_json(folder / published.HUB_CONFIG, hub_config)


def _report(section: str, module: Any, params: Any, config: ConfigDict, workdir: Path) -> None:
    """Prints what the network is and does; data that is not there is named in place of its rows."""
    name, millions = published.lookup(section, config[section])
    rows = parity.size_rows(params, millions, leave_out=rar.PROJECTOR)
    try:
        if section == "tokenizer":
            rows += parity.tokenizer_rows(module, params, _images(config))
        else:
            rows += parity.generator_rows(module, params, _codes(config, workdir, module))
    except RearError as error:
        rows.append(("not measured", str(error), ""))
    print(f"{config.convert.source}: {name}; more expectations stand in the docstring of its config file")
    for row in [("quantity", "measured", "published"), *rows]:
        print("  {:<40} {:<28} {}".format(*row).rstrip())


def _images(config: ConfigDict) -> Iterator[np.ndarray]:
    """Batches of the first images of the held-out split."""
    source = open_source(config.data.source, config.data.path, config.data.eval_split)
    stop = min(config.convert.images, len(source))
    stream = ordered_batches(source, image_size=config.data.image_size, batch_size=BATCH, stop=stop)
    return (batch["image"] for batch in stream)


def _codes(config: ConfigDict, workdir: Path, module: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of evenly spread records of the codes folder."""
    if models.takes_captions(module):
        raise RearError("code files have no captions, which this generator needs.")
    codes = open_codes(artifacts.codes_folder(config, workdir))
    header = codes.header
    check_codes(
        header,
        fingerprint=header.fingerprint,
        codebook_size=module.codebook_size,
        codes_per_image=module.num_codes,
        num_classes=module.num_classes,
    )
    chosen = np.linspace(0, len(codes) - 1, min(config.convert.sequences, len(codes))).astype(np.int64)
    for start in range(0, len(chosen), BATCH):
        batch = codes.read(chosen[start : start + BATCH])
        yield batch["codes"], batch["label"]


def _section(source: Path) -> str:
    """The section of the config that describes what `source` holds, 'model' or 'tokenizer'."""
    file = published.weights_file(source)
    if file is None and source.is_dir():
        holds = Checkpoints(source, keep=1).record()["holds"]
        return next(section for section, kind in published.KINDS.items() if kind == holds)
    return published.detect(read_tensors(file or source), str(source)).section


def _generator(config: ConfigDict) -> Any:
    """The generator of the config; the tokenizer it was made for is asked for its sizes alone."""
    tokenizer = tokenizers.build(config.tokenizer, config.data.image_size)
    return models.build(config, num_codes=tokenizer.codes_per_image, embedding_dim=tokenizer.embedding_dim)


def _save(section: str, params: Any, config: ConfigDict, folder: Path) -> None:
    """Writes a folder of checkpoints with one step, 0; refuses one that holds anything already."""
    checkpoints = Checkpoints(folder, keep=1)
    if checkpoints.latest_step() is not None:
        raise RearError(f"{folder} holds a converted checkpoint already: delete it, or use another --workdir.")
    held = {"tokenizer": params} if section == "tokenizer" else params
    record = config.to_dict() | {"holds": published.KINDS[section], "converted_from": config.convert.source}
    checkpoints.save(0, {"params": jax.device_put(held)}, record)  # numpy arrays would be copied once more
    checkpoints.close()
    log.info("convert: %s is now %s", config.convert.source, folder)
