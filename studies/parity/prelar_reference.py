"""Our PreLAR beside its release (zhanglixuan0720/PreLAR) by running both: same weights, batches and noise, in float64, three updates.

    python -m studies.parity.prelar_reference PATH/TO/PreLAR [--out tests/prelar_reference.json]

Nothing of the release is here; its path is given. It needs `pip install einops`. Weights, batches and noise follow the rules of
`tests/prelar_parity.py`. Printed are the largest relative differences of each case; beyond `LIMITS` it ends with 1. With ``--out`` it
writes the release's numbers, with which `tests/test_prelar_parity.py` compares ours.
"""

from __future__ import annotations

import json
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from studies.parity import beside
from studies.parity.beside import LIMITS, difference, rules
from torch import Tensor

import prelar_parity as parity  # beside puts tests/ on the path  # isort: skip

COMMANDS: dict[str, dict[str, Any]] = {
    "pre-training": {"rank_loss": "sign"},
    "pre-training, w/o CL": {},
    "pre-training, w/o AL & CL": {"vanet.type_": "deter"},
    "pre-training, discrete": {"rank_loss": "sign", "vanet.discrete": 4, "vanet.stoch": 3},
    "pre-training, diff": {"rank_loss": "sign", "vanet.va_method": "diff"},
    "pre-training, catdiff": {"rank_loss": "sign", "vanet.va_method": "catdiff"},
    "fine-tuning": {"loss_scales.aux_reward": 1.0},
    "fine-tuning, RSSM not frozen": {"loss_scales.aux_reward": 1.0, "finetune_rssm": True},
    "naive fine-tuning": {"beta": 0, "loss_scales.aux_reward": 0},
}
"""Flags of the release's commands, on top of those in `settings`."""
CONSTANT = ("pre-training, w/o AL & CL", "pre-training, discrete")
"""Cases whose KL of the action is a number without a gradient in the release: 0, and the logarithm of the number of classes."""
LOSSES = {"image": "image", "kl": "kl", "va_kl": "action_kl", "rank": "consistency", "reward": "reward"}
LOSSES |= {"aux_reward": "reward_representative"}
"""Names of the release's losses and of ours."""


# 1. The release on today's torch ----------------------------------------------------------------------------------------------


def load(path: Path, patch: pytest.MonkeyPatch) -> Any:
    """The release's package, with its sampling by the rules."""
    packages = ("torchtyping", "typeguard", "kornia", "torchvision", "torchvision.transforms", "wandb", "gym", "gym.spaces")
    beside.stand_ins(patch, *packages)

    class Scheduler(torch.optim.lr_scheduler.LRScheduler):
        def __init__(self, optimizer: Any, last_epoch: int, verbose: bool) -> None:  # torch no longer has the last argument
            super().__init__(optimizer, last_epoch)

    patch.setattr(torch.optim.lr_scheduler, "_LRScheduler", Scheduler)
    patch.setattr(torch.jit, "script", lambda module: module)
    patch.syspath_prepend(str(path))
    import wmlib
    import wmlib.agents
    import wmlib.utils

    dists: Any = wmlib.core.dists

    def one_hot(self: Any, sample_shape: Any = ()) -> Tensor:
        uniform = rules.uniform(self.logits.shape)
        noise = -(-uniform.clamp(1e-20, 1.0 - 1e-7).log()).log()
        probs: Tensor = self.probs
        found = torch.nn.functional.one_hot((self.logits + noise).argmax(-1), self.logits.shape[-1]).to(probs)
        return found + (probs - probs.detach())

    def truncated(self: Any, sample_shape: Any = ()) -> Tensor:
        inside: Tensor = self.icdf(rules.uniform(self.a.shape))
        return inside

    patch.setattr(dists.OneHotDist, "sample", one_hot)
    patch.setattr(dists.Normal, "rsample", lambda own, shape=(): own.loc + own.scale * parity.normal(own.loc.shape))
    patch.setattr(dists.TruncatedStandardNormal, "rsample", truncated)
    sign = torch.sign
    # Where a video gets its own action back, D^s is 0 here and rounding there, whose sign is chance. Only one-hot actions do that here.
    patch.setattr(torch, "sign", lambda x: sign(x * (x.abs() > 1e-12)))
    patch.setattr(torch, "randperm", lambda count, **_: rules.uniform((count,)).argsort())
    return wmlib


