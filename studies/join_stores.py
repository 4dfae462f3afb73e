"""Join clip stores of one recipe into a new store, for pre-training on videos of several environments.

    python studies/join_stores.py OUT STORE [STORE ...]

Actions, rewards and masks stay behind, because environments differ in their sizes; pre-training does not read them. The id
of a clip begins with the name of its store.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from localmotion.video.store import ClipStore, ClipStoreWriter

SHARD_CLIPS = 32


def join(out: Path, stores: list[Path]) -> int:
    """Write the clips of all stores to ``out``. Returns their number. Raises ValueError if two recipes differ."""
    opened = [ClipStore(path) for path in stores]
    first = opened[0]
    if wrong := next((store for store in opened if store.recipe_hash != first.recipe_hash), None):
        raise ValueError(f"{wrong.path}: has another recipe than {first.path}")
    writer = ClipStoreWriter.open(out, first.size, first.recipe, first.recipe_hash, first.tracks, SHARD_CLIPS)
    places = [(store, number) for store in opened for number in range(len(store))]
    for shard, start in enumerate(range(0, len(places), SHARD_CLIPS)):
        chosen = [(store.path.name, store.clip(number)) for store, number in places[start : start + SHARD_CLIPS]]
        writer.write_shard(shard, [replace(clip, id=f"{name}/{clip.id}", extra={}) for name, clip in chosen], [])
    return len(places)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("stores", type=Path, nargs="+")
    args = parser.parse_args()
    print(f"{join(args.out, args.stores)} clips in {args.out}")


if __name__ == "__main__":
    main()
