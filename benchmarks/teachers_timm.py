"""Every timm module as a teacher: layout, position and stride of the map, summary, sizes.

``python benchmarks/teachers_timm.py`` builds small models of each module with random weights and writes the table of
``docs/guides/teachers.md``; ``python benchmarks/teachers_timm.py NAME...`` prints the rows of some models.
"""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agglo.config import build
from agglo.types import AggloError

MODELS = (
    "beit_base_patch16_224 halonet_h1 botnet26t_256 lambda_resnet26t test_byobnet mobileone_s0 cait_xxs24_224 "
    "coat_lite_tiny coat_tiny convit_tiny convmixer_768_32 test_convnext cpubone_nano crossvit_9_240 csatv2 "
    "cspresnet50 cs3darknet_s cspnext_tiny davit_tiny deepseek_vit_412m deepseek_vit_412m_enc deit_tiny_patch16_224 "
    "deit_tiny_distilled_patch16_224 densenet121 dla46_c dpn48b edgenext_xx_small efficientformer_l1 "
    "efficientformerv2_s0 test_efficientnet efficientvim_m1 efficientvit_b0 efficientvit_m0 efficientvit_l1 "
    "eva02_tiny_patch14_224 vit_small_patch16_dinov3 vit_pe_core_tiny_patch16_384 vit_pe_spatial_tiny_patch16_512 "
    "vit_small_patch16_rope_224 fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny gemma4_vit_167m "
    "gemma4_vit_167m_enc ghostnet_050 hardcorenas_a hgnetv2_b0 hiera_tiny_224 hiera_small_abswin_256 "
    "sam2_hiera_tiny hieradet_small hrnet_w18_small iformer_t inception_next_atto inception_resnet_v2 inception_v3 "
    "inception_v4 lcnetv2_small levit_128s levit_conv_128s lowformer_b0 test_mambaout test_coatnet test_maxvit "
    "maxxvit_rmlp_nano_rw_256 poolformer_s12 caformer_s18 mixer_s32_224 gmlp_ti16_224 resmlp_12_224 lcnet_035 "
    "mobilenetv4_conv_small_035 mobilenetv5_300m_enc mobilevit_xxs mobilevitv2_050 mvitv2_tiny mvitv2_small_cls "
    "naflexvit_base_patch16_gap naflexvit_base_patch16_map naflexvit_base_patch16_radio_v3 nasnetalarge nest_tiny "
    "nest_tiny_jx nextvit_small test_nfnet pit_ti_224 pit_ti_distilled_224 pnasnet5large pvt_v2_b0 qwen3_vit_88m "
    "qwen3_vit_88m_enc qwen3_vit_88m_merge rdnet_tiny regnetx_002 repghostnet_050 repvit_m0_9 res2net50_48w_2s "
    "resnest14d test_resnet resnetv2_18 rexnet_100 selecsls42 legacy_seresnet18 sequencer2d_s shvit_s1 skresnet18 "
    "starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224 swin_s3_tiny_224 swinv2_tiny_window8_256 "
    "swinv2_cr_tiny_224 tiny_vit_5m_224 tnt_s_patch16_224 tresnet_m twins_svt_small twins_pcpvt_small vgg11 "
    "visformer_tiny test_vit test_vit2 vit_small_patch14_dinov2 vit_base_patch32_siglip_256 "
    "vit_base_patch16_radio_v3 vit_tiny_r_s16_p8_224 test_vit_relpos samvit_base_patch16_224 vitamin_small_224 "
    "volo_d1_224 ese_vovnet19b_slim_dw legacy_xception xception41 xcit_nano_12_p16_224"
)
"""At least one small model of each module, and one of each form that a module has."""
DRAWS = 8
"""Changes of a cell that are added up: in narrow networks with random weights a single one may vanish."""
PAGE = Path(__file__).parents[1] / "docs" / "guides" / "teachers.md"
MARKS = ("<!-- timm modules -->\n", "<!-- end of timm modules -->\n")


def check(name: str, **keys: Any) -> dict[str, Any]:
    """One model as a teacher: ``refused`` with the reason, or its spec and the list of ``faults``."""
    try:
        teacher = build("teachers", {"kind": "timm", "model": name, "weights": "random", **keys})
    except AggloError as error:
        return {"model": name, "refused": str(error)}
    spec = teacher.spec
    row = {"model": name, "spec": [spec.summary, spec.spatial, spec.stride, spec.step], "canvas": teacher.canvas}
    faults: list[str] = []
    for size in sizes_of(teacher):
        try:
            faults += check_size(teacher, size)
        except Exception as error:  # noqa: BLE001 - any error is a fault of this row
            faults.append(f"{size}: {type(error).__name__}: {str(error).strip().splitlines()[:1]}")
    return row | {"faults": faults}


def sizes_of(teacher: Any) -> list[tuple[int, int]]:
    """Small legal sizes: two rectangles, unless the model has one size."""
    if teacher.canvas:
        return [(teacher.canvas, teacher.canvas)]
    cell = teacher.spec.step
    short = max(4, round(96 / cell)) if cell < 96 else 1
    return [(cell * short, cell * (short + 2)), teacher.input_size((112, 96), 16)]


