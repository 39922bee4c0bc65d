"""Settings that are right each for itself but do not fit together are one line before anything runs."""

import subprocess
import sys

import pytest

from tests import combinations, toy

FEW, MANY = 24, 200


@pytest.mark.filterwarnings("ignore")
def test_a_combination_is_one_line_or_its_shapes_can_be_made():
    drawn = [combinations.drawn(seed, combinations.QUICK) for seed in range(FEW)]
    assert {one.job for one in drawn} == set(combinations.QUICK)
    found = {one: said for one in drawn if (said := combinations.fault(one, traced=False))}
    assert not found


@pytest.mark.slow
def test_many_combinations_on_eight_devices_are_one_line_or_can_be_traced():
    """`python -m tests.combinations SEED COUNT` tries others. What fails is printed with its seed."""
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.combinations", "1000", str(MANY)],
        cwd=toy.ROOT,
        env=toy.environment(devices=8),
        capture_output=True,
        text=True,
        check=False,
    )
    print(ran.stdout)
    assert ran.returncode == 0, ran.stdout + ran.stderr[-2000:]


@pytest.mark.filterwarnings("ignore")
def test_what_is_wrong_is_found_and_shrunk(monkeypatch):
    """A check that fails with another exception, and one that takes what cannot be traced."""
    one = combinations.Combination("train", "maskgit_vqgan", "rar", (("seed", 0), ("model.width", 33)))
    assert combinations.fault(one, traced=False) == ""  # 33 is not divisible by two heads
    monkeypatch.setattr("rear_jax.generators.check_settings", lambda *_: None)
    said = combinations.fault(one, traced=False)
    assert said
    fewer, again = combinations.shrunk(one, said)
    assert fewer.changes == (("model.width", 33),)
    assert again == said
