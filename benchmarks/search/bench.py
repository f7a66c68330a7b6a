"""Search strategies beside chance: at equal trials, over many seeds, with a significance test.

    python -m benchmarks.search.bench [--seeds 20] [--trials 30] [--tiny] [--steps 27] [--points 10]

Two standard functions (Dixon and Szegö 1978): Branin in two dimensions and Hartmann in six. ``bayesian`` must find a
lower value than ``random`` (Wilcoxon's signed-rank test over the seeds, one-sided, p < 0.05). For ``halving`` each
configuration is trained on a curve that falls to its value and is noisy on the way; with half the steps of ``random``
its best value must be as good (not worse at p < 0.05). ``--tiny`` does the same with real trainings of the embedded
model, whose landscape is measured first, on a grid, and kept: its known best value is printed beside what the
strategies find.
"""

from __future__ import annotations

import argparse
import math
import sys
import zlib
from collections.abc import Callable, Mapping

import numpy as np

from finetune.planning.models import Range
from finetune.search.models import Strategy, TrialRecord, Value
from finetune.search.pruning import WHOLE, pruner_of
from finetune.search.suggest import study_of, suggest

Objective = Callable[[Mapping[str, Value]], float]
# The loss of a configuration after so many ninths of its training.
Curve = Callable[[Mapping[str, Value], int], float]

_BRANIN = {"x": Range(low=-5.0, high=10.0), "y": Range(low=0.0, high=15.0)}
_HARTMANN = {f"x{i}": Range(low=0.0, high=1.0) for i in range(6)}
_A = np.array(
    [[10, 3, 17, 3.5, 1.7, 8], [0.05, 10, 17, 0.1, 8, 14], [3, 3.5, 1.7, 10, 17, 8], [17, 8, 0.05, 10, 0.1, 14]]
)
_P = 1e-4 * np.array(
    [
        [1312, 1696, 5569, 124, 8283, 5886],
        [2329, 4135, 8307, 3736, 1004, 9991],
        [2348, 1451, 3522, 2883, 3047, 6650],
        [4047, 8828, 8732, 5743, 1091, 381],
    ]
)
_C = np.array([1.0, 1.2, 3.0, 3.2])


def branin(params: Mapping[str, Value]) -> float:
    """Lowest value 0.397887."""
    x, y = float(params["x"]), float(params["y"])
    bowl = y - 5.1 / (4 * math.pi**2) * x**2 + 5 / math.pi * x - 6
    return bowl**2 + 10 * (1 - 1 / (8 * math.pi)) * math.cos(x) + 10


def hartmann(params: Mapping[str, Value]) -> float:
    """Lowest value -3.32237."""
    point = np.array([float(params[f"x{i}"]) for i in range(6)])
    return -float(_C @ np.exp(-(_A * (point - _P) ** 2).sum(axis=1)))


def learning_curve(objective: Objective, *, rise: float, noise: float) -> Curve:
    """Falls from far above a configuration's value towards it; what disturbs it is the configuration's own."""

    def loss(params: Mapping[str, Value], ninths: int) -> float:
        drawn = np.random.default_rng([zlib.crc32(repr(sorted(params.items())).encode()), ninths])
        left = 1 - ninths / WHOLE
        return objective(params) + rise * left**2 + left * float(drawn.normal(0, noise))

    return loss


def best_of(objective: Objective, space: Mapping[str, Range], strategy: Strategy, trials: int, seed: int) -> float:
    """The lowest value that a strategy finds in so many trials."""
    history: list[TrialRecord] = []
    for number in range(trials):
        params = suggest(history, space, strategy, 1.0, trials - number, seed=seed)
        assert params is not None
        history.append(TrialRecord(number=number, params=params, state="completed", value=objective(params)))
    return min(trial.value for trial in history if trial.value is not None)


