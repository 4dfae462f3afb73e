"""The page and its collection: self-contained, escaped, honest about what is missing, never broken by a bad file."""

from __future__ import annotations

import base64
import html
import json
import math
import pickle
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from localmotion.errors import CheckpointError
from localmotion.report import arrays, build, media, page, plots
from localmotion.report.build import duration, report, seconds_per_update
from localmotion.report.page import Code, Fold, Notice, Picture, Row, Section, Settings, Table, Text, Tiles, Video
from localmotion.report.plots import CurveGroup
from localmotion.report.results import Gathered, averages, differing_settings, group_runs
from localmotion.report.strips import png
from localmotion.runs.read import read_run
from property_examples import examples
from report_runs import base, moving_clip, online_run, pretrain_run, write_lines, write_mp4

VOID = {"meta", "img", "source", "br"}


class Reader(HTMLParser):
    """Checks that tags are balanced and collects tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1] != "style":
            self.text.append(data)

    def said(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.text))


def assert_self_contained(reader: Reader) -> None:
    assert not {tag for tag, _ in reader.tags} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    anchors = {a["id"] for _, a in reader.tags if "id" in a}
    for tag, attributes in reader.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "srcset", "poster"):
            if name in attributes:
                assert (attributes[name] or "").startswith("data:"), tag
        if "href" in attributes:
            assert (attributes["href"] or "")[0] == "#"
            assert (attributes["href"] or "")[1:] in anchors
    policy = [a["content"] for t, a in reader.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    assert len(policy) == 1
    assert "default-src 'none'" in (policy[0] or "")


# --- the page ---------------------------------------------------------------------------------------------------------

PNG = png(np.zeros((2, 3, 3), dtype=np.uint8))


def every_block(text: str) -> list[page.Block]:
    return [
        Text(text),
        Notice(text),
        Code(text),
        Picture(PNG, text, text),
        Video(b"film", text, PNG),
        Table([text, "n"], [["cell " + text, "1"], ["cell " + text, "–"]], text),
        Fold(text, [Settings(text, {text: {"inner": text}, "list": [text]})], text),
        Tiles([(text, text)]),
        Row([Text(text), Notice(text)]),
    ]


@given(st.text(st.characters(exclude_categories=[]), min_size=1, max_size=40))
def test_any_text_is_escaped_everywhere(text: str) -> None:
    made = page.build_page(text, [Section(text, every_block(text))], subtitle=text, footer=text)
    made.encode("utf-8")
    reader = Reader(made)
    plain = Reader(page.build_page("x", [Section("x", every_block("x"))], subtitle="x", footer="x"))
    assert [tag for tag, _ in reader.tags] == [tag for tag, _ in plain.tags]  # text never becomes a tag
    assert [sorted(a) for _, a in reader.tags] == [sorted(a) for _, a in plain.tags]  # nor an attribute
    assert_self_contained(reader)


def test_hostile_text_comes_out_as_text() -> None:
    text = "</title><script>alert(1)</script>\" onload='x' &amp; <b>"
    made = page.build_page(text, [Section(text, every_block(text))])
    assert "<script" not in made
    assert made.count(html.escape(text, quote=True)) >= 12
    assert text in Reader(made).said()


def test_data_uris_hold_the_very_bytes_and_their_type() -> None:
    svg = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><path fill="#0067a8"/></svg>'
    reader = Reader(page.build_page("t", [Section("s", [Picture(PNG, "c"), Picture(svg, "c"), Video(b"mp4 bytes", "v")])]))
    assert_self_contained(reader)
    found = [a[n] for _, a in reader.tags for n in ("src", "srcset") if n in a]
    kinds = [(uri.split(";")[0][5:], base64.b64decode(uri.split(",")[1])) for uri in found if uri]
    assert kinds[0] == ("image/png", PNG)
    assert kinds[1] == ("image/svg+xml", svg.replace(b"#0067a8", b"#4aa8e8"))  # the dark twin
    assert kinds[2] == ("image/svg+xml", svg)
    assert kinds[3] == ("video/mp4", b"mp4 bytes")
    with pytest.raises(ValueError, match="PNG"):
        page.image_type(b"<html>")
    assert page.image_type(b"\xff\xd8\xff\xe0") == "image/jpeg"


def test_numeric_columns_are_set_right_and_ragged_tables_refused() -> None:
    made = page.build_page("t", [Section("s", [Table(["name", "score"], [["a", "1.2K"], ["b", "–"], ["c", "40K to 50K"]])])])
    assert made.count('class="n"') == 4  # header and three cells of one column
    with pytest.raises(ValueError, match="zip"):
        page.build_page("t", [Section("s", [Table(["name", "score"], [["a", "1", "2"]])])])


def test_flatten_gives_dotted_names() -> None:
    assert page.flatten({"a": {"b": 1, "c": {"d": 2}}, "e": {}, "f": [1]}) == {"a.b": 1, "a.c.d": 2, "e": {}, "f": [1]}


# --- the report -------------------------------------------------------------------------------------------------------


def read(path: Path) -> Reader:
    reader = Reader(path.read_text(encoding="utf-8"))
    assert_self_contained(reader)
    return reader


def test_a_full_report_shows_everything(tmp_path: Path) -> None:
    runs = [pretrain_run(tmp_path / "pre")]
    runs += [online_run(tmp_path / f"ft{s}", seed=s, checkpoint="pre", level=600) for s in range(2)]
    runs += [online_run(tmp_path / "mw", env="metaworld:reach", success=True)]
    write_mp4(runs[3] / "media/eval_best.mp4", moving_clip(6, 32))
    out = report(runs, tmp_path / "new" / "report.html")
    assert out == tmp_path / "new" / "report.html"
    reader = read(out)
    said = reader.said()
    for title in (
        "At a glance",
        "Results in dmc:walker_walk",
        "Results in metaworld:reach",
        "Held-out figures of pre-training",
        "Open-loop prediction",
        "Atomic Actions",
        "Masked reconstruction",
        "Embedding of the motion code",
        "Flow magnitudes",
        "Pre-training",
        "Training in the environment",
        "Speed",
        "Runs and settings",
    ):
        assert said.count(title) >= 2, title  # in the contents and as a heading
    assert "Not in this report" not in said
    tags = [tag for tag, _ in reader.tags]
    assert tags.count("video") == 5  # the first and the last film of two groups, and one with a name
    assert "drp, from scratch, seed 0, best." in said
    assert "drp, pre-trained, seed 0, after 50K env steps." in said
    assert tags.count("details") == 4
    assert all(a.get("poster", "").startswith("data:image/png") for t, a in reader.tags if t == "video")
    assert "localmotion pretrain --method drp" in said
    assert "model.dae.mask_ratio" in said
    # The final numbers are those of the files.
    finals = [json.loads((r / "metrics.jsonl").read_text().splitlines()[-1])["return_mean"] for r in runs[1:3]]
    assert f"{np.mean(finals):.0f} ± {np.std(finals):.0f}" in said
    assert "drp, pre-trained 2 50K 20" in said
    assert "random policy – – 20 38.0" in said
    # The held-out ratio is model over the best trivial predictor (nearest time, 0.48).
    line = read_run(runs[0]).last("heldout")
    assert line is not None
    assert f"{line['masked/model'] / 0.48:.2f}" in said
    assert not list(tmp_path.glob("**/*.tmp"))


def evaluated(path: Path, env: str, seed: int, values: list[float], label: str = "DRP", **more: Any) -> Path:
    """An online run with evaluations after 1,000, 2,000, ... env steps."""
    config = {"method": "drp", "stage": "train", "preset": "tiny", "seed": seed, "env": env, "label": label, "checkpoint": ""}
    base(path, config | more)
    lines = [{"kind": "eval", "env_step": 1000.0 * (i + 1), "return_mean": v, "episodes": 2} for i, v in enumerate(values)]
    write_lines(path / "metrics.jsonl", lines)
    return path


def test_curves_are_averaged_over_the_tasks_of_a_suite(tmp_path: Path) -> None:
    """By seed, where every task has a value, and only for labels and seeds that every task has."""
    runs = [
        evaluated(tmp_path / "w0", "planar:walker_run", 0, [10, 20, 30]),
        evaluated(tmp_path / "h0", "planar:hopper_stand", 0, [30, 60]),
        evaluated(tmp_path / "w1", "planar:walker_run", 1, [10, 20, 30]),  # hopper has no seed 1
        evaluated(tmp_path / "wi", "planar:walker_run", 0, [1, 2, 3], "IPV"),  # and no IPV
        evaluated(tmp_path / "d", "dmc:walker_run", 0, [5, 5]),
    ]
    groups = group_runs([read_run(run) for run in runs])
    drawn: list[CurveGroup] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "learning_curves", lambda groups, **_: drawn.extend(groups) or b"<svg></svg>")
        blocks = averages(Gathered([read_run(run) for run in runs]), groups)
    assert len(blocks) == 1
    assert [(group.label, len(group.curves)) for group in drawn] == [("DRP", 1)]
    assert drawn[0].curves[0].env_steps.tolist() == [1000, 2000]
    assert drawn[0].curves[0].values.tolist() == [20, 40]
    assert drawn[0].final is not None
    assert drawn[0].final.mean == 40
    assert "average over 2 tasks of planar" in report(runs, tmp_path / "page.html").read_text()
    assert "Average over tasks" not in report(runs[2:], tmp_path / "one.html").read_text()


def test_a_run_of_an_earlier_version_is_shown_as_a_run_of_today(tmp_path: Path) -> None:
    """Masked autoencoding was called "mae" in metrics.jsonl and in RUN/media."""
    today, former = (pretrain_run(tmp_path / version / "pre") for version in ("today", "former"))
    metrics = former / "metrics.jsonl"
    written = metrics.read_text()
    metrics.write_text(written.replace('"loss/masked"', '"loss/mae"').replace('"masked/', '"mae/'))
    (former / "media/masked_heldout.npz").rename(former / "media/mae_heldout.npz")
    assert metrics.read_text() != written
    assert read_run(former).lines == read_run(today).lines
    said = report([former], tmp_path / "former.html").read_text()
    assert said == report([today], tmp_path / "today.html").read_text().replace(str(today), str(former))
    # A run that was resumed since has both files; the older one is out of date.
    shutil.copy(former / "media/mae_heldout.npz", former / "media/masked_heldout.npz")
    assert [path.name for path in read_run(former).media("masked_*.npz")] == ["masked_heldout.npz"]


def test_reports_of_the_same_runs_are_equal_bytes(tmp_path: Path) -> None:
    runs = [pretrain_run(tmp_path / "pre"), online_run(tmp_path / "ft", checkpoint="pre")]
    first = report(runs, tmp_path / "a.html").read_bytes()
    assert report(runs, tmp_path / "b.html").read_bytes() == first


def test_missing_pieces_are_sentences(tmp_path: Path) -> None:
    bare, empty, going = tmp_path / "bare", tmp_path / "empty", tmp_path / "going"
    bare.mkdir()
    (bare / "config.json").write_text("{}")
    empty.mkdir()
    (empty / "metrics.jsonl").write_text("")
    online_run(going, media=False)
    write_lines(going / "metrics.jsonl", [])
    (going / "random.json").unlink()
    said = read(report([bare, empty, going], tmp_path / "r.html")).said()
    for sentence in (
        "bare: metrics.jsonl is missing",
        "empty: config.json is missing",
        "drp, from scratch in dmc:walker_walk has no evaluations",
        "The random policy in dmc:walker_walk was not measured",
        "saved no film",
        "No run saved an open-loop prediction",
        "No run saved a drawing of its Atomic Actions",
        "No run saved masked-reconstruction examples",
        "No run saved an embedding",
        "No run saved its flow magnitudes",
        "No run logged where its time goes",
    ):
        assert sentence in said, sentence


def test_figures_of_a_pre_training_that_runs_are_marked(tmp_path: Path) -> None:
    run = pretrain_run(tmp_path / "pre", media=False)
    assert "not finished" not in read(report([run], tmp_path / "r.html")).said()
    (run / "status.json").write_text('{"state": "running"}')
    said = read(report([run], tmp_path / "r.html")).said()
    assert "pre has not finished (running). Its figures here are the newest so far." in said
    assert "pre, not finished: held-out masked error" in said
    assert "pre, not finished: open-loop PSNR" in said
    assert "Runs without a result: pre (running)." in said


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("pickle_was_run").touch, ())


def test_damaged_media_are_told_and_never_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = pretrain_run(tmp_path / "pre", media=False)
    folder = run / "media"
    clip = moving_clip(6, 16)[None]
    np.savez(folder / "openloop_shape.npz", truth=clip, prediction=clip[:, :3], context=2)
    np.savez(folder / "openloop_context.npz", truth=clip, prediction=clip, context=np.array([1, 2]))
    np.savez(folder / "openloop_lacks.npz", truth=clip)
    np.savez(folder / "openloop_trap.npz", truth=np.array([Trap()], dtype=object), prediction=clip, context=2)
    (folder / "masked_text.npz").write_text("not a zip")
    (folder / "masked_trap.npz").write_bytes(pickle.dumps(Trap()))
    np.savez(folder / "masked_nan.npz", **{k: np.full((2, 4, 4, 2), np.nan) for k in ("truth", "masked", "reconstruction")})
    np.savez(folder / "embedding_object.npz", xy=np.zeros((1, 2)), label=np.array([b"x"]))
    np.savez(folder / "embedding_length.npz", xy=np.zeros((3, 2)), label=np.array(["x"]))
    np.savez(folder / "flow_empty.npz", magnitudes=np.array([math.nan]))
    (folder / "atomic_text.png").write_text("no picture")
    (folder / "atomic_empty.png").write_bytes(b"")
    write_mp4(tmp_path / "whole.mp4", moving_clip(6, 32))
    online = online_run(tmp_path / "ft", media=False)
    (online / "media/eval_000000000.mp4").write_bytes((tmp_path / "whole.mp4").read_bytes()[:300])
    (online / "media/eval_000000010.mp4").write_text("no film")
    said = read(report([run, online], tmp_path / "r.html")).said()
    for name in (
        "openloop_shape.npz: strips need",
        "openloop_context.npz: context must",
        "openloop_lacks.npz: lacks prediction, context",
        "openloop_trap.npz: cannot be read (Object arrays",
        "masked_text.npz: cannot be read",
        "masked_trap.npz: cannot be read",
        "masked_nan.npz: truth and reconstruction must be finite",
        "embedding_object.npz: needs labels",
        "embedding_length.npz: an emb",
        "flow_empty.npz: has no finite",
        "atomic_text.png: is not a PNG",
        "atomic_empty.png: is empty",
        "eval_000000000.mp4: is not a readable video",
        "eval_000000010.mp4: is not a readable video",
    ):
        assert name in said, name
    assert not Path("pickle_was_run").exists()


def test_huge_media_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "flow_big.npz", magnitudes=np.zeros(100_000))
    monkeypatch.setattr(arrays, "MAX_ARRAYS", 10_000)
    with pytest.raises(media.MediaError, match=r"flow_big\.npz: holds"):
        media.flow_magnitudes(tmp_path / "flow_big.npz")
    (tmp_path / "atomic_big.png").write_bytes(PNG * 100)
    monkeypatch.setattr(media, "MAX_FILE", 100)
    with pytest.raises(media.MediaError, match="too large for the page"):
        media.atomic_actions(tmp_path / "atomic_big.png", "run")


def test_hostile_names_and_values_stay_text(tmp_path: Path) -> None:
    nasty = "<img src=x onerror=alert(1)>$\\frac{"
    run = online_run(tmp_path / "a$b&c", env=nasty, method=nasty, extra={nasty: [nasty, None, True, 1.5]})
    online_run(tmp_path / "other", env="dmc:x")
    reader = read(report([run, tmp_path / "other"], tmp_path / "r.html"))
    assert nasty in reader.said()
    assert "a$b&c" in reader.said()


def test_seeds_that_differ_in_more_than_their_seed_are_named(tmp_path: Path) -> None:
    runs = [
        online_run(tmp_path / "a", seed=0, media=False, device="cpu"),
        online_run(tmp_path / "b", seed=1, media=False, device="cuda", env_steps=40_000),
    ]
    assert differing_settings([read_run(r) for r in runs]) == []  # seed, device and length of the run may differ
    runs.append(online_run(tmp_path / "c", seed=1, media=False, optim={"clip": 7}))
    assert differing_settings([read_run(r) for r in runs]) == ["optim.clip"]
    said = read(report(runs, tmp_path / "r.html")).said()
    assert "differ in 1 setting beside the seed: optim.clip." in said
    assert "several runs have the same seed" in said
    assert "Seeds that ended at different env steps are compared at their own last evaluation." in said
    assert "40K to 50K" in said


def test_runs_with_other_options_of_the_environment_are_named(tmp_path: Path) -> None:
    same = {"time_limit": 500}
    runs = [
        online_run(tmp_path / "a", media=False, label="one", env_options=same | {"split": "train"}),
        online_run(tmp_path / "b", media=False, label="two", env_options=same | {"split": "val"}),
        online_run(tmp_path / "c", media=False, label="two", seed=1, env_options=same),
    ]
    said = read(report(runs, tmp_path / "r.html")).said()
    assert "differ in the option split: train (one); val (two); default (two)." in said
    assert "the option time_limit" not in said
    assert "the option" not in read(report(runs[:1], tmp_path / "r.html")).said()


def test_values_that_are_not_finite_are_told(tmp_path: Path) -> None:
    run = online_run(tmp_path / "a", media=False)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evals = [line for line in lines if line["kind"] == "eval"]
    evals[3]["return_mean"] = math.nan
    next(line for line in lines if line["kind"] == "train")["loss/kl"] = math.inf
    write_lines(run / "metrics.jsonl", lines)
    said = read(report([run], tmp_path / "r.html")).said()
    assert "a: 1 values of return_mean are not finite and left out." in said
    assert "kl of training in the environment has 1 values that are not finite" in said


junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 2000),
    st.floats(-1e6, 1e6),
    st.just(math.nan),
    st.just(math.inf),
    st.just(10**400),
    st.text(max_size=4),
    st.lists(st.floats(0, 40), max_size=3),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
)
field = st.sampled_from(
    [
        "update",
        "env_step",
        "wall",
        "return",
        "return_mean",
        "success_rate",
        "episodes",
        "random",
        "length",
        "seed",
        "loss/kl",
        "seconds/update",
        "seconds/all",
        "flow/p50",
        "masked/model",
        "masked/zero",
        "masked/ratio_best",
        "psnr/motion",
        "psnr/motion_horizon",
        "ssim/motion",
        "grad_norm",
    ]
)
line = st.fixed_dictionaries(
    {"kind": st.sampled_from(["train", "episode", "eval", "pretrain", "heldout", "other"])},
    optional={"update": st.integers(0, 50)},
).flatmap(lambda base: st.dictionaries(field, junk, max_size=8).map(lambda more: {**more, **base}))


@given(st.lists(line, max_size=25), st.sampled_from(["pretrain", "train"]), st.dictionaries(field, junk, max_size=3))
@examples(15, HealthCheck.function_scoped_fixture)
def test_no_metrics_file_breaks_the_report(
    tmp_path: Path, lines: list[dict[str, Any]], stage: str, floor: dict[str, Any]
) -> None:
    run = tmp_path / "run"
    run.mkdir(exist_ok=True)
    (run / "config.json").write_text(json.dumps({"method": "drp", "stage": stage, "seed": 0, "env": "dmc:x", "preset": 3}))
    (run / "random.json").write_text(json.dumps(floor))
    write_lines(run / "metrics.jsonl", lines)
    read(report([run], tmp_path / "r.html"))


def test_seconds_per_update_from_sums_and_from_means(tmp_path: Path) -> None:
    online = seconds_per_update(read_run(online_run(tmp_path / "a", media=False)))
    assert online["update"] == pytest.approx(0.30)
    assert online["other"] == pytest.approx(0.53 - 0.30 - 0.05 - 0.08 - 0.04 - 0.01 - 0.03)
    before = seconds_per_update(read_run(pretrain_run(tmp_path / "p", media=False)))
    assert before == pytest.approx({"update": 0.36, "data": 0.04})
    assert [duration(s) for s in (4.2, 90, 5400)] == ["4 s", "1.5 min", "1.5 h"]


def test_what_cannot_be_reported_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no run directory given"):
        report([], tmp_path / "r.html")
    run = online_run(tmp_path / "a", media=False)
    with pytest.raises(CheckpointError, match="given twice"):
        report([run, tmp_path / "b" / ".." / "a"], tmp_path / "r.html")
    with pytest.raises(CheckpointError, match="no such run directory"):
        report([run, tmp_path / "b"], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_a_failed_write_keeps_the_former_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = online_run(tmp_path / "a", media=False)
    out = tmp_path / "r.html"
    out.write_text("former")

    def full(self: Path, text: str, encoding: str) -> int:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        report([run], out)
    assert out.read_bytes() == b"former"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "r.html"]


def test_the_prediction_of_a_strip_has_the_name_of_its_predictor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[str]] = []
    monkeypatch.setattr(media.strips, "prediction_strips", lambda truth, named, **_: drawn.append(list(named)) or b"")
    clip = np.zeros((1, 4, 8, 8, 3), np.uint8)
    arrays = {"truth": clip, "prediction": clip, "prediction_zero_action": clip, "context": 2}
    np.savez(tmp_path / "openloop_a.npz", **arrays, predictor="latent_action")
    np.savez(tmp_path / "openloop_b.npz", **arrays)
    media.open_loop(tmp_path / "openloop_a.npz", "run")
    media.open_loop(tmp_path / "openloop_b.npz", "run", predictor="latent_action")
    media.open_loop(tmp_path / "openloop_b.npz", "run")
    rows = ["prediction, true latent actions", "prediction, zero latent actions"]
    assert drawn == [rows, rows, ["prediction", rows[1]]]


def latent_run(path: Path, method: str, **model: Any) -> Path:
    base(
        path,
        {
            "method": method,
            "stage": "pretrain",
            "preset": "debug",
            "seed": 0,
            "model": model,
            "pretrain": {"heldout_fraction": 0.0},
        },
    )
    write_lines(path / "metrics.jsonl", [{"kind": "pretrain", "update": 30}])
    return path


def test_figures_of_a_masked_loss_say_what_is_learned(tmp_path: Path) -> None:
    for name, model, said_so in (("a", {}, True), ("b", {"loss_mask": False}, False), ("c", {"floor": 1.0}, False)):
        path = latent_run(tmp_path / name, "masklam", **model)
        line = {"kind": "heldout", "update": 30, "psnr/latent_action": 20.0, "psnr/last_frame": 19.0}
        write_lines(path / "metrics.jsonl", [line])
        said = read(report([path], tmp_path / "r.html")).said()
        assert ("Only the agent's pixels are learned" in said) == said_so


def test_only_what_a_method_could_have_saved_is_missing(tmp_path: Path) -> None:
    said = read(report([latent_run(tmp_path / "a", "masklam")], tmp_path / "r.html")).said()
    assert "No run saved an open-loop prediction" in said
    for what in ("Atomic Actions", "masked-reconstruction", "an embedding", "its flow magnitudes", "traversal"):
        assert what not in said
    assert "a has no held-out figures: no clip is held out (heldout_fraction=0.0)." in said
    said = read(report([latent_run(tmp_path / "b", "diswm")], tmp_path / "r.html")).said()
    assert "b has no held-out figures and no latent traversal: no clip is held out" in said


def test_the_numbers_of_a_traversal_are_explained(tmp_path: Path) -> None:
    pictures = np.zeros((2, 3, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "traversal_a.npz", frame=pictures[0, 0], pictures=pictures, values=np.arange(3.0))
    assert "its largest change of a picture in grey levels" in media.traversal(tmp_path / "traversal_a.npz", "run").caption


def test_the_table_of_runs_shows_the_last_update(tmp_path: Path) -> None:
    path = online_run(tmp_path / "a", media=False)
    lines = [{"kind": "train", "update": 10, "env_step": 5}, {"kind": "eval", "update": 20, "env_step": 9, "return_mean": 1.0}]
    write_lines(path / "metrics.jsonl", [*lines, {"kind": "episode", "update": 24, "env_step": 12}])
    table = build._runs_table([read_run(path)])
    assert table.rows[0][table.header.index("updates")] == "24"
