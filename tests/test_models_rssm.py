"""The recurrence of the RSSM: sampling, options, and the gradient that is formed after the loop."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from torch import Tensor

from localmotion.models.distributions import categorical_entropy, gumbel, straight_through
from localmotion.models.rssm import RSSM, RSSMState, kl_loss

B, T, E, A = 3, 6, 7, 3


def make(**options: object) -> RSSM:
    torch.manual_seed(0)
    settings: dict[str, object] = {"embed_dim": E, "action_dim": A, "deter": 16, "hidden": 12, "stoch": 4, "classes": 5}
    return RSSM(**{**settings, **options})  # type: ignore[arg-type]


def inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, actions, and episode starts of which one is inside a sequence."""
    g = torch.Generator().manual_seed(seed)
    is_first = torch.zeros(B, T, dtype=torch.bool)
    is_first[:, 0] = is_first[1, 3] = True
    return torch.randn(B, T, E, generator=g), torch.randn(B, T, A, generator=g), is_first


def test_sampling_observe_equals_sampling_steps_under_the_same_noise() -> None:
    rssm = make()
    embed, action, is_first = inputs()
    post, prior = rssm.observe(embed, action, is_first, generator=torch.Generator().manual_seed(5))
    g = torch.Generator().manual_seed(5)  # observe draws (T, B, ...) at once; steps draw (B, ...) in the same order
    noise = gumbel((T, B, 4, 5), embed, g)
    state = rssm.initial(B)
    for t in range(T):
        state = rssm.obs_step(state, action[:, t], embed[:, t], is_first[:, t])
        state = state._replace(stoch=straight_through(state.logits, noise[t]))
        torch.testing.assert_close(state.deter, post.deter[:, t], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(state.stoch, post.stoch[:, t])
        torch.testing.assert_close(rssm.prior(state.deter), prior[:, t], atol=1e-5, rtol=1e-4)


def test_latents_are_drawn_unless_the_likeliest_are_asked_for() -> None:
    rssm = make()
    embed, action, is_first = (x.repeat(40, *[1] * (x.ndim - 1)) for x in inputs())
    start = rssm.initial(len(embed))
    one = (embed[:, 0], is_first[:, 0])
    pairs = [
        (rssm.observe(embed, action, is_first)[0], rssm.observe(embed, action, is_first, sample=False)[0]),
        (rssm.obs_step(start, action[:, 0], *one), rssm.obs_step(start, action[:, 0], *one, sample=False)),
        (rssm.img_step(start, action[:, 0]), rssm.img_step(start, action[:, 0], sample=False)),
        (rssm.imagine(start, action), rssm.imagine(start, action, sample=False)),
    ]
    for drawn, likeliest in pairs:
        assert torch.equal(likeliest.stoch.argmax(-1), likeliest.logits.argmax(-1))
        assert not torch.equal(drawn.stoch.argmax(-1), drawn.logits.argmax(-1))


def test_a_generator_decides_every_sample() -> None:
    rssm = make()
    embed, action, is_first = inputs()

    def run(seed: int) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        post, _ = rssm.observe(embed, action, is_first, generator=g)
        start = RSSMState(*(x[:, -1] for x in post))
        return torch.cat([post.stoch, rssm.imagine(start, action, generator=g).stoch], 1)

    before = torch.get_rng_state()
    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert torch.equal(before, torch.get_rng_state())


def test_samples_follow_the_probabilities_and_are_exactly_one_hot() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).requires_grad_()
    many = logits.expand(60_000, 1, 4)
    sample = straight_through(many, gumbel(many.shape, many, torch.Generator().manual_seed(0)))
    assert torch.equal(sample, (sample == 1).float())
    torch.testing.assert_close(sample.mean((0, 1)), torch.softmax(logits[0], -1), atol=0.01, rtol=0)
    assert straight_through(logits, None).argmax().item() == 2


@pytest.mark.parametrize("extreme", [0.0, 1 - 2**-24])
def test_noise_is_finite_at_the_ends_of_what_is_drawn(extreme: float) -> None:
    with mock.patch("torch.rand", lambda shape, **options: torch.full(shape, extreme)):
        assert torch.isfinite(gumbel((2, 3), torch.zeros(()))).all()


