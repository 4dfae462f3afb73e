"""CoTracker3 against a local torch.hub repository, written by the test, whose tracker reads the truth off the pictures."""

from __future__ import annotations

import gc
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from localmotion.errors import ConfigError, LocalmotionError
from localmotion.perception import _neural, cotracker
from localmotion.perception.base import TrackBackend
from localmotion.perception.cotracker import CoTracker3, LicenceWarning

torch.set_num_threads(1)

HUBCONF = '''
import torch


class Core(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(2))


class StandInPredictor(torch.nn.Module):
    """The picture says where everything is: red and green of pixel (0, 0) are the displacement, blue the visibility.

    Each prediction away from its query frame is off by `error` pixels in x, as a tracker's is.
    """

    def __init__(self):
        super().__init__()
        self.model, self.error, self.log = Core(), 0.0, []

    def forward(self, video, queries=None, segm_mask=None, grid_size=0, grid_query_frame=0, backward_tracking=False):
        assert video.dtype == queries.dtype == torch.float32 and video.ndim == 5 and queries.ndim == 3
        assert not self.training and torch.is_inference_mode_enabled()
        batch, length, three, height, width = video.shape
        assert batch == len(queries) and three == 3 and video.max() > 1
        time = queries[..., 0].long()
        assert (time >= 0).all() and (time < length).all()
        self.log.append((length, *time.tolist()))
        points = queries[..., 1:][:, None].expand(batch, length, -1, 2)
        points = points.view(batch * length, -1, 2).view(batch, length, -1, 2)  # as the real code does
        place = video[:, :, :2, 0, 0] - 128  # (B, T, 2)
        begin = place.gather(1, time[..., None].expand(-1, -1, 2))  # (B, N, 2)
        tracks = points + place[:, :, None] - begin[:, None]
        away = torch.arange(length)[None, :, None] != time[:, None]
        tracks = tracks + away[..., None] * (torch.tensor([self.error, 0.0]) + self.model.bias)
        return tracks, (video[:, :, 2, 0, 0] > 100)[..., None] | ~away


def cotracker3_offline(*, pretrained=True, **kwargs):
    assert not pretrained, "the repository's own loading unpickles a download"
    torch.manual_seed(0)  # the real code does it on import
    return StandInPredictor()
'''


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    folder = tmp_path / "co-tracker"
    folder.mkdir()
    (folder / "hubconf.py").write_text(HUBCONF)
    monkeypatch.setattr(cotracker, "_warned", set())

    def build(**options: Any) -> CoTracker3:
        _neural._networks.clear()  # each stand-in keeps a log of its own
        local = {"source": "local", "repository": str(folder), "weights": "random", "accept_licence": True}
        return CoTracker3(**{**local, "device": "cpu", **options})

    return build


def film(places: np.ndarray, visible: np.ndarray | None = None, size: int = 96) -> np.ndarray:
    """(T, S, S, 3) frames for the stand-in from (T, 2) integer displacements."""
    frames = np.zeros((len(places), size, size, 3), np.uint8)
    frames[:, 0, 0, :2] = places + 128
    frames[:, 0, 0, 2] = 255 if visible is None else np.where(visible, 255, 0)
    frames[:, 1, 1, 0] = np.arange(len(frames))  # no two frames alike
    return frames


def walk(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-15, 16, (length, 2))


POINTS = np.float32([[40, 41], [50, 30], [33.5, 60.25]])


def test_track_follows_from_the_start_frame(hub):
    places = walk(12)
    backend = hub()
    xy, seen = backend.track(film(places), POINTS, start=3)
    assert xy.shape == (12, 3, 2)
    assert (xy.dtype, seen.dtype) == (np.float32, np.bool_)
    np.testing.assert_allclose(xy[3:], POINTS + (places[3:] - places[3])[:, None], atol=1e-5)
    np.testing.assert_array_equal(xy[:3], np.broadcast_to(POINTS, (3, 3, 2)))
    assert not seen[:3].any()
    assert seen[3:].all()
    assert backend._predictor.log == [(9, [0, 0, 0])]
    assert isinstance(backend, TrackBackend)
    assert not backend.causal


