"""How much of the gradient's growth the integrator explains, and by which mechanism.

A step of a network multiplies the gradient by the transpose of its Jacobian J; read as a step of a numerical method,
the eigenvalues of J are values R(z) of the method's stability function. Textbooks of numerical analysis then judge the
step by |R(z)|. `attribute` measures how far that goes. For every step and sample it splits the measured growth r, the
log of the gradient's norm before the step over that after it, without remainder:

    r  =  spectral  +  non-normal  +  alignment

    spectral     1/2 log(mean |R(z)|^2)                 what the stability function says, over the whole spectrum
    non-normal   1/2 log(|J|_F^2 / sum |R(z)|^2) >= 0   growth that no eigenvalue shows: J is not a normal matrix
    alignment    the rest                               the gradient is not spread evenly: it prefers some directions

The terms add up by construction, so ``closing_error`` holds |J^T g| from the matrix against the growth that the chain
of vector-Jacobian products measured: 1e-7 nats and less in float32, 1e-15 in float64.

**What the share explained means.** ``explained`` is the sum of the spectral terms over the sum of the growth. It is
near 1 when branches are normal and the gradient is spread over all modes; a scaled isometry gives exactly 1. It is
not a quality of the model, and it is no bound: the other two terms may be larger and have the other sign. Where the
growth of the steps cancels it is None; ``explained_variation`` (1 - sum of squared errors / sum of squared growths,
step by step) is defined there too, and exposes a share that is right by accident. Means over samples, nats:

    network                      growth  spectral  non-normal  alignment | share of growth predicted by         | cosine
                                                                         | spectral isotropic frozen persistent |
    digits, 20 Euler blocks       +0.05     +0.01       +0.01      +0.02 |    0.28      0.58  21.3       0.58   |  0.00
    the same, trained             +1.84     +0.15       +0.02      +1.67 |    0.08      0.09   1.14      0.44   |  0.49
    digits, 20 sigmoid layers    -39.10    -46.03       +6.84      +0.09 |    1.18      1.00   0.97      1.00   |  0.00
    the same, trained            -39.76    -46.72       +7.01      -0.05 |    1.18      1.00   0.94      1.00   |  0.00
    GPT-2 small, random, 1 token  +2.55     +1.35       +1.22      -0.01 |    0.53      1.01   2.47      1.01   |  0.00
    GPT-2 small, random, 8 tokens +2.40     +1.45       +0.80      +0.14 |    0.61      0.94   2.63      0.94   |  0.00
    resnet18, random, 32 x 32     +0.55     -0.06       +0.76      -0.15 |   -0.11      1.27   5.00      1.27   |  0.02
    MiniLM, trained, 3 tokens     -0.27     -2.66       +2.44      -0.05 |   10.0       0.80  -9.52      0.31   |  0.24

(``python -m tests.attribution.real_models`` makes the table. Steps of thousands of numbers, in GPT-2 with 8 tokens
and in the first half of resnet18, are estimated: there the spectral term is the middle of a bracket.)

*At random weights* successive Jacobians are unrelated: the cosine of neighbours is 0. The gradient finds no direction
that lasts, the alignment is nearly nothing, and the isotropic rate 1/2 log(|J|_F^2 / d) predicts the growth, for normal
and non-normal branches alike. The stability function alone misses the non-normal half: just half of the mean square of
a Gaussian matrix is in its spectrum, and GPT-2's share of 0.53 is that half. Judging such a network by its largest
eigenvalue overstates its growth two to twenty times.

*After training* the residual network's branches point the same way (cosine 0.49), the path is a curve (straightness
0.88, against 0.19 before), and the gradient of the loss follows the leading mode, log max |R(z)|, step by step, from
the first, while the isotropic rate explains a tenth. Here the picture of a spectrum against a stability region is the
right one.

*Everywhere between the two* the energies of the modes are carried from step to step, as far as neighbouring steps
share them (``"persistent"``, `shared_modes.along_depth`), from the shares in which the gradient enters the last block:
it turns into the modes that last, within as many steps as that takes. In the trained network above this is less than
half of the growth: what its blocks share is more than a cosine of their Jacobians says. For Gaussian, antisymmetric and
symmetric branches of width 100 and cosines from 0 to 1 it is within 0.05 nats a step, averaged over 20 steps, of which
the first have not settled. Over 62 networks of 16 steps with four kinds of fields
(``examples/how_much_the_region_explains.py``) the spectrum of each step for itself explains the growth of 29 of 56 to
within a quarter, eigenvalues carried along 43, with what is not normal 50 (the other six grow by less than 0.2 nats).
``"eigenvalues"`` is the same without what is not normal, and what the sentence of a report says that eigenvalues
predict.

*Norms and masks* are not the integrator's. The blocks of resnet18 (16 x 16) gain 0.01 to 0.37 nats by their branch and
lose 0.07 to 0.20 to the ReLU behind the addition (``mask``: half the log of the active fraction); both are large beside
their sum. In MiniLM, whose norms stand behind the additions, the eigenvalues predict a loss of 2.66 nats that does not
happen: non-normal growth of 2.44 makes up for it, and no eigenvalue picture of a trained post-norm transformer should
be trusted without that term.

So: read ``persistence`` first. `Attribution.applicable` is the predictor that holds whatever it is, made before the
growth is looked at; `Attribution.mechanisms` says on which side of the region the modes lie, and how far.

Sources: I. Schur, Math. Ann. 66 (1909) 488; P. Henrici, Numer. Math. 4 (1962) 24 (departure from normality); M. F.
Hutchinson, Commun. Stat. Simul. Comput. 18 (1989) 1059 (probes); E. Hairer, G. Wanner, Solving Ordinary Differential
Equations II, 1996 (regions).
"""

from stabkit.attribution.explained_share import Prediction
from stabkit.attribution.measure import attribute, mechanisms
from stabkit.attribution.mechanism import Mechanism, Shares, largest_step_factor
from stabkit.attribution.persistence import Persistence
from stabkit.attribution.result import Attribution

__all__ = [
    "Attribution",
    "Mechanism",
    "Persistence",
    "Prediction",
    "Shares",
    "attribute",
    "largest_step_factor",
    "mechanisms",
]
