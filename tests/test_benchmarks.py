"""Every benchmark runs, at toy size, and prints its table."""

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.errors import JaxRuntimeError
from PIL import Image

from rear_jax.plan import chips
from tests.toy import ROOT, environment

FOLDER = ROOT / "benchmarks"
SIZES = ("--width=32", "--layers=2", "--heads=2", "--codes=4", "--codebook=64", "--batch=2", "--repeats=1")
CONFIG = "--config=tests/toy_config.py"


@pytest.fixture
def measure(monkeypatch):
    """The module that the benchmarks share."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import measure

    return measure


def cells(table: str) -> list[list[str]]:
    """The cells of the rows of printed tables."""
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def run(script: str, *flags: str) -> list[list[str]]:
    """Runs a benchmark in this process, which has imported what takes long; the cells of its tables' rows."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.chdir(ROOT)
        patch.syspath_prepend(str(FOLDER))
        patch.setattr("sys.argv", [script, *flags])
        runpy.run_path(str(FOLDER / script), run_name="__main__")
    return cells(printed.getvalue())


@pytest.mark.slow
def test_train_step_doubles_the_batch():
    head, *rows = run("train_step.py", CONFIG, "--batch=4", "--doublings=1", "--repeats=1")
    assert "MFU" in head
    assert [row[0] for row in rows] == ["rear_jax, batch 4", "rear_jax, batch 8"]
    assert all(row[head.index("MFU")].endswith("%") for row in rows)


@pytest.mark.slow
def test_attention():
    """Every kernel has its row, with dropout and without, and says why where it cannot run."""
    head, *rows = run("attention.py", "--shapes=toy", "--batch=2", "--calls=1", "--repeats=1")
    assert [row[2] for row in rows] == ["plain", "cudnn", "fused", "flash", "splash"] * 2
    for row in rows:
        assert len(row) == len(head)
        assert row[2] == "plain" or row[3].endswith("not on cpu")
    assert rows[5][1] == "0.1"
    assert rows[5][head.index("times plain")] == "1.00"


@pytest.mark.slow
def test_attention_is_checked_before_it_is_timed(measure, monkeypatch, capsys):
    """Our kernels, interpreted, are right; what is wrong is named, is not timed, and fails the command."""
    import attention

    flags = ("--shapes=toy", "--batch=2", "--calls=1", "--repeats=1", "--kernels=flash", "--interpret")
    monkeypatch.setattr("sys.argv", ["attention.py", *flags])
    attention.main()
    assert "wrong" not in capsys.readouterr().out
    monkeypatch.setitem(
        attention.OURS, "flash", lambda qkv, *_, interpret: 1.1 * qkv[:, :, 2].reshape(*qkv.shape[:2], -1)
    )
    with pytest.raises(SystemExit, match=r"wrong: flash at toy with dropout 0\.0; flash at toy with dropout 0\.1"):
        attention.main()
    assert capsys.readouterr().out.count(": wrong |  |  |  |  |") == 2


@pytest.mark.slow
def test_posttrain_step():
    rows = run("posttrain_step.py", *SIZES, "--model=llamagen", "--group=2", "--accumulation=2", "--remat=full")
    assert [row[2] for row in rows[:2]] == ["share of the whole step", "100%"]
    assert len(rows) == 8
    assert float(rows[3][3]) == pytest.approx(2 * float(rows[2][3]), rel=0.01)  # TFLOP of the released form


@pytest.mark.slow
def test_decode():
    rows = run("decode.py", *SIZES)
    assert [row[0] for row in rows[1:3]] == ["floor: arithmetic", "floor: memory"]
    assert len(rows) == 7


@pytest.mark.slow
def test_sample():
    rows = run("sample.py", CONFIG, "--images=24", "--batch=8", "--repeats=1")
    assert rows[1][0] == "--job=sample of 24 images, end to end"
    assert len(rows) == 8


@pytest.mark.slow
def test_data():
    """In a process of its own, as benchmarks are started."""
    flags = ("--lines=20", "--records=64", "--batch=8", "--shards=2", "--repeats=1")
    command = [sys.executable, FOLDER / "data.py", *flags]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(cells(done.stdout)) == 4


@pytest.mark.slow
def test_input_wait():
    small = ("--width=32", "--layers=1", "--heads=2", "--batch=2", "--steps=5", "--records=1024")
    assert len(run("input_wait.py", *small, "--large-batch=512", "--shards=2")) == 5


@pytest.mark.slow
def test_evaluate():
    assert len(run("evaluate.py", "--batch=2", "--repeats=1", "--generated=60", "--real=50")) == 5


@pytest.mark.slow
def test_encode_text():
    sizes = ("--width=32", "--depth=2", "--heads=2", "--mlp-width=64", "--batch=2")
    head, *rows = run("encode_text.py", *sizes, "--repeats=1", "--captions=5")
    assert head[0] == "2 captions of 120 tokens"
    assert [row[0] for row in rows] == ["rear_jax", "cleaning, one core"]


