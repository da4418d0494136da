"""What a prefill, a decode step and a transfer will take, in seconds; fitted online, never configured.

    prefill   a + b * uncached + c * (prompt_len^2 - cached^2)       DistServe's form, with a term for the cached prefix
    decode    a + b * sum of contexts + c * sequences                one step of the whole batch
    transfer  a + b * bytes

One `CostModel` per (model, device, role): a prefill and a decode worker on one machine have different numbers of threads.
Least squares on relative residuals, so that priors and noise need no units; weak priors, coefficients never negative (so
a longer prompt is never predicted to be quicker), old observations slowly forgotten.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Sequence

from protocol.parallel import ALONE, Parallel
from scheduler.residuals import Margin, Residuals

PRIOR_SPREAD = 300.0  # how many times its prior a coefficient may well be: models differ by orders of magnitude
NOISE = 0.02  # variance of one relative residual
FORGETTING = 0.99
TRUSTED_AFTER = 16  # observations, until which the fit has to find its order of magnitude
MAX_SECONDS = 3600.0  # no prediction is longer, no observation above it is believed
MAX_TENANTS = 4096  # whose output lengths are kept apart, of each model
MEAN_OUTPUT_PRIOR = 128.0  # tokens of one choice, before any request has ended

# Seconds for (1, 1000 tokens, 1000 tokens squared); (1, 1000 tokens of context, a sequence); (1, a gigabyte).
PRIORS: dict[str, tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]] = {
    "cpu": ((0.005, 1.0, 0.05), (0.010, 0.001, 0.002), (0.002, 1.0)),
    "cuda": ((0.010, 0.05, 0.005), (0.010, 0.0001, 0.0001), (0.002, 0.1)),
}


class Fit:
    """y = theta . x, least squares over discounted sums, every coefficient at or above zero (exactly, not by clipping)."""

    def __init__(self, prior: Sequence[float]) -> None:
        self.theta = list(prior)
        self.num_observations = 0
        size = range(len(prior))
        # The prior is one pseudo-observation of each coefficient, weak by PRIOR_SPREAD, and never forgotten.
        weights = [NOISE / (PRIOR_SPREAD * p) ** 2 for p in prior]
        self._prior_a = [[weights[i] if i == j else 0.0 for j in size] for i in size]
        self._prior_b = [w * p for w, p in zip(weights, prior, strict=True)]
        self._a = [[0.0 for _ in size] for _ in size]  # sum of x x^T, discounted
        self._b = [0.0 for _ in size]  # sum of x y, discounted
        self._floor = prior[0] * 1e-3  # of the constant term: nothing takes no time
        self._subsets = [s for n in range(len(prior), 0, -1) for s in itertools.combinations(size, n)]

    def observe(self, x: Sequence[float], y: float) -> None:
        """One measurement of y seconds. Implausible ones (not finite, not positive, above an hour) are ignored."""
        if not (math.isfinite(y) and 0 < y < MAX_SECONDS and all(math.isfinite(v) for v in x)):
            return
        # Relative to the prediction, so that short and long ones count alike. A prediction that is not yet trusted is
        # replaced by the measurement; an outlier (a stalled machine) counts as a fivefold miss, not more.
        scale = y
        if self.num_observations >= TRUSTED_AFTER:
            scale = sum(t * v for t, v in zip(self.theta, x, strict=True))
        x, y = [v / scale for v in x], max(0.2, min(5.0, y / scale))
        self._b = [FORGETTING * b + v * y for b, v in zip(self._b, x, strict=True)]
        self._a = [[FORGETTING * a + v * w for a, w in zip(row, x, strict=True)] for row, v in zip(self._a, x, strict=True)]
        self.num_observations += 1
        self._solve()

    def _solve(self) -> None:
        """Non-negative least squares by trying which coefficients are free: there are at most three."""
        size = range(len(self._b))
        a = [[v + w for v, w in zip(row, prior, strict=True)] for row, prior in zip(self._a, self._prior_a, strict=True)]
        b = [v + w for v, w in zip(self._b, self._prior_b, strict=True)]
        if len(b) == 3:
            all_free = _solve_three(a, b)  # nearly always the answer
            if all_free is not None and min(all_free) >= 0:
                self.theta = [max(self._floor, all_free[0]), all_free[1], all_free[2]]
                return
        best, best_loss = self.theta, math.inf
        for subset in self._subsets:
            found = _solve_linear([[a[i][j] for j in subset] for i in subset], [b[i] for i in subset])
            if found is None or min(found) < 0:
                continue
            theta = [0.0] * len(b)
            for i, value in zip(subset, found, strict=True):
                theta[i] = value
            if len(subset) == len(b):
                best = theta
                break  # the unconstrained optimum is allowed, so it is the optimum
            loss = sum(theta[i] * (0.5 * sum(a[i][j] * theta[j] for j in size) - b[i]) for i in size)
            if loss < best_loss:
                best, best_loss = theta, loss
        self.theta = [max(self._floor, best[0]), *best[1:]]


def _solve_three(a: list[list[float]], b: list[float]) -> tuple[float, float, float] | None:
    """The same for three unknowns, written out: symmetric a = L D L^T, which scales of rows and columns do not matter to."""
    (a00, a01, a02), (_, a11, a12), (_, _, a22) = a
    if a00 <= 0 or a11 <= 0 or a22 <= 0:
        return None
    l10, l20 = a01 / a00, a02 / a00
    d1 = a11 - l10 * a01
    if d1 < 1e-12 * a11:
        return None
    rest = a12 - l20 * a01
    l21 = rest / d1
    d2 = a22 - l20 * a02 - l21 * rest
    if d2 < 1e-12 * a22:
        return None
    y1 = b[1] - l10 * b[0]
    z = (b[2] - l20 * b[0] - l21 * y1) / d2
    y = y1 / d1 - l21 * z
    return b[0] / a00 - l10 * y - l20 * z, y, z


def _solve_linear(a: list[list[float]], b: list[float]) -> list[float] | None:
    """Gaussian elimination with equilibration; None for a singular system."""
    scale = [math.sqrt(a[i][i]) for i in range(len(b))]
    if min(scale) <= 0:
        return None
    rows = [[a[i][j] / (scale[i] * scale[j]) for j in range(len(b))] + [b[i] / scale[i]] for i in range(len(b))]
    for i in range(len(rows)):
        pivot = max(range(i, len(rows)), key=lambda r: abs(rows[r][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        if abs(rows[i][i]) < 1e-12:
            return None
        for r in range(i + 1, len(rows)):
            factor = rows[r][i] / rows[i][i]
            rows[r] = [v - factor * w for v, w in zip(rows[r], rows[i], strict=True)]
    out = [0.0] * len(rows)
    for i in reversed(range(len(rows))):
        out[i] = (rows[i][-1] - sum(rows[i][j] * out[j] for j in range(i + 1, len(rows)))) / rows[i][i]
    return [v / s for v, s in zip(out, scale, strict=True)]


class CostModel:
    """Predictions for one (model, device, role). All results are seconds and positive."""

    def __init__(self, device: str) -> None:
        prefill, decode, transfer = PRIORS.get(device.split(":")[0], PRIORS["cpu"])
        self.prefill = Fit(prefill)
        self.decode = Fit(decode)
        self.transfer = Fit(transfer)
        # How wrong these were, measured on what came after: the fit's errors on what it had not seen.
        self.prefill_error = Residuals()
        self.decode_error = Residuals()
        self.ttft_error = Residuals()
        self.tpot_error = Residuals()
        self.tpot_margin = Margin()

    def prefill_s(self, prompt_len: int, cached: int) -> float:
        """The prompt's uncached part, alone on the worker."""
        a, b, c = self.prefill.theta  # written out: a decision asks this of every worker
        return min(MAX_SECONDS, a + b * (prompt_len - cached) / 1e3 + c * (prompt_len**2 - cached**2) / 1e6)

    def decode_s(self, num_seqs: float, num_context_tokens: float) -> float:
        """One step: what a token costs each of `num_seqs` sequences, whose contexts sum to `num_context_tokens`."""
        a, b, c = self.decode.theta
        return min(MAX_SECONDS, a + b * num_context_tokens / 1e3 + c * num_seqs)

    def transfer_s(self, num_bytes: float) -> float:
        a, b = self.transfer.theta
        return min(MAX_SECONDS, a + b * num_bytes / 1e9)

    def observe_prefill(self, prompt_len: float, cached: float, seconds: float) -> None:
        self.prefill.observe(_prefill_x(prompt_len, cached), seconds)

    def observe_decode(self, num_seqs: float, num_context_tokens: float, seconds: float) -> None:
        self.decode.observe((1.0, num_context_tokens / 1e3, num_seqs), seconds)

    def observe_transfer(self, num_bytes: float, seconds: float) -> None:
        self.transfer.observe((1.0, num_bytes / 1e9), seconds)


