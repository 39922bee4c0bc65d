"""`--job=study`: an experiment in variants and over seeds, as tables and one picture of curves."""

import difflib
import json
import logging
import re
import statistics
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from rear_jax import artifacts
from rear_jax.config import downloads, ranges
from rear_jax.data.sources import with_class_count
from rear_jax.errors import RearError
from rear_jax.evaluation import curves, report, watching
from rear_jax.jobs.evaluate import SAMPLES
from rear_jax.jobs.job import Job
from rear_jax.runtime import figures, identity
from rear_jax.runtime.atomic import read_json, write_json
from rear_jax.runtime.pages import save_page
from rear_jax.runtime.writer import read_metrics
from rear_jax.sampling.conditions import scored

log = logging.getLogger(__name__)

SIGNIFICANT = 0.05  # p-value below which a difference is marked


def run(config: ConfigDict, workdir: Path, jobs: Mapping[str, Job]) -> None:
    """Runs `config.study.jobs` for each seed and, from what they leave, `variant_jobs` for each variant.

    The tokenizer and the codes are those of `workdir`, the generator that of `workdir/seed_<n>`; a variant works in
    `workdir/seed_<n>/<variant>`. Whatever is done already is not done again; each folder keeps the settings that it was
    made by, and is refused where they have changed. Leaves `study.png`, `study.json`, `study.md` and
    `study.html`, with tables of

    - the samples' scores, at each guidance where 'sweep' is among `variant_jobs`;
    - correct-token ratios and perplexities, where 'analyze' is among them and computes 'accuracy';
    - Fréchet distances of samples drawn in training, where `config.train.evaluate_every` asks for them; they are also
      drawn, in `study_distances.png`;
    - the last logged metrics.

    Each has a row for each variant, with mean ± standard deviation over seeds, and says what differs from the first
    row, or from the first row of the same network where networks are trained in several ways.

    Raises RearError: a variant is none of this experiment, a job is unknown, or a folder was made by other settings.
    """
    study = config.study
    _check_settings(study, jobs)
    plans = {seed: _plan(config, workdir, seed) for seed in study.seeds}
    variants_in_order = {name: study.variants[name].to_dict() for name in _in_order(study.variants)}
    results = {name: [] for name in variants_in_order}
    for seed, (base, variants) in plans.items():
        folder = workdir / f"seed_{seed}"
        _claim(folder, base)
        for job in study.jobs:
            jobs[job].run(base, folder)
        for name, variant in variants.items():
            log.info("study: seed %d, variant %s", seed, name)
            _claim(folder / name, variant)
            for job in study.variant_jobs:
                jobs[job].run(variant, folder / name)
            results[name].append(_result(folder / name, study))
    write_json(workdir / "study.json", {"results": results, "config": config.to_dict()})
    page = _page(results, _references(variants_in_order))
    save_page(workdir / "study.md", "Study", "\n".join([page, *_draw(workdir, study, variants_in_order)]))
    log.info("study: wrote %s\n%s", workdir / "study.md", page)


def check(config: ConfigDict, workdir: Path, before: Collection[str], jobs: Mapping[str, Job]) -> None:
    """See `Job.check`. Samples and scores are checked of the first seed, which stands for the others."""
    study = config.study
    _check_settings(study, jobs)
    made = tuple({"tokenizer", "tokenize", "import"} & set(before))  # what the whole study shares
    for seed in study.seeds:
        folder, (base, variants) = workdir / f"seed_{seed}", _plan(config, workdir, seed)
        _refuse_others(folder, base)
        if "tokenizer" in made and not config.tokenizer_from:
            for one in (base, *variants.values()):
                one.tokenizer_from = ""  # so that it counts as still to be made
        _check_in_turn(study.jobs, base, folder, made, jobs)
        names = study.variant_jobs if seed == study.seeds[0] else study.variant_jobs[:1]
        for name, variant in variants.items():
            _refuse_others(folder / name, variant)
            if "train" in study.jobs:
                variant.init_from = ""  # likewise
            _check_in_turn(names, variant, folder / name, (*made, *study.jobs), jobs)


def _check_in_turn(
    names: Sequence[str], config: ConfigDict, folder: Path, before: tuple[str, ...], jobs: Mapping[str, Job]
) -> None:
    for place, name in enumerate(names):
        jobs[name].check(config, folder, (*before, *names[:place]))


