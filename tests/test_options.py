"""Options of the training jobs that the toy experiment leaves off, each through the real job."""

import json

import numpy as np
import pytest

from tests import toy

pytestmark = pytest.mark.slow


def records(workdir, job):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [r for r in lines if r["job"] == job]


def test_tokenizer_with_discriminator_ema_codes_and_unit_vectors(tmp_path):
    toy.run(
        tmp_path,
        "tokenizer",
        tokenizer__l2_normalize=True,
        tokenizer_training__codebook_update="ema",
        tokenizer_training__discriminator_weight=0.1,
        tokenizer_training__discriminator_start=3,
        tokenizer_training__discriminator_channels=4,
        tokenizer_training__discriminator_layers=2,
        tokenizer_training__loop__log_every=1,
    )
    written = records(tmp_path, "tokenizer")
    assert all(r["discriminator"] == 0 for r in written[:3])
    assert all(0 < r["discriminator"] < 10 and r["adversarial_weight"] > 0 for r in written[3:])
    assert (tmp_path / "reconstructions.png").exists()


def test_training_on_images_with_accumulation_and_the_papers_readings(tmp_path, trained):
    toy.run(
        tmp_path,
        "train",
        tokenizer_from=str(trained / "tokenizer"),
        codes__on_the_fly=True,
        train__accumulation=2,
        train__ema_decay=0.5,
        model__dropout=0.1,
        model__remat="full",
        method__projector="paper",
        method__embedding_reading="paper",
        method__noise_schedule="uniform",
    )
    losses = [r["loss"] for r in records(tmp_path, "train")]
    assert np.isfinite(losses).all()
    toy.run(
        tmp_path,
        "sample",
        tokenizer_from=str(trained / "tokenizer"),
        sample__use_ema=True,
        method__projector="paper",
    )
    with np.load(tmp_path / "samples.npz") as file:
        assert len(file["arr_0"]) == 24
