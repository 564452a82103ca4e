"""Linear algebra of target normalisation: exact Hadamard matrices, equal-variance rotations, streaming moments.

Everything is float64: these numbers are computed once, before training, and then frozen (PHI-S, arXiv:2410.01680;
docs/method.md, 2.2).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from agglo import dist

# Rows centred at once in float64: bounds the temporary memory of `Moments.update` to 16384 * C * 8 bytes.
_CHUNK = 16384


class Rotation(NamedTuple):
    """An orthogonal matrix and whether every squared entry is exactly ``1 / n``.

    Args:
        matrix: ``(n, n)`` float64, ``matrix @ matrix.T = I``.
        exact: True for a Hadamard matrix; False for the random fallback, which is isotropic only on average.
    """

    matrix: Tensor
    exact: bool


def unit(x: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """``x / ||x||`` along ``dim``; vectors shorter than ``eps`` become 0 and get no gradient.

    Division by ``max(||x||, eps)`` alone would give a zero vector a gradient of order ``1 / eps``. NaN and infinity
    give NaN.
    """
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    # Not `norm > eps`, which is False for NaN and would turn it into 0.
    directed = ~(norm <= eps)
    return torch.where(directed, x / norm.clamp(min=eps), 0.0)


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def _jacobsthal(q: int) -> Tensor:
    """``Q_ij = chi(i - j)`` over the integers modulo a prime ``q``; chi is +1 on squares, -1 on non-squares, 0 at 0."""
    chi = torch.full((q,), -1, dtype=torch.int8)
    chi[torch.arange(1, q) ** 2 % q] = 1
    chi[0] = 0
    i = torch.arange(q)
    return chi[(i[:, None] - i[None, :]) % q]


def _bordered(core: Tensor, left: int) -> Tensor:
    """``[[0, 1], [left, core]]`` with a row of ones and a column of ``left``."""
    out = torch.zeros(len(core) + 1, len(core) + 1, dtype=core.dtype)
    out[0, 1:], out[1:, 0], out[1:, 1:] = 1, left, core
    return out


def _paley_type(n: int) -> int:
    """1 or 2 where Paley I or II over a prime field gives a Hadamard matrix of order ``n``, else 0."""
    # q itself must be 1 mod 4 for Paley II: an even power of q = 3 mod 4 is 1 mod 4 too.
    if _is_prime(n - 1) and (n - 1) % 4 == 3:
        return 1
    q = n // 2 - 1
    return 2 if n % 2 == 0 and _is_prime(q) and q % 4 == 1 else 0


def _paley(n: int) -> Tensor:
    """``(n, n)`` signs of the Paley matrix of an order whose :func:`_paley_type` is not 0."""
    if _paley_type(n) == 1:
        return torch.eye(n, dtype=torch.int8) + _bordered(_jacobsthal(n - 1), -1)
    at_sign = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    at_zero = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    conference = _bordered(_jacobsthal(n // 2 - 1), 1)
    return torch.kron(conference, at_sign) + torch.kron(torch.eye(n // 2, dtype=torch.int8), at_zero)


def _split(n: int) -> tuple[int, int] | None:
    """``(s, p)`` with ``n = s * p``, ``s`` the largest power of two for which ``p`` is 1 or a Paley order; or None."""
    power = n & -n if n > 0 else 0
    while power >= 1:
        if power == n or _paley_type(n // power):
            return power, n // power
        power //= 2
    return None


@lru_cache(maxsize=8)
def _signs(n: int) -> Tensor:
    """``(n, n)`` int8 of +1 and -1; callers must not write into it."""
    split = _split(n)
    if split is None:
        raise ValueError(_no_order(n))
    power, order = split
    signs = torch.ones(1, 1, dtype=torch.int8)
    while len(signs) < power:
        signs = torch.kron(torch.tensor([[1, 1], [1, -1]], dtype=torch.int8), signs)
    if order > 1:
        signs = torch.kron(signs, _paley(order))
    # Integers below 2^24 are exact in float32.
    gram = signs.float() @ signs.float().T
    if not torch.equal(gram, n * torch.eye(n)):
        raise ArithmeticError(f"the constructed matrix of order {n} is not Hadamard: H Hᵀ != {n} I")
    return signs


def _no_order(n: int) -> str:
    if n < 1:
        return f"the order of a Hadamard matrix is a positive integer, got {n}"
    below = next(m for m in range(n, 0, -1) if is_hadamard_order(m))
    above = next(m for m in range(n, 2 * n + 2) if is_hadamard_order(m))
    return (
        f"no Hadamard matrix of order {n} by Sylvester and Paley over prime fields (nearest: {below}, {above}); "
        "isotropic_rotation falls back to a random rotation"
    )


def is_hadamard_order(n: int) -> bool:
    """Whether :func:`hadamard` can build order ``n``; False does not mean that no such matrix exists."""
    return _split(n) is not None


def hadamard(n: int) -> Tensor:
    """The normalised Hadamard matrix of order ``n``: ``(n, n)`` float64, entries ``±1/sqrt(n)``, ``H Hᵀ = I``.

    ``n = 2^i p`` with the largest ``i`` that works: Sylvester(2^i) ⊗ Paley(p), where Paley I takes ``p = q + 1`` with
    a prime ``q = 3 (mod 4)`` and Paley II ``p = 2 (q + 1)`` with a prime ``q = 1 (mod 4)`` (PHI-S, arXiv:2410.01680).

    Raises:
        ValueError: no such construction; the message has the nearest orders that have one.
    """
    return _signs(n).double() / n**0.5


def isotropic_rotation(n: int) -> Rotation:
    """:func:`hadamard` if it exists, else the Q factor of a fixed random ±1 matrix.

    The squared entries of the fallback are ``1 / n`` only on average: see :func:`equalise_variance`.

    Raises:
        ValueError: ``n`` is not positive.
    """
    if is_hadamard_order(n):
        return Rotation(hadamard(n), exact=True)
    if n < 1:
        raise ValueError(f"the order of a rotation is a positive integer, got {n}")
    generator = torch.Generator().manual_seed(n)
    signs = torch.randint(0, 2, (n, n), generator=generator, dtype=torch.float64) * 2 - 1
    q, r = torch.linalg.qr(signs)
    # QR is unique only up to the signs of R's diagonal, which differ between LAPACK builds.
    return Rotation(q * torch.where(r.diagonal() < 0, -1.0, 1.0).double(), exact=False)


def equalise_variance(rotation: Tensor, covariance: Tensor) -> Tensor:
    """Rotate ``rotation`` further until every diagonal entry of ``R covariance Rᵀ`` equals the mean variance.

    Such a rotation exists for every symmetric matrix (Schur-Horn) and takes at most ``n - 1`` plane rotations (Bendel
    and Mickey 1978), each of which sets the smallest entry to the mean by rotating it against the largest.

    Args:
        rotation: ``(n, n)`` float64, orthogonal.
        covariance: ``(n, n)`` float64, symmetric.
    """
    rotation = rotation.clone()
    spread = rotation @ covariance @ rotation.T
    mean = float(spread.diagonal().mean())
    scale = float(spread.diagonal().abs().max())
    for _ in range(len(spread) - 1):
        diagonal = spread.diagonal()
        low, high = int(diagonal.argmin()), int(diagonal.argmax())
        below, above = float(diagonal[low]) - mean, float(diagonal[high]) - mean
        if max(-below, above) <= 1e-14 * scale:
            break
        cross = float(spread[low, high])
        # Smaller root of  above t² - 2 cross t + below = 0,  t = tan of the angle; below <= 0 <= above: always real.
        root = (cross * cross - below * above) ** 0.5
        tangent = below / (cross + root if cross >= 0 else cross - root)
        cosine = (1 + tangent * tangent) ** -0.5
        sine = tangent * cosine
        turn = torch.tensor([[cosine, -sine], [sine, cosine]], dtype=spread.dtype)
        pair = [low, high]
        rotation[pair] = turn @ rotation[pair]
        spread[pair] = turn @ spread[pair]
        spread[:, pair] = spread[:, pair] @ turn.T
    return rotation


class Moments:
    """Streaming mean and covariance of vectors, in float64, by the merge rule of Chan, Golub and LeVeque (1979).

    For a batch ``(n, m)`` and running ``(N, mean)``: ``δ = m - mean``; ``N += n``; ``mean += δ n / N``;
    ``M2 += Xcᵀ Xc + δ δᵀ n (N - n) / N``. Memory is ``M2`` plus one centred chunk of the batch: no second ``(C, C)``.

    Args:
        channels: length ``C`` of the vectors.
    """

    def __init__(self, channels: int) -> None:
        if channels < 1:
            raise ValueError(f"channels must be positive, got {channels}")
        self.count = 0
        self.mean = torch.zeros(channels, dtype=torch.float64)
        self._m2 = torch.zeros(channels, channels, dtype=torch.float64)

    def update(self, x: Tensor) -> None:
        """Add the rows of ``x (N, C)``. The sums are kept on the device of the first batch.

        Raises:
            ValueError: not ``(N, C)``, or an entry is not finite; the sums are then unchanged.
        """
        if x.ndim != 2 or x.shape[1] != len(self.mean):
            raise ValueError(f"expected (N, {len(self.mean)}), got {tuple(x.shape)}")
        x = x.detach()
        if not bool(torch.isfinite(x).all()):
            raise ValueError("the features contain NaN or infinity: run the teacher in float32, or check its input")
        if self.count == 0:
            # MPS has no float64.
            device = torch.device("cpu") if x.device.type == "mps" else x.device
            self.mean, self._m2 = self.mean.to(device), self._m2.to(device)
        with torch.autocast(self.mean.device.type, enabled=False):
            for chunk in x.split(_CHUNK):
                if len(chunk):
                    rows = chunk.to(self.mean.device).double()
                    mean = rows.mean(0)
                    rows = rows - mean
                    self._m2.addmm_(rows.T, rows)
                    self._shift(len(rows), mean)

    def merge(self, other: Moments) -> None:
        """Add the rows of ``other``, which is unchanged.

        Raises:
            ValueError: the channel counts differ.
        """
        if len(other.mean) != len(self.mean):
            raise ValueError(f"cannot merge moments of {len(other.mean)} channels into {len(self.mean)}")
        if other.count:
            self._m2 += other._m2.to(self._m2.device)
            self._shift(other.count, other.mean.to(self.mean.device))

    def all_reduce(self) -> None:
        """Add the rows of all ranks; afterwards all have the same sums."""
        if dist.world_size() == 1:
            return
        counts = dist.gather(self.count)
        mean = dist.total(self.mean * (self.count / sum(counts)))
        apart = self.mean - mean
        self._m2 = dist.total(self._m2.addr_(apart, apart, alpha=self.count))
        self.mean, self.count = mean, sum(counts)

    def _shift(self, count: int, mean: Tensor) -> None:
        """Include in the mean ``count`` rows around ``mean`` whose scatter is in ``M2`` already."""
        delta = mean - self.mean
        total = self.count + count
        self._m2.addr_(delta, delta, alpha=count * (self.count / total))
        self.mean = self.mean + delta * (count / total)
        self.count = total

    def covariance(self) -> Tensor:
        """The unbiased covariance ``M2 / (N - 1)``, ``(C, C)`` float64, exactly symmetric.

        Raises:
            ValueError: fewer than two rows.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 rows, got {self.count}")
        return (self._m2 + self._m2.T) / (2 * (self.count - 1))
