"""What the terminal says of an experiment: `--job=show`, and the last line of each job."""

import logging
import sys

import pytest

from rear_jax import jobs
from tests import toy


@pytest.fixture(autouse=True)
def _command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/bin/rear-jax", "--config=mine.py", "--workdir=run", "--job=show"])


def shown(capsys, workdir, **changes) -> str:
    """What the job prints."""
    jobs.run_all(("show",), toy.config(**changes), workdir)
    return capsys.readouterr().out


def test_an_empty_workdir(tmp_path, capsys):
    text = shown(capsys, tmp_path, sample__top_k=5)
    assert "  --config.sample.top_k=5  (default 0)\n" in text
    assert "evaluate.neighbours" not in text  # is as by default
    assert f"In {tmp_path}:\n  nothing yet\n" in text
    assert text.endswith(
        "Next:\n  rear-jax --config=mine.py --workdir=run --job=tokenizer,tokenize,train,sample,evaluate\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_networks_are_compared_with_their_own_family(tmp_path, capsys):
    jobs.run_all(("show",), toy.llamagen_config(), tmp_path)
    text = capsys.readouterr().out
    assert "--config.model.width=16" in text
    assert "--config.model.token_dropout" not in text


def test_a_workdir_in_which_jobs_have_run(tmp_path, capsys):
    for folder in ("tokenizer/6", "codes", "generator/4", "generator/8"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "codes" / "header.json").touch()
    text = shown(capsys, tmp_path)
    assert "  tokenizer: step 6 of 6, tokenizer\n" in text
    assert "  train: step 8 of 12, generator\n" in text
    assert text.endswith("--job=train,sample,evaluate\n")


def test_what_other_folders_give_is_not_to_be_made(tmp_path, capsys):
    text = shown(capsys, tmp_path, tokenizer_from="a.bin", codes_from="codes")
    assert text.endswith("--job=train,sample,evaluate\n")


def test_all_is_done(tmp_path, capsys):
    (tmp_path / "samples.npz").touch()
    assert shown(capsys, tmp_path, jobs=("sample",)).endswith("All jobs of the config are done: sample.\n")


def test_a_job_ends_with_where_to_look(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("rear_jax"), "propagate", True)
    (tmp_path / "generator").mkdir()
    with caplog.at_level(logging.INFO, "rear_jax"):
        jobs._say_where_to_look("train", tmp_path)
        jobs._say_where_to_look("sample", tmp_path)  # which has left nothing
    assert caplog.messages == [
        f"train: done. See {tmp_path}/generator; curves: tensorboard --logdir={tmp_path}/tensorboard"
    ]
