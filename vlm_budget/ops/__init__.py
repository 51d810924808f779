"""Operations that methods and the engine share, each with one meaning on every device.

An operation has two halves in one file of :mod:`vlm_budget.triton_kernels`: a torch reference, which defines what is
right, and a Triton kernel. :func:`use` and ``VLM_BUDGET_KERNELS`` choose. Every operation is a ``torch.library`` custom
operator (``torch.ops.vlm_budget.*``) with a fake kernel, so that ``torch.compile`` traces past it.
"""

from .dispatch import Mode as Mode
from .dispatch import mode as mode
from .dispatch import runs_kernel as runs_kernel
from .dispatch import use as use
from .quota import quota as quota
from .segmented_topk import segmented_topk as segmented_topk
