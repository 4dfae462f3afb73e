"""SEA-RAFT optical flow through ptlflow."""

from __future__ import annotations

from typing import Any, ClassVar

from localmotion.errors import MissingExtraError
from localmotion.perception.base import register


@register("flow", "sea_raft")
class SeaRaft:
    """SEA-RAFT optical flow through ptlflow."""

    name: ClassVar[str] = "sea_raft"
    licence: ClassVar[str] = "BSD-3-Clause"

    def __init__(self, **options: Any) -> None:
        raise MissingExtraError("sea_raft is not ready yet; use the embedded default")
