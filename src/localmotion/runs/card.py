"""The model card of a shared run: what it is, how it is used, and what it was made of. Markdown with YAML front matter."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from localmotion import methods
from localmotion.config import RunConfig, leaves
from localmotion.errors import LocalmotionError
from localmotion.runs.settings import compose, from_dict

CURVE = "curve.svg"
_NOT_SHOWN = {"data", "checkpoint", "seed", "label", "device", "threads", "env"}
"""Settings that the card names elsewhere, or that do not describe the weights."""


def model_card(
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
    state: Mapping[str, Any],
    scores: Mapping[str, Any],
    *,
    name: str,
    license: str,
    commands: Sequence[str],
    curve: bool,
) -> str:
    """Text of README.md.

    Args:
        config, environment, state: the files of the shared run.
        scores: as `push.scores_of` returns them.
        name: where the run is found: hf:owner/name, shelf:NAME or a folder.
        license: its license, or "".
        commands: commands that made it.
        curve: whether the folder has a picture `CURVE`.
    """
    run = from_dict(config)
    cls = methods.get(run.method)
    what = (sys.modules[cls.__module__].__doc__ or "").strip().split("\n")[0]
    task = f" in {run.env}" if run.env else ""
    recipe = run.recipe or environment.get("recipe")
    parameters = environment.get("parameters")
    rows = {
        "method": run.method,
        "stage": run.stage,
        "preset": run.preset,
        "environment": run.env,
        "data": run.data,
        "started from": run.checkpoint,
        "updates": f"{state.get('update', 0):,}",
        "env steps": f"{state['env_step']:,}" if state.get("env_step") else "",
        "parameters": _parameters(parameters) if isinstance(parameters, Mapping) else "",
        "seed": str(run.seed),
        "label": run.label,
        "localmotion": _version(environment),
        "torch": str(environment.get("versions", {}).get("torch", "")),
    }
    parts = [
        "---\n" + yaml.safe_dump(_front(run, cls, scores, license), sort_keys=False, allow_unicode=True) + "---",
        f"# {run.method}, {run.stage}{task}",
        what,
        "Weights of a run of localmotion: safetensors and JSON, nothing is unpickled.",
        "## Use",
        _code(_usage(run, cls, name)),
        "## Run",
        _table({key: value for key, value in rows.items() if value}),
    ]
    if scores:
        parts += ["## Scores", *_scores(scores)]
    if curve:
        parts += [f"![Learning curve]({CURVE})"]
    if other := _other_settings(run):
        parts += ["## Settings", f"Settings that differ from the preset `{run.preset}`; `config.json` has all.", _table(other)]
    if recipe:
        values = recipe if isinstance(recipe, Mapping) else recipe.to_json()
        parts += ["## Perception", "Recipe of its clips.", _code([json.dumps(values, sort_keys=True)])]
    if commands:
        parts += ["## Command", _code(commands)]
    return "\n\n".join(parts) + "\n"


def _front(run: RunConfig, cls: type[methods.Method], scores: Mapping[str, Any], license: str) -> dict[str, Any]:
    """The front matter, as the Hub reads it. Without a license it has none."""
    tags = ["localmotion", "world-model", run.method, run.stage, *([run.env] if run.env else [])]
    front: dict[str, Any] = {"library_name": "localmotion", "tags": tags}
    if license:
        front["license"] = license
    if run.stage in cls.acts_after:
        front["pipeline_tag"] = "reinforcement-learning"
    if (line := scores.get("eval")) and "return_mean" in line and run.env:
        mean, spread = line["return_mean"], line.get("return_std", 0.0)
        metrics = [{"type": "mean_reward", "name": "mean return", "value": f"{mean:.2f} +/- {spread:.2f}"}]
        task = {"type": "reinforcement-learning", "name": "reinforcement-learning"}
        result = {"task": task, "dataset": {"name": run.env, "type": run.env}, "metrics": metrics}
        front["model-index"] = [{"name": run.method, "results": [result]}]
    return front


def _usage(run: RunConfig, cls: type[methods.Method], name: str) -> list[str]:
    if run.stage in cls.acts_after:
        return [f"localmotion evaluate {name}"]
    following = [stage for stage in cls.stages if run.stage in cls.origins(run.model, stage)] or ["finetune"]
    start = f"--method {run.method} --preset {run.preset} --checkpoint {name} --run RUN"
    data = {"finetune": "--env ENVIRONMENT"}
    return [f"localmotion {stage} {start} {data.get(stage, '--data STORE')}" for stage in following]


def _version(environment: Mapping[str, Any]) -> str:
    version, commit = environment.get("versions", {}).get("localmotion", ""), environment.get("commit", "")
    return f"{version}, commit {commit}" if commit else str(version)


def _parameters(counts: Mapping[str, Any]) -> str:
    numbers = {name: count for name, count in counts.items() if isinstance(count, int)}
    return f"{sum(numbers.values()):,} ({', '.join(f'{name} {count:,}' for name, count in numbers.items())})"


def _scores(scores: Mapping[str, Any]) -> list[str]:
    titles = {"eval": "Last evaluation of training.", "heldout": "Held-out clips of its data."}
    tables = {kind: {f"{key}{_meaning(key)}": _shown(value) for key, value in line.items()} for kind, line in scores.items()}
    return [part for kind, rows in tables.items() for part in (titles[kind], _table(rows))]


def _meaning(key: str) -> str:
    if key.startswith("psnr/"):
        return " (open-loop prediction, dB)"
    return " (squared error on hidden motion / that of the best trivial predictor)" if key == "masked/ratio_best" else ""


def _shown(value: Any) -> str:
    return (
        f"{value:.4g}"
        if isinstance(value, float) and not value.is_integer()
        else f"{value:,.0f}"
        if _number(value)
        else str(value)
    )


def _number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _other_settings(run: RunConfig) -> dict[str, str]:
    """Settings that differ from what the method's preset has for this stage and environment."""
    try:
        usual = dict(leaves(compose(run.method, run.stage, preset=run.preset, env=run.env)))
    except LocalmotionError:
        return {}
    found = dict(leaves(run))
    return {
        key: str(value)
        for key, value in found.items()
        if key not in _NOT_SHOWN and not key.startswith("recipe") and usual.get(key) != value
    }


def _table(rows: Mapping[str, str]) -> str:
    cells = {key: " ".join(str(value).split()).replace("|", "\\|") for key, value in rows.items()}
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in cells.items())])


def _code(lines: Sequence[str]) -> str:
    """An indented block; a fence could be closed by the text itself."""
    return "\n".join(f"    {' '.join(line.split())}" for line in lines)
