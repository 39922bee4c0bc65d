"""The PyTorch side of the benchmarks: reAR's training step and guided decoding, the way the authors' code runs them.

Needs PyTorch and NumPy only, in an environment of their own (`pip install torch numpy`); rear_jax never imports it.

    python benchmarks/torch_reference.py --what=train --dropout=0.1  # one optimiser step
    python benchmarks/torch_reference.py --what=decode  # RAR: growing key/value cache
    python benchmarks/torch_reference.py --what=decode_uncached --steps-limit=8  # reAR as released: whole prefix anew
    python benchmarks/torch_reference.py --what=goldens  # agreement with the authors' recorded outputs

The last line on stdout is one JSON object: times in seconds, the best rate of a large matmul in the same process
(`matmul_gflops`), and the peak resident memory before that matmul ran (`peak_rss_mb`, as Linux counts it).

Module names are those of the published state dicts. As the authors do it: adaLN at every position, the batch doubled
for guidance, caches grown by `torch.cat`, bfloat16 training by autocast, TF32 on CUDA. Where PyTorch has something
faster of the same meaning, it is used: causal masking by flag, the fused AdamW, a cached step that embeds only its one
new code, bfloat16 decoding with weights cast once.
"""

import argparse
import json
import math
import resource
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "goldens" / "rear_generator.npz"
GUIDANCE = 16.0, 2.75  # RAR-B's scale and power
PREFIX = 2  # positions before the codes: cls, class
KeysValues = tuple[Tensor, Tensor]  # of one layer, each [B, heads, positions, head size]
Cache = list[KeysValues]


@dataclass(frozen=True)
class Sizes:
    """Everything that fixes a generator's shapes; `encode_layer` and `decode_layer` are the blocks that reAR taps."""

    width: int
    layers: int
    heads: int
    codes: int  # N
    codebook: int  # K
    classes: int
    code_width: int  # d_z
    projection: int
    encode_layer: int
    decode_layer: int


