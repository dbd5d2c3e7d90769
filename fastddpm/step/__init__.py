"""A reverse step and all that it reads: `Step`, the samples' `State`, the `Book` of rows, what a network must offer."""