@torch.no_grad()
def check_size(teacher: Any, size: tuple[int, int]) -> list[str]:
    """The faults of a teacher on images of one size."""
    spec, faults = teacher.spec, []
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, *size, generator=generator)
    out, again = teacher(images), teacher(images)
    grid = size[0] // spec.stride, size[1] // spec.stride
    if tuple(out.spatial.shape) != (2, spec.spatial, *grid):
        return [f"{size}: map of shape {tuple(out.spatial.shape)}, expected {(2, spec.spatial, *grid)}"]
    if not out.spatial.isfinite().all() or not out.summary.isfinite().all():
        faults.append(f"{size}: not finite")
    if not torch.equal(out.spatial, again.spatial) or not torch.equal(out.summary, again.summary):
        faults.append(f"{size}: not deterministic")
    if tuple(out.summary.shape) != (2, spec.summary):
        faults.append(f"{size}: summary of shape {tuple(out.summary.shape)}")
    if not torch.allclose(out.summary, pooled(teacher, images), atol=1e-4, rtol=1e-3):
        faults.append(f"{size}: the summary is not the input of the classifier")
    for cell in {(min(1, grid[0] - 1), max(0, grid[1] - 2)), (max(0, grid[0] - 2), min(1, grid[1] - 1))}:
        found = changed_cell(teacher, images, out.spatial, cell, generator)
        near = max(abs(found[0] - cell[0]), abs(found[1] - cell[1])) <= 1
        # Untrained networks of large receptive fields spread a small change.
        if not (near or moves_along(teacher, images, out.spatial) or early(teacher, images, cell, generator)):
            faults.append(f"{size}: pixels of cell {cell} of {grid} change cell {found}")
    return faults


def pooled(teacher: Any, images: Tensor) -> Tensor:
    """The model's own pooled features, by its own forward pass."""
    net = teacher.backbone.net
    return net.forward_head(net.forward_features(teacher.backbone.condition(images)), pre_logits=True)


def changed_cell(
    teacher: Any, images: Tensor, spatial: Tensor, cell: tuple[int, int], generator: torch.Generator, stage: int = -1
) -> tuple[int, int]:
    """Row and column of the cell that changes most when the pixels of ``cell`` do, in the map or after a stage."""
    stride, change = teacher.spec.stride, torch.zeros(())
    for _ in range(DRAWS):
        changed = images.clone()
        part = changed[:, :, cell[0] * stride : (cell[0] + 1) * stride, cell[1] * stride : (cell[1] + 1) * stride]
        part.copy_(torch.rand(part.shape, generator=generator))
        after = teacher(changed).spatial if stage < 0 else teacher.intermediates(changed, [stage])[0]
        change = change + (after - spatial).norm(dim=1).sum(0)
    index = int(change.argmax())
    return index // change.shape[1], index % change.shape[1]


def early(teacher: Any, images: Tensor, cell: tuple[int, int], generator: torch.Generator) -> bool:
    """Whether ``cell`` changes most after the first stage of the map's stride."""
    strides = [int(each["reduction"]) for each in teacher.backbone.net.feature_info]
    stage = strides.index(teacher.spec.stride)
    spatial = teacher.intermediates(images, [stage])[0]
    return changed_cell(teacher, images, spatial, cell, generator, stage) == cell


def moves_along(teacher: Any, images: Tensor, spatial: Tensor) -> bool:
    """Whether the centre of the map's change moves left and down with the quadrant of the image that changes."""
    height, width = images.shape[-2] // 2, images.shape[-1] // 2
    centres = []
    for top, left in ((0, width), (height, 0)):
        changed = images.clone()
        changed[:, :, top : top + height, left : left + width] = (
            1 - changed[:, :, top : top + height, left : left + width]
        )
        change = (teacher(changed).spatial - spatial).norm(dim=1).sum(0)
        rows, columns = (torch.arange(n, dtype=torch.float32) for n in change.shape)
        change = change / change.sum()
        centres.append((float(change.sum(1) @ rows), float(change.sum(0) @ columns)))
    (upper, right), (lower, left_) = centres
    return lower - upper > 0.02 * spatial.shape[-2] and right - left_ > 0.02 * spatial.shape[-1]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: the legal input sizes of each module, and why models are refused."""
    import timm

    module_of = {name: module for module in timm.list_modules() for name in timm.list_models(module=module)}
    groups: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        if "refused" in row:
            continue
        spec, canvas = row["spec"], row["canvas"]
        own = "multiples of its patch or of the map's stride" if spec[3] == spec[2] else f"multiples of {spec[3]}"
        group = groups.setdefault("one size, its own or `size:`" if canvas else own, {})
        group.setdefault(module_of[row["model"]], []).append(f"`{row['model']}`")
    lines = ["| input sizes | modules (models tried) |", "| --- | --- |"]
    for sizes, modules in groups.items():
        cells = [f"{name} ({', '.join(modules[name])})" for name in sorted(modules)]
        lines.append(f"| {sizes} | {'; '.join(cells)} |")
    lines += [f"| refused: {row['refused']} | {module_of[row['model']]} |" for row in rows if "refused" in row]
    return f"{len(set(module_of.values()))} modules of timm {timm.__version__}:\n\n" + "\n".join(lines) + "\n"


def main(names: list[str]) -> int:
    """Check models one by one; a bad one exits with 1."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    warnings.simplefilter("ignore")
    rows = []
    for name in names or MODELS.split():
        rows.append(check(name))
        print(json.dumps(rows[-1]), flush=True)
    if not names:
        page = PAGE.read_text()
        before, _, rest = page.partition(MARKS[0])
        PAGE.write_text(before + MARKS[0] + table(rows) + MARKS[1] + re.split(MARKS[1], rest)[-1])
    return int(any(row.get("faults") for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