def test_straight_through_has_the_gradient_of_the_probabilities() -> None:
    torch.manual_seed(0)
    logits, weight = torch.randn(5, 4, 6, requires_grad=True), torch.randn(5, 4, 6)
    got = torch.autograd.grad((straight_through(logits, gumbel(logits.shape, logits)) * weight).sum(), logits)[0]
    expected = torch.autograd.grad((torch.softmax(logits, -1) * weight).sum(), logits)[0]
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("frozen", ["", "gru.weight", "post_out.bias", "img_in.weight"])
def test_frozen_parameters_get_no_gradient_and_change_no_other(frozen: str) -> None:
    rssm, twin = make(), make()
    for name, parameter in rssm.named_parameters():
        parameter.requires_grad_(name != frozen)

    def run(model: RSSM) -> None:
        embed, action, is_first = inputs()
        post, prior = model.observe(embed, action, is_first, sample=False)
        (kl_loss(post.logits, prior)[0] + model.feat(post).square().sum()).backward()

    run(rssm)
    run(twin)
    other = dict(twin.named_parameters())
    for name, parameter in rssm.named_parameters():
        if name == frozen:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, other[name].grad, atol=1e-6, rtol=1e-5)


def test_gradients_for_chosen_inputs_only_and_twice() -> None:
    """The behaviour update asks for some gradients only; a graph may be used again when it is retained."""
    rssm = make()
    embed, action, is_first = inputs()
    post, _ = rssm.observe(embed, action.requires_grad_(), is_first, sample=False)
    loss = rssm.feat(post).square().sum()
    first = torch.autograd.grad(loss, [action], retain_graph=True)[0]
    both = torch.autograd.grad(loss, [action, rssm.gru.weight], retain_graph=True)
    again = torch.autograd.grad(loss, [rssm.gru.weight])[0]
    assert torch.equal(first, both[0])
    assert torch.equal(again, both[1])
    assert again.abs().sum() > 0


def test_the_recurrence_frees_its_memory() -> None:
    """The inputs kept for the weights' gradients live no longer than the graph, without the cycle collector's help."""
    rssm = make()
    embed, action, is_first = inputs()

    def alive() -> int:
        return sum(type(item) is Tensor for item in gc.get_objects())

    def run() -> None:
        post, _ = rssm.observe(embed, action, is_first)
        assert alive() > before + 4 * T  # the four products keep one input a position
        rssm.feat(post).sum().backward()
        rssm.zero_grad(set_to_none=True)

    gc.collect()
    gc.disable()
    try:
        before = alive()
        run()
        assert alive() <= before
    finally:
        gc.enable()


def test_no_gradient_no_graph_same_numbers() -> None:
    rssm = make()
    embed, action, is_first = inputs()
    with_graph, _ = rssm.observe(embed, action, is_first, sample=False)
    with torch.no_grad():
        without, _ = rssm.observe(embed, action, is_first, sample=False)
    assert not without.deter.requires_grad
    torch.testing.assert_close(with_graph.deter.detach(), without.deter)


def test_padding_columns_never_matter() -> None:
    """IPV pads actions to 50 columns with zeros: the spare weights change nothing and get no gradient."""
    rssm = make(action_pad=8)
    assert rssm.img_in.in_features == 4 * 5 + 8
    embed, action, is_first = inputs()
    post, _ = rssm.observe(embed, action, is_first, sample=False)
    rssm.feat(post).sum().backward()
    assert rssm.img_in.weight.grad is not None
    spare = rssm.img_in.weight.grad[:, 20 + A :]
    assert torch.equal(spare, torch.zeros_like(spare))
    assert rssm.img_in.weight.grad[:, 20 : 20 + A].abs().sum() > 0
    with torch.no_grad():
        rssm.img_in.weight[:, 20 + A :] += 1
    changed, _ = rssm.observe(embed, action, is_first, sample=False)
    torch.testing.assert_close(changed.deter, post.deter)
    with pytest.raises(ValueError, match="action_pad=2"):
        make(action_pad=2)


def test_action_free_ignores_actions() -> None:
    rssm = make(action_free=True, action_pad=8)
    embed, action, is_first = inputs()
    given, _ = rssm.observe(embed, action, is_first, sample=False)
    none, _ = rssm.observe(embed, None, is_first, sample=False)
    assert torch.equal(given.deter, none.deter)
    state = RSSMState(*(x[:, -1] for x in given))
    assert torch.equal(rssm.img_step(state, None, sample=False).deter, rssm.img_step(state, action[:, 0], sample=False).deter)
    with pytest.raises(ValueError, match="none were given"):
        make().observe(embed, None, is_first)


