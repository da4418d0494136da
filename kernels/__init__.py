"""Triton kernels, each with a slow obvious twin in plain torch (`reference.py`), behind one door: `from kernels import ops`.

This file stays a docstring: transformers probes any package of this name for Hugging Face's library of kernels.
"""
