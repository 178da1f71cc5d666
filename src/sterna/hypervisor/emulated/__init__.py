"""A hypervisor on an emulated CPU: Unicorn's is the hardware, this package is the host kernel."""
