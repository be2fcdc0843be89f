"""When logits grow without bound, and when epsilon hides the gradients: what to tell, and when it is no harm."""

from __future__ import annotations

import math
from collections import deque

import numpy as np

from stabkit.diagnosis import Finding
from stabkit.diagnosis.finding import of_training
from stabkit.monitor.harm import Harm
from stabkit.monitor.record import Array
from stabkit.monitor.rules import AlertRules

# Attention. Dehghani et al. saw logits beyond 5e4 and entropies near zero before a ViT diverged, Wortsman et al. that
# models diverge from 1e4 on; Kimi K2 holds its logits below 100. Of 15 kinds of healthy runs the largest logit was 119,
# above its row's mean, with an entropy of 0.06 (a task of looking up, learnt); of the others 20 and 0.3. Runs of the
# same with three to ten times the rate, which learn nothing, come to 200 with entropies of 0.05 and less, and go on to
# 5000. Where a task is learnt by attention that is that sharp, only the size that no healthy run has is told.
LOGIT, ENTROPY, GROWN = 200.0, 0.1, 10.0
BEYOND = 1000.0  # whatever the loss does; and critical
# The log of the normaliser. PaLM holds it near zero by 1e-4 of its square; cosines times 100, the most that CLIP lets
# its scale grow to, stay below 100, and healthy runs here below 32.
NORMALISER, NORMALISER_GROWN = 200.0, 4.0
ROUNDED = 0.25  # nats by which half a unit in the last place of such logits is off: 64 in bfloat16
_LEARNT = 0.25  # of the loss at first: what is left of it where a task is learnt
_FIRST = 3  # looks that say what is usual at the start
# Sizes that grow so at every step are on their way to the limits, and are told where they are further than most healthy
# runs come and would be there within _STEPS steps.
FAST, RUN, AHEAD = math.log(1.3), 2, 0.05
_STEPS = 10
_SOON = 0.25  # of the limit, from which a look ahead is taken where it grows so fast that the next would come late
# Epsilon. A block whose entries are below it by a majority moves by less than half of what Adam is for; with epsilon
# large on purpose (1e-3 to 1 in RMSprop of convolutional networks) training goes well nevertheless, and is no harm.
MAJORITY = 0.5
_STUCK = 0.05  # of the loss at first: less than that has been learnt
_SEEN = 16  # losses, of which the first and the newest say whether anything is learnt
_REFERENCE = (
    "Dehghani et al., Scaling vision transformers to 22 billion parameters, 2023; Wortsman et al., Small-scale proxies "
    "for large-scale Transformer training instabilities, 2023"
)
_OF_EPSILON = "Wortsman et al., Small-scale proxies for large-scale Transformer training instabilities, 2023"
_OF_NORMALISER = "Chowdhery et al., PaLM: scaling language modeling with pathways, 2022, section 5"


class Runaway:
    """Sizes that grow by a factor at every training step.

    Args:
        limit: where they are told in any case.
        jump: how far they must have grown since the look before, in nats.
    """

    def __init__(self, limit: float, jump: float) -> None:
        self._limit, self._jump = limit, jump
        self._looks: deque[tuple[int, Array]] = deque(maxlen=RUN + 2)

    def see(self, step: int, sizes: Array) -> Array:
        """The factor by which each grows at every step where it runs away, NaN elsewhere.

        Args:
            step: the training step.
            sizes: ``(n,)``, positive, NaN where they are not known.
        """
        if self._looks and step <= self._looks[-1][0]:
            return np.full(len(sizes), math.nan)
        self._looks.append((step, sizes))
        steps = np.array([at for at, _ in self._looks])
        if len(steps) < RUN + 2 or (np.diff(steps)[-RUN:] > 1).any():
            return np.full(len(sizes), math.nan)
        with np.errstate(all="ignore"):
            logs = np.log(np.array([each for _, each in self._looks]))
            rate = np.diff(logs, axis=0)[-RUN:].min(0)
            runs = (rate >= FAST) & (logs[-1] - logs[0] >= self._jump) & (sizes >= AHEAD * self._limit)
            runs &= logs[-1] + _STEPS * rate >= math.log(self._limit)
            found: Array = np.where(runs, np.exp(rate), math.nan)
        return found


