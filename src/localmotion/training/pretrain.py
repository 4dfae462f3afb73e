"""Pre-training on a clip store: a page of named clocks. Data order is a pure function of (seed, update)."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from localmotion import methods
from localmotion.compute import Compute, choose
from localmotion.config import RunConfig
from localmotion.console import progress, say
from localmotion.errors import ConfigError, StoreError
from localmotion.evaluation.heldout import CONTEXT_FRAMES, open_loop_errors, reconstruction_errors
from localmotion.methods.base import MOTION, Method
from localmotion.runs import checkpoint
from localmotion.runs.rundir import RunDir, claimed, read_environment
from localmotion.training import graphs
from localmotion.training.checks import check_length
from localmotion.training.endings import recorded
from localmotion.training.update import Updater, to_floats
from localmotion.video.sample import WindowSampler
from localmotion.video.store import ClipStore


def pretrain(run: RunConfig, path: Path) -> Path:
    """Pre-train ``run.method`` on ``run.data`` in the run directory ``path``; continues where a run of the same settings stopped.

    Raises ConfigError, StoreError or CheckpointError with the mend; when a signal asks it to stop, it saves and raises Interrupted.
    """
    cls = methods.get(run.method)
    if "pretrain" not in cls.stages:
        raise ConfigError(f"method {run.method} has no pre-training stage; use localmotion train")
    check_length(cls, run)
    with claimed(path):
        return _pretrain(run, path, cls)


def _pretrain(run: RunConfig, path: Path, cls: type[Method]) -> Path:
    store = ClipStore(Path(run.data))
    settings = run.pretrain
    train = WindowSampler(
        store,
        settings.length,
        settings.batch_size,
        run.seed,
        split="train",
        heldout_fraction=settings.heldout_fraction,
        motion=bool(cls.wants & MOTION),
    )
    heldout = _heldout(store, run)
    compute = choose(run, read_environment(path))
    out = RunDir(path, run)
    torch.manual_seed(run.seed)
    method = cls(run.model, image_size=store.size, action_dim=None).to(compute.device)
    updater = Updater(method, run, compute, graph=graphs.wanted(run))
    start = _resume(out, method, updater)
    out.environment({**compute.record(), "parameters": method.parameter_counts(), "recipe": store.recipe})
    say(f"{run.method} pre-training on {len(store)} clips ({run.data}), {compute.note}")
    say("parameters " + ", ".join(f"{k} {v / 1e6:.2f}M" for k, v in method.parameter_counts().items()))
    out.status("running", update=start)
    clock, spent = time.perf_counter(), {"data": 0.0, "update": 0.0}

    def where() -> dict[str, int]:
        return {"update": updater.update}

    def save() -> bool:
        return updater.update > start and _save(out, method, updater)

    with (
        recorded(out, method, where, save) as stop,
        closing(train),
        progress("pretrain", settings.updates, "updates", start) as advance,
    ):
        train.load_state_dict({"index": start})
        for update in range(start, settings.updates):
            stop.check()
            began = time.perf_counter()
            batch = to_device(next(train), compute)  # batch `update`; the next one is read meanwhile
            spent["data"] += time.perf_counter() - began
            began = time.perf_counter()
            updater.progress = update / settings.updates
            metrics = updater.learn(batch)
            spent["update"] += time.perf_counter() - began
            done = update + 1
            if line := compute.look_again():
                out.log("threads", update=done, threads=torch.get_num_threads())
                say(line)
            if done % settings.log_every == 0 or done == settings.updates:
                values = {**to_floats(metrics), "skipped": updater.check()}
                count = settings.log_every
                rates = {f"seconds/{k}": v / count for k, v in spent.items()}
                out.log(
                    "pretrain",
                    update=done,
                    **values,
                    **rates,
                    updates_per_second=count / (time.perf_counter() - clock),
                )
                clock, spent = time.perf_counter(), {"data": 0.0, "update": 0.0}
                advance(done, note=" ".join(f"{k[5:]} {v:.2f}" for k, v in values.items() if k.startswith("loss/")))
            else:
                advance(done)
            if heldout and (done % settings.eval_every == 0 or done == settings.updates):
                result = measure_heldout(method, heldout, settings.eval_batches, compute, path / "media", done)
                out.log("heldout", update=done, **result)
                clock = time.perf_counter()
            if done % settings.save_every == 0 or done == settings.updates:
                _save(out, method, updater)
    out.status("finished", update=updater.update)
    return path


def _heldout(store: ClipStore, run: RunConfig) -> WindowSampler | None:
    """Sampler of the clips that are never trained on; None (said aloud) when the store is too small to have any."""
    settings = run.pretrain
    try:
        return WindowSampler(
            store,
            settings.length,
            settings.batch_size,
            run.seed + 1,
            split="heldout",
            heldout_fraction=settings.heldout_fraction,
            prefetch=False,
            motion=bool(methods.get(run.method).wants & MOTION),
        )
    except StoreError as error:
        say(f"no held-out figures: {error}")
        return None


def to_device(batch: dict[str, torch.Tensor], compute: Compute) -> dict[str, torch.Tensor]:
    """A batch on the computing device (no copy of what is there). From pinned memory: the copy of any other makes the host wait."""
    if all(value.device.type == compute.device.type for value in batch.values()):
        return batch
    if compute.device.type == "cuda":
        batch = {key: value.pin_memory() for key, value in batch.items()}
    return {key: value.to(compute.device, non_blocking=True) for key, value in batch.items()}


def _save(out: RunDir, method: Method, updater: Updater) -> bool:
    if not updater.healthy:
        say("not saved: the newest update was not finite; the checkpoint before stays")
        return False
    state = {"stage": "pretrain", "metrics_offset": out.metrics_offset(), "skipped": updater.check()}
    tensors = {"weights": method.state_dict(), "optimizer": updater.state()}
    checkpoint.save(out.path / "checkpoints", updater.update, tensors=tensors, state=state)
    return True


def _resume(out: RunDir, method: Method, updater: Updater) -> int:
    """Continue from the newest complete checkpoint, if there is one. Returns the update to start at."""
    found = checkpoint.complete(out.path / "checkpoints")
    if not found:
        out.truncate_metrics(0)
        return 0
    state = checkpoint.read_state(found[-1])
    checkpoint.load_weights(method, checkpoint.read(found[-1], "weights"), str(found[-1]))
    updater.load_state(checkpoint.read(found[-1], "optimizer"))
    updater.resume(int(state["update"]), int(state.get("skipped", 0)))
    checkpoint.set_rng_state(checkpoint.read(found[-1], "rng"))
    out.truncate_metrics(int(state["metrics_offset"]))
    say(f"continuing from update {updater.update:,} ({found[-1]})")
    return updater.update


def measure_heldout(
    method: Method, sampler: WindowSampler, batches: int, compute: Compute, media: Path | None, update: int
) -> dict[str, Any]:
    """Held-out figures: masked reconstruction against trivial predictors, open-loop PSNR and SSIM. Same clips and masks every time.

    The training random state is left as it was, so that measuring does not change the run.
    """
    with compute.own_randomness():
        torch.manual_seed(1234)
        return _measure_heldout(method, sampler, batches, compute, media, update)


def _measure_heldout(
    method: Method, sampler: WindowSampler, batches: int, compute: Compute, media: Path | None, update: int
) -> dict[str, Any]:
    generator = torch.Generator(device=compute.device).manual_seed(1234)
    method.eval()
    sums: dict[str, float] = {}
    weight = 0.0
    scores: dict[str, list[torch.Tensor]] = {}
    for index in range(batches):
        batch = to_device(sampler.batch(index), compute)
        with compute.autocast():
            found = reconstruction_errors(method, batch, generator)
            errors, pictures = open_loop_errors(method, batch)
        for name, value in errors.items():
            scores.setdefault(name, []).append(value)
        if found:
            count = float(found[0].pop("count"))
            weight += count
            for name, value in found[0].items():
                sums[name] = sums.get(name, 0.0) + float(value) * count
        if index == 0 and media:
            keep = {k: (v[:6] * 255).round().byte().permute(0, 1, 3, 4, 2).cpu().numpy() for k, v in pictures.items()}
            rolled = [k for k in keep if k not in ("truth", "last_frame")]
            if rolled:
                arrays = {"truth": keep["truth"], "prediction": keep[rolled[0]], "context": np.array(CONTEXT_FRAMES)}
                if len(rolled) > 1:
                    arrays["prediction_zero"] = keep[rolled[1]]
                np.savez_compressed(media / "openloop_heldout.npz", allow_pickle=False, **arrays)
            if found:
                truth, rebuilt = (x.cpu().numpy() for x in found[1].values())
                np.savez_compressed(media / "mae_heldout.npz", truth=truth, masked=np.zeros_like(truth), reconstruction=rebuilt)
    method.train()
    result: dict[str, Any] = {}
    if weight:
        means = {name: value / weight for name, value in sums.items()}
        trivial = {name: value for name, value in means.items() if name != "model"}
        result = {f"mae/{name}": value for name, value in means.items()}
        result["mae/ratio_best"] = means["model"] / min(trivial.values())
        result |= {f"mae/ratio_{name}": means["model"] / value for name, value in trivial.items()}
    for name, values in scores.items():
        horizon = torch.stack(values).mean(0)
        result[name] = float(horizon.mean())
        result[f"{name}_horizon"] = [round(x, 4) for x in horizon.tolist()]
    return result
