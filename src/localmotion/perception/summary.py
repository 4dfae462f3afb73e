"""Summary of an extraction, for people and for scripts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from localmotion.perception.stream import Magnitudes
from localmotion.video.listing import VideoRef, shown
from localmotion.video.shards import write_atomic
from localmotion.video.store import ClipStore, reasons, write_error
from localmotion.video.writer import ClipStoreWriter

_WHY = {
    "changed": "whose file or place in the folder changed",
    "limits": "that the new limits cut in another way",
    "machine": "rejected before for time or memory",
}


MIXED = 1.1
"""Frame rates count as mixed above this ratio of the highest to the lowest."""


@dataclass
class ExtractSummary:
    """Summary of an extraction. Lists hold ids of videos."""

    store: Path
    clips: int = 0
    frames: int = 0
    new: int = 0
    """Clips made by this call."""
    seconds: float = 0.0
    usable: int = 0
    """Videos of the folder that the store holds."""
    rejected: dict[str, int] = field(default_factory=dict)
    """Videos of the folder that were rejected, by reason."""
    rejections: list[dict[str, str]] = field(default_factory=list)
    """id, reason and detail of each of them."""
    again: dict[str, str] = field(default_factory=dict)
    """Videos that this extraction processes again, by reason: changed, limits or machine."""
    vanished: list[str] = field(default_factory=list)
    """Videos with clips in the store that are no longer in the folder (or list)."""
    relabeled: list[str] = field(default_factory=list)
    """Videos whose clips keep a label that differs from the list."""
    left_out: int = 0
    """Frames in no clip, because the rest of their video is shorter than `min_frames`."""
    left_out_of: int = 0
    """Number of videos with such frames."""
    limited: list[str] = field(default_factory=list)
    """Videos with frames after their last clip, because of `max_clips`."""
    cut_before: list[str] = field(default_factory=list)
    """Videos of which an earlier version stored only the first clip."""
    elsewhere: list[int] = field(default_factory=list)
    """Shards that other processes are still writing."""
    flow: dict[str, float] = field(default_factory=dict)
    rates: list[float] = field(default_factory=list)
    """Lowest and highest frames per second, if they are mixed and the recipe has no `fps`."""
    varying: int = 0
    """Clips of variable frame rate, if the recipe has no `fps`."""
    repeating: int = 0
    """Clips with repeated frames, because their videos have fewer than the recipe's `fps`."""
    notes: list[str] = field(default_factory=list)
    """What the reader of a data set says about it."""

    def lines(self) -> list[str]:
        """Printable lines."""
        rate = f", {self.new} new in {self.seconds:.0f} s ({self.new / self.seconds:.1f} clips/s)" if self.new else ""
        out = [f"{self.clips} clips, {self.frames:,} frames in {self.store}{rate}", *(f"  {note}" for note in self.notes)]
        for reason, number in sorted(self.rejected.items()):
            first = [entry["id"] for entry in self.rejections if entry["reason"] == reason]
            out.append(f"  rejected {number}: {reason} ({_first(first)})")
        for why, text in _WHY.items():
            if names := [name for name, reason in self.again.items() if reason == why]:
                out.append(f"  done again {len(names)} {text}: {_first(names)}")
        if self.left_out:
            out.append(
                f"  left out {self.left_out:,} frames at the ends of {self.left_out_of} videos, rests shorter than --min-frames"
            )
        notes = {
            "left out the rest, --max-clips": self.limited,
            "stored by an earlier version up to their first clip (extract them into a new folder to have all)": self.cut_before,
            "no longer in the folder or list, their clips stay": self.vanished,
            "keep the label of an earlier list": self.relabeled,
        }
        out += [f"  {len(names)} videos: {text}: {_first(names)}" for text, names in notes.items() if names]
        mixed = [f"rates {round(self.rates[0], 1):g} to {round(self.rates[1], 1):g} fps are mixed"] if self.rates else []
        mixed += [f"clips of variable frame rate: {self.varying}"] if self.varying else []
        if mixed:
            out.append(f"  {', '.join(mixed)}; --fps N makes one time step the same time in all videos")
        if self.repeating:
            out.append(f"  clips with repeated frames: {self.repeating}; their videos have fewer than --fps asks for")
        if self.elsewhere:
            out.append(f"  {len(self.elsewhere)} shards are still being written by other processes")
        if not self.flow:
            return out
        values = ", ".join(f"{key} {value:.3f}" for key, value in self.flow.items())
        return [*out, f"flow magnitude in pixels of a stored frame: {values}"]

    def why_rejected(self) -> str:
        """The reasons with their counts, on one line, and the detail of the first video."""
        if not self.rejections:
            return "no reason was recorded"
        return f"{reasons(self.rejections)}; the first: {shown(self.rejections[0]['detail'])}"

    def fill(self, writer: ClipStoreWriter, refs: Mapping[str, VideoRef]) -> None:
        """Read the figures of the store. The flow distribution of a complete store is also written beside store.json."""
        for name, known in sorted(writer.known().items()):
            here = name in refs
            record = known.record or {}
            if known.reason:
                if here:
                    self.rejected[known.reason] = self.rejected.get(known.reason, 0) + 1
                    self.rejections.append({"id": name, "reason": known.reason, "detail": known.detail})
                continue
            self.usable += here
            self.left_out += record.get("left_out", 0)
            self.left_out_of += record.get("left_out", 0) > 0
            for listed, names in (
                (bool(record.get("more")), self.limited),
                (known.cut_short and not record, self.cut_before),
                (not here, self.vanished),
                (here and refs[name].label not in (None, known.label), self.relabeled),
            ):
                if listed:
                    names.append(name)
        store = ClipStore(self.store, partial=bool(self.elsewhere))
        self.clips, self.frames = len(store), int(store.lengths.sum())
        rates = [info["fps"] for info in store.infos if "fps" in info]
        if rates and not store.recipe.get("fps"):
            if max(rates) > MIXED * min(rates):
                self.rates = [min(rates), max(rates)]
            self.varying = sum(bool(info.get("vfr")) for info in store.infos)
        self.repeating = sum("repeated" in info for info in store.infos)
        if len(store) and not self.elsewhere:
            self.flow = {key: round(value, 6) for key, value in flow_distribution(store).items()}
            try:
                write_atomic(self.store / "flow.json", json.dumps(self.flow, indent=1, sort_keys=True) + "\n")
            except OSError as error:
                raise write_error(self.store, "flow.json", error) from error


def flow_distribution(store: ClipStore, fields: int = 4096) -> dict[str, float]:
    """Mean and quantiles of flow magnitude (pixels of `size`) over at most ``fields`` fields spread evenly over the store."""
    lengths = store.lengths - 1  # the last field of a clip is not motion
    ends = np.cumsum(lengths)
    magnitudes = Magnitudes()
    for number in np.unique(np.linspace(0, int(ends[-1]) - 1, fields).round().astype(np.int64)):
        clip = int(np.searchsorted(ends, number, side="right"))
        at = int(number - (ends[clip] - lengths[clip]))
        magnitudes.add(store.window("flow", clip, at, at + 1))
    return magnitudes.quantiles()


def _first(names: Iterable[str], count: int = 3) -> str:
    names = list(names)
    return ", ".join(map(shown, names[:count])) + (", ..." if len(names) > count else "")
