"""The kernel's KVM behind the interface: /dev/kvm through ioctl, without a C extension.

One module per family of ioctls; `vm` and `vcpu` hold what all architectures share, `sterna.arch` what is their own.
"""
