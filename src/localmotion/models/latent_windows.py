"""Windows of frames for latent action models: stacks, the decoder's error, the newest frames while acting, and prediction.

A window is a step from frame t to frame t + 1 with the frames before it. Used by LAPO, MaskLAM and LAOM.

Shapes: B sequences, T positions, n windows of a sequence, N = B * n, C channels, S side, Z numbers of a latent action, A actions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from localmotion import ranks


def pictures(image: Tensor) -> Tensor:
    """(B, T, S, S, 3) uint8 -> (B, T, 3, S, S) float in [-0.5, 0.5]."""
    return image.permute(0, 1, 4, 2, 3).float().mul(1.0 / 255.0).sub(0.5)


def starts(is_first: Tensor) -> Tensor:
    """For each position the index of the first position of its episode, (B, T) int64. Position 0 begins an episode in any case."""
    time = torch.arange(is_first.shape[1], device=is_first.device)
    return torch.where(is_first, time, 0).cummax(1).values


def every(frames: Tensor, first: int, last: int) -> Tensor:
    """Positions ``first`` to ``last``, the same for all sequences of ``frames`` (B, ...): (B, last - first + 1) int64."""
    return torch.arange(first, last + 1, device=frames.device).expand(len(frames), -1)


def stacks(frames: Tensor, ends: Tensor, count: int, begin: Tensor | None = None) -> Tensor:
    """Stacks of the ``count`` frames that end at given positions, oldest first: (B, T, C, S, S), (B, n) -> (N, count * C, S, S).

    ``begin`` (B, n): the first position of the episode; a frame before it is a copy of the frame there. None: position 0.
    """
    index = ends.unsqueeze(-1) - torch.arange(count - 1, -1, -1, device=frames.device)  # (B, n, count)
    index = index.clamp(min=0) if begin is None else torch.maximum(index, begin.unsqueeze(-1))
    rows = torch.arange(len(frames), device=frames.device)[:, None, None]
    return frames[rows, index].flatten(0, 1).flatten(1, 2)


def r_squared(predicted: Tensor, true: Tensor, weight: Tensor | None = None) -> Tensor:
    """1 - squared error / variance of ``true``, both summed over the numbers of rows (N, d) with weights (N,), for the log of a run."""
    predicted, true = predicted.detach().float(), true.float()
    share = (torch.ones_like(true[:, 0]) if weight is None else weight.to(true.dtype)).unsqueeze(-1)
    centred = true - (share * true).sum(0) / share.sum().clamp(min=1.0)
    return 1 - (share * (predicted - true).square()).sum() / (share * centred.square()).sum().clamp(min=1e-8)


def whole(is_first: Tensor, count: int) -> Tensor:
    """Whether the stack of ``count`` frames that acting saw at each position can be made of the sequence, (B, T) bool.

    Not where the stack reaches back to frames before the sequence, in an episode that began before it.
    """
    begin = starts(is_first)
    time = torch.arange(is_first.shape[1], device=is_first.device)
    return (time - begin >= count - 1) | is_first.gather(1, begin)


def played_steps(is_first: Tensor, seen: int) -> tuple[Tensor, Tensor, Tensor]:
    """The steps of a rollout: ends (B, T - 1), begins of their episodes (B, T - 1), and whether they count (B, T - 1).

    A step counts within an episode, with the ``seen`` frames up to it that acting saw: an episode begins with copies (`whole`).
    """
    known = ~is_first[:, 1:] & whole(is_first, seen)[:, :-1]
    return every(is_first, 0, is_first.shape[1] - 2), starts(is_first)[:, :-1], known


def action_error(
    head: Callable[[Tensor], Tensor], latent: Tensor, batch: Mapping[str, Tensor], counted: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Loss "action" of a decoder, and its R^2: the mean of (head(latent) - action[t + 1])^2, actions clipped to [-1, 1].

    ``latent`` (N, Z) of the last n steps of each sequence; ``counted`` (B, n): which of them count.
    """
    known, found = counted.flatten().float(), head(latent).float()
    true = batch["action"][:, -counted.shape[1] :].flatten(0, 1).float().clamp(-1, 1)  # (N, A)
    loss = (known * (found - true).square().mean(-1)).sum() / ranks.weighed(known)
    return {"action": loss}, {"action/r2": r_squared(found, true, known)}


