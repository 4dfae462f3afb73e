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
        (
            "decode --help",
            "decode is a stage of bc, laom, lapo, masklam: name the method, e.g. localmotion decode --method masklam --help",
        ),
        ("tokenize", "e.g. localmotion tokenize --method"),
        ("decod --help", "invalid choice: 'decod'"),
        ("decode --method lapo --label 20", "setting label=20: expected str, got int; did you mean labels?"),
        ("decode --method lapo --labels x", "setting labels='x': expected int, got str; did you mean label?"),
        ("decode --method lapo --seed x", "setting seed='x': expected int, got str"),
        ("decode --method lapo --labelz 20", "unknown setting 'labelz'; did you mean label, labels, latent?"),
        ("evaluate r --env-options look=x", """'look=x' is not JSON; write it as '{"look": "textured"}'"""),
        ("evaluate r --env-opt {}", "unknown option of evaluate '--env-opt'; did you mean --env-options, --env, --help?"),
        ("collect toy:dot --out o --backend-options x", "'x' is not JSON; write it as"),
        ("pretrain --method masklam --run r", "pretrain: give the clips with --data STORE (made by localmotion extract VIDEOS"),
    ],
)
def test_the_error_names_the_fix(line: str, said: str, tmp_path: object, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(line.split())
    error = " ".join(capsys.readouterr().err.split())
    assert said in error
    assert ("did you mean" in error) == ("did you mean" in said)
