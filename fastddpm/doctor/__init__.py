"""Proves an installation on the machine at hand: what it has, its kernels, its engines, and what a GPU must be able to.

`checks` is the list of what is looked at, each entry a function that says what it found, or raises. `surroundings`
explains GPUs that are not usable, `machine` versions, compilers and the cache, `kernels` and `engines` compare with
something independent, `gpu` looks at what only a GPU has and measures with the parts of `fastddpm.bench`.
"""
