"""What runs on a GPU: attention over frames, and how its kernels are launched."""
