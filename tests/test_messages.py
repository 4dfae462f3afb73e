"""Mistakes on the command line end in one line that says how to fix them."""

from __future__ import annotations

import pytest

from localmotion.cli import main


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("train --method bc --env toy:dot --run r", "it has decode: begin with localmotion decode --method bc"),
        ("pretrain --method bc --data s --run r", "method bc has no pre-training stage; use localmotion decode"),
        ("pretrain --method dreamer_v2 --data s --run r", "method dreamer_v2 has no pre-training stage; use localmotion train"),
        (
            "decode --method bc --data s --checkpoint c --run r",
            "no pre-training stage; use localmotion decode without --checkpoint",
        ),
        ("pretrain --method masklam --run r", "pretrain: give the clips with --data STORE (made by localmotion extract VIDEOS"),
    ],
)
def test_the_error_names_the_fix(line: str, said: str, tmp_path: object, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(line.split())
    assert said in " ".join(capsys.readouterr().err.split())
