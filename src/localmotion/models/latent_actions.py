"""Parts of latent action models: encoders, inverse and forward models, quantiser, policy and the masked reconstruction error.

A latent action model watches videos without actions. The inverse model codes what happened between two moments in a latent
action z; the forward model predicts the next frame from the frames before and z. What the forward model can only know through
z, and cannot see in the frames before, is what z has to hold: the action, and whatever else moves.

Papers: LAPO arXiv 2312.10812 (`ImpalaEncoder`, `UNet`, `Quantizer`); MaskLAM arXiv 2602.02259 (`ResidualForward`,
`masked_error`); LAOM arXiv 2502.00379 (`StridedEncoder`, `PooledEncoder`, `LatentHead`).

What stages, acting and prediction share is in `models.latent_windows`.

Shapes: N pictures or rows, C channels, S side of a picture (a power of two for `UNet`, else divisible by 8), Z numbers of z,
W numbers of a code, A actions. Pictures are floats in [-0.5, 0.5] (LAPO, MaskLAM) or [-1, 1] (LAOM). Maps have their channels last
in memory, which convolutions on CPUs prefer.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localmotion import ranks
from localmotion.models.batch_norm import BatchNorm2d


def channels_last(x: Tensor) -> Tensor:
    """The same maps (N, C, H, W), with the channels of a place side by side in memory."""
    return x.contiguous(memory_format=torch.channels_last)


# 1. Encoders ------------------------------------------------------------------------------------------------------------------


def orthogonal_(module: nn.Module) -> None:
    """Orthogonal weights and zero biases for every convolution and linear layer of ``module``, as in MaskLAM and LAOM."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            with torch.no_grad():  # torch's own writes to tensors in the default order only
                layer.weight.copy_(nn.init.orthogonal_(torch.empty(layer.weight.shape)))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class Residual(nn.Module):
    """x + conv(act(conv(act(x)))), 3x3, with ``hidden`` channels inside (None: as outside)."""

    def __init__(self, width: int, hidden: int | None = None, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        hidden = hidden or width
        self.first, self.second = nn.Conv2d(width, hidden, 3, padding=1), nn.Conv2d(hidden, width, 3, padding=1)
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.second(self.act(self.first(self.act(x))))
        return out


class ImpalaEncoder(nn.Module):
    """Convolutional encoder of IMPALA (arXiv 1802.01561): per width a 3x3 convolution, max pooling 3/2, and two residual blocks."""

    feed_forward = True  # --compile compiles it

    def __init__(self, channels: int, widths: Sequence[int], image_size: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        self.side = image_size
        for a, b in itertools.pairwise((channels, *widths)):
            parts = (nn.Conv2d(a, b, 3, padding=1), nn.MaxPool2d(3, 2, padding=1), Residual(b), Residual(b))
            self.stages.append(nn.Sequential(*parts))
            self.side = (self.side + 1) // 2
        self.width = widths[-1]
        self.embed_dim = self.width * self.side**2
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, image: Tensor) -> Tensor:
        """(N, C, S, S) -> maps (N, last width, side, side)."""
        image = channels_last(image)
        for stage in self.stages:
            image = stage(image)
        return image


class StridedEncoder(nn.Module):
    """LAOM's encoder: per width a 3x3 convolution with stride 2 and residual blocks with ReLU6."""

    feed_forward = True  # --compile compiles it

    def __init__(self, channels: int, widths: Sequence[int], image_size: int, blocks: int = 2) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        self.side = image_size
        for a, b in itertools.pairwise((channels, *widths)):
            residuals = (Residual(b, act=nn.ReLU6) for _ in range(blocks))
            self.stages.append(nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), *residuals))
            self.side = (self.side + 1) // 2
        self.width = widths[-1]
        self.embed_dim = self.width * self.side**2
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, image: Tensor) -> Tensor:
        """(N, C, S, S) -> maps (N, last width, side, side)."""
        image = channels_last(image)
        for stage in self.stages:
            image = stage(image)
        return image


