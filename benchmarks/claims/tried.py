"""What was tried where a claim did not come out as told: the page's notes, from docs/log.md (2026-11-21)."""

LOG = "[log](log.md#2026-11-21-the-ingredients-of-the-c-radiov4-recipe-with-and-without)"
NOTES = {
    "resolutions": (
        "Tried: both teachers at all sizes, against each at a size of its own. Half holds: the mode switch goes "
        "(Lite0's agreement fell to -0.20 at 448 px without, and is 0.05 with), but 300 steps explain a tenth of "
        "Lite0's map, so that a loss near 1 cannot halve; nearest neighbours stay no more often."
    ),
    "damp": (
        "Tried: sigma 0.1 and 0.2. In 300 steps noise on the weights slows a student that still learns; only under "
        "additive noise is sigma 0.1 level with none."
    ),
    "cpe": (
        "Tried: HOG as teacher. CPE is ahead in the mean, by less than seeds differ: HOG hardly needs positions, so "
        "this teacher cannot show what the table costs."
    ),
    "cones": (
        "Tried: errors against the dispersion of other images than the training's gave 1.30 and 1.27; dispersions now "
        "come from the training images. The goal of 1.3 is met, by plain cosine too: with two teachers of one image "
        "set the student has room for both."
    ),
    "whole_recipe": (
        "Tried: leaving DAMP out, and then it holds. Noise on the weights of a pretrained convnet, in 100 steps and "
        "with norms whose statistics are frozen, costs the language it started with: 0.51 to 0.16 in ImageNet's "
        "zero-shot, and 0.55 without DAMP. With a ViT from scratch both arms were at chance in kNN and zero-shot after "
        "600 steps, and showed nothing."
    ),
}
