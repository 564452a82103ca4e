"""Image-space passes: exact geometry maps, denoising, tone mapping and correspondences between two views."""

from __future__ import annotations

from typing import Any

import mitsuba as mi
import numpy as np
from scipy.ndimage import rank_filter, uniform_filter

TOLERANCE = 0.01
"""Maximum relative depth difference of a visible reprojected point."""


def pixel_rays(intrinsics: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """``(H, W, 3)`` camera-frame directions through the pixel centres, with z = 1."""
    y, x = np.indices(shape) + 0.5
    k = intrinsics
    return np.stack([(x - k[0, 2]) / k[0, 0], (y - k[1, 2]) / k[1, 1], np.ones(shape)], -1)


def geometry_maps(
    scene: Any, sensor: Any, pose: np.ndarray, intrinsics: np.ndarray, owners: dict[int, int], scale: int
) -> dict[str, np.ndarray]:
    """Depth, normals and instances at the pixel centres.

    Args:
        scene: the Mitsuba scene.
        sensor: a camera that samples each pixel once, at its centre.
        pose: ``(4, 4)`` cam_from_world.
        intrinsics: ``(3, 3)`` K in pixels.
        owners: instance id by shape index (0: background).
        scale: stored depth units per metre.

    Returns:
        ``depth`` float metres along the optical axis; ``depth_code`` uint16; ``normals`` ``(H, W, 3)`` unit vectors in
        the camera frame, facing the camera; ``normal_code`` uint8; ``instances`` uint8.
    """
    aov = mi.load_dict({"type": "aov", "aovs": "p:position,n:sh_normal,i:shape_index,d:depth"})
    out = np.array(mi.render(scene, sensor=sensor, integrator=aov, spp=1, seed=0), np.float64)
    out = out[..., -8:]
    position = out[..., :3] @ pose[:3, :3].T + pose[:3, 3]
    depth = np.where(out[..., 7] > 0, position[..., 2], np.inf)
    rays = pixel_rays(intrinsics, depth.shape)
    if np.isfinite(depth).all() and np.abs(position - rays * depth[..., None]).max() > 2e-3:
        raise RuntimeError("the geometry pass does not sample pixel centres")
    normals = out[..., 3:6] @ pose[:3, :3].T
    normals /= np.maximum(np.linalg.norm(normals, axis=-1, keepdims=True), 1e-12)
    view = rays / np.linalg.norm(rays, axis=-1, keepdims=True)
    facing = (normals * view).sum(-1, keepdims=True)
    normals = np.where(facing > 0.35, -normals, normals)  # thin open sheets seen from behind
    facing = np.minimum((normals * view).sum(-1, keepdims=True), 0) - (normals * view).sum(-1, keepdims=True)
    normals = normals + facing * view  # clamp interpolated normals just past a silhouette to grazing
    normals /= np.maximum(np.linalg.norm(normals, axis=-1, keepdims=True), 1e-12)
    index = np.rint(out[..., 6]).astype(int) - 1  # Mitsuba numbers shapes from 1 here; 0 is a miss
    table = np.array([owners[k] for k in range(len(owners))], np.uint8)
    finite = np.where(np.isfinite(depth), depth, 0)
    return {
        "depth": depth,
        "depth_code": np.clip(np.rint(finite * scale), 0, 65535).astype(np.uint16),
        "normals": normals,
        "normal_code": np.rint((normals + 1) * 127.5).astype(np.uint8),
        "instances": np.where(index >= 0, table[index], 0).astype(np.uint8),
    }


def albedo(scene: Any, sensor: Any, samples: int = 8) -> np.ndarray:
    """``(H, W, 3)`` antialiased diffuse reflectance seen by a camera."""
    aov = mi.load_dict({"type": "aov", "aovs": "a:albedo"})
    return np.array(mi.render(scene, sensor=sensor, integrator=aov, spp=samples, seed=1), np.float64)[..., -3:]


def denoise(image: np.ndarray, reflectance: np.ndarray, maps: dict[str, np.ndarray], radius: int = 4) -> np.ndarray:
    """Smooth the remaining Monte Carlo noise in the lighting, preserving textures and edges.

    The image is divided by the reflectance, averaged over neighbours that share instance, normal, depth and similar
    brightness, and multiplied by the reflectance again.

    Args:
        image: ``(H, W, 3)`` linear render.
        reflectance: `albedo` of the same camera.
        maps: `geometry_maps` of the same camera.
        radius: radius of the neighbourhood, in pixels.
    """
    # A pixel far brighter than all but its brightest neighbours is a stray caustic path, not a highlight.
    bound = np.stack([rank_filter(image[..., c], -3, size=3) for c in range(3)], -1) * 1.5 + 0.01
    base = np.maximum(reflectance, 0.04)
    light = np.minimum(np.nan_to_num(image), bound) / base
    level = np.log(uniform_filter(light.mean(-1), 3) + 0.02)
    total, weight = np.zeros_like(light), np.zeros(light.shape[:2])
    for dy in range(-radius, radius + 1):
        for dx in range(-radius, radius + 1):
            move = lambda a: np.roll(a, (dy, dx), (0, 1))  # noqa: B023, E731
            w = np.exp(-(dx**2 + dy**2) / (0.7 * radius**2)) * (move(maps["instances"]) == maps["instances"])
            w = w * np.clip((maps["normals"] * move(maps["normals"])).sum(-1), 0, 1) ** 48
            w *= np.exp(-(((move(maps["depth"]) / maps["depth"] - 1) / 0.04) ** 2))
            w *= np.exp(-(((move(level) - level) / 0.12) ** 2))
            w *= np.exp(-(np.abs(move(base) - base).sum(-1) / 0.5))  # mixed pixels on texture edges
            total += w[..., None] * move(light)
            weight += w
    return total / weight[..., None] * base


def develop(clean: list[np.ndarray]) -> list[np.ndarray]:
    """Linear images of one scene to 8-bit sRGB, with one exposure for all views and a soft shoulder."""
    luminance = np.concatenate([(image @ [0.2126, 0.7152, 0.0722]).ravel() for image in clean])
    gain = 0.74 / max(float(np.percentile(luminance, 92)), 1e-6)
    gain = float(np.clip(gain, 0.2 / luminance.mean(), 0.42 / luminance.mean()))
    done = []
    for image in clean:
        x = image * gain
        x = np.where(x < 0.65, x, 0.65 + 0.35 * (1 - np.exp(-(np.maximum(x, 0.65) - 0.65) / 0.35)))
        srgb = np.where(x <= 0.0031308, 12.92 * x, 1.055 * np.maximum(x, 1e-8) ** (1 / 2.4) - 0.055)
        done.append(np.rint(np.clip(srgb, 0, 1) * 255).astype(np.uint8))
    return done


def correspondences(
    views: list[dict[str, np.ndarray]],
    cameras: list[tuple[np.ndarray, np.ndarray]],
    scale: int,
    rng: np.random.Generator,
    count: int = 128,
) -> np.ndarray:
    """Points seen in both views.

    Pixel centres of view 0 are lifted by the stored depth and projected into view 1; a point is kept if the four
    pixels around it show the same instance and their interpolated depth agrees.

    Args:
        views: the two views' `geometry_maps`.
        cameras: their ``(cam_from_world, K)``.
        scale: stored depth units per metre.
        rng: samples the visible points.
        count: maximum number of points; three quarters lie on objects if available.

    Returns:
        ``(N, 2, 2)`` float32: ``(x, y)`` in view 0 and in view 1, pixel centres at +0.5.
    """
    (pose0, k0), (pose1, k1) = cameras
    depth0, depth1 = (view["depth_code"].astype(np.float64) / scale for view in views)
    inst0, inst1 = (view["instances"] for view in views)
    height, width = depth0.shape
    local = (pixel_rays(k0, depth0.shape) * depth0[..., None]).reshape(-1, 3)
    world = (local - pose0[:3, 3]) @ pose0[:3, :3]
    seen = world @ pose1[:3, :3].T + pose1[:3, 3]
    with np.errstate(divide="ignore", invalid="ignore"):
        xy = (seen @ k1.T)[:, :2] / seen[:, 2:]
    grid = xy - 0.5
    inside = (seen[:, 2] > 0) & (grid >= 1).all(1) & (grid[:, 0] < width - 2) & (grid[:, 1] < height - 2)
    x, y = np.where(inside[:, None], grid, 1).T
    i, j = y.astype(int), x.astype(int)
    u, v = x - j, y - i
    weights = ((1 - u) * (1 - v), u * (1 - v), (1 - u) * v, u * v)
    offsets = ((0, 0), (0, 1), (1, 0), (1, 1))
    found = sum(w * depth1[i + a, j + b] for w, (a, b) in zip(weights, offsets, strict=True))
    same = np.all([inst1[i + a, j + b] == inst0.ravel() for a, b in offsets], axis=0)
    good = inside & same & (np.abs(found - seen[:, 2]) < TOLERANCE * seen[:, 2])
    on_object = inst0.ravel() > 0
    first = rng.permutation(np.flatnonzero(good & on_object))
    rest = rng.permutation(np.flatnonzero(good & ~on_object))
    take = max(count * 3 // 4, count - len(rest))
    chosen = np.sort(np.concatenate([first[:take], rest[: count - min(take, len(first))]]))
    start = np.stack([chosen % width + 0.5, chosen // width + 0.5], -1)
    return np.stack([start, xy[chosen]], 1).astype(np.float32)