def test_track_hides_what_is_occluded_or_outside(hub):
    places = np.array([[0, 0], [60, 0], [0, 0], [0, -60], [1, 1]])
    xy, seen = hub().track(film(places, np.array([1, 1, 0, 1, 1])), POINTS[:1])
    np.testing.assert_array_equal(seen[:, 0], [True, False, False, False, True])
    np.testing.assert_allclose(xy[1, 0], [100, 41])


def test_clips_of_as_many_frames_and_points_are_tracked_in_one_pass(hub):
    """... and each as by itself."""
    clips = [(film(walk(6, seed), np.arange(6) != 2), POINTS + seed) for seed in range(5)]
    others = [
        (film(walk(6, 7)), POINTS[:1]),
        (film(walk(4, 8)), POINTS),
        (film(walk(1, 9)), POINTS),
        (film(walk(5, 1)), POINTS[:0]),
    ]
    long = (film(walk(9, 3)), POINTS)
    outside = (film(walk(6, 2)), POINTS + 60)
    backend = hub(batch=3, window=2, max_frames=8)
    asked = [clips[0], *others, *clips[1:], long, outside]
    found = backend.tracks(asked)
    assert [len(times) - 1 for times in sorted(backend._predictor.log, key=len)] == [1, 1, 1, 1, 3, 3]
    for (xy, seen), clip in zip(found, asked, strict=True):
        alone = backend.track(*clip)
        np.testing.assert_array_equal(xy, alone[0])
        np.testing.assert_array_equal(seen, alone[1])
    assert not found[-1][1][0].all()
    assert backend.tracks([]) == []
    with pytest.raises(ValueError, match="finite"):
        backend.tracks([(clips[0][0], POINTS * np.nan)])


def test_track_of_little(hub):
    backend = hub()
    xy, seen = backend.track(film(walk(1)), POINTS)
    np.testing.assert_array_equal(xy[0], POINTS)
    assert seen.all()
    xy, seen = backend.track(film(walk(5)), POINTS[:0])
    assert xy.shape == (5, 0, 2)
    assert seen.shape == (5, 0)
    assert backend._predictor.log == []
    with pytest.raises(ValueError, match="outside the 5 frames"):
        backend.track(film(walk(5)), POINTS, start=5)
    with pytest.raises(ValueError, match="finite"):
        backend.track(film(walk(5)), POINTS * np.nan)


@pytest.mark.parametrize("max_frames", [2, 3, 8, 29, 30])
def test_long_clips_are_tracked_in_overlapping_pieces(hub, max_frames):
    places = walk(30)
    backend = hub(window=2, max_frames=max_frames)
    xy, seen = backend.track(film(places), POINTS, start=1)
    np.testing.assert_allclose(xy[1:], POINTS + (places[1:] - places[1])[:, None], atol=1e-4)
    assert seen[1:].all()
    assert max(length for length, _ in backend._predictor.log) <= max_frames


def test_pieces_are_joined_where_the_point_was_seen(hub):
    visible = np.ones(12, bool)
    visible[[3, 4, 5]] = False
    backend = hub(window=2, max_frames=8)
    backend._predictor.error = 0.5
    places = np.zeros((12, 2), int)
    xy, _ = backend.track(film(places, visible), POINTS)
    # The second piece starts at frame 4; frames 4 and 5 are occluded, so its queries are in frame 6, its third.
    assert backend._predictor.log == [(8, [0, 0, 0]), (8, [2, 2, 2])]
    np.testing.assert_allclose(xy[:, 0, 0] - 40, [0] + [0.5] * 7 + [1.0] * 4)


def run_stream(backend: CoTracker3, frames: np.ndarray, points: np.ndarray) -> np.ndarray:
    positions = [points]
    for previous, current in itertools.pairwise(frames):
        points, seen = backend.step(previous, current, points)
        assert seen.dtype == np.bool_
        positions.append(points)
    return np.stack(positions)


def test_streaming_agrees_with_the_clip_form(hub):
    frames = film(walk(25))
    np.testing.assert_allclose(run_stream(hub(), frames, POINTS), hub().track(frames, POINTS)[0], atol=1e-4)


