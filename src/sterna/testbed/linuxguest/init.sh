#!/bin/busybox sh
# The first process in the initramfs: loads what the root file system needs, and goes there.
export PATH=/bin
/bin/busybox mkdir -p /proc /sys /dev /root
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
for module in $(/bin/busybox cat /modules); do /bin/busybox insmod $module; done
tries=0
until [ -b /dev/vda ] || [ $tries = 100 ]; do
    tries=$((tries + 1))
    /bin/busybox usleep 100000
done
if ! /bin/busybox mount -t ext4 -o noatime /dev/vda /root; then
    echo "sterna: /dev/vda cannot be mounted"
    /bin/busybox poweroff -f
fi
/bin/busybox mount -o move /dev /root/dev
/bin/busybox umount /sys
/bin/busybox umount /proc
exec /bin/busybox switch_root /root /usr/sbin/sterna-init
