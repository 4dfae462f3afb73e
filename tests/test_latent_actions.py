"""Latent action models: sizes of the papers, masks, windows, label sets, stages from the command line, and what each setting reaches."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from localmotion import methods
from localmotion.cli import main
from localmotion.config import leaves, update
from localmotion.errors import CheckpointError, ConfigError, StoreError
from localmotion.methods.base import MASK, MOTION
from localmotion.models import augmentation
from localmotion.models.augmentation import perspectives, rotations, shifts, warped
from localmotion.models.latent_actions import Quantizer, masked_error
from localmotion.models.latent_windows import futures, pictures, stacks, starts
from localmotion.recipe import Recipe
from localmotion.recording.collect import collect
from localmotion.recording.logs import EpisodeSampler, label_set
from localmotion.report.build import report
from localmotion.runs.load import load_run
from localmotion.runs.settings import compose
from localmotion.testing import Subject
from localmotion.testing.acts import play
from localmotion.testing.learns import losses_of
from localmotion.training.finetune import finetune
from localmotion.training.pretrain import VideoLoop, pretrain
from localmotion.training.update import rates
from localmotion.video.sample import WindowSampler
from localmotion.video.store import ClipStore
from method_batches import CPU

NAMES = [name for name in methods.names() if "clone" in methods.get(name).stages]
SIZE, FRAMES = 32, 13


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven logged episodes of 13 frames with masks of the agent."""
    path = tmp_path_factory.mktemp("logs") / "store"
    recipe = Recipe(size=SIZE, percept_size=SIZE, tracks=4).with_motion("exact")
    collect("planar:walker_run", path, policy="random", episodes=7, seed=1, steps=FRAMES - 1, recipe=recipe)
    return path


# --- sizes ------------------------------------------------------------------------------------------------------------


def counted(name: str, side: int, **settings: Any) -> dict[str, int]:
    cls = methods.get(name)
    with torch.device("meta"):
        return cls(update(cls.Config(), settings), image_size=side, action_dim=6).parameter_counts()


@pytest.mark.parametrize(
    ("side", "expected"), [(64, (2.61, 8.59, 2.60, 0.10)), (128, (5.76, 13.34, 5.75, 0.10))], ids=["64", "128"]
)
def test_masklam_has_the_sizes_of_the_paper(side: int, expected: tuple[float, ...]) -> None:
    found = counted("masklam", side)
    for part, millions in zip(("inverse", "dynamics", "policy", "head"), expected, strict=True):
        assert found[part] / 1e6 == pytest.approx(millions, rel=0.01, abs=0.005), part


def test_the_models_of_masklam_see_masks_only_where_they_are_switched_on() -> None:
    for switched, channels in ((True, 24), (False, 18)):
        method = methods.get("masklam")
        made: Any = method(update(method.Config(), {"mask_channel": switched}), image_size=64, action_dim=None)
        assert made.inverse.encoder.encoder.stages[0][0].in_channels == channels
        assert made.dynamics.encoder.stages[0][0].in_channels == channels // 2
        assert made.policy.encoder.stages[0][0].in_channels == 9


def test_lapo_has_the_shape_of_the_release() -> None:
    """Eight variables of 64 codes; a U-Net from 24 channels at 64 pixels to 768 at one."""
    with torch.device("meta"):
        method: Any = methods.get("lapo")(methods.get("lapo").Config(), image_size=64, action_dim=None)
    quantizer = method.inverse.quantizer
    assert tuple(quantizer.embedding.shape) == (2, 64, 16)
    assert len(quantizer.embedding) * quantizer.positions == 8
    assert [level.conv.out_channels for level in method.dynamics.down] == [24, 48, 96, 192, 384]
    assert (method.dynamics.bottom.out_channels, method.dynamics.bottom.kernel_size) == (768, (2, 2))
    assert method.inverse.encoder.encoder.stages[0][0].in_channels == 9
    assert method.policy.encoder.stages[0][0].in_channels == 3
    continuous = counted("lapo", 64, form="continuous")
    assert continuous["dynamics"] == counted("masklam", 64, mask_channel=False)["dynamics"]
    seen = counted("masklam", 64, mask_channel=False, forward_model="unet", latent=128, base=24)["dynamics"]
    one_frame_more = 2 * 3 * 24 * 3 * 3  # at the first and at the last convolution
    assert seen - counted("lapo", 64)["dynamics"] == one_frame_more


