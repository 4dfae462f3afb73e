"""CoTracker3 point tracks through torch.hub."""

from __future__ import annotations

from typing import Any, ClassVar

from localmotion.errors import MissingExtraError
from localmotion.perception.base import register


@register("track", "cotracker3")
class CoTracker3:
    """CoTracker3 point tracks through torch.hub."""

    name: ClassVar[str] = "cotracker3"
    licence: ClassVar[str] = "CC-BY-NC-4.0"

    def __init__(self, **options: Any) -> None:
        raise MissingExtraError("cotracker3 is not ready yet; use the embedded default")
