"""DisWM against its paper and release: sizes, code, Gaussian states, the frozen teacher and its weight, whole updates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from localmotion.config import BehaviourConfig, leaves
from localmotion.errors import ConfigError
from localmotion.evaluation.heldout import traversal
from localmotion.methods.base import Counters
from localmotion.methods.diswm import DisWM
from localmotion.models.beta_vae import BetaVAEDecoder, BetaVAEEncoder, Code
from localmotion.models.rssm_gaussian import GaussianRSSM, gaussian_kl_loss
from localmotion.report import media
from localmotion.runs.settings import compose
from localmotion.testing.written import Case, check_update
from localmotion.training.checks import check_acting_stage
from localmotion.training.update import Updater
from method_batches import CPU, make, make_batch
from written_out import diswm

PRETRAIN = {
    "pretrain.batch_size": 50,
    "pretrain.length": 50,
    "pretrain.updates": 20_000,
    "pretrain.lr": 3e-4,
    "optim.eps": 1e-5,
    "optim.clip": 100.0,
    "optim.weight_decay": 0.0,
    "model.code": 20,
    "model.beta": 1.0,
    "model.beta_code": 0.015,
    "model.kl_free": 1.0,
    "model.kl_balance": 0.8,
    "model.pretrain_means": True,
}
ONLINE = {
    "online.env_steps": 1_000_000,
    "online.batch_size": 50,
    "online.length": 50,
    "online.prefill": 5_000,  # 2,500 agent steps
    "online.warmup_updates": 100,
    "online.train_every": 5,
    "online.prioritize_ends": False,
    "online.lr": 3e-4,
    "online.actor_lr": 8e-5,
    "online.critic_lr": 8e-5,
    "online.phase_at": 0.5,
    "optim.weight_decay": 0.0,
    "model.reward_weight": 2.0,
    "model.kl_free": 1.0,
    "model.distillation": 0.1,
    "model.distillation_steps": 50_000,
    "model.distillation_frames": 50.0,
    "model.behaviour.horizon": 15,
    "model.behaviour.entropy": 1e-4,
}


def count(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


# 1. Sizes and settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "env", "table"), [("pretrain", "", PRETRAIN), ("finetune", "diswm:walker_walk", ONLINE)])
def test_paper_preset_is_the_table_of_the_release(stage: str, env: str, table: dict[str, Any]) -> None:
    values = dict(leaves(compose("diswm", stage, preset="paper", env=env)))
    assert {key: values[key] for key in table} == table


def test_other_suites_have_the_same_free_nats_and_a_plain_reward() -> None:
    for env in ("metaworld:drawer-open", "dmw:drawer-open", "toy:dot"):
        run = compose("diswm", "finetune", preset="paper", env=env)
        assert (run.model.kl_free, run.model.reward_weight, run.online.prioritize_ends) == (1.0, 1.0, False)
        assert run.online.phase_at is None


def test_golden_sizes_of_the_paper_preset() -> None:
    with torch.device("meta"):
        video: Any = DisWM(DisWM.Config(), image_size=64, action_dim=None)
        agent: Any = DisWM(DisWM.Config(), image_size=64, action_dim=2)
    parts = [agent.encoder, agent.decoder, agent.dynamics, agent.reward, agent.behaviour.critic, agent.behaviour.actor]
    assert [count(part) for part in parts] == [389_096, 388_959, 377_000, 261_201, 421_601, 583_204]
    assert count(agent.teacher) == count(video.encoder) == 389_096
    assert count(video.dynamics) == 377_000 - 2 * 200  # no columns for actions
    assert agent.dynamics.feat_dim == 250


@pytest.mark.parametrize("side", [8, 16, 32, 128])
def test_pictures_of_other_sides_are_halved_more_or_less_often(side: int) -> None:
    code = BetaVAEEncoder(3, depth=2, image_size=side)(torch.zeros(2, 3, side, side))
    assert code.mean.shape == code.std.shape == (2, 3)
    assert BetaVAEDecoder(5, 3, depth=2, image_size=side)(torch.zeros(2, 5)).shape == (2, 3, side, side)
    with pytest.raises(ValueError, match="side"):
        BetaVAEEncoder(3, image_size=side + 4)


def test_encoder_and_decoder_begin_kaiming_normal_and_the_others_as_torch_does() -> None:
    """He et al.: deviation sqrt(2 / fan in), no bias. PyTorch: uniform in +-1 / sqrt(fan in), biases too."""
    torch.manual_seed(0)
    method: Any = DisWM(DisWM.Config(behaviour=BehaviourConfig(continuation=True)), image_size=64, action_dim=2)
    kaiming = [*method.encoder.net[::2][:5], method.encoder.net[-1], method.decoder.net[0], method.decoder.net[2]]
    for layer in kaiming:
        assert float(layer.weight.detach().std()) == pytest.approx((2 / layer.weight[0].numel()) ** 0.5, rel=0.1)
        assert not layer.bias.any()
    rssm, heads = method.dynamics, [method.reward, method.behaviour.actor, method.behaviour.critic, method.continuation]
    plain = [rssm.img_in, rssm.prior_in, rssm.prior_out, rssm.post_in, rssm.post_out, *(head.net[2] for head in heads)]
    for layer in plain:
        bound = layer.in_features**-0.5
        assert 0.97 * bound < float(layer.weight.detach().abs().max()) <= bound
        assert 0.8 * bound < float(layer.bias.detach().abs().max()) <= bound


# 2. Code and Gaussian states --------------------------------------------------------------------------------------------------


def test_the_codes_kl_is_its_closed_form_and_its_sample_has_the_codes_distribution() -> None:
    torch.manual_seed(0)
    code = Code(torch.randn(4, 5), torch.rand(4, 5) + 0.1)
    torch.testing.assert_close(code.kl(), kl_divergence(Normal(code.mean, code.std), Normal(0.0, 1.0)).sum(-1))
    many = Code(torch.tensor([0.5, -1.0]).expand(20_000, 2), torch.tensor([0.2, 1.5]).expand(20_000, 2)).sample()
    torch.testing.assert_close(many.mean(0), torch.tensor([0.5, -1.0]), atol=0.05, rtol=0)
    torch.testing.assert_close(many.std(0), torch.tensor([0.2, 1.5]), atol=0.05, rtol=0)


def test_the_states_kl_has_free_nats_and_trains_prior_and_posterior_by_its_balance() -> None:
    torch.manual_seed(0)
    post, prior = (torch.rand(2, 3, 4, 2).add(0.2).requires_grad_() for _ in range(2))
    p, q = (Normal(x[..., 0], x[..., 1]) for x in (post, prior))
    mean = kl_divergence(p, q).sum(-1).mean()
    loss, metrics = gaussian_kl_loss(post, prior, 0.7, 0.0)
    torch.testing.assert_close(loss, mean)
    torch.testing.assert_close(metrics["kl"], mean)
    torch.testing.assert_close(metrics["post_entropy"], p.entropy().sum(-1).mean())
    true = torch.autograd.grad(mean, [post, prior])
    for found, whole, share in zip(torch.autograd.grad(loss, [post, prior]), true, (0.3, 0.7), strict=True):
        torch.testing.assert_close(found, share * whole)
    free, _ = gaussian_kl_loss(post, prior, 0.7, 50.0)
    assert float(free.detach()) == 50.0
    assert not any(g.any() for g in torch.autograd.grad(free, [post, prior]))


def test_states_walk_alike_step_by_step_and_means_have_no_noise() -> None:
    torch.manual_seed(0)
    rssm = GaussianRSSM(embed_dim=3, action_dim=2, deter=6, hidden=5, stoch=4)
    embed, action, is_first = torch.randn(2, 5, 3), torch.randn(2, 5, 2), torch.zeros(2, 5, dtype=torch.bool)
    is_first[:, 0] = is_first[1, 3] = True
    whole, prior = rssm.observe(embed, action, is_first, sample=False)
    again, _ = rssm.observe(embed, action, is_first, sample=False)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    assert torch.equal(whole.stoch[..., 0], whole.logits[..., 0])
    assert float(whole.logits[..., 1].detach().min()) > 0.1
    state = rssm.initial(2)
    for t in range(5):
        state = rssm.obs_step(state, action[:, t], embed[:, t], is_first[:, t], sample=False)
        for found, wanted in zip(state, whole, strict=True):
            torch.testing.assert_close(found, wanted[:, t])
    torch.testing.assert_close(rssm.prior(whole.deter), prior)
    drawn, _ = rssm.observe(embed, action, is_first)
    assert not torch.equal(drawn.stoch[..., 0], drawn.logits[..., 0])


def test_predictions_of_pretraining_are_means_where_its_states_are() -> None:
    for means in (True, False):
        _, method = make("diswm", "pretrain", f"pretrain_means={means}")
        batch = make_batch()
        method.encoder.net[-1].weight.data.zero_()  # the code itself is always sampled: now it is a number without noise
        method.encoder.net[-1].bias.data.fill_(-60.0)
        with torch.no_grad():
            rows = [method.open_loop(batch, 3)["prior"] for _ in range(2)]
        assert torch.equal(*rows) == means


def test_the_code_is_of_one_frame_and_the_traversal_walks_one_number_at_a_time() -> None:
    _, method = make("diswm", "finetune")
    method.eval()
    batch = make_batch()
    with torch.no_grad():
        code = method.motion_code(batch)
        walked = method.traversal(batch, torch.tensor([-2.0, 0.0, 2.0]))
        here = code[:, 0].clone()
        here[:, 4] = 2.0
        start = torch.ones(2, dtype=torch.bool)
        state = method.dynamics.obs_step(method.dynamics.initial(2), torch.zeros(2, method.action_dim), here, start, sample=False)
        expected = method.decoder(method.dynamics.feat(state))
    assert code.shape == (2, 8, 6)
    assert walked.shape == (2, 6, 3, 3, 64, 64)
    torch.testing.assert_close(walked[:, 4, 2], expected)
    assert not torch.equal(walked[:, 4, 2], walked[:, 3, 2])


# 3. The teacher ---------------------------------------------------------------------------------------------------------------


def test_the_teacher_is_the_pretrained_encoder_and_stays_while_the_student_learns() -> None:
    (_, video), (run, agent) = make("diswm", "pretrain"), make("diswm", "finetune")
    agent.teacher.load_state_dict(video.encoder.state_dict())
    updater = Updater(agent, run, CPU, pretrained=True)
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    agent.train()
    metrics = [updater.learn(make_batch(seed=seed)) for seed in range(3)][-1]
    assert agent.encoder.training
    assert not agent.teacher.training
    after = agent.state_dict()
    for name in ("encoder", "decoder", "dynamics", "reward"):
        assert any(not torch.equal(after[key], before[key]) for key in after if key.startswith(f"{name}."))
    assert all(torch.equal(after[key], before[key]) for key in after if key.startswith("teacher."))
    held = {id(p) for group in updater.groups for p in group.parameters}
    assert not any(id(p) in held or p.requires_grad for p in agent.teacher.parameters())
    assert float(metrics["distillation/kl"]) > 0


def test_the_distillation_trains_the_encoder_alone() -> None:
    _, method = make("diswm", "finetune")
    loss = method.world_model_losses(make_batch())[0]["distillation"]
    grads = {
        name: torch.autograd.grad(loss, list(getattr(method, name).parameters()), retain_graph=True, allow_unused=True)
        for name in ("encoder", "dynamics", "decoder", "reward")
    }
    assert all(g is not None and bool(g.any()) for g in grads.pop("encoder"))
    assert all(g is None for part in grads.values() for g in part)


def test_the_distillation_is_zero_for_equal_codes_and_ignores_an_offset() -> None:
    _, method = make("diswm", "finetune")
    method.teacher.load_state_dict(method.encoder.state_dict())
    for encoder in (method.teacher, method.encoder):
        encoder.net[-1].bias.data[6:] = -60.0  # log variances: codes without noise
        encoder.net[-1].weight.data[6:] = 0.0
    truth = torch.rand(3, 3, 64, 64) - 0.5
    with torch.no_grad():
        code = method.encoder(truth).sample()
        assert float(method._distance(truth, code)) == pytest.approx(0.0, abs=1e-6)
        assert float(method._distance(truth, code + 2.0)) == pytest.approx(0.0, abs=1e-6)
        assert float(method._distance(truth, code.flip(1))) > 1e-3


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ((), {0: 0.1, 2_500: 0.095, 25_000: 0.05, 45_000: 0.01, 400_000: 0.01}),
        (("cross_domain=true",), {0: 0.0, 49_999: 0.0, 50_000: 0.1, 75_000: 0.05, 95_000: 0.01, 400_000: 0.01}),
        (("distillation=0.095", "distillation_steps=0"), {0: 0.095, 400_000: 0.095}),
    ],
)
def test_the_weight_of_the_distillation_follows_the_agent_steps(texts: tuple[str, ...], expected: dict[int, float]) -> None:
    run, method = make("diswm", "finetune", "distillation_after_random=false", "distillation_steps=50000", *texts)
    updater = Updater(method, run, CPU)
    for steps, weight in expected.items():
        method.after_update(Counters("finetune", 1, 0.0, steps))
        losses, metrics, _ = method.world_model_losses(make_batch(1, 2))
        assert float(metrics["distillation/weight"]) == pytest.approx(weight, abs=1e-7)
        assert float(losses["distillation"].detach()) == pytest.approx(50 * weight * float(metrics["distillation/kl"]), rel=1e-5)
    updater.agent_step = 1_234
    updater.learn(make_batch(1, 2))
    assert int(method.agent_steps) == 1_234
    assert "agent_steps" in method.state_dict()
    method.after_update(Counters("finetune", 7, 0.0, None))  # without an environment
    assert int(method.agent_steps) == 35


def test_the_weight_may_count_from_the_first_update_on() -> None:
    _, method = make("diswm", "finetune", "distillation_after_random=true", "distillation_steps=1000")
    weights = []
    for update, steps in enumerate((1_500, 1_500, 1_600, 2_400, 9_000), start=1):
        method.after_update(Counters("finetune", update, 0.0, steps))
        weights.append(float(method.distillation_weight()))
    assert weights == pytest.approx([0.1, 0.1, 0.09, 0.01, 0.01])
    kept = method.state_dict()
    _, other = make("diswm", "finetune", "distillation_after_random=true", "distillation_steps=1000")
    other.load_state_dict(kept)
    other.after_update(Counters("finetune", 6, 0.0, 1_700))  # after a stop
    assert float(other.distillation_weight()) == pytest.approx(0.08)


def test_without_distillation_or_without_a_checkpoint_there_is_no_teacher() -> None:
    for stage, text in (("finetune", "distillation=0"), ("train", "seed=0")):
        _, method = make("diswm", stage, text)
        assert method.teacher is None
        assert "distillation" not in method.loss_scales(stage)
        assert "distillation" not in method.world_model_losses(make_batch())[0]
    with pytest.raises(ConfigError, match="train has no teacher"):
        make("diswm", "train", "distillation=0.1")[1].passes("train")
    run = compose("diswm", "finetune", preset="debug", env="toy:dot", flags={"data": "store"})
    with pytest.raises(ConfigError, match="starts from a pretrain run"):
        check_acting_stage(DisWM, run)


# 4. Whole updates -------------------------------------------------------------------------------------------------------------

SIZES = {
    "code": 3,
    "depth": 2,
    "deter": 7,
    "hidden": 6,
    "stoch": 4,
    "units": 5,
    "layers": 3,
    "critic_layers": 2,
    "reward_layers": 1,
}
WEIGHTS = {"image_weight": 0.3, "reward_weight": 1.7, "beta": 0.8, "beta_code": 0.4, "kl_balance": 0.7, "kl_free": 0.0}
BEHAVIOUR = {"horizon": 3, "discount": 0.9, "lambda_": 0.8, "entropy": 0.3, "slow_critic_every": 2}
TAUGHT = {"distillation": 0.6, "distillation_steps": 20, "distillation_frames": 9.0, "behaviour": BEHAVIOUR}


def late(method: Any) -> None:
    """An agent of some steps, after which the distillation's weight falls."""
    method.agent_steps.fill_(23)