def test_laom_has_the_sizes_of_the_paper() -> None:
    with torch.device("meta"):
        method: Any = methods.get("laom")(methods.get("laom").Config(), image_size=64, action_dim=6)
    assert method.encoder.embed_dim == method.target.embed_dim == 12_288
    assert [(layer.in_features, layer.out_features) for layer in method.inverse.project] == [
        (24_576, 1024),
        (25_600, 1024),
        (25_600, 1024),
    ]
    assert [layer.in_features for layer in method.dynamics.project] == [20_480, 9_216, 9_216]
    assert (method.inverse.out.out_features, method.dynamics.out.out_features) == (8_192, 12_288)
    assert (method.policy.project.in_features, method.policy.project.out_features) == (1024, 8_192)
    assert [layer.out_features for layer in method.head.net if hasattr(layer, "out_features")] == [256, 256, 6]
    assert not any(parameter.requires_grad for parameter in method.target.parameters())


def test_codes_are_nearest_and_pass_gradients_on() -> None:
    torch.manual_seed(0)
    quantizer = Quantizer(codebooks=2, positions=3, width=4, codes=5).eval()
    z = torch.randn(7, 24, requires_grad=True)
    code, _, perplexity = quantizer(z)
    rows = code.view(7, 2, 4, 3)
    distance = (rows.detach().permute(0, 1, 3, 2)[..., None, :] - quantizer.embedding[None, :, None]).norm(dim=-1)
    assert bool((distance.min(-1).values < 1e-6).all())
    own = (z.view(7, 2, 4, 3).permute(0, 1, 3, 2)[..., None, :] - quantizer.embedding[None, :, None]).norm(dim=-1)
    assert torch.equal(distance.argmin(-1), own.argmin(-1))
    (slope,) = torch.autograd.grad((code * torch.arange(24.0)).sum(), z)
    assert torch.equal(slope, torch.arange(24.0).expand(7, 24))
    assert 1 <= float(perplexity) <= 5


# --- masks ------------------------------------------------------------------------------------------------------------


def test_floor_one_is_the_mean_squared_error_and_floor_zero_leaves_the_background_alone() -> None:
    g = torch.Generator().manual_seed(0)
    found, true = (torch.randn(4, 3, 8, 8, generator=g) for _ in range(2))
    mask = torch.rand(4, 8, 8, generator=g) < 0.3
    found.requires_grad_()
    error = (found - true).square()
    assert torch.equal(masked_error(error, mask, 1.0), F.mse_loss(found, true))
    assert torch.equal(masked_error(error, None, 0.0), F.mse_loss(found, true))
    nearly = masked_error(error, mask, 1 - 1e-6)
    torch.testing.assert_close(nearly, F.mse_loss(found, true))
    (slope,) = torch.autograd.grad(masked_error(error, mask, 0.0), found)
    agent = mask.unsqueeze(1).expand_as(slope)
    assert bool((slope[~agent] == 0).all())
    assert bool((slope[agent] != 0).all())


def test_a_batch_without_agent_has_no_error_and_no_gradient() -> None:
    error = torch.ones(2, 3, 4, 4, requires_grad=True)
    loss = masked_error(error.square(), torch.zeros(2, 4, 4), 0.0)
    loss.backward()
    assert float(loss.detach()) == 0
    assert error.grad is not None
    assert float(error.grad.abs().max()) == 0


def test_windows_have_the_masks_of_their_frames(logs: Path) -> None:
    store = ClipStore(logs)
    sampler = WindowSampler(store, 5, 4, 0, split="all", prefetch=False, mask=True)
    batch = sampler.batch(3)
    assert batch["mask"].dtype is torch.bool
    for row, (clip, start) in enumerate(zip(batch["clip"].tolist(), batch["start"].tolist(), strict=True)):
        packed = store.window("mask", clip, start, start + 5)
        assert np.array_equal(batch["mask"][row].numpy(), np.unpackbits(packed, axis=-1, count=SIZE).astype(bool))
    assert batch["mask"].any()
    assert "mask" not in WindowSampler(store, 5, 4, 0, split="all", prefetch=False).batch(3)


