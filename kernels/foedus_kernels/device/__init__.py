"""Triton device code and its launchers, one module an operator; two have their device code beside them
(`..._kernels.py`). Each equals a torch reference outside this folder.

Nothing outside imports Triton: `backend.py` says whether this folder can run before anything of it is imported.
"""
