"""Render the `scenes` benchmark: procedural still lifes with exact depth, normals, masks and correspondences.

Needs ``pip install mitsuba numpy scipy pillow``; everything else is generated. From the repository root::

    python benchmarks/scenes/render.py -o scenes.tar

Finished scenes are kept in ``<output>.work``, so an interrupted run resumes. The same arguments give
the same scenes (bitwise on one machine and library version). The format is described in docs/scenes.md.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shutil
import tarfile
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import drjit as dr
import mitsuba as mi
import numpy as np
from PIL import Image

mi.set_variant("scalar_rgb")  # must come before the modules that build Mitsuba transforms

from captions import describe  # noqa: E402
from compose import BACKGROUNDS, CLASS_NAMES, LIGHTS, SPLITS, Camera, Layout, compose, plan  # noqa: E402
from passes import albedo, correspondences, denoise, develop, geometry_maps  # noqa: E402
from stage import assemble  # noqa: E402

DEPTH_SCALE = 5000
"""Stored depth = metres * 5000: steps of 0.2 mm up to 13.1 m."""
FORMAT = 1
MIN_VISIBLE = 48
"""Objects with fewer pixels (at 128 px) are omitted from captions."""
ATTEMPTS = 60


def _sensor(camera: Camera, size: int, samples: int, exact: bool) -> Any:
    """A Mitsuba camera; ``exact`` samples each pixel once, at its centre."""
    up, film_filter = [0, 0, 1], "box" if exact else "gaussian"
    sampler = (
        {"type": "stratified", "sample_count": 1, "jitter": False}
        if exact
        else {"type": "multijitter", "sample_count": samples}
    )
    film = {"type": "hdrfilm", "width": size, "height": size, "rfilter": {"type": film_filter}, "pixel_format": "rgb"}
    pose = mi.ScalarTransform4f().look_at([float(v) for v in camera.eye], [float(v) for v in camera.target], up)
    return mi.load_dict(
        {
            "type": "perspective",
            "fov": float(camera.fov),
            "fov_axis": "x",
            "near_clip": 0.05,
            "far_clip": 100.0,
            "to_world": pose,
            "film": film,
            "sampler": sampler,
        }
    )


def _load(layout: Layout, bare: bool = False) -> tuple[Any, dict[int, int], str]:
    """The Mitsuba scene, the instance of each shape index, and the background phrase."""
    with tempfile.TemporaryDirectory() as folder:
        description, owners, phrase = assemble(layout, Path(folder), bare)
        scene = mi.load_dict(description, parallel=False, optimize=False)
    return scene, {k: owners.get(shape.id(), 0) for k, shape in enumerate(scene.shapes())}, phrase


def _geometry(layout: Layout, size: int, scene: Any, owners: dict[int, int]) -> list[dict[str, np.ndarray]]:
    """The exact geometry maps of both views."""
    return [
        geometry_maps(
            scene,
            _sensor(camera, size, 1, exact=True),
            camera.cam_from_world,
            camera.intrinsics(size),
            owners,
            DEPTH_SCALE,
        )
        for camera in layout.cameras
    ]


def _acceptable(views: list[dict[str, np.ndarray]], layout: Layout, size: int, least: float) -> bool:
    """Whether the subject is the largest object of both views, covers a share ``least``, and no object is hidden."""
    for view in views:
        count = np.bincount(view["instances"].ravel(), minlength=len(layout.objects) + 1)[1:] / size**2
        if count[0] < least or (count[1:] > 0.85 * count[0]).any() or (count < MIN_VISIBLE / 128**2).any():
            return False
    return True


def _objects(layout: Layout, instances: np.ndarray) -> list[dict[str, Any]]:
    """Entry of each object of one view in scene.json; ``box`` is xyxy in pixels, exclusive at the far side."""
    rows = []
    for number, item in enumerate(layout.objects, 1):
        ys, xs = np.nonzero(instances == number)
        box = [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1] if len(xs) else [0, 0, 0, 0]
        rows.append(
            {
                "instance": number,
                "class": item.identity.category,
                "identity": item.identity.name,
                "material": item.identity.material,
                "colour": item.identity.colour,
                "pixels": len(xs),
                "box": box,
            }
        )
    return rows


def _save_view(folder: Path, k: int, colour: np.ndarray, maps: dict[str, np.ndarray], semantic: np.ndarray) -> None:
    Image.fromarray(colour).save(folder / f"v{k}.webp", quality=92, method=6)
    Image.fromarray(maps["instances"]).save(folder / f"v{k}.inst.png", optimize=True)
    Image.fromarray(semantic).save(folder / f"v{k}.sem.png", optimize=True)
    Image.fromarray(maps["depth_code"]).save(folder / f"v{k}.depth.png", optimize=True)
    Image.fromarray(maps["normal_code"]).save(folder / f"v{k}.normal.png", optimize=True)


def _candidate(index: int, row: tuple[str, str, int], args: argparse.Namespace) -> tuple[Layout, Any, list[dict], str]:
    """The first composition of a scene whose views are acceptable, with its exact geometry."""
    split, subject, number = row
    for attempt in range(ATTEMPTS):
        layout = compose(index, split, subject, number, args.seed, attempt)
        if len(layout.objects) < 2:
            continue
        least = max(0.025, 0.05 - 0.001 * attempt)
        if not _acceptable(_geometry(layout, args.size, *_load(layout, bare=True)[:2]), layout, args.size, least):
            continue
        scene, owners, phrase = _load(layout)
        views = _geometry(layout, args.size, scene, owners)
        deepest = max(float(view["depth"].max()) for view in views)  # infinite if a ray misses the scene
        if deepest * DEPTH_SCALE <= 65535:
            return layout, scene, views, phrase
    raise RuntimeError(
        f"scene {index} ({subject}): no acceptable composition in {ATTEMPTS} attempts; try another --seed"
    )


def render_scene(index: int, row: tuple[str, str, int], args: argparse.Namespace, work: Path) -> None:
    """Render one scene into ``work/sNNNN`` (created when complete)."""
    layout, scene, views, phrase = _candidate(index, row, args)
    path = mi.load_dict({"type": "path", "max_depth": 5, "rr_depth": 4})
    linear = []
    for k, (camera, maps) in enumerate(zip(layout.cameras, views, strict=True)):
        sensor = _sensor(camera, args.size, args.spp, False)
        noisy = np.array(mi.render(scene, sensor=sensor, integrator=path, spp=args.spp, seed=2 * index + k), np.float64)
        linear.append(denoise(noisy, albedo(scene, sensor), maps))
    folder = work / f"s{index:04d}.part"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    classes = np.array([0, *(CLASS_NAMES.index(p.identity.category) + 1 for p in layout.objects)], np.uint8)
    rows = []
    for k, (camera, maps, colour) in enumerate(zip(layout.cameras, views, develop(linear), strict=True)):
        _save_view(folder, k, colour, maps, classes[maps["instances"]])
        objects = _objects(layout, maps["instances"])
        pose = camera.cam_from_world
        seen = [
            (o["class"], p.identity.phrase, pose[:3, :3] @ p.centre + pose[:3, 3])
            for o, p in zip(objects, layout.objects, strict=True)
            if o["pixels"] >= MIN_VISIBLE * (args.size / 128) ** 2
        ]
        caption, captions = describe([seen[0], *sorted(seen[1:], key=lambda item: item[2][2])], phrase)
        rows.append(
            {
                "caption": caption,
                "captions": captions,
                "K": camera.intrinsics(args.size).tolist(),
                "cam_from_world": pose.tolist(),
                "objects": objects,
            }
        )
    cameras = [(camera.cam_from_world, camera.intrinsics(args.size)) for camera in layout.cameras]
    points = correspondences(views, cameras, DEPTH_SCALE, np.random.default_rng([*layout.seed, 7]))
    np.save(folder / "corr.npy", points)
    subject = layout.objects[0].identity
    facts = {
        "scene": folder.stem,
        "split": layout.split,
        "subject": subject.category,
        "identity": subject.name,
        "background": layout.background,
        "light": layout.light,
        "views": rows,
    }
    (folder / "scene.json").write_text(json.dumps(facts, separators=(",", ":")))
    folder.rename(work / f"s{index:04d}")


def _job(job: tuple[int, tuple[str, str, int], argparse.Namespace, Path]) -> int:
    dr.set_thread_count(1)
    render_scene(*job)
    return job[0]


def pack(work: Path, count: int, args: argparse.Namespace) -> str:
    """Write the archive (sorted names, no times or owners) and return its sha256."""
    folders = [work / f"s{index:04d}" for index in range(count)]
    scenes = [json.loads((folder / "scene.json").read_text()) for folder in folders]
    identities: dict[str, dict[str, list[str]]] = {split: {} for split in SPLITS}
    for split, numbers in SPLITS.items():
        for name in CLASS_NAMES:
            identities[split][name] = [f"{name.replace(' ', '_')}-{k:02d}" for k in numbers]
    meta = {
        "format": FORMAT,
        "name": "scenes",
        "licence": "CC0-1.0",
        "renderer": f"Mitsuba {mi.__version__}",
        "size": [args.size, args.size],
        "spp": args.spp,
        "seed": args.seed,
        "depth_scale": DEPTH_SCALE,
        "classes": list(CLASS_NAMES),
        "backgrounds": list(BACKGROUNDS),
        "lights": list(LIGHTS),
        "views": 2,
        "identities": identities,
        "scenes": {split: [s["scene"] for s in scenes if s["split"] == split] for split in SPLITS},
    }
    files = {"meta.json": json.dumps(meta, separators=(",", ":")).encode()}
    files |= {
        f"{folder.name}/{path.name}": path.read_bytes() for folder in folders for path in sorted(folder.iterdir())
    }
    with tarfile.open(args.output, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name in ["meta.json", *sorted(files.keys() - {"meta.json"})]:
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(files[name]), 0o644
            archive.addfile(info, io.BytesIO(files[name]))
    return hashlib.sha256(Path(args.output).read_bytes()).hexdigest()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Render the scenes benchmark.")
    parser.add_argument("-o", "--output", default="scenes.tar", help="archive to write")
    parser.add_argument("--scenes", type=int, default=160, help="number of scenes, with two views each")
    parser.add_argument("--size", type=int, default=128, help="side of the images in pixels")
    parser.add_argument("--spp", type=int, default=36, help="paths per pixel of the colour images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes, with one rendering thread each")
    args = parser.parse_args()
    work = Path(f"{args.output}.work")
    work.mkdir(parents=True, exist_ok=True)
    settings = {"size": args.size, "spp": args.spp, "seed": args.seed, "format": FORMAT}
    stamp = work / "settings.json"
    if stamp.exists() and json.loads(stamp.read_text()) != settings:
        parser.error(f"{work} was rendered with other settings; remove it or choose another --output")
    stamp.write_text(json.dumps(settings))
    jobs = [(k, row, args, work) for k, row in enumerate(plan(args.scenes)) if not (work / f"s{k:04d}").exists()]
    start = time.monotonic()
    with get_context("spawn").Pool(max(1, min(args.workers, os.cpu_count() or 1))) as pool:
        for done, index in enumerate(pool.imap_unordered(_job, jobs), 1):
            spent = time.monotonic() - start
            left = spent / done * (len(jobs) - done)
            print(
                f"\rscene {index:04d}  {done}/{len(jobs)}  {spent / done / 2:.2f} s/image  {left:.0f} s left ",
                end="",
                flush=True,
            )
    print()
    digest = pack(work, args.scenes, args)
    print(f"{args.output}: {Path(args.output).stat().st_size:,} bytes, sha256 {digest}")


if __name__ == "__main__":
    main()
