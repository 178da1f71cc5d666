"""The kernel's dirty log measured, beside the kernel's own part of it."""
