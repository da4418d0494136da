"""What a prefill, a decode step and a transfer will take, in seconds; fitted online, never configured.

    prefill   a + b * uncached + c * (prompt_len^2 - cached^2)       DistServe's form, with a term for the cached prefix
    decode    a + b * sum of contexts + c * sequences                one step of the whole batch
    transfer  a + b * bytes

One `CostModel` per (model, device, role): a prefill and a decode worker on one machine have different numbers of threads.
Recursive least squares on relative residuals, so that priors and noise need no units; wide priors, coefficients never
negative (so a longer prompt is never predicted to be quicker), old observations slowly forgotten.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

PRIOR_SPREAD = 30.0  # how many times its prior a coefficient may well be: models differ by orders of magnitude
NOISE = 0.02  # variance of one relative residual
FORGETTING = 0.995
TRUSTED_AFTER = 16  # observations, until which the fit has to find its order of magnitude
MAX_SECONDS = 3600.0  # no prediction is longer, no observation above it is believed
MEAN_OUTPUT_PRIOR = 128.0  # tokens of one choice, before any request has ended

# Seconds for (1, 1000 tokens, 1000 tokens squared); (1, 1000 tokens of context, a sequence); (1, a gigabyte).
PRIORS: dict[str, tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]] = {
    "cpu": ((0.005, 1.0, 0.05), (0.010, 0.001, 0.002), (0.002, 1.0)),
    "cuda": ((0.010, 0.05, 0.005), (0.010, 0.0001, 0.0001), (0.002, 0.1)),
}


class Fit:
    """y = theta . x by recursive least squares; every coefficient stays at or above zero."""

    def __init__(self, prior: Sequence[float]) -> None:
        self.theta = list(prior)
        self.num_observations = 0
        self._floor = prior[0] * 1e-3  # of the constant term: nothing takes no time
        self._limit = [(PRIOR_SPREAD * p) ** 2 for p in prior]
        self._cov = [[limit if i == j else 0.0 for j in range(len(prior))] for i, limit in enumerate(self._limit)]

    def observe(self, x: Sequence[float], y: float) -> None:
        """One measurement of y seconds. Implausible ones (not finite, not positive, above an hour) are ignored."""
        if not (math.isfinite(y) and 0 < y < MAX_SECONDS and all(math.isfinite(v) for v in x)):
            return
        x = [v / y for v in x]  # relative: the residual of a perfect fit is 1 - theta . x = 0
        spread = [sum(row[j] * x[j] for j in range(len(x))) for row in self._cov]
        gain_by = NOISE + sum(s * v for s, v in zip(spread, x, strict=True))
        residual = 1.0 - sum(t * v for t, v in zip(self.theta, x, strict=True))
        if self.num_observations >= TRUSTED_AFTER:  # an outlier (a stalled machine) counts as a fivefold miss, not more
            residual = max(-4.0, min(0.8, residual))
        self.theta = [max(0.0, t + s / gain_by * residual) for t, s in zip(self.theta, spread, strict=True)]
        self.theta[0] = max(self._floor, self.theta[0])
        size = range(len(x))
        for i in size:
            for j in size:
                self._cov[i][j] = (self._cov[i][j] - spread[i] * spread[j] / gain_by) / FORGETTING
        # Forgetting inflates the directions that are never excited; above its prior none may grow.
        for i in size:
            if self._cov[i][i] > self._limit[i]:
                shrink = math.sqrt(self._limit[i] / self._cov[i][i])
                for j in size:
                    self._cov[i][j] *= shrink
                    self._cov[j][i] *= shrink
        self.num_observations += 1


class CostModel:
    """Predictions for one (model, device, role). All results are seconds and positive."""

    def __init__(self, device: str) -> None:
        prefill, decode, transfer = PRIORS.get(device.split(":")[0], PRIORS["cpu"])
        self.prefill = Fit(prefill)
        self.decode = Fit(decode)
        self.transfer = Fit(transfer)

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

    @property
    def factor(self) -> float:
        return math.exp(self._log)

    def observe(self, actual: float, predicted: float) -> None:
        if math.isfinite(actual) and actual > 0 and predicted > 0:
            ratio = max(-math.log(2), min(math.log(2), math.log(actual / predicted)))
            self._log += 0.1 * (ratio - self._log)


class OutputLength:
    """How many tokens one choice of a model's request will have: a moving mean, never above what the request allows."""

    def __init__(self) -> None:
        self.mean = MEAN_OUTPUT_PRIOR

    def expected(self, max_tokens: int) -> float:
        return max(1.0, min(float(max_tokens), self.mean))

    def observe(self, num_tokens: float) -> None:
        if math.isfinite(num_tokens) and num_tokens >= 1:
            self.mean += 0.05 * (min(num_tokens, 1e6) - self.mean)


class CostBook:
    """The cost models of all (model, device, role), and the output lengths of all models."""

    def __init__(self) -> None:
        self.models: dict[tuple[str, str, str], CostModel] = {}
        self.outputs: dict[str, OutputLength] = {}

    def of(self, model: str, device: str, role: str) -> CostModel:
        key = (model, device, role)
        if key not in self.models:
            self.models[key] = CostModel(device)
        return self.models[key]

    def output(self, model: str) -> OutputLength:
        return self.outputs.setdefault(model, OutputLength())
