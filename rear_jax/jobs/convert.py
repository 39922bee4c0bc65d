"""`--job=convert`: published checkpoints in, checkpoints with the authors' key names out, and a report on either."""

import functools
import logging
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from rear_jax import artifacts, generators, tokenizers
from rear_jax.artifacts import published
from rear_jax.data.batches import ordered_batches
from rear_jax.data.codes import open_codes
from rear_jax.data.codes_header import check_codes
from rear_jax.data.sources import open_source, source_settings
from rear_jax.errors import RearError
from rear_jax.evaluation import parity
from rear_jax.generators import GeneratorFamily
from rear_jax.runtime import places
from rear_jax.runtime.atomic import write_json
from rear_jax.runtime.checkpoints import Checkpoints, Saved
from rear_jax.tokenizers import TokenizerFamily
from rear_jax.training import objectives
from rear_jax.weights import safetensors_file, spliced, torch_writer
from rear_jax.weights.family import Family

log = logging.getLogger(__name__)

BATCH = 32  # images or sequences looked at together by the report


def run(config: ConfigDict, workdir: Path) -> None:
    """Reads `config.convert.source` and writes what is asked for.

    A published file becomes the folder `workdir/converted`, which `init_from`, `tokenizer_from` and
    `tokenizer_training.init_from` take; a file or a folder of checkpoints becomes the file or hub folder of
    `convert.export`. With `convert.verify` nothing is written: a report is printed.
    """
    settings, source = config.convert, _source(config)
    family, module = _described(source, _kind(source), config)
    export = _exporter(family, module, config) if settings.export else None
    _refuse_targets(config, workdir, source)
    if family.KIND == TokenizerFamily.KIND:
        params = artifacts.read_tokenizer(source, config, module)
    else:
        params = artifacts.read_generator(source, config, module, None)
    if settings.verify:
        _report(family, module, params, config, workdir)
        return
    if published.weights_file(source) is not None:
        _save(family, params, config, artifacts.converted_folder(workdir))
    if export:
        export(params)
        log.info("convert: wrote %s with the authors' key names", settings.export)
        if family.layout.part and not settings.onto:
            log.warning("convert: it holds the %s alone; config.convert.onto=ORIGINAL adds all others", family.KIND)


def check(config: ConfigDict, workdir: Path, before: Collection[str]) -> None:
    """See `Job.check`."""
    source = _source(config)
    is_tokenizer = source.resolve() == artifacts.tokenizer_folder(workdir.resolve())
    kind = TokenizerFamily.KIND if is_tokenizer else GeneratorFamily.KIND
    if not artifacts.to_be_made(source, config, workdir, before):
        kind = _kind(source)
    family, module = _described(source, kind, config)
    if config.convert.export:
        _exporter(family, module, config)
    _refuse_targets(config, workdir, source)
    check_at = artifacts.check_tokenizer_at if kind == TokenizerFamily.KIND else artifacts.check_generator
    check_at(source, config, workdir, module, before)


def _source(config: ConfigDict) -> Path:
    if not config.convert.source:
        raise RearError("config.convert.source is empty: name a published checkpoint, or a folder of checkpoints.")
    return places.place(config.convert.source)


def _kind(source: Path) -> str:
    """What `source` holds, such as 'generator'; raises RearError where it is no checkpoint."""
    if published.weights_file(source) is None and source.is_dir():
        return Saved(source).record()["holds"]
    return published.detect(published.open_published(source), str(source)).KIND


def _described(source: Path, kind: str, config: ConfigDict) -> tuple[Family, Any]:
    """Family and module of the config's network of the kind that `source` holds.

    Raises RearError: that is neither a generator nor a tokenizer; or the config's network cannot be built.
    """
    tokenizer = tokenizers.build(config.tokenizer, config.data.image_size)
    if kind == TokenizerFamily.KIND:
        return tokenizers.family_of(tokenizer), tokenizer
    if kind == GeneratorFamily.KIND:
        network = objectives.build_generator(config, tokenizer)
        return generators.family_of(network), network
    raise RearError(f"{source} holds a {kind}: only a generator or a tokenizer can be converted.")


