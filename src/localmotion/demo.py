"""The whole chain on a CPU: source videos, Atomic Actions, pre-training, fine-tuning, evaluation, one report.

The source videos show other bodies than the task, so transfer is across bodies, as in the paper. Each step is a command
of the command line and is printed before it runs. If you run the demo again, it continues where it stopped.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from localmotion.config import RunConfig, Stage
from localmotion.console import progress, say
from localmotion.errors import LocalmotionError
from localmotion.foreign import needs
from localmotion.machine import cores
from localmotion.methods import sizes
from localmotion.recipe import Recipe
from localmotion.runs.settings import compose

TASK = "dmc:cheetah_run"
BODIES = ("walker", "hopper", "finger", "reacher", "acrobot", "fish", "swimmer", "pendulum")
PRESET = "tiny"
RECIPE = Recipe(**sizes.RECIPE[PRESET])
PRETRAIN = ("updates=500", "pretrain.log_every=50", "pretrain.eval_every=250", "pretrain.save_every=250", "eval_batches=4")
# Four env steps per agent step, as in PlaNet for this task: twice the experience for the same number of updates.
FINETUNE = (
    "action_repeat=4",
    "env_steps=30000",
    "prefill=3000",
    "online.batch_size=8",  # of 16 positions: as many in an update as the preset has, in half as many steps of the RSSM
    "online.length=16",
    "online.eval_every=2500",
    "online.save_every=2500",
    "online.log_every=50",
    # Eqs. 3 and 8 to the letter. With the defaults of DeepMind Control agents began to learn earlier here, and ended lower (studies/demo).
    "embed_input=false",
    "beta_z_finetune=null",
)


def _settings(stage: Stage, extra: tuple[str, ...], **flags: Any) -> RunConfig:
    return compose("drp", stage, preset=PRESET, env=flags.get("env", ""), flags=flags, settings=extra)


def demo(root: Path, *, videos: Path | None = None, task: str = TASK, seed: int = 0) -> Path:
    """Run the whole chain under ``root`` and return the report's path. ``videos``: a folder of your own videos.

    Raises MissingExtraError, before anything is written, without the extras dmc and report.
    """
    needs("dmc", "mujoco", "dm_control", who="demo")
    needs("report", "sklearn", who="demo")
    from localmotion.envs.bodies import render_videos
    from localmotion.evaluation.evaluate import evaluate_run, random_floor
    from localmotion.evaluation.motion_media import motion_media
    from localmotion.perception.draw import inspect
    from localmotion.perception.extract import extract_folder
    from localmotion.report.build import report
    from localmotion.training.finetune import finetune
    from localmotion.training.pretrain import pretrain
    from localmotion.video.store import ClipStore

    began = time.monotonic()
    root.mkdir(parents=True, exist_ok=True)
    source = videos or root / "videos"
    if videos is None and not (source / "COMPLETE").exists():
        say(f"1. source videos of {len(BODIES)} bodies, none of them the task's: {source}")
        with progress("render", 64, "clips") as advance:
            render_videos(source, clips=64, frames=60, size=128, seed=seed, bodies=BODIES, exclude=(task,), progress=advance)
        (source / "COMPLETE").write_text("")
    store_path = root / "store"
    say(f"2. localmotion extract {source} --out {store_path} --size {RECIPE.size} --percept-size {RECIPE.percept_size}")
    with progress("extract", 1, "videos") as advance:
        summary = extract_folder(source, store_path, RECIPE, workers=cores(), progress=advance)
    for line in summary.lines():
        say(line)
    store = ClipStore(store_path)
    if not len(store):
        raise LocalmotionError(f"{source}: no usable video of at least 25 frames; run localmotion scan {source} for the reasons")
    inspect(store, root / "atomic_actions.png", None)
    say(f"the first picture: {(root / 'atomic_actions.png').resolve()} shows a clip, its points and its flow")
    pre, fine = root / "pretrain", root / "finetune"
    say(f"3. localmotion pretrain --method drp --data {store_path} --preset {PRESET} --seed {seed} --run {pre}")
    pretrain(_settings("pretrain", PRETRAIN, data=str(store_path), seed=seed), pre)
    inspect(store, pre / "media" / "atomic_example.png", None)
    motion_media(pre, store_path)
    say(f"4. localmotion finetune --method drp --checkpoint {pre} --env {task} --preset {PRESET} --seed {seed} --run {fine}")
    finetune(_settings("finetune", FINETUNE, env=task, checkpoint=str(pre), seed=seed), fine)
    # The returns of an agent with this budget vary. Its evaluations choose the best weights; episodes of another seed measure them.
    say(f"5. localmotion evaluate {fine} --which best --episodes 10 --seed {seed + 1}")
    score = evaluate_run(fine, episodes=10, seed=seed + 1, video=fine / "media" / "eval_best.mp4", which="best")
    floor = random_floor(fine)
    for name, result in (("fine-tuned agent, weights of its best evaluation", score), ("random policy", floor)):
        say(f"{name}: return {result['return_mean']:.1f} +- {result['return_std']:.1f} over {result['episodes']} episodes")
    page = report([pre, fine], root / "report.html")
    say(f"done in {(time.monotonic() - began) / 60:.1f} minutes; open {page.resolve()}")
    return page
