"""Training on L_simple: data, losses, the loop, and the folder it keeps."""