def _refuse_targets(config: ConfigDict, workdir: Path, source: Path) -> None:
    """Raises RearError where there is nothing to write, or it is there already."""
    settings, folder = config.convert, artifacts.converted_folder(workdir)
    if settings.verify:
        return
    if published.weights_file(source) is not None:
        if folder.exists() and Saved(folder).latest_step() is not None:
            raise RearError(f"{folder} holds a converted checkpoint already: delete it, or use another --workdir.")
    elif not settings.export:
        raise RearError(f"{source} is converted already: name a file to export to, --config.convert.export=FILE.")


def _exporter(family: Family, module: Any, config: ConfigDict) -> Callable[[Any], None]:
    """What writes parameters as `config.convert.export` asks.

    Raises RearError: that name has another ending or is in no folder, the network has no such form, or it is not that
      of `onto`.
    """
    target, settings, layout = places.place(config.convert.export), config[family.SECTION], family.layout
    if not (places.is_bucket(target) or target.parent.is_dir()):
        raise RearError(f"config.convert.export = {config.convert.export!r}: make the folder {target.parent} first.")
    if onto := config.convert.onto:
        published.check_original(places.place(onto), config, family, family.shapes(module))
        spliced.check(target, places.place(onto))
        return functools.partial(published.save_onto, target, places.place(onto), config, family)
    if layout.hub:
        layout.hub.check(settings)
    if target.suffix == ".safetensors":
        return functools.partial(safetensors_file.save, target, torch_name=layout.torch_name)
    if target.suffix == ".bin":
        return functools.partial(torch_writer.save, target, torch_name=layout.torch_name, under=layout.under)
    if target.suffix or not layout.hub:
        raise RearError(
            f"config.convert.export = {config.convert.export!r}: the name must end in .safetensors or .bin (without an "
            "ending it is a hub's folder, which only a TiTok has)."
        )
    if target.exists():
        raise RearError(f"config.convert.export = {config.convert.export!r} exists already: name a new folder.")
    hub_config = layout.hub.config(settings, config.data.image_size)
    return functools.partial(_save_hub_folder, target, family, hub_config)


def _save_hub_folder(folder: Path, family: Family, hub_config: dict, params: Any) -> None:
    """Writes a network as model hubs hand it out; the file that makes it a hub's folder comes last."""
    with places.staged(folder) as made:
        made.mkdir()
        safetensors_file.save(made / published.HUB_WEIGHTS[0], params, family.layout.torch_name)
        write_json(made / published.HUB_CONFIG, hub_config)


def _report(family: Family, module: Any, params: Any, config: ConfigDict, workdir: Path) -> None:
    """Prints what the network is and does; data that is not there is named in place of its rows."""
    name, millions = family.published_size(config[family.SECTION])
    rows = parity.size_rows(params, millions, leave_out=family.layout.optional)
    try:
        if family.KIND == TokenizerFamily.KIND:
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
    data = config.data
    source = open_source(data.source, data.path, data.eval_split, source_settings(data, data.eval_split))
    stop = min(config.convert.images, len(source))
    stream = ordered_batches(source, image_size=data.image_size, batch_size=BATCH, stop=stop)
    return (batch["image"] for batch in stream)


def _codes(config: ConfigDict, workdir: Path, module: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of evenly spread records of the codes folder."""
    if generators.takes_text(module):
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


def _save(family: Family, params: Any, config: ConfigDict, folder: Path) -> None:
    """Writes a folder of checkpoints with one step, 0."""
    checkpoints = Checkpoints(folder, keep=1)
    held = {"tokenizer": params} if family.KIND == TokenizerFamily.KIND else params
    record = config.to_dict() | {"holds": family.KIND, "converted_from": config.convert.source}
    checkpoints.save(0, {"params": jax.device_put(held)}, record)  # numpy arrays would be copied once more
    checkpoints.close()
    log.info("convert: %s is now %s", config.convert.source, folder)
