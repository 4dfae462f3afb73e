"""The registered analysis of tier 1 (PREREG.md): table of scores, contrasts, verdicts.

python studies/planar/analysis.py dev          # or sealed; reads rows/, writes tier1-dev.md
python studies/planar/analysis.py --simulate   # the same on made-up scores of known effects: how often each verdict is given
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from localmotion.evaluation.contrasts import Interval, hierarchical_bootstrap, holm, sign_flip_test, verdict

HERE = Path(__file__).parent
METRICS = {
    "links": "velocities of links, linear probe",
    "links_pose": "velocities of links, network with the pose",
    "actions": "actions, mean over the logarithm of 50 to 5,000 labels",
}
SMALLEST = {"links": 0.02, "links_pose": 0.02, "actions": 0.02}
OF = ("drp", "recompose", "recompose, 9 tokens", "recompose, 9 in 32")
AGAINST = ("scratch", "ipv", "prelar", "apv", "global flow")
Floats = NDArray[np.float64]
Scores = Mapping[str, Mapping[tuple[int, int], float]]
"""Arm -> (seed, body) -> score."""


def score(row: Mapping[str, object], metric: str) -> float:
    """A row's score. Of actions the area under the curve over log N; R2 below 0 counts as 0, the score of the mean."""
    value = row[metric]
    if not isinstance(value, Mapping):
        return float(str(value))
    labels = sorted(int(n) for n in value)
    known = np.maximum([float(value[str(n)]) for n in labels], 0)
    at = np.log(labels)
    return float(np.trapezoid(known, at) / (at[-1] - at[0]))


def read(rows: Sequence[Mapping[str, object]], metric: str) -> Scores:
    found: dict[str, dict[tuple[int, int], float]] = {}
    for row in rows:
        if metric in row:
            found.setdefault(str(row["arm"]), {})[int(str(row["seed"])), int(str(row["body"]))] = score(row, metric)
    return found


def whole(scores: Mapping[tuple[int, int], float]) -> list[int]:
    """Seeds that have all bodies."""
    seeds, bodies = sorted({seed for seed, _ in scores}), {body for _, body in scores}
    return [seed for seed in seeds if all((seed, body) in scores for body in bodies)]


def both(scores: Scores, of: str, against: str) -> list[int]:
    """The seeds that both arms have whole."""
    return sorted(set(whole(scores.get(of, {}))) & set(whole(scores.get(against, {}))))


def paired(scores: Scores, of: str, against: str, seeds: Sequence[int] | None = None) -> Floats:
    """Differences (seeds, bodies), by default on the seeds that both have whole."""
    first, second = scores.get(of, {}), scores.get(against, {})
    seeds = both(scores, of, against) if seeds is None else seeds
    bodies = sorted({body for _, body in first})
    return np.array([[first[s, b] - second[s, b] for b in bodies] for s in seeds]).reshape(len(seeds), len(bodies))


def contrasts(scores: Scores, of: str, smallest: float) -> list[tuple[str, int, Interval, float, float, str]]:
    """Rows (against, seeds, difference with interval, p, p by Holm, verdict). The unit of the test is the seed."""
    found = [(against, table) for against in AGAINST if len(table := paired(scores, of, against)) > 1]
    tests = [sign_flip_test(table.mean(1)) for _, table in found]
    adjusted = holm(tests) if tests else np.zeros(0)
    rows = []
    for (against, table), p, q in zip(found, tests, adjusted, strict=True):
        interval = hierarchical_bootstrap(table)
        rows.append((against, len(table), interval, p, float(q), verdict(interval, smallest)))
    return rows


def gap(sealed: Scores, seen: Scores, of: str, against: str) -> Floats:
    """By seed, (seeds, 1): how much better ``of`` keeps its score from seen to sealed bodies than ``against``.

    A difference of differences, so that it does not matter whether the sealed bodies are harder than the seen ones.
    """
    seeds = sorted(set(both(sealed, of, against)) & set(both(seen, of, against)))
    tables = [paired(scores, of, against, seeds) for scores in (sealed, seen)]
    return (tables[0].mean(1) - tables[1].mean(1))[:, None] if seeds else np.zeros((0, 1))