def halved(curve: Curve, space: Mapping[str, Range], steps: int, seed: int, *, hyperband: bool) -> tuple[float, int]:
    """The lowest final value that halving finds in so many ninths of trainings, and how many trials it tried."""
    study = study_of([], space)
    study.pruner = pruner_of("halving", hyperband=hyperband)
    history: list[TrialRecord] = []
    while steps >= WHOLE:
        params = suggest(history, space, "halving", 1.0, 1, seed=seed)
        assert params is not None
        trial = study.ask()
        for ninths in (1, 3, WHOLE):
            loss = curve(params, ninths)
            trial.report(loss, ninths)
            if ninths < WHOLE and trial.should_prune():
                break
        steps -= ninths
        done = ninths == WHOLE
        history.append(
            TrialRecord(
                number=len(history),
                params=params,
                state="completed" if done else "pruned",
                value=loss if done else None,
            )
        )
    return min(trial.value for trial in history if trial.value is not None), len(history)


def compare(name: str, curve: Curve, space: Mapping[str, Range], *, seeds: int, trials: int) -> bool:
    """Print a table of one objective; whether the strategies kept their promises."""
    from scipy.stats import wilcoxon

    def whole(params: Mapping[str, Value]) -> float:
        return curve(params, WHOLE)

    found = {
        strategy: np.array([best_of(whole, space, strategy, trials, seed) for seed in range(seeds)])
        for strategy in ("random", "bayesian", "bandit")
    }
    half = WHOLE * trials // 2
    halving = np.array([halved(curve, space, half, seed, hyperband=False) for seed in range(seeds)])
    hyperband = np.array([halved(curve, space, half, seed, hyperband=True) for seed in range(seeds)])
    chance = found["random"]
    print(f"\n{name}: {trials} trials, {seeds} seeds")
    print(f"{'strategy':<10} {'median':>9} {'mean':>9} {'better':>9} {'p':>9} {'steps':>6} {'trials':>7}")
    print(f"{'random':<10} {np.median(chance):>9.4f} {chance.mean():>9.4f} {'':>9} {'':>9} {'100%':>6} {trials:>7}")
    p = {name: float(wilcoxon(found[name], chance, alternative="less").pvalue) for name in ("bayesian", "bandit")}
    for strategy in p:
        _row(strategy, found[strategy], chance, p[strategy], "100%", trials)
    for strategy, results in (("halving", halving), ("hyperband", hyperband)):
        p[strategy] = float(wilcoxon(results[:, 0], chance, alternative="greater").pvalue)
        _row(strategy, results[:, 0], chance, p[strategy], "50%", results[:, 1].mean())
    better, reached = p["bayesian"] < 0.05, p["halving"] >= 0.05
    print(f"bayesian is better than random at equal trials: {'yes' if better else 'NO'}")
    print(f"halving reaches random's result with half the steps (p: that it is worse): {'yes' if reached else 'NO'}")
    return better and reached


def _row(name: str, values: np.ndarray, chance: np.ndarray, p: float, steps: str, trials: float) -> None:
    wins = f"{(values < chance).sum()} of {len(values)}"
    print(f"{name:<10} {np.median(values):>9.4f} {values.mean():>9.4f} {wins:>9} {p:>9.2g} {steps:>6} {trials:>7.0f}")


def main() -> None:
    """Print the tables; exit with 1 if a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--tiny", action="store_true", help="real trainings too: minutes")
    parser.add_argument("--steps", type=int, default=27, help="of each real training")
    parser.add_argument("--points", type=int, default=10, help="learning rates of the measured grid, at three ranks")
    arguments = parser.parse_args()
    amount = {"seeds": arguments.seeds, "trials": arguments.trials}
    kept = compare("Branin", learning_curve(branin, rise=50, noise=5), _BRANIN, **amount)
    kept &= compare("Hartmann 6", learning_curve(hartmann, rise=2, noise=0.3), _HARTMANN, **amount)
    if arguments.tiny:
        from benchmarks.search.tiny import landscape, space

        kept &= compare(
            "the embedded model", landscape(steps=arguments.steps, points=arguments.points), space(), **amount
        )
    sys.exit(not kept)


if __name__ == "__main__":
    main()
