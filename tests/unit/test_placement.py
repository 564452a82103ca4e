"""Maps of shifted views meet on the cells that both have seen."""

import math

import numpy as np
import pytest
import torch

from agglo.data.shifts import RenderedBatch, draw_shifts, max_shift
from agglo.nn.geometry import resample
from agglo.nn.placement import Placement, align_to_common_grid, resample_to


def place(start: list[list[float]], cell: float, grid: tuple[int, int]) -> Placement:
    return Placement(torch.tensor(start, dtype=torch.float64), (cell, cell), grid)


def test_whole_offsets_are_slices_bit_for_bit() -> None:
    """Sample by sample: shift m of the student against m' of the teacher is an offset of m' - m cells."""
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 4, 6, 8), torch.randn(3, 5, 6, 8)
    own, other = [[0, 0], [1, -2], [2, 0]], [[0, 0], [-1, 1], [0, 2]]
    a, b, mask = align_to_common_grid(student, place(own, 1, (6, 8)), teacher, place(other, 1, (6, 8)))
    assert b is teacher
    for sample, (mine, theirs) in enumerate(zip(own, other, strict=True)):
        dy, dx = theirs[0] - mine[0], theirs[1] - mine[1]
        expected = torch.zeros(6, 8, dtype=torch.bool)
        for i in range(6):
            for j in range(8):
                if 0 <= i + dy < 6 and 0 <= j + dx < 8:
                    expected[i, j] = True
                    assert torch.equal(a[sample, :, i, j], student[sample, :, i + dy, j + dx])
        assert torch.equal(mask[sample, 0], expected)


def test_coinciding_views_are_returned_unchanged() -> None:
    x, y = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)
    here = Placement.full(2, (1, 1), (4, 4))
    a, b, mask = align_to_common_grid(x, here, y, here)
    assert a is x
    assert b is y
    assert mask is None


@pytest.mark.parametrize(("fine", "coarse"), [((12, 9), (4, 3)), ((7, 10), (4, 6)), ((9, 9), (8, 5))])
def test_coinciding_views_on_other_grids_equal_plain_resampling(fine: tuple[int, int], coarse: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, *fine, dtype=torch.float64)
    found, mask = resample_to(x, Placement.full(2, (1, 1), fine), Placement.full(2, (1, 1), coarse))
    assert mask is None
    torch.testing.assert_close(found, resample(x, coarse))


