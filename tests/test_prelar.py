"""PreLAR against what its paper and release describe: sizes, latent actions, consistency, what fine-tuning takes over."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Normal, kl_divergence

from localmotion import methods
from localmotion.config import leaves
from localmotion.errors import ConfigError
from localmotion.methods.base import MOTION
from localmotion.methods.prelar import PreLAR
from localmotion.models.consistency import consistency_loss
from localmotion.models.learned_actions import CodeShape, GaussianCode, OneHotCode, PlainCode
from localmotion.runs.settings import compose
from localmotion.testing.written import Case, check_update
from localmotion.training.update import Updater
from method_batches import ACTIONS, CPU, make, make_batch
from written_out import prelar

# Commands of the release.
TABLE = {
    "pretrain.batch_size": 16,
    "pretrain.length": 25,
    "pretrain.updates": 600_000,
    "pretrain.lr": 3e-4,
    "optim.eps": 1e-5,
    "optim.clip": 100.0,
    "optim.weight_decay": 1e-6,
    "model.action_width": 64,
    "model.action_hidden": 1024,
    "model.action_input": "concat",
    "model.action_output": "gaussian",
    "model.action_prior_std": 1.0,
    "model.beta": 1.0,
    "model.beta_action": 1.0,
    "model.consistency_weight": 1.0,
    "model.world.context": False,
    "model.world.kl_balance": 0.8,
}
ONLINE = {
    "online.batch_size": 50,
    "online.length": 50,
    "online.prefill": 5_000,
    "online.warmup_updates": 100,
    "online.freeze_updates": 100,
    "online.pretrained_lr_factor": 1.0,
    "online.train_every": 5,
    "online.lr": 3e-4,
    "online.actor_lr": 8e-5,
    "online.critic_lr": 8e-5,
    "online.prioritize_ends": True,
    "model.intrinsic_weight": 1.0,
    "model.beta_r": 1.0,
    "model.free_nats": 0.0,
}
MODELS: dict[str, tuple[str, ...]] = {
    "pretrain": (),
    "pretrain, discrete": ("action_output=discrete",),
    "pretrain, plain": ("action_output=deterministic", "consistency=none"),
}


# 1. Sizes and settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "env", "table"),
    [
        ("pretrain", "", TABLE),
        ("finetune", "metaworld:reach", ONLINE),
        ("finetune", "dmc:walker_walk", {"online.freeze_updates": 100}),
    ],
)
def test_paper_preset_is_the_table_of_the_release(stage: str, env: str, table: dict[str, Any]) -> None:
    values = dict(leaves(compose("prelar", stage, preset="paper", env=env)))
    assert {key: values[key] for key in table} == table
    assert values["model.consistency"] not in ("none", "sign")


def test_golden_sizes_of_the_paper_preset() -> None:
    """1.56 M, 4.84 M, 14.76 M, 7.52 M, 28.7 M in all; the mapping network of 4 actions 71 k."""
    with torch.device("meta"):
        video: Any = PreLAR(PreLAR.Config(), image_size=64, action_dim=None)
        agent: Any = PreLAR(PreLAR.Config(), image_size=64, action_dim=4)
    parts = [video.image.encoder, video.inverse, video.latent, video.image.decoder, video, agent.mapping]
    counted = [sum(p.numel() for p in module.parameters()) for module in parts]
    assert counted == [1_562_112, 4_841_360, 14_759_936, 7_519_227, 28_682_635, 70_720]
    assert video.image.embed_dim == 3072
    assert video.inverse.encoder.stem.in_channels == 6
    assert video.inverse.out.out_features == 128
    assert video.latent.img_in.in_features == 1024 + 64
    assert agent.bonus.projection.shape == (3072, 128)
    assert not hasattr(agent, "inverse")


def test_all_layers_begin_xavier_uniform_without_bias() -> None:
    """Those of the residual layers too (release)."""
    for stage in ("pretrain", "finetune"):
        _, method = make("prelar", stage)
        for layer in method.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)) and layer.weight.numel() > 500:
                ways = (layer.weight[0].numel() + layer.weight[:, 0].numel()) / 2  # mean of fan in and fan out
                assert float(layer.weight.detach().std()) == pytest.approx(ways**-0.5, rel=0.15)
                assert layer.bias is None or not layer.bias.any()


def test_motion_is_read_only_where_the_inverse_model_sees_flow() -> None:
    for given in ("concat", "diff", "catdiff", "flow"):
        run, _ = make("prelar", "pretrain", f"action_input={given}")
        assert PreLAR.needs(run.model, "pretrain") == (MOTION if given == "flow" else frozenset())
        assert not PreLAR.needs(run.model, "finetune")
    with pytest.raises(ConfigError, match="consistency"):
        make("prelar", "pretrain", "consistency=rank")


# 2. Latent actions ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deviation", [1.0, 1.2449])
def test_the_kl_of_gaussian_codes_is_its_closed_form(deviation: float) -> None:
    torch.manual_seed(0)
    out = 3 * torch.randn(5, 4, 12)
    one, two = (GaussianCode.of(x) for x in (out, out.flip(0)))
    assert float(GaussianCode.of(torch.zeros(2)).std) == 1  # 2 sigmoid(0)
    p, q = (Normal(code.mean, code.std) for code in (one, two))
    torch.testing.assert_close(one.divergence(two), kl_divergence(p, q).sum(-1))
    torch.testing.assert_close(one.from_prior(deviation), kl_divergence(p, Normal(0.0, deviation)).sum(-1))
    assert not GaussianCode(torch.zeros(3), torch.full((3,), deviation)).from_prior(deviation).any()


def test_samples_have_the_codes_distribution_and_its_gradient() -> None:
    torch.manual_seed(0)
    mean, std = torch.tensor([0.5, -1.0]).requires_grad_(), torch.tensor([0.2, 1.5]).requires_grad_()
    code = GaussianCode(mean.expand(20_000, 2), std.expand(20_000, 2))
    drawn = code.sample()
    torch.testing.assert_close(drawn.mean(0), mean, atol=0.05, rtol=0)
    torch.testing.assert_close(drawn.std(0), std, atol=0.05, rtol=0)
    to_mean, to_std = torch.autograd.grad(drawn.square().sum(-1).mean(), [mean, std])
    torch.testing.assert_close(to_mean, 2 * mean, atol=0.1, rtol=0)
    torch.testing.assert_close(to_std, 2 * std, atol=0.2, rtol=0)


def test_kl_of_one_hot_codes_and_distance_of_plain_ones() -> None:
    torch.manual_seed(0)
    shape = CodeShape("discrete", 7, 4, 5)
    assert (shape.width, shape.outputs) == (20, 20)
    one, two = shape.code(torch.randn(3, 20)), shape.code(torch.randn(3, 20))
    assert isinstance(one, OneHotCode)
    assert isinstance(two, OneHotCode)
    p, q = Categorical(logits=one.logits), Categorical(logits=two.logits)
    torch.testing.assert_close(one.divergence(two), kl_divergence(p, q).sum(-1))
    even = Categorical(logits=torch.zeros(5))
    torch.testing.assert_close(one.from_prior(1.0), kl_divergence(p, even).sum(-1))
    assert one.sample().unflatten(-1, (4, 5)).sum(-1).eq(1).all()
    assert torch.equal(one.mode().unflatten(-1, (4, 5)).argmax(-1), one.logits.argmax(-1))
    assert PlainCode(torch.tensor([1.0, 2.0])).divergence(PlainCode(torch.tensor([4.0, 6.0]))) == 12.5


@pytest.mark.parametrize("texts", MODELS.values(), ids=MODELS)
def test_the_first_frame_has_no_latent_action_and_predictions_use_the_later_ones(texts: tuple[str, ...]) -> None:
    _, method = make("prelar", "pretrain", *texts)
    method.eval()
    batch = make_batch()
    with torch.no_grad():
        code, rows = method.motion_code(batch), method.open_loop(batch, 3)
        other = method.motion_code({**batch, "image": batch["image"].flip(0)})
    assert not code[:, 0].any()
    assert not torch.equal(code[:, 1:], other[:, 1:])
    assert list(rows) == ["latent_action", "zero_action", "swapped_action"]
    assert not torch.equal(rows["latent_action"][:, 3:], rows["zero_action"][:, 3:])


# 3. Consistency ---------------------------------------------------------------------------------------------------------------


def test_the_released_form_counts_pairs_in_another_order() -> None:
    """0 for the same order; for the opposite one 4 for each pair, which is the most; between them for others."""
    state = torch.tensor([0.1, 3.0, 0.7, 2.0])
    assert consistency_loss("sign", state, 5 + state.square())[0] == 0
    loss, agreement = consistency_loss("sign", state, 4 - state)
    assert (float(loss), float(agreement)) == (4 * 12 / 16, -1)
    torch.manual_seed(0)
    for _ in range(5):
        loss, agreement = consistency_loss("sign", torch.rand(9), torch.rand(9))
        assert 0 < float(loss) < 4
        assert float(loss) == pytest.approx(2 * (1 - float(agreement)) * 72 / 81, rel=1e-5)


@pytest.mark.parametrize(("form", "least", "most"), [("tanh", 0, 4), ("logistic", 0, math.inf), ("pearson", 0, 2)])
def test_other_forms_prefer_the_states_order_at_any_scale(form: Any, least: float, most: float) -> None:
    state = torch.tensor([0.1, 3.0, 0.7, 2.0])
    same, opposite = (consistency_loss(form, state, action)[0] for action in (state, 4 - state))
    assert least < float(same) < float(opposite) < most
    torch.testing.assert_close(consistency_loss(form, state, (1 + state).pow(9) - 1)[0], same)  # in ln(1 + D^a) a matter of scale
    assert consistency_loss(form, state, state, sharpness=5.0)[0] < same
    assert torch.isfinite(consistency_loss(form, state, torch.tensor([0.0, 1.0, 1e30, 1e37]))[0])
    tied = torch.zeros(4).requires_grad_()
    (gradient,) = torch.autograd.grad(consistency_loss(form, torch.zeros(4), tied)[0], [tied])
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("form", ["sign", "tanh", "logistic", "pearson"])
@pytest.mark.parametrize("output", ["gaussian", "discrete", "deterministic"])
def test_only_the_released_form_has_no_gradient(form: str, output: str) -> None:
    """The others train the inverse model; none trains the RSSM, whose distances are targets."""
    _, method = make("prelar", "pretrain", f"consistency={form}", f"action_output={output}")
    torch.manual_seed(1)
    loss = method.pretrain_losses(make_batch(5, 4))[0]["consistency"]
    parts = {name: list(getattr(method, name).parameters()) for name in ("inverse", "latent", "image")}
    found = {name: torch.autograd.grad(loss, part, retain_graph=True, allow_unused=True) for name, part in parts.items()}
    sizes = {name: sum(float(g.abs().sum()) for g in grads if g is not None) for name, grads in found.items()}
    assert sizes["latent"] == sizes["image"] == 0
    assert (sizes["inverse"] == 0) == (form == "sign")


# 4. Fine-tuning ---------------------------------------------------------------------------------------------------------------


def test_finetuning_takes_image_model_and_rssm_and_drops_the_inverse_model() -> None:
    (_, video), (_, agent) = make("prelar", "pretrain"), make("prelar", "finetune")
    theirs, ours = video.state_dict(), agent.state_dict()
    taken = {key for key in theirs if key.partition(".")[0] in PreLAR.transfers}
    assert {key.partition(".")[0] for key in set(theirs) - taken} == {"inverse"}
    assert all(ours[key].shape == theirs[key].shape for key in taken)
    assert {key.partition(".")[0] for key in set(ours) - taken} == {
        "mapping",
        "reward",
        "reward_representative",
        "bonus",
        "behaviour",
    }
    assert agent.motion_code(make_batch()) is None
    assert list(agent.open_loop(make_batch(), 3)) == ["action"]


@pytest.mark.parametrize(("free", "still"), [("false", True), ("true", False)])
def test_encoder_and_rssm_wait_and_the_others_learn(free: str, still: bool) -> None:
    run, method = make("prelar", "finetune", "freeze_updates=1", f"free_latent={free}", env="metaworld:reach")
    updater = Updater(method, run, CPU, pretrained=True)
    before = {key: value.clone() for key, value in method.state_dict().items()}
    updater.learn(make_batch())
    after = method.state_dict()

    def moved(prefix: str) -> bool:
        return any(not torch.equal(after[key], before[key]) for key, _ in method.named_parameters() if key.startswith(prefix))

    assert not moved("image.encoder.")
    assert moved("latent.") != still
    assert all(moved(prefix) for prefix in ("image.decoder.", "mapping.", "reward.", "reward_representative."))


def test_the_bonus_is_of_image_embeddings() -> None:
    _, method = make("prelar", "finetune", "intrinsic_weight=0.5")
    seen: list[Tensor] = []
    method.bonus.register_forward_hook(lambda _module, inputs, _out: seen.append(inputs[0]))
    batch = make_batch()
    method.world_model_losses(batch)
    torch.testing.assert_close(seen[0], method.image.embed(batch["image"]).view(2, 8, -1).detach())
    assert not seen[0].requires_grad


def test_the_actors_gradient_flows_through_the_mapping_network() -> None:
    _, method = make("prelar", "finetune")
    nn.init.normal_(method.reward.net[-1].weight)
    start = method.world_model_losses(make_batch())[2]
    with torch.no_grad():
        for parameter in method.mapping.parameters():
            parameter.zero_()
    method.behaviour.entropy = 0.0
    loss = method.behaviour_losses(start)[0]["actor"]
    assert not any(g.any() for g in torch.autograd.grad(loss, list(method.behaviour.actor.parameters())))
    assert methods.get("prelar") is PreLAR
    assert method.mapping(torch.zeros(3, ACTIONS)).shape == (3, method.latent.action_dim)


# 5. Whole updates -------------------------------------------------------------------------------------------------------------

PLAIN = {"depth": 3, "deter": 7, "hidden": 6, "stoch": 3, "classes": 4, "units": 5, "layers": 1, "kl_balance": 0.7}
WORLD = {**PLAIN, "context": False, "stem": "unshuffle", "norm": "none", "image_weight": 0.3, "reward_weight": 1.7}
PAPER = {**PLAIN, "context": False, "image_weight": 0.3, "reward_weight": 0.6}
OWN = {"action_width": 5, "action_hidden": 4, "action_codes": 2, "action_classes": 3, "beta": 0.8}
VIDEO = {"beta_action": 0.6, "action_prior_std": 1.3, "consistency_weight": 0.9, "consistency_sharpness": 1.6}
BEHAVIOUR = {"horizon": 3, "discount": 0.9, "lambda_": 0.8, "entropy": 0.3, "slow_critic_every": 2}
RATES = {"lr": 3e-3, "actor_lr": 2e-3, "critic_lr": 1e-3, "pretrained_lr_factor": 0.3, "freeze_updates": 1}


def half_filled(method: Any) -> None:
    """The bonus has seen more windows than it takes neighbours."""
    method.bonus.filled.fill_(30)


def case(
    stage: str, label: str, *, world: Any = WORLD, updates: int = 1, clip: float = 100.0, load: str = "", **model: Any
) -> Case:
    video = stage == "pretrain"
    more = VIDEO if video else {"behaviour": BEHAVIOUR, "beta_r": 0.4, "intrinsic_weight": 0.6}
    return Case(
        PreLAR,
        stage,
        prelar.pretrain if video else prelar.finetune,
        model={"world": world, **OWN, **more, **model},
        run={
            "optim": {"clip": clip, "weight_decay": 1e-2, "eps": 1e-3},
            "load": load,
            "online": RATES,
            "pretrain": {"lr": 3e-3, "updates": 3, "lr_decay": 0.8},
        },
        batch={"batch": 3 if video else 2, "time": 5 if video else 7, "side": 16, "actions": 3},
        prepare=None if video else half_filled,
        updates=updates,
        tolerance=1e-9 if video else 1e-6,  # the bonus takes distances as products, which costs half of the digits
        label=label,
    )


CASES = [
    case("pretrain", "tanh", updates=2, clip=1.0, consistency="tanh"),
    case("pretrain", "released", consistency="sign", action_prior_std=1.2449),
    case("pretrain", "paper-logistic-diff", world=PAPER, consistency="logistic", action_input="diff"),
    case("pretrain", "discrete-pearson-catdiff", consistency="pearson", action_input="catdiff", action_output="discrete"),
    case("pretrain", "plain-flow", consistency="none", action_input="flow", action_output="deterministic"),
    case("pretrain", "paper-plain-flow", world=PAPER, consistency="tanh", action_input="flow", action_output="deterministic"),
    case("finetune", "loaded", updates=2, clip=1.0),
    case("finetune", "paper-discrete-free", world=PAPER, action_output="discrete", free_latent=True, free_nats=50.0),
    case("finetune", "pictures-loaded", load="image"),
    case("finetune", "ends", behaviour={**BEHAVIOUR, "continuation": True}),
    case("finetune", "naive", intrinsic_weight=0.0),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_updates_are_what_the_description_gives(case: Case) -> None:
    check_update(case)
