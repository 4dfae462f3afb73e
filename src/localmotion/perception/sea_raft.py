"""Neural optical flow: SEA-RAFT (the paper's, through ptlflow) and RAFT (torchvision) as a second choice.

SEA-RAFT: Wang, Lipson, Deng, "SEA-RAFT: Simple, Efficient, Accurate RAFT for Optical Flow", ECCV 2024. RAFT: Teed and Deng,
ECCV 2020. Both work on a grid of 1/8 of the frame and fail or return NaN below 128 pixels, so small frames are enlarged first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from localmotion.errors import ConfigError, LocalmotionError, unknown_name
from localmotion.perception._neural import (
    GUIDE,
    check_frames,
    check_options,
    failure,
    inference,
    matching_torchvision,
    missing,
    optional_import,
    pick_device,
    pick_precision,
    shared_network,
)
from localmotion.perception.base import register

SMALLEST_SIDE = 128
"""Below this side the correlation pyramid of the RAFT family has a level of one pixel, and the network fails or returns NaN."""
PTLFLOW_INSTALL = (
    "pip install --no-deps ptlflow==0.4.2 && "
    "pip install 'lightning>=2.1,<2.7' 'jsonargparse>=4.35,<5' 'loguru<0.8' requests 'timm>=1.0,<1.1' einops "
    f"'{matching_torchvision()}'"
)
"""The packages that ptlflow imports. Its own pins would replace our OpenCV by opencv-python < 4.14 in the same folder."""
MODELS = ("sea_raft_s", "sea_raft_m", "sea_raft_l")
CHECKPOINTS = ("tartan", "chairs", "things", "sintel", "kitti", "spring")


class _PairFlow:
    """Batches and enlarges frames, predicts, converts the field to pixels of the given frames, and checks it."""

    name: ClassVar[str]

    def __init__(self, min_side: int, batch: int | None, device: str, precision: str) -> None:
        check_options(self.name, min_side=min_side >= SMALLEST_SIDE, batch=batch is None or batch >= 1)
        self.min_side, self.batch = min_side, batch
        self.device = pick_device(device)
        self.dtype = pick_precision(self.name, precision, self.device)

    def _predict(self, pairs: torch.Tensor) -> torch.Tensor:
        """(B, 2, 3, H, W) RGB float 0..1, both sides >= 128 -> (B, 2, H, W) pixels of this size."""
        raise NotImplementedError

    def _batch(self, height: int, width: int) -> int:
        """Pairs of frames of this size in one forward pass."""
        if self.batch is not None:
            return self.batch
        if self.device.type == "cpu":
            return 8
        area = height * width * max(1.0, self.min_side / min(height, width)) ** 2
        return max(1, min(64, round(64 * 256**2 / area)))

    def flow(self, first: NDArray[np.uint8], second: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Flow of a batch of pairs: (N, H, W, 3) uint8 RGB twice -> (N, H, W, 2) float32 pixels, x then y.

        Frames whose short side is below ``min_side`` are enlarged (bicubic) until it is ``min_side``; the field is
        area-averaged back and divided by the enlargement, so the result is in pixels of the given frames. Raises
        LocalmotionError if the network returns a non-finite value or the GPU has too little memory.
        """
        check_frames(first, "first frames")
        check_frames(second, "second frames")
        if first.shape != second.shape:
            raise ValueError(f"first and second frames differ in shape: {first.shape} and {second.shape}")
        n, height, width = first.shape[:3]
        fields = np.empty((n, height, width, 2), np.float32)
        batch = self._batch(height, width)
        for start in range(0, n, batch):
            stop = min(start + batch, n)
            # The stack is also a writable copy, which torch needs instead of a read-only memory map.
            stacked = torch.from_numpy(np.stack([first[start:stop], second[start:stop]], axis=1))
            load = f"{stop - start} pairs of {height}x{width}"
            fix = f"lower the option batch={batch} of {self.name}"
            with inference(self.name, self.device, self.dtype, load, fix):
                pairs = stacked.to(self.device).permute(0, 1, 4, 2, 3).float() / 255  # (B, 2, 3, H, W)
                field = self._at_working_size(pairs)  # (B, 2, H, W)
                finite = torch.isfinite(field).flatten(1).all(1).cpu()
                fields[start:stop] = field.permute(0, 2, 3, 1).cpu().numpy()
            if not finite.all():
                pair = start + int((~finite).nonzero()[0])
                raise LocalmotionError(
                    f"{self.name}: flow of pair {pair} of {n} ({height}x{width}) is not finite; "
                    f"use precision=float32 (now {str(self.dtype)[6:]}) or a larger min_side (now {self.min_side})"
                )
        return fields

    def _at_working_size(self, pairs: torch.Tensor) -> torch.Tensor:
        batch, _, _, height, width = pairs.shape
        grow = self.min_side / min(height, width)
        if grow <= 1:
            return self._predict(pairs).float()
        size = (round(height * grow), round(width * grow))
        large = F.interpolate(pairs.flatten(0, 1), size=size, mode="bicubic", align_corners=False).clamp_(0, 1)
        field = self._predict(large.unflatten(0, (batch, 2))).float()
        field = F.interpolate(field, size=(height, width), mode="area")
        return field * field.new_tensor([width / size[1], height / size[0]]).view(1, 2, 1, 1)