def test_streaming_errors_add_up_once_a_window_not_once_a_frame(hub):
    frames = film(np.zeros((31, 2), int))
    drift = {}
    for window in (2, 16, 31):
        backend = hub(window=window)
        backend._predictor.error = 0.1
        drift[window] = run_stream(backend, frames, POINTS)[-1, 0, 0] - 40
        assert max(length for length, _ in backend._predictor.log) == window
    assert drift[2] == pytest.approx(3.0, abs=1e-3)
    assert drift[16] == pytest.approx(0.2, abs=1e-3)
    assert drift[31] == pytest.approx(0.1, abs=1e-3)


def test_streaming_takes_redrawn_points_in_any_slot(hub):
    places = walk(6, 1)
    frames = film(places)
    backend = hub()
    points = POINTS
    for t in range(3):
        points, _ = backend.step(frames[t], frames[t + 1], points)
    points = points.copy()
    points[1] = (20, 70)
    after, _ = backend.step(frames[3], frames[4], points)
    assert backend._predictor.log[-1] == (5, [0, 3, 0])  # the new point is queried where it was drawn
    np.testing.assert_allclose(after, points + places[4] - places[3], atol=1e-5)
    kept = after[[2, 0]]  # fewer points, other slots: still the same tracks
    backend.step(frames[4], frames[5], kept)
    assert backend._predictor.log[-1] == (6, [0, 0])


def test_streaming_anchors_where_the_point_was_seen(hub):
    visible = np.array([1, 0, 0, 1, 1, 1], bool)
    frames = film(np.zeros((6, 2), int), visible)
    backend = hub(window=4)
    run_stream(backend, frames, POINTS[:1])
    # Buffers end in frame 1, 2, 3, 4, 5 and begin in 0, 0, 0, 1, 2: frame 3 is the first seen one of the last two.
    assert backend._predictor.log == [(2, [0]), (3, [0]), (4, [0]), (4, [2]), (4, [1])]
    blind = hub(window=2)
    frames = film(np.zeros((4, 2), int), np.array([1, 0, 0, 0], bool))
    run_stream(blind, frames, POINTS[:1])  # nothing seen in the window: the position given is all there is
    assert blind._predictor.log == [(2, [0])] * 3


def test_one_backend_serves_several_streams_and_resets(hub):
    alone = [run_stream(hub(), film(walk(9, seed)), POINTS) for seed in (1, 2)]
    films = [film(walk(9, seed)) for seed in (1, 2)]
    backend = hub(streams=2)
    points = [POINTS, POINTS]
    for t in range(8):
        for i in (0, 1):
            points[i], _ = backend.step(films[i][t], films[i][t + 1], points[i])
            np.testing.assert_allclose(points[i], alone[i][t + 1], atol=1e-5)
    assert backend._predictor.log[-1] == (9, [0, 0, 0])
    backend.step(films[0][0], films[0][1], POINTS)  # an episode begins anew
    assert backend._predictor.log[-1] == (2, [0, 0, 0])
    assert len(backend._streams) == 2
    backend.reset()
    assert backend._streams == []


def test_streaming_survives_buffers_that_are_reused_and_points_that_are_rescaled(hub):
    frames = film(walk(8))
    backend = hub()
    previous, current, points = frames[0].copy(), frames[0].copy(), POINTS
    for t in range(7):
        previous[:], current[:] = frames[t], frames[t + 1]
        points, _ = backend.step(previous, current, points)
        points = (points / np.float32(3)) * np.float32(3)
        np.testing.assert_allclose(points, POINTS + walk(8)[t + 1] - walk(8)[0], atol=1e-4)
    assert backend._predictor.log[-1] == (8, [0, 0, 0])


def test_a_known_frame_with_none_of_its_points_begins_a_stream(hub):
    frames = film(walk(4))
    backend = hub()
    run_stream(backend, frames[:3], POINTS)
    backend.step(frames[2], frames[3], POINTS + 25)
    assert backend._predictor.log[-1] == (2, [0, 0, 0])


