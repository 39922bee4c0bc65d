"""Published sizes, without the published files: random state dicts of full size go in and come out bit for bit."""

import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors

from rear_jax import generators
from rear_jax.weights import safetensors_file
from tests import toy
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

    command = [sys.executable, "-m", "rear_jax.main", f"--config={toy.ROOT}/configs/{name}.py", f"--workdir={tmp_path}"]
    command += ["--job=convert", f"--config.convert.source={source}"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *command], env=toy.environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split("peak ")[1])
    assert peak < 2 * size + 0.8e9, f"{peak / 1e9:.1f} GB for a file of {size / 1e9:.1f} GB"

    export = [f"--config.convert.source={tmp_path}/converted", f"--config.convert.export={back}"]
    subprocess.run([*command[:-1], *export], env=toy.environment(), check=True)
    with safetensors.safe_open(source, "numpy") as a, safetensors.safe_open(back, "numpy") as b:
        assert sorted(a.keys()) == sorted(b.keys())
        for key in a.keys():  # noqa: SIM118 (not a mapping)
            np.testing.assert_array_equal(a.get_tensor(key), b.get_tensor(key), err_msg=key)