def case(stage: str, label: str, *, updates: int = 1, prepare: Any = None, clip: float = 100.0, **model: Any) -> Case:
    return Case(
        DisWM,
        stage,
        diswm.pretrain if stage == "pretrain" else diswm.finetune,
        model={**SIZES, **WEIGHTS, **({} if stage == "pretrain" else TAUGHT), **model},
        run={
            "optim": {"clip": clip, "weight_decay": 1e-2, "eps": 1e-3},
            "online": {"lr": 3e-3, "actor_lr": 2e-3, "critic_lr": 1e-3},
            "pretrain": {"lr": 3e-3, "updates": 3, "lr_decay": 0.8},
        },
        batch={"batch": 2, "time": 5, "side": 16, "actions": 3},
        prepare=prepare,
        updates=updates,
        label=label,
    )


CASES = [
    case("pretrain", "means", updates=2, clip=1.0),
    case("pretrain", "samples", pretrain_means=False, kl_free=1.0),
    case("finetune", "taught", updates=3, clip=1.0),
    case("finetune", "cross-domain", prepare=late, updates=2, cross_domain=True, kl_free=0.5),
    case("finetune", "released", distillation=0.095, distillation_steps=0),
    case("finetune", "ends", updates=2, behaviour={**BEHAVIOUR, "continuation": True}),
    case("train", "alone", updates=2, distillation=0.0),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_updates_are_what_the_description_gives(case: Case) -> None:
    check_update(case)


def test_states_hold_what_the_imagination_starts_from() -> None:
    _, method = make("diswm", "finetune")
    start = method.world_model_losses(make_batch())[2]
    assert [tuple(x.shape) for x in start] == [(16, 8, 2), (16, 8, 1), (16, 32)]
    assert not any(x.requires_grad for x in start)


def test_a_page_shows_the_traversal_of_a_held_out_frame(tmp_path: Path) -> None:
    _, method = make("diswm", "pretrain")
    batch = make_batch()
    arrays = traversal(method, batch)
    assert arrays
    assert arrays["pictures"].shape == (6, 7, 64, 64, 3)
    assert np.array_equal(arrays["frame"], batch["image"][0, 0].numpy())
    with torch.no_grad():
        walked = method.traversal(batch, torch.from_numpy(arrays["values"]))[0, 3, 5].permute(1, 2, 0)
    assert np.abs(arrays["pictures"][3, 5] - 255 * (walked.numpy() + 0.5).clip(0, 1)).max() <= 0.51
    np.savez(tmp_path / "traversal_a.npz", **arrays)
    assert media.traversal(tmp_path / "traversal_a.npz", "run").data.startswith(b"\x89PNG")
    np.savez(tmp_path / "traversal_b.npz", **{**arrays, "values": np.zeros(3)})
    with pytest.raises(media.MediaError, match=r"traversal_b\.npz: a traversal needs"):
        media.traversal(tmp_path / "traversal_b.npz", "run")
    assert traversal(make("apv", "pretrain")[1], batch) is None