def _check_settings(study: ConfigDict, jobs: Mapping[str, Job]) -> None:
    if len(study.seeds) < 2 or not study.variants:
        raise RearError("config.study needs seeds, 2 or more, and variants.")
    if unknown := [job for job in (*study.jobs, *study.variant_jobs) if job not in jobs]:
        raise RearError(f"config.study: unknown job {unknown[0]!r}: use {', '.join(jobs)}.")
    if not study.variant_jobs or study.variant_jobs[0] not in report.CURVES:
        raise RearError(f"config.study.variant_jobs must begin with a training job, one of {', '.join(report.CURVES)}.")
    if not {"evaluate", "sweep"} & set(study.variant_jobs):
        raise RearError(
            "config.study.variant_jobs must score samples: end it with 'sample' and 'evaluate', or 'sweep'."
        )


def _plan(config: ConfigDict, workdir: Path, seed: int) -> tuple[ConfigDict, dict[str, ConfigDict]]:
    """The experiment with another seed, on the tokenizer, codes and reference of the whole study, and its variants."""
    base = scored(config)
    base.seed = seed
    if not config.tokenizer_from:
        base.tokenizer_from, base.tokenizer_section = str(artifacts.tokenizer_folder(workdir)), ""
    base.codes_from = str(artifacts.codes_folder(config, workdir))
    base.evaluate.cache = config.evaluate.cache or str(workdir / "references")
    generator, section = config.init_from, config.init_section
    if "train" in config.study.jobs:
        generator, section = str(artifacts.generator_folder(workdir / f"seed_{seed}")), ""
    variants = {}
    for name in _in_order(config.study.variants):
        changes = config.study.variants[name]
        variants[name] = _changed(base, changes, f"config.study.variants.{name}")
        variants[name].init_from, variants[name].init_section = generator, section
    return base, variants


def _in_order(names: Iterable[str]) -> list[str]:
    """Sorted with numbers by their size, so that 'width_64' is before 'width_128'."""
    return sorted(
        names, key=lambda name: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
    )


def _changed(base: ConfigDict, changes: ConfigDict, option: str) -> ConfigDict:
    """The experiment with some settings changed; raises RearError where there is no such setting or value."""
    known = identity.flatten(base.to_dict())
    for key in identity.flatten(changes.to_dict()):
        if key not in known:
            nearest = "".join(f" Did you mean {near!r}?" for near in difflib.get_close_matches(key, known, 1))
            raise RearError(f"{option}: config has no setting {key!r}.{nearest}")
    variant = base.copy_and_resolve_references()
    try:
        variant.update(changes)
    except TypeError as error:
        raise RearError(f"{option}: {error}.") from None
    try:
        return downloads.fetched(ranges.checked(with_class_count(ranges.checked(variant))))
    except RearError as error:
        raise RearError(f"{option}: {error}") from None


def _claim(folder: Path, config: ConfigDict) -> None:
    """Keeps the settings that what is in `folder` is made by; raises RearError where it was made by others."""
    if not _refuse_others(folder, config):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "settings.json", config.to_dict())


def _refuse_others(folder: Path, config: ConfigDict) -> bool:
    """Whether settings are kept in `folder`; raises RearError where they are others."""
    kept = folder / "settings.json"
    if not kept.exists():
        return False
    if not (settings := read_json(kept)):
        raise RearError(f"{kept} holds no settings: delete it if what is in that folder is made by this experiment.")
    identity.refuse_changes(settings, config, identity.STUDY, str(folder))
    return True


def _result(folder: Path, study: ConfigDict) -> dict:
    """Title of a table -> the values of this run in it."""
    records = read_metrics(folder, study.variant_jobs[0])[-study.last :]
    names = [name for name in report.CURVES[study.variant_jobs[0]] if name in records[-1]]
    metrics = {name: statistics.fmean(record[name] for record in records) for name in names}
    last = {f"Training, means of the last {study.last} logged steps": metrics}
    return _scores(folder, study) | _predictions(folder, study) | _watched(folder, study) | last


def _scores(folder: Path, study: ConfigDict) -> dict[str, dict[str, float]]:
    """Set of samples -> its scores: one set, or that of each point of a sweep."""
    if "sweep" not in study.variant_jobs:
        return {"Samples": json.loads((folder / "scores.json").read_text())["scores"][SAMPLES]}
    found, scores = json.loads((folder / "sweep.json").read_text()), {}
    for point in found["points"]:
        scale, power = point.pop("guidance_scale"), point.pop("guidance_power")
        scores["Samples without guidance" if scale == 1 else f"Samples at guidance {scale:g}, power {power:g}"] = point
    if "confirmed" in found:
        scores["New samples at the best guidance of each run"] = found["confirmed"]
    return scores