@pytest.mark.slow
def test_speed_against_quality(tmp_path):
    """A row for AR and one for reAR, with a picture and numbers; the second time, nothing is trained again."""
    flags = ("--quick", "--tokenizers", "grid", "--repeats=2", f"--workdir={tmp_path}")
    head, *rows = run("speed_against_quality.py", *flags)
    assert [row[:3] for row in rows] == [["grid", "AR", "64"], ["grid", "reAR", "64"]]
    assert all(float(row[head.index("images/s")]) > 0 for row in rows)
    found = json.loads((tmp_path / "speed_against_quality.json").read_text())
    assert (found["batch"], found["guidance"]) == (10, 1.5)
    assert [len(row["rates"]) for row in found["generators"]] == [2, 2]
    scored = [json.loads((tmp_path / f"grid_{name}" / "scores.json").read_text()) for name in ("ar", "rear")]
    assert [row["scores"] for row in found["generators"]] == [one["scores"]["samples"] for one in scored]
    assert (tmp_path / "speed_against_quality.png").stat().st_size > 0

    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*/*/_CHECKPOINT_METADATA")}
    assert len(made) >= 3
    run("speed_against_quality.py", *flags)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*/*/_CHECKPOINT_METADATA")} == made


def test_the_sheet_of_a_study_has_a_block_for_each_kind_of_image(trained, tmp_path):
    study, sheet = tmp_path / "study", tmp_path / "sheet.png"
    for variant in ("ar", "rear"):
        folder = study / "seed_0" / variant / "sweep" / "1_1"
        folder.mkdir(parents=True)
        images, labels = np.zeros((20, 32, 32, 3), np.uint8), np.arange(20) % 10
        images[..., 0 if variant == "ar" else 1] = 255
        np.savez(folder / "samples.npz", arr_0=images, labels=labels)
    (study / "tokenizer").symlink_to(trained / "tokenizer")
    run("freedoom_sheet.py", str(study), f"--config={ROOT}/tests/toy_config.py", f"--to={sheet}")
    pixels = np.asarray(Image.open(sheet).convert("RGB")).reshape(-1, 3)
    red, green = ((pixels == color).all(axis=1).sum() for color in ((255, 0, 0), (0, 255, 0)))
    assert red == pytest.approx(green, rel=0.05)
    assert red > len(pixels) / 20


def test_what_does_not_fit_is_said(measure):
    assert measure.guarded(lambda: 3) == (3, "")
    assert measure.guarded(lambda: jnp.zeros(10**15).sum()) == (None, "out of memory")

    def broken():
        raise JaxRuntimeError("INTERNAL: a kernel\nand more")

    assert measure.guarded(broken) == (None, "failed: INTERNAL: a kernel")


@pytest.mark.parametrize(
    ("kind", "chip"),
    [
        ("NVIDIA H100 80GB HBM3", chips.GPUS["h100"]),
        ("NVIDIA A100-SXM4-80GB", chips.GPUS["a100"]),
        ("NVIDIA H100 PCIe", None),
        ("TPU v5 lite", chips.TPUS["v5e"]),
        ("cpu", None),
    ],
)
def test_published_peak(measure, monkeypatch, kind, chip):
    class Device:
        device_kind = kind

    monkeypatch.setattr(jax, "devices", lambda: [Device])
    assert measure.chip() == chip


def test_gpu_script_lists_its_commands():
    script = FOLDER / "gpu.sh"
    listed = subprocess.run([script, "--list", "--only=inception"], capture_output=True, text=True, check=True)
    assert listed.stdout.startswith("inception: benchmarks/evaluate.py")
    refused = subprocess.run([script, "--only=nothing"], capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "no measurement nothing" in refused.stderr


def test_gpu_script_goes_on_after_a_failure(tmp_path):
    """Failing commands, here for want of a Python, are named, and the table of contents is complete."""
    flags = ("--toy", "--only=inception,train_rear_s", f"--out={tmp_path}")
    environ = os.environ | {"PYTHON": "/bin/false"}
    done = subprocess.run([FOLDER / "gpu.sh", *flags], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.count("**failed with status 1:**") == 2
    assert (tmp_path / "gpu.md").read_text() == done.stdout


def test_cycles_are_summed_by_operation(measure):
    import cycles

    noted = 'metadata={op_name="jit(f)/layer/dot/add"}, backend_config={"estimated_cycles":"5"}'
    line = f" = f32[8,4]{{1,0}} fusion(%p), {noted}"
    body = "body (p: f32[8,4]) -> f32[8,4] {\n  %p = f32[8,4]{1,0} parameter(0)\n  %a.1" + line
    text = f"ENTRY %{body}\n  ROOT %a.2{line}\n}}\n"
    assert cycles.by_operation(cycles.hlo.parse(text)) == {("layer/dot/add", "8x4", 1): [5, 5]}