def settings(wmlib: Any, path: Path, case: str) -> Any:
    """The release's settings with the widths of `parity.SIZES`."""
    video = parity.CASES[case][0] == "pretrain"
    name, block = ("prelar_pretraining", "something_pretrain") if video else ("prelar_finetuning", "metaworld")
    text = (path / "configs" / f"{name}.yaml").read_text()
    blocks = yaml.safe_load(re.sub(r"\b\d+e-?\d+\b", lambda m: f"{float(m[0]):.9f}", text))  # for yaml, 1e-4 is text
    world, own = parity.SIZES["world"], parity.SIZES
    latent = world["deter"] + world["stoch"] * world["classes"]
    flags: dict[str, Any] = {
        **{f"{part}.cnn_depth": world["depth"] for part in ("encoder", "decoder")},
        "rssm.embed_dim": 4 * world["depth"] * 16,
        **{f"rssm.{key}": world[key] for key in ("deter", "hidden", "stoch")},
        "rssm.discrete": world["classes"],
    }
    if video:
        flags |= {"vanet.type_": "stoch", "vanet.discrete": 0, "vanet.stoch": own["action_width"]}
        flags |= {"vanet.deter": own["action_width"], "vanet.hidden_dim": own["action_hidden"], "vanet.cnn_depth": world["depth"]}
    else:
        for head in ("reward_head", "actor", "critic"):
            flags |= {f"{head}.units": world["units"], f"{head}.input_dim": latent}
        behaviour = own["behaviour"]
        flags |= {"imag_horizon": behaviour["horizon"], "slow_target_update": behaviour["slow_critic_every"], "pretrain": 1}
        flags |= {"action_encoder.type_": "deter", "action_encoder.deter": own["action_width"]}
        flags |= {"action_encoder.hidden_dim": own["action_hidden"], "loss_scales.reward": 1.0}
    config = wmlib.utils.Config(blocks["defaults"]).update(blocks[block]).update(flags | COMMANDS[case] | {"precision": 32})
    plain = json.loads(json.dumps(config))
    plain["decoder"]["cnn_input_dim"] = latent  # the release's constant 2048
    return wmlib.utils.Config(plain)


# 2. Names ---------------------------------------------------------------------------------------------------------------------


