"""The normalizers: closed forms, PHI-S's promises, the pre-pass protocol and the fold into a head."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from agglo.nn.linalg import equalise_variance, hadamard, isotropic_rotation
from agglo.normalizers._affine import AffineNormalizer
from agglo.normalizers.global_standard import GlobalStandard
from agglo.normalizers.identity import Identity
from agglo.normalizers.phi_s import PhiS
from agglo.normalizers.standard import Standard
from agglo.normalizers.whiten import Whiten

FITTED = [GlobalStandard, Standard, PhiS, Whiten]
KINDS = [Identity, *FITTED]
ROTATIONS = ["pca", "zca", "hadamard"]

# Many orders here have no Hadamard matrix, and some features fewer positions than channels; both are tested below.
pytestmark = [
    pytest.mark.filterwarnings("ignore:no Hadamard matrix:UserWarning"),
    pytest.mark.filterwarnings("ignore:the covariance of:UserWarning"),
]


def _features(channels: int, rank: int | None = None, seed: int = 0, batch: int = 6, size: int = 7) -> Tensor:
    """Correlated channels of very different scales, far from zero mean; float32 ``(B, C, H, W)``."""
    rng = np.random.default_rng(seed)
    rank = rank or channels
    mix = rng.normal(size=(rank, channels)) * np.exp(1.5 * rng.normal(size=channels))
    rows = rng.normal(size=(batch * size * size, rank)) @ mix + 3 * rng.normal(size=channels)
    return torch.from_numpy(rows.reshape(batch, size, size, channels).transpose(0, 3, 1, 2).copy()).float()


def _fitted(kind: type[AffineNormalizer], features: Tensor) -> AffineNormalizer:
    normalizer = kind(features.shape[1])
    if normalizer.needs_statistics:
        normalizer.update(features)
        normalizer.freeze()
    return normalizer


def _rows(features: Tensor) -> np.ndarray:
    return features.movedim(1, -1).reshape(-1, features.shape[1]).double().numpy()


@pytest.mark.parametrize("channels", [1, 2, 5, 12, 21, 36, 40])
@pytest.mark.parametrize("rank", [None, 1, 3])
def test_phi_s_gives_unit_variance_in_every_channel(channels: int, rank: int | None) -> None:
    y = _features(channels, rank)
    rows = _rows(_fitted(PhiS, y)(y))
    np.testing.assert_allclose(rows.var(0, ddof=1), 1, rtol=2e-5)
    np.testing.assert_allclose(rows.mean(0), 0, atol=1e-4)


@pytest.mark.parametrize("channels", [12, 21])
def test_phi_s_is_a_rotation_times_a_scalar(channels: int) -> None:
    y = _features(channels, rank=4)
    normalizer = _fitted(PhiS, y)
    phi = float(np.sqrt(np.trace(np.cov(_rows(y).T)) / channels))
    whiten = normalizer.whiten.double().numpy()
    np.testing.assert_allclose(phi * phi * whiten @ whiten.T, np.eye(channels), atol=1e-6)
    np.testing.assert_allclose(whiten @ normalizer.unwhiten.double().numpy(), np.eye(channels), atol=1e-6)
    # Distances shrink by phi and nothing else.
    a, b = _rows(y)[:20], _rows(y)[20:40]
    s, t = _rows(normalizer(y))[:20], _rows(normalizer(y))[20:40]
    np.testing.assert_allclose(np.linalg.norm(s - t, axis=1), np.linalg.norm(a - b, axis=1) / phi, rtol=1e-4)


def test_phi_s_equals_the_formula() -> None:
    y = _features(12)
    rows = _rows(y)
    values, vectors = np.linalg.eigh(np.cov(rows.T))
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), np.arange(12)])
    expected = (rows - rows.mean(0)) @ vectors @ hadamard(12).numpy().T / np.sqrt(values.mean())
    np.testing.assert_allclose(_rows(_fitted(PhiS, y)(y)), expected, atol=1e-4)


@pytest.mark.parametrize("channels", [12, 21])
def test_phi_s_ignores_rotations_of_the_teacher_space(channels: int) -> None:
    y = _features(channels)
    turn = np.linalg.qr(np.random.default_rng(5).normal(size=(channels, channels)))[0]
    turned = torch.einsum("ij,bjhw->bihw", torch.from_numpy(turn), y.double()).float()
    # Undo the common rotation H: what is left are principal components, defined up to their signs.
    h, exact = isotropic_rotation(channels)
    values = torch.from_numpy(np.linalg.eigvalsh(np.cov(_rows(y).T)))
    h = h if exact else equalise_variance(h, values.diag())
    one, two = _rows(_fitted(PhiS, y)(y)) @ h.numpy(), _rows(_fitted(PhiS, turned)(turned)) @ h.numpy()
    signs = np.sign((one * two).sum(0))
    np.testing.assert_allclose(one, two * signs, atol=2e-3)
    assert np.abs(one).max() > 1


def test_phi_s_clamps_negative_eigenvalues() -> None:
    whiten, _ = PhiS(4).solve(torch.tensor([3.0, 3.0, 2.0, -2.0], dtype=torch.float64).diag())
    np.testing.assert_allclose(whiten @ whiten.T, np.eye(4) / 2, atol=1e-12)  # phi² = (3 + 3 + 2 + 0) / 4


def test_phi_s_is_reproducible() -> None:
    y = _features(20)
    assert torch.equal(_fitted(PhiS, y).whiten, _fitted(PhiS, y).whiten)


def test_standard_equals_numpy_and_survives_a_constant_channel() -> None:
    y = _features(6)
    y[:, 2] = 4.25
    rows = _rows(y)
    sigma = rows.std(0, ddof=1)
    assert sigma[2] == 0
    sigma[2] = np.sqrt(rows.var(0, ddof=1).mean())
    normalizer = _fitted(Standard, y)
    np.testing.assert_allclose(_rows(normalizer(y)), (rows - rows.mean(0)) / sigma, atol=2e-5)
    assert torch.equal(normalizer.inverse(normalizer(y))[:, 2], y[:, 2])


def test_identity_is_frozen_from_the_start() -> None:
    y = _features(3)
    normalizer = Identity(3)
    assert not normalizer.needs_statistics and bool(normalizer.frozen)
    assert torch.equal(normalizer(y), y) and torch.equal(normalizer.inverse(y), y)
    assert torch.equal(normalizer.whiten, torch.eye(3)) and torch.equal(normalizer.mean, torch.zeros(3))
    assert normalizer(y.bfloat16()).dtype == torch.float32
    with pytest.raises(RuntimeError, match="frozen"):
        normalizer.update(y)


def test_global_standard_uses_one_mean_and_one_scale() -> None:
    y = _features(6)
    rows = _rows(y)
    mean = rows.mean()
    sigma = np.sqrt(rows.var(0, ddof=1).mean() + rows.mean(0).var())
    np.testing.assert_allclose(sigma, rows.std(), rtol=2e-3)  # up to n - 1 for n
    normalizer = _fitted(GlobalStandard, y)
    np.testing.assert_allclose(_rows(normalizer(y)), (rows - mean) / sigma, atol=2e-5)
    assert len(normalizer.mean.unique()) == 1
    np.testing.assert_allclose(normalizer.unwhiten, sigma * np.eye(6), rtol=1e-5)


def _whitener(y: Tensor, rotation: str, floor: float = 1e-4) -> Whiten:
    normalizer = Whiten(y.shape[1], rotation=rotation, floor=floor)  # type: ignore[arg-type]
    normalizer.update(y)
    normalizer.freeze()
    return normalizer


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("channels", [1, 5, 12])
def test_whitening_gives_the_identity_covariance(rotation: str, channels: int) -> None:
    y = _features(channels)
    normalizer = _whitener(y, rotation, floor=1e-9)
    covariance = np.cov(_rows(normalizer(y)).T).reshape(channels, channels)
    np.testing.assert_allclose(covariance, np.eye(channels), atol=2e-3)
    np.testing.assert_allclose(_rows(normalizer.inverse(normalizer(y))), _rows(y), atol=2e-3)


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_whitening_equals_the_formula(rotation: str) -> None:
    y = _features(12)
    values, vectors = np.linalg.eigh(np.cov(_rows(y).T))
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), np.arange(12)])
    values = np.maximum(values, 1e-4 * values.mean())
    turn = {"pca": np.eye(12), "zca": vectors, "hadamard": hadamard(12).numpy()}[rotation]
    normalizer = _whitener(y, rotation)
    np.testing.assert_allclose(normalizer.whiten, turn @ np.diag(values**-0.5) @ vectors.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(normalizer.unwhiten, vectors @ np.diag(values**0.5) @ turn.T, rtol=1e-4, atol=1e-5)


def test_whitenings_differ_by_a_rotation_and_zca_is_symmetric() -> None:
    y = _features(12)
    pca, zca, hca = (_whitener(y, rotation).whiten.double().numpy() for rotation in ROTATIONS)
    np.testing.assert_allclose(zca, zca.T, atol=1e-6)
    np.testing.assert_allclose(hca, hadamard(12).numpy() @ pca, atol=1e-5)
    np.testing.assert_allclose(zca.T @ zca, pca.T @ pca, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("channels", [9, 12])
def test_the_floor_bounds_the_gain_of_a_rank_deficient_covariance(rotation: str, channels: int) -> None:
    y = _features(channels, rank=3)
    mean = np.trace(np.cov(_rows(y).T)) / channels
    normalizer = _whitener(y, rotation, floor=1e-2)
    whiten = normalizer.whiten.double().numpy()
    np.testing.assert_allclose(np.linalg.norm(whiten, 2), 10 / np.sqrt(mean), rtol=1e-4)
    np.testing.assert_allclose(whiten @ normalizer.unwhiten.double().numpy(), np.eye(channels), atol=1e-5)
    np.testing.assert_allclose(np.trace(np.cov(_rows(normalizer(y)).T)), 3, atol=0.7)  # three directions, no noise


@pytest.mark.parametrize("channels", [9, 12])
def test_hadamard_whitening_shares_errors_evenly(channels: int) -> None:
    columns = np.square(_whitener(_features(channels), "hadamard").unwhiten.double().numpy()).sum(0)
    np.testing.assert_allclose(columns, columns.mean(), rtol=1e-5)


@pytest.mark.parametrize("floor", [0.0, -1.0, 1.5, float("nan")])
def test_floors_out_of_range_are_refused(floor: float) -> None:
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        Whiten(4, floor=floor)


def test_whitening_error_has_the_number_of_positions_needed() -> None:
    short, enough = Whiten(12), Whiten(12)
    short.update(_features(12)[:1, :, :3, :4])
    with pytest.raises(ValueError, match=r"12 positions.* 13 are needed.*estimate_images"):
        short.freeze()
    assert not bool(short.frozen)
    short.update(_features(12)[1:])  # the statistics are still there
    short.freeze()
    enough.update(_features(13)[:1, :12, :1, :7])
    enough.update(_features(13)[1:, :12, :1, :1])
    enough.update(_features(13)[1:2, :12, 1:2, :1])
    enough.freeze()


def test_phi_s_only_warns_of_few_positions() -> None:
    y, normalizer = _features(12)[:1, :, :3, :4], PhiS(12)
    normalizer.update(y)
    with pytest.warns(UserWarning, match=r"13 are needed.*estimate_images"):
        normalizer.freeze()
    np.testing.assert_allclose(_rows(normalizer(y)).var(0, ddof=1), 1, rtol=1e-4)


@pytest.mark.parametrize("kind", [PhiS, lambda channels: Whiten(channels, rotation="hadamard")])
def test_the_fallback_without_a_hadamard_matrix_warns_once(kind: type[AffineNormalizer]) -> None:
    y = _features(9)
    with pytest.warns(UserWarning, match="no Hadamard matrix of order 9: .* used instead") as caught:
        normalizer = _fitted(kind, y)
    assert len(caught) == 1 and caught[0].filename == __file__
    normalizer.inverse(normalizer(y))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [5, 12])
def test_inverse_undoes_forward_and_agrees_with_the_buffers(kind: type[AffineNormalizer], channels: int) -> None:
    y = _features(channels)
    normalizer = _fitted(kind, y)
    np.testing.assert_allclose(normalizer.inverse(normalizer(y)).numpy(), y.numpy(), atol=1e-4)
    # The exporter reads the buffers, so they must say what forward does.
    expected = (_rows(y) - normalizer.mean.double().numpy()) @ normalizer.whiten.double().numpy().T
    np.testing.assert_allclose(_rows(normalizer(y)), expected, atol=1e-4)
    np.testing.assert_allclose(normalizer.whiten @ normalizer.unwhiten, np.eye(channels), atol=1e-5)


@pytest.mark.parametrize("kind", FITTED)
def test_streaming_and_masks(kind: type[AffineNormalizer]) -> None:
    y = _features(12, batch=8)
    mask = torch.rand(8, 1, 7, 7, generator=torch.Generator().manual_seed(0)) > 0.3
    mask[3] = False
    whole, parts = kind(12), kind(12)
    rows = y.movedim(1, -1)[mask[:, 0]]
    whole.update(rows.T.reshape(1, 12, 1, -1))
    poisoned = torch.where(mask, y, float("nan"))
    for start, stop in [(0, 1), (1, 4), (4, 8)]:
        parts.update(poisoned[start:stop], mask[start:stop])
    whole.freeze()
    parts.freeze()
    np.testing.assert_allclose(parts.mean, parts.centre(rows.double().mean(0)), rtol=1e-5)
    np.testing.assert_allclose(parts.whiten, whole.whiten, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_fold_into_the_last_linear_layer(kind: type[AffineNormalizer]) -> None:
    """``W = unwhiten W'``, ``b = unwhiten b' + mean`` gives the head in teacher space."""
    torch.manual_seed(0)
    normalizer = _fitted(kind, _features(12))
    last, folded = nn.Linear(5, 12), nn.Linear(5, 12)
    with torch.no_grad():
        folded.weight.copy_(normalizer.unwhiten @ last.weight)
        folded.bias.copy_(normalizer.unwhiten @ last.bias + normalizer.mean)
    x = torch.randn(2, 3, 3, 5)
    native = normalizer.inverse(last(x).movedim(-1, 1))
    np.testing.assert_allclose(folded(x).movedim(-1, 1).detach(), native.detach(), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_state_round_trip(kind: type[AffineNormalizer]) -> None:
    y = _features(5)
    fitted, loaded = _fitted(kind, y), kind(5)
    loaded.load_state_dict(fitted.state_dict())
    assert torch.equal(loaded(y), fitted(y)) and torch.equal(loaded.inverse(y), fitted.inverse(y))
    with pytest.raises(RuntimeError, match="frozen"):
        loaded.freeze()
    # Inside a parent, as a run's state is; and an unfrozen state thaws the map.
    parent = nn.ModuleDict({"t": kind(5)})
    parent.load_state_dict({f"t.{k}": v for k, v in fitted.state_dict().items()})
    assert torch.equal(parent["t"](y), fitted(y))
    fitted.load_state_dict({**fitted.state_dict(), "frozen": torch.tensor(False)})
    with pytest.raises(RuntimeError, match="not frozen"):
        fitted(y)


@pytest.mark.parametrize("kind", FITTED)
def test_protocol(kind: type[AffineNormalizer]) -> None:
    y = _features(4)
    normalizer = kind(4)
    assert normalizer.needs_statistics
    with pytest.raises(RuntimeError, match="not frozen"):
        normalizer(y)
    with pytest.raises(RuntimeError, match="not frozen"):
        normalizer.inverse(y)
    with pytest.raises(RuntimeError, match="update"):
        normalizer.freeze()
    normalizer.update(y, torch.zeros(6, 1, 7, 7, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="update"):
        normalizer.freeze()
    normalizer.update(y)
    normalizer.freeze()
    with pytest.raises(RuntimeError, match="already"):
        normalizer.freeze()
    with pytest.raises(RuntimeError, match="frozen"):
        normalizer.update(y)


@pytest.mark.parametrize("kind", FITTED)
@pytest.mark.parametrize("value", [0.0, 0.1, -1234.5])
def test_features_without_variance_are_an_error(kind: type[AffineNormalizer], value: float) -> None:
    normalizer = kind(3)
    for _ in range(3):
        normalizer.update(torch.full((2, 3, 5, 5), value))
    with pytest.raises(ValueError, match="identity"):
        normalizer.freeze()
    assert not bool(normalizer.frozen)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_are_checked(kind: type[AffineNormalizer]) -> None:
    normalizer = _fitted(kind, _features(3))
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        normalizer(torch.zeros(1, 4, 2, 2))
    with pytest.raises(ValueError, match="positive"):
        kind(0)


@pytest.mark.parametrize("kind", FITTED)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_input_raises_without_changing_statistics(kind: type[AffineNormalizer], bad: float) -> None:
    y = _features(4)
    broken, normalizer = y.clone(), kind(4)
    broken[3, 1, 2, 5] = bad
    normalizer.update(y)
    with pytest.raises(ValueError, match="NaN or infinity"):
        normalizer.update(broken)
    normalizer.freeze()
    assert torch.equal(normalizer.whiten, _fitted(kind, y).whiten)


def test_mask_shape_and_finiteness_are_checked() -> None:
    normalizer = PhiS(3)
    with pytest.raises(ValueError, match=r"\(B, 1, H, W\)"):
        normalizer.update(torch.zeros(1, 3, 2, 2), torch.ones(1, 2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="NaN"):
        normalizer.update(torch.full((1, 3, 2, 2), float("nan")))


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_does_not_reach_the_map(kind: type[AffineNormalizer]) -> None:
    y = _features(12)
    normalizer = _fitted(kind, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = normalizer(y)
    assert inside.dtype == torch.float32 and torch.equal(inside, normalizer(y))


def test_autocast_does_not_reach_the_statistics() -> None:
    y = _features(12)
    cast = PhiS(12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast.update(y)
    cast.freeze()
    assert torch.equal(cast.whiten, _fitted(PhiS, y).whiten)
