"""Networks: the U-Net, its blocks, and the body that steps ask."""
