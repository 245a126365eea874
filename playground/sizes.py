"""Image sizes (width, height) in px. No pair of the held-out list occurs in the training list.

A visual token covers 32×32 px (patch 16, merge 2), so 384×160 px is 60 tokens.
"""

PRETRAINING_SIZE = (128, 128)

# Legible after the squash to the tower's pre-training size of 128×128 px.
SIMPLE_TRAIN_SIZES = ((128, 96), (128, 128), (128, 128), (160, 128))
SMALL_TRAIN_SIZES = (
    (128, 96),
    (128, 128),
    (160, 128),
    (128, 192),
    (160, 192),
    (192, 160),
    (192, 192),
)
LARGE_TRAIN_SIZES = (
    (224, 128),
    (256, 128),
    (320, 128),
    (416, 128),
    (256, 160),
    (288, 160),
    (352, 160),
    (224, 224),
    (256, 192),
    (288, 192),
    (352, 192),
    (128, 256),
    (128, 320),
    (160, 256),
    (160, 352),
    (192, 288),
)
TRAIN_SIZES = SMALL_TRAIN_SIZES + LARGE_TRAIN_SIZES

SMALL_HELDOUT_SIZES = (
    (128, 160),
    (160, 160),
    (192, 128),
    (192, 224),
    (256, 224),
    (288, 128),
    (128, 288),
)
# Not square and more than 1.5 times the area of the fixed stage's 192×192 px.
WIDE_HELDOUT_SIZES = (
    (384, 160),
    (448, 128),
    (320, 192),
    (160, 384),
    (192, 320),
    (320, 224),
)
HELDOUT_SIZES = SMALL_HELDOUT_SIZES + WIDE_HELDOUT_SIZES