@register("flow", "sea_raft")
class SeaRaft(_PairFlow):
    """SEA-RAFT through ``ptlflow`` (the flow of DRP, section 4.2.1).

    Options:
        model: ``sea_raft_s`` (8.9 M parameters), ``sea_raft_m`` (19.7 M) or ``sea_raft_l`` (the M weights, 12 iterations).
        checkpoint: one of tartan, chairs, things, sintel, kitti, spring (downloaded once by torch.hub into its cache, compared
            with the hash in its name and read with ``weights_only``), the path of a local file of the same kind, or
            ``random``: untrained weights, only for tests.
        min_side: minimum short side in pixels for the network; at least 128.
        batch: pairs in one forward pass; by default 8 on a CPU, on a GPU 64 of 256 px and fewer of larger frames.
        device: ``auto`` (CUDA if there is one), ``cpu``, ``cuda``, ``cuda:1``, ...
        precision: ``float32``, or autocast to ``bfloat16`` or ``float16``.

    Raises MissingExtraError without ptlflow, ConfigError for an invalid option, LocalmotionError for unreadable weights.
    """

    name: ClassVar[str] = "sea_raft"
    licence: ClassVar[str] = "BSD-3-Clause"

    def __init__(
        self,
        *,
        model: str = "sea_raft_s",
        checkpoint: str = "things",
        min_side: int = 256,
        batch: int | None = None,
        device: str = "auto",
        precision: str = "float32",
    ) -> None:
        super().__init__(min_side, batch, device, precision)
        if model not in MODELS:
            raise unknown_name("sea_raft model", model, MODELS)
        weights = _checkpoint(checkpoint)
        key = (self.name, model, weights)
        self._network = shared_network(key, self.device, lambda: self._load(model, weights))

    def _load(self, model: str, weights: str | None) -> Any:
        ptlflow = optional_import("ptlflow", self.name, PTLFLOW_INSTALL)
        try:
            return ptlflow.get_model(model, ckpt_path=weights)
        except Exception as error:  # URL, hash, zip, pickle and shape errors have different types
            fix = (
                f"check the network, or download the file elsewhere and give its path as checkpoint ({GUIDE}); "
                "a damaged file in the torch.hub cache must be deleted"
            )
            raise failure(self.name, f"loading {model} with checkpoint {weights!r}", error, fix) from error

    def _predict(self, pairs: torch.Tensor) -> torch.Tensor:
        # ptlflow expects BGR in 0..1, pads to a multiple of 8 and removes the padding.
        flows: torch.Tensor = self._network({"images": pairs.flip(2)})["flows"]  # (B, 1, 2, H, W)
        return flows[:, 0]


def _checkpoint(checkpoint: str) -> str | None:
    """Name or path for ptlflow, None for random weights. ptlflow would confuse a file called ``things`` with the name."""
    if checkpoint == "random":
        return None
    path = Path(checkpoint)
    if checkpoint in CHECKPOINTS:
        if path.exists():
            raise ConfigError(f"checkpoint {checkpoint!r} is a known name and a file here; write ./{checkpoint} or move the file")
        return checkpoint
    if len(path.parts) == 1 and not path.suffix and not path.exists():
        raise unknown_name("sea_raft checkpoint", checkpoint, (*CHECKPOINTS, "random"))
    if not path.is_file():
        raise LocalmotionError(f"sea_raft: checkpoint file {checkpoint} does not exist; give a path or {CHECKPOINTS}")
    return str(path.resolve())


@register("flow", "raft")
class Raft(_PairFlow):
    """RAFT of torchvision: fewer packages than SEA-RAFT, less accurate (``model="small"``) or slower (``"large"``).

    Options as SeaRaft, with ``model`` small or large and ``checkpoint`` default (C_T_V2 for small, C_T_SKHT_V2 for large;
    downloaded and hash-checked by torch.hub, read with ``weights_only``) or random.
    """

    name: ClassVar[str] = "raft"
    licence: ClassVar[str] = "BSD-3-Clause"
    _INSTALL: ClassVar[str] = f"pip install '{matching_torchvision()}'"

    def __init__(
        self,
        *,
        model: str = "small",
        checkpoint: str = "default",
        min_side: int = 256,
        batch: int | None = None,
        device: str = "auto",
        precision: str = "float32",
    ) -> None:
        super().__init__(min_side, batch, device, precision)
        if model not in ("small", "large"):
            raise unknown_name("raft model", model, ("small", "large"))
        if checkpoint not in ("default", "random"):
            raise unknown_name("raft checkpoint", checkpoint, ("default", "random"))
        key = (self.name, model, checkpoint)
        self._network = shared_network(key, self.device, lambda: self._load(model, checkpoint))

    def _load(self, model: str, checkpoint: str) -> Any:
        zoo: Any = optional_import("torchvision.models.optical_flow", self.name, self._INSTALL)
        try:
            build = zoo.raft_small if model == "small" else zoo.raft_large
            weights = zoo.Raft_Small_Weights.C_T_V2 if model == "small" else zoo.Raft_Large_Weights.C_T_SKHT_V2
        except AttributeError as error:
            raise missing(self.name, "torchvision>=0.13", self._INSTALL, error) from error
        network = build(weights=None)
        if checkpoint == "default":
            try:
                network.load_state_dict(weights.get_state_dict(check_hash=True, weights_only=True, progress=False))
            except Exception as error:  # URL, hash, zip and pickle errors, each of its own type
                fix = "check the network or put the file into the torch.hub cache"
                raise failure(self.name, f"fetching the weights of RAFT {model}", error, fix) from error
        return network

    def _predict(self, pairs: torch.Tensor) -> torch.Tensor:
        height, width = pairs.shape[-2:]
        padding = (0, -width % 8, 0, -height % 8)
        images = F.pad(pairs.flatten(0, 1) * 2 - 1, padding, mode="replicate").unflatten(0, pairs.shape[:2])
        flows: list[torch.Tensor] = self._network(images[:, 0], images[:, 1])  # one (B, 2, H, W) per iteration
        return flows[-1][..., :height, :width]
