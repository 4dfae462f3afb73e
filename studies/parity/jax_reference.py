"""Our DreamerV3 beside the reference (danijar/dreamerv3, JAX) by running both: same weights, batch and noise, fp32, some updates.

    python -m studies.parity.jax_reference PATH/TO/dreamerv3

Nothing of the reference is here; its path is given, and what it needs stands in `benchmarks/peers.py` (`NEEDS`). Weights are made by rule
(`tests/dreamer_v3_parity.py`) and handed to it under its own names; its sampling is replaced by the same noise. Printed are the largest
relative differences of losses, of each parameter's gradient and of the weights after each update; where they are beyond `LIMITS` it ends
with 1. Its numbers, by ``--out``, are what `tests/test_dreamer_v3.py` compares with.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
import dreamer_v3_parity as parity  # noqa: E402

CASES: dict[str, dict[str, Any]] = {
    "pixels": {"unimix": 0.01, "contdisc": True},
    "vectors": {"unimix": 0.01, "contdisc": True, "pixels": False, "vector_dim": parity.V},
    "both, no unimix, no contdisc": {"vector_dim": parity.V},
}
LOSSES = {
    "dyn": ("dyn",),
    "rep": ("rep",),
    "recon": ("image", "vector"),
    "reward": ("rew",),
    "cont": ("con",),
    "policy": ("policy",),
    "value": ("value",),
    "repval": ("repval",),
}
"""Names of our losses and of the reference's."""
MODULES = {
    "observations": ("enc", "dec"),
    "dynamics": ("dyn",),
    "reward": ("rew",),
    "cont": ("con",),
    "actor": ("pol",),
    "critic": ("val",),
}
LIMITS = {"losses": 1e-5, "gradients": 1e-4, "weights": 1e-4}
TINY = 1e-15
"""Of gradients below this it is not compared what LaProp makes of them: it divides by their size, and their squares times 1 - beta_2 have
few digits left in fp32, or none. XLA takes those below 1e-38 for zero, which makes steps of up to 300 learning rates of gradients of 3e-18;
torch does not. They belong to bins of the two-hot heads that nobody believes in."""


def _head(ours: str, theirs: str, layers: int, out: str) -> dict[str, str]:
    """Layers of an MLP of ours are linear, norm, linear, norm, ..., linear."""
    names = {f"{ours}.{2 * layers}": f"{theirs}/head/{out}"}
    for i in range(layers):
        names |= {f"{ours}.{2 * i}": f"{theirs}/mlp/linear{i}", f"{ours}.{2 * i + 1}": f"{theirs}/mlp/norm{i}"}
    return names


PICTURES, VECTORS = "observations.image_", "observations.vector_"
NAMES = {
    **{f"{PICTURES}encoder.convs.{i}": f"enc/cnn{i}" for i in range(4)},
    **{f"{PICTURES}encoder.norms.{i}": f"enc/cnn{i}norm" for i in range(4)},
    f"{PICTURES}decoder.from_deter": "dec/sp0",
    f"{PICTURES}decoder.from_stoch.0": "dec/sp1",
    f"{PICTURES}decoder.from_stoch.1": "dec/sp1norm",
    f"{PICTURES}decoder.from_stoch.2": "dec/sp2",
    f"{PICTURES}decoder.norm": "dec/spnorm",
    **{f"{PICTURES}decoder.convs.{i}": f"dec/conv{2 - i}" for i in range(3)},
    **{f"{PICTURES}decoder.norms.{i}": f"dec/conv{2 - i}norm" for i in range(3)},
    f"{PICTURES}decoder.convs.3": "dec/imgout",
    **{f"{VECTORS}encoder.{2 * i}": f"enc/mlp{i}" for i in range(3)},
    **{f"{VECTORS}encoder.{2 * i + 1}": f"enc/mlp{i}norm" for i in range(3)},
    **{f"{VECTORS}decoder.{2 * i}": f"dec/mlp/linear{i}" for i in range(3)},
    **{f"{VECTORS}decoder.{2 * i + 1}": f"dec/mlp/norm{i}" for i in range(3)},
    f"{VECTORS}decoder.6": "dec/vec/vector/pred",
    "dynamics.in_deter": "dyn/dynin0",
    "dynamics.in_stoch": "dyn/dynin1",
    "dynamics.in_action": "dyn/dynin2",
    **{f"dynamics.in_norms.{i}": f"dyn/dynin{i}norm" for i in range(3)},
    "dynamics.core": "dyn/dynhid0",
    "dynamics.core_norm": "dyn/dynhid0norm",
    "dynamics.gru": "dyn/dyngru",
    **{f"dynamics.prior_net.{2 * i}": f"dyn/prior{i}" for i in range(2)},
    **{f"dynamics.prior_net.{2 * i + 1}": f"dyn/prior{i}norm" for i in range(2)},
    "dynamics.prior_net.4": "dyn/priorlogit",
    "dynamics.post_in": "dyn/obs0",
    "dynamics.post_norm": "dyn/obs0norm",
    "dynamics.post_out": "dyn/obslogit",
    **_head("reward", "rew", 1, "logits"),
    **_head("cont", "con", 1, "logit"),
    **_head("actor", "pol", 3, "action"),
    **_head("critic", "val", 3, "logits"),
    **_head("slow_critic", "slowval", 3, "logits"),
}
"""Names of our layers and of the reference's."""


