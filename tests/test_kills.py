"""Every job, killed at random moments and run again, leaves what an undisturbed run leaves: bit for bit."""

import json
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import toy
from tests.test_imports import made, write_lines

KILLS = 2  # of each job; `test_resume.py` kills ten more of --job=train
TIMES = {"steps_per_second", "images_per_second", "device_hours", "input_wait"}
# names of what tells of a run, and not of its result; the pages have speeds, and their numbers stand in JSON too
OF_THE_RUN = ("log.txt", "tensorboard", "lock.json", "report.md", "report.html", "study.md", "study.html")
STUDY = """
from ml_collections import ConfigDict
from tests.toy_config import get_config as toy

def get_config():
    config = toy()
    config.method.name, config.sample.stage = "ar", "posttrain"
    config.posttrain.reward.perceptual = 0.0
    config.posttrain.loop.update(steps=2, batch_size=8, checkpoint_every=1)
    config.study.update(seeds=(0, 1), last=1, variant_jobs=("posttrain", "sample", "evaluate"))
    with config.study.unlocked():
        config.study.variants = ConfigDict({"both": {}})
    return config
"""


def flags_of(job: str, trained: Path, folder: Path) -> list[str]:
    """What makes the job work for a while; `folder` is for what it reads, and has its config file."""
    (folder / "config.py").write_text(STUDY)
    tokenizer = f"--config.tokenizer_from={trained / 'tokenizer'}"
    config = folder / "config.py" if job == "study" else toy.CONFIG
    flags = {
        "tokenize": [tokenizer, "--config.codes.num_shards=40"],
        "posttrain": [
            tokenizer,
            f"--config.init_from={trained / 'generator'}",
            *(f"--config.posttrain.loop.{one}" for one in ("steps=30", "batch_size=4", "checkpoint_every=4")),
            "--config.posttrain.reward.perceptual=0",
        ],
        "sample": ["--config.sample.num_images=200"],
        "import": [tokenizer, f"--config.import_codes.source={folder / 'codes.jsonl'}", "--config.codes.num_shards=40"],
        "convert": [f"--config.convert.source={trained / 'generator'}", "--config.convert.export={workdir}/out.bin"],
        "study": [tokenizer, f"--config.codes_from={trained / 'codes'}"],
        "sweep": ["--config.sweep.guidance_scale=(1.0, 2.0, 3.0)"],
    }[job]
    if job == "import":
        write_lines(folder / "codes.jsonl", *made(4000))
    return [f"--config={config}", f"--job={job}", *flags]


def start(workdir: Path, trained: Path, flags: list[str]) -> subprocess.Popen:
    """Starts a job; a new workdir has the toy tokenizer and generator, for the jobs that look for them there."""
    if not workdir.exists():
        for name in ("tokenizer", "generator") if any(one in flags for one in ("--job=sample", "--job=sweep")) else ():
            shutil.copytree(trained / name, workdir / name)
        workdir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "rear_jax.main", f"--workdir={workdir}"]
    command += [one.format(workdir=workdir) for one in flags]
    return subprocess.Popen(
        command, env=toy.environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors


def wait_for_log(workdir: Path, process: subprocess.Popen, lines: int) -> None:
    """Until the process has written to its log: before that it only imports."""
    while process.poll() is None and written(workdir) <= lines:
        time.sleep(0.005)


def written(workdir: Path) -> int:
    """Lines of the log so far."""
    log = workdir / "log.txt"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def result(workdir: Path) -> dict[str, Any]:
    """All that a job has left, by file: arrays, numbers and bytes; of checkpoints the newest."""
    found: dict[str, Any] = {}
    for file in sorted(workdir.rglob("*")):
        name, step = str(file.relative_to(workdir)), file.parent.name
        if any(part in OF_THE_RUN for part in file.relative_to(workdir).parts):
            continue
        if file.name == "state" and step.isdigit():
            found[str(file.parent.parent.relative_to(workdir))] = toy.saved_state(file.parent.parent)
        elif file.is_file() and not any(part.isdigit() for part in file.relative_to(workdir).parts[:-1]):
            found[name] = content(file, workdir)
    return found


def content(file: Path, workdir: Path) -> Any:
    """Of JSON the values, in which the folder has no name."""
    if file.suffix == ".npz":
        with np.load(file) as arrays:
            return dict(arrays)
    if file.suffix in (".json", ".jsonl"):
        text = file.read_text().replace(str(workdir), "WORKDIR")
        return [timeless(json.loads(one)) for one in (text.splitlines() if file.suffix == ".jsonl" else [text])]
    return file.read_bytes()


def timeless(value: Any) -> Any:
    """The same JSON without what tells how long something took."""
    if isinstance(value, dict):
        return {name: timeless(one) for name, one in value.items() if name not in TIMES}
    return [timeless(one) for one in value] if isinstance(value, list) else value


@pytest.mark.slow
@pytest.mark.parametrize("job", ["tokenize", "posttrain", "sample", "import", "convert", "study", "sweep"])
def test_a_killed_job_ends_like_an_undisturbed_one(job, tmp_path, trained):
    flags = flags_of(job, trained, tmp_path)
    undisturbed, disturbed = tmp_path / "whole" / "run", tmp_path / "killed" / "run"  # pages bear the folder's name
    whole = start(undisturbed, trained, flags)
    wait_for_log(undisturbed, whole, 0)
    since = time.monotonic()
    finish(whole)
    length, random = time.monotonic() - since, np.random.default_rng(zlib.crc32(job.encode()))
    moments = random.uniform(0, length, KILLS)
    for moment in moments:
        lines = written(disturbed)
        process = start(disturbed, trained, flags)
        wait_for_log(disturbed, process, lines)
        time.sleep(moment)
        process.kill()
        process.communicate(timeout=60)
    finish(start(disturbed, trained, flags))
    wanted, found = result(undisturbed), result(disturbed)
    assert wanted.keys() == found.keys(), moments
    for name in wanted:
        np.testing.assert_equal(found[name], wanted[name], err_msg=f"{name}, killed at {moments}")
