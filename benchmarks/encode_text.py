"""Captions per second of the text encoder, beside Hugging Face's on PyTorch.

python benchmarks/encode_text.py [--torch-python=PYTHON]    # a Python with torch and transformers
python benchmarks/encode_text.py --width=2048 --depth=24 --heads=32 --mlp-width=5120 --dtype=bfloat16    # flan-T5-XL

The default sizes are those of flan-T5-small. Both sides have the same random weights and the same tokens, 120 with
padding. Cleaning is timed by itself.
"""

import argparse
import json
import subprocess
import tempfile
import time

import jax
import jax.numpy as jnp
import measure
import numpy as np

from rear_jax.runtime.precision import products_at
from rear_jax.text import t5_files
from rear_jax.text.cleaning import clean
from rear_jax.text.t5 import T5Encoder
from rear_jax.text.vocabulary import LENGTH
from rear_jax.weights.layout import torch_tensors

CAPTION = "A man riding a wave on top of a surfboard, 30x40 cm, see http://photos.com/a.png"
HEAD_SIZE, VOCABULARY = 64, 32128
TORCH = """
import json, sys, time
import numpy as np, torch, transformers
folder, sizes, repeats, dtype, device = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:6]
config = transformers.T5Config(
    vocab_size=sizes["vocabulary_size"], d_model=sizes["width"], d_kv=sizes["head_size"], d_ff=sizes["mlp_width"],
    num_layers=sizes["depth"], num_heads=sizes["heads"], feed_forward_proj="gated-gelu",
)
network = transformers.T5EncoderModel(config).eval()
tensors = {key: torch.from_numpy(value) for key, value in np.load(f"{folder}/t5.npz").items()}
missing, unexpected = network.load_state_dict(tensors, strict=False)
assert set(missing) <= {"encoder.embed_tokens.weight"} and not unexpected, (missing, unexpected)
network = network.to(device, getattr(torch, dtype))
ids, mask = (torch.from_numpy(np.load(f"{folder}/{name}.npy")).to(device) for name in ("ids", "mask"))
seconds = []
with torch.no_grad():
    for _ in range(repeats + 1):
        since = time.perf_counter()
        hidden = network(input_ids=ids.long(), attention_mask=mask.long()).last_hidden_state.float().cpu()
        seconds.append(time.perf_counter() - since)
np.save(f"{folder}/hidden.npy", hidden.numpy())
print(json.dumps({"seconds": seconds[1:], "torch": torch.__version__}))
"""


def transformers(arguments, module: T5Encoder, params, ids: np.ndarray, mask: np.ndarray) -> tuple[dict, np.ndarray]:
    """Times of Hugging Face's encoder in a process of its own, and its features."""
    names = ("vocabulary_size", "width", "depth", "heads", "head_size", "mlp_width")
    sizes = json.dumps({name: getattr(module, name) for name in names})
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    with tempfile.TemporaryDirectory() as folder:
        tensors = {key: np.float32(value) for key, value in torch_tensors(params, t5_files.torch_name)}
        np.savez(f"{folder}/t5.npz", **tensors)
        np.save(f"{folder}/ids.npy", ids)
        np.save(f"{folder}/mask.npy", mask)
        command = [arguments.torch_python, "-c", TORCH, folder, sizes, str(arguments.repeats), arguments.dtype, device]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        return json.loads(done.stdout.splitlines()[-1]), np.load(f"{folder}/hidden.npy")


def small_weights(module: T5Encoder):
    """Random weights with which activations neither vanish nor grow, in the module's dtype."""
    draw = np.random.default_rng(0).standard_normal

    def of(path, leaf):
        name = path[-1].key
        scale = {"scale": 0.1, "kernel": leaf.shape[-2] ** -0.5 if leaf.ndim > 1 else 1.0}.get(name, 1.0)
        return (scale * draw(leaf.shape, np.float32) + (name == "scale")).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(of, t5_files.shapes(module))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"width": 512, "depth": 8, "heads": 6, "mlp-width": 1024, "batch": 16, "repeats": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--captions", type=int, default=2000)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--torch-python", default="", help="a Python with torch and transformers")
    arguments = parser.parse_args()

    sizes = {name: getattr(arguments, name) for name in ("width", "depth", "heads", "mlp_width")}
    module = T5Encoder(VOCABULARY, **sizes, head_size=HEAD_SIZE, dtype=jnp.dtype(arguments.dtype))
    params = small_weights(module)
    random = np.random.default_rng(1)
    mask = np.arange(LENGTH) < random.integers(8, 40, arguments.batch)[:, None]
    ids = np.where(mask, random.integers(3, VOCABULARY, mask.shape), 0).astype(np.int32)
    placed = jax.device_put(params)
    with products_at("highest"):
        encode = jax.jit(module.apply)
        seconds, hidden = measure.timed(encode, lambda _: ({"params": placed}, ids, mask), arguments.repeats)
    measure.header(measure.matmul_ceiling(arguments.dtype), arguments.dtype)
    rows = [(f"{arguments.batch} captions of {LENGTH} tokens", "seconds, median (min to max)", "captions/s")]
    rows.append(("rear_jax", measure.about(seconds), f"{arguments.batch / min(seconds):.1f}"))
    if arguments.torch_python:
        other, wanted = transformers(arguments, module, params, ids, mask)
        rate = f"{arguments.batch / min(other['seconds']):.1f}"
        rows.append((f"transformers, PyTorch {other['torch']}", measure.about(other["seconds"]), rate))
        print(f"largest difference of a feature: {np.abs(hidden - wanted)[mask].max():.1e}\n")
    since = time.perf_counter()
    for number in range(arguments.captions):
        clean(f"{CAPTION} {number}")
    spent = time.perf_counter() - since
    rows.append(("cleaning, one core", f"{spent:.3f} of {arguments.captions}", f"{arguments.captions / spent:.0f}"))
    measure.table(rows)


if __name__ == "__main__":
    main()