class LatentEncoder(nn.Module):
    """Pictures to a latent action: IMPALA maps, ReLU, a linear layer, and with ``hidden`` a ReLU and a second linear layer.

    It serves as the inverse model (the pictures are those before and after) and as the latent policy (those before).
    """

    def __init__(self, channels: int, widths: Sequence[int], image_size: int, latent: int, hidden: int = 0) -> None:
        super().__init__()
        self.encoder = ImpalaEncoder(channels, widths, image_size)
        self.project = nn.Linear(self.encoder.embed_dim, hidden or latent)
        self.out = nn.Linear(hidden, latent) if hidden else None
        self.features = hidden or self.encoder.embed_dim

    def both(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C, S, S) -> the input of the last layer (N, features), and z (N, Z)."""
        maps = F.relu(self.encoder(image).flatten(1))
        if self.out is None:
            return maps, self.project(maps)
        units = F.relu(self.project(maps))
        return units, self.out(units)

    def forward(self, image: Tensor) -> Tensor:
        """(N, C, S, S) -> z (N, Z)."""
        return self.both(image)[1]


class PooledEncoder(nn.Module):
    """LAOM's latent policy: strided maps, the mean over all places, ReLU6, and a linear layer."""

    def __init__(self, channels: int, widths: Sequence[int], image_size: int, latent: int) -> None:
        super().__init__()
        self.encoder = StridedEncoder(channels, widths, image_size)
        self.project = nn.Linear(widths[-1], latent)
        self.features = widths[-1]

    def both(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C, S, S) -> the input of the last layer (N, features), and z (N, Z)."""
        units = F.relu6(self.encoder(image).mean((2, 3)))
        return units, self.project(units)

    def forward(self, image: Tensor) -> Tensor:
        """(N, C, S, S) -> z (N, Z)."""
        return self.both(image)[1]


class LatentHead(nn.Module):
    """Head of LAOM: three residual blocks LayerNorm(x + W2 ReLU6(W1 x)), expansion 4, behind linear layers.

    Before the second and the third block ``again`` numbers of the input are put beside x and projected back to ``width``.
    """

    feed_forward = True  # --compile compiles it

    def __init__(self, inputs: int, again: int, width: int, outputs: int) -> None:
        super().__init__()
        self.project = nn.ModuleList(nn.Linear(size, width) for size in (inputs, width + again, width + again))
        self.up = nn.ModuleList(nn.Linear(width, 4 * width) for _ in self.project)
        self.down = nn.ModuleList(nn.Linear(4 * width, width) for _ in self.project)
        self.norm = nn.ModuleList(nn.LayerNorm(width) for _ in self.project)
        self.out = nn.Linear(width, outputs)

    def forward(self, x: Tensor, again: Tensor) -> Tensor:
        """(N, inputs), (N, again) -> (N, outputs)."""
        for number, project in enumerate(self.project):
            x = project(torch.cat([x, again], 1) if number else x)
            x = self.norm[number](x + self.down[number](F.relu6(self.up[number](x))))
        out: Tensor = self.out(x)
        return out


# 2. Forward models ------------------------------------------------------------------------------------------------------------


class _Down(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), BatchNorm2d(outputs)
        self.residual = Residual(outputs, max(outputs // 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.max_pool2d(self.residual(self.norm(self.conv(x))), 2))


class _Up(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.ConvTranspose2d(inputs, outputs, 2, 2, bias=False), BatchNorm2d(outputs)
        self.residual = Residual(outputs, max(outputs // 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.residual(self.norm(self.conv(x))))


class UNet(nn.Module):
    """LAPO's forward model. z is tiled over the picture at the input, and stands at the bottleneck in place of the skip.

    log2(S) levels halve the side down to 1 and double the width each time, from ``base``. The last level is a 2x2 convolution. The
    way up takes the maps of the way down, then the input itself.
    """

    feed_forward = True  # --compile compiles it

    def __init__(self, channels: int, latent: int, image_size: int, base: int, outputs: int = 3) -> None:
        """Raises ValueError unless ``image_size`` is a power of two, 4 or more."""
        super().__init__()
        levels = image_size.bit_length() - 1
        if image_size != 1 << levels or levels < 2:
            raise ValueError(f"pictures of side {image_size}: the U-Net needs a power of two")
        widths = [base << level for level in range(levels)]
        sizes = [channels + latent, *widths]
        self.down = nn.ModuleList(_Down(a, b) for a, b in itertools.pairwise(sizes[:-1]))
        self.bottom = nn.Conv2d(sizes[-2], sizes[-1], 2)
        ways = list(itertools.pairwise([*widths[::-1], base]))
        skips = [latent, *widths[-2::-1]]
        self.up = nn.ModuleList(_Up(a + skip, b) for (a, b), skip in zip(ways, skips, strict=True))
        self.last = nn.Sequential(
            nn.Conv2d(base + channels, base, 3, padding=1),
            Residual(base, max(base // 2, 1)),
            nn.ReLU(),
            nn.Conv2d(base, outputs, 1),
        )
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, image: Tensor, z: Tensor) -> Tensor:
        """Pictures (N, C, S, S) and z (N, Z) -> the next frame (N, 3, S, S) in [-0.5, 0.5]."""
        action = z[:, :, None, None].to(image.dtype)
        image = channels_last(image)
        x = torch.cat([image, channels_last(action.expand(-1, -1, *image.shape[2:]))], 1)
        maps = []
        for level in self.down:
            x = level(x)
            maps.append(x)
        x, skips = self.bottom(x), [action, *maps[::-1]]
        for level, skip in zip(self.up, skips, strict=True):
            x = level(torch.cat([x, skip], 1))
        return torch.tanh(self.last(torch.cat([x, image], 1))) / 2


class ResidualForward(nn.Module):
    """Forward model of the MaskLAM study: maps of the frames beside a projection of z, then three upsampling blocks.

    ``bounded``: outputs are tanh(x) / 2, in [-0.5, 0.5]; else they are unbounded (flow).
    """

    feed_forward = True  # --compile compiles it

    def __init__(
        self, channels: int, widths: Sequence[int], latent: int, image_size: int, outputs: int = 3, bounded: bool = True
    ) -> None:
        super().__init__()
        self.encoder = ImpalaEncoder(channels, widths, image_size)
        self.project = nn.Linear(latent, self.encoder.embed_dim)
        parts: list[nn.Module] = []
        for a, b in itertools.pairwise((2 * widths[-1], *widths[::-1])):
            parts += [nn.ConvTranspose2d(a, b, 2, 2), Residual(b), Residual(b)]
        self.decoder = nn.Sequential(*parts, nn.GELU(), nn.Conv2d(widths[0], outputs, 1))
        self.bounded = bounded
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, image: Tensor, z: Tensor) -> Tensor:
        """Pictures (N, C, S, S) and z (N, Z) -> (N, outputs, S, S)."""
        maps = self.encoder(image)
        beside = channels_last(self.project(z).view_as(maps)).to(maps.dtype)
        out: Tensor = self.decoder(torch.cat([maps, beside], 1))
        return torch.tanh(out) / 2 if self.bounded else out


# 3. Quantiser -----------------------------------------------------------------------------------------------------------------


class Quantizer(nn.Module):
    """LAPO's vector quantiser: z is ``codebooks`` x ``positions`` codes, each the nearest of ``codes`` vectors of ``width`` numbers.

    Codes follow the mean of what is assigned to them, averaged with ``decay``; z learns to stay near its codes (`loss`). Counts begin
    at one code each, so that the first updates move codes slowly. (In the release they begin at zero, which scales every code by the
    inverse of its count in the first update.) Within z, number (c * width + d) * positions + p is coordinate d of position p in
    codebook c, as in the release.
    """

    embedding: Tensor
    count: Tensor
    total: Tensor

    def __init__(
        self,
        codebooks: int = 2,
        positions: int = 4,
        width: int = 16,
        codes: int = 64,
        decay: float = 0.999,
        commitment: float = 0.05,
    ) -> None:
        super().__init__()
        self.positions, self.decay, self.commitment = positions, decay, commitment
        start = torch.empty(codebooks, codes, width).uniform_(-5 / codes, 5 / codes)
        self.register_buffer("embedding", start)
        self.register_buffer("count", torch.ones(codebooks, codes))
        self.register_buffer("total", start.clone())

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z (N, Z) -> its codes (N, Z) with the gradient of z, the commitment loss, and the perplexity, averaged over codebooks.

        In training mode it also moves the codes.
        """
        books, codes, width = self.embedding.shape
        rows = z.float().view(-1, books, width, self.positions).permute(1, 0, 3, 2).flatten(1, 2)  # (books, N * positions, width)
        flat = rows.detach()
        distance = self.embedding.square().sum(-1).unsqueeze(1) - 2 * flat @ self.embedding.transpose(1, 2)
        number = torch.arange(codes, device=z.device)
        chosen = (distance.argmin(-1, keepdim=True) == number).to(flat.dtype)  # (books, N * positions, codes), one-hot
        nearest = chosen @ self.embedding
        loss = self.commitment * (rows - nearest).square().mean()
        share = chosen.mean(1)
        perplexity = torch.exp(-(share * (share + 1e-10).log()).sum(-1)).mean()
        if self.training:
            self._follow(flat, chosen)
        quantised = nearest.unflatten(1, (-1, self.positions)).permute(1, 0, 3, 2).reshape(z.shape)
        return z + (quantised - z).detach(), loss, perplexity

    @torch.no_grad()
    def _follow(self, rows: Tensor, chosen: Tensor) -> None:
        share = 1 - self.decay
        self.count.mul_(self.decay).add_(ranks.total(chosen.sum(1)), alpha=share)
        whole = self.count.sum(-1, keepdim=True)
        self.count.add_(1e-5).div_(whole + self.count.shape[1] * 1e-5).mul_(whole)  # Laplace smoothing: no count is zero
        self.total.mul_(self.decay).add_(ranks.total(chosen.transpose(1, 2) @ rows), alpha=share)
        self.embedding.copy_(self.total / self.count.unsqueeze(-1))


