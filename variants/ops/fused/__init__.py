"""Fused attention kernels of torch: which one a device has, and calls that are combined."""
