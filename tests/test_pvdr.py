"""PVDR: the tokenizer's codes, what sees what in the model of plans, windows, predictions, held-out figures, and the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from localmotion.cli import main
from localmotion.compute import PLAIN
from localmotion.config import update
from localmotion.errors import ConfigError
from localmotion.evaluation.heldout import measure_heldout
from localmotion.evaluation.predict import predict
from localmotion.methods.base import Counters, Rates
from localmotion.methods.pvdr import PVDR, PVDRConfig
from localmotion.models.plan_cvae import PlanConfig, PlanDecoder, Posterior, Prior, divergence
from localmotion.models.plan_figures import token_figures
from localmotion.models.tokenizer import Codebook, Tokenizer, TokenizerConfig
from localmotion.models.vqgan_losses import DEVIATION, MEAN, Perceptual, hinge
from localmotion.runs.settings import compose
from localmotion.testing import Subject, full_batch
from localmotion.testing.learns import (
    each_parameter_has_one_optimiser,
    losses_match_their_scales,
    losses_of,
    updates_change_every_group,
)
from localmotion.training.checks import check_video_stage
from localmotion.video.sample import WindowSampler
from localmotion.video.store import ClipStore
from written_out import pvdr as written

CODES, CELLS = 11, 4
SMALL = PlanConfig(context=2, horizon=3, latent=5, dim=12, heads=3, posterior_layers=2, prior_layers=2, decoder_layers=2)
WAYS = ["parallel", "frame_ar"]


def plan_of(decode: str) -> PlanConfig:
    found: PlanConfig = update(SMALL, {"decode": decode})
    return found


def tokens(frames: int, seed: int = 0, batch: int = 2) -> Tensor:
    return torch.randint(CODES, (batch, frames, CELLS), generator=torch.Generator().manual_seed(seed))


def latents(plans: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, plans, SMALL.latent, generator=torch.Generator().manual_seed(5))


@pytest.fixture(params=WAYS)
def decoder(request: pytest.FixtureRequest) -> PlanDecoder:
    torch.manual_seed(0)
    return PlanDecoder(plan_of(request.param), CODES, CELLS)


def method(stage: str = "pretrain", seed: int = 0, **settings: Any) -> PVDR:
    torch.manual_seed(seed)
    run = compose(PVDR, stage, preset="debug")
    return PVDR(update(run.model, settings), image_size=64, action_dim=None)


# --- the tokenizer ----------------------------------------------------------------------------------------------------


def test_the_first_update_takes_the_codes_that_nothing_was_near_to_from_the_batch() -> None:
    torch.manual_seed(0)
    book = Codebook(8, 3, decay=0.9, restart=0.01)
    rows = torch.randn(40, 3) * 1e-3 + book.embedding[2]  # all are nearest to one code
    assert book.nearest(rows).unique().tolist() == [2]
    book.follow(rows, book.nearest(rows), torch.tensor(False))
    others = [code for code in range(8) if code != 2]
    assert all(bool((rows - book.embedding[code]).abs().sum(-1).min() < 1e-6) for code in others)
    torch.testing.assert_close(book.embedding[2], rows.mean(0))
    assert len(book.nearest(rows).unique()) > 4


def test_a_code_in_use_follows_the_mean_of_its_features_and_no_other() -> None:
    book = Codebook(2, 1, decay=0.5, restart=0.1)
    book.embedding.copy_(torch.tensor([[0.0], [10.0]]))
    book.count.copy_(torch.tensor([4.0, 4.0]))
    book.total.copy_(book.embedding * 4)
    rows = torch.tensor([[1.0], [2.0], [9.0], [8.0]])
    book.follow(rows, book.nearest(rows), torch.tensor(False))
    torch.testing.assert_close(book.embedding, torch.tensor([[0.5 * 3 / 3], [(20 + 8.5) / 3]]))


def test_pictures_pass_through_the_codes_from_an_update_on_and_all_codes_are_features_then() -> None:
    model = method("tokenize", tokenizer={"quantise_from": 2})
    image = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(0)) - 0.5
    book = model.tokenizer.codebook
    for update_number, quantised in ((1, False), (2, True)):
        model.tokenizer.train().learn(image)
        features = model.tokenizer.features(image)
        near = torch.cdist(book.embedding.double(), features.flatten(0, 1).detach().double()).amin(1)
        assert bool((near < 1e-4).all()), "codes are features of the last batch until they are used"
        model.after_update(Counters("tokenize", update_number, 0.5))
        model.eval()
        found, losses, _ = model.tokenizer.learn(image)
        plain = model.tokenizer.decode(features)
        coded = model.tokenizer.decode(model.tokenizer.embed(model.tokenizer.tokens(features)))
        torch.testing.assert_close(found, coded if quantised else plain)
        assert (float(losses["commitment"].detach()) > 0) == quantised


def test_codes_move_in_training_alone() -> None:
    torch.manual_seed(0)
    tokenizer = Tokenizer(TokenizerConfig(widths=(4, 8), blocks=1, codes=6, code_dim=4), 16)
    image = torch.rand(3, 3, 16, 16) - 0.5
    before = tokenizer.codebook.embedding.clone()
    tokenizer.eval().learn(image)
    tokenizer.train().tokens(tokenizer.features(image))
    assert torch.equal(tokenizer.codebook.embedding, before)
    tokenizer.learn(image)
    assert not torch.equal(tokenizer.codebook.embedding, before)


def test_tokens_are_the_nearest_codes_also_under_autocast() -> None:
    torch.manual_seed(0)
    tokenizer = Tokenizer(TokenizerConfig(widths=(4, 8), blocks=1, codes=50, code_dim=4), 16)
    tokenizer.codebook.embedding.copy_(1 + 0.02 * torch.randn(50, 4))  # closer together than bfloat16 can tell
    features = 1 + 0.02 * torch.randn(2, 16, 4)
    expected = torch.cdist(features.double(), tokenizer.codebook.embedding.double()).argmin(-1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokenizer.tokens(features), expected)


@pytest.mark.parametrize(
    "settings",
    [{"widths": (4, 4, 4)}, {"widths": ()}, {"restart": 0.0}, {"code_decay": 1.0}],
    ids=["side", "stages", "restart", "decay"],
)
def test_a_tokenizer_that_cannot_be_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Tokenizer(TokenizerConfig(**{"widths": (4, 4), **settings}), 20)


# --- VQGAN's losses ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vgg(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Sequential]:
    """Random weights, and torchvision's VGG16 with them."""
    torch.manual_seed(0)
    parts: list[torch.nn.Module] = []
    channels = 3
    for block in ("64 64", "128 128", "256 256 256", "512 512 512", "512 512 512"):
        for width in map(int, block.split()):
            parts += [torch.nn.Conv2d(channels, width, 3, padding=1), torch.nn.ReLU()]
            channels = width
        parts.append(torch.nn.MaxPool2d(2))
    net = torch.nn.Sequential(*parts).requires_grad_(False)
    file = tmp_path_factory.mktemp("vgg") / "vgg16.safetensors"
    save_file({f"features.{name}": value for name, value in net.state_dict().items()}, file)
    return file, net