class Attention(nn.Module):
    """Multi-head attention with LayerNorm on queries and keys."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = (nn.LayerNorm(width // heads, eps=1e-6) for _ in range(2))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, past: KeysValues | None) -> tuple[Tensor, KeysValues]:
        """x [B, P, D], causal; with `past`, x is the single newest position. Returns [B, P, D] and all keys, values."""
        batch, positions, width = x.shape
        qkv = self.qkv(x).view(batch, positions, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, heads, P, head size]
        q, k = self.q_norm(q), self.k_norm(k)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout * self.training, is_causal=past is None)
        y = self.proj(y.transpose(1, 2).reshape(batch, positions, width))
        return F.dropout(y, self.dropout, self.training), (k, v)


class Block(nn.Module):
    """A transformer block whose shifts, scales and gates come from each position's condition."""

    def __init__(self, sizes: Sizes, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(sizes.width, eps=1e-6)
        self.attn = Attention(sizes.width, sizes.heads, dropout)
        self.norm2 = nn.LayerNorm(sizes.width, eps=1e-6)
        mlp = {"fc1": nn.Linear(sizes.width, 4 * sizes.width), "gelu": nn.GELU(), "dropout1": nn.Dropout(dropout)}
        mlp |= {"fc2": nn.Linear(4 * sizes.width, sizes.width), "dropout2": nn.Dropout(dropout)}
        self.mlp = nn.Sequential(OrderedDict(mlp))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(sizes.width, 6 * sizes.width))

    def forward(self, x: Tensor, condition: Tensor, past: KeysValues | None) -> tuple[Tensor, KeysValues]:
        """x and condition [B, P, D] -> [B, P, D] and the layer's keys and values."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(condition).chunk(6, dim=-1)
        attended, present = self.attn(self.norm1(x) * (1 + scale_a) + shift_a, past)
        x = x + gate_a * attended
        return x + gate_m * self.mlp(self.norm2(x) * (1 + scale_m) + shift_m), present


def projector(width: int, hidden: int, out: int) -> nn.Sequential:
    """[.., D] -> [.., d_z], the released three-layer shape."""
    layers = [nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, out)]
    return nn.Sequential(*layers)


class Generator(nn.Module):
    """The RAR-family transformer in raster order, with reAR's two projectors."""

    def __init__(self, sizes: Sizes, dropout: float = 0.0) -> None:
        super().__init__()
        self.sizes, width = sizes, sizes.width
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, sizes.codes + 1024, width))
        self.target_aware_pos_embed = nn.Parameter(torch.empty(1, sizes.codes + 1024, width))
        self.timesteps_embeddings = nn.Parameter(torch.empty(1, sizes.codes + 100, width))
        self.embeddings = nn.Embedding(sizes.codebook + 1 + sizes.classes + 1, width)  # codes, mask, classes, null
        self.blocks = nn.ModuleList(Block(sizes, dropout) for _ in range(sizes.layers))
        head_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.adaln_before_head = nn.ModuleDict({"adaLN_modulation": head_modulation})
        self.lm_head = nn.Linear(width, sizes.codebook)
        self.encode_align_mlp = projector(width, sizes.projection, sizes.code_width)
        self.decode_align_mlp = projector(width, sizes.projection, sizes.code_width)
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or "adaLN_modulation" in name:
                nn.init.zeros_(parameter)
            elif "norm" not in name:
                nn.init.trunc_normal_(parameter, std=0.02)

    def class_rows(self, labels: Tensor, dropped: Tensor) -> Tensor:
        """Rows of the embedding table for labels [B]: the null class where `dropped` [B]."""
        return self.sizes.codebook + 1 + torch.where(dropped, self.sizes.classes, labels)

    def embed(self, class_rows: Tensor, codes: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """class_rows [B], codes [B, n] -> inputs and conditions [B, n+2-first, D] of the positions from `first` on."""
        end = PREFIX + codes.shape[1]
        x = self.embeddings(torch.cat([class_rows[:, None], codes], dim=1)[:, max(first - 1, 0) :])
        if first == 0:
            x = torch.cat([self.cls_token.expand(len(codes), -1, -1), x], dim=1)
        # Code k's slot sits where the code is predicted, one position before its own; cls and the last code get none.
        slots = F.pad(self.target_aware_pos_embed[:, PREFIX : PREFIX + self.sizes.codes], (0, 0, 1, 1))
        x = x + self.pos_embed[:, first:end] + slots[:, first:end]
        return x, self.embeddings(class_rows)[:, None] + self.timesteps_embeddings[:, first:end]

    def forward(self, class_rows: Tensor, codes: Tensor, cache: Cache | None = None) -> tuple[Tensor, list, Cache]:
        """class_rows [B], codes [B, n] so far -> logits [B, n+1, K], each block's output [B, n+2, D], and the cache.

        With a cache of the positions before, only the newest one is run, and every output has that one position.
        """
        first = 0 if cache is None else PREFIX + codes.shape[1] - 1
        x, condition = self.embed(class_rows, codes, first)
        features, presents = [], []
        for i, block in enumerate(self.blocks):
            x, present = block(x, condition, None if cache is None else cache[i])
            features.append(x)
            presents.append(present)
        if first == 0:
            x, condition = x[:, 1:], condition[:, 1:]
        scale, shift = self.adaln_before_head["adaLN_modulation"](condition).chunk(2, dim=-1)  # unlike in the blocks
        logits = self.lm_head(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)
        return logits, features, presents


def rear_losses(
    model: Generator, class_rows: Tensor, noisy_codes: Tensor, noise_mask: Tensor, codes: Tensor, codebook: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """class_rows [B]; *codes, noise_mask [B, N]; codebook [K, d_z] -> cross-entropy, shallow and deep terms, scalar."""
    logits, features, _ = model(class_rows, noisy_codes)
    shallow, deep = features[model.sizes.encode_layer], features[model.sizes.decode_layer]
    next_code = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), codes.flatten())
    targets = codebook[codes]  # [B, N, d_z], met by the shallow tap at each code and by the deep one a position earlier
    encode_similarity = F.cosine_similarity(model.encode_align_mlp(shallow[:, PREFIX:]).float(), targets, dim=-1)
    decode_similarity = F.cosine_similarity(model.decode_align_mlp(deep[:, 1:-1]).float(), targets, dim=-1)
    return next_code, -(encode_similarity * ~noise_mask).mean(), -decode_similarity.mean()


def adamw(model: Generator) -> torch.optim.AdamW:
    """The recipe's optimiser: weight decay on matrices only, not on norms, biases, embeddings and position tables."""
    groups: tuple[dict, dict] = {"params": [], "weight_decay": 0.0}, {"params": [], "weight_decay": 0.03}
    for name, parameter in model.named_parameters():
        groups[parameter.ndim == 2 and name != "embeddings.weight"]["params"].append(parameter)
    return torch.optim.AdamW(groups, lr=4e-4, betas=(0.9, 0.96), fused=True)


