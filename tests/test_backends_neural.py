"""Neural flow backends against stand-ins with the real signatures that really compute a motion; absent packages."""

from __future__ import annotations

import math
import sys
import types
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from localmotion.errors import ConfigError, LocalmotionError, MissingExtraError
from localmotion.perception import _neural
from localmotion.perception.base import FlowBackend
from localmotion.perception.grounded_sam import GroundedSam
from localmotion.perception.sea_raft import Raft, SeaRaft
from property_examples import examples

torch.set_num_threads(1)


def texture(height: int, width: int, seed: int) -> np.ndarray:
    """Periodic smooth random picture (H, W) in 20..235, so that np.roll is an exact motion."""
    spectrum = np.fft.fft2(np.random.default_rng(seed).standard_normal((height, width)))
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None]
    picture = np.fft.ifft2(spectrum * np.exp(-(fx**2 + fy**2) * 200)).real
    low, high = picture.min(), picture.max()
    return (20 + 215 * (picture - low) / (high - low)).astype(np.uint8)


def moved_pair(height: int, width: int, moves: tuple[tuple[int, int], ...]) -> tuple[np.ndarray, np.ndarray]:
    """Two (1, H, W, 3) RGB frames whose colour channels moved by their own (dx, dy)."""
    first = np.stack([texture(height, width, c) for c in range(3)], -1)
    second = np.stack([np.roll(first[..., c], (dy, dx), (0, 1)) for c, (dx, dy) in enumerate(moves)], -1)
    return first[None], second[None]


def shift_between(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Circular (dx, dy) that takes (B, H, W) pictures to the second ones, by cross-correlation: (B, 2)."""
    height, width = first.shape[-2:]
    first, second = (x - x.mean((-2, -1), keepdim=True) for x in (first, second))
    peak = torch.fft.ifft2(torch.fft.fft2(second) * torch.fft.fft2(first).conj()).real.flatten(1).argmax(1)
    dy, dx = peak // width, peak % width
    return torch.stack([(dx + width // 2) % width - width // 2, (dy + height // 2) % height - height // 2], 1).float()


class StandInSeaRaft(torch.nn.Module):
    """Signature of a ptlflow model; the flow is the motion of the channel that must be blue."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = torch.nn.Linear(3, 3)  # draws random numbers, as every network does when it is built
        self.sizes: list[tuple[int, ...]] = []
        self.mode = "shift"

    def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        images = inputs["images"]  # (B, 2, 3, H, W)
        batch, two, three, height, width = images.shape
        assert (two, three) == (2, 3)
        assert min(height, width) >= 128, "the real network fails below 128 pixels"
        assert images.dtype == torch.float32
        assert images.min() >= 0
        assert 0.5 < images.max() <= 1
        assert not self.training
        assert torch.is_inference_mode_enabled()
        self.sizes.append((batch, height, width))
        if self.mode == "proportional":
            shift = torch.tensor([[0.1 * width, -0.05 * height]]).expand(batch, 2)
        else:
            shift = shift_between(images[:, 0, 0], images[:, 1, 0])
        flow = shift[:, :, None, None].expand(batch, 2, height, width).clone()
        if self.mode == "nan":
            flow[-1, 0, 3, 3] = math.nan
        return {"flows": flow[:, None], "flow_small": flow[..., ::8, ::8] / 8}


@pytest.fixture(autouse=True)
def _fresh_networks() -> None:
    _neural._networks.clear()


@pytest.fixture
def ptlflow(monkeypatch: pytest.MonkeyPatch) -> Any:
    module: Any = types.ModuleType("ptlflow")
    module.calls = []

    def get_model(model_name: str, ckpt_path: str | None = None, args: Any = None) -> torch.nn.Module:
        module.calls.append((model_name, ckpt_path))
        warnings.warn("something old", FutureWarning, stacklevel=1)  # ptlflow and jsonargparse do
        return StandInSeaRaft().train()

    module.get_model = get_model
    monkeypatch.setitem(sys.modules, "ptlflow", module)
    return module


MOVES = ((-5, 1), (2, 7), (3, -2))  # red, green, blue


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 96), (128, 128), (256, 320)])
@pytest.mark.parametrize("min_side", [128, 256])
def test_sea_raft_gives_pixels_of_the_frames_and_takes_blue_first(ptlflow, height, width, min_side):
    backend = SeaRaft(min_side=min_side, device="cpu")
    flow = backend.flow(*moved_pair(height, width, MOVES))
    assert flow.shape == (1, height, width, 2)
    assert flow.dtype == np.float32
    np.testing.assert_allclose(flow, np.broadcast_to(np.float32([3, -2]), flow.shape), atol=1e-5)
    (size,) = backend._network.sizes
    assert min(size[1:]) == max(min_side, min(height, width))
    assert isinstance(backend, FlowBackend)


