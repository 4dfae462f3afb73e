"""Flow over its running root mean square, free nats of z, and a slow image model: settings of DRP that are not in the paper."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from localmotion.models.dae import RunningRMS
from method_batches import groups_of, make, make_batch


def test_the_scale_is_the_root_of_a_running_mean_over_seen_fields() -> None:
    norm = RunningRMS()
    flow = torch.zeros(3, 4, 2, 2, 2)  # three frames, four points
    seen = torch.zeros(3, 4, dtype=torch.bool)
    torch.testing.assert_close(norm(flow + 5, seen), flow + 5)  # nothing was seen: flow stays as it is
    flow[0, 0], flow[1, 2], flow[2, 3] = 3.0, 1.0, 100.0
    seen[0, 0] = seen[1, 2] = True
    torch.testing.assert_close(norm.train()(flow, seen), flow / math.sqrt(5.0))  # mean of 9 and 1
    seen[0, 0] = False
    out = norm(flow, seen)
    mean = (0.99 * 0.01 * 5 + 0.01 * 1) / (1 - 0.99**2)
    torch.testing.assert_close(out, flow / math.sqrt(mean))
    torch.testing.assert_close(norm.eval()(flow * 0 + 7, seen | True), torch.full_like(flow, 7 / math.sqrt(mean)))
    assert float(norm.scale()) == pytest.approx(math.sqrt(mean))  # evaluation has not changed it


def test_a_still_stream_is_not_blown_up() -> None:
    norm = RunningRMS()
    for _ in range(5):
        out = norm(torch.full((1, 1, 2, 2, 2), 1e-6), torch.ones(1, 1, dtype=torch.bool))
    assert float(out.max()) == pytest.approx(1e-3)


def scaled(batch: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    return {**batch, "flow": batch["flow"] * factor}


@pytest.mark.parametrize("encoder", ["atomic", "global"])
def test_a_fast_and_a_slow_stream_give_the_same_code(encoder: str) -> None:
    batch = make_batch(2, 5, tracks=8)
    codes = []
    for factor in (1.0, 0.125):
        _, method = make("drp", "pretrain", "model.dae.flow_norm=true", f"motion_encoder={encoder}")
        method.train()
        with torch.no_grad():
            method.pretrain_losses(scaled(batch, factor))
            codes.append(method.eval().motion_code(scaled(batch, factor)))
    torch.testing.assert_close(codes[1], codes[0], rtol=1e-4, atol=1e-5)
    assert codes[0].std() > 0.1
    kept = {name for name in method.state_dict() if ".rms." in name}
    assert kept == {"motion.rms.square", "motion.rms.weight"}  # goes with the weights, to fine-tuning too


def test_acting_uses_the_kept_scale() -> None:
    _, method = make("drp", "finetune", "model.dae.flow_norm=true")
    batch = make_batch(1, 6, tracks=8)
    with torch.no_grad():
        method.train().world_model_losses(batch)
        method.eval()
        whole = method.motion_code(batch)
        carry, codes = method.initial_carry(1).motion, []
        for t in range(6):
            code, carry = method._recompose_step({key: value[:, t : t + 1] for key, value in batch.items()}, carry, 32)
            codes.append(code)
    torch.testing.assert_close(torch.stack(codes, 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("stage", "name"), [("pretrain", "kl"), ("finetune", "latent_kl")])
def test_free_nats_of_z_are_its_smallest_loss(stage: str, name: str) -> None:
    for free in (0.0, 50.0):
        _, method = make("drp", stage, f"free_nats_z={free}")
        losses = (method.pretrain_losses if stage == "pretrain" else method.world_model_losses)(make_batch(2, 6, tracks=8))[0]
        assert (float(losses[name].detach()) == 50.0) == bool(free)


def test_a_slow_image_model_has_the_rate_of_the_motion() -> None:
    for slow in (False, True):
        run, method = make("drp", "finetune", f"slow_image={slow}", "online.pretrained_lr_factor=0.1")
        groups = {group.name: group for group in groups_of(method, run, True)}
        decoder = {id(p) for p in method.image.decoder_parameters()}
        rate = run.online.lr * (0.1 if slow else 1.0)
        assert groups["encoder"].lr == pytest.approx(rate)
        owner = next(group for group in groups.values() if decoder & {id(p) for p in group.parameters})
        assert owner.lr == pytest.approx(rate)
        assert decoder <= {id(p) for p in owner.parameters}
        fresh = {group.name: group.lr for group in groups_of(method, run, False)}
        assert fresh["encoder"] == run.online.lr  # without a checkpoint nothing is slow
