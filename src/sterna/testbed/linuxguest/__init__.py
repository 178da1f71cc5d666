"""ARM Linux as a guest: images from Debian packages, a root file system on NFS, and how the guest is asked."""