def decoding_error(
    policy: Callable[[Tensor], Tensor], head: Callable[[Tensor], Tensor], batch: Mapping[str, Tensor], seen: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`action_error` of a decoder of the policy's latent actions, on a batch of logged episodes. The policy gets no gradient.

    Steps within a piece of an episode count whose ``seen`` frames up to t are all in it, so no window crosses the end of an episode.
    """
    frames = pictures(batch["image"])
    ends = every(frames, seen - 1, frames.shape[1] - 2)  # (B, n)
    begin = starts(batch["is_first"])[:, seen - 1 : -1]
    with torch.no_grad():
        latent = policy(stacks(frames, ends, seen, begin)).float()  # (N, Z)
    return action_error(head, latent, batch, ~batch["is_first"][:, seen:] & (ends - begin >= seen - 1))


def newest(carry: Tensor, obs: Mapping[str, Tensor]) -> Tensor:
    """The newest frames (B, count, S, S, 3) uint8 after an observation (B, 1, ...), from those before. An episode begins with copies."""
    frame = obs["image"]
    return torch.where(obs["is_first"][:, :, None, None, None], frame.expand_as(carry), torch.cat([carry[:, 1:], frame], 1))


def noisy(action: Tensor, deviation: float, explore: bool) -> Tensor:
    """Actions (B, A) in [-1, 1], with normal noise while exploring."""
    action = action.float()
    return (action + deviation * torch.randn_like(action) if explore else action).clamp(-1, 1)


def roll_out(
    step: Callable[[Tensor, Tensor], Tensor],
    frames: Tensor,
    latents: Tensor,
    context: int,
    before: int,
    see: Callable[[Tensor, int], Tensor] = lambda picture, t: picture,
) -> Tensor:
    """Pictures (B, T, 3, S, S): each is ``step(past, latent)`` of the ``before`` frames before it and the latent action that leads to it.

    Past frames are the observed ones up to ``context`` frames, then predictions. Frames that nothing comes before are copied.
    ``frames`` (B, T, 3, S, S), ``latents`` (B, T, Z); ``step``: (B, before * C, S, S), (B, Z) -> (B, 3, S, S). ``see`` makes the
    model's input (B, C, S, S) of a picture (B, 3, S, S) and the number of the last observed frame at that time.
    """
    seen = [see(frames[:, t], t) for t in range(context)]
    out = [frames[:, t] for t in range(min(before, context))]
    for t in range(len(out), frames.shape[1]):
        past = [seen[max(t - back, 0)] for back in range(before, 0, -1)]
        out.append(step(torch.cat(past, 1), latents[:, t]).float())
        if t >= context:
            seen.append(see(out[-1], context - 1))
    return torch.stack(out, 1)


def futures(codes: Tensor, context: int) -> dict[str, Tensor]:
    """Latent actions (B, T, Z) that a prediction may be given after ``context`` frames, by the name of the row of `Method.open_loop`.

    `latent_action`: ``codes``, those of the true frames. `zero_action`: zeros. `swapped_action`: those of the next clip of the batch (the
    last clip gets those of the first). If latent actions mean the same in every clip, the prediction then moves as the next clip does. A
    batch of one clip has no such row.
    """
    known = (torch.arange(codes.shape[1], device=codes.device) < context)[:, None]
    rows = {"latent_action": codes, "zero_action": codes * known}
    return rows if len(codes) == 1 else {**rows, "swapped_action": torch.where(known, codes, codes.roll(-1, 0))}


def frozen(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)`` as float, without a gradient."""
    with torch.no_grad():
        found: Tensor = module(x)
    return found.float()