@examples(25)
@given(st.integers(16, 200), st.integers(16, 200), st.integers(128, 200))
def test_any_size_is_scaled_back_in_each_direction(height, width, min_side):
    backend = object.__new__(SeaRaft)
    super(SeaRaft, backend).__init__(min_side, 4, "cpu", "float32")
    backend._network = StandInSeaRaft().eval()
    backend._network.mode = "proportional"
    frames = np.full((1, height, width, 3), 250, np.uint8)
    flow = backend.flow(frames, frames)
    np.testing.assert_allclose(flow[..., 0], 0.1 * width, rtol=1e-4)
    np.testing.assert_allclose(flow[..., 1], -0.05 * height, rtol=1e-4)


def test_sea_raft_batches_keeps_order_and_takes_read_only_frames(ptlflow):
    pairs = [moved_pair(64, 64, ((0, 0), (0, 0), (k, -k))) for k in range(5)]
    first, second = (np.concatenate([pair[i] for pair in pairs]) for i in (0, 1))
    first.flags.writeable = second.flags.writeable = False
    backend = SeaRaft(batch=2, min_side=128, device="cpu")
    flow = backend.flow(first, second)
    np.testing.assert_allclose(flow[:, 9, 9], [[k, -k] for k in range(5)], atol=1e-5)
    assert [size[0] for size in backend._network.sizes] == [2, 2, 1]
    assert backend.flow(first[:0], second[:0]).shape == (0, 64, 64, 2)


def test_sea_raft_takes_more_pairs_at_once_on_a_gpu_and_fewer_of_larger_frames(ptlflow):
    backend = SeaRaft(device="cpu")
    assert backend._batch(64, 64) == 8
    backend.device = torch.device("cuda")
    assert [backend._batch(side, side) for side in (64, 256, 512, 1024, 4096)] == [64, 64, 16, 4, 1]
    assert backend._batch(128, 256) == 32  # enlarged to 256 x 512
    backend.batch = 3
    assert backend._batch(64, 64) == 3


def test_enlarging_does_not_leave_the_range(ptlflow):
    frames = np.where((np.indices((40, 40)).sum(0) // 4 % 2)[None, ..., None], 255, 0).repeat(3, -1).astype(np.uint8)
    SeaRaft(device="cpu").flow(frames, frames)  # the stand-in checks 0..1; bicubic overshoots at such edges


def test_sea_raft_reports_the_pair_that_is_not_finite(ptlflow):
    first, second = moved_pair(64, 64, MOVES)
    backend = SeaRaft(batch=3, min_side=128, device="cpu")
    backend._network.mode = "nan"
    with pytest.raises(LocalmotionError, match=r"pair 2 of 4 \(64x64\) is not finite.*min_side"):
        backend.flow(first.repeat(4, 0), second.repeat(4, 0))


def test_sea_raft_rejects_frames_of_another_kind(ptlflow):
    backend = SeaRaft(device="cpu")
    first, second = moved_pair(32, 32, MOVES)
    with pytest.raises(ValueError, match="uint8"):
        backend.flow(first.astype(np.float32), second)
    with pytest.raises(ValueError, match="differ in shape"):
        backend.flow(first, second[:, :-1])


def test_sea_raft_checkpoints(ptlflow, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    local = tmp_path / "mine.ckpt"
    local.write_bytes(b"tensors")
    SeaRaft(device="cpu")
    SeaRaft(model="sea_raft_m", checkpoint="spring", device="cpu")
    SeaRaft(checkpoint="mine.ckpt", device="cpu")
    SeaRaft(checkpoint="random", device="cpu")
    expected = [("sea_raft_s", "things"), ("sea_raft_m", "spring"), ("sea_raft_s", str(local)), ("sea_raft_s", None)]
    assert ptlflow.calls == expected
    with pytest.raises(ConfigError, match="did you mean things"):
        SeaRaft(checkpoint="thing", device="cpu")
    with pytest.raises(LocalmotionError, match=r"other\.ckpt does not exist"):
        SeaRaft(checkpoint="other.ckpt", device="cpu")
    (tmp_path / "sintel").write_bytes(b"")
    with pytest.raises(ConfigError, match="known name and a file"):
        SeaRaft(checkpoint="sintel", device="cpu")
    with pytest.raises(ConfigError, match="did you mean sea_raft_"):
        SeaRaft(model="sea_raft_xl", device="cpu")
    assert ptlflow.calls == expected


def test_sea_raft_that_cannot_fetch_its_weights_says_so_in_one_line(ptlflow, monkeypatch):
    def offline(*args: Any, **kwargs: Any) -> None:
        raise OSError("urlopen error:\nno route")

    monkeypatch.setattr(ptlflow, "get_model", offline)
    with pytest.raises(LocalmotionError, match=r"'things' failed .*no route.*give its path as checkpoint") as caught:
        SeaRaft(device="cpu")
    assert "\n" not in str(caught.value)


def test_building_leaves_the_random_generator_alone(ptlflow):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    SeaRaft(device="cpu")
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"min_side": 127}, "min_side"),
        ({"batch": 0}, "batch"),
        ({"precision": "int8"}, "known: float32, bfloat16, float16"),
        ({"precision": "float16"}, "for CUDA"),
        ({"device": "abacus"}, "not a torch device"),
        ({"device": "cuda:99"}, "does not exist"),
    ],
)
def test_sea_raft_impossible_options(ptlflow, options, text):
    with pytest.raises(ConfigError, match=text):
        SeaRaft(**{"device": "cpu", **options})
    assert not ptlflow.calls


