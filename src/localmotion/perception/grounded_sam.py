"""Grounding DINO and SAM through transformers."""

from __future__ import annotations

from typing import Any, ClassVar

from localmotion.errors import MissingExtraError
from localmotion.perception.base import register


@register("segment", "grounded_sam")
class GroundedSam:
    """Grounding DINO and SAM through transformers."""

    name: ClassVar[str] = "grounded_sam"
    licence: ClassVar[str] = "Apache-2.0"

    def __init__(self, **options: Any) -> None:
        raise MissingExtraError("grounded_sam is not ready yet; use the embedded default")
