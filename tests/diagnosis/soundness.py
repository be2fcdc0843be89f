"""What no finding may say, whatever the network: doubt near certainty of the opposite, factors of 1, infinities."""

from __future__ import annotations

import math
import re

from stabkit.diagnosis import Diagnosis

_NO_NUMBER = re.compile(r"(?<![\w.])[-+]?(inf|nan|infinity)(?![\w])")
_BY_ONE = re.compile(r"(multiply|scale|divide)\w* (\S+ )?by (1|1\.0+|0)(?![.\d]*[1-9])(?!\w)")


def unsound(diagnosis: Diagnosis) -> list[str]:
    """Every offence in what is told of a network; a finding about what is not finite may name it."""
    offences = []
    for f in diagnosis.findings:
        where = f"{f.kind} at {f.module_path!r}"
        if not 0.5 <= f.confidence <= 1.0:
            offences.append(f"{where}: confidence {f.confidence}")
        offences += [f"{where}: {name} = {value}" for name, value in f.numbers.items() if not math.isfinite(value)]
        for action in f.actions:
            factor = action.get("factor")
            if factor is not None and not (factor > 0 and math.isfinite(factor) and abs(math.log(factor)) > 0.01):
                offences.append(f"{where}: {dict(action)}")
        for text in (f.evidence, f.remedy):
            if f.kind != "non_finite" and _NO_NUMBER.search(text):
                offences.append(f"{where}: no number in {text!r}")
            if _BY_ONE.search(text):
                offences.append(f"{where}: a factor of one in {text!r}")
    return offences