def test_half_precision_runs_the_network_under_autocast(ptlflow):
    backend = SeaRaft(device="cpu", precision="bfloat16", min_side=128)
    seen = []
    backend._network.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    backend.flow(*moved_pair(64, 64, MOVES))
    backend = SeaRaft(device="cpu", min_side=128)  # shares the network of the first
    backend.flow(*moved_pair(64, 64, MOVES))
    assert seen == [True, False]


# ---------------------------------------------------------------- RAFT of torchvision


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch) -> Any:
    module: Any = types.ModuleType("torchvision.models.optical_flow")
    module.calls = []

    class StandInRaft(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = torch.nn.Parameter(torch.zeros(1))

        def forward(self, image1: torch.Tensor, image2: torch.Tensor, num_flow_updates: int = 12) -> list[torch.Tensor]:
            height, width = image1.shape[-2:]
            assert height % 8 == width % 8 == 0
            assert min(height, width) >= 128
            assert -1 <= image1.min() < -0.5
            assert 0.5 < image1.max() <= 1
            shift = shift_between(image1[:, 0, :128, :128], image2[:, 0, :128, :128]) + self.bias  # red first
            flow = shift[:, :, None, None].expand(-1, 2, height, width)
            return [flow * 0] * (num_flow_updates - 1) + [flow]

    class Weights:
        @staticmethod
        def get_state_dict(**options: Any) -> dict[str, torch.Tensor]:
            module.calls.append(options)
            return {"bias": torch.full((1,), 0.5)}

    module.raft_small = module.raft_large = lambda weights=None: StandInRaft()
    module.Raft_Small_Weights = types.SimpleNamespace(C_T_V2=Weights)
    module.Raft_Large_Weights = types.SimpleNamespace(C_T_SKHT_V2=Weights)
    for name in ("torchvision", "torchvision.models"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "torchvision.models.optical_flow", module)
    return module


def test_raft_range_order_padding_and_weights(torchvision):
    first, second = moved_pair(128, 128, MOVES)
    first, second = (np.pad(x, ((0, 0), (0, 3), (0, 5), (0, 0)), mode="wrap") for x in (first, second))
    flow = Raft(checkpoint="random", min_side=128, device="cpu").flow(first, second)
    assert flow.shape == (1, 131, 133, 2)
    np.testing.assert_array_equal(flow, np.broadcast_to(np.float32([-5, 1]), flow.shape))
    assert not torchvision.calls
    flow = Raft(model="large", min_side=128, device="cpu").flow(first, second)
    np.testing.assert_array_equal(flow[0, 0, 0], [-4.5, 1.5])
    assert torchvision.calls == [{"check_hash": True, "weights_only": True, "progress": False}]


# ---------------------------------------------------------------- absent and broken packages


@pytest.mark.parametrize(
    ("module", "build", "command"),
    [
        ("ptlflow", SeaRaft, "pip install --no-deps ptlflow==0.4.2 && pip install 'lightning>=2.1,<2.7'"),
        ("torchvision.models.optical_flow", Raft, "pip install 'torchvision==0."),
        ("transformers", GroundedSam, "pip install 'localmotion[perception]'"),
        ("PIL.Image", GroundedSam, "pip install 'localmotion[perception]'"),
    ],
)
def test_absent_package_gives_the_command(monkeypatch, module, build, command):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, module.split(".")[0], None)
    with pytest.raises(MissingExtraError) as caught:
        build(device="cpu")
    assert command in str(caught.value)
    assert "\n" not in str(caught.value)


def test_torchvision_that_does_not_fit_torch_gets_its_own_mend(monkeypatch, tmp_path):
    (tmp_path / "ptlflow.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "ptlflow", raising=False)
    minor = int(torch.__version__.split(".")[1])
    with pytest.raises(MissingExtraError, match=rf"does not fit torch .*torchvision==0\.{minor + 15}\.\*"):
        SeaRaft(device="cpu")
