"""Commands that have to fail."""

from __future__ import annotations

import pytest

from localmotion.cli import main


def fails(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The error of a command, on one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 2
    return " ".join(capsys.readouterr().err.split())
