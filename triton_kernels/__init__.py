"""Kernels: one operation per file, its torch reference and its Triton kernel side by side.

Every operation has a reference that runs anywhere and defines what is right; the kernel is an optimisation with a
stated tolerance. :mod:`vlm_budget.ops` chooses between them; ``make kernels-compile`` compiles all kernels without a
GPU, and ``make gpu`` tests and times them on one.
"""

if __name__ != "vlm_budget.triton_kernels":
    # Serving engines look for a top-level `triton_kernels` and prefer it to their own copy: be loud.
    raise ImportError(
        f"this folder was imported as {__name__!r}, but it is the package vlm_budget.triton_kernels. "
        "Python found it because the root of the vlm-budget repository is on sys.path: start Python with -P "
        "or PYTHONSAFEPATH=1, or from another folder, and import vlm_budget.triton_kernels."
    )
