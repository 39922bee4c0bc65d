"""Prints what torch-fidelity 0.4.0, pytorch-fid 0.3.0, prdc 0.2 and scikit-image make of the inputs of test_scores.py.

Not part of the suite; its output is what `REFERENCE` in that file holds. In an environment of its own:

    pip install torch==2.13.0 torch-fidelity==0.4.0 pytorch-fid==0.3.0 prdc==0.2 scikit-image
    python tests/reference_metrics.py
"""

import contextlib
import io
import json

import numpy as np


def features() -> tuple[np.ndarray, np.ndarray]:
    """Generated [300, 24] and real [260, 24] features, correlated and not centred; float64."""
    random = np.random.RandomState(7)
    mix = random.standard_normal((24, 24))
    real = random.standard_normal((260, 24)) @ mix + 1.0
    return 0.9 * random.standard_normal((300, 24)) @ mix + 1.1, real


def logits() -> np.ndarray:
    """[205, 12] float64."""
    return 2.0 * np.random.RandomState(8).standard_normal((205, 12))


def pictures() -> tuple[np.ndarray, np.ndarray]:
    """Two pairs of images [2, 20, 17, 3] in [0, 1], float32: one pair alike, one not."""
    random = np.random.RandomState(9)
    a, noise = random.uniform(size=(2, 2, 20, 17, 3))
    share = np.array([0.1, 0.7])[:, None, None, None]
    return a.astype(np.float32), ((1 - share) * a + share * noise).astype(np.float32)


def main() -> None:
    import torch

    library = torch.library.Library("torchvision", "DEF")  # else torchvision fails to import beside torch for CPUs
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor a, Tensor b, float c) -> Tensor")
    from prdc import compute_prdc
    from pytorch_fid.fid_score import calculate_frechet_distance
    from skimage.metrics import structural_similarity
    from torch_fidelity.metric_fid import fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    generated, real = features()
    moments = [(x.mean(axis=0), np.cov(x, rowvar=False)) for x in (generated, real)]
    statistics = [{"mu": mean, "sigma": covariance} for mean, covariance in moments]
    tensors = torch.from_numpy(generated), torch.from_numpy(real)
    settings = {"kid_subsets": 7, "kid_subset_size": 100, "verbose": False}
    with contextlib.redirect_stdout(io.StringIO()):
        prdc = compute_prdc(real, generated, nearest_k=3)
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    pairs = zip(*(x.astype(np.float64) for x in pictures()), strict=True)
    found = {
        "fid_torch_fidelity": fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"],
        "fid_pytorch_fid": calculate_frechet_distance(*moments[0], *moments[1]),
        "inception_score": isc_features_to_metric(torch.from_numpy(logits()), 10, False)["inception_score_mean"],
        "kid": kid_features_to_metric(*tensors, **settings)["kernel_inception_distance_mean"],
        "torch_fidelity": prc_features_to_metric(*tensors, verbose=False),
        "prdc": {name: prdc[name] for name in ("precision", "recall")},
        "ssim": [structural_similarity(a, b, channel_axis=-1, **window) for a, b in pairs],
    }
    print(json.dumps(found, indent=4, default=float))


if __name__ == "__main__":
    main()
