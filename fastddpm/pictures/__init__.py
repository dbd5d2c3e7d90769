"""Pictures that come in: image files, arrays, tensors and whole data sets, as the networks take them."""
