"""Virtual machines in processes of their own, sterna's and QEMU's: started, driven by QMP, watched, ended with ours."""
