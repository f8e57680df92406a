"""Comparison of the implementations of each variant on a device, and which of them `auto` should select."""