def test_actions_matter_except_the_one_before_an_episode() -> None:
    rssm = make()
    embed, action, is_first = inputs()
    before, _ = rssm.observe(embed, action, is_first, sample=False)
    at_start = action.clone()
    at_start[1, 3] += 5
    after, _ = rssm.observe(embed, at_start, is_first, sample=False)
    assert torch.equal(before.deter, after.deter)
    inside = action.clone()
    inside[1, 4] += 5
    after, _ = rssm.observe(embed, inside, is_first, sample=False)
    assert torch.equal(before.deter[1, :4], after.deter[1, :4])
    assert not torch.allclose(before.deter[1, 4], after.deter[1, 4])


def test_unimix_bounds_every_probability() -> None:
    rssm = make(unimix=0.2)
    with torch.no_grad():
        rssm.prior_out.bias += 30 * torch.randn(20)
    logits = rssm.prior(torch.randn(50, 16))
    probs = torch.softmax(logits, -1)
    torch.testing.assert_close(logits.exp().sum(-1), torch.ones(50, 4))
    assert probs.min() >= 0.2 / 5 - 1e-6
    assert probs.max() > 0.8
    free = make()
    assert torch.equal(free.prior(torch.zeros(1, 16)).flatten(), free.prior_out(torch.nn.functional.elu(free.prior_in.bias)))


def test_imagining_along_actions_is_one_step_after_the_other() -> None:
    rssm = make()
    state = rssm.img_step(rssm.initial(B), torch.randn(B, A))
    action = torch.randn(B, 4, A)
    along = rssm.imagine(state, action, sample=False)
    assert along.deter.shape == (B, 4, 16)
    for t in range(4):
        state = rssm.img_step(state, action[:, t], sample=False)
        assert torch.equal(along.deter[:, t], state.deter)
        assert torch.equal(along.stoch[:, t], state.stoch)


def test_observing_on_a_device_does_not_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On `meta`, where there is no value to wait for, all of it can be launched."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())  # torch knows none for `meta`
    embed, action, is_first = (x.to("meta") for x in inputs())
    post, prior = make().to("meta").observe(embed, action, is_first)
    assert post.deter.shape == (B, T, 16)
    assert prior.device.type == "meta"


def test_the_first_state_is_nothing_for_every_sequence() -> None:
    logits, stoch, deter = make().initial(7)
    assert logits.shape == stoch.shape == (7, 4, 5)
    assert deter.shape == (7, 16)
    assert not any(bool(x.any()) for x in (logits, stoch, deter))


def test_the_state_continues_across_calls() -> None:
    rssm = make()
    embed, action, is_first = inputs()
    whole, _ = rssm.observe(embed, action, is_first, sample=False)
    head, _ = rssm.observe(embed[:, :4], action[:, :4], is_first[:, :4], sample=False)
    tail, _ = rssm.observe(embed[:, 4:], action[:, 4:], is_first[:, 4:], RSSMState(*(x[:, -1] for x in head)), sample=False)
    torch.testing.assert_close(tail.deter, whole.deter[:, 4:])


def test_bf16_keeps_the_state_in_fp32_and_the_gradient_close() -> None:
    """A state carried in bf16 loses updates under 1/256 of its size; gates and state are fp32 under autocast too."""
    rssm = make(deter=64, hidden=64)
    embed, action, is_first = inputs()

    def run(enabled: bool) -> tuple[RSSMState, list[Tensor]]:
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            post, prior = rssm.observe(embed, action, is_first, sample=False)
            loss = prior.square().mean() + post.logits.square().mean()
        return post, list(torch.autograd.grad(loss, list(rssm.parameters())))

    exact, rounded = run(False), run(True)
    assert rounded[0].deter.dtype == rounded[0].logits.dtype == torch.float32
    for low, high, (name, parameter) in zip(rounded[1], exact[1], rssm.named_parameters(), strict=True):
        assert low.dtype == parameter.dtype
        error = ((low - high).norm() / high.norm().clamp(min=1e-8)).item()
        assert error < 0.05, (name, error)


def test_entropy_of_uniform_latents() -> None:
    log_p = torch.log_softmax(torch.zeros(2, 3, 32, 32), -1)
    torch.testing.assert_close(categorical_entropy(log_p), torch.full((2, 3), 32 * torch.log(torch.tensor(32.0)).item()))