def theirs(name: str) -> str:
    """The release's name of one of our parameters or buffers. The actor's last layer is two layers there: `halves`."""
    for ours, there in {
        r"image\.encoder\.stem\.": r"wm.encoder._cnn_net.convin.",
        r"image\.encoder\.stages\.(\d)\.": r"wm.encoder._cnn_net.res\1.stack.",
        r"image\.decoder\.linear\.": r"wm.heads.decoder.convin.0.",
        r"image\.decoder\.stages\.(\d)\.": r"wm.heads.decoder._cnn_nn.res\1.stack.",
        r"image\.decoder\.out\.": r"wm.heads.decoder.convout.",
        r"inverse\.encoder\.stem\.": r"wm.va_encoder.va_encoder._cnn_net.convin.",
        r"inverse\.encoder\.stages\.(\d)\.": r"wm.va_encoder.va_encoder._cnn_net.res\1.stack.",
        r"inverse\.hidden\.": r"wm.va_encoder.action_in.0.",
        r"inverse\.out\.": r"wm.va_encoder.action_in.2.",
        r"mapping\.net\.net\.": r"wm.action_encoder._encoder.",
        r"latent\.img_in\.": r"wm.rssm._img_in.0.",
        r"latent\.gru_norm\.": r"wm.rssm._cell._norm.",
        r"latent\.gru\.": r"wm.rssm._cell._layer.",
        r"latent\.prior_in\.": r"wm.rssm._ensemble_out_layers.0.img_out_0.",
        r"latent\.prior_out\.": r"wm.rssm._ensemble_out_layers.0.img_out_head_0.",
        r"latent\.post_in\.": r"wm.rssm._obs_out.0.",
        r"latent\.post_out\.": r"wm.rssm._obs_out.obs_out_head.",
        r"reward\.net\.": r"wm.heads.reward.",
        r"reward_representative\.net\.": r"wm.heads.aux_reward.",
        r"behaviour\.actor\.net\.": r"_task_behavior.actor.",
        r"behaviour\.critic\.net\.": r"_task_behavior.critic.",
        r"behaviour\.slow_critic\.net\.": r"_task_behavior._target_critic.",
        r"bonus\.projection$": r"wm.intr_bonus.random_projection_matrix",
        r"bonus\.queue$": r"wm.intr_bonus.queue",
        r"bonus\.mean$": r"wm.intr_bonus.intr_rewnorm.mag",
    }.items():
        name, found = re.subn(f"^{ours}", there, name)
        if found:
            break
    name = re.sub(r"\.main\.0\.([01])\.", lambda m: f".res_block.{m[1]}.", name)
    name = re.sub(r"\.main\.2\.([01])\.", lambda m: f".res_block.{3 + int(m[1])}.", name)
    name = re.sub(r"\.skip\.", ".identity.", name)
    if re.match(r"(wm\.heads\.(aux_)?reward|_task_behavior)\.", name):
        last = 2 * parity.SIZES["world"]["layers"]
        name = re.sub(
            r"\.(\d+)\.(weight|bias)$",
            lambda m: f"._out_dist._out_nn.{m[2]}" if int(m[1]) == last else f"._mlp_nn.dense_{int(m[1]) // 2}.{m[2]}",
            name,
        )
    return name


def halves(name: str) -> list[str]:
    """The release's one or two names of one of our tensors, whose rows follow each other."""
    there = theirs(name)
    if there.startswith("_task_behavior.actor._out_dist"):
        return [there, there.replace("_out_nn", "_std_nn")]
    return [there]