class InverseModel(nn.Module):
    """Inverse model: `LatentEncoder` on the frames before and after, with a `Quantizer` or (None) without."""

    def __init__(self, encoder: LatentEncoder, quantizer: Quantizer | None = None) -> None:
        super().__init__()
        self.encoder, self.quantizer = encoder, quantizer

    def forward(self, image: Tensor) -> Tensor:
        """(N, C, S, S) -> z (N, Z), before quantisation."""
        z: Tensor = self.encoder(image).float()
        return z

    def code(self, z: Tensor) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """z (N, Z) -> what the forward model is given (N, Z), the loss "commitment" and metrics; without a quantiser z itself."""
        if self.quantizer is None:
            return z, {}, {}
        code, loss, perplexity = self.quantizer(z)
        return code, {"commitment": loss}, {"codes/perplexity": perplexity.detach()}


# 4. Errors --------------------------------------------------------------------------------------------------------------------


def masked_error(error: Tensor, mask: Tensor | None, floor: float) -> Tensor:
    """Mean of a squared error (N, C, S, S) with weight w = floor + (1 - floor) mask for a pixel.

        sum_p w_p sum_c e_cp / (C max(sum_p w_p, 1)),   sums over all N pictures

    ``mask`` (N, S, S) in [0, 1]; None: all ones. Floor 1 gives the mean squared error; with floor 0 the background has no weight, and
    the error of a batch without any agent pixel is zero, without a gradient.
    """
    if mask is None or floor == 1:
        return error.mean()
    weight = floor + (1 - floor) * mask.to(error.dtype)
    return (weight.unsqueeze(1) * error).sum() / (error.shape[1] * ranks.weighed(weight))


# 5. Action head ----------------------------------------------------------------------------------------------------------------


class ActionHead(nn.Module):
    """Latent action to action: ReLU, then hidden layers with ReLU, then a linear layer. Actions are not squashed.

    ``act``: the nonlinearity. ``first``: whether it stands before the first layer too.
    """

    def __init__(
        self, latent: int, widths: Sequence[int], actions: int, act: type[nn.Module] = nn.ReLU, first: bool = True
    ) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for a, b in itertools.pairwise((latent, *widths, actions)):
            parts += [act(), nn.Linear(a, b)]
        self.net = nn.Sequential(*(parts if first else parts[1:]))

    def forward(self, z: Tensor) -> Tensor:
        """(N, Z) -> (N, A)."""
        out: Tensor = self.net(z)
        return out
