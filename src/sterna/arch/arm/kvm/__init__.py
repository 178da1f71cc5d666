"""KVM on arm64 hosts, whatever the guest is."""