def parts_of(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """One of our tensors by the release's names."""
    names = halves(name)
    return dict(zip(names, tensor.chunk(len(names)) if len(names) > 1 else [tensor], strict=True))


def in_our_names(model: Any, find: Callable[[str], Tensor | None]) -> dict[str, Tensor]:
    """What ``find`` gives for the release's names of all our parameters, by our names. Left out where it gives nothing."""
    found: dict[str, Tensor] = {}
    for name, _ in model.named_parameters():
        parts = [find(there) for there in halves(name)]
        if all(part is not None for part in parts):
            found[name] = torch.cat([part for part in parts if part is not None])
    return found


# 3. Both ----------------------------------------------------------------------------------------------------------------------


def release(wmlib: Any, path: Path, case: str, patch: pytest.MonkeyPatch) -> tuple[Any, dict[str, Tensor]]:
    """The release's agent with our model's weights, and a dictionary that gets the gradients of each update before clipping."""
    space = types.SimpleNamespace(shape=(64, 64, 3)), types.SimpleNamespace(shape=(parity.A,))
    config, video = settings(wmlib, path, case), parity.CASES[case][0] == "pretrain"
    kind = wmlib.agents.PreLARFinetune
    if video:
        kind = wmlib.agents.PreLARPretrain if "rank_loss" in COMMANDS[case] else wmlib.agents.PreLARwoCLPretrain
    agent = kind(config, {"image": space[0]}, {"action": space[1]}, step=0)
    _, model = parity.build(case)
    state, known = agent.state_dict(), set()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            given = parts_of(name, tensor)
            if not given.keys() <= state.keys():  # heads and bonus that the naive form does not build, counters
                assert name.startswith(("bonus.", "behaviour.updates", "reward_representative.")), name
                continue
            for there, part in given.items():
                assert state[there].shape == part.shape, (name, there)
                state[there].copy_(part)
                known.add(there)
    left = {name for name in state if name not in known}
    left = {name for name in left if not name.startswith(("wm.af_rssm.", "_expl_behavior.")) and not name.endswith("rewnorm.mag")}
    assert not left, left
    agent.init_optimizers()
    names = {id(p): name for name, p in agent.named_parameters()}
    gradients: dict[str, Tensor] = {}
    step = wmlib.core.Optimizer.step

    def record(self: Any, *rest: Any, **more: Any) -> Any:
        for group in self._opt.param_groups:
            gradients.update({names[id(p)]: p.grad.clone() for p in group["params"] if p.grad is not None})
        return step(self, *rest, **more)

    patch.setattr(wmlib.core.Optimizer, "step", record)
    if not video:
        actor_critic, loss = agent._task_behavior, agent._task_behavior.actor_loss
        actor_critic._updates = 1  # its update before the weights are loaded
        patch.setattr(actor_critic, "actor_loss", lambda seq, target: loss(seq, target.clone()))
    return agent, gradients


def batches(update: int) -> dict[str, Tensor]:
    """A batch as the release's loader gives it."""
    batch = rules.make_batch(update, parity.B)
    image = batch["image"].permute(0, 1, 4, 2, 3)
    found = {"image": image, "is_terminal": torch.zeros(parity.B, parity.T)}
    return {key: value.double() for key, value in ({**batch, **found}).items()}


def losses_of(agent: Any, found: dict[str, Any]) -> dict[str, float]:
    """Losses of the newest update, by our names."""
    out = {ours: float(found[f"wm/{there}_loss"]) for there, ours in LOSSES.items() if f"wm/{there}_loss" in found}
    if "behavior/actor_loss" in found:
        out |= {"actor": found["behavior/actor_loss"], "critic": found["behavior/critic_loss"]}
    return out


def act(agent: Any, mode: str) -> Tensor:
    """Actions (3, B, A) for the first frames of the batch."""
    batch, state, actions = batches(0), None, []
    for t in range(3):
        obs = {key: batch[key][:, t] for key in ("image", "reward", "is_first", "is_terminal")}
        found, state = agent.policy(obs, state, mode=mode)
        actions.append(found["action"])
    return torch.stack(actions)


def compare(wmlib: Any, path: Path, case: str, patch: pytest.MonkeyPatch) -> tuple[dict[str, float], dict[str, Any]]:
    """(largest differences by kind, the release's numbers)."""
    agent, gradients = release(wmlib, path, case, patch)
    worst, numbers, carried, model = dict.fromkeys(LIMITS, 0.0), [], None, None
    for update, mine in enumerate(parity.updates(case)):
        gradients.clear()
        carried, metrics = agent.train(batches(update), carried)
        there, model = losses_of(agent, metrics), mine.model
        if case in CONSTANT:
            del there["action_kl"]
        got = in_our_names(model, gradients.get)
        beside.measure(worst, mine, there, got)
        state = agent.state_dict()
        for name, tensor in model.state_dict().items():
            for part, value in parts_of(name, tensor).items():
                if part in state:
                    worst["weights"] = max(worst["weights"], difference(value.double(), state[part].double()))
        numbers.append({"losses": there, "gradient norms": rules.norms(got, parity.PARTS)})
    result: dict[str, Any] = {"updates": numbers}
    start = dict(parity.build(case)[1].named_parameters())
    parameters = dict(agent.named_parameters())
    end = in_our_names(model, parameters.get)
    result["changes of weights"] = rules.norms({name: x.detach() - start[name].detach() for name, x in end.items()}, parity.PARTS)
    if parity.CASES[case][0] != "pretrain":
        for explore, mode, name in ((False, "eval", "actions"), (True, "train", "actions, explore")):
            actions = act(agent, mode)
            worst["actions"] = max(worst["actions"], float((rules.act(model, explore, parity.B) - actions).abs().max()))
            result[name] = actions.tolist()
    return worst, result


if __name__ == "__main__":
    sys.exit(beside.main("zhanglixuan0720/PreLAR", COMMANDS, parity.fix_noise, load, compare, __doc__))