def test_the_perceptual_loss_compares_unit_features_of_vgg16(vgg: tuple[Path, torch.nn.Sequential]) -> None:
    file, net = vgg
    perceptual = Perceptual(file)
    g = torch.Generator().manual_seed(0)
    true, decoded = (torch.rand(2, 3, 16, 16, generator=g) - 0.5 for _ in range(2))
    expected = torch.zeros(())
    a, b = ((x + 0.5 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None] for x in (true, decoded))
    for number, layer in enumerate(net[:30]):
        a, b = layer(a), layer(b)
        if number in (3, 8, 15, 22, 29):  # relu1_2, 2_2, 3_3, 4_3, 5_3
            expected = expected + (a / a.norm(dim=1, keepdim=True) - b / b.norm(dim=1, keepdim=True)).square().sum(1).mean()
    torch.testing.assert_close(perceptual(decoded, true), expected, rtol=1e-4, atol=1e-6)
    assert float(perceptual(true, true)) == 0
    assert not perceptual.state_dict()


def test_a_file_that_is_not_vgg16_is_refused(vgg: tuple[Path, torch.nn.Sequential], tmp_path: Path) -> None:
    settings = {"tokenizer": {"perceptual": str(tmp_path / "none"), "perceptual_weight": 0.3}}
    with pytest.raises(ConfigError, match="cannot be read"):
        method("tokenize", **settings).groups("tokenize", Rates(1e-3))
    save_file({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "short")
    with pytest.raises(ConfigError, match=r"features.0.bias is missing, VGG16 of torchvision has \(64,\)"):
        Perceptual(tmp_path / "short")
    settings["tokenizer"]["perceptual"] = str(vgg[0])
    model = method("tokenize", **settings)
    assert model.loss_scales("tokenize")["perceptual"] == 0.3
    assert float(model.tokenize_losses(full_batch(1, 1))[0]["perceptual"].detach()) > 0


def test_the_adversarial_loss_begins_at_its_update_and_has_an_optimiser_of_its_own() -> None:
    settings = ("adversarial=0.1", "adversarial_from=1")
    subject = Subject(PVDR, "tokenize", settings=settings)
    for rule in (losses_match_their_scales, each_parameter_has_one_optimiser, updates_change_every_group):
        rule(subject)
    model = subject.build()
    assert losses_of(model, "tokenize", subject.data())["adversarial"] == 0
    model.after_update(Counters("tokenize", 1, 0.0))
    found = losses_of(model, "tokenize", subject.data())
    assert float(found["discriminator"]) > 0
    assert float(found["adversarial"]) != 0


def test_the_hinge_loss_leaves_scores_beyond_the_margin_alone() -> None:
    true, decoded = torch.tensor([2.0, 0.5], requires_grad=True), torch.tensor([-2.0, 0.5], requires_grad=True)
    loss = hinge(true, decoded)
    assert loss.item() == pytest.approx(0.5 * (0.25 + 0.75))
    slopes = torch.autograd.grad(loss, (true, decoded))
    assert [slope.tolist() for slope in slopes] == [[0, -0.25], [0, 0.25]]


# --- what sees what ---------------------------------------------------------------------------------------------------


def test_the_kl_of_equal_gaussians_is_zero_and_trains_both() -> None:
    mean, log_variance = torch.randn(2, 4, 3)
    assert torch.equal(divergence(mean, log_variance, mean, log_variance), torch.zeros(4, 3))
    known = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, (0.5 * log_variance).exp()),
        torch.distributions.Normal(torch.tensor(0.3), torch.tensor(2.0)),
    )
    other = torch.full_like(mean, 0.3), torch.full_like(mean, 4.0).log()
    torch.testing.assert_close(divergence(mean, log_variance, *other), known)


