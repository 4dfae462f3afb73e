"""The videos that a user names: a folder, or a LeRobot data set."""

from __future__ import annotations

from pathlib import Path

from localmotion.errors import ConfigError
from localmotion.video.lerobot import PREFIX, DataSet, is_lerobot, read_data_set
from localmotion.video.listing import find_videos
from localmotion.video.lists import select
from localmotion.video.refs import VideoRef


def open_videos(videos: Path, list_file: Path | None = None, camera: str = "") -> tuple[list[VideoRef], DataSet | None]:
    """The videos below a folder or in `lerobot:PATH`, sorted by id, and the data set in the second case.

    ``list_file`` chooses among them, see `find_videos`. Raises what `find_videos` and `read_data_set` raise, and ConfigError for a
    ``camera`` of a folder.
    """
    if is_lerobot(videos):
        data = read_data_set(videos, camera)
        return data.refs if list_file is None else select(data.root, data.refs, Path(list_file)), data
    if camera:
        raise ConfigError(f"--camera {camera}: only a LeRobot data set has cameras, {PREFIX}PATH")
    return find_videos(Path(videos), list_file), None