class Growing:
    """Judges what was seen inside by what the run itself had at first.

    Args:
        names: of all blocks.
        rules: of the monitor.
    """

    def __init__(self, names: tuple[str, ...], rules: AlertRules | None) -> None:
        self._names = names
        self._harm = Harm((rules or AlertRules()).warmup)
        self._steps = 0
        self._first: list[Array] = []  # logits by block, of the first looks
        self._before: tuple[int, Array] | None = None
        self._suspect: set[str] = set()  # beyond its limit at the look before
        self._told: set[str] = set()
        self._normalisers: list[float] = []
        jump = (rules or AlertRules()).jump
        self._runs, self._drifts = Runaway(LOGIT, jump), Runaway(NORMALISER, jump)
        self.soon = False  # whether the next step is to be looked at

    def see(self, loss: float) -> None:
        """Take note of the loss of a step, NaN where it is not known."""
        self._steps += 1
        self._harm.see(loss, math.nan)

    def judge(self, step: int, of_blocks: Array, of_loss: Array, resolution: float) -> list[Finding]:
        """What there is to say of a look.

        Args:
            step: the training step.
            of_blocks: largest logit, entropy and share of flat rows by block; ``(3, blocks)``.
            of_loss: largest modulus of the logits of the loss, and mean log of their normaliser.
            resolution: of numbers of the dtype of these.
        """
        self.soon = False
        beyond: dict[str, Finding] = {}
        found = self._of_attention(step, of_blocks)
        if found is not None:
            beyond["attention" if found.severity == "warning" else "beyond"] = found
        found = self._of_normaliser(step, float(of_loss[0]), float(of_loss[1]), resolution)
        if found is not None:
            beyond["normaliser"] = found
        news = [finding for key, finding in beyond.items() if key in self._suspect and key not in self._told]
        self._told |= self._suspect & beyond.keys()
        news += self._running(step, of_blocks, of_loss)
        if "beyond" in self._told:
            self._told.add("attention")
        self._suspect = set(beyond)
        self.soon |= bool(beyond.keys() - self._told)
        return news

    def judge_epsilon(self, step: int, shares: Array, epsilon: float, root: float) -> list[Finding]:
        """What there is to say of epsilon; once, and once more where a run turns out to learn nothing.

        Args:
            step: the training step.
            shares: of the entries of every block.
            epsilon: the largest.
            root: the median of the roots below it.
        """
        hidden = np.flatnonzero(shares > MAJORITY)
        if not len(hidden) or self._steps < _SEEN:
            return []
        stuck = not self._harm.left < 1.0 - _STUCK
        key = "stuck" if stuck else "epsilon"
        if key in self._told or "stuck" in self._told:
            return []
        self._told.add(key)
        return [self._epsilon(step, shares, hidden, epsilon, root, stuck=stuck)]

    def _running(self, step: int, of_blocks: Array, of_loss: Array) -> list[Finding]:
        """What is on its way to its limit by a factor at every step, and was not told."""
        news = []
        paces = self._runs.see(step, of_blocks[0])
        running = np.flatnonzero(~np.isnan(paces))
        if len(running) and not self._told & {"attention", "beyond"}:
            self._told.add("attention")
            worst = int(running[np.argmax(of_blocks[0, running])])
            usual = np.fmin.reduce(self._first)[worst]
            found = (of_blocks[0, worst], usual, *of_blocks[1:, worst], paces[worst])
            news.append(self._attention(step, worst, len(running), *found))
        pace = self._drifts.see(step, np.abs(of_loss[1:]))[0]
        if not math.isnan(pace) and "normaliser" not in self._told:
            self._told.add("normaliser")
            usual = max(min(self._normalisers[:-1], default=1.0), 1.0)
            news.append(_normaliser(step, float(of_loss[0]), float(of_loss[1]), usual, _faster(pace)))
        return news

    def _of_attention(self, step: int, of_blocks: Array) -> Finding | None:
        logits, entropy, flat = of_blocks
        if np.isnan(logits).all():
            return None
        before, self._before = self._before, (step, logits)
        if len(self._first) < _FIRST:
            self._first.append(logits)
        with np.errstate(all="ignore"):
            usual = np.fmin.reduce(self._first)
            grown = logits / usual
            sharp = (entropy <= ENTROPY) & (grown >= GROWN)
            beyond = sharp & ((logits >= BEYOND) | ((logits >= LOGIT) & (not self._learnt)))
            if before is not None and step > before[0]:
                rate = np.log(logits / before[1]) / (step - before[0])
                self.soon = bool((sharp & (logits >= _SOON * LOGIT) & (logits * np.exp(10 * rate) >= LOGIT)).any())
                self.soon &= not bool(self._told & {"attention", "beyond"})
        if not beyond.any():
            return None
        places = np.flatnonzero(beyond)
        worst = int(places[np.argmax(logits[places])])
        return self._attention(step, worst, len(places), logits[worst], usual[worst], entropy[worst], flat[worst])

    def _of_normaliser(self, step: int, largest: float, log_z: float, resolution: float) -> Finding | None:
        if not math.isfinite(log_z):
            return None
        size = abs(log_z)
        before = self._normalisers[-1] if self._normalisers else size
        if len(self._normalisers) < _FIRST:
            self._normalisers.append(size)
        else:
            self._normalisers[-1] = size
        usual = max(min(self._normalisers[:-1], default=size), 1.0)
        off = 0.5 * resolution * size
        harmful = off >= ROUNDED or (size >= NORMALISER and not (log_z > 0 and self._learnt))
        if not (harmful and size >= NORMALISER_GROWN * usual and size >= before):
            return None
        rounding = (
            f"; in their dtype such a logit is rounded by up to {off:.2g} nats, and so is the loss"
            if off >= ROUNDED
            else ""
        )
        return _normaliser(step, largest, log_z, usual, rounding)

    @property
    def _learnt(self) -> bool:
        return 0.0 <= self._harm.left <= _LEARNT

    def _attention(
        self,
        step: int,
        worst: int,
        count: int,
        logit: float,
        usual: float,
        entropy: float,
        flat: float,
        pace: float = math.nan,
    ) -> Finding:
        name = self._names[worst]
        also = _faster(pace)
        if count > 1:
            also += f", and those of {count - 1} other blocks " + ("do" if also else f"are beyond {LOGIT:.0f}")
        return Finding(
            kind="diverging_logits",
            severity="critical" if logit >= BEYOND else "warning",
            steps=(worst,),
            module_path=name,
            confidence=0.95,
            evidence=f"at training step {step} the largest attention logit of {name or 'the model'} is {logit:.4g} "
            f"above the mean of its row, {logit / usual:.3g} times as much as at first{also}; the entropy of its "
            f"weights is {100 * entropy:.2g} % of that of equal weights, and {100 * flat:.2g} % of the rows give all "
            "to one key and pass no gradient on",
            remedy="lower the learning rate, go back to a checkpoint before, and put a norm on queries and keys "
            "(QK-norm) or a lower rate or more weight decay on what makes them",
            reference=_REFERENCE,
            numbers={
                "training_step": float(step),
                "logit": float(logit),
                "usual": float(usual),
                "entropy": float(entropy),
                "flat": float(flat),
            },
        )

    def _epsilon(self, step: int, shares: Array, hidden: Array, epsilon: float, root: float, *, stuck: bool) -> Finding:
        worst = int(hidden[np.argmax(shares[hidden])])
        name = self._names[worst]
        also = f", as in {len(hidden) - 1} other blocks" if len(hidden) > 1 else ""
        learning = (
            f"; {100 * (1 - self._harm.left):.2g} % of the loss has been learnt"
            if stuck and not math.isnan(self._harm.left)
            else ""
        )
        return Finding(
            kind="idle_update",
            severity="warning" if stuck else "info",
            steps=tuple(hidden.tolist()),
            module_path=name,
            confidence=0.95,
            evidence=f"at training step {step} {100 * shares[worst]:.3g} % of the gradients of "
            f"{name or 'the model'} are smaller than epsilon, {epsilon:.2g}, by the root of their mean square{also}; "
            f"of those half are below {root:.2g}, so that their updates are {epsilon / root:.2g} times shorter than "
            f"the learning rate says{learning}",
            remedy=f"lower eps to {0.01 * root:.0e} or less, or scale the loss up"
            + ("" if stuck else "; none is needed where epsilon is that large on purpose"),
            reference=_REFERENCE,
            numbers={"training_step": float(step), "share": float(shares[worst]), "epsilon": epsilon, "root": root},
        )


def _faster(pace: float) -> str:
    return "" if math.isnan(pace) else f", and grows by a factor of {pace:.3g} at every step"


def _normaliser(step: int, largest: float, log_z: float, usual: float, also: str) -> Finding:
    return of_training(
        "diverging_logits",
        "warning",
        f"at training step {step} the mean log of the softmax normaliser in the loss is {log_z:.4g}, and was "
        f"{usual:.3g} in size at first; the largest logit is {largest:.4g}: the logits drift away from zero{also}",
        "add 1e-4 times the mean square of that logarithm to the loss (z-loss: 1e-4 * logits.logsumexp(-1)**2), "
        "decay the weights of the last layer, or lower the learning rate",
        _OF_NORMALISER,
        {"training_step": float(step), "log_z": log_z, "usual": usual, "largest": largest},
    )
