"""Whole updates written out: the losses of pre-training and fine-tuning, their weights, and who learns at which rate.

IPV is arXiv 2305.18499, APV arXiv 2203.13880, DreamerV2 arXiv 2010.02193 with the settings of IPV's baseline, DRP arXiv 2607.00808
(Algorithms 1 and 2, Eqs. 1-9). Everything is computed in float64 from a dict of weights by
their names, with the numbers that the update drew. B sequences, T positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from written_out import motion
from written_out.compare import Learns, World
from written_out.context import Picture, observe
from written_out.dynamics import Dynamics, divergence, feature, head, kl
from written_out.motion import Weights, under
from written_out.product import Draws
from written_out.stacked import adapt, bonus


class Stacked:
    """One method's losses with its settings (``run``)."""

    REPORTED = ("latent", "dynamics")
    """The dynamics models whose KL is reported in fine-tuning."""

    def __init__(self, weights: Weights, batch: Mapping[str, Tensor], run: Any, draws: Draws) -> None:
        self.weights, self.batch, self.run, self.draw, self.pick = weights, batch, run, draws.uniform, draws.pick
        self.model, self.world = run.model, run.model.world
        self.picture = Picture(under(weights, "image"), self.world, batch["image"].shape[2])
        self.buffers: dict[str, Tensor] = {}
        self.metrics: dict[str, Tensor] = {}

    def changed(self) -> dict[str, Tensor]:
        """The bonus's queue and the running statistics of the pictures' norms."""
        return self.buffers | self.picture.statistics

    def dynamics(self, name: str, embed: Tensor, action: Tensor, free: float) -> tuple[Tensor, Tensor, Tensor]:
        """Latents (B,T,S,C), deterministic states (B,T,D) and the KL of the posterior to the prior of one dynamics model."""
        world, first = self.world, self.batch["is_first"]
        noise = self.draw(first.shape[1], first.shape[0], world.stoch, world.classes)
        rssm = Dynamics(under(self.weights, name), world)
        post, stoch, deter, prior = rssm.observe(embed, action, first, noise)
        if self.run.stage == "pretrain" or name in self.REPORTED:
            self.metrics[f"{name}/kl"] = divergence(post, prior).detach()
        return stoch, deter, kl(post, prior, world.kl_balance, free)

    def rewards(
        self, feat: Tensor, phi: Tensor, heads: tuple[str, ...] = ("reward", "reward_representative")
    ) -> dict[str, Tensor]:
        """The representative head learns r at every position, the behavioural one r + lambda r_int where a window of five begins."""
        reward = self.batch["reward"].double()
        novel, after = bonus(under(self.weights, "bonus"), phi.detach(), self.batch["is_first"])
        self.buffers |= {f"bonus.{name}": value for name, value in after.items()}
        target = reward[:, : novel.shape[1]] + self.model.intrinsic_weight * novel
        self.metrics["bonus/mean"] = novel.mean()
        targets, losses = {"reward": target, "reward_representative": reward}, {}
        for name in heads:
            value = head(under(self.weights, f"{name}.net"), feat).squeeze(-1)
            losses[name] = 0.5 * (value[:, : targets[name].shape[1]] - targets[name]).square().mean()
        return losses


class IPV(Stacked):
    def no_action(self) -> Tensor:
        """The action-free model is given no action: every column of its action input is zero."""
        return torch.zeros(*self.batch["is_first"].shape, 0, dtype=torch.float64)

    def pretrain(self) -> World:
        embed, around, truth = observe(self.picture, self.batch, self.draw, self.pick, erase=False)
        stoch, deter, z_kl = self.dynamics("latent", embed, self.no_action(), 0.0)
        (image,) = self.picture.losses([feature(stoch, deter)], around, truth, self.draw)
        return World({"image": image, "kl": z_kl}, {"image": self.world.image_weight, "kl": self.model.beta_z})

    def finetune(self) -> World:
        model = self.model
        erase = getattr(model, "context_erasing", False)
        embed, around, truth = observe(self.picture, self.batch, self.draw, self.pick, erase=erase)
        stoch, deter, z_kl = self.dynamics("latent", embed, self.no_action(), model.free_nats)
        phi = feature(stoch, deter)
        seen = torch.cat([embed, phi], -1) if model.embed_input else phi
        stoch, deter, s_kl = self.dynamics("dynamics", seen, self.batch["action"].double(), model.free_nats)
        feat = feature(stoch, deter)
        (image,) = self.picture.losses([feat], around, truth, self.draw)
        losses = {"image": image, "kl": s_kl, "latent_kl": z_kl, **self.rewards(feat, phi)}
        scales = {
            "image": self.world.image_weight,
            "kl": model.beta_s,
            "latent_kl": model.beta_z_finetune,
            "reward": self.world.reward_weight,
        }
        if "reward_representative" in losses:
            scales["reward_representative"] = model.beta_r * self.world.reward_weight
        return World(losses, scales, (stoch.detach().flatten(0, 1), deter.detach().flatten(0, 1)))

    def groups(self, pretrained: bool) -> dict[str, Learns]:
        """The pictures' encoders and the action-free model share an optimiser, held back only where the encoders were loaded."""
        loaded, online = loads(self.run), self.run.online
        held = pretrained and "image" in loaded
        old, new = (
            ["image.encoder.", "image.context_encoder."],
            ["image.decoder.", "dynamics.", "reward.", "reward_representative."],
        )
        (old if "latent" in loaded else new).append("latent.")
        rate = online.lr * (online.pretrained_lr_factor if held else 1.0)
        return {
            "encoder": Learns(tuple(old), rate, online.freeze_updates if held else 0),
            "model": Learns(tuple(new), online.lr),
            **actor_and_critic(self.run),
        }


