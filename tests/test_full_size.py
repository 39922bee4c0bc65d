"""Published sizes, without the published files: random state dicts of full size go in and come out bit for bit."""

import pathlib
import shutil
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors

from rear_jax import generators
from rear_jax.weights import layout, safetensors_file, torch_writer
from rear_jax.weights.shards import open_weights
from tests import toy, toy_janus
from tests.test_configs import load

MEASURE = (  # runs the rest of the command line and prints the most memory it held
    "import resource, subprocess, sys; code = subprocess.run(sys.argv[1:]).returncode;"
    "print('peak', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024); sys.exit(code)"
)


class Noise(np.lib.mixins.NDArrayOperatorsMixin):
    """Stands for a large parameter: random numbers that exist only while they are written."""

    def __init__(self, shape, seed):
        self.shape, self.dtype, self._seed = shape, np.dtype(np.float32), seed

    def __array__(self, dtype=None, copy=None):
        return np.random.default_rng(self._seed).standard_normal(self.shape, np.float32)


def convert(name: str, workdir: pathlib.Path, **settings: pathlib.Path) -> int:
    """Runs the job in a process of its own; the most memory that it held, in bytes."""
    command = [sys.executable, "-m", "rear_jax.main", f"--config={toy.ROOT}/configs/{name}.py", f"--workdir={workdir}"]
    command += ["--job=convert", *(f"--config.convert.{key}={value}" for key, value in settings.items())]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *command], env=toy.environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split("peak ")[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rar_b", "llamagen_xxl_384"])
def test_full_size_round_trip(name, tmp_path):
    config = load(toy.ROOT / "configs" / f"{name}.py")
    leaves, tree = jax.tree.flatten(generators.shapes(toy.generator(config)))
    size = 4 * sum(leaf.size for leaf in leaves)
    if shutil.disk_usage(tmp_path).free < 3.5 * size:
        pytest.skip(f"needs {3.5 * size / 1e9:.0f} GB of disk")
    torch_name = generators.FAMILIES[config.model.name].layout.torch_name
    noise = jax.tree.unflatten(tree, [Noise(leaf.shape, seed) for seed, leaf in enumerate(leaves)])
    source, back = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    safetensors_file.save(source, noise, torch_name)

    peak = convert(name, tmp_path, source=source)
    assert peak < 2 * size + 0.8e9, f"{peak / 1e9:.1f} GB for a file of {size / 1e9:.1f} GB"
    convert(name, tmp_path, source=tmp_path / "converted", export=back)
    with safetensors.safe_open(source, "numpy") as a, safetensors.safe_open(back, "numpy") as b:
        assert sorted(a.keys()) == sorted(b.keys())
        for key in a.keys():  # noqa: SIM118 (not a mapping)
            np.testing.assert_array_equal(a.get_tensor(key), b.get_tensor(key), err_msg=key)


OTHERS = {"language_model.lm_head.weight": (102_400, 2048)} | {  # as large as what understands images
    f"vision_model.vision_tower.blocks.{layer}.mlp.fc1.weight": (1024, 12_872) for layer in range(24)
}


def noise_in_bfloat16(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Numbers below 2, of any bits."""
    bits = np.random.default_rng(seed).integers(0, 2**16, shape, np.uint16)
    return (bits & 0xBFFF).view(ml_dtypes.bfloat16)


@pytest.mark.slow
def test_a_janus_of_full_size_goes_out_onto_its_own_file(tmp_path):
    """4.2 GB in bfloat16, of which the generator becomes 5.9 GB in float32.

    Reading the file takes 6.6 GB. More is what orbax needs: 10.0 GB to write 5.9 GB, and 8.6 GB to read them.
    The export adds nothing to it.
    """
    config = load(toy.ROOT / "configs" / "va_pi_janus_pro_1b.py")
    shapes = {key: tensor.shape for key, tensor in toy_janus.shapes(config).items()} | OTHERS
    outline = {key: layout.stand_in(shape, ml_dtypes.bfloat16) for key, shape in shapes.items()}
    if shutil.disk_usage(tmp_path).free < 18e9:
        pytest.skip("needs 18 GB of disk")
    source, back = tmp_path / "pytorch_model.bin", tmp_path / "mine.bin"
    torch_writer.write(source, outline, (noise_in_bfloat16(shape, n) for n, shape in enumerate(shapes.values())))
    assert source.stat().st_size > 4.1e9

    read = 4 * sum(leaf.size for leaf in jax.tree.leaves(generators.shapes(toy.generator(config))))
    peaks = [convert("va_pi_janus_pro_1b", tmp_path, source=source)]
    peaks += [convert("va_pi_janus_pro_1b", tmp_path, source=tmp_path / "converted", export=back, onto=source)]
    found = open_weights(back)
    assert list(found) == list(shapes)
    for seed, (key, shape) in enumerate(shapes.items()):
        assert np.array_equal(found[key].view(np.uint16), noise_in_bfloat16(shape, seed).view(np.uint16)), key
    assert peaks[0] < 1.75 * read, f"{peaks[0] / 1e9} GB to convert {read / 1e9:.1f} GB of weights"
    assert peaks[1] < 1.55 * read, f"{peaks[1] / 1e9} GB to export {read / 1e9:.1f} GB of weights"
