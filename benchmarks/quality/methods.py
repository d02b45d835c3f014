"""Methods and ablations of the study: a shipped preset each, and the flags by which it may be tuned.

Every method has equally many trials, on the validation split of two bases, a seed each; the table lists all of them.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from sapo.commands.recipes import FOLDER

PRESETS = FOLDER / "presets"
CONTINUED_SFT = "continued SFT"
CENTRE = "SAPO-DPO, likelihood term"
"""What the ablations change one thing of. Like all presets it keeps identical pairs: its likelihood term then sees the
rows that continued SFT sees, and what differs from continued SFT is the term of the pairs alone."""


@dataclass(frozen=True)
class Method:
    """One way to go on from a base.

    Attributes:
        preset: recipe in `src/sapo/recipes/presets`.
        trials: flags to choose from on the validation split.
        iterations: over which the steps are divided: all methods take equally many.
        like: the method whose chosen flags it takes, if it is not tuned itself.
        flags: what it changes.
        equal_compute: takes as many steps as the CPU time of the dearest method allows.
    """

    preset: str
    trials: tuple[dict[str, str], ...] = ()
    iterations: int = 1
    like: str | None = None
    flags: tuple[tuple[str, str], ...] = ()
    equal_compute: bool = False

    def recipe(self) -> Path:
        return PRESETS / f"{self.preset}.yaml"


def grid(**options: tuple[str, ...]) -> tuple[dict[str, str], ...]:
    """All combinations of the values of each option."""
    trials: list[dict[str, str]] = [{}]
    for name, values in options.items():
        trials = [trial | {name: value} for trial in trials for value in values]
    return tuple(trials)


def methods(
    rates: tuple[str, ...],
    weights: tuple[str, ...],
    betas: tuple[str, ...],
    mild: tuple[tuple[str, str], ...],
    more: dict[str, dict[str, str]],
) -> dict[str, Method]:
    """The methods that are compared.

    Args:
        rates: learning rates, rising: SFT takes all of them, pure DPO takes them a tenth as high.
        weights: of the likelihood term, each with all rates, of four the middle two.
        betas: of ORPO's odds-ratio term, likewise.
        mild: flags that should keep the likelihood.
        more: one further trial for each method named; all the tuned ones or none.
    """
    lower = tuple(f"{float(rate) / 10:g}" for rate in rates)
    middle = rates[1:3] if len(rates) > 3 else rates
    guarded = grid(learning_rate=middle, chosen_nll_weight=weights)
    found = {
        CONTINUED_SFT: Method("continued-sft", grid(learning_rate=rates)),
        "SAPO-ORPO": Method("sapo-orpo", grid(learning_rate=middle, beta=betas)),
        CENTRE: Method("sapo-dpo-guarded", guarded),
        "SPIN, likelihood term": Method("spin", guarded, iterations=3),
        "SAPO-DPO, mild": Method("sapo-dpo-guarded", like=CENTRE, flags=mild),
        "SAPO-DPO": Method("sapo-dpo", grid(learning_rate=lower)),
        "SPIN": Method("spin", grid(learning_rate=lower), iterations=3),
        "continued SFT, equal compute": Method("continued-sft", like=CONTINUED_SFT, equal_compute=True),
    }
    return {
        name: replace(arm, trials=(*arm.trials, more[name])) if name in more else arm for name, arm in found.items()
    }


def _one_change(preset: str, *flags: tuple[str, str]) -> Method:
    return Method(preset, like=CENTRE, flags=flags)


ABLATIONS = {
    "no segment, frozen opponent": _one_change("no-segment-frozen-opponent"),
    "no segment": _one_change("no-segment"),
    "frozen opponent": _one_change("sapo-dpo-guarded", ("ema_decay", "1")),
    "suffix dropped": _one_change("suffix-drop"),
    "suffix masked": _one_change("suffix-mask"),
    "opponent at T = 1": _one_change("sapo-dpo-guarded", ("temperature", "1")),
    "identical pairs left out": _one_change("sapo-dpo-guarded", ("skip_identical", "true")),
    "on-policy (no EMA)": _one_change("on-policy"),
    "no likelihood term": _one_change("sapo-dpo-guarded", ("chosen_nll_weight", "0")),
    "no buffer": _one_change("no-buffer"),
    "frozen reference": _one_change("frozen-reference"),
    "opponent as reference": _one_change("opponent-reference"),
    "beta 0.01": _one_change("sapo-dpo-guarded", ("beta", "0.01")),
}
"""Each is compared with the cells of `CENTRE` in the comparison, on the same bases with the same seeds. Segment and
opponent come first: together they tell fresh negatives from segments."""
