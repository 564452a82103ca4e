"""ViTDet's windowed attention: which blocks use windows, checks of window sizes, and the split into windows.

Li et al. 2022, "Exploring plain vision transformer backbones for object detection" (arXiv:2203.16527).
"""

from __future__ import annotations

from torch import Tensor

from agglo.types import ConfigError

SUGGESTED = range(2, 65)
"""Window sides, in patches, that error messages suggest."""


def windowed_blocks(depth: int, *, num_windowed: int | None = None, num_global: int = 4) -> tuple[bool, ...]:
    """For each block, whether its attention is windowed.

    The last block of every period and the last of all are global, with ``period = num_windowed + 1`` or
    ``max(depth // num_global, 1)``. A depth that is not a multiple of the period has one more global block.

    Args:
        depth: number of blocks.
        num_windowed: windowed blocks between two global ones; None to spread ``num_global`` over the depth.
        num_global: number of global blocks.
    """
    period = num_windowed + 1 if num_windowed is not None else max(depth // num_global, 1)
    return tuple(index % period != period - 1 and index != depth - 1 for index in range(depth))


def check_window_value(window: int | None) -> None:
    """Raise a ConfigError unless a window is None (the model's own), 0 (none), or an integer of at least 2 patches."""
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 0 or window == 1):
        raise ConfigError(
            f"window: {window!r} is neither 0 (none) nor an integer of at least 2 patches (6 to 32 is usual)"
        )


def check_window_divides(grid: tuple[int, int], window: int, patch: int) -> None:
    """Raise a ConfigError unless the window divides both sides of a grid of patches."""
    height, width = grid
    if window >= 1 and height % window == 0 and width % window == 0:
        return
    legal = [side for side in SUGGESTED if height % side == 0 and width % side == 0]
    advice = f"windows that do: {', '.join(map(str, legal))}" if legal else "no window of 2 patches or more does"
    raise ConfigError(
        f"window {window} does not divide the {height}x{width} patches of {height * patch}x{width * patch} pixels; "
        f"{advice}; or resize to multiples of {max(window, 1) * patch} pixels"
    )


def check_window_fits(size: tuple[int, int], window: int, patch: int) -> None:
    """Raise a ConfigError if an image ``(H, W)`` in pixels is less than half of one window of patches."""
    least = min(size)
    if 2 * least >= window * patch:
        return
    widest = 2 * least // patch
    advice = f"windows that fit: {', '.join(map(str, range(2, widest + 1)))}" if widest >= 2 else "no window does"
    raise ConfigError(
        f"images of {size[0]}x{size[1]} pixels (HxW) do not fill half a window of {window} patches, "
        f"{window * patch} pixels; {advice}; or pass window=0, or larger images"
    )


def to_windows(patches: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """``(B, h w, C)`` to ``(B nW, window^2, C)``; patches and windows row-major."""
    batch, _, channels = patches.shape
    rows, columns = grid[0] // window, grid[1] // window
    tiles = patches.view(batch, rows, window, columns, window, channels).transpose(2, 3)
    return tiles.reshape(batch * rows * columns, window * window, channels)


def from_windows(windows: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """The inverse of :func:`to_windows`."""
    rows, columns = grid[0] // window, grid[1] // window
    tiles = windows.view(-1, rows, columns, window, window, windows.shape[-1]).transpose(2, 3)
    return tiles.reshape(-1, grid[0] * grid[1], windows.shape[-1])
