"""A hypervisor on an emulated CPU: Unicorn's Cortex-A15 is the hardware, this package is the host kernel."""
