#!/bin/sh
# Captures what fleet/harness/describe.py reads on this host into one text file: sh capture.sh tree.txt
#
# Put it into tests/data/hosts/<machine>/, run the tests once with FLEET_WRITE_EXPECTED=1, compare expected.json line
# by line with what you know of the machine, and commit both. Runs without root; leaves out what is not there.
# Machine-id, boot-id, hostname, GPU UUIDs, serial numbers and container ids are replaced, never written.
# The format is README.md's.
set -eu
out=${1:?"usage: sh capture.sh FILE"}
case $out in /*) ;; *) out=$PWD/$out ;; esac
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT

take() {
    for file in "$@"; do
        [ -f "$file" ] || continue
        mkdir -p "$tree${file%/*}"
        cat "$file" >"$tree$file" 2>/dev/null || rm -f "$tree$file" # EINVAL: not known to the driver
    done
}
put() {
    mkdir -p "$tree$(dirname "$1")"
    printf '%s\n' "$2" >"$tree$1"
}

take /etc/os-release /proc/sys/kernel/osrelease /proc/sys/kernel/arch /proc/xen/capabilities \
    /proc/self/cgroup /run/systemd/container
put /etc/machine-id 0123456789abcdef0123456789abcdef
put /proc/sys/kernel/random/boot_id 01234567-89ab-cdef-0123-456789abcdef
put /proc/sys/kernel/hostname host
# Only what is read: all of it would be a quarter of a megabyte on a server, most of it flags.
sed -n -e 's/^\(flags[[:space:]]*:\).* hypervisor .*/\1 fpu hypervisor/p' -e t -e 's/^\(flags[[:space:]]*:\).*/\1 fpu/p' \
    -e '/^\(processor\|model name\|cpu\|CPU implementer\|CPU part\|physical id\|core id\)[[:space:]]*:/p' -e '/^$/p' \
    /proc/cpuinfo >"$tree/proc/cpuinfo"
grep MemTotal /proc/meminfo >"$tree/proc/meminfo"
grep _allowed_list /proc/self/status >"$tree/proc/self/status"
for marker in /.dockerenv /run/.containerenv /dev/dxg /proc/driver/nvidia; do
    if [ -e "$marker" ]; then put "$marker" ''; fi
done

cpus=/sys/devices/system/cpu
take $cpus/online $cpus/cpufreq/policy*/cpuinfo_max_freq
for cpu in $cpus/cpu[0-9]*; do
    take "$cpu"/topology/physical_package_id "$cpu"/topology/core_cpus_list "$cpu"/topology/thread_siblings_list
    for cache in "$cpu"/cache/index*; do
        take "$cache/level" "$cache/type" "$cache/size" "$cache/shared_cpu_list"
    done
done
for group in $(cut -d: -f3 /proc/self/cgroup) ''; do
    while :; do
        group=${group%/}
        for base in /sys/fs/cgroup /sys/fs/cgroup/cpu /sys/fs/cgroup/memory; do
            take "$base$group/cpu.max" "$base$group/memory.max" "$base$group/memory.limit_in_bytes" \
                "$base$group/cpu.cfs_quota_us" "$base$group/cpu.cfs_period_us"
        done
        [ -n "$group" ] || break
        group=${group%/*}
    done
done

for name in product_name sys_vendor board_vendor bios_vendor; do take "/sys/class/dmi/id/$name"; done
for dimm in /sys/devices/system/edac/mc/mc*/dimm*; do take "$dimm/size" "$dimm/dimm_mem_type"; done
for disk in /sys/block/*; do
    take "$disk/size" "$disk/queue/rotational"
    if [ -e "$disk/device" ]; then
        mkdir -p "$tree$disk/device"
        take "$disk/device/model" "$disk/device/vendor" "$disk/device/name"
    fi
done
for card in /sys/class/net/*; do
    take "$card/type" "$card/speed" "$card/iflink" "$card/ifindex" "$card/tun_flags"
    if [ -e "$card/device" ]; then
        mkdir -p "$tree$card/device"
        driver=$(readlink "$card/device/driver") && ln -s "$driver" "$tree$card/device/driver"
    fi
done
for device in /sys/bus/pci/devices/*; do take "$device/vendor" "$device/class"; done
for supply in /sys/class/power_supply/*; do
    take "$supply/type" "$supply/scope" "$supply/online" "$supply/status"
done

# What programs say, each in a file named by its command; the test plays them back.
mkdir -p "$tree/output"
if command -v lscpu >/dev/null; then LC_ALL=C lscpu -J >"$tree/output/lscpu -J"; fi
if command -v systemd-detect-virt >/dev/null; then
    systemd-detect-virt >"$tree/output/systemd-detect-virt" || true # exits 1 when it says none
fi
if command -v nvidia-smi >/dev/null; then
    gpus='s/GPU-[0-9a-f-]*/GPU-00000000-0000-0000-0000-000000000000/g'
    nvidia-smi -q | sed -e "$gpus" -e 's/^\( *\(Serial Number\|.*UUID\|.*GUID\|Board ID\|Hostname\) *:\).*/\1 removed/' \
        >"$tree/output/nvidia-smi -q" || true
    # The columns that the test's stand-in for pynvml reads, with the GPUs' real UUIDs replaced by their number.
    columns=index,name,uuid,memory.total,pci.bus_id,clocks.max.sm,clocks.max.memory,enforced.power.limit
    columns=$columns,pcie.link.gen.max,pcie.link.width.max,ecc.mode.current,mig.mode.current,driver_version
    nvidia-smi --query-gpu="$columns" --format=csv,nounits | awk -F ', ' -v OFS=', ' \
        'NR > 1 { $3 = sprintf("GPU-00000000-0000-0000-0000-%012d", $1) } { print }' \
        >"$tree/output/nvidia-smi.csv" || true
fi

cd "$tree"
{
    find . -type d -empty -name device | sed -e 's/^\.//' -e 's/$/\//'
    find . -type l | while read -r link; do printf '%s -> %s\n' "${link#.}" "$(readlink "$link")"; done
    find . -type f -exec awk '
        function flush() {
            if (name != "") printf (lines == 1 ? "%s: %s\n" : "%s <<\n%s\nEOF\n"), name, text
        }
        FNR == 1 { flush(); name = substr(FILENAME, 2); text = $0; lines = 1; next }
        { text = text "\n" $0; lines++ }
        END { flush() }' {} +
} | sed -e 's/[0-9a-f]\{32,64\}/0123456789abcdef0123456789abcdef/g' -e '/GPU-/!s/[0-9a-f]\{8\}\([-_]\)[0-9a-f]\{4\}[-_][0-9a-f]\{4\}[-_][0-9a-f]\{4\}[-_][0-9a-f]\{12\}/01234567\189ab\1cdef\10123\1456789abcdef/g' \
    >"$out"
