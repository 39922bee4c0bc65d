"""Time of an evaluation: Inception's features beside torch-fidelity's, then FID, precision and recall from features.

PYTHONPATH=. python benchmarks/evaluate.py [--torch-python=PYTHON]    # a Python with torch and torch-fidelity
PYTHONPATH=. python benchmarks/evaluate.py --generated=2000 --real=1000    # shorter

The networks of both sides have the same random weights, drawn by the recipe of the golden `inception_fid`.
"""

import argparse
import json
import pathlib
import subprocess
import tempfile
import time

import jax
import measure
import numpy as np

from rear_jax.metrics import inception, scores
from rear_jax.metrics.features import inception_extractor
from rear_jax.metrics.precision_recall import precision_recall
from rear_jax.metrics.statistics import frechet_distance
from tests.golden_checks.inception_fid import weights

GOLDEN = pathlib.Path(__file__).parents[1] / "tests" / "goldens" / "inception_fid.npz"
TORCH = """
import json, statistics, sys, time
import numpy as np, torch
library = torch.library.Library("torchvision", "DEF")
if not torch.cuda.is_available():  # else torchvision fails to import beside torch for CPUs
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor a, Tensor b, float c) -> Tensor")
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
weights, images, repeats, device = sys.argv[1], np.load(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
torch.save({key: torch.from_numpy(value) for key, value in np.load(weights).items()}, weights + ".pth")
network = FeatureExtractorInceptionV3(
    "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=weights + ".pth"
).to(device)
batch = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device)
seconds = []
with torch.no_grad():
    for _ in range(repeats + 1):
        since = time.perf_counter()
        pooled = network(batch)[0].cpu()
        seconds.append(time.perf_counter() - since)
np.save(sys.argv[2] + ".pooled.npy", pooled.numpy())
print(json.dumps({"seconds": seconds[1:], "torch": torch.__version__}))
"""


def torch_fidelity(python: str, tensors: dict, images: np.ndarray, repeats: int) -> tuple[dict, np.ndarray]:
    """Times of torch-fidelity's extractor in a process of its own, and its pooled features."""
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    with tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/inception.npz", **tensors)
        np.save(f"{folder}/images.npy", images)
        command = [python, "-c", TORCH, f"{folder}/inception.npz", f"{folder}/images.npy", str(repeats), device]
        finished = subprocess.run(command, check=True, capture_output=True, text=True)
        return json.loads(finished.stdout.splitlines()[-1]), np.load(f"{folder}/images.npy.pooled.npy")


def seconds_of(function) -> float:
    since = time.perf_counter()
    function()
    return time.perf_counter() - since


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=256, help="pixels, both sides, of the images")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--generated", type=int, default=50_000)
    parser.add_argument("--real", type=int, default=10_000)
    parser.add_argument("--torch-python", default="", help="a Python with torch and torch-fidelity")
    arguments = parser.parse_args()

    with np.load(GOLDEN) as golden:
        meta = json.loads(str(golden["meta"]))
    tensors = weights(meta["seed"], meta["order"])
    random = np.random.default_rng(0)
    images = random.integers(256, size=(arguments.batch, arguments.size, arguments.size, 3), dtype=np.uint8)
    extractor = inception_extractor(inception.params_from(tensors))
    seconds, found = measure.timed(extractor.apply, lambda _: (images,), arguments.repeats)
    measure.header(measure.matmul_ceiling("float32"), "float32")
    rows = [("Inception's features", "seconds a batch, median (min to max)", "images/s")]
    rows.append(("rear_jax", measure.about(seconds), f"{arguments.batch / min(seconds):.1f}"))
    if arguments.torch_python:
        other, pooled = torch_fidelity(arguments.torch_python, tensors, images, arguments.repeats)
        rate = f"{arguments.batch / min(other['seconds']):.1f}"
        rows.append((f"torch-fidelity, PyTorch {other['torch']}", measure.about(other["seconds"]), rate))
        difference = np.abs(found["pooled"] - pooled).max() / pooled.std()
        print(f"largest difference of a pooled feature: {difference:.1e} of the features' standard deviation\n")
    measure.table(rows)

    generated, real = (
        np.abs(random.standard_normal((count, extractor.dim), np.float32))
        for count in (arguments.generated, arguments.real)
    )
    rows = [(f"from {arguments.generated} and {arguments.real} features of width {extractor.dim}", "seconds")]
    target = scores.moments(real)
    rows.append(("FID", f"{seconds_of(lambda: frechet_distance(scores.moments(generated), target)):.1f}"))
    rows.append(("precision and recall", f"{seconds_of(lambda: precision_recall(real, generated)):.1f}"))
    print()
    measure.table(rows)


if __name__ == "__main__":
    main()
