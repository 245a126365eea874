"""What PyTorch does underneath, for tests of how it is done: which products, and how large a tensor at the most."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from comp_patches.cosine_scores import TF32_SETTING

PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)


class Operations(TorchDispatchMode):
    """Notes the TF32 setting under which each matrix product runs, and the most elements of a tensor that was made.

    Args:
        others: tensors of whose memory views do not count.
    """

    def __init__(self, *others):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in others}
        self.products, self.largest = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if function.overloadpacket in PRODUCTS:
            self.products.append(getattr(torch.backends.cuda.matmul, TF32_SETTING))
        made = [tensor for tensor in tree_leaves(result) if isinstance(tensor, torch.Tensor)]
        new = [tensor.numel() for tensor in made if tensor.untyped_storage().data_ptr() not in self.known]
        self.largest = max([self.largest, *new])
        return result
