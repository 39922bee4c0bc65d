"""`--job=demo`: a page on this machine that draws with the generator, shows codes, and shows exposure bias."""

import importlib.util
import logging
import time
from collections.abc import Collection
from pathlib import Path

from ml_collections import ConfigDict

from rear_jax import artifacts, generators
from rear_jax.demo.studio import Studio
from rear_jax.errors import RearError
from rear_jax.runtime.mesh import make_mesh
from rear_jax.runtime.stopping import StopSign
from rear_jax.sampling.generate import sampler_of
from rear_jax.training import sampled

log = logging.getLogger(__name__)

LOCAL = ("127.0.0.1", "localhost", "::1")
PATIENCE = 0.2  # seconds between two looks at whether a signal came


def run(config: ConfigDict, workdir: Path) -> None:
    """Serves the page at `config.demo.host` until SIGINT or SIGTERM comes; writes nothing to the workdir."""
    _check_settings(config)
    studio = open_studio(config, workdir)
    from rear_jax.demo import page  # here, because other jobs need no server

    settings, stop = config.demo, StopSign(make_mesh(config.mesh), ahead=0)
    with stop.listening(), page.served(studio, settings) as address:
        if settings.host not in LOCAL:
            log.warning("demo: config.demo.host = %r lets others on the network use the page", settings.host)
        log.info("demo: open %s in a browser; Ctrl-C ends it", address)
        while not stop.stops_after(None):
            time.sleep(PATIENCE)
    log.info("demo: ended")


def check(config: ConfigDict, workdir: Path, before: Collection[str]) -> None:
    """See `Job.check`."""
    _check_settings(config)
    network = sampled.check(config, workdir, before)
    if generators.takes_text(network):
        artifacts.check_text_encoder(config, workdir, network, before)


def open_studio(config: ConfigDict, workdir: Path) -> Studio:
    """The networks of the experiment on its devices, as `--job=sample` opens them."""
    tokenizer, generator = sampled.load(config, workdir)
    network = generator.module
    reader = artifacts.open_text_reader(config, workdir, network) if generators.takes_text(network) else None
    generator.require_text_encoder(reader.fingerprint if reader else "")
    return Studio(config, generator, tokenizer, reader, make_mesh(config.mesh))


def _check_settings(config: ConfigDict) -> None:
    sampler_of(config.sample)
    if importlib.util.find_spec("gradio") is None:
        raise RearError("--job=demo needs gradio, which is not installed: pip install 'rear-jax[demo]'.")
