#!/bin/bash
# boot.sh NAME DIR: a real systemd as PID 1 of namespaces of its own, on an overlay of this machine's root. It is called
# in the host's network namespace, inside fresh mount, pid, uts and ipc namespaces; DIR is the host's, and is gone with it.
set -e
name=$1 dir=$2
mount --make-rprivate /
mount -t tmpfs -o mode=0755 tmpfs "$dir"
mkdir -p "$dir"/{upper,work,root,cg}
mount -t cgroup2 none "$dir/cg"
mkdir -p "$dir/cg/drover-test-$name"
echo $$ > "$dir/cg/drover-test-$name/cgroup.procs"
hostname "$name"
exec unshare --cgroup bash -s "$name" "$dir" <<'IN'
set -e
name=$1 dir=$2 root=$2/root
mount -t overlay overlay -o "lowerdir=/,upperdir=$dir/upper,workdir=$dir/work" "$root"
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount --bind "$root/proc/sys" "$root/proc/sys"
mount -o remount,ro,bind "$root/proc/sys"
mount -t tmpfs -o mode=0755 tmpfs "$root/run"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mount --rbind /dev "$root/dev"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
rm -rf "$root"/etc/systemd/system/*.wants "$root"/etc/drover "$root"/root/.drover
tr -d - < /proc/sys/kernel/random/uuid > "$root/etc/machine-id"
echo "$name" > "$root/etc/hostname"
: > "$root/etc/fstab"
# What would touch the machine that this one only borrows, or waits for hardware that is not here.
for unit in systemd-udevd.service systemd-udev-trigger.service systemd-udev-settle.service systemd-modules-load.service \
    systemd-sysctl.service systemd-binfmt.service proc-sys-fs-binfmt_misc.automount systemd-random-seed.service \
    systemd-remount-fs.service systemd-timesyncd.service systemd-hwdb-update.service systemd-firstboot.service \
    systemd-udevd-control.socket systemd-udevd-kernel.socket systemd-logind.service ldconfig.service \
    systemd-update-utmp.service systemd-network-generator.service systemd-networkd.service e2scrub_reap.service \
    dev-hugepages.mount dev-mqueue.mount sys-kernel-debug.mount sys-kernel-tracing.mount sys-kernel-config.mount \
    sys-fs-fuse-connections.mount systemd-pcrphase-sysinit.service systemd-journal-catalog-update.service; do
    ln -sf /dev/null "$root/etc/systemd/system/$unit"
done
cat > "$root/etc/systemd/system/drover-test.target" <<UNIT
[Unit]
Requires=basic.target
After=basic.target
AllowIsolate=yes
UNIT
# Not by chroot, in which the kernel makes no user namespaces (PrivateUsers=).
cd "$root"
mkdir -p .old
pivot_root . .old
umount -l /.old
rmdir /.old
exec env -i container=drover-test PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 \
    /lib/systemd/systemd --system --unit=drover-test.target --log-target=journal --show-status=0 --log-level=notice
IN
