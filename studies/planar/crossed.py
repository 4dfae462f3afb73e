"""Intervals of tier 1 for a claim about other bodies, beside the registered ones (README.md, "Other bodies"). Not registered.

    python studies/planar/crossed.py sealed        # reads rows/, prints the table
    python studies/planar/crossed.py --simulate    # coverage of both intervals on made-up scores

The registered interval draws seeds, and within each drawn seed bodies. The eight bodies are the same for all seeds. So what a body adds to
all seeds counts as if each seed had bodies of its own. The crossed interval draws seeds and bodies each once
(`localmotion.evaluation.contrasts.crossed_bootstrap`).
"""

from __future__ import annotations

import argparse

import numpy as np
from analysis import AGAINST, METRICS, OF, SMALLEST, load, paired, read

from localmotion.evaluation.contrasts import crossed_bootstrap, hierarchical_bootstrap, verdict


def table(name: str) -> list[str]:
    """Markdown: contrasts of arms that have all eight seeds, with both intervals and what each says."""
    out = [
        "| | against | measure | difference | registered interval | verdict | crossed interval | it would say |",
        "|---" * 8 + "|",
    ]
    rows = load(name)
    for metric, title in METRICS.items():
        scores = read(rows, metric)
        for of in OF:
            for against in AGAINST:
                found = paired(scores, of, against)
                if len(found) < 8:
                    continue
                both = hierarchical_bootstrap(found), crossed_bootstrap(found)
                cells = [f"{x.low:+.3f} to {x.high:+.3f} | {verdict(x, SMALLEST[metric])}" for x in both]
                out.append(f"| {of} | {against} | {title} | {both[0].point:+.3f} | " + " | ".join(cells) + " |")
    return out


def coverage(body_spread: float, repeats: int = 400) -> tuple[float, float]:
    """Shares of made-up studies, 8 seeds x 8 bodies, in which each interval has the mean over all bodies."""
    rng, hits = np.random.default_rng(0), np.zeros(2)
    for trial in range(repeats):
        x = 0.04 + rng.normal(0, 0.008, (8, 1)) + rng.normal(0, body_spread, 8) + rng.normal(0, 0.01, (8, 8))
        for i, interval in enumerate((hierarchical_bootstrap, crossed_bootstrap)):
            found = interval(x, resamples=500, seed=trial)
            hits[i] += found.low <= 0.04 <= found.high
    return float(hits[0] / repeats), float(hits[1] / repeats)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("set", nargs="?", choices=("dev", "sealed"))
    parser.add_argument("--simulate", action="store_true")
    args = parser.parse_args()
    if args.simulate:
        print("| spread of the effect between bodies | registered | crossed |\n|---|---|---|")
        for spread in (0.0, 0.01, 0.02, 0.04):
            print(f"| {spread:.2f} | " + " | ".join(f"{share:.2f}" for share in coverage(spread)) + " |")
    if args.set:
        print("\n".join(table(args.set)))


if __name__ == "__main__":
    main()