class APV(IPV):
    """IPV's two models without a context frame and with one reward head."""

    def rewards(self, feat: Tensor, phi: Tensor, heads: tuple[str, ...] = ("reward",)) -> dict[str, Tensor]:
        """The head learns r + lambda r_int where a window of five begins."""
        return super().rewards(feat, phi, heads)


class DreamerV2(Stacked):
    """One model that is given the actions and observes the pictures."""

    def pretrain(self) -> World:
        raise NotImplementedError

    def finetune(self) -> World:
        model, world = self.model, self.world
        embed, around, truth = observe(self.picture, self.batch, self.draw, self.pick, erase=False)
        stoch, deter, s_kl = self.dynamics("dynamics", embed, self.batch["action"].double(), model.free_nats)
        feat = feature(stoch, deter)
        (image,) = self.picture.losses([feat], around, truth, self.draw)
        error = head(under(self.weights, "reward.net"), feat).squeeze(-1) - self.batch["reward"].double()
        losses = {"image": image, "kl": s_kl, "reward": 0.5 * error.square().mean()}
        scales = {"image": world.image_weight, "kl": model.beta, "reward": world.reward_weight}
        return World(losses, scales, (stoch.detach().flatten(0, 1), deter.detach().flatten(0, 1)))

    def groups(self, pretrained: bool) -> dict[str, Learns]:
        return {"model": Learns(("image.", "dynamics.", "reward."), self.run.online.lr), **actor_and_critic(self.run)}


def loads(run: Any) -> set[str]:
    """What a checkpoint gives: the parts that are named, all of them where none is."""
    return set(run.load.split(",")) if run.load else {"motion", "image", "latent"}


def actor_and_critic(run: Any) -> dict[str, Learns]:
    return {
        "actor": Learns(("behaviour.actor.",), run.online.actor_lr),
        "critic": Learns(("behaviour.critic.",), run.online.critic_lr),
    }


class DRP(Stacked):
    REPORTED = ("dynamics",)

    def motion(self) -> tuple[Tensor, dict[str, Tensor], dict[str, float]]:
        """a^agg, the losses of the motion encoder and their weights."""
        model, weights = self.model, under(self.weights, "motion")
        if model.motion_encoder == "global":
            return motion.global_code(weights, self.batch["flow"], model.dae), {}, {}
        batch, time = self.batch["is_first"].shape
        noise = self.draw(batch, time * model.dae.keypoints)
        agg, losses = motion.recompose(weights, self.batch, noise, model.dae, from_code=model.recompose_weight > 0)
        scales = {"mae": 1.0, **({"recompose": model.recompose_weight} if model.recompose_weight > 0 else {})}
        return agg if model.joint_gradient else agg.detach(), losses, scales

    def pretrain(self) -> World:
        embed, around, truth = observe(self.picture, self.batch, self.draw, self.pick, erase=False)
        agg, losses, scales = self.motion()
        self.metrics["agg/std"] = agg.detach().std()
        stoch, deter, z_kl = self.dynamics("latent", embed, agg, 0.0)
        (image,) = self.picture.losses([feature(stoch, deter)], around, truth, self.draw)
        scales |= {"image": self.world.image_weight, "kl": self.model.beta_z}
        return World({**losses, "image": image, "kl": z_kl}, scales)

    def finetune(self) -> World:
        model, world = self.model, self.world
        embed, around, truth = observe(self.picture, self.batch, self.draw, self.pick, erase=model.context_erasing)
        agg, losses, scales = self.motion()
        stoch, deter, z_kl = self.dynamics("latent", embed, agg, 0.0)  # Eq. 8 has the form of Eq. 6: no free nats
        z = feature(stoch, deter)
        seen = adapt(under(self.weights, "adapter"), model.adapter, z, stoch=world.stoch, classes=world.classes)
        if model.embed_input:
            seen = torch.cat([embed, seen], -1)
        stoch, deter, s_kl = self.dynamics("dynamics", seen, self.batch["action"].double(), model.free_nats)
        s = feature(stoch, deter)
        latent_image, image = self.picture.losses([z, s], around, truth, self.draw)
        losses |= {"latent_image": latent_image, "latent_kl": z_kl, "image": image, "kl": s_kl, **self.rewards(s, z)}
        weight = world.image_weight
        beta_z = model.beta_z if model.beta_z_finetune is None else model.beta_z_finetune
        scales |= {"latent_image": weight, "latent_kl": beta_z, "image": weight, "kl": model.beta_s}
        scales |= {"reward": world.reward_weight, "reward_representative": model.beta_r * world.reward_weight}
        return World(losses, scales, (stoch.detach().flatten(0, 1), deter.detach().flatten(0, 1)))

    def groups(self, pretrained: bool) -> dict[str, Learns]:
        """Motion encoder and latent dynamics learn slowly where they were loaded (4.4); what was loaded is frozen at first (IPV)."""
        loaded, online = loads(self.run), self.run.online
        slow, frozen = (online.pretrained_lr_factor, online.freeze_updates) if pretrained else (1.0, 0)
        new = ["image.decoder.", "adapter.", "dynamics.", "reward.", "reward_representative."]
        old = [f"{name}." for name in ("motion", "latent") if name in loaded]
        new += [f"{name}." for name in ("motion", "latent") if name not in loaded]
        encoders = ("image.encoder.", "image.context_encoder.")
        return {
            **({"motion": Learns(tuple(old), online.lr * slow, frozen)} if old else {}),
            "encoder": Learns(encoders, online.lr, frozen if "image" in loaded else 0),
            "model": Learns(tuple(new), online.lr),
            **actor_and_critic(self.run),
        }
