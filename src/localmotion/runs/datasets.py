"""Data sets of the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from localmotion.console import say
from localmotion.runs import hub
from localmotion.video.lerobot import PREFIX, camera_of, is_lerobot, read_info


def local_videos(videos: Path, camera: str = "") -> Path:
    """``videos`` as it is, or where a data set of the Hub lies now: `lerobot:owner/name[@revision]` becomes `lerobot:PATH`.

    A folder of that name has priority. Only meta/, data/ and the videos of the ``camera`` are fetched. Raises ConfigError for
    a name that cannot be one, and as `video.lerobot.camera_of`; MissingExtraError without huggingface_hub; else CheckpointError with the
    cause and the fix.
    """
    name = str(videos).removeprefix(PREFIX)
    if not is_lerobot(videos) or Path(name).exists() or name.startswith((".", "/", "~")):
        return videos
    repo, _, revision = name.partition("@")
    root, commit = hub.fetch(repo, revision, ["meta/*"], kind="dataset")
    key = camera_of(read_info(root), root, camera)
    if commit != revision:
        say(f"{PREFIX}{repo}: commit {commit}")
    root, _ = hub.fetch(repo, commit, ["data/*", f"videos/{key}/*", f"videos/*/{key}/*"], kind="dataset")
    return Path(f"{PREFIX}{root}")