def train_step(
    model: Generator, optimizer: torch.optim.Optimizer, losses: Callable[..., tuple[Tensor, ...]],
    labels: Tensor, codes: Tensor, codebook: Tensor, progress: float, dtype: torch.dtype,
) -> None:  # fmt: skip
    """labels [B], codes [B, N], codebook [K, d_z], progress in [0, 1]: noise, label drop, gradient, clip, update."""
    rate = torch.rand(len(codes), 1, device=codes.device) * max(0.0, 1 - 4 * progress / 3)
    noise_mask = torch.rand(codes.shape, device=codes.device) < rate
    noisy_codes = torch.where(noise_mask, torch.randint_like(codes, model.sizes.codebook), codes)
    class_rows = model.class_rows(labels, torch.rand(len(labels), device=labels.device) < 0.1)
    with torch.autocast(codes.device.type, dtype, enabled=dtype != torch.float32):
        loss = sum(losses(model, class_rows, noisy_codes, noise_mask, codes, codebook))
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def guided_step(
    model: Generator, class_rows: Tensor, codes: Tensor, scale: float, power: float, cache: Cache | None
) -> tuple[Tensor, Cache]:
    """class_rows [2B], conditional half first; codes [B, s] so far -> guided logits [B, K] of code s, and the cache."""
    weight = 1 + (scale - 1) * (1 - math.cos(math.pi * (codes.shape[1] / model.sizes.codes) ** power)) / 2
    logits, _, cache = model(class_rows, codes.repeat(2, 1), cache)
    conditional, unconditional = logits[:, -1].float().chunk(2)
    return unconditional + weight * (conditional - unconditional), cache


@torch.inference_mode()
def decode(
    model: Generator, labels: Tensor, scale: float, power: float, cached: bool, length: int, greedy: bool = False
) -> tuple[Tensor, Tensor]:
    """labels [B] -> the first `length` codes [B, length], at temperature 1, and their guided logits [B, length, K]."""
    dropped = torch.zeros_like(labels, dtype=torch.bool)
    class_rows = torch.cat([model.class_rows(labels, dropped), model.class_rows(labels, ~dropped)])
    codes = labels.new_empty(len(labels), 0)
    every_logits, cache = [], None
    for _ in range(length):
        logits, cache = guided_step(model, class_rows, codes, scale, power, cache if cached else None)
        chosen = logits.argmax(-1, keepdim=True) if greedy else torch.multinomial(logits.softmax(-1), 1)
        codes = torch.cat([codes, chosen], dim=1)
        every_logits.append(logits)
    return codes, torch.stack(every_logits, dim=1)


@torch.inference_mode()
def some_uncached_steps(model: Generator, labels: Tensor, steps: int) -> None:
    """Runs `steps` steps of an uncached decoding of labels [B], at prefix lengths spread evenly over 0..N-1."""
    codes = torch.randint(model.sizes.codebook, (len(labels), model.sizes.codes), device=labels.device)
    class_rows = model.class_rows(labels, torch.zeros_like(labels, dtype=torch.bool)).repeat(2)
    for i in range(steps):
        guided_step(model, class_rows, codes[:, : int((i + 0.5) * model.sizes.codes / steps)], *GUIDANCE, None)


def timed(work: Callable[[], object]) -> float:
    """Seconds that `work` takes, the device's queue included."""
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def matmul_gflops(device: str, dtype: torch.dtype) -> float:
    """Best GFLOP/s of a large square matmul."""
    side = 8192 if device == "cuda" else 2048
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    product = torch.empty_like(a)
    return 2 * side**3 / min(timed(lambda: torch.mm(a, b, out=product)) for _ in range(12)) / 1e9