def test_a_store_without_masks_is_refused_with_the_fix(store: Path, tmp_path: Path) -> None:
    run = compose("masklam", "pretrain", preset="debug", flags={"data": str(store), "device": "cpu", "threads": 1})
    with pytest.raises(StoreError, match=r"store: has no masks of the agent; make it with --mask motion"):
        pretrain(run, tmp_path / "run")
    bare = ("loss_mask=false", "mask_channel=false")
    run = compose("masklam", "pretrain", preset="debug", settings=bare)
    assert not methods.get("masklam").needs(run.model, "pretrain")


def test_a_method_needs_masks_or_flow_only_where_it_uses_them() -> None:
    masklam, lapo = methods.get("masklam"), methods.get("lapo")
    config = masklam.Config()
    assert [masklam.needs(config, stage) for stage in masklam.stages] == [MASK, MASK, frozenset(), frozenset()]
    assert [masklam.needs(replace(config, mask_channel=False), stage) for stage in ("pretrain", "clone")] == [MASK, frozenset()]
    assert [lapo.needs(replace(lapo.Config(), flow_weight=0.1), stage) for stage in ("pretrain", "clone")] == [
        MOTION,
        frozenset(),
    ]
    assert not lapo.needs(lapo.Config(), "pretrain")


# --- augmentation -----------------------------------------------------------------------------------------------------


def test_changes_of_pictures_are_what_they_are_called() -> None:
    """A shift is a shift with the border copied, a quarter turn is a quarter turn, and corners go where they are sent."""
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    one = torch.ones(2)
    torch.testing.assert_close(warped(image, shifts(0 * one, 0 * one)), image, atol=1e-5, rtol=0)
    moved = warped(image, shifts(3 / 8 * one, -2 / 8 * one))  # 3 pixels to the right, 2 up
    torch.testing.assert_close(moved[:, :, :14, 3:], image[:, :, 2:, :13], atol=1e-5, rtol=0)
    torch.testing.assert_close(moved[:, :, :14, 0], image[:, :, 2:, 0], atol=1e-5, rtol=0)
    turned = warped(image, rotations(torch.pi / 2 * one))
    torch.testing.assert_close(turned, torch.rot90(image, -1, (2, 3)), atol=1e-4, rtol=0)
    corners = torch.tensor([[-0.7, -0.9], [0.8, -0.5], [0.6, 0.9], [-1.0, 0.7]]).expand(2, -1, -1)
    back = perspectives(corners, 1.5)  # of a place of the output
    found = torch.cat([corners, torch.ones(2, 4, 1)], -1) @ back.transpose(1, 2)
    square = torch.tensor([[-1.5, -1.5], [1.5, -1.5], [1.5, 1.5], [-1.5, 1.5]])
    torch.testing.assert_close(found[..., :2] / found[..., 2:], square.expand(2, -1, -1), atol=1e-4, rtol=1e-4)


def test_each_picture_is_changed_by_its_own_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """All eight choices, with one set of numbers: two changes are the second of the first."""
    count = len(augmentation.CHOICES)
    image = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    image = F.interpolate(image, 64, mode="bilinear")  # smooth: drawing it twice changes little
    numbers = torch.rand(1, 11, generator=torch.Generator().manual_seed(3))
    numbers[0, :3] = torch.tensor([0.9, 0.2, 0.8])  # far to the right, up, and a turn of 54 degrees
    monkeypatch.setattr(torch, "rand", lambda *shape, device=None: numbers.expand(shape))
    monkeypatch.setattr(torch, "randint", lambda high, size, device=None: torch.arange(count))
    found = augmentation.augment(image.expand(count, -1, -1, -1))
    torch.testing.assert_close(found[0], image[0], atol=1e-5, rtol=0)
    inner = (..., slice(24, 40), slice(24, 40))  # away from borders
    for number, (first, second) in enumerate(augmentation.CHOICES[4:], start=4):
        alone = {pair[0]: index for index, pair in enumerate(augmentation.CHOICES[:4])}
        monkeypatch.setattr(torch, "randint", lambda high, size, device=None, only=alone[second]: torch.tensor([only]))
        again = augmentation.augment(found[alone[first] : alone[first] + 1])
        apart = (found[number] - found[alone[first]])[inner].abs().max()
        assert float((again[0] - found[number])[inner].abs().max()) < 0.2 * float(apart), (first, second)
        assert float(apart) > 0.1


# --- labels -----------------------------------------------------------------------------------------------------------


