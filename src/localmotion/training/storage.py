"""Choose where the replay is stored: on the GPU if it fits, else in memory, else on disk.

The choice is made and printed before a run starts. If the replay fits nowhere, the run is refused.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from localmotion import ranks
from localmotion.config import OnlineConfig
from localmotion.errors import ConfigError
from localmotion.replay import Storage

SHARE = 0.5
"""Maximum share of free memory (CPU or GPU) that the replay may use."""


def available_memory() -> int:
    """Bytes of memory available without swapping, on the machine or within its control group (container, Slurm job)."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = (group / "memory.max").read_text().strip(), int((group / "memory.current").read_text())
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used -= int(counts.get("inactive_file", 0))  # copies of files, which give way
        available = min(available, int(limit) - used) if limit != "max" else available
    except (OSError, ValueError):  # no control groups, or version 1 of them
        pass
    return available


def device_memory(device: torch.device) -> int | None:
    """Free bytes on a GPU, which all its processes share. None for a device without its own memory."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else None


def records_needed(online: OnlineConfig, budget: int, episode: int | None = None) -> int:
    """Number of records in the replay of a run of ``budget`` agent steps.

    An episode has one more record than agent steps. ``episode``: agent steps of an episode that ends at its time limit,
    or None if unknown. If episodes end much earlier, the run produces more records than this. The replay then drops its
    oldest episodes, as it does at `replay_capacity`.
    """
    shortest = max(min(online.length - 1, episode or budget), 1)
    return min(online.replay_capacity, budget + budget // shortest + 1)


def choose_storage(
    online: OnlineConfig,
    budget: int,
    bytes_per_record: int,
    folder: Path,
    on_device: int | None = None,
    episode: int | None = None,
) -> tuple[Storage, str]:
    """Choose where to sample from. Returns the choice and a sentence that describes it.

    ``on_device``: `device_memory` of the device that learns. ``episode``: see `records_needed`. All ranks of a machine have a replay of
    their own, so each counts on its share of the machine's memory and disk.

    With every choice, each complete episode is eventually written to ``folder``. The disk must therefore hold the
    replay and the episodes that left it since the last two checkpoints. Raises ConfigError and names the capacity that
    would fit.
    """
    records = records_needed(online, budget, episode)
    need = records * bytes_per_record
    evicted = 2 * online.save_every if records == online.replay_capacity else 0
    filed = sum(path.stat().st_size for path in folder.glob("episode_*.safetensors")) if folder.exists() else 0
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    here = ranks.local()[1]
    free = shutil.disk_usage(existing).free // here + filed
    what = f"replay: {bytes_per_record / 1e3:.1f} kB a record, at most {records:,} records = {_size(need)}"
    if free < need + evicted * bytes_per_record:
        fits = max(int(free * 0.9 / bytes_per_record) - 2 * online.save_every, 0)
        raise ConfigError(
            f"{what}, {_size(need + evicted * bytes_per_record)} on disk with what its checkpoints keep, but {folder} has"
            f" {_size(free)} free: choose --run on a larger disk, or --online.replay_capacity {fits}"
        )
    asked, memory = online.replay_storage, available_memory() // here
    if asked == "device" and (on_device is None or need > on_device):
        has = "this run's device has no memory of its own" if on_device is None else f"the device has {_size(on_device)} free"
        raise ConfigError(f"{what}, but {has}: use --online.replay_storage auto")
    if asked == "device" or (asked == "auto" and on_device is not None and need <= SHARE * on_device):
        return "device", f"{what}, on the device ({_size(on_device or 0)} free)"
    fits_memory = need <= SHARE * memory
    if asked == "memory" and need > memory:
        raise ConfigError(
            f"{what}, but {_size(memory)} of memory are available: use --online.replay_storage disk (or auto), or"
            f" --online.replay_capacity {int(SHARE * memory / bytes_per_record)}"
        )
    if asked == "disk" or (asked == "auto" and not fits_memory):
        return "disk", f"{what}, sampled from disk ({folder}, {_size(free)} free)"
    return "memory", f"{what}, in memory ({_size(memory)} available)"


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
