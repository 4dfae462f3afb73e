"""List files: every layout people have, and clear words for what is wrong."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from localmotion.errors import VideoError
from localmotion.perception.extract import extract_folder
from localmotion.recipe import Recipe
from localmotion.video import ClipStore, VideoRef, find_videos
from localmotion.video.scan import scan
from localmotion.video.store import check_id
from property_examples import examples
from video_files import encode, moving_square, save_pictures


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def reason(root: Path, list_file: Path | None = None) -> VideoError:
    with pytest.raises(VideoError) as caught:
        find_videos(root, list_file)
    assert caught.value.detail.isprintable()
    return caught.value


def write_list(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_list_files_name_stems_paths_and_frame_folders(tmp_path: Path) -> None:
    touch(tmp_path / "v/100.webm", tmp_path / "v/200.webm", tmp_path / "v/300.webm", tmp_path / "v/my clip.mp4")
    save_pictures(tmp_path / "v/400", moving_square(3))
    listed = write_list(tmp_path / "train.txt", "400 3 7", "", "100\t45   93", "v/200.webm 30 push", "my clip 12 -1")
    found = find_videos(tmp_path, listed)
    assert [(ref.id, ref.frames_hint, ref.label) for ref in found] == [
        ("v/100.webm", 45, 93),
        ("v/200.webm", 30, "push"),
        ("v/400", 3, 7),
        ("v/my clip.mp4", 12, -1),
    ]
    assert [ref.kind for ref in found] == ["file", "file", "frames", "file"]


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (["no0 45 1", "no1 3 1", "no2 3 1"], ["3 of 3", "'no0', 'no1', 'no2'"]),
        (["../100 45 1"], ["1 of 1", "'../100'"]),
        (["100 45"], ["line 1"]),
        (["100 many 1"], ["line 1"]),
        (["100 45 1", "v/100.webm 45 1"], ["line 2", "twice"]),
        (["300 45 1"], ["line 1", "v/300.mp4", "v/300.webm"]),
    ],
)
def test_bad_lists_are_refused_with_what_is_wrong(tmp_path: Path, lines: list[str], told: list[str]) -> None:
    touch(tmp_path / "v/100.webm", tmp_path / "v/300.webm", tmp_path / "v/300.mp4")
    error = reason(tmp_path, write_list(tmp_path / "list.txt", *lines))
    assert error.reason == "bad_list"
    assert all(text in error.detail for text in told), error.detail


def test_unreadable_lists(tmp_path: Path) -> None:
    touch(tmp_path / "100.webm")
    assert reason(tmp_path, tmp_path / "nowhere.txt").reason == "missing"
    assert reason(tmp_path, write_list(tmp_path / "empty.txt", "")).reason == "empty"
    (tmp_path / "binary.txt").write_bytes(np.random.default_rng(0).bytes(100))
    assert reason(tmp_path, tmp_path / "binary.txt").reason == "bad_list"


Found = dict[str, tuple[int | str | None, int | None]]


def labels(root: Path, list_file: Path) -> Found:
    """Label and length of those that are there."""
    return {ref.id: (ref.label, ref.frames_hint) for ref in find_videos(root, list_file) if not ref.fault}


def missing(root: Path, list_file: Path) -> dict[str, str]:
    found = [ref for ref in find_videos(root, list_file) if ref.fault]
    assert all(ref.fault and ref.fault[0] == "missing" for ref in found)
    return {ref.id: ref.fault[1] for ref in found if ref.fault}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lists") / "videos"
    touch(root / "100.webm", root / "sub/200.webm", root / "ab c.mp4", root / "x_000004_000014.mp4", root / "y,z.avi")
    save_pictures(root / "300", moving_square(2))
    return root


ENTRIES = [
    {"id": "100", "label": "holding potato", "template": "Holding [something]", "placeholders": ["potato"]},
    {"id": "200", "label": "pushing a cup", "template": "Pushing [something] from left to right", "placeholders": ["a cup"]},
    {"id": "400", "label": "holding a cup", "template": "Holding [something]", "placeholders": ["a cup"]},
]
TEXTS: dict[str, tuple[str, Found]] = {
    "plain ids": (
        "100\nsub/200.webm\n300\nab c\ny,z\n",
        dict.fromkeys(("100.webm", "sub/200.webm", "300", "ab c.mp4", "y,z.avi"), (None, None)),
    ),
    "paths and classes": (
        "100.webm 4\nsub/200.webm 5\nab c.mp4 0\n",
        {"100.webm": (4, None), "sub/200.webm": (5, None), "ab c.mp4": (0, None)},
    ),
    "header": (
        'Video-ID,n_frames,Label\n100,45,push\n200,12,"pull, slowly"\n',
        {"100.webm": ("push", 45), "sub/200.webm": ("pull, slowly", 12)},
    ),
    "semicolons": ("label;path\n7;./sub/200.webm\n", {"sub/200.webm": (7, None)}),
    "tabs": ("id\tclass\nab c\tpush it\n", {"ab c.mp4": ("push it", None)}),
    "one column": ("video_id\n100\n", {"100.webm": (None, None)}),
    "no header": (
        "100;Holding something\n200;Pushing it, hard\n",
        {"100.webm": ("Holding something", None), "sub/200.webm": ("Pushing it, hard", None)},
    ),
    "no header, lengths": ("100,45,3\n200,12,4\n", {"100.webm": (3, 45), "sub/200.webm": (4, 12)}),
    "kinetics": (
        "label,youtube_id,time_start,time_end,split\nabseiling,x,4,14,train\nyoga,100,3,13,train\n",
        {"x_000004_000014.mp4": ("abseiling", None), "100.webm": ("yoga", None)},
    ),
    "other slashes": ("sub\\200.webm 12 1\n", {"sub/200.webm": (1, 12)}),
    "below the folder's name": ("videos/sub/200.webm 12 1\nvideos/300/ 2 1\n", {"sub/200.webm": (1, 12), "300": (1, 2)}),
    "json ids": ('["100", 200]', {"100.webm": (None, None), "sub/200.webm": (None, None)}),
    "json objects": (
        '[{"id": 100}, {"video_id": "200", "label": 3, "num_frames": 12}]',
        {"100.webm": (None, None), "sub/200.webm": (3, 12)},
    ),
    "json classes": ('{"100": "push", "200": "7"}', {"100.webm": ("push", None), "sub/200.webm": (7, None)}),
    "json kinetics": (
        '{"100": {"annotations": {"label": "yoga", "segment": [3, 13]}, "url": "https://x"}}',
        {"100.webm": ("yoga", None)},
    ),
    "json database": ('{"version": 1, "database": {"100": {"subset": "train", "class": 2}}}', {"100.webm": (2, None)}),
    "json lines": (
        '{"path": "100.webm", "label": 1}\n{"path": "sub/200.webm", "label": 2}\n',
        {"100.webm": (1, None), "sub/200.webm": (2, None)},
    ),
    "json templates": (
        json.dumps(ENTRIES),
        {"100.webm": ("Holding something", None), "sub/200.webm": ("Pushing something from left to right", None)},
    ),
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("form", ["utf-8", "bom", "utf-16", "crlf"])
def test_lists_of_every_layout_are_read(tmp_path: Path, root: Path, name: str, form: str) -> None:
    text, want = TEXTS[name]
    listed = tmp_path / "list.txt"
    text = text.replace("\n", "\r\n") if form == "crlf" else text
    listed.write_bytes(text.encode({"bom": "utf-8-sig", "utf-16": "utf-16"}.get(form, "utf-8")))
    frames = {"300": 2}  # a folder's own number where the list has none
    assert labels(root, listed) == {key: (label, length or frames.get(key)) for key, (label, length) in want.items()}


def test_the_lists_of_something_something(tmp_path: Path, root: Path) -> None:
    train, test = tmp_path / "something-something-v2-train.json", tmp_path / "something-something-v2-test.json"
    train.write_text(json.dumps(ENTRIES))
    test.write_text(json.dumps([{"id": "100"}, {"id": "200"}]))
    numbers = {"Holding something": "49", "Pushing something from left to right": "93", "Nothing": "0"}
    (tmp_path / "something-something-v2-labels.json").write_text(json.dumps(numbers))
    assert labels(root, train) == {"100.webm": (49, None), "sub/200.webm": (93, None)}
    assert missing(root, train) == {"400": f"entry 3 of {train.name}: not below {root}"}
    assert labels(root, test) == {"100.webm": (None, None), "sub/200.webm": (None, None)}
    answers = tmp_path / "test-answers.csv"
    answers.write_text("100;Holding something\n200;Nothing\n")
    (tmp_path / "labels.json").write_text(json.dumps(numbers))
    assert labels(root, answers) == {"100.webm": (49, None), "sub/200.webm": (0, None)}
    answers.write_text("100;Holding something\n200;Something else\n")
    error = reason(root, answers)
    assert (error.reason, "'Something else' is not in labels.json" in error.detail) == ("bad_list", True)
    (tmp_path / "labels.json").write_text('{"100": "of another kind"}')
    assert labels(root, answers)["100.webm"] == ("Holding something", None)
    assert "Nothing" in reason(root, tmp_path / "something-something-v2-labels.json").detail  # classes, not videos


def test_accents_match_however_they_are_composed(tmp_path: Path) -> None:
    composed, apart = (unicodedata.normalize(form, "café/tête.mp4") for form in ("NFC", "NFD"))
    for one, other in ((composed, apart), (apart, composed)):
        folder = tmp_path / str(len(one))
        touch(folder / one)
        listed = tmp_path / "list.txt"
        for name in (one, other, other.rpartition("/")[2], other.removesuffix(".mp4")):
            listed.write_text(f"{name} 9 1\n", encoding="utf-8")
            assert list(labels(folder, listed)) == [one]
    touch(tmp_path / "both" / composed, tmp_path / "both" / apart)
    listed.write_text(f"{apart}\n{composed}\n", encoding="utf-8")
    assert sorted(labels(tmp_path / "both", listed)) == sorted([apart, composed])


def test_absolute_paths_below_the_root_also_through_a_link(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to(root)
    listed = tmp_path / "list.txt"
    listed.write_text(f"{root}/sub/200.webm 12 1\n{tmp_path}/link/100 45 2\n{tmp_path}/elsewhere/9.mp4 1 1\n")
    assert labels(tmp_path / "link", listed) == {"sub/200.webm": (1, 12), "100.webm": (2, 45)}
    monkeypatch.chdir(root.parent)
    assert missing(Path("videos"), listed).keys() == {
        f"{tmp_path}/link/100".lstrip("/"),
        f"{tmp_path}/elsewhere/9.mp4".lstrip("/"),
    }


def test_missing_videos_are_rows_that_cost_the_others_nothing(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    encode(tmp_path / "in/good.mp4", moving_square(30))
    listed = tmp_path / "list.txt"
    listed.write_text("good 30 1\n../good.mp4 9 2\n/etc/passwd 3 3\ngood.avi 3 4\n.. 3 4\n")
    want = {"etc/passwd": "missing", "good.avi": "missing", "good.mp4": "", "good.mp4 (line 2)": "missing", "line 5": "missing"}
    report = scan(tmp_path / "in", list_file=listed, workers=0)
    assert {video.id: video.reason for video in report.videos} == want
    details = {video.id: video.detail for video in report.rejected}
    assert details["etc/passwd"] == f"line 3 of list.txt: not below {tmp_path / 'in'}"
    assert details["good.avi"].endswith("; good.mp4 exists; if you mean that file, list it instead")
    recipe = Recipe(size=32, percept_size=32, tracks=4, redraw_rounds=0)
    extract_folder(tmp_path / "in", tmp_path / "store", recipe, list_file=listed, workers=0)
    store = ClipStore(tmp_path / "store")
    assert list(store.ids) == ["good.mp4"]
    assert {entry["id"]: entry["reason"] for entry in store.rejected} == {name: why for name, why in want.items() if why}


def test_an_exact_id_wins_over_one_without_extension(tmp_path: Path) -> None:
    save_pictures(tmp_path / "in/100", moving_square(2))
    touch(tmp_path / "in/100.mp4", tmp_path / "in/200.zip", tmp_path / "in/200.mp4")
    listed = write_list(tmp_path / "list.txt", "100 2 1", "100.mp4 9 2", "200 9 3")
    assert labels(tmp_path / "in", listed) == {"100": (1, 2), "100.mp4": (2, 9), "200.mp4": (3, 9)}


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.json", '[{"id": "100"', ["is not JSON"]),
        ("a.json", "[" * 100_000, ["is not JSON"]),
        ("a.json", '[["100"]]', ["entry 1 is neither"]),
        ("a.json", '[{"label": 1}]', ["entry 1 has no id"]),
        ("a.json", '[{"id": "100", "label": ["a"]}]', ["entry 1", "label"]),
        ("a.json", '[{"id": "100"}, {"id": 100}]', ["entry 2", "twice"]),
        ("a.json", '[{"id": "no\\ud800"}, {"id": "\\u0000"}]', ["2 of 2"]),
        ("a.csv", "id,label\n100,1,2\n", ["line 2 has 3 columns, the header 2"]),
        ("a.csv", "id,label\n,1\n", ["line 2 has no id"]),
        ("a.csv", "100,1,2,3\n200,1,2,3\n", ["line 1 has 4 columns", "header"]),
        ("a.csv", 'id,label\n100,"' + "x" * 200_000 + '"\n', ["field"]),
        ("a.txt", "100\n200 12\n", ["line 2"]),
        ("a.txt", "no1\nno1\n", ["line 2", "twice"]),
    ],
)
def test_lists_that_cannot_be_read_name_the_place(tmp_path: Path, root: Path, name: str, text: str, told: list[str]) -> None:
    (tmp_path / name).write_text(text)
    error = reason(root, tmp_path / name)
    assert error.reason == "bad_list"
    assert all(part in error.detail for part in told), error.detail


def test_lists_that_are_no_files_or_too_large_are_refused(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    assert reason(root, tmp_path / "pipe.txt").reason == "bad_list"
    assert reason(root, tmp_path).reason == "missing"
    monkeypatch.setattr("localmotion.video.lists.MAX_LIST", 10)
    error = reason(root, write_list(tmp_path / "list.txt", "100 45 1", "200 12 1"))
    assert (error.reason, "more than" in error.detail) == ("bad_list", True)


def test_text_that_only_begins_like_json_is_text(tmp_path: Path) -> None:
    touch(tmp_path / "in/[red] a.mp4")
    assert labels(tmp_path / "in", write_list(tmp_path / "list.txt", "[red] a.mp4 9 1")) == {"[red] a.mp4": (1, 9)}
    assert labels(tmp_path / "in", write_list(tmp_path / "list.txt", "[red] a")) == {"[red] a.mp4": (None, None)}
    assert isinstance(find_videos(tmp_path / "in")[0], VideoRef)


@examples(150, HealthCheck.function_scoped_fixture)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.text(alphabet='1a\n\t,; "[]{}:\\\0é', max_size=80).map(str.encode),
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["id", "label", "template", "100"]), inner)
            ),
            max_leaves=12,
        ).map(lambda value: json.dumps(value).encode()),
    )
)
def test_lists_of_any_bytes_are_read_or_refused_in_one_line(tmp_path: Path, root: Path, content: bytes) -> None:
    (tmp_path / "list.json").write_bytes(content)
    found: list[VideoRef] = []
    refused = None
    try:
        found = find_videos(root, tmp_path / "list.json")
    except VideoError as error:
        refused = error
    assert refused is None or (refused.reason in ("bad_list", "empty") and refused.detail.isprintable())
    assert len({ref.id for ref in found}) == len(found)
    for ref in found:
        check_id(ref.id)