def _prefill_x(prompt_len: float, cached: float) -> tuple[float, float, float]:
    return 1.0, (prompt_len - cached) / 1e3, (prompt_len**2 - cached**2) / 1e6


class Drift:
    """How one worker differs from its pool's fit: a moving geometric mean of actual / predicted, within [0.5, 2]."""

    def __init__(self) -> None:
        self._log = 0.0
        self.factor = 1.0

    def observe(self, actual: float, predicted: float) -> None:
        if math.isfinite(actual) and actual > 0 and predicted > 0:
            ratio = max(-math.log(2), min(math.log(2), math.log(actual / predicted)))
            self._log += 0.1 * (ratio - self._log)
            self.factor = math.exp(self._log)


class OutputLength:
    """How many tokens one choice of a model's request will have: a moving mean, never above what the request allows.

    Tenants differ: one that was seen often enough is predicted by itself (`of_tenant`).
    """

    def __init__(self) -> None:
        self.mean = MEAN_OUTPUT_PRIOR
        self.count = 0
        self._tenants: OrderedDict[str, OutputLength] = OrderedDict()

    def expected(self, max_tokens: int) -> float:
        return max(1.0, min(float(max_tokens), self.mean))

    def of_tenant(self, tenant: str) -> OutputLength:
        """What is known of this tenant's, or this, of everybody's. A kind of its own (an oracle) stands for all tenants."""
        found = self._tenants.get(tenant) if type(self) is OutputLength else None
        return found if found is not None and found.count >= TRUSTED_AFTER else self

    def observe(self, num_tokens: float, tenant: str = "") -> None:
        if not (math.isfinite(num_tokens) and num_tokens >= 1):
            return
        self.mean += 0.05 * (min(num_tokens, 1e6) - self.mean)
        self.count += 1
        if not tenant:
            return
        own = self._tenants.get(tenant)
        if own is None:
            own = self._tenants[tenant] = OutputLength()
            own.mean = self.mean
            if len(self._tenants) > MAX_TENANTS:
                self._tenants.popitem(last=False)
        self._tenants.move_to_end(tenant)
        own.observe(num_tokens)


class CostBook:
    """The cost models of all (model, device, role, sizes of the group), and the output lengths of all models."""

    def __init__(self) -> None:
        self.models: dict[tuple[str, str, str, Parallel], CostModel] = {}
        self.outputs: dict[str, OutputLength] = {}

    def of(self, model: str, device: str, role: str, parallel: Parallel = ALONE) -> CostModel:
        key = (model, device, role, parallel)
        if key not in self.models:
            self.models[key] = CostModel(device)
        return self.models[key]

    def output(self, model: str) -> OutputLength:
        return self.outputs.setdefault(model, OutputLength())
