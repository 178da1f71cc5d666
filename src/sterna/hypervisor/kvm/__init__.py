"""The kernel's KVM behind the interface: /dev/kvm through ioctl, without a C extension.

One module per family of ioctls; `vm` and `vcpu` hold what all architectures share, `x86/` what is its own.
"""
