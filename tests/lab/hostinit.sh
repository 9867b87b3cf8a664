#!/bin/sh
# First process of a lab host, in fresh mount, UTS, IPC and PID namespaces and in the host's network namespace.
# "boot" builds the host's root file system and moves into it; "run" is what stays as PID 1.
# In: LAB_NAME, LAB_STATE (directory of this host on the machine), LAB_LOWER, LAB_UPPER, LAB_WORK.
set -eu
umask 022

case $1 in
boot)
    # The machine's /proc is still mounted here, so this is the process id as the machine sees it.
    read -r pid _ </proc/self/stat
    echo "$pid" >"$LAB_STATE/pid.new"
    mv "$LAB_STATE/pid.new" "$LAB_STATE/pid"

    echo "$LAB_NAME" >/proc/sys/kernel/hostname
    # volatile: unmounting would otherwise sync the machine's whole disk, once per host
    mount -t overlay -o "lowerdir=$LAB_LOWER,upperdir=$LAB_UPPER,workdir=$LAB_WORK,volatile" overlay "$LAB_STATE/root"
    cd "$LAB_STATE/root"
    mount -t proc -o nosuid,nodev,noexec proc proc
    mount -t sysfs -o ro,nosuid,nodev,noexec sysfs sys
    mount -t tmpfs -o mode=755,size=1m dev dev
    for node in null zero full random urandom tty; do
        : >"dev/$node"
        mount --bind "/dev/$node" "dev/$node"
    done
    mkdir dev/pts dev/shm
    mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts dev/pts
    mount -t tmpfs -o mode=1777 shm dev/shm
    ln -s pts/ptmx dev/ptmx
    ln -s /proc/self/fd dev/fd
    ln -s /proc/self/fd/0 dev/stdin
    ln -s /proc/self/fd/1 dev/stdout
    ln -s /proc/self/fd/2 dev/stderr
    mount -t tmpfs -o mode=755 run run
    mkdir run/sshd run/lock run/machine
    chmod 1777 run/lock

    # A boot id of its own, over the kernel's: only so can a reboot be seen.
    cp "$LAB_STATE/boot_id" run/boot_id
    mount --bind run/boot_id proc/sys/kernel/random/boot_id
    if [ -e "$LAB_STATE/meminfo" ]; then
        cp "$LAB_STATE/meminfo" run/meminfo
        mount --bind run/meminfo proc/meminfo
    fi
    while read -r source target; do
        mount --bind "$source" ".$target"
        mount -o remount,bind,ro ".$target"
    done <"$LAB_STATE/mounts"

    cp "$LAB_STATE/hostinit.sh" run/hostinit.sh
    pivot_root . run/machine
    exec chroot . /usr/bin/env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
        /bin/sh /run/hostinit.sh run
    ;;
run)
    umount -l /run/machine
    rmdir /run/machine
    cd /
    # As cloud-init has it: before everything else, at every boot.
    if [ -x /etc/boothook ]; then /etc/boothook || echo "the boothook failed" >&2; fi
    /usr/sbin/sshd -E /run/sshd.log || { cat /run/sshd.log >&2; exit 1; }
    exec </dev/null >/dev/null 2>&1
    # The shell's wait also reaps what was orphaned and handed to PID 1.
    while :; do
        sleep 3600 &
        wait
    done
    ;;
esac