def test_the_prior_learns_through_the_kl_and_the_posterior_through_both_losses() -> None:
    model = method(beta_warmup=0)
    losses, _ = model.pretrain_losses(full_batch())
    reached = {
        name: {part for part in ("prior", "posterior", "decoder") if gradient(loss, model.get_submodule(part)) > 0}
        for name, loss in losses.items()
    }
    assert reached == {"kl": {"prior", "posterior"}, "tokens": {"posterior", "decoder"}}


def gradient(loss: Tensor, module: torch.nn.Module) -> float:
    found = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True, allow_unused=True)
    return max((float(x.abs().max()) for x in found if x is not None), default=0.0)


def test_the_prior_sees_no_future_frame_and_each_frame_no_later_one() -> None:
    torch.manual_seed(0)
    prior = Prior(SMALL, CODES, CELLS)
    mean, log_variance, feature = prior(tokens(2))
    assert (mean.shape, log_variance.shape, feature.shape) == ((2, 5), (2, 5), (2, 12))
    x = prior.embedding(tokens(2))
    other = x.clone()
    other[:, 1] += 1
    one, two = prior.transformer(x, causal=True)[0], prior.transformer(other, causal=True)[0]
    assert torch.equal(one[:, 0], two[:, 0])
    assert not torch.allclose(one[:, 1], two[:, 1])