def transitions(found: list[tuple[int, int]]) -> set[tuple[int, int]]:
    return {(clip, t) for clip, count in found for t in range(1, count)}


def test_label_sets_are_nested_and_depend_on_store_number_and_seed_alone(logs: Path) -> None:
    store = ClipStore(logs)
    sets = [transitions(label_set(store, count, 0)) for count in (5, 12, 30, 84)]
    assert [len(found) for found in sets] == [5, 12, 30, 84]
    for small, large in itertools.pairwise(sets):
        assert small < large
    assert sets[2] == transitions(label_set(ClipStore(logs), 30, 0))
    assert sets[2] != transitions(label_set(store, 30, 1))
    with pytest.raises(StoreError, match=r"labels=85, but it has 84 transitions"):
        label_set(store, 85, 0)


def test_only_labelled_transitions_are_drawn(logs: Path) -> None:
    store = ClipStore(logs)
    sampler = EpisodeSampler(store, 4, 8, 0, labels=16, label_seed=3)
    known = {
        store.window("action", clip)[t].tobytes() for clip, t in transitions(label_set(store, 16, 3))
    }  # random actions: no two are equal
    drawn = set()
    for index in range(30):
        batch = sampler.batch(index)
        drawn |= {row.tobytes() for row in batch["action"][~batch["is_first"]].numpy()}
    assert drawn == known
    assert len(known) == 16


# --- windows and acting -----------------------------------------------------------------------------------------------


def test_stacks_begin_with_copies_of_an_episodes_first_frame() -> None:
    frames = torch.arange(6.0).view(1, 6, 1, 1, 1)
    is_first = torch.tensor([[True, False, False, True, False, False]])
    ends = torch.arange(6).expand(1, -1)
    found = stacks(frames, ends, 3, starts(is_first)).view(6, 3).tolist()
    assert found == [[0, 0, 0], [0, 0, 1], [0, 1, 2], [3, 3, 3], [3, 3, 4], [3, 4, 5]]


@pytest.mark.parametrize("name", NAMES)
def test_acting_sees_the_stacks_that_the_policy_learned_from(name: str) -> None:
    subject = Subject(methods.get(name), "decode", settings=("model.form=continuous",) if name == "lapo" else ())
    method, batch = subject.build().eval(), subject.data()
    played = play(subject, method, batch)
    frames = pictures(batch["image"]) * (2 if name == "laom" else 1)
    with torch.no_grad():
        ends = torch.arange(frames.shape[1]).expand(len(frames), -1)
        z = method.policy(stacks(frames, ends, 3))
        expected = method.head(z).clamp(-1, 1).unflatten(0, ends.shape)
    torch.testing.assert_close(played, expected)
    assert float(played.std(1).min()) > 0


