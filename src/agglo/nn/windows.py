"""ViTDet's windowed attention at inference: which blocks look through windows, and the way there and back.

Li et al. 2022, "Exploring plain vision transformer backbones for object detection" (arXiv 2203.16527).
"""

from __future__ import annotations

from torch import Tensor

from agglo.types import ConfigError

SUGGESTED = range(2, 65)
"""Window sides, in patches, that errors offer."""


def windowed_blocks(depth: int, *, num_windowed: int | None = None, num_global: int = 4) -> tuple[bool, ...]:
    """For each block, whether it looks through windows.

    ``period = num_windowed + 1``, or ``max(depth // num_global, 1)``; the last block of every period, and the last of
    all, sees the whole image. So a depth that is no multiple of the period has one global block more than asked for.

    Args:
        depth: number of blocks.
        num_windowed: windowed blocks between two global ones; None to spread ``num_global`` over the depth.
        num_global: how many blocks shall be global.
    """
    period = num_windowed + 1 if num_windowed is not None else max(depth // num_global, 1)
    return tuple(index % period != period - 1 and index != depth - 1 for index in range(depth))


def check_window_value(window: int | None) -> None:
    """Raise unless a window is None (the model's own), 0 (none), or a whole number of at least 2 patches.

    Raises:
        ConfigError: names what is legal.
    """
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 0 or window == 1):
        raise ConfigError(
            f"window: 0 for none, or a whole number of patches from 2 on (6 to 32 is usual); got {window!r}"
        )


def check_window_divides(grid: tuple[int, int], window: int, patch: int) -> None:
    """Raise unless the window divides both sides of a grid of patches.

    Raises:
        ConfigError: names the windows that do.
    """
    height, width = grid
    if window >= 1 and height % window == 0 and width % window == 0:
        return
    legal = [side for side in SUGGESTED if height % side == 0 and width % side == 0]
    some = f"windows that do: {', '.join(map(str, legal))}" if legal else "no window of 2 patches or more does"
    raise ConfigError(
        f"window {window} does not divide the {height}x{width} patches of {height * patch}x{width * patch} pixels; "
        f"{some}; or bring the sides to multiples of {max(window, 1) * patch} pixels"
    )


def check_window_fits(size: tuple[int, int], window: int, patch: int) -> None:
    """Raise where an image would have to be more than doubled to hold one window.

    Args:
        size: ``(H, W)`` of the image in pixels.
        window: side in patches.
        patch: pixels a patch.

    Raises:
        ConfigError: names the windows that fit.
    """
    least = min(size)
    if 2 * least >= window * patch:
        return
    widest = 2 * least // patch
    some = f"windows that fit: {', '.join(map(str, range(2, widest + 1)))}" if widest >= 2 else "no window does"
    raise ConfigError(
        f"images of {size[0]}x{size[1]} pixels (HxW) do not fill half a window of {window} patches, "
        f"{window * patch} pixels; {some}; or pass window=0, or larger images"
    )


def to_windows(patches: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """``(B, h w, C)`` in raster order to ``(B nW, window^2, C)``: windows row by row, row-major inside each."""
    batch, _, channels = patches.shape
    rows, columns = grid[0] // window, grid[1] // window
    tiles = patches.view(batch, rows, window, columns, window, channels).transpose(2, 3)
    return tiles.reshape(batch * rows * columns, window * window, channels)


def from_windows(windows: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """The inverse of :func:`to_windows`."""
    rows, columns = grid[0] // window, grid[1] // window
    tiles = windows.view(-1, rows, columns, window, window, windows.shape[-1]).transpose(2, 3)
    return tiles.reshape(-1, grid[0] * grid[1], windows.shape[-1])
