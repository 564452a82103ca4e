"""Windows at inference: the schedule, the way there and back, and attention by brute force."""

import pytest
import torch

from agglo.nn.windows import check_window_divides, from_windows, to_windows, windowed_blocks
from agglo.students.vit import ViT


@pytest.mark.parametrize(
    ("depth", "rule", "global_blocks"),
    [
        (12, {}, [2, 5, 8, 11]),
        (24, {}, [5, 11, 17, 23]),
        (32, {}, [7, 15, 23, 31]),
        (27, {}, [5, 11, 17, 23, 26]),
        (40, {"num_global": 8}, [4, 9, 14, 19, 24, 29, 34, 39]),
        (32, {"num_windowed": 5}, [5, 11, 17, 23, 29, 31]),
        (3, {}, [0, 1, 2]),  # too shallow for four: every block sees all
    ],
)
def test_which_blocks_are_global(depth: int, rule: dict[str, int], global_blocks: list[int]) -> None:
    windowed = windowed_blocks(depth, **rule)
    assert [index for index, flag in enumerate(windowed) if not flag] == global_blocks


def test_windows_are_row_major_and_invertible() -> None:
    grid, window = (4, 6), 2
    cells = torch.arange(24.0).view(1, 24, 1).repeat(2, 1, 3)
    windows = to_windows(cells, grid, window)
    assert windows.shape == (12, 4, 3)
    assert windows[0, :, 0].tolist() == [0, 1, 6, 7]
    assert windows[1, :, 0].tolist() == [2, 3, 8, 9]
    assert windows[3, :, 0].tolist() == [12, 13, 18, 19]
    assert torch.equal(from_windows(windows, grid, window), cells)


def test_error_of_a_window_lists_those_that_divide() -> None:
    check_window_divides((12, 24), 6, 16)
    with pytest.raises(
        ValueError, match=r"12x24 patches of 192x384 pixels; windows that do: 2, 3, 4, 6, 12;.*80 pixels"
    ):
        check_window_divides((12, 24), 5, 16)
    with pytest.raises(ValueError, match="no window of 2 patches or more does"):
        check_window_divides((7, 5), 2, 16)


@pytest.fixture
def vit() -> ViT:
    torch.manual_seed(0)
    return ViT(("a", "b"), width=32, depth=4, heads=2, patch=8, max_grid=16, registers=1, num_global=2).eval()


def test_windowed_blocks_by_brute_force(vit: ViT) -> None:
    """Block by block and window by window, with the prefix waiting."""
    images = torch.rand(2, 3, 32, 48)
    with torch.no_grad():
        x = vit.patch_generator(images)
        for block, windowed in zip(vit.blocks, (True, False, True, False), strict=True):
            if not windowed:
                x = block(x)
                continue
            grid = x[:, 3:].reshape(2, 4, 6, 32).clone()
            for row in range(0, 4, 2):
                for column in range(0, 6, 2):
                    part = grid[:, row : row + 2, column : column + 2]
                    grid[:, row : row + 2, column : column + 2] = block(part.reshape(2, 4, 32)).view(2, 2, 2, 32)
            x = torch.cat([x[:, :3], grid.reshape(2, 24, 32)], dim=1)
        found = vit(images, window=2)
    torch.testing.assert_close(found.tokens(), x[:, 3:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.summary, x[:, :2].flatten(1), rtol=1e-5, atol=1e-5)


def test_windows_change_the_result_and_zero_switches_them_off(vit: ViT) -> None:
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        plain, windowed = vit(images).spatial, vit(images, window=2).spatial
        vit.window = 2
        assert torch.equal(vit(images).spatial, windowed)
        assert torch.equal(vit(images, window=0).spatial, plain)
    assert not torch.allclose(plain, windowed, atol=1e-3)


def test_visited_blocks_are_in_raster_order_with_windows(vit: ViT) -> None:
    images = torch.rand(1, 3, 32, 48)
    seen = {}
    with torch.no_grad():
        vit.visit(images, range(4), lambda index, features: seen.update({index: features}), window=2)
        final = vit(images, window=2)
    assert list(seen) == [0, 1, 2, 3]
    torch.testing.assert_close(seen[3].spatial, final.spatial)
    # The prefix is untouched by a windowed block.
    torch.testing.assert_close(seen[0].summary, vit.patch_generator.token[:2].flatten()[None].expand(1, -1))
