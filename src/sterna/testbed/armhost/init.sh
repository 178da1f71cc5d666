#!/bin/busybox sh
# The first process of the emulated host: sets it up, runs one command, reports its exit code, switches off.
# /bin/busybox sh needs no applet links: with no PATH yet, each name is an applet.
export PATH=/usr/sbin:/usr/bin HOME=/root
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox --install -s /usr/bin 2>/dev/null
mkdir -p /dev/shm /dev/pts
ln -s /proc/self/fd /dev/fd
mount -t tmpfs tmp /tmp
mount -t tmpfs shm /dev/shm
mount -t devpts pts /dev/pts
for module in $(cat /etc/sterna/modules); do insmod $module; done
hostname armhost
ifconfig lo up
if ifconfig eth0 10.0.2.15 netmask 255.255.255.0 up 2>/dev/null; then
    route add default gw 10.0.2.2
    echo nameserver 10.0.2.3 > /etc/resolv.conf
fi
for port in /sys/class/virtio-ports/*; do
    ln -s /dev/${port##*/} /run/$(cat $port/name)
done
mkdir /sterna
tar -x -f /dev/vda -C /sterna
cd /sterna/tree
export PYTHONPATH=/sterna/tree/src LANG=C.UTF-8 TERM=${TERM:-dumb}
if [ -e /run/terminal ]; then
    setsid cttyhack sh /sterna/command <>/run/terminal >&0 2>&1
else
    sh /sterna/command </dev/null >/run/out 2>/run/err
fi
echo $? > /run/status
sync
poweroff -f
