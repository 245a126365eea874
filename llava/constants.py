"""LLaVA's constants, under LLaVA's names."""

CONTROLLER_HEART_BEAT_EXPIRATION = 30  # seconds
WORKER_HEART_BEAT_INTERVAL = 15  # seconds
LOGDIR = "."

IGNORE_INDEX = -100  # a label that the cross-entropy leaves out
IMAGE_TOKEN_INDEX = -200  # an id that no tokenizer gives: here a visual token goes
DEFAULT_IMAGE_TOKEN = "<image>"  # noqa: S105  a token of text, no secret
DEFAULT_IMAGE_PATCH_TOKEN = "<im_patch>"  # noqa: S105  a token of text, no secret
DEFAULT_IM_START_TOKEN = "<im_start>"  # noqa: S105  a token of text, no secret
DEFAULT_IM_END_TOKEN = "<im_end>"  # noqa: S105  a token of text, no secret
IMAGE_PLACEHOLDER = "<image-placeholder>"
