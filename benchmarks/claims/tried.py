"""Notes on claims that did not hold: what was tried, from docs/log.md (2026-11-21)."""

LOG = "[log](log.md#2026-11-21-the-ingredients-of-the-c-radiov4-recipe-with-and-without)"
NOTES = {
    "resolutions": (
        "Tried: both teachers at all sizes, against each at one size. Half holds: mode switching disappears "
        "(Lite0's agreement at 448 px is -0.20 without, 0.05 with), but 300 steps explain a tenth of "
        "Lite0's map, so that a loss near 1 cannot halve; consistency does not improve."
    ),
    "damp": (
        "Tried: sigma 0.1 and 0.2. In 300 steps noise on the weights slows a student that still learns; only under "
        "additive noise is sigma 0.1 equal to none."
    ),
    "cpe": (
        "Tried: HOG as teacher. CPE is better in the mean, within the spread: HOG hardly depends on positions, so "
        "this teacher cannot show the effect of position embeddings."
    ),
    "cones": (
        "Tried: errors relative to the dispersion of held-out images gave 1.30 and 1.27; dispersions now "
        "come from the training images. The goal of 1.3 is met, also by plain cosine: with two teachers on one image "
        "set the student has capacity for both."
    ),
    "whole_recipe": (
        "Tried: without DAMP, where it holds. Noise on the weights of a pretrained convnet, in 100 steps and "
        "with frozen norm statistics, degrades its initial text alignment: 0.51 to 0.16 in ImageNet "
        "zero-shot, and 0.55 without DAMP. With a ViT from scratch both arms were at chance in kNN and zero-shot after "
        "600 steps, which is inconclusive."
    ),
}