def test_the_posterior_sees_every_frame() -> None:
    torch.manual_seed(0)
    posterior, x = Posterior(SMALL, CODES, CELLS), tokens(5)
    for frame in range(5):
        other = x.clone()
        other[:, frame] = (other[:, frame] + 1) % CODES
        assert not torch.allclose(posterior(other)[0], posterior(x)[0]), frame


def test_log_variances_stay_in_their_range() -> None:
    torch.manual_seed(0)
    posterior = Posterior(SMALL, CODES, CELLS)
    with torch.no_grad():
        posterior.last.weight.mul_(1e3)
    found = posterior(tokens(5))[1]
    assert (float(found.detach().min()), float(found.detach().max())) == (-8.0, 4.0)


def test_plans_that_share_their_context_are_those_of_one_sequence_of_all_frames(decoder: PlanDecoder) -> None:
    """The plain computation: for every plan m + n frames, in which the context does not attend to the queries."""
    decoder.double()
    past, z = tokens(2), latents(3).double()
    plan = plan_of("frame_ar" if decoder.autoregressive else "parallel")
    w = {f"decoder.{name}": value for name, value in decoder.state_dict().items()}
    found = decoder(past, z)
    assert found.shape == (2, 3, 3, CELLS, CODES)
    for k in range(3):
        own = found[:, k].argmax(-1)  # the frames before, where they count
        torch.testing.assert_close(found[:, k], written.decoded(w, past, own, z[:, k], plan).float())


def test_a_plan_depends_on_its_context_and_its_latent_alone(decoder: PlanDecoder) -> None:
    past, z = tokens(2), latents(3)
    found = decoder(past, z)
    changed = z.clone()
    changed[:, 1] += 1
    again = decoder(past, changed)
    torch.testing.assert_close(again[:, [0, 2]], found[:, [0, 2]])
    assert not torch.allclose(again[:, 1], found[:, 1])
    for frame in range(2):
        other = past.clone()
        other[:, frame] = (other[:, frame] + 1) % CODES
        assert not torch.allclose(decoder(other, z), found, atol=1e-3), frame
    assert torch.equal(decoder(past, z[:, :1], tokens(3, 1)), decoder(past, z[:, :1], tokens(3, 2))) != decoder.autoregressive


def test_the_context_is_computed_once_for_all_plans(decoder: PlanDecoder) -> None:
    """Matrix products of the blocks and the output, as the docstring counts them."""
    config, plans, tall = SMALL, 7, CELLS + 1
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        decoder(tokens(2, batch=1), latents(plans, batch=1), tokens(3, batch=1))
    counts = counter.get_flop_counts()["Global"]
    linear = sum(count for operation, count in counts.items() if "mm" in str(operation) and "bmm" not in str(operation))
    blocks = 2 * 2 * 16 * config.dim**2 * tall * (config.context + plans * config.horizon)
    output = 2 * plans * config.horizon * CELLS * config.dim * CODES
    assert linear == blocks + output + 2 * plans * config.latent * config.dim


def test_a_plan_frame_by_frame_is_what_its_own_tokens_give() -> None:
    torch.manual_seed(0)
    decoder = PlanDecoder(plan_of("frame_ar"), CODES, CELLS)
    past, z = tokens(2), latents(1)
    found = decoder(past, z)
    own = found.argmax(-1).squeeze(1)
    torch.testing.assert_close(decoder(past, z, own), found)
    for frame in range(3):
        other = own.clone()
        other[:, frame] = (other[:, frame] + 1) % CODES
        again = decoder(past, z, other)
        torch.testing.assert_close(again[:, :, : frame + 1], found[:, :, : frame + 1])  # a token does not see itself
        assert frame == 2 or not torch.allclose(again[:, :, frame + 1], found[:, :, frame + 1])


@pytest.mark.parametrize("settings", [{"horizon": 0}, {"context": 0}, {"latent": 0}, {"heads": 5}])
def test_sizes_of_nothing_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        method(plan=settings)


# --- windows, codes, predictions --------------------------------------------------------------------------------------