def check_goldens() -> dict[str, float]:
    """Largest deviations from the authors' recorded outputs; raises where one is beyond the project's tolerance."""
    with np.load(GOLDEN) as file:
        meta = json.loads(file["meta"].item())
        golden = {key: torch.from_numpy(file[key]) for key in file.files if key != "meta"}
    names = "hidden_size num_layers num_heads seq_len codebook_size num_classes embedding_dim projection_dim"
    model = Generator(Sizes(*(meta[name] for name in [*names.split(), "encode_layer", "decode_layer"])))
    weights = {key.removeprefix("param/"): v.float() for key, v in golden.items() if key.startswith("param/")}
    model.load_state_dict(weights, strict=True)

    codes, noisy, labels = (golden[f"in/{key}"].long() for key in ("tokens", "noisy_tokens", "labels"))
    class_rows = model.class_rows(labels, golden["in/drop_label"])
    losses = rear_losses(model, class_rows, noisy, golden["in/noise_mask"], codes, golden["in/codebook"])
    sum(losses).backward()
    scalars = {"loss": sum(losses), "ar_loss": losses[0], "encode_loss": losses[1], "embedding_loss": sum(losses[1:])}
    found = {key: (abs(v.item() / golden[f"out/{key}"].item() - 1), 1e-5) for key, v in scalars.items()}
    for key in (key.removeprefix("out/") for key in golden if key.startswith("out/grad/")):
        gradient, wanted = model.get_parameter(key.removeprefix("grad/")).grad, golden[f"out/{key}"]
        found[key] = ((gradient - wanted).norm() / wanted.norm()).item(), 1e-4
    logits = model(class_rows, noisy)[0][:, :-1]
    found["logits"] = (logits - golden["out/logits"]).abs().max().item(), 2e-4
    for name, cached in (("cached", True), ("uncached", False)):
        guidance = meta["guidance_scale"], meta["guidance_power"]
        chosen, logits = decode(model, labels, *guidance, cached, model.sizes.codes, greedy=True)
        found[f"{name}_greedy_logits"] = (logits - golden["out/greedy_logits"]).abs().max().item(), 2e-4
        found[f"{name}_greedy_wrong_codes"] = (chosen != golden["out/greedy_tokens"]).sum().item(), 0
    if beyond := {key: pair for key, pair in found.items() if not pair[0] <= pair[1]}:
        raise SystemExit(f"beyond tolerance (found, allowed): {beyond}")
    return {key: deviation for key, (deviation, _) in found.items()}


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Times the chosen work at the chosen sizes; the keys of the result are the JSON's."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.device == "cuda":
        torch.set_float32_matmul_precision("high")
    dtype = getattr(torch, options.dtype)
    sizes = Sizes(
        options.width, options.layers, options.heads, options.codes, options.codebook, classes=1000,
        code_width=256, projection=2048, encode_layer=0, decode_layer=3 * options.layers // 4,
    )  # fmt: skip
    model = Generator(sizes, options.dropout).to(options.device)
    labels = torch.randint(sizes.classes, (options.batch,), device=options.device)

    if options.what == "train":
        codes = torch.randint(sizes.codebook, (options.batch, sizes.codes), device=options.device)
        codebook = torch.randn(sizes.codebook, sizes.code_width, device=options.device)
        losses = torch.compile(rear_losses) if options.compile else rear_losses
        first = work = partial(train_step, model, adamw(model), losses, labels, codes, codebook, 0.25, dtype)
    else:
        model.eval().to(dtype)
        run = partial(decode, model, labels, *GUIDANCE, options.what == "decode")
        first, work = partial(run, 4), partial(run, sizes.codes)
    if options.steps_limit:
        work = partial(some_uncached_steps, model, labels, options.steps_limit)
    share = options.steps_limit / sizes.codes if options.steps_limit else 1
    warm_up = timed(first)
    seconds = [timed(work) / share for _ in range(options.repeats)]

    median = statistics.median(seconds)
    return vars(options) | {
        "seconds": {"median": median, "min": min(seconds), "all": seconds},
        "images_per_second": options.batch / median,
        "warm_up_seconds": warm_up,  # train: the first step, compilation included; decoding: the first few codes
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
        "peak_device_mb": torch.cuda.max_memory_allocated() / 2**20 if options.device == "cuda" else None,
        "parameters": sum(p.numel() for p in model.parameters()),
        "matmul_gflops": matmul_gflops(options.device, dtype),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=["train", "decode", "decode_uncached", "goldens"], required=True)
    sizes = {"width": 384, "layers": 6, "heads": 6, "codes": 256, "codebook": 1024, "batch": 8}
    for name, default in (sizes | {"repeats": 3, "threads": 2}).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--steps-limit", type=int, default=0, help="decode_uncached: time so many steps, scale to all")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--compile", action="store_true", help="train: torch.compile of the loss")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()
    unread = {"train": options.steps_limit, "decode_uncached": options.compile or options.dropout}
    if unread.get(options.what, options.compile or options.dropout or options.steps_limit):
        parser.error("--compile and --dropout belong to --what=train, --steps-limit to --what=decode_uncached")
    print(json.dumps(check_goldens() if options.what == "goldens" else measure(options)))


if __name__ == "__main__":
    main()
