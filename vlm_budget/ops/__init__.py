"""Operations that methods and the engine share, each with one meaning on every device.

An operation has two halves in one file of :mod:`vlm_budget.triton_kernels`: a torch reference, which defines what is
right, and a Triton kernel. :func:`use` and ``VLM_BUDGET_KERNELS`` choose. Every operation is a ``torch.library`` custom
operator (``torch.ops.vlm_budget.*``) with a fake kernel, so that ``torch.compile`` traces past it.
"""

from .attention_rows import attention_rows as attention_rows
from .block_map import block_map as block_map
from .block_means import block_means as block_means
from .block_sparse_attention import block_sparse_attention as block_sparse_attention
from .compact import Compacted as Compacted
from .compact import compact as compact
from .compact import compaction_index as compaction_index
from .compact import take_columns as take_columns
from .counting_sort import counting_sort as counting_sort
from .dispatch import Mode as Mode
from .dispatch import mode as mode
from .dispatch import runs_kernel as runs_kernel
from .dispatch import use as use
from .greedy_diversity import greedy_diversity as greedy_diversity
from .greedy_dpp import greedy_dpp as greedy_dpp
from .kmeans_assign import kmeans_assign as kmeans_assign
from .nearest import assign as assign
from .nearest import nearest as nearest
from .permute_tokens import permute_tokens as permute_tokens
from .permute_tokens import unpermute_tokens as unpermute_tokens
from .quota import quota as quota
from .received_attention import received_attention as received_attention
from .segmented_topk import segmented_topk as segmented_topk
from .weighted_merge import assigned_merge as assigned_merge
from .weighted_merge import softmax_merge as softmax_merge
from .weighted_merge import weighted_merge as weighted_merge