@pytest.mark.parametrize(
    ("name", "stage"),
    [(name, stage) for name in (*NAMES, "bc") for stage in ("clone", "decode") if stage in methods.get(name).stages],
)
def test_the_policy_learns_what_it_sees_when_an_episode_begins(
    name: str, stage: str, logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it acts, the first stack holds copies of the first frame. With the method's lead such stacks are in its batches."""
    settings = {"lapo": ("form=continuous",), "bc": ("policy=impala",)}.get(name, ())
    run = compose(name, stage, preset="debug", flags={"data": str(logs), "device": "cpu"}, settings=settings)
    method = methods.get(name)(run.model, image_size=SIZE, action_dim=6)
    seen: list[Tensor] = []
    policy = next(module for key, module in method.named_modules() if key == "policy")
    policy.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    if hasattr(policy, "both"):
        both = policy.both
        monkeypatch.setattr(policy, "both", lambda stack: (seen.append(stack), both(stack))[1])
    store, lead = ClipStore(logs), method.lead(run.model, stage)
    losses = method.clone_losses if stage == "clone" or name == "bc" else method.decode_losses
    if stage == "clone":
        batch = WindowSampler(store, 6, 60, 0, split="all", prefetch=False, mask=True, lead=lead).batch(0)
    else:
        batch = EpisodeSampler(store, 6, 60, 0, lead=lead).batch(0)
    losses(batch)
    first = pictures(torch.from_numpy(np.stack([store.window("frames", clip, 0, 1) for clip in range(len(store))])))
    begin = (1 if name in ("masklam", "lapo") else 2) * first.repeat(1, 1, 3, 1, 1).flatten(1, 2)  # (clips, 9, S, S)
    stacked = seen[0].contiguous()
    assert sum(int((stacked == one).all((1, 2, 3)).any()) for one in begin) >= 3  # of 7 clips


@pytest.mark.parametrize(
    ("name", "stage", "setting"), [("laom", "pretrain", "model.supervised=true"), ("bc", "decode", "model.relabel=true")]
)
def test_every_sampler_of_a_stage_has_the_lead_of_the_method(
    name: str, stage: str, setting: str, logs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LAOM's clips and labelled episodes, and behaviour cloning's labelled episodes and clips."""
    leads: list[tuple[str, int]] = []

    def watched(kind: type) -> type:
        def begin(self: Any, *args: Any, lead: int = 0, **options: Any) -> None:
            if options.get("split", "train") == "train":
                leads.append((kind.__name__, lead))
            kind.__init__(self, *args, lead=lead, **options)  # type: ignore[misc]

        return type(kind.__name__, (kind,), {"__init__": begin})

    for module, kind in (
        ("windows", WindowSampler),
        ("pretrain", EpisodeSampler),
        ("logged", WindowSampler),
        ("logged", EpisodeSampler),
    ):
        monkeypatch.setattr(f"localmotion.training.{module}.{kind.__name__}", watched(kind))
    flags = {"data": str(logs), "device": "cpu", "threads": 1, "labels": 20}
    settings = ["updates=1", "pretrain.length=8", "heldout_fraction=0", setting]
    run = compose(name, stage, preset="debug", flags=flags, settings=settings)
    (pretrain if stage == "pretrain" else finetune)(run, tmp_path / "run")
    assert sorted(set(leads)) == [("EpisodeSampler", 2), ("WindowSampler", 2)]


@pytest.mark.parametrize("name", NAMES)
def test_a_latent_action_codes_its_own_step(name: str) -> None:
    """It changes with the frame that the step leads to, and not with frames after that."""
    subject = Subject(methods.get(name), "pretrain")
    method, batch = subject.awake().eval(), subject.data()
    code = method.motion_code(batch)
    other = {**batch, "image": batch["image"].clone()}
    other["image"][:, 5] = 255 - other["image"][:, 5]
    changed = (method.motion_code(other) != code).any(-1).all(0)
    assert not changed[:5].any()
    assert changed[5]


@pytest.mark.parametrize("name", NAMES)
def test_a_stage_changes_its_own_parts_only(name: str) -> None:
    own = {"pretrain": {"inverse", "dynamics"}, "clone": {"policy"}, "decode": {"head"}}
    own["pretrain"] |= {"encoder", "target"} if name == "laom" else set()
    for stage, parts in own.items():
        subject = Subject(methods.get(name), stage)
        method = subject.build()
        before = {key: value.clone() for key, value in method.state_dict().items()}
        updater = subject.updater(method, CPU)
        for seed in range(3):
            updater.learn(subject.data(seed))
        changed = {key.partition(".")[0] for key, value in method.state_dict().items() if not torch.equal(value, before[key])}
        assert changed == parts, stage


# --- stages from the command line -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_three_commands_lead_from_video_to_an_agent(
    name: str, logs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = ["--method", name, "--preset", "debug", "--device", "cpu", "--threads", "1", "--precision", "fp32", "--data", str(logs)]
    one += ["--batch_size", "2", "--updates", "6", "--save_every", "3"]
    places = {stage: str(tmp_path / stage) for stage in ("pretrain", "clone", "decode")}
    held = ["--heldout_fraction", "0.4"]
    main(["pretrain", *one, *held, "--run", places["pretrain"]])
    main(["clone", *one, *held, "--checkpoint", places["pretrain"], "--run", places["clone"]])
    decode = ["--labels", "20", "--env", "planar:walker_run", "--eval_episodes", "1", "--env_options", "{time_limit: 12}"]
    main(["decode", *one, *decode, "--checkpoint", places["clone"], "--run", places["decode"]])
    said = capsys.readouterr().out
    assert "22 frames" in said.replace("\n", " ")  # 12 + 8 transitions of two episodes
    lines = [json.loads(line) for line in (tmp_path / "decode" / "metrics.jsonl").read_text().splitlines()]
    assert any("return_mean" in line or line.get("kind") == "eval" for line in lines)
    first, last = (load_run(Path(places[stage]), device="cpu", threads=1)[1].state_dict() for stage in ("pretrain", "decode"))
    assert all(torch.equal(last[key], value) for key, value in first.items() if key.startswith(("inverse", "dynamics")))
    if name == "laom":  # it predicts no pictures
        return
    main(["predict", "--checkpoint", places["pretrain"], "--data", str(logs), "--out", str(tmp_path / "x.png"), "--split", "all"])
    assert "latent_action" in capsys.readouterr().out
    if name != "lapo":
        return
    page = report([Path(place) for place in places.values()], tmp_path / "report.html").read_text()
    assert "with the latent actions of the true frames" in page
    assert "from the observed frames alone" not in page


def test_a_stage_without_its_checkpoint_is_refused(logs: Path, tmp_path: Path) -> None:
    flags = {"data": str(logs), "device": "cpu", "threads": 1}
    with pytest.raises(ConfigError, match="clone of lapo starts from a pretrain run: give it with --checkpoint"):
        pretrain(compose("lapo", "clone", preset="debug", flags=flags), tmp_path / "clone")
    with pytest.raises(ConfigError, match="decode of lapo starts from a clone run"):
        finetune(compose("lapo", "decode", preset="debug", flags=flags), tmp_path / "decode")
    quick = compose("lapo", "pretrain", preset="debug", flags=flags, settings=["updates=1", "heldout_fraction=0"])
    start = pretrain(quick, tmp_path / "pre")
    run = compose("lapo", "decode", preset="debug", flags={**flags, "checkpoint": str(start)})
    with pytest.raises(CheckpointError, match="pre: is a pretrain run; decode of lapo starts from a clone run"):
        finetune(run, tmp_path / "decode")
    with pytest.raises(ConfigError, match="labels=5: pretrain reads no labels"):
        pretrain(replace(quick, labels=5), tmp_path / "other")


def test_laom_learns_from_the_labels_that_its_decoder_has(logs: Path, tmp_path: Path) -> None:
    flags = {"data": str(logs), "device": "cpu", "threads": 1, "labels": 20}
    seen: set[bytes] = set()
    settings = ["updates=3", "pretrain.length=8", "heldout_fraction=0", "model.supervised=true"]

    class Watched(VideoLoop):
        def learn(self, batch: Any) -> None:
            seen.update(row.tobytes() for row in batch["labelled_action"][~batch["labelled_is_first"]].numpy())
            super().learn(batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("localmotion.training.pretrain.VideoLoop", Watched)
        pretrain(compose("laom", "pretrain", preset="debug", flags=flags, settings=settings), tmp_path / "run")
    store = ClipStore(logs)
    known = {store.window("action", clip)[t].tobytes() for clip, t in transitions(label_set(store, 20, 0))}
    copies = bytes(4 * 6)  # no action leads to the copies before an episode
    assert seen - {copies}
    assert seen - {copies} <= known
    found = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("loss/action" in line for line in found)


def test_a_preset_can_set_a_stage() -> None:
    found = {stage: compose("lapo", stage, preset="paper").pretrain for stage in ("pretrain", "clone")}
    assert (found["pretrain"].updates, found["pretrain"].lr) == (50_000, 3e-4)
    assert (found["clone"].updates, found["clone"].lr, found["clone"].batch_size) == (60_000, 2e-4, 128)
    assert compose("masklam", "decode", preset="paper").optim.clip == 1.0
    assert compose("masklam", "decode", preset="paper", settings=["optim.clip=3"]).optim.clip == 3.0


# --- what each setting reaches ----------------------------------------------------------------------------------------

OTHER: dict[str, Any] = {
    "widths": (4, 8, 8),
    "forward_widths": (8, 4, 8),
    "head_widths": (8, 8),
    "form": "continuous",
    "forward_model": "unet",
    "latent": 64,
    "offset": 2,
    "mask_grow": 1,
    "floor": 0.5,
    "mask_dropout": 0.5,
    "flow_weight": 0.5,
    "codebooks": 1,
    "policy_widths": (4, 8, 8),
    "warmup": 3,
    "tau": 0.5,
    "policy": "pooled",
    "head_start": 2,
    "decoder_until": 0.0,
    "masklam decoder_until": 0.5,
}
Z = "size.inverse size.policy size.dynamics size.head"
REACH = {
    "widths": "size.inverse size.policy",
    "forward_widths": "size.dynamics",
    "lapo forward_widths": "size.flow",
    "head_widths": "size.head",
    "latent": Z,
    "lapo latent": Z + " size.flow",
    "form": Z.removesuffix(" size.head") + " size.flow size.heads",
    "hidden": "size.inverse size.policy size.heads",
    "base": "size.dynamics",
    "masklam base": "",  # of the U-Net, which is not the default
    "forward_model": "size.dynamics",
    "codebooks": "size.inverse",
    "codes": "size.inverse",
    "code_decay": "step.inverse step.dynamics step.flow",
    "commitment": "loss.pretrain.commitment step.inverse step.dynamics step.flow",
    "flow_weight": "weight.pretrain.flow step.inverse step.dynamics step.flow",
    "warmup": "rate.pretrain",
    "clone_warmup": "rate.clone",
    "decay": "rate.pretrain rate.clone rate.decode",
    "noise": "exploring",
    "loss_mask": "loss.pretrain.image",
    "floor": "loss.pretrain.image",
    "offset": "loss.pretrain.image",
    "mask_dropout": "loss.pretrain.image",
    "mask_channel": "size.inverse size.dynamics",
    "input_mask": "loss.pretrain.image loss.clone.latent code",
    "mask_grow": "loss.pretrain.image loss.clone.latent code",
}
REACH |= {
    "laom latent": "size.inverse size.dynamics size.policy size.head size.labels",
    "laom widths": "size.encoder size.target",
    "units": "size.inverse size.dynamics",
    "laom offset": "loss.pretrain.code loss.pretrain.action",
    "tau": "step.target step.inverse step.dynamics step.encoder step.labels",
    "augmented": "loss.pretrain.code loss.pretrain.action",
    "supervised": "size.labels",
    "action_weight": "weight.pretrain.action step.encoder step.inverse step.dynamics step.labels step.target",
    "action_pad": "size.labels",
    "policy_widths": "size.policy",
}
REACH |= {
    "policy": "size.policy",
    "bc latent": "size.policy",
    "bc head_widths": "size.policy",
    "bc widths": "size.encoder",
    "bc units": "size.inverse",
    "relabel": "size.encoder size.inverse",
    "head_start": "rate.decode",
    "discount": "loss.finetune.policy loss.finetune.value",
    "lambda_": "loss.finetune.policy loss.finetune.value",
    "reward_scale": "loss.finetune.policy loss.finetune.value",
    "ratio_clip": "loss.finetune.policy",
    "value_weight": "weight.finetune.value",
    "entropy": "weight.finetune.entropy",
    "head_share": "loss.finetune.policy playing trying",
    "log_std": "loss.finetune.policy loss.finetune.entropy trying",
    "decoder_lr": "rate.finetune",
    "masklam log_std": "loss.finetune.entropy trying",  # each ratio of its random batch is beyond the clip
    "masklam decoder_lr": "",
    "decoder_until": "weight.finetune.action loss.finetune.action rate.finetune",
}
BASE = {"lapo": ("flow_weight=0.25",), "masklam": (), "laom": ("supervised=true", "model.tau=0.1")}
BASE["bc"] = ("relabel=true", "policy=impala")


def made(name: str, stage: str, settings: tuple[str, ...], changes: dict[str, Any]) -> Subject:
    subject = Subject(methods.get(name), stage, settings=(*settings, "optim.clip=1e12", "model.noise=0.2"))
    subject.__dict__["run"] = replace(subject.run, model=update(subject.run.model, changes))
    return subject


def stepped(name: str, *settings: str, **changes: Any) -> dict[str, Any]:
    """Weights after three updates of the first stage, by part."""
    subject, out = made(name, next(iter(methods.get(name).stages)), settings, changes), dict[str, Any]()
    method = subject.awake()
    updater = subject.updater(method, CPU)
    for seed in range(3):
        torch.manual_seed(seed)
        updater.learn(subject.data(seed))
    for key, value in method.state_dict().items():
        out.setdefault(f"step.{key.partition('.')[0]}", []).append(value)
    return out


def sizes(name: str, *settings: str, **changes: Any) -> dict[str, Any]:
    """The shapes of a method's weights, by part."""
    model = made(name, "decode", settings, changes).run.model
    with torch.device("meta"):
        shapes = {
            key: tuple(value.shape) for key, value in methods.get(name)(model, image_size=64, action_dim=3).state_dict().items()
        }
    parts = {key.partition(".")[0] for key in shapes}
    return {f"size.{part}": {key: value for key, value in shapes.items() if key.startswith(f"{part}.")} for part in parts}


def doing(name: str, *settings: str, stages: Iterable[str] = (), **changes: Any) -> dict[str, Any]:
    """What a method computes in its stages, by part."""
    out: dict[str, Any] = {}
    for stage in stages or methods.get(name).stages:
        subject = made(name, stage, settings, changes)
        method, batch = subject.awake(), subject.data()
        if name == "masklam":  # a rollout has none, but the test changes each setting by itself
            batch.setdefault("mask", torch.rand(batch["image"].shape[:-1], generator=torch.Generator().manual_seed(0)) < 0.3)
        groups = method.groups(stage, rates(subject.run, subject.source, True))
        out[f"rate.{stage}"] = [(group.lr, group.freeze_updates, group.warmup, group.weight_decay) for group in groups]
        out |= {f"weight.{stage}.{key}": value for key, value in method.loss_scales(stage).items()}
        method.train()
        out |= {f"loss.{stage}.{key}": value for key, value in losses_of(method, stage, batch).items()}
        if stage == "decode":
            out["acting"] = play(subject, method.eval(), batch)
            out["exploring"] = play(subject, method, batch, explore=True)
        elif stage == "finetune":
            out["playing"] = play(subject, method.eval(), batch)
            out["trying"] = play(subject, method, batch, explore=True)
        elif stage == "clone":
            out["code"] = method.eval().motion_code(batch)
    return out


def difference(one: dict[str, Any], two: dict[str, Any]) -> set[str]:
    return {key for key in one.keys() | two.keys() if key not in one or key not in two or not same(one[key], two[key])}


def same(one: Any, two: Any) -> bool:
    if isinstance(one, list):
        return len(one) == len(two) and all(map(same, one, two))
    return torch.equal(one, two) if isinstance(one, Tensor) else bool(one == two)


def other(value: Any, name: str) -> Any:
    if name in OTHER:
        return OTHER[name]
    return not value if isinstance(value, bool) else 2 * value if isinstance(value, int) else value / 2


@pytest.mark.parametrize("name", [*NAMES, "bc"])
def test_every_setting_reaches_what_it_is_for(name: str) -> None:
    """Sizes first: where they change, what is computed changes anyway. Then losses, then steps."""
    size, steps = sizes(name, *BASE[name]), stepped(name, *BASE[name])
    base = {
        stages: doing(name, *BASE[name], stages=stages)
        for stages in ((), ("finetune",))
        if set(stages) <= set(methods.get(name).stages)
    }
    config = made(name, next(iter(methods.get(name).stages)), BASE[name], {}).run.model
    wrong = {}
    for setting, value in leaves(config):
        part, _, last = setting.rpartition(".")
        another = OTHER[f"{name} {last}"] if f"{name} {last}" in OTHER else other(value, last)
        changes: dict[str, Any] = {part: {last: another}} if part else {last: another}
        stages = ("finetune",) if part == "ppo" else ()
        found = difference(size, sizes(name, *BASE[name], **changes))
        if not found:
            found = difference(base[stages], doing(name, *BASE[name], stages=stages, **changes))
        if not part and all(key.startswith(("weight", "loss.pretrain.commitment")) for key in found):  # or nothing is found
            found |= difference(steps, stepped(name, *BASE[name], **changes))
        expected = set(REACH.get(f"{name} {last}", REACH.get(last, "nothing")).split())
        if found != expected:
            wrong[setting] = f"changes {sorted(found)}, declared {sorted(expected)}"
    assert not wrong, "\n".join(f"{key} {what}" for key, what in wrong.items())


def test_a_prediction_is_given_the_latent_actions_of_the_next_clip_after_its_context() -> None:
    codes = torch.randn(3, 6, 4)
    rows = futures(codes, 2)
    assert list(rows) == ["latent_action", "zero_action", "swapped_action"]
    assert torch.equal(rows["latent_action"], codes)
    for row in rows.values():
        assert torch.equal(row[:, :2], codes[:, :2])
    assert not rows["zero_action"][:, 2:].any()
    assert torch.equal(rows["swapped_action"][:, 2:], codes[[1, 2, 0], 2:])
    assert "swapped_action" not in futures(codes[:1], 2)