def test_a_ramp_keeps_its_value_at_every_valid_cell() -> None:
    """A cell of the warped map has the source's value at the cell's centre, for every scale and offset."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        cells = rng.uniform(0.5, 2.0, 2)
        source = place(rng.uniform(-3, 3, (2, 2)).tolist(), float(cells.min()), (9, 12))
        target = place(rng.uniform(-3, 3, (2, 2)).tolist(), float(cells.max()), (5, 6))
        ys = source.start[:, :1] + (torch.arange(9) + 0.5) * source.cell[0]
        xs = source.start[:, 1:] + (torch.arange(12) + 0.5) * source.cell[1]
        ramp = (2 * ys[:, :, None] - 3 * xs[:, None, :])[:, None]
        found, mask = resample_to(ramp, source, target)
        mask = torch.ones(2, 1, 5, 6, dtype=torch.bool) if mask is None else mask
        ty = target.start[:, :1] + (torch.arange(5) + 0.5) * target.cell[0]
        tx = target.start[:, 1:] + (torch.arange(6) + 0.5) * target.cell[1]
        expected = (2 * ty[:, :, None] - 3 * tx[:, None, :])[:, None]
        # At the border the linear interpolation has no second support: half a source cell further in it has.
        edge = source.cell[0] / 2
        inside_y = (ty - target.cell[0] / 2 >= source.start[:, :1] + edge) & (
            ty + target.cell[0] / 2 <= source.start[:, :1] + 9 * source.cell[0] - edge
        )
        inside_x = (tx - target.cell[1] / 2 >= source.start[:, 1:] + edge) & (
            tx + target.cell[1] / 2 <= source.start[:, 1:] + 12 * source.cell[1] - edge
        )
        inside = (inside_y[:, :, None] & inside_x[:, None, :])[:, None]
        assert (mask | ~inside).all()  # what lies inside is valid
        torch.testing.assert_close(found[inside], expected[inside], rtol=1e-5, atol=1e-5)


def test_validity_by_brute_force() -> None:
    source, target = place([[0.0, 0.5]], 1.0, (4, 4)), place([[-1.0, 0.5]], 1.5, (3, 3))
    _, mask = resample_to(torch.randn(1, 1, 4, 4), source, target)
    rows = [(-1.0 + 1.5 * k, 0.5 + 1.5 * k) for k in range(3)]
    columns = [(0.5 + 1.5 * k, 2.0 + 1.5 * k) for k in range(3)]
    for i, (y0, y1) in enumerate(rows):
        for j, (x0, x1) in enumerate(columns):
            assert bool(mask[0, 0, i, j]) == (y0 >= 0 and y1 <= 4 and x0 >= 0.5 and x1 <= 4.5)


def test_gradients_reach_the_selected_cells() -> None:
    x = torch.randn(1, 2, 4, 4, requires_grad=True)
    a, _, mask = align_to_common_grid(
        x, place([[0, 0]], 1, (4, 4)), torch.zeros(1, 2, 4, 4), place([[2, 0]], 1, (4, 4))
    )
    (a * mask).sum().backward()
    assert x.grad[:, :, :2].abs().sum() == 0
    assert torch.equal(x.grad[:, :, 2:], torch.ones(1, 2, 2, 4))


def test_a_map_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"first map is \(1, 2, 4, 5\)"):
        align_to_common_grid(
            torch.zeros(1, 2, 4, 5), place([[0, 0]], 1, (4, 4)), torch.zeros(1, 2, 4, 4), place([[0, 0]], 1, (4, 4))
        )


# --- shifts -----------------------------------------------------------------------------------------------------------


def test_shifts_follow_the_rounded_normal_and_are_pure_functions() -> None:
    drawn = torch.cat([draw_shifts(3, step, 1, 64, 0.5) for step in range(200)])
    shares = {m: (drawn == m).double().mean().item() for m in range(-2, 3)}
    assert shares[0] == pytest.approx(0.683, abs=0.01)  # docs/method.md, 2.4
    assert shares[1] == pytest.approx(0.157, abs=0.01)
    assert shares[-1] == pytest.approx(0.157, abs=0.01)
    assert drawn.abs().max() <= max_shift(0.5) == 2
    assert torch.equal(draw_shifts(3, 7, 1, 8, 0.5), draw_shifts(3, 7, 1, 8, 0.5))
    assert not torch.equal(draw_shifts(3, 7, 1, 64, 0.5), draw_shifts(3, 7, 2, 64, 0.5))
    assert not draw_shifts(3, 7, 1, 8, 0.0).any()


@pytest.mark.parametrize("std", [0.3, 0.5, 0.8, 1.5, 3.0])
def test_clipped_shifts_do_not_accumulate_at_the_maximum(std: float) -> None:
    drawn = torch.cat([draw_shifts(3, step, 1, 64, std) for step in range(200)])
    assert drawn.abs().max() <= max_shift(std)
    beyond = lambda patches: math.erfc(patches / std / math.sqrt(2))  # noqa: E731
    assert beyond(max_shift(std) + 0.5) < 1e-6
    for m in (1, 2, max_shift(std)):
        share = (drawn.abs() == m).double().mean().item()
        assert share == pytest.approx(beyond(m - 0.5) - beyond(m + 0.5), abs=0.006)


@pytest.mark.parametrize("patches", [(16, 14), (16, 16), (8, 16)])
def test_shifted_views_have_equal_content_in_matching_cells(patches: tuple[int, int]) -> None:
    """Pixel values encode position: after alignment, matching cells hold equal values."""
    torch.manual_seed(0)
    mine, theirs = patches
    n = 6
    size, other = (n * 16, n * 16), (n * 16 * theirs // 16, n * 16 * theirs // 16)
    margin = max_shift(0.9) * 16
    side = size[0] + 2 * margin
    ramp = (torch.arange(side) + 0.5) / side
    images = torch.stack([ramp[:, None].expand(side, side), ramp[None].expand(side, side), torch.zeros(side, side)])
    batch = RenderedBatch(images[None].repeat(4, 1, 1, 1), (size[0] / side, size[1] / side))
    first, here = batch.crop(size, mine, draw_shifts(0, 0, 0, 4, 0.9))
    second, there = batch.crop(other, theirs, draw_shifts(0, 0, 1, 4, 0.9))
    assert first.shape[-2:] == size
    assert second.shape[-2:] == other
    a = torch.nn.functional.avg_pool2d(first, mine)
    b = torch.nn.functional.avg_pool2d(second, theirs)
    a, b, mask = align_to_common_grid(a, here.with_grid(tuple(a.shape[-2:])), b, there.with_grid(tuple(b.shape[-2:])))
    mask = torch.ones_like(a[:, :1], dtype=torch.bool) if mask is None else mask
    assert mask.float().mean() > 0.3
    assert mask.float().mean() < 1
    inner = mask.clone()
    inner[:, :, 0] = inner[:, :, -1] = False
    inner[..., 0] = inner[..., -1] = False
    difference = (a - b).abs().amax(1, keepdim=True)
    assert difference[inner].max() < 0.05 * 16 / side