def test_backends_share_the_network_but_not_the_streams(hub, tmp_path):
    first = hub()
    folder = {"source": "local", "repository": str(tmp_path / "co-tracker"), "weights": "random"}
    second = CoTracker3(**folder, accept_licence=True, device="cpu", window=4)
    assert second._predictor is first._predictor
    frames = film(walk(4))
    run_stream(first, frames, POINTS)
    run_stream(second, frames, POINTS)
    assert [length for length, _ in first._predictor.log] == [2, 3, 4] * 2
    key = next(iter(_neural._networks))
    del first, second
    gc.collect()
    assert key not in _neural._networks


def test_positions_that_are_not_finite_are_an_error(hub):
    backend = hub()
    backend._predictor.error = math.inf
    with pytest.raises(LocalmotionError, match="not finite"):
        backend.track(film(walk(3)), POINTS)


def test_licence_is_said_once_unless_accepted(hub):
    with pytest.warns(LicenceWarning, match="CC-BY-NC-4.0"):
        hub(accept_licence=False)
    hub(accept_licence=False)  # warnings are errors here: a second one would fail
    assert issubclass(LicenceWarning, UserWarning)
    assert CoTracker3.licence == "CC-BY-NC-4.0"


def test_licence_accepted_is_silent(hub):
    hub(accept_licence=True)
    with pytest.warns(LicenceWarning):
        hub(accept_licence=False)


def test_cotracker_loading_leaves_the_random_generator_alone(hub):
    torch.manual_seed(11)
    expected = torch.rand(2)
    torch.manual_seed(11)
    hub()
    assert torch.equal(torch.rand(2), expected)


def test_cotracker_weights(hub, tmp_path, monkeypatch):
    state = {"bias": torch.tensor([0.25, -0.5])}
    torch.save(state, tmp_path / "plain.pth")
    torch.save({"model": state}, tmp_path / "nested.pth")
    save_file(state, tmp_path / "safe.safetensors")
    frames = film(np.zeros((2, 2), int))
    for name in ("plain.pth", "nested.pth", "safe.safetensors"):
        xy, _ = hub(weights=str(tmp_path / name)).track(frames, POINTS)
        np.testing.assert_allclose(xy[1], POINTS + np.float32([0.25, -0.5]))
    with pytest.raises(LocalmotionError, match="SHA-256"):
        hub(weights=str(tmp_path / "plain.pth"), sha256="0123abcd")
    with pytest.raises(LocalmotionError, match="does not exist"):
        hub(weights=str(tmp_path / "none.pth"))
    torch.save({"other": torch.zeros(1)}, tmp_path / "wrong.pth")
    with pytest.raises(LocalmotionError, match="scaled_offline"):
        hub(weights=str(tmp_path / "wrong.pth"))
    torch.save({"bias": Path("object")}, tmp_path / "object.pth")
    with pytest.raises(LocalmotionError, match="reading weights"):
        hub(weights=str(tmp_path / "object.pth"))

    asked: list[Any] = []

    def fetch(url: str, **options: Any) -> dict[str, torch.Tensor]:
        asked.append((url, options))
        return state

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    hub(weights="official")
    assert asked == [(cotracker.WEIGHTS_URL, {"map_location": "cpu", "weights_only": True})]


def test_cotracker_code_is_fetched_at_the_pinned_commit(hub, monkeypatch):
    asked: list[Any] = []

    def load(repository: str, model: str, **options: Any) -> Any:
        asked.append((repository, model, options))
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load", load)
    with pytest.raises(LocalmotionError, match=r"no network.*source=local"):
        CoTracker3(accept_licence=True, device="cpu")
    ((repository, model, options),) = asked
    assert repository.startswith("facebookresearch/co-tracker:82e02e80")
    assert model == "cotracker3_offline"
    assert options["source"] == "github"
    assert options["pretrained"] is False


def test_cotracker_options(hub, tmp_path):
    with pytest.raises(LocalmotionError, match=r"no hubconf\.py"):
        hub(repository=str(tmp_path))
    for options in ({"window": 1}, {"window": 61}, {"streams": 0}, {"batch": 0}, {"source": "ftp"}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            hub(**options)
