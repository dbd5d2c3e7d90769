"""The machinery of ``fastddpm bench``: workloads, peers in processes of their own, figures, tables and plots.

A parent process starts one worker per peer (`process`, `worker`). Each loads the same weights (`peers`, `foreign`,
`sessions`) and draws the same pictures from the same noise; it is timed only if they are equal (`runner`). Peers take
turns, and while one computes the others are stopped. What is reported are medians of ratios within a round (`figures`,
`report`).
"""
