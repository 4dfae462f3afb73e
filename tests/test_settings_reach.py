"""Every setting reaches what it is for, and nothing else: each is changed by itself, and what a method or a run then does is compared.

A method is looked at through its sizes, losses, weights of losses, optimisers, steps, actions, predictions and codes. A setting that
changes none of them fails; so does one that changes another part than `REACH` declares.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args, get_origin, get_type_hints
from unittest import mock

import pytest
import torch
from torch import Tensor

from localmotion import methods
from localmotion.config import BehaviourConfig, RunConfig, Stage, leaves, nested, update
from localmotion.testing.learns import losses_of
from localmotion.training.update import Updater
from method_batches import ACTIONS, CASES, CPU, groups_of, make, make_batch

STAGES: list[tuple[str, Stage]] = [
    (name, stage) for name, stage in CASES if (stage == "train") != ("pretrain" in methods.get(name).stages)
]
"""Of methods that pre-train fine-tuning stands for training from scratch too: only rates differ."""
DREAMERS = list(STAGES)
STAGES += [("pvdr", "tokenize"), ("pvdr", "pretrain")]

# --- another value of each setting ------------------------------------------------------------------------------------

OTHER: dict[str, Any] = {
    "model.behaviour.slow_critic_every": 1,
    "model.behaviour.entropy": 0.5,
    "model.world.context_dropout": 0.5,
    "model.free_nats": 1000.0,
    "model.free_nats_z": 1000.0,
    "model.beta_z_finetune": 0.5,
    "model.kl_free": 1e9,
    "model.hidden": 48,
    "model.imag_last": 3,
    "model.distillation_steps": 0,
    "model.scales.rep": 1.0,
    "model.tokenizer.widths": (8, 4, 8),
    "model.tokenizer.restart": 0.9,
    "model.tokenizer.adversarial_from": 0,
    "model.plan.context": 1,
    "model.plan.horizon": 2,
}


def other(config: Any, name: str) -> Any:
    """Another legal value of the setting ``name`` (dotted)."""
    holder = config
    *path, last = name.split(".")
    for part in path:
        holder = getattr(holder, part)
    value, hint = getattr(holder, last), get_type_hints(type(holder))[last]
    if name in OTHER:
        return OTHER[name]
    if get_origin(hint) is Literal:
        return next(choice for choice in get_args(hint) if choice != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return 2 * value or 1
    if isinstance(value, float):
        return value / 2 or 0.5
    raise AssertionError(f"{name}={value!r}: no other value is known; name one in OTHER")


def changed(run: RunConfig, name: str, value: Any) -> RunConfig:
    return update(run, nested(name, value))


# --- what a method does -----------------------------------------------------------------------------------------------


@contextmanager
def same_noise(seed: int = 7) -> Iterator[None]:
    """Random numbers are a function of their shape alone: one draw more in one place changes no draw in another."""

    def fixed(draw: Any) -> Any:
        def drawn(*args: Any, **kwargs: Any) -> Tensor:
            return draw(*args, **{**kwargs, "generator": torch.Generator().manual_seed(seed)})

        return drawn

    names = ("rand", "randn", "randint")
    with mock.patch.multiple(torch, **{name: fixed(getattr(torch, name)) for name in names}):
        torch.manual_seed(0)  # dropout
        yield


def build(run: RunConfig) -> Any:
    """The method, no weight of which is zero: layers that begin at zero hide what lies behind them."""
    torch.manual_seed(0)
    cls = methods.get(run.method)
    method = cls(run.model, image_size=64, action_dim=ACTIONS if run.stage in cls.acts_after else None)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return method


def batch() -> dict[str, Tensor]:
    out = make_batch(2, 5, tracks=8)
    out["flow"] = out["flow"] * 8  # beyond `flow_clip` in places
    out["vector"] = torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(1))
    return out


Doing = dict[str, Any]


def by_module(values: dict[str, Any], what: str) -> Doing:
    """Values of weights gathered by the module that they are of."""
    out: Doing = {}
    for name, value in values.items():
        parts = name.split(".")
        out.setdefault(f"{what}.{'.'.join(parts[: 2 if parts[0] in ('behaviour', 'image') else 1])}", {})[name] = value
    return out


def sizes(method: Any) -> Doing:
    """Shapes of weights by module, and what no weight shows: how many latents a state has, and of how many classes each is."""
    out = by_module({name: tuple(value.shape) for name, value in method.state_dict().items()}, "size")
    for name, module in method.named_children():
        if hasattr(module, "initial"):
            out[f"size.{name}.latents"], out[f"size.{name}.classes"] = module.initial(1).stoch.shape[-2:]
    return out


def doing(run: RunConfig, method: Any) -> Doing:
    """What a method computes and how it is to be stepped, by part."""
    data, stage, out = batch(), run.stage, {}
    method.train()
    with torch.no_grad(), same_noise():
        out |= {f"loss.{name}": float(value) for name, value in losses_of(method, stage, data).items()}
    out |= {f"weight.{name}": value for name, value in method.loss_scales(stage).items()}
    for group in groups_of(method, run, True):
        out[f"rate.{group.name}"] = (group.lr, group.freeze_updates, group.warmup, group.agc, len(group.parameters))
    method.eval()
    with torch.no_grad(), same_noise():
        out |= {f"predicted.{row}": picture for row, picture in method.open_loop(data, 3).items()}
    with torch.no_grad(), same_noise():
        out["code"] = method.motion_code(data)
    if stage in method.acts_after:
        for explore in (False, True):
            carry, actions = method.initial_carry(2), []
            with torch.no_grad(), same_noise():
                for t in range(3):
                    seen = {key: value[:, t : t + 1] for key, value in data.items() if key not in ("reward", "is_terminal")}
                    action, carry = method.act(seen, carry, explore=explore, window=2)
                    actions.append(action)
            out["exploring" if explore else "acting"] = torch.stack(actions)
    return out


def stepped(run: RunConfig, at: int = 3) -> Doing:
    """Weights after update number ``at`` of a run that began from a checkpoint, by module."""
    method = build(run)
    updater = Updater(method, run, CPU, pretrained=True)
    updater.update = at
    with same_noise():
        updater.learn(batch())
    return by_module(method.state_dict(), "step")


def equal(one: Any, two: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(value, two[key]) for key, value in one.items())
    if isinstance(one, Tensor):
        return torch.equal(one, two)
    if isinstance(one, float):
        return math.isclose(one, two, rel_tol=1e-6)  # terms in another order
    return bool(one == two)


def difference(one: Doing, two: Doing) -> set[str]:
    return {key for key in one.keys() | two.keys() if key not in one or key not in two or not equal(one[key], two[key])}


# --- what each setting of a method is for -----------------------------------------------------------------------------

# Names of parts with * as in file names; "!" stands before what the setting has to change, the others it may change.
FREE = "!code !loss.masked !loss.recompose !loss.*kl !predicted.* loss.* acting exploring"  # the code of motion: all that is read from it
HEADS = "!size.reward* !size.behaviour.actor !size.behaviour.*critic"
STATE = "!size.image.decoder !size.latent !size.dynamics !size.adapter !size.bonus " + HEADS
RETURNS = "!loss.actor !loss.critic"
V3_RETURNS = "!loss.policy !loss.value !loss.repval"
V3_STATE = "!size.dynamics !size.observations !size.reward !size.cont !size.actor !size.critic !size.slow_critic"
UPSTREAM = (
    "!step.image.encoder step.motion step.inverse step.mapping !step.latent !step.dynamics !step.adapter"
    " step.behaviour.actor step.behaviour.critic"
)
ONE_STATE = "!size.image.decoder !size.latent " + HEADS  # of a method whose bonus does not see the state
BESIDE = "size.latent size.dynamics size.inverse size.bonus"  # what reads embeddings, and a second image encoder
DISWM_STATE = "!size.dynamics !size.decoder " + HEADS
DISWM_UPSTREAM = "!step.encoder !step.dynamics step.behaviour.actor step.behaviour.critic"
PLANS = "!size.posterior !size.prior !size.decoder"
CODED = "!size.inverse !size.latent !size.mapping"
REACH: dict[str, str] = {
    # DisWM
    "diswm code": "!size.encoder !size.decoder !size.dynamics !size.teacher",
    "diswm depth": "!size.encoder !size.decoder !size.teacher",
    "diswm deter": DISWM_STATE,
    "diswm stoch": DISWM_STATE + " !size.*.latents",
    "diswm hidden": "!size.dynamics",
    "diswm units": HEADS,
    "diswm layers": "!size.behaviour.actor",
    "critic_layers": "!size.behaviour.*critic",
    "reward_layers": "!size.reward",
    "image_weight": "!weight.image !step.decoder " + DISWM_UPSTREAM,
    "diswm reward_weight": "!weight.reward !step.reward " + DISWM_UPSTREAM,
    "diswm beta": "!weight.kl " + DISWM_UPSTREAM,
    "diswm kl_balance": DISWM_UPSTREAM,
    "diswm kl_free": "!loss.kl",
    "beta_code": "!weight.code_kl !step.encoder",
    "pretrain_means": "!loss.image !loss.kl !predicted.prior",
    "distillation_after_random": "!size.random_steps",  # what it counts: test_diswm.py
    "distillation*": "!loss.distillation",
    "cross_domain": "!loss.distillation",
    # PreLAR
    "prelar world.deter": ONE_STATE,
    "prelar world.stoch": ONE_STATE + " !size.*.latents",
    "prelar world.classes": ONE_STATE + " !size.*.classes",
    "action_input": "!size.inverse",
    "action_output": "size.inverse !size.latent !size.mapping",  # logits may be as many as means and deviations
    "action_width": CODED,
    "action_codes": CODED,
    "action_classes": CODED,
    "action_hidden": "!size.inverse !size.mapping",
    "action_prior_std": "!loss.action_kl",
    "beta_action": "!weight.action_kl !step.inverse",
    "consistency": "!loss.consistency weight.consistency",
    "consistency_weight": "!weight.consistency !step.inverse",
    "consistency_sharpness": "!loss.consistency",
    "free_latent": "!rate.encoder !rate.model",
    # PVDR
    "tokenizer.codes": "!size.tokenizer " + PLANS,
    "tokenizer.widths": "!size.tokenizer size.posterior size.prior size.decoder",
    "tokenizer.code_decay": "!predicted.*",  # what is predicted after the codes have moved
    "tokenizer.restart": "!predicted.* !code",
    "pretrain tokenizer.quantise_from": "!step.tokenizer",  # a buffer that an earlier stage sets
    "tokenizer.quantise_from": "!loss.image !loss.commitment predicted.* code",
    "tokenizer.commitment": "!weight.commitment !step.tokenizer",
    "tokenizer.mse_weight": "!loss.image",
    "tokenizer.mae_weight": "!loss.image",
    "tokenizer.adversarial": "!size.discriminator !size.awake",
    "pretrain tokenizer.adversarial_from": "!step.awake",
    "tokenizer.adversarial_from": "!loss.adversarial !loss.discriminator",
    "tokenizer.*": "!size.tokenizer",
    "plan.context": PLANS,
    "plan.horizon": "!size.posterior !size.decoder",
    "plan.latent": PLANS,
    "plan.dim": PLANS,
    "plan.posterior_layers": "!size.posterior",
    "plan.prior_layers": "!size.prior",
    "plan.decoder_layers": "!size.decoder",
    "plan.decode": "!size.decoder",
    "tokenize plan.heads": "!predicted.prior* !code predicted.*",  # of networks that this stage only builds
    "plan.heads": "!loss.* !predicted.prior* !code predicted.*",
    "pvdr beta": "!weight.kl !step.posterior !step.prior",
    "tokenize beta_warmup": "!step.warm",
    "beta_warmup": "!loss.kl",
    "kl_balance": "!step.posterior !step.prior",
    "free_nats_each": "!loss.kl",
    "pvdr decay": "!step.posterior !step.prior !step.decoder",
    "pvdr warmup": "!rate.decayed !rate.plain !step.posterior !step.prior !step.decoder",
    # World models in the manner of DreamerV2
    "motion_encoder": "!size.motion",
    "dae.patch": "!size.motion",
    "dae.mask_ratio": "!loss.masked",
    "dae.blocks": "!size.motion",
    "dae.dim": "!size.motion !size.latent",
    "dae.attention_norm": "!size.motion",
    "dae.mlp_ratio": "!size.motion",
    "dae.decoder_blocks": "!size.motion",
    "dae.decoder_causal": "!loss.masked",
    "dae.max_length": "!size.motion",
    "dae.agg_dim": "!size.motion !size.latent",
    "dae.mats": "!size.motion !size.latent",
    "dae.flow_norm": "!size.motion",
    "dae.*": FREE,
    "world.encoder": "!size.image.encoder !size.image.decoder size.image.context_encoder " + BESIDE,
    "world.context": "!size.image.decoder size.image.context_encoder",
    "world.stem": "!size.image.* " + BESIDE,
    "world.norm": "!size.image.* size.inverse",
    "world.depth": "!size.image.* " + BESIDE,
    "world.context_mask": "!loss.*image !predicted.*",
    "world.context_dropout": "!loss.*image",
    "world.context_side": "!size.image.decoder",
    "world.context_copy": "!size.image.decoder",
    "world.deter": STATE,
    "world.hidden": "!size.latent !size.dynamics",
    "world.stoch": STATE + " !size.*.latents",
    "world.classes": STATE + " !size.*.classes",
    "world.units": HEADS,
    "world.layers": HEADS,
    "world.kl_balance": UPSTREAM,
    "world.image_weight": "!weight.*image !step.image.encoder !step.image.decoder !step.latent step.*",
    "world.reward_weight": "!weight.reward* !step.reward* " + UPSTREAM,
    "behaviour.horizon": RETURNS,
    "behaviour.discount": RETURNS,
    "behaviour.lambda_": RETURNS,
    "behaviour.entropy": "!loss.actor",
    "behaviour.continuation": "!size.continuation",  # what it computes: test_continuation.py
    "behaviour.slow_critic_every": "!step.behaviour.slow_critic",
    "adapter": "!size.adapter",
    "embed_input": "!size.dynamics",
    "action_pad": "!size.latent !size.dynamics",
    "joint_gradient": "!step.motion",
    "recompose_weight": "!weight.recompose !step.motion",
    "beta": "!weight.kl " + UPSTREAM,
    "finetune beta_z": "!weight.latent_kl !step.image.encoder !step.latent step.motion",
    "beta_z": "!weight.kl !step.image.encoder !step.latent step.motion",
    "beta_z_finetune": "!weight.latent_kl !step.image.encoder !step.latent step.motion",
    "beta_s": "!weight.kl " + UPSTREAM,
    "beta_r": "!weight.reward_representative !step.reward_representative " + UPSTREAM,
    "intrinsic_weight": "!loss.reward",
    "free_nats": "!loss.kl loss.latent_kl",
    "pretrain free_nats_z": "!loss.kl",
    "free_nats_z": "!loss.latent_kl",
    "slow_image": "!rate.encoder !rate.motion !rate.model !step.image.encoder !step.image.decoder step.image.context_encoder",
    "context_erasing": "!loss.*image",
    # DreamerV3
    "size": "!size.dynamics",
    "deter": V3_STATE,
    "hidden": "!size.dynamics",
    "classes": V3_STATE + " !size.*.classes",
    "depth": "!size.observations !size.dynamics",
    "units": V3_STATE,
    "stoch": V3_STATE + " !size.*.latents",
    "blocks": "!size.observations !size.dynamics",
    "stem": "!size.observations",
    "pixels": "!size.observations !size.dynamics",
    "vector_dim": "!size.observations",
    "discrete": "!size.actor",
    "unimix": "!loss.dyn !loss.rep",
    "kl_free": "!loss.dyn !loss.rep",
    "horizon": "!loss.cont !loss.repval",
    "contdisc": "!loss.cont " + V3_RETURNS,
    "imag_length": V3_RETURNS,
    "imag_last": V3_RETURNS,
    "lambda_": V3_RETURNS,
    "entropy": "!loss.policy",
    "slow_reg": "!loss.value !loss.repval",
    "slow_rate": "!step.slow_critic",
    "evaluate_mode": "!acting",
    "agc": "!rate.model !step.dynamics step.*",
    "warmup": "!rate.model !step.dynamics step.*",
    "scales.dyn": "!weight.dyn !step.dynamics step.observations",
    "scales.rep": "!weight.rep !step.dynamics !step.observations",
    "scales.recon": "!weight.recon !step.dynamics !step.observations",
    "scales.reward": "!weight.reward !step.dynamics !step.observations step.reward",
    "scales.cont": "!weight.cont !step.dynamics !step.observations step.cont",
    "scales.policy": "!weight.policy step.actor",
    "scales.value": "!weight.value !step.critic step.slow_critic",
    "scales.repval": "!weight.repval !step.dynamics !step.observations !step.critic step.slow_critic",
}

# Settings of a method that a stage does not have, with the reason. There they must change nothing at all.
ACTING_ONLY = "pre-training has no actor, critic, reward or second model"
IDLE: dict[tuple[str, str], str] = {
    **{("pretrain", f"world.{name}"): ACTING_ONLY for name in ("units", "layers", "reward_weight")},
    **{("pretrain", f"behaviour.{item.name}"): ACTING_ONLY for item in dataclasses.fields(BehaviourConfig)},
    **{
        ("pretrain", name): ACTING_ONLY
        for name in ("adapter", "embed_input", "beta_s", "beta_r", "beta_z_finetune", "intrinsic_weight", "free_nats")
    },
    ("pretrain", "slow_image"): "all of pre-training learns at one rate",
    ("pretrain", "context_erasing"): "only fine-tuning erases (IPV)",
    ("finetune", "beta_z"): "fine-tuning has a weight of its own, beta_z_finetune",
    **{
        ("pretrain", name): ACTING_ONLY
        for name in (
            "units",
            "layers",
            "critic_layers",
            "reward_layers",
            "reward_weight",
            "distillation",
            "distillation_steps",
            "distillation_frames",
            "distillation_after_random",
            "cross_domain",
        )
    },
    ("finetune", "pretrain_means"): "fine-tuning samples its states",
    ("pretrain", "free_latent"): "all of pre-training learns at one rate",
    **{
        ("finetune", name): "fine-tuning has no inverse model"
        for name in (
            "action_input",
            "action_prior_std",
            "beta_action",
            "consistency",
            "consistency_weight",
            "consistency_sharpness",
        )
    },
}

TOKENS_ONLY = "the tokenizer alone learns"
IDLE |= {("tokenize", name): TOKENS_ONLY for name in ("beta", "kl_balance", "free_nats_each", "decay", "warmup")}
OF_TOKENS = ("code_decay", "restart", "commitment", "mse_weight", "mae_weight")
IDLE |= {("pretrain", f"tokenizer.{name}"): "it is frozen" for name in OF_TOKENS}

BASES: dict[str, tuple[str, ...]] = {
    "drp": ("recompose_weight=0.5", "model.dae.blocks=1", "model.behaviour.horizon=3", "layers=1"),
    "pvdr": ("beta_warmup=0",),
    "dreamer_v3": ("size=size1m", "model.hidden=null", "vector_dim=5", "imag_length=2"),
}
BASE = ("model.behaviour.horizon=3", "layers=1")
UNCLIPPED = "optim.clip=1e12"  # one norm for a whole group would let each gradient change every step
NEEDS: dict[str, tuple[str, ...]] = {
    **{f"world.context_{part}": ("context=true",) for part in ("mask", "dropout", "side", "copy")},
    "world.encoder": ("context=false",),
    **{f"action_{part}": ("action_output=discrete",) for part in ("codes", "classes")},
    "distillation_steps": ("cross_domain=true",),
    "tokenizer.adversarial_from": ("adversarial=0.1",),
}
"""What has to be on for a setting to do anything."""

ELSEWHERE = {"tokenizer.perceptual": "it needs a file: test_pvdr.py", "tokenizer.perceptual_weight": "the same"}
ELSEWHERE |= dict.fromkeys(("pretrained", "align.*", "ppo.*"), "of the stage `finetune`: test_pvdr_online.py")
"""Settings that another test has."""


def matching(names: Iterable[str], patterns: Iterable[str]) -> set[str]:
    return {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}


def declaration(name: str, stage: Stage, setting: str) -> str:
    """The first row of `REACH` that is of a setting, or of a setting in a stage or of a method."""
    keys = (f"{stage} {setting}", f"{name} {setting}", setting)
    return next((REACH[row] for row in REACH if any(fnmatchcase(key, row) for key in keys)), "")


@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_every_setting_of_a_method_reaches_what_it_is_for_and_nothing_else(name: str, stage: Stage) -> None:
    known: dict[tuple[str, ...], tuple[RunConfig, Doing, Doing, Doing]] = {}
    wrong = {}
    elsewhere = matching((setting for setting, _ in leaves(make(name, stage)[0].model)), ELSEWHERE)
    for setting in (setting for setting, _ in leaves(make(name, stage)[0].model) if setting not in elsewhere):
        needs = NEEDS.get(setting, ())
        if needs not in known:
            run, _ = make(name, stage, *BASES.get(name, BASE), UNCLIPPED, *needs)
            base = build(run)
            known[needs] = run, sizes(base), doing(run, base), stepped(run)
        run, size, now, step = known[needs]
        again = changed(run, f"model.{setting}", other(run, f"model.{setting}"))
        method = build(again)
        found = difference(size, sizes(method))
        if not found:
            found = difference(now, doing(again, method))
            if all(part.startswith(("weight", "rate")) for part in found):
                found |= difference(step, stepped(again))
        idle = (stage, setting) in IDLE and (setting != "beta_z" or getattr(run.model, "beta_z_finetune", None) is not None)
        declared = [] if idle else declaration(name, stage, setting).split()
        must = [part[1:] for part in declared if part.startswith("!")]
        may = [part.removeprefix("!") for part in declared]
        missed, beyond = matching({**size, **now, **step}, must) - found, found - matching(found, may)
        if missed or beyond or bool(found) == idle:
            wrong[setting] = (
                f"leaves {sorted(missed)} as it was and changes {sorted(beyond)} too; all it changes: {sorted(found)}"
            )
    assert not wrong, "\n".join(f"{setting} {what}" for setting, what in wrong.items())


@pytest.mark.parametrize(("name", "stage"), [case for case in DREAMERS if case[0] != "dreamer_v3"])
def test_the_balance_reaches_each_kl_by_itself(name: str, stage: Stage) -> None:
    """It changes gradients alone. Those of one KL would hide those of another in a step, so each KL is followed back by itself."""
    slopes: dict[float, list[Tensor]] = {}
    kls = ("kl",) if stage == "pretrain" or name in ("dreamer_v2", "prelar", "diswm") else ("kl", "latent_kl")
    for balance in (0.8, 0.4):
        run, _ = make(name, stage, *BASES.get(name, BASE), f"kl_balance={balance}")
        method = build(run)
        slopes[balance] = []
        for kl in kls:
            with same_noise():
                losses = (method.pretrain_losses if stage == "pretrain" else method.world_model_losses)(batch())[0]
            method.zero_grad()
            losses[kl].backward()
            slopes[balance].append(torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None]))
        assert {key for key in losses if key.endswith("kl")} - {"action_kl", "code_kl"} == set(
            kls
        )  # those of codes have no balance
    same = [kl for kl, one, two in zip(kls, *slopes.values(), strict=True) if torch.allclose(one, two, rtol=1e-3)]
    assert not same
