#!/bin/busybox sh
# The first process on the root file system: network, ssh, swap, and the program that the kernel's command line names.
export PATH=/usr/sbin:/usr/bin HOME=/root
mount -t proc proc /proc
mount -t sysfs sys /sys
mkdir -p /dev/pts /dev/shm
mount -t devpts pts /dev/pts
mount -t tmpfs run /run
hostname guest
ifconfig lo up
# Nothing but the program's own lines on the console from here on, and its status page stays where it is.
dmesg -n 1
echo 0 >/proc/sys/vm/compact_unevictable_allowed
for word in $(cat /proc/cmdline); do
    case $word in
    sterna.address=*) address=${word#*=} ;;
    sterna.gateway=*) gateway=${word#*=} ;;
    sterna.swap=*) swap=${word#*=} ;;
    sterna.program=*) program=${word#*=} ;;
    sterna.arguments=*) arguments=$(echo ${word#*=} | tr , ' ') ;;
    esac
done
if [ -n "$address" ]; then
    ip address add $address dev eth0
    ip link set eth0 up
    ip route add default via $gateway
    # Its network is that of the card alone: all others are behind the gateway.
    ip route del ${address%.*}.0/24 dev eth0 2>/dev/null
    ip route add $gateway dev eth0 2>/dev/null
    ip route replace default via $gateway
    dropbear -s -r /etc/dropbear/host_key
fi
if [ -n "$swap" ]; then
    fallocate -l $swap /swap && chmod 600 /swap && mkswap /swap >/dev/null && swapon /swap ||
        echo "sterna: no swap space"
fi
echo "sterna: starting $program $arguments"
/usr/bin/sterna/$program $arguments
echo "sterna: $program ended with $?"
while :; do sleep 3600; done
