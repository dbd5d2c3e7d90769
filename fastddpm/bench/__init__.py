"""The measuring system: what ``fastddpm bench`` and ``pytest --benchmark`` run, and a GPU's sections.

`timing` is the one way in which times are taken: a device's clock, and measures in turn. `peaks` is what the machine
gives.

Networks: a parent starts one worker per peer (`process`, `worker`; `entrants` names them). Each loads the same weights
(`job`, `peers`, `foreign`, `sessions`) and is made ready within an allowance (`lineup`); all draw the same pictures
from the same noise, and those that are equal share rounds (`runner`). While one computes the others are stopped. What
is reported are medians of ratios within a round (`figures`, `report`, `summary`).

Kernels: contenders that compute the same, compared and timed in one process (`cases`, `kernels`). `sections` puts both
together for a GPU, each part with a dry run that needs none.
"""
