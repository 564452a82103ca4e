"""The options of a model as a form of the FiftyOne App."""

from __future__ import annotations

from typing import Any

from agglo.extras import require
from agglo.integrations.fiftyone.options import FORMATS, MAPS, OUTPUTS
from agglo.integrations.fiftyone.zoo import ANY

_SUMMARY_ONLY, _MAPS_ONLY = (
    ("text_search",),
    ("maps", "prompts", "patch", "patch_image", "apply_smoothing", "smoothing_sigma"),
)


def resolve_input(model_name: str, ctx: Any) -> Any:
    """The form of a model's options: those that the chosen output uses.

    Args:
        model_name: a name of the zoo.
        ctx: FiftyOne's execution context, whose ``params`` are what was entered so far.

    Returns:
        A ``fiftyone.operators.types.Property``.
    """
    types: Any = require("fiftyone.operators.types", "fiftyone")
    inputs = types.Object()
    chosen = dict(getattr(ctx, "params", None) or {})
    if model_name == ANY:
        inputs.str("model", label="Model", description="Run folder, exported folder, or owner/name", required=True)
    inputs.enum("output_type", list(OUTPUTS), default="summary", label="Output")
    output = chosen.get("output_type") or "summary"
    if output == "summary":
        inputs.bool("text_search", default=False, label="Text search", description="Embed for comparison with text")
    else:
        inputs.list("maps", types.String(), default=["pca"], label="Heatmaps", description=f"Of {', '.join(MAPS)}")
        inputs.str("prompts", label="Texts", description="One heatmap per text; separate them by semicolons")
        inputs.str("patch", label="Patch", description="x,y in [0, 1]: similarity to this place")
        inputs.str("patch_image", label="Image of the patch", description="Path; empty for each image's own")
        inputs.bool("apply_smoothing", default=False, label="Smooth heatmaps")
        if chosen.get("apply_smoothing"):
            inputs.float("smoothing_sigma", default=1.51, label="Sigma", description="In cells of the map")
    inputs.str("heads", label="Heads", description="Names of teachers, separated by commas")
    inputs.int("max_size", label="Size", description="Longer side of the input in pixels")
    inputs.int("window", label="Window", description="Side of the attention windows in patches")
    inputs.enum("feature_format", list(FORMATS), default="NCHW", label="Feature format")
    inputs.bool("use_mixed_precision", default=False, label="bfloat16")
    inputs.bool("use_external_preprocessor", default=False, label="Resize as C-RADIO's published processor")
    inputs.str("device", label="Device", description="cpu, cuda, mps")
    return types.Property(inputs)


def parse_parameters(model_name: str, ctx: Any, params: dict[str, Any]) -> None:
    """Change a form's entries into options of :func:`load_zoo_model`, in place.

    Empty entries, and those of the other output, are removed.
    """
    del model_name, ctx
    for name in _MAPS_ONLY if params.get("output_type", "summary") == "summary" else _SUMMARY_ONLY:
        params.pop(name, None)
    prompts = _split(params.pop("prompts", None), ";")
    if params.pop("text_search", False):
        params["text"] = True
    elif prompts:
        params["text"] = prompts
    for name in ("heads", "maps"):
        if isinstance(params.get(name), str):
            params[name] = _split(params[name], ",")
    if isinstance(params.get("patch"), str) and params["patch"].strip():
        params["patch"] = [float(each) for each in _split(params["patch"], ",")]
    for name in [name for name, value in params.items() if value is None or value in ("", [])]:
        del params[name]


def _split(text: Any, separator: str) -> list[str]:
    return [part.strip() for part in str(text or "").split(separator) if part.strip()]
