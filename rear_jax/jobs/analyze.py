"""`--job=analyze`: the diagnostics of reAR on any generator, tokenizer and images: tables, plots and numbers."""

import json
import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from rear_jax import artifacts
from rear_jax.data.sources import split_facts
from rear_jax.errors import RearError
from rear_jax.evaluation import diagnostics, reference, report
from rear_jax.evaluation.diagnostics.diagnostic import Diagnostic, Row
from rear_jax.evaluation.diagnostics.quality import VARIANT, Quality
from rear_jax.evaluation.diagnostics.subject import SPLITS, Subject, require_images
from rear_jax.metrics import perceptual
from rear_jax.runtime import figures
from rear_jax.runtime.atomic import write_json
from rear_jax.runtime.mesh import make_mesh
from rear_jax.runtime.pages import save_page
from rear_jax.training import sampled

log = logging.getLogger(__name__)


def run(config: ConfigDict, workdir: Path) -> None:
    """Writes `analyze.json`, `analyze.md` and `.html` (a table for each diagnostic) and `analyze_<name>.png`.

    The generator is that of `config.sample.stage`. Each diagnostic is written down when it is done, and the same
    command goes on with the next. One that is there already, from the same networks, images and settings, is not
    computed again. Those of other networks are dropped; other diagnostics of the same networks stay.
    """
    wanted = diagnostics.chosen(config)
    subject = open_subject(config, workdir)
    of = networks_recipe(subject)
    quality = Quality(config) if any(one.scores for one in wanted) else None
    done, page = _done(workdir / "analyze.json", of), workdir / "analyze.html"
    with jax.set_mesh(make_mesh(config.mesh)):
        for one in wanted:
            recipe = json.loads(json.dumps(diagnostics.recipe_of(one, subject, quality)))
            plot = workdir / plot_name(one.name)
            if one.name in done and done[one.name]["recipe"] == recipe:
                log.info("analyze: %s is done already", one.name)
            else:
                log.info("analyze: computing %s", one.name)
                done[one.name] = {"recipe": recipe, "rows": one.measure(subject, quality)}
                log.info("analyze: %s\n%s", one.title, table(done[one.name]["rows"]))
                for old in (plot, page):
                    old.unlink(missing_ok=True)  # it is of other numbers
                done = {name: done[name] for name in diagnostics.DIAGNOSTICS if name in done}  # in their order
                write_json(workdir / "analyze.json", {"networks": of, "diagnostics": done})
            if not (plot.exists() and page.exists()):
                one.draw(plot, one.title, done[one.name]["rows"])
                _write_page(workdir, of, done)
    log.info("analyze: see %s", workdir / "analyze.md")


def check(config: ConfigDict, workdir: Path, before: Collection[str]) -> None:
    """See `Job.check`."""
    wanted = diagnostics.chosen(config)
    network = sampled.check(config, workdir, before)
    for which in diagnostics.splits_of(config, wanted):
        split = config.data[SPLITS[which]]
        facts = split_facts(config.data, split)
        require_images(config, which, facts.num_images)
        artifacts.check_conditions(config, workdir, network, split, facts, before)
    if any(one.scores for one in wanted):
        reference.outline_network(config.evaluate)
        jax.eval_shape(lambda: perceptual.for_scores(config.lpips, VARIANT)[1].params)


def open_subject(config: ConfigDict, workdir: Path) -> Subject:
    """The networks of the experiment on its devices, as `--job=sample` opens them; images are read when asked for."""
    tokenizer, generator = sampled.load(config, workdir)
    reader = artifacts.reader_in_step(config, workdir, generator.module)
    generator.require_text_encoder(artifacts.text_encoder_of(config, workdir, generator.module, reader))
    return Subject(config, workdir, generator, tokenizer, make_mesh(config.mesh), reader)


def networks_recipe(subject: Subject) -> dict[str, Any]:
    """The networks, and how they compute."""
    config, tokenizer, generator = subject.config, subject.tokenizer, subject.generator
    return {
        "generator": generator.fingerprint,
        "generator_step": generator.step,
        "generator_dtype": config.model.dtype,
        "stage": config.sample.stage,
        "use_ema": config.sample.use_ema,
        "tokenizer": tokenizer.fingerprint,
        "decoder": tokenizer.decoder_fingerprint,
        "tokenizer_dtype": config.tokenizer.dtype,
        "tokenizer_precision": tokenizer.module.precision,
    }


def plot_name(name: str) -> str:
    """The file of a diagnostic's plot."""
    return f"analyze_{name}.png"


def table(rows: Sequence[Row]) -> str:
    """A Markdown table."""
    return figures.table(list(rows[0]), ([_cell(value) for value in row.values()] for row in rows))


def _cell(value: str | float | None) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def _done(file: Path, of: dict[str, Any]) -> dict[str, dict]:
    """What an earlier run has left of these networks, by the name of the diagnostic.

    Raises RearError: the file is damaged.
    """
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text())
        return found["diagnostics"] if found["networks"] == json.loads(json.dumps(of)) else {}
    except (ValueError, KeyError, TypeError) as error:
        raise RearError(f"{file} cannot be read ({error}): delete it, and run --job=analyze again.") from error


def _write_page(workdir: Path, of: dict[str, Any], done: dict[str, dict]) -> None:
    """The page that shows the numbers and plots."""
    page = []
    for name, found in done.items():
        page += _section(diagnostics.DIAGNOSTICS[name], found)
    page += ["## Networks", "", *report.recipe_lines(of)]
    save_page(workdir / "analyze.md", "Diagnostics", "\n".join(page))


def _section(one: Diagnostic, found: dict) -> list[str]:
    picture = f"![{one.title}]({plot_name(one.name)})"
    recipe = report.recipe_lines(found["recipe"])
    return [f"## {one.title}", "", one.meaning, "", table(found["rows"]), "", picture, "", *recipe, ""]
