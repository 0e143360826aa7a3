"""How much of the label is left at each time: signal shares, posterior coefficients, signal-to-noise ratios.

Time runs against the habit of diffusion models: ``z_0`` is noise and ``z_T`` almost the clean label embedding ``u``, so the
signal share ``abar_t`` grows with t. All of NoProp follows from the marginals ``q(z_t|y) = N(sqrt(abar_t) u_y, (1 - abar_t) I)``
(Eq. 6 of arXiv 2503.24322). Everything here is computed in double precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bpfree.errors import UsageError

__all__ = ["NoiseSchedule", "prior_divergence", "signal_shares"]

OFFSET = 0.008
"""The small offset s of Nichol and Dhariwal's cosine."""


def cosine(u: float) -> float:
    """Return ``cos^2(((u + s) / (1 + s)) pi / 2)``: 1 at u = 0 up to the offset, 0 at u = 1."""
    return math.cos((u + OFFSET) / (1 + OFFSET) * math.pi / 2) ** 2


SHARES: dict[str, Callable[[int, int], float]] = {
    "cosine": lambda t, T: cosine(1 - t / T) / cosine(0),
    "cosine-interior": lambda t, T: cosine(1 - (t + 1) / (T + 2)) / cosine(0),
    "linear": lambda t, T: t / T,
}


def signal_shares(name: str, T: int, clip: float) -> Tensor:
    """Return ``abar_t`` for t = 0..T, (T+1,) float64, clipped to [clip, 1 - clip].

    Raises:
        UsageError: if two of the levels coincide after clipping, so that a block would have nothing to do.
    """
    raw = torch.tensor([SHARES[name](t, T) for t in range(T + 1)], dtype=torch.float64)
    shares = raw.clamp(clip, 1 - clip)
    if not bool((shares.diff() > 0).all()):
        raise UsageError(
            f"the {name} schedule with T={T} and clip={clip:g} has two equal noise levels", where="clip", fix="choose a smaller clip or T"
        )
    return shares


class NoiseSchedule(nn.Module):
    """The fixed quantities of discrete time, as buffers (T+1,) indexed by t; they follow from the configuration and are not saved.

    With ``alpha_{t-1} = abar_{t-1} / abar_t``, the posterior is ``q(z_t|z_{t-1},y) = N(a_t u_y + b_t z_{t-1}, c_t I)``:
    ``a_t = sqrt(abar_t) (1 - alpha_{t-1}) / (1 - abar_{t-1})``, ``b_t = sqrt(alpha_{t-1}) (1 - abar_t) / (1 - abar_{t-1})``,
    ``c_t = (1 - abar_t) (1 - alpha_{t-1}) / (1 - abar_{t-1})``. Entry 0 of ``a``, ``b``, ``std`` and ``dsnr`` is unused and zero.

    Args:
        abar: (T+1,) float64, strictly increasing, inside (0, 1).

    Attributes:
        signal, noise: ``sqrt(abar_t)`` and ``sqrt(1 - abar_t)``.
        a, b, std: posterior coefficients; ``std = sqrt(c)``.
        snr, dsnr: ``abar_t / (1 - abar_t)`` and ``SNR(t) - SNR(t-1)``.
    """

    abar: Tensor
    signal: Tensor
    noise: Tensor
    a: Tensor
    b: Tensor
    std: Tensor
    snr: Tensor
    dsnr: Tensor

    def __init__(self, abar: Tensor) -> None:
        super().__init__()
        abar = abar.double()
        before, after = abar[:-1], abar[1:]
        alpha, left = before / after, 1 - before
        posterior = {
            "a": after.sqrt() * (1 - alpha) / left,
            "b": alpha.sqrt() * (1 - after) / left,
            "std": ((1 - after) * (1 - alpha) / left).sqrt(),
        }
        snr = abar / (1 - abar)
        whole = {"abar": abar, "signal": abar.sqrt(), "noise": (1 - abar).sqrt(), "snr": snr}
        steps = {**posterior, "dsnr": snr.diff()}
        for name, values in {**whole, **{name: torch.cat([values.new_zeros(1), values]) for name, values in steps.items()}}.items():
            self.register_buffer(name, values.to(torch.get_default_dtype()), persistent=False)
        # As numbers, for the step: an element of a buffer costs an operation of its own.
        self._signal: list[float] = abar.sqrt().tolist()
        self._noise: list[float] = (1 - abar).sqrt().tolist()
        left, last = abar / abar[-1], 1 - abar[-1]
        rest = zip((abar[-1].sqrt() * (1 - left) / (1 - abar)).tolist(), (left.sqrt() * last / (1 - abar)).tolist(), strict=True)
        self._rest: list[tuple[float, float]] = list(rest)
        self._gain: list[float] = [0.0, *snr.diff().tolist()]
        self._share: list[float] = abar.tolist()

    def share(self, t: int) -> float:
        """Return ``abar_t`` as a number."""
        return self._share[t]

    def gain(self, t: int) -> float:
        """Return ``SNR(t) - SNR(t-1)`` as a number."""
        return self._gain[t]

    @property
    def last_signal(self) -> float:
        """``sqrt(abar_T)``."""
        return self._signal[-1]

    def finish(self, z: Tensor, uhat: Tensor, t: int) -> Tensor:
        """Return the mean of ``z_T`` given ``z_t`` and an estimate that no later block changes, both (N, d): one long step of Eq. 3."""
        a, b = self._rest[t]
        return a * uhat + b * z

    def noised(self, u: Tensor, t: int, generator: torch.Generator) -> Tensor:
        """Draw ``z_t ~ q(z_t|y)`` for the embeddings ``u`` (N, d): Eq. 6."""
        return torch.add(self._signal[t] * u, standard_normal(u, generator), alpha=self._noise[t])

    def advance(self, z: Tensor, uhat: Tensor, t: int, generator: torch.Generator | None, spread: Tensor | None = None) -> Tensor:
        """Return ``z_t`` from ``z_{t-1}`` and the estimate of block t, all (N, d): Eq. 3; its mean without a generator.

        Args:
            spread: (d, d) covariance of the target given what block t sees, of which ``a_t^2`` times adds to the noise ``c_t I``.
        """
        mean = self.a[t] * uhat + self.b[t] * z
        if generator is None:
            return mean
        if spread is None:
            return mean + self.std[t] * standard_normal(z, generator)
        return mean + correlated(z, self.std[t] ** 2, self.a[t] ** 2 * spread, generator)


def standard_normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Draw independent N(0, 1) entries with the shape, type and device of ``like``."""
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)


def correlated(like: Tensor, variance: Tensor | float, covariance: Tensor, generator: torch.Generator) -> Tensor:
    """Draw rows of ``N(0, variance I + covariance)`` with the shape, type and device of ``like`` (N, d); covariance (d, d)."""
    whole = variance * torch.eye(len(covariance), device=like.device, dtype=like.dtype) + covariance
    factor: Tensor = torch.linalg.cholesky_ex(whole).L
    return standard_normal(like, generator) @ factor.T


def prior_divergence(u: Tensor, abar: Tensor) -> Tensor:
    """Return the batch mean of ``KL(q(z_0|y) || N(0, I))`` in nats: ``1/2 [abar |u|^2 - d abar - d log(1 - abar)]``.

    Args:
        u: (N, d) label embeddings.
        abar: scalar ``abar_0``.
    """
    d = u.shape[1]
    return 0.5 * (abar * u.pow(2).sum(1).mean() - d * abar - d * torch.log1p(-abar))
