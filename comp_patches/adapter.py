"""The adapter between tower and LLM (CoMP 3.1). P = patches, D = tower width, H = LLM width, m = merge_size."""

from torch import Tensor, nn


class DownsampleMLP(nn.Sequential):
    """m x m patches to one token: LayerNorm(D), concatenate, Linear(m*m*D, m*m*D), GELU (erf), Linear(m*m*D, H).

    State-dict keys `norm.*`, `0.*`, `2.*`, so that LLaVA's `mm_projector.*` names stay what they are.
    """

    def __init__(self, vision_width: int, llm_width: int, merge_size: int = 2):
        merged_width = merge_size**2 * vision_width
        super().__init__(nn.Linear(merged_width, merged_width), nn.GELU(), nn.Linear(merged_width, llm_width))
        self.norm = nn.LayerNorm(vision_width, eps=1e-6)
        self.merge = merge_size**2  # patches per visual token

    def forward(self, features: Tensor) -> Tensor:
        """(P, D) in block order -> (P / m*m, H): one token per block, blocks row by row within an image."""
        if features.shape[0] % self.merge:
            raise ValueError(
                f"{features.shape[0]} patches do not divide into blocks of {self.merge}. Do the image processor and "
                "the adapter have the same merge_size?"
            )
        linear_in, activation, linear_out = self[0], self[1], self[2]
        blocks = self.norm(features).reshape(-1, linear_in.in_features)
        return linear_out(activation(linear_in(blocks)))