def _watched(folder: Path, study: ConfigDict) -> dict[str, dict[str, float]]:
    """Each Fréchet distance of samples drawn in training -> its value after each number of steps."""
    records = read_metrics(folder, watching.JOB) if study.variant_jobs[0] == "train" else []
    names = curves.distances(records[-1] if records else ())
    return {
        f"Samples in training: {name}": {f"step {record['step']}": record[name] for record in records} for name in names
    }


def _predictions(folder: Path, study: ConfigDict) -> dict[str, dict[str, float]]:
    """Each measure of the diagnostic 'accuracy' -> its values, by images and by the noise in the context."""
    if "analyze" not in study.variant_jobs:
        return {}
    found = json.loads((folder / "analyze.json").read_text())["diagnostics"].get("accuracy", {"rows": []})
    tables: dict[str, dict[str, float]] = {}
    for row in found["rows"]:
        images, noise = row.pop("images"), row.pop("random context")
        for measure, value in row.items():
            tables.setdefault(f"Predictions: {measure}", {})[f"{images}, {noise:.0%} of context random"] = value
    return tables


def _references(variants: Mapping[str, Mapping]) -> dict[str, str]:
    """Variant -> the one that it is compared with: the first, or the first of its network if networks have several."""
    networks = curves.networks_of(variants)
    if len(set(networks.values())) == len(variants):
        return dict.fromkeys(variants, next(iter(variants)))
    firsts: dict[str, str] = {}
    return {name: firsts.setdefault(network, name) for name, network in networks.items()}


def _page(results: dict[str, list[dict]], references: Mapping[str, str]) -> str:
    """study.md: a table for each title."""
    tables = {}
    for title in next(iter(results.values()))[0]:
        tables[title] = table({name: [run[title] for run in runs] for name, runs in results.items()}, references)
    firsts = [repr(name.replace("_", " ")) for name in dict.fromkeys(references.values())]
    what = firsts[0] if len(firsts) == 1 else f"the first row of the same network ({', '.join(firsts)})"
    note = f"\\* differs from {what} beyond chance: Welch's t-test over seeds, p < {SIGNIFICANT}."
    return "\n".join([*(f"## {title}\n\n{text}\n" for title, text in tables.items()), note, ""])


def table(rows: dict[str, list[dict[str, float]]], references: Mapping[str, str]) -> str:
    """A Markdown table: a row for each variant, a column for each value, mean ± standard deviation over its runs.

    A star marks what differs from the row of `references[variant]` by more than the spread over the runs explains:
    Welch's t-test with p < 0.05, two-sided. One mark in twenty is chance. A value that a variant does not have is left
    empty.
    """
    columns = list(dict.fromkeys(name for runs in rows.values() for name in runs[0]))

    def cell(variant: str, column: str) -> str:
        if column not in rows[variant][0]:
            return ""
        values = [run[column] for run in rows[variant]]
        others = [run[column] for run in rows[references[variant]] if column in run]
        mark = " \\*" if others and _differ(values, others) else ""
        spread = float(f"{statistics.stdev(values):.2g}")  # two digits, and 130 is not shown as 1.3e+02
        return f"{statistics.fmean(values):.4g} ± {spread:g}{mark}"

    lines = [[name.replace("_", " "), *(cell(name, column) for column in columns)] for name in rows]
    return figures.table(["variant", *columns], lines)


def _differ(values: list[float], others: list[float]) -> bool:
    from scipy.stats import ttest_ind  # here, because other jobs need not wait for it

    if statistics.stdev(values) == statistics.stdev(others) == 0.0:
        return values[0] != others[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # values that are equal but for rounding
        return bool(ttest_ind(values, others, equal_var=False).pvalue < SIGNIFICANT)


def _draw(workdir: Path, study: ConfigDict, variants: Mapping[str, Mapping]) -> list[str]:
    """Draws the curves; the lines of study.md that show them."""
    runs = {name: [workdir / f"seed_{seed}" / name for seed in study.seeds] for name in variants}
    looks = curves.styles(variants)
    curves.draw(workdir / "study.png", runs, looks, study.variant_jobs[0])
    shown = ["![Curves, a line for each variant](study.png)"]
    if study.variant_jobs[0] == "train" and curves.watched_scores(runs):
        curves.draw_distances(workdir / "study_distances.png", runs, looks)
        shown.insert(0, "![Distances of samples drawn in training, by steps](study_distances.png)\n")
    return shown
