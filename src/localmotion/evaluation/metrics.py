"""Picture quality of predicted frames: mean squared error, PSNR and SSIM, over any leading dimensions.

All three take two tensors of equal shape (..., C, H, W), here with the picture's height H and width W. They return one
float64 number for each picture, shape (...). The default ``data_range`` is 255 for uint8 tensors and 1.0 for floating
tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
SSIM_K1, SSIM_K2 = 0.01, 0.03


def _prepare(prediction: Tensor, truth: Tensor, data_range: float | None) -> tuple[Tensor, Tensor, float]:
    if prediction.shape != truth.shape or prediction.dim() < 3:
        raise ValueError(f"pictures must share a shape (..., C, H, W): {tuple(prediction.shape)} and {tuple(truth.shape)}")
    if prediction.dtype != truth.dtype:
        # Comparing a uint8 picture with one in [0, 1] is a common mistake that would give a plausible wrong number.
        raise ValueError(f"pictures must share a dtype, and with it a range: {prediction.dtype} and {truth.dtype}")
    if data_range is None:
        if prediction.dtype == torch.uint8:
            data_range = 255.0
        elif prediction.is_floating_point():
            data_range = 1.0
        else:
            raise ValueError(f"give data_range for pictures of {prediction.dtype}")
    if not data_range > 0:
        raise ValueError(f"data_range must be positive, not {data_range}")
    # float64, because the variances in SSIM are differences of nearly equal numbers.
    return prediction.to(torch.float64), truth.to(torch.float64), float(data_range)


def psnr(prediction: Tensor, truth: Tensor, data_range: float | None = None) -> Tensor:
    """Peak signal-to-noise ratio in dB, ``10 log10(data_range^2 / mse)``: (..., C, H, W) twice -> (...) float64.

    Equal pictures give +inf. Raises ValueError if shapes or dtypes differ, or if the range is unknown or not positive.
    """
    a, b, span = _prepare(prediction, truth, data_range)
    error = (a - b).square().mean(dim=(-3, -2, -1))  # (...)
    return 10.0 * torch.log10(span**2 / error)


def ssim(prediction: Tensor, truth: Tensor, data_range: float | None = None) -> Tensor:
    """Mean structural similarity, in [-1, 1]: (..., C, H, W) twice -> (...) float64, with H, W >= 11.

    Wang, Bovik, Sheikh, Simoncelli, "Image Quality Assessment: From Error Visibility to Structural Similarity"
    (2004), Eqs. 13-17: 11x11 Gaussian window of standard deviation 1.5 and unit sum, K1 = 0.01, K2 = 0.03, population
    moments, only windows completely inside the picture. The result is the mean over windows, then over channels. Raises
    ValueError as `psnr`, and for pictures smaller than the window.
    """
    a, b, span = _prepare(prediction, truth, data_range)
    channels, height, width = a.shape[-3:]
    if min(height, width) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs pictures of at least {SSIM_WINDOW}x{SSIM_WINDOW} pixels, not {height}x{width}")
    offset = torch.arange(SSIM_WINDOW, dtype=a.dtype, device=a.device) - SSIM_WINDOW // 2
    kernel = torch.exp(-offset.square() / (2 * SSIM_SIGMA**2))
    kernel = kernel / kernel.sum()  # (11,)

    def blur(x: Tensor) -> Tensor:  # (N, 1, H, W) -> (N, 1, H - 10, W - 10); the Gaussian window is separable
        return conv2d(conv2d(x, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))

    x, y = a.reshape(-1, 1, height, width), b.reshape(-1, 1, height, width)  # (N, 1, H, W), N pictures x channels
    mean_x, mean_y = blur(x), blur(y)
    var_x = blur(x * x) - mean_x.square()
    var_y = blur(y * y) - mean_y.square()
    cov = blur(x * y) - mean_x * mean_y
    c1, c2 = (SSIM_K1 * span) ** 2, (SSIM_K2 * span) ** 2
    score = ((2 * mean_x * mean_y + c1) * (2 * cov + c2)) / ((mean_x.square() + mean_y.square() + c1) * (var_x + var_y + c2))
    return score.mean(dim=(-3, -2, -1)).reshape(*a.shape[:-3], channels).mean(dim=-1)  # (N,) -> (..., C) -> (...)
