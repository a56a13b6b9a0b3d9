"""Kernels of a problem, their factorisations, and curvature matrices.

Θ, spectra, Krylov runs, Kronecker factors.
"""
