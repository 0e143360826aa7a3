"""Schedules and the algebra of Eq. 3, 6 and 8."""

from __future__ import annotations

import pytest
import torch
from bpfree_noprop.schedule import NoiseSchedule, prior_divergence, signal_shares
from torch.distributions import Independent, Normal, kl_divergence

from bpfree.errors import UsageError

# t: abar, SNR, dSNR, a, b, c. Oracle: computed independently of this code for T=10, s=0.008, clip 1e-4.
GOLDEN = {
    1: (0.02409, 0.0247, 0.0246, 0.1546, 0.0629, 0.97195),
    2: (0.09405, 0.1038, 0.0791, 0.2337, 0.4699, 0.69051),
    3: (0.20312, 0.2549, 0.1511, 0.2671, 0.5985, 0.47234),
    4: (0.34081, 0.5170, 0.2621, 0.2960, 0.6386, 0.33420),
    5: (0.49384, 0.9757, 0.4587, 0.3304, 0.6379, 0.23794),
    6: (0.64748, 1.8367, 0.8610, 0.3772, 0.6083, 0.16526),
    7: (0.78691, 3.6929, 1.8562, 0.4459, 0.5483, 0.10711),
    8: (0.89871, 8.8722, 5.1794, 0.5534, 0.4448, 0.05913),
    9: (0.97209, 34.833, 25.961, 0.7348, 0.2649, 0.02080),
    10: (0.99990, 9999.0, 9964.2, 0.9965, 0.0035, 0.00010),
}
NAMES = ["cosine", "cosine-interior", "linear"]


def test_cosine_schedule_is_the_golden_table() -> None:
    schedule = NoiseSchedule(signal_shares("cosine", 10, 1e-4))
    assert schedule.abar[0].item() == pytest.approx(1e-4)
    for t, row in GOLDEN.items():
        found = [schedule.abar[t], schedule.snr[t], schedule.dsnr[t], schedule.a[t], schedule.b[t], schedule.std[t] ** 2]
        for value, wanted in zip(found, row, strict=True):
            assert value.item() == pytest.approx(wanted, rel=2e-4, abs=6e-5)  # the table's last digit


def test_interior_grid_ends() -> None:
    # Oracle: the same independent computation: abar_0 = 0.01677, abar_10 = 0.98003, last dSNR 36.2, and nothing to clip.
    shares = signal_shares("cosine-interior", 10, 1e-9)
    assert shares[0].item() == pytest.approx(0.01677, abs=5e-6)
    assert shares[-1].item() == pytest.approx(0.98003, abs=5e-6)
    assert NoiseSchedule(shares).dsnr[10].item() == pytest.approx(36.2, abs=0.05)


def test_linear_schedule_is_linear() -> None:
    # Oracle: t / T, clipped at both ends.
    assert signal_shares("linear", 4, 0.01).tolist() == pytest.approx([0.01, 0.25, 0.5, 0.75, 0.99])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("T", [1, 2, 10, 50])
def test_posterior_coefficients_reproduce_the_marginals(name: str, T: int) -> None:
    # Oracle: conservation of mean and variance when uhat = u, and a^2/c = dSNR (papers.md 1.1). Float64, so exact to rounding.
    torch.set_default_dtype(torch.float64)
    try:
        s = NoiseSchedule(signal_shares(name, T, 1e-4))
    finally:
        torch.set_default_dtype(torch.float32)
    before, after = s.abar[:-1], s.abar[1:]
    a, b, c = s.a[1:], s.b[1:], s.std[1:] ** 2
    torch.testing.assert_close(a + b * before.sqrt(), after.sqrt(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(b**2 * (1 - before) + c, 1 - after, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(a**2 / c, s.dsnr[1:], rtol=1e-9, atol=1e-12)


def test_chain_with_the_true_embedding_has_the_marginals(device: torch.device) -> None:
    # Oracle: Eq. 6. Monte Carlo over 40,000 chains: means and variances of z_t within 5 standard errors of q(z_t|y).
    N, schedule = 40_000, NoiseSchedule(signal_shares("cosine", 10, 1e-4)).to(device)
    generator = torch.Generator(device).manual_seed(0)
    u = torch.tensor([[1.0, -0.5, 0.0]], device=device).expand(N, 3)
    z = schedule.noised(u, 0, generator)
    for t in range(1, 11):
        z = schedule.advance(z, u, t, generator)
        direct = schedule.noised(u, t, generator)
        variance = 1 - schedule.abar[t].item()
        for sample in (z, direct):
            assert (sample.mean(0) - schedule.signal[t] * u[0]).abs().max() < 5 * (variance / N) ** 0.5
            assert (sample.var(0) - variance).abs().max() < 5 * variance * (2 / N) ** 0.5


def test_prior_divergence_is_the_gaussian_one(device: torch.device) -> None:
    # Oracle: torch.distributions.
    u = torch.randn(7, 5, device=device)
    abar = torch.tensor(0.3, device=device)
    q = Independent(Normal(abar.sqrt() * u, (1 - abar).sqrt().expand_as(u)), 1)
    p = Independent(Normal(torch.zeros_like(u), torch.ones_like(u)), 1)
    torch.testing.assert_close(prior_divergence(u, abar), kl_divergence(q, p).mean())


def test_levels_that_coincide_are_refused() -> None:
    # Oracle: at T=1000 the first cosine level, 2.5e-6, is below the clip of 1e-4, as is the zeroth.
    with pytest.raises(UsageError, match="equal noise levels"):
        signal_shares("cosine", 1000, 1e-4)
