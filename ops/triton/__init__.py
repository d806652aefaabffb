"""Triton twins: kernels, their launchers, and autograd functions that only save and call.

Every launcher is an op of torch's own library with a fake twin (`library.define`), so that compilers see through it.
Nothing here is imported before the first op runs on Triton.
"""