def in_their_names(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Our parameters (or their gradients) by the reference's names, in its shapes."""
    found: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        value = tensor.detach().numpy()
        if kind == "weight":
            kind, value = "kernel", value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
        there = NAMES[layer]
        if (there, kind) == (
            "dec/mlp/linear0",
            "kernel",
        ):  # its vector decoder, and nothing else, takes the latent before the state
            value = np.roll(value, parity.SETTINGS["stoch"] * parity.SETTINGS["classes"], 0)
        if there == "pol/head/action":  # one layer of ours, two of theirs
            for part, half in zip(("mean", "stddev"), np.split(value, 2, -1), strict=True):
                found[f"{there}/{part}/{kind}"] = half
        else:
            found[f"{there}/{kind}"] = value
    return found


class Reference:
    """The reference's agent without the layer that places it on devices, its sampling replaced by `parity.noise`."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        sys.path.insert(0, str(path))
        import elements
        import jax
        import jax.numpy as jnp
        import ninjax
        import ruamel.yaml
        from dreamerv3.agent import Agent
        from embodied.jax import internal, outs

        internal.setup(platform="cpu", compute_dtype="float32", transfer_guard=False, compilation_cache=False)
        outs.Categorical.sample = lambda own, seed, shape=(): jnp.argmax(own.logits + parity.noise(own.logits.shape).numpy(), -1)
        outs.Normal.sample = lambda own, seed, shape=(): own.mean + own.stddev * parity.noise(own.mean.shape).numpy()
        defaults = ruamel.yaml.YAML(typ="safe").load((path / "dreamerv3" / "configs.yaml").read_text())["defaults"]["agent"]
        config = elements.Config(defaults).update(
            {
                r".*\.rssm": {key: settings[key] for key in ("deter", "hidden", "stoch", "classes", "blocks", "unimix")},
                r".*\.depth": settings["depth"],
                r".*\.units": settings["units"],
                "dec.simple.bspace": settings["blocks"],
                "imag_length": settings["imag_length"],
                "contdisc": settings["contdisc"],
                "opt.lr": parity.LR,
                "opt.warmup": 0,
            }
        )
        space = elements.Space
        self.observed = {"reward": space(np.float32)} | {key: space(bool) for key in ("is_first", "is_last", "is_terminal")}
        if settings.get("pixels", True):
            self.observed["image"] = space(np.uint8, (64, 64, 3))
        if settings.get("vector_dim"):
            self.observed["vector"] = space(np.float32, (settings["vector_dim"],))
        self.jax, self.ninjax = jax, ninjax
        self.model: Any = object.__new__(Agent)
        action = {"action": space(np.float32, (parity.A,), -1, 1)}
        Agent.__init__(self.model, self.observed, action, elements.Config(**config, replay_context=0))

    def data(self, batch: dict[str, torch.Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
        """(observations, actions that led to them). What follows a first frame's predecessor is of another episode."""
        found = {key: batch[key].numpy() for key in self.observed if key in batch}
        found["is_last"] = np.pad(batch["is_first"].numpy()[:, 1:], ((0, 0), (0, 1)))
        return found, {"action": batch["action"].numpy()}

    def run(self, weights: dict[str, np.ndarray], batch: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
        """Losses, gradients and new weights of each of `parity.UPDATES` updates."""
        jax, model = self.jax, self.model
        observed, actions = self.data(batch)
        moved = {key: np.roll(value, -1, 1) for key, value in actions.items()}  # it stores an action with the frame before it
        carry = (*model.init_train(parity.B)[:3], {key: value[:, 0] for key, value in actions.items()})
        data = {**observed, **moved, "stepid": np.zeros((parity.B, parity.T, 20), np.uint8)}
        state = self.ninjax.init(model.train)({}, carry, data, seed=0)
        known = {key for key in state if re.match("(enc|dyn|dec|rew|con|pol|val|slowval)/", key)}
        if known != set(weights):
            raise SystemExit(f"names differ: {sorted(known ^ set(weights))}")
        for key, value in weights.items():
            assert state[key].size == value.size, (key, state[key].shape, value.shape)
            state[key] = jax.numpy.asarray(value.reshape(state[key].shape))
        for end, value in zip(("lo", "hi"), parity.RANGE, strict=True):
            assert f"retnorm/{end}/value" in state
            state[f"retnorm/{end}/value"] = jax.numpy.float32(value)
        learned = [key for key in weights if not key.startswith("slowval/")]

        @jax.jit
        def gradients(learning: dict[str, Any], rest: dict[str, Any]) -> Any:
            def loss(learning: dict[str, Any]) -> Any:
                pure = self.ninjax.pure(model.loss)
                _, (value, (_, _, _, metrics)) = pure({**rest, **learning}, carry[:3], observed, actions, training=True, seed=0)
                return value, {key: metrics[f"loss/{key}"] for key in model.scales}

            return jax.grad(loss, has_aux=True)(learning)

        train = jax.jit(self.ninjax.pure(model.train))
        found = []
        for _ in range(parity.UPDATES):
            grads, losses = gradients({k: state[k] for k in learned}, {k: v for k, v in state.items() if k not in learned})
            state, _ = train(state, carry, data, seed=0)
            found.append(
                {
                    "losses": {k: float(v) for k, v in losses.items()},
                    "gradients": {k: np.asarray(v) for k, v in grads.items()},
                    "weights": {k: np.asarray(state[k]) for k in weights},
                }
            )
        return found


def ours(settings: dict[str, Any]) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
    """(weights at the start, by the reference's names; what `Reference.run` gives, of our model)."""

    def weights(model: torch.nn.Module) -> dict[str, np.ndarray]:
        return {k: v.copy() for k, v in in_their_names(dict(model.named_parameters())).items()}

    with pytest.MonkeyPatch.context() as patch:
        parity.fix_noise(patch)
        start = weights(parity.build(**settings))
        found = [
            {"losses": update.losses, "gradients": in_their_names(update.gradients), "weights": weights(update.model)}
            for update in parity.updates(**settings)
        ]
    return start, found


def difference(one: np.ndarray, other: np.ndarray, of: np.ndarray | None = None) -> float:
    """Norm of the difference over the norm of the second, or of a third."""
    return float(np.linalg.norm((one - other).ravel()) / max(np.linalg.norm((other if of is None else of).ravel()), 1e-12))


def compare(path: Path, settings: dict[str, Any]) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """(largest differences by kind, the reference's losses and gradient norms of each update)."""
    start, mine = ours(settings)
    theirs = Reference(path, {**parity.SETTINGS, **settings}).run(start, parity.make_batch())
    worst, numbers = dict.fromkeys(LIMITS, 0.0), []
    tiny = {key: np.zeros(value.shape, bool) for key, value in theirs[0]["gradients"].items()}
    for one, other in zip(mine, theirs, strict=True):
        joined = {name: sum(other["losses"].get(part, 0.0) for part in parts) for name, parts in LOSSES.items()}
        worst["losses"] = max(worst["losses"], *(abs(one["losses"][k] - v) / abs(v) for k, v in joined.items()))
        worst["gradients"] = max(worst["gradients"], *(difference(one["gradients"][k], v) for k, v in other["gradients"].items()))
        for key, value in other["gradients"].items():
            tiny[key] |= np.abs(value) < TINY
        for key, value in other["weights"].items():
            apart = np.where(tiny[key.replace("slowval/", "val/")], 0.0, one["weights"][key] - value)
            worst["weights"] = max(worst["weights"], difference(apart, np.zeros(()), value))
        norms = {
            name: float(
                np.sqrt(
                    sum(np.square(v, dtype=np.float64).sum() for k, v in other["gradients"].items() if k.split("/")[0] in parts)
                )
            )
            for name, parts in MODULES.items()
        }
        numbers.append({"losses": joined, "gradient norms": norms})
    return worst, numbers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="checkout of danijar/dreamerv3")
    parser.add_argument("--out", type=Path, help="write differences and the reference's numbers here, as JSON")
    given = parser.parse_args()
    results, good = {}, True
    for name, settings in CASES.items():
        with contextlib.redirect_stdout(io.StringIO()):  # the reference lists its parameters
            worst, numbers = compare(given.path.resolve(), settings)
        results[name] = {"settings": settings, "differences": worst, "updates": numbers}
        good &= all(worst[kind] <= limit for kind, limit in LIMITS.items())
        print(f"{name}: " + ", ".join(f"{kind} {value:.1e}" for kind, value in worst.items()))
    if given.out:
        given.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
