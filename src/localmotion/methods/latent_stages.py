"""The stages of a latent action model as passes and optimisers, for the methods that have them.

    pretrain   latent actions from video
    clone      a policy over latent actions
    decode     a decoder to actions, from labelled transitions
    finetune   PPO in the environment (`models.ppo`), while the decoder learns from the latent actions of the rollouts

The child modules of such a method are "policy", "head" (the decoder) and "heads" (what learns by reward), beside those of its first stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from localmotion.methods.base import Batch, Group, Losses, Method, Metrics, Pass, Rates, trained
from localmotion.models.ppo import DecoderPPOConfig, RewardHeads


class LearnsLatentActions(Protocol):
    """A method with the stages `LATENT_ACTIONS` and losses for each."""

    def pretrain_losses(self, batch: Batch) -> tuple[Losses, Metrics]: ...

    def clone_losses(self, batch: Batch) -> tuple[Losses, Metrics]: ...

    def decode_losses(self, batch: Batch) -> tuple[Losses, Metrics]: ...

    def reward_losses(self, batch: Batch) -> tuple[Losses, Metrics]: ...

    def pair_losses(self, batch: Batch) -> tuple[Losses, Metrics]: ...


def latent_passes(method: LearnsLatentActions, stage: str, scales: Mapping[str, float], until: float) -> tuple[Pass, ...]:
    """The passes of a stage: one, or in `finetune` PPO and then the decoder, if ``scales`` has its loss "action".

    The decoder learns in the share ``until`` of the stage. After it, its pass costs nothing.

    PPO's gradient goes through the decoder into the policy, but does not change the decoder. That pass runs first, so that the first
    update of a rollout sees the policy that acted.
    """
    if stage == "finetune":
        own = {name: weight for name, weight in scales.items() if name != "action"}
        reward = Pass(lambda batch, _: (*method.reward_losses(batch), None), own, ("policy", "heads"))
        pairs = Pass(lambda batch, _: (*method.pair_losses(batch), None), {"action": 1.0}, ("decoder",), until=until)
        return (reward, pairs) if "action" in scales else (reward,)
    losses = {"pretrain": method.pretrain_losses, "clone": method.clone_losses, "decode": method.decode_losses}[stage]
    return (Pass(lambda batch, _: (*losses(batch), None), scales, ("model",)),)


def latent_scales(stage: str, first: Mapping[str, float], config: DecoderPPOConfig) -> dict[str, float]:
    """Weights of the losses of a stage; ``first``: those of `pretrain`."""
    if stage == "finetune":
        scales = {"policy": 1.0, "value": config.value_weight, "entropy": config.entropy}
        return scales | ({"action": 1.0} if config.decoder_until > 0 else {})
    return dict(first) if stage == "pretrain" else {"latent" if stage == "clone" else "action": 1.0}


def reward_groups(method: Method, config: DecoderPPOConfig, rates: Rates) -> list[Group]:
    """The optimisers of `finetune`. From here on the action head acts too.

    A policy from a checkpoint is frozen first and then learns at the slow rate.
    """
    heads = method.get_submodule("heads")
    assert isinstance(heads, RewardHeads)
    heads.begin(config.head_share)
    learns = config.decoder_until > 0
    trained(method, "policy", "heads", *(("head",) if learns else ()))
    slow, frozen = (rates.slow, rates.freeze_updates) if rates.loads("policy") else (1.0, 0)
    groups = [
        Group("policy", list(method.get_submodule("policy").parameters()), rates.lr * slow, frozen, weight_decay=0.0),
        Group("heads", list(heads.parameters()), rates.lr, weight_decay=0.0),
    ]
    if learns:
        groups.append(Group("decoder", list(method.get_submodule("head").parameters()), config.decoder_lr, weight_decay=0.0))
    return groups


def latent_origins(stage: str, config: DecoderPPOConfig) -> tuple[str, ...]:
    """`Method.origins`. Where the decoder does not learn, `finetune` needs one that labels have trained."""
    if stage == "finetune":
        return ("clone", "decode") if config.decoder_until > 0 else ("decode",)
    return {"clone": ("pretrain",), "decode": ("clone",)}.get(stage, ())