def test_windows_are_drawn_from_all_starts_of_a_sequence() -> None:
    model, seen = method(), set()
    batch = full_batch(4, 8)
    for row in range(4):
        for t in range(8):
            batch["image"][row, t] = 8 * t
    model.plan_losses = lambda tokens: (tokens, {}, None)  # type: ignore[method-assign, assignment]
    model.tokens = lambda image: image[..., 0, 0, 0]  # type: ignore[method-assign]
    for _ in range(10):
        times = model.pretrain_losses(batch)[0] // 8  # type: ignore[operator]
        assert bool((times.diff(dim=1) == 1).all())
        assert times.shape == (4, 5)
        seen |= set(times[:, 0].tolist())
    assert seen == {0, 1, 2, 3}


def test_plans_from_an_episodes_first_frame_are_learned(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the method acts, the first plan follows copies of the first frame."""
    subject = compose(PVDR, "pretrain", preset="debug")
    planner, contexts = method(), list[Tensor]()
    monkeypatch.setattr(planner, "tokens", lambda image: image.flatten(2)[:, :, :64])
    monkeypatch.setattr(planner, "plan_losses", lambda tokens: (contexts.append(tokens[:, : planner.before]), {}, None))
    clips, (length, _) = ClipStore(store), PVDR.lengths(subject.model, "pretrain")
    windows = WindowSampler(clips, length, 50, 0, split="all", prefetch=False, lead=PVDR.lead(subject.model, "pretrain"))
    starts = []
    for index in range(4):
        batch = windows.batch(index)
        starts += batch["start"].tolist()
        planner.pretrain_losses(batch)
    first = [start == 1 - planner.before for start in starts]
    assert 0 < sum(first) < 200
    assert all((context == context[-1]).all() for context, begins in zip(torch.cat(contexts), first, strict=True) if begins)


def test_the_code_of_a_frame_is_of_the_plan_that_begins_with_it() -> None:
    model, batch = method().eval(), full_batch(2, 9)
    batch["is_first"][1, 4] = True
    found, codes = model.motion_code(batch), model.tokens(batch["image"])

    def of(row: int, *times: int) -> Tensor:
        with torch.no_grad():
            mean: Tensor = model.posterior(codes[row, list(times)].unsqueeze(0))[0][0]
        return mean

    for row, t, times in (
        (0, 3, (1, 2, 3, 4, 5)),
        (0, 1, (0, 0, 1, 2, 3)),
        (0, 8, (6, 7, 8, 8, 8)),
        (1, 3, (1, 2, 3, 3, 3)),  # an episode ends here, and the next begins
        (1, 5, (4, 4, 5, 6, 7)),
    ):
        torch.testing.assert_close(found[row, t], of(row, *times))


def test_a_prediction_goes_on_from_its_own_plans() -> None:
    model, batch = method().eval(), full_batch(2, 9)
    rows = model.open_loop(batch, 3)
    codes = model.tokens(batch["image"])
    with torch.no_grad():
        known, z = codes[:, :3], model.prior(codes[:, 1:3])[0]
        known = torch.cat([known, model.plans(codes[:, 1:3], z[:, None])[:, 0]], 1)
        again = model.prior(known[:, 4:6])[0]
        known = torch.cat([known, model.plans(known[:, 4:6], again[:, None])[:, 0]], 1)
        truth = model.posterior(codes[:, 1:6])[0]
        plan = model.plans(codes[:, 1:3], truth[:, None])[:, 0]
    torch.testing.assert_close(rows["prior"], model.drawn(known))
    torch.testing.assert_close(rows["latent_action"][:, 3:6], model.drawn(plan))
    assert not torch.equal(rows["prior_sample"][:, 3:], rows["prior"][:, 3:])
    short = model.open_loop({key: value[:, :4] for key, value in batch.items()}, 1)  # m = 2: begins with copies
    with torch.no_grad():
        first = codes[:, [0, 0]]
        torch.testing.assert_close(short["prior"][:, 1:], model.drawn(model.plans(first, model.prior(first)[0][:, None])[:, 0]))


# --- losses and schedules ---------------------------------------------------------------------------------------------


def test_shuffled_latents_tell_more_only_where_plans_use_them() -> None:
    model = method(beta_warmup=0)
    batch = full_batch()
    with torch.no_grad():
        model.decoder.from_z.weight.zero_()
    assert float(model.pretrain_losses(batch)[1]["tokens/shuffled"]) == 0
    with torch.no_grad():
        model.decoder.from_z.weight.normal_()
    assert abs(float(model.pretrain_losses(batch)[1]["tokens/shuffled"])) > 0


def test_only_matrices_of_linear_layers_decay() -> None:
    model = method()
    groups = {group.name: group for group in model.groups("pretrain", Rates(1e-3))}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, plain = ([names[id(p)] for p in groups[name].parameters] for name in ("decayed", "plain"))
    assert all(name.endswith(".weight") and "norm" not in name for name in decayed)
    assert [name for name in plain if name.endswith(".weight") and "norm" not in name] == []
    assert {name.split(".")[0] for name in decayed + plain} == {"posterior", "prior", "decoder"}
    assert (groups["decayed"].weight_decay, groups["plain"].weight_decay) == (0.01, 0.0)


def test_the_paper_preset_has_the_sizes_of_the_docstrings() -> None:
    """16 d^2 weights a block: 6 blocks of width 256 are 6.3 M."""
    with torch.device("meta"):
        model = PVDR(PVDRConfig(), image_size=64, action_dim=None)
    counts = {name: round(count / 1e6, 2) for name, count in model.parameter_counts().items()}
    assert (model.tokenizer.side, model.tokenizer.cells) == (8, 64)
    blocks = sum(p.numel() for p in model.decoder.transformer.parameters()) / 1e6
    assert blocks == pytest.approx(6 * 16 * 256**2 / 1e6, rel=0.01)
    assert counts == {"tokenizer": 14.56, "posterior": 6.62, "prior": 4.51, "decoder": 6.87}


@pytest.mark.parametrize("preset", ["paper", "small", "tiny"])
def test_held_out_predictions_are_whole_plans(preset: str) -> None:
    run = compose(PVDR, "pretrain", preset=preset)
    assert (run.pretrain.length - 5) % run.model.plan.horizon == 0
    assert run.load == "tokenizer"


# --- held-out figures -------------------------------------------------------------------------------------------------


class Batches:
    """Two batches in place of a sampler."""

    def batch(self, index: int) -> dict[str, Tensor]:
        return full_batch(2, 8, seed=index)


def test_held_out_figures_are_means_over_batches_and_the_tokenizer_predicts_nothing() -> None:
    model = method("tokenize")
    found = measure_heldout(model, Batches(), 2, PLAIN, None, "tokenize")  # type: ignore[arg-type]
    assert set(found) == {"figure/psnr", "figure/change", "figure/codes_used"}
    each = [model.eval().heldout("tokenize", Batches().batch(index)) for index in range(2)]
    for name in ("psnr", "change", "codes_used"):
        assert found[f"figure/{name}"] == pytest.approx(np.mean([float(x[name]) for x in each]))
    found = measure_heldout(model, Batches(), 1, PLAIN, None, "pretrain")  # type: ignore[arg-type]
    assert {"psnr/prior", "psnr/prior_sample", "psnr/latent_action", "figure/mse_best"} <= set(found)


def test_pictures_that_stay_the_same_have_no_change_and_a_warning() -> None:
    tokenizer = method("tokenize").tokenizer
    truth = torch.rand(2, 6, 3, 16, 16) - 0.5
    tokens = torch.zeros(2, 6, tokenizer.cells, dtype=torch.int64)
    still, half = truth.mean(1, keepdim=True).expand_as(truth), truth.mean(1, keepdim=True)
    found = {
        name: {f"figure/{key}": float(x) for key, x in token_figures(tokenizer, truth, drawn, tokens).items()}
        for name, drawn in (("same", truth), ("still", still), ("half", half + (truth - half) / 2))
    }
    assert found["same"]["figure/change"] == pytest.approx(1)
    assert found["half"]["figure/change"] == pytest.approx(0.25)
    assert found["still"]["figure/change"] == pytest.approx(0, abs=1e-6)
    nothing = token_figures(tokenizer, still, still, tokens)
    assert float(nothing["change"]) == pytest.approx(1)  # clips in which nothing moves are no reason for a warning
    assert PVDR.about_heldout(found["same"]) == ""
    assert PVDR.about_heldout({}) == ""
    assert "misses what moves" in PVDR.about_heldout(found["still"])


def test_figures_of_plans_are_what_they_are_called() -> None:
    model, batch = method().eval(), full_batch(3, 5)
    drawn: list[Tensor] = []
    plans = model.plans

    def noted(past: Tensor, z: Tensor) -> Tensor:
        found = plans(past, z)
        drawn.append(found.squeeze(1))
        return found

    model.plans = noted  # type: ignore[method-assign]
    torch.manual_seed(0)
    found = {name: float(value) for name, value in model.heldout("pretrain", batch).items()}
    truth = batch["image"][:, 2:].permute(0, 1, 4, 2, 3) / 255 - 0.5
    posterior, samples, mean = drawn[0], drawn[1:17], drawn[17]
    errors = torch.stack([(model.drawn(plan) - truth).square().mean((1, 2, 3, 4)) for plan in (*samples, mean, posterior)])
    assert found["mse_one"] == pytest.approx(float(errors[:16].mean()), rel=1e-5)
    assert found["mse_best"] == pytest.approx(float(errors[:16].amin(0).mean()), rel=1e-5)
    assert found["mse_best"] < found["mse_one"]
    assert (found["mse_mean"], found["mse_posterior"]) == pytest.approx(tuple(errors[16:].mean(1).tolist()), rel=1e-5)
    still = batch["image"][:, 1:2].permute(0, 1, 4, 2, 3) / 255 - 0.5  # the last frame that a plan follows, not of its tokens
    assert found["mse_copy"] == pytest.approx(float((still - truth).square().mean()), rel=1e-5)
    codes = model.tokens(batch["image"])
    assert found["copied"] == pytest.approx(float((codes[:, 1:2] == codes[:, 2:]).float().mean()))
    assert found["accuracy"] == pytest.approx(float((posterior == codes[:, 2:]).float().mean()))


def test_the_commands_run_end_to_end(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = ["--method", "pvdr", "--preset", "debug", "--data", str(store), "--heldout_fraction", "0.4"]
    one += [
        part for text in ("threads=1", "device=cpu", "precision=fp32", "updates=4", "eval_every=4") for part in ("--set", text)
    ]
    token, plan = tmp_path / "token", tmp_path / "plan"
    main(["tokenize", *one, "--run", str(token)])
    with pytest.raises(SystemExit):
        main(["pretrain", *one, "--run", str(plan)])
    assert "starts from a tokenize run" in capsys.readouterr().err
    main(["pretrain", *one, "--set", "latent=3", "--checkpoint", str(token), "--run", str(plan)])
    assert "not pre-trained: posterior, prior, decoder" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(ConfigError, match="a tokenize run of method pvdr does not predict video"):
        predict([token], store, split="all", device="cpu")
    assert set(predict([plan], store, split="all", windows=2, device="cpu").scores) == {
        "prior",
        "prior_sample",
        "latent_action",
        "last_frame",
    }
    lines = [json.loads(line) for line in (plan / "metrics.jsonl").read_text().splitlines()]
    held = next(line for line in lines if line["kind"] == "heldout")
    assert held["figure/best_of_one"] <= 1
    main(["report", str(token), str(plan), "--out", str(tmp_path / "r.html")])
    page = (tmp_path / "r.html").read_text()
    assert "best of one" in page
    assert "codes used" in page


@pytest.mark.parametrize(
    ("late", "needed"),
    [({"quantise_from": 20}, 21), ({"adversarial": 0.1, "adversarial_from": 30}, 31), ({"quantise_from": 19}, None)],
)
def test_a_tokenizer_that_would_end_before_a_part_of_it_begins_is_refused(late: dict[str, Any], needed: int | None) -> None:
    settings = [f"model.tokenizer.{name}={value}" for name, value in late.items()]
    run = compose("pvdr", "tokenize", preset="debug", flags={"data": "store"}, settings=("pretrain.updates=20", *settings))
    if needed is None:
        check_video_stage(PVDR, run)
        return
    with pytest.raises(ConfigError, match=f"pretrain.updates=20.*at least {needed}"):
        check_video_stage(PVDR, run)