def gaps(sealed: Sequence[Mapping[str, object]], seen: Sequence[Mapping[str, object]]) -> list[str]:
    """Markdown: the contrasts of the gap, on the seeds that have all rows."""
    out = ["", "**What is kept from seen to sealed bodies, against global flow**; smallest effect of interest 0.02", ""]
    out += [
        "| arm | measure | seeds | difference of differences | 95 % interval | p | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for metric in ("links", "links_pose"):
        for of in OF:
            table = gap(read(sealed, metric), read(seen, metric), of, "global flow")
            if len(table) > 1:
                x, p = hierarchical_bootstrap(table), sign_flip_test(table[:, 0])
                said = verdict(x, SMALLEST[metric])
                interval = f"{x.low:+.3f} to {x.high:+.3f}"
                out.append(f"| {of} | {METRICS[metric]} | {len(table)} | {x.point:+.3f} | {interval} | {p:.4f} | {said} |")
    return out


def page(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """Markdown: scores of all arms, then the contrasts of each metric."""
    out = ["| arm | seeds | " + " | ".join(METRICS.values()) + " |", "|---" * (len(METRICS) + 2) + "|"]
    tables = {metric: read(rows, metric) for metric in METRICS}
    for arm in dict.fromkeys(str(row["arm"]) for row in rows):
        cells, seeds = [], 0
        for table in tables.values():
            known = table.get(arm, {})
            means = [np.mean([value for (s, _), value in known.items() if s == seed]) for seed in whole(known)]
            seeds = max(seeds, len(means))
            spread = f" ± {np.std(means, ddof=1):.3f}" if len(means) > 1 else ""
            cells.append(f"{np.mean(means):.3f}{spread}" if means else "–")
        out.append(f"| {arm} | {seeds} | " + " | ".join(cells) + " |")
    for metric, title in METRICS.items():
        for of in OF:
            found = contrasts(tables[metric], of, SMALLEST[metric])
            if found:
                out += ["", f"**{of}: {title}**; smallest effect of interest {SMALLEST[metric]}", ""]
                out += [
                    "| against | seeds | difference | 95 % interval | p | p, Holm | verdict |",
                    "|---|---|---|---|---|---|---|",
                ]
                for against, seeds, x, p, q, said in found:
                    out.append(
                        f"| {against} | {seeds} | {x.point:+.3f} | {x.low:+.3f} to {x.high:+.3f} | {p:.4f} | {q:.4f} | {said} |"
                    )
    return out


def simulated(effects: Mapping[str, float], repeats: int, seed_spread: float, body_spread: float) -> dict[str, dict[str, float]]:
    """Shares of verdicts and of p (Holm) below .05 for contrasts of known effect, 8 seeds x 8 bodies.

    Each body has an own effect, around the mean one. The spread over seeds is that of a seed's mean over bodies.
    """
    rng = np.random.default_rng(0)
    found: dict[str, dict[str, float]] = {name: {} for name in effects}
    for _ in range(repeats):
        base = rng.normal(0, seed_spread, (8, 8)) * np.sqrt(8)
        scores: dict[str, dict[tuple[int, int], float]] = {"drp": {(s, b): float(base[s, b]) for s in range(8) for b in range(8)}}
        for name, effect in effects.items():
            table = rng.normal(0, seed_spread, (8, 8)) * np.sqrt(8) - effect - rng.normal(0, body_spread, 8)
            scores[name] = {(s, b): float(table[s, b]) for s in range(8) for b in range(8)}
        for against, _, _, _, q, said in contrasts(scores, "drp", SMALLEST["links"]):
            found[against][said] = found[against].get(said, 0) + 1 / repeats
            found[against]["p < .05"] = found[against].get("p < .05", 0) + (q < 0.05) / repeats
    return found


def load(name: str) -> list[dict[str, object]]:
    file = HERE / "rows" / f"tier1-{name}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("set", nargs="?", choices=("dev", "sealed"))
    parser.add_argument("--simulate", action="store_true")
    args = parser.parse_args()
    if args.simulate:
        effects = dict(zip(AGAINST, (0.08, 0.04, 0.02, 0.0, -0.03), strict=True))
        shares = simulated(effects, 200, seed_spread=0.008, body_spread=0.02)
        print("| true effect | confirmed | undecided | refuted | p (Holm) < .05 |\n|---|---|---|---|---|")
        for name, effect in effects.items():
            got = [shares[name].get(key, 0.0) for key in ("confirmed", "undecided", "refuted", "p < .05")]
            print(f"| {effect:+.2f} | " + " | ".join(f"{share:.2f}" for share in got) + " |")
    if args.set:
        text = page(rows := load(args.set))
        if args.set == "sealed":
            text += gaps(rows, load("seen"))
        (HERE / f"tier1-{args.set}.md").write_text("\n".join(text) + "\n")
        print("\n".join(text))


if __name__ == "__main__":
    main()
