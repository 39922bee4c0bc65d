"""The authors' RAR in random order: logits, targets and cross-entropy."""

import json

import numpy as np

from rear_jax import losses, orders
from rear_jax.generators.rar.network import RARTransformer
from tests.golden_checks.rear_generator import params_from


def check(golden) -> None:
    meta = json.loads(str(golden["meta"]))
    model = RARTransformer(
        codebook_size=meta["codebook_size"],
        num_classes=meta["num_classes"],
        num_codes=meta["seq_len"],
        width=meta["hidden_size"],
        depth=meta["num_layers"],
        heads=meta["num_heads"],
        mlp_width=meta["mlp_size"],
    )
    params = params_from(golden, model)
    codes = orders.reorder(golden["in/tokens"], golden["in/orders"])
    np.testing.assert_array_equal(codes, golden["out/targets"])
    logits = model.apply({"params": params}, codes, golden["in/labels"], golden["in/orders"]).logits
    np.testing.assert_allclose(logits, golden["out/logits"], atol=2e-4, rtol=0)
    loss = losses.next_code_cross_entropy(logits, codes).mean()
    np.testing.assert_allclose(loss, golden["out/ce"], rtol=1e-5)
