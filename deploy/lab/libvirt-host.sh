#!/usr/bin/env bash
# One libvirt daemon without a system around it: libvirt-host.sh TREE STATE UUID HOSTNAME [NETNS]
#
# Runs in the foreground, in mount and UTS namespaces of its own (and in the network namespace NETNS): /usr has the tree
# of libvirt.sh over it, /etc, /var and /run are its own, below STATE. Its socket is STATE/run/libvirt/libvirt-sock, also
# seen from outside. Its guests outlive it, as everywhere. Needs root.
set -euo pipefail

[ $# -ge 4 ] || { echo "usage: libvirt-host.sh TREE STATE UUID HOSTNAME [NETNS]" >&2; exit 1; }
tree=$1/root state=$2 uuid=$3 name=$4
mkdir -p "$state"/{etc,etc.work,var,var.work,run,lib}
export tree state uuid name
inside='set -euo pipefail
hostname "$name"
mount -t overlay overlay -o "lowerdir=$tree/usr:/usr" /usr
mount -t overlay overlay -o "lowerdir=$tree/etc:/etc,upperdir=$state/etc,workdir=$state/etc.work" /etc
mount -t overlay overlay -o "lowerdir=$tree/var:/var,upperdir=$state/var,workdir=$state/var.work" /var
mount --bind "$state/run" /run
# A socket in an overlay is another one in each mount of it, and a restarted daemon would find its guests dead.
mkdir -p /var/lib/libvirt
cp -an /var/lib/libvirt/. "$state/lib/"
mount --bind "$state/lib" /var/lib/libvirt
mkdir -p /run/libvirt /var/log/libvirt /var/cache/libvirt /etc/libvirt
grep -q ^libvirt-qemu: /etc/passwd || echo "libvirt-qemu:x:64055:64055::/var/lib/libvirt:/usr/sbin/nologin" >>/etc/passwd
grep -q ^libvirt-qemu: /etc/group || echo "libvirt-qemu:x:64055:" >>/etc/group
grep -q ^kvm: /etc/group || echo "kvm:x:64056:" >>/etc/group
printf "127.0.0.1 localhost\n127.0.1.1 %s\n" "$name" >/etc/hosts
cat >/etc/libvirt/libvirtd.conf <<END
listen_tls = 0
auth_unix_rw = "none"
host_uuid = "$uuid"
log_outputs = "3:file:$state/libvirtd.log"
END
cat >/etc/libvirt/qemu.conf <<END
user = "root"
group = "root"
security_driver = "none"
namespaces = []
cgroup_controllers = []
remember_owner = 0
stdio_handler = "file"
END
exec libvirtd'
if [ -n "${5:-}" ]; then
    exec ip netns exec "$5" unshare -m -u --propagation private bash -c "$inside"
fi
exec unshare -m -u --propagation private bash -c "$inside"
